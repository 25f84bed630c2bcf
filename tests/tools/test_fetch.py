"""Downloads against a hub of our own on this machine: resumed, verified, never half-visible, the token never abroad."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.errors import InvalidParameter, ServiceError, UnknownModel
from app.store import known
from app.store.known import Known
from app.tools import fetch as module
from app.tools.fetch import fetch, listing, place_in

CONTENT = bytes(range(256)) * 4096  # 1 MiB
PATH = "/org/repo/resolve/main/vae/diffusion_pytorch_model.safetensors"


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Hub:
    """What the server has and how it behaves; what was asked of it."""

    files: dict[str, bytes]
    ranges: bool = True
    stop_after: int | None = None  # bytes of a body, then the connection is cut
    lengths: bool = True
    status: int | None = None
    redirect: str = ""
    shift: int = 0  # a range that begins elsewhere
    held: threading.Event | None = None  # in the middle of a body
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)  # path, Range, Authorization
    url: str = ""


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that leaves in the middle is what some of these tests are about."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            hub.asked.append((self.path, wanted, self.headers.get("Authorization")))
            if hub.redirect:
                self.send_response(302)
                self.send_header("Location", hub.redirect + self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = hub.files.get(self.path)
            if hub.status or content is None:
                self.send_error(hub.status or 404)
                return
            begin, status = 0, 200
            if wanted and hub.ranges:
                begin, status = int(wanted[6:-1]), 206
                if begin >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                begin += hub.shift
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            if hub.lengths:
                self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            body = content[begin:]
            if hub.stop_after is not None:
                self.wfile.write(body[: hub.stop_after])
                self.wfile.flush()
                if hub.held:
                    hub.held.wait(30)
                self.close_connection = True
                return
            self.wfile.write(body)

    server = _Quiet(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        if hub.held:
            hub.held.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub({PATH: CONTENT})) as hub:
        yield hub


def row(content: bytes = CONTENT, *, size: int | None = -1, **changes: object) -> Known:
    fields: dict[str, object] = {
        "name": "x",
        "sha256": sha(content),
        "family": "sd1",
        "names": ("x-vae", "x"),
        "bytes": len(content) if size == -1 else size,
        "repo": "org/repo",
        "file": "vae/diffusion_pytorch_model.safetensors",
    }
    return Known(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def table(monkeypatch):
    """Puts rows into the place of the known table."""

    def put(*rows: Known) -> None:
        monkeypatch.setattr(known, "known_files", lambda: {row.sha256: row for row in rows})

    put(row())
    return put


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path / "VAE"


def part_with(place: Path, content: bytes) -> Path:
    place.mkdir(exist_ok=True)
    part = place / ".x-vae.safetensors.part"
    part.write_bytes(content)
    return part


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


@pytest.mark.usefixtures("table")
class TestOneFile:
    def test_it_comes_whole_under_a_telling_name(self, hub, tmp_path, place):
        (file,) = fetch("x-vae", tmp_path, hub.url + "/")
        assert file.new
        assert file.path == place / "x-vae.safetensors"
        assert file.path.read_bytes() == CONTENT
        assert names(place) == ["x-vae.safetensors"]
        assert hub.asked == [(PATH, None, None)]

    def test_what_is_there_is_left_and_not_asked_for(self, hub, tmp_path):
        fetch("x-vae", tmp_path, hub.url)
        (file,) = fetch("X", tmp_path, hub.url)
        assert not file.new
        assert len(hub.asked) == 1

    def test_another_file_of_that_name_needs_force(self, hub, tmp_path, place):
        place.mkdir()
        (place / "x-vae.safetensors").write_text("mine")
        with pytest.raises(InvalidParameter, match=f"sha256 is {sha(b'mine')}, expected {sha(CONTENT)}; --force"):
            fetch("x-vae", tmp_path, hub.url)
        assert (place / "x-vae.safetensors").read_text() == "mine"
        assert fetch("x-vae", tmp_path, hub.url, force=True)[0].new
        assert (place / "x-vae.safetensors").read_bytes() == CONTENT

    def test_a_cut_connection_leaves_what_came_and_the_next_run_resumes(self, hub, tmp_path, place):
        hub.stop_after = 300_000
        with pytest.raises(ServiceError, match=r"keeps 300000 bytes, and the same command resumes"):
            fetch("x-vae", tmp_path, hub.url)
        assert names(place) == [".x-vae.safetensors.part"]
        hub.stop_after = None
        fetch("x-vae", tmp_path, hub.url)
        assert hub.asked[-1][1] == "bytes=300000-"
        assert (place / "x-vae.safetensors").read_bytes() == CONTENT
        assert names(place) == ["x-vae.safetensors"]

    def test_a_cut_without_a_length_is_seen_by_the_hash(self, hub, tmp_path, place, table):
        table(row(size=None))
        hub.lengths, hub.stop_after = False, 1000
        with pytest.raises(ServiceError, match=f"sha256 is {sha(CONTENT[:1000])}, expected {sha(CONTENT)}"):
            fetch("x-vae", tmp_path, hub.url)
        assert names(place) == []

    def test_a_part_of_all_bytes_is_verified_without_a_request(self, hub, tmp_path, place):
        part_with(place, CONTENT)
        fetch("x-vae", tmp_path, hub.url)
        assert hub.asked == []
        assert names(place) == ["x-vae.safetensors"]

    def test_a_part_of_all_bytes_where_no_size_is_known(self, hub, tmp_path, place, table):
        table(row(size=None))
        part_with(place, CONTENT)
        fetch("x-vae", tmp_path, hub.url)
        assert hub.asked == [(PATH, f"bytes={len(CONTENT)}-", None)]  # answered 416
        assert names(place) == ["x-vae.safetensors"]

    @pytest.mark.parametrize("size", [-1, None])
    def test_a_part_that_is_too_long_begins_anew(self, hub, tmp_path, place, table, size):
        table(row(size=size))
        part_with(place, CONTENT + b"x")
        fetch("x-vae", tmp_path, hub.url)
        assert (place / "x-vae.safetensors").read_bytes() == CONTENT

    def test_a_part_of_other_bytes_is_removed_with_both_hashes_named(self, hub, tmp_path, place):
        part_with(place, b"y" * 1000)
        wrong = sha(b"y" * 1000 + CONTENT[1000:])
        with pytest.raises(ServiceError, match=f"sha256 is {wrong}, expected {sha(CONTENT)}"):
            fetch("x-vae", tmp_path, hub.url)
        assert names(place) == []
        fetch("x-vae", tmp_path, hub.url)

    def test_a_server_without_ranges_begins_anew(self, hub, tmp_path, place):
        hub.ranges = False
        part_with(place, b"y" * 1000)
        fetch("x-vae", tmp_path, hub.url)
        assert (place / "x-vae.safetensors").read_bytes() == CONTENT
        assert len(hub.asked) == 1

    def test_a_range_that_begins_elsewhere_is_not_believed(self, hub, tmp_path, place):
        hub.shift = 10
        part_with(place, CONTENT[:1000])
        fetch("x-vae", tmp_path, hub.url)
        assert [asked[1] for asked in hub.asked] == ["bytes=1000-", None]
        assert (place / "x-vae.safetensors").read_bytes() == CONTENT

    def test_other_bytes_of_the_right_size(self, hub, tmp_path, place):
        hub.files[PATH] = CONTENT[::-1]
        with pytest.raises(ServiceError, match=f"sha256 is {sha(CONTENT[::-1])}, expected {sha(CONTENT)}"):
            fetch("x-vae", tmp_path, hub.url)
        assert names(place) == []

    @pytest.mark.parametrize("more", [b"x", b"x" * 5_000_000])
    def test_a_file_of_another_size_is_refused_at_its_head(self, hub, tmp_path, place, more):
        hub.files[PATH] = CONTENT + more
        with pytest.raises(ServiceError, match=rf"has {len(CONTENT + more)} bytes, expected {len(CONTENT)}"):
            fetch("x-vae", tmp_path, hub.url)
        assert names(place) == []

    def test_an_endless_file_is_stopped(self, hub, tmp_path, place):
        hub.files[PATH], hub.lengths = CONTENT * 20, False
        with pytest.raises(ServiceError, match=f"more than the expected {len(CONTENT)} bytes"):
            fetch("x-vae", tmp_path, hub.url)
        assert names(place) == []

    @pytest.mark.parametrize("status", [401, 403, 404, 416, 429, 500])
    def test_a_refusal_is_one_line_and_leaves_nothing(self, hub, tmp_path, place, status):
        hub.status = status
        with pytest.raises(ServiceError, match=rf"HTTP.*{status}") as raised:
            fetch("x-vae", tmp_path, hub.url)
        assert ("HF_TOKEN" in str(raised.value)) == (status in (401, 403))
        assert "\n" not in str(raised.value)
        assert names(place) == []

    def test_a_refusal_keeps_what_came_before(self, hub, tmp_path, place):
        hub.status = 500
        part = part_with(place, CONTENT[:1000])
        with pytest.raises(ServiceError):
            fetch("x-vae", tmp_path, hub.url)
        assert part.read_bytes() == CONTENT[:1000]

    def test_the_token_goes_to_the_hub_and_not_where_it_redirects_to(self, hub, tmp_path):
        with serving(Hub({PATH: CONTENT})) as other:
            hub.redirect = other.url
            fetch("x-vae", tmp_path, hub.url, "secret")
            assert hub.asked == [(PATH, None, "Bearer secret")]
            assert other.asked == [(PATH, None, None)]

    def test_a_redirected_download_resumes(self, hub, tmp_path, place):
        with serving(Hub({PATH: CONTENT})) as other:
            hub.redirect = other.url
            part_with(place, CONTENT[:1000])
            fetch("x-vae", tmp_path, hub.url)
            assert other.asked == [(PATH, "bytes=1000-", None)]

    def test_a_redirect_in_circles(self, hub, tmp_path, place):
        hub.redirect = hub.url
        with pytest.raises(ServiceError, match="redirect"):
            fetch("x-vae", tmp_path, hub.url)
        assert names(place) == []

    @pytest.mark.parametrize("address", ["http://127.0.0.1:1", "nothing", "http://[", "ftp://127.0.0.1", "http://a..b"])
    def test_a_hub_that_is_not_there(self, tmp_path, address):
        with pytest.raises(ServiceError) as raised:
            fetch("x-vae", tmp_path, address)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("address", ["http://127.0.0.1:1", "nothing"])
    def test_nothing_that_came_is_not_said_to_be_kept(self, tmp_path, address):
        with pytest.raises(ServiceError) as raised:
            fetch("x-vae", tmp_path, address)
        assert "keeps" not in str(raised.value)

    def test_an_address_that_is_none_is_told_as_such(self, tmp_path):
        with pytest.raises(InvalidParameter, match="cannot use nothing as the hub's address"):
            fetch("x-vae", tmp_path, "nothing")

    @pytest.mark.parametrize("token", ["hf_se\ncret", "hf_secrét"])
    def test_a_token_that_is_none_is_refused_and_not_shown(self, hub, tmp_path, token):
        with pytest.raises(InvalidParameter, match="HF_TOKEN") as raised:
            fetch("x-vae", tmp_path, hub.url, token)
        assert "hf_" not in str(raised.value)
        assert not hub.asked

    def test_a_server_that_falls_silent(self, hub, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "TIMEOUT", 0.3)
        hub.stop_after, hub.held = 1000, threading.Event()
        with pytest.raises(ServiceError, match=r"timed out; .* keeps 1000 bytes"):
            fetch("x-vae", tmp_path, hub.url)

    def test_a_full_disk(self, hub, tmp_path):
        import resource

        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(ServiceError, match=r"\.part: File too large, after 100000 bytes"):
                fetch("x-vae", tmp_path, hub.url)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        fetch("x-vae", tmp_path, hub.url)
        assert hub.asked[-1][1] == "bytes=100000-"

    def test_two_at_once_do_not_share_a_part(self, hub, tmp_path):
        hub.stop_after, hub.held = 1000, threading.Event()
        failures = []

        def first():
            with pytest.raises(ServiceError) as raised:
                fetch("x-vae", tmp_path, hub.url)
            failures.append(str(raised.value))

        thread = threading.Thread(target=first)
        thread.start()
        while not hub.asked:
            time.sleep(0.01)
        with pytest.raises(ServiceError, match="is being written by another fetch"):
            fetch("x-vae", tmp_path, hub.url)
        hub.held.set()
        thread.join()
        assert "resumes" in failures[0]

    def test_a_folder_that_cannot_be(self, hub, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="file"):
            fetch("x-vae", tmp_path / "file", hub.url)


def test_halves_come_together_under_their_own_names(hub, tmp_path, table):
    rows = [
        row(half.encode(), names=("t-halves", f"t_{half}"), file=f"t_{half}.safetensors")
        for half in ("encoder", "decoder")
    ]
    table(*rows)
    hub.files = {f"/org/repo/resolve/main/{half.file}": half.file[2:9].encode() for half in rows if half.file}
    assert [file.path.name for file in fetch("t_decoder", tmp_path, hub.url)] == [
        "t_encoder.safetensors",
        "t_decoder.safetensors",
    ]


def test_an_unknown_name_lists_the_others(tmp_path):
    with pytest.raises(UnknownModel, match=r"'nothing' .* taesd, "):
        fetch("nothing", tmp_path, "http://127.0.0.1:1")
    assert not list(tmp_path.iterdir())


def test_the_list_has_a_line_for_each():
    lines = listing()
    assert len(lines) == len(known.fetchable())
    assert any(
        re.match(r"sdxl-vae-fp16-fix +sdxl +334\.6 MB +fp16 ok +madebyollin/sdxl-vae-fp16-fix", x) for x in lines
    )
    assert any(re.match(r"taesdxl-halves +taesdxl +- ", line) for line in lines)


@pytest.mark.parametrize(
    ("there", "place"),
    [
        ([], "VAE"),
        (["VAE/"], "VAE"),
        (["vae/"], "vae"),
        (["checkpoints/"], "VAE"),
        (["a.safetensors"], "."),  # a VAE folder would hide what lies there flat
        (["a.safetensors", "Stable-diffusion/"], "VAE"),
        (["notes.txt"], "VAE"),
    ],
)
def test_where_it_goes_it_is_found(tmp_path, there, place):
    for name in there:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    assert place_in(tmp_path) == tmp_path / place
    assert place_in(tmp_path / "new") == tmp_path / "new" / "VAE"


def test_ctrl_c_keeps_the_part_and_says_so(tmp_path):
    """Of the real command and its real table."""
    file = known.fetchable()["taesd"][0]
    hub = Hub({f"/{file.repo}/resolve/main/{file.file}": bytes(file.bytes or 0)})
    hub.stop_after, hub.held = 5000, threading.Event()
    with serving(hub):
        command = [sys.executable, "-m", "app", "fetch", "taesd", "--models", str(tmp_path), "--base-url", hub.url]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "HF_TOKEN": "secret\n"})
        part = tmp_path / "VAE" / ".taesd.safetensors.part"
        while process.poll() is None and not (part.exists() and part.stat().st_size == 5000):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert hub.asked[0][2] == "Bearer secret"
    assert process.returncode == 1
    assert re.fullmatch(rb"latentd: taesd\.safetensors: interrupted; .* keeps 5000 bytes, .*resumes\n", err)
    assert part.stat().st_size == 5000
