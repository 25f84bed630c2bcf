"""The OpenAPI document, and the page that shows it: our own, so that it works where no other host is reached."""

from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse

from app.api.context import GUARD

PAGE = (Path(__file__).parent / "docs.html").read_text("utf-8")


def _hash_of(tag: str) -> str:
    """The page's only element of this kind, as its policy names it."""
    content = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; script-src {_hash_of('script')}; style-src {_hash_of('style')}; connect-src 'self'; "
    "img-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Of the page: nothing from elsewhere, nothing in it that is not ours."""

router = APIRouter(include_in_schema=False, dependencies=GUARD)


@router.get("/openapi.json")
async def document(request: Request) -> JSONResponse:
    """The OpenAPI document."""
    return JSONResponse(request.app.openapi())


@router.get("/docs")
async def docs() -> HTMLResponse:
    """The document as a page to read and to try; it needs no other host."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})
