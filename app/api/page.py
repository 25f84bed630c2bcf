"""GET / and /page/...: the playground. Static files, under a policy that lets in nothing else."""

from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

FOLDER = Path(__file__).parent.parent / "page"
INDEX = "index.html"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Of every file here. Pictures that the page makes are blobs; text never becomes markup."""


@dataclass(frozen=True)
class File:
    """One file of the page, in memory: a request's path is a key here, never a path on the disk."""

    content: bytes
    kind: str

    @property
    def headers(self) -> dict[str, str]:
        """Kept by browsers and asked about each time: a new version of the service brings all of a new page."""
        return {
            "ETag": f'"{b64encode(sha256(self.content).digest()).decode()}"',
            "Cache-Control": "no-cache",
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }


FILES = {path.name: File(path.read_bytes(), KINDS[path.suffix]) for path in FOLDER.iterdir() if path.suffix in KINDS}

router = APIRouter(include_in_schema=False)  # no key: the page holds no secret, and asks for one


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page."""
    return _answer(request, FILES[INDEX])


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def file(name: str, request: Request) -> Response:
    """What the page is made of."""
    if name == INDEX or name not in FILES:
        raise HTTPException(404, f"there is no /page/{name[:80]}")
    return _answer(request, FILES[name])


def _answer(request: Request, found: File) -> Response:
    """The file, or 304 where the browser has it. The server leaves the body of a HEAD out."""
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if found.headers["ETag"] in known or "*" in known:
        return Response(status_code=304, headers=found.headers)
    return Response(found.content, media_type=found.kind, headers=found.headers)
