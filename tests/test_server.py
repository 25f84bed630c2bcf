"""Where the service listens: at a Unix socket, over TLS."""

import asyncio
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest

from app.cli import main
from app.main import create_app
from app.server import Listening, server_of, sockets
from app.settings import InvalidSetting, Settings
from app.tools.service import connect
from tests.service import latent, npy, picture, until


@pytest.fixture
def path():
    """Short: a socket's path has 107 characters at most."""
    with tempfile.TemporaryDirectory(prefix="uds") as folder:
        yield Path(folder) / "socket"


def test_its_owner_and_group_may_connect_and_nobody_else(path):
    before = os.umask(0o000)
    try:
        with sockets(Listening(uds=path)) as given:
            assert given is not None
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            assert os.umask(0o000) == 0o000  # the process's own is as it was
        assert not path.exists()
    finally:
        os.umask(before)


def test_a_socket_that_nobody_listens_at_makes_way(path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with sockets(Listening(uds=path)):
        assert path.is_socket()


def test_one_that_is_in_use_does_not(path):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(InvalidSetting, match=f"^uds: {path}: .*in use"), sockets(Listening(uds=path)):
            pass
        assert path.is_socket()


@pytest.mark.parametrize("what", ["file", "folder", "nowhere", "long"])
def test_what_is_no_socket_stays(path, what):
    match what:
        case "file":
            path.write_text("mine")
        case "folder":
            path.mkdir()
        case "nowhere":
            path = path / "no" / "such"
        case "long":
            path = path.with_name("x" * 200)
    with pytest.raises(InvalidSetting, match=r"^uds: "), sockets(Listening(uds=path)):
        pass
    assert what != "file" or path.read_text() == "mine"


def test_a_successors_socket_stays(path):
    with sockets(Listening(uds=path)):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(path))
    assert path.is_socket()


@pytest.fixture
def serving_at(models, path):
    """A real process that serves at `path`."""
    words = ["serve", "--models", str(models), "--default-model", "kl", "--device", "cpu", "--uds", str(path)]
    with subprocess.Popen([sys.executable, "-m", "app", *words]) as process:
        yield process
        process.kill()


async def test_a_command_uses_the_service_at_a_socket(serving_at, path, tmp_path):
    async with connect(f"unix:{path}", None, Settings()) as client:
        async with asyncio.timeout(60):
            while not await _ready(client):  # noqa: ASYNC110  another process tells nobody
                await asyncio.sleep(0.1)
        assert (await client.post("/decode", content=npy(latent()))).status_code == 200
    (tmp_path / "a.png").write_bytes(picture())
    arguments = ["encode", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--url", f"unix:{path}"]
    assert await asyncio.to_thread(main, arguments) == 0
    assert list((tmp_path / "out").glob("*.npy"))
    serving_at.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(serving_at.wait, 60) == 0
    assert not path.exists()


async def _ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/healthz/ready")).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    "arguments",
    [
        ["--uds", "x", "--port", "1"],
        ["--uds", "x", "--host", "a"],
        ["--uds", "x", "--ssl-certfile", "y"],
        ["--ssl-keyfile", "y"],
    ],
)
def test_what_excludes_each_other_is_told(arguments, capsys):
    assert main(["serve", *arguments]) == 2
    assert "--uds is instead" in (said := capsys.readouterr().err) or "--ssl-certfile" in said


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    names = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(names[0]), "-keyout", str(names[1])]
    subprocess.run(command, check=True, capture_output=True)
    return names


async def test_it_serves_https_with_a_certificate(models, certificate):
    settings = Settings(models=models, device="cpu", default_model="kl")
    app = create_app(settings)
    server = server_of(app, settings, Listening(port=0, certificate=certificate[0], key=certificate[1]))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve([listener]))
        try:
            await until(lambda: server.started or serving.done())
            trusted = ssl.create_default_context(cafile=str(certificate[0]))
            url = f"https://127.0.0.1:{listener.getsockname()[1]}"
            async with httpx.AsyncClient(verify=trusted, base_url=url, timeout=60) as client:
                assert (await client.post("/decode", content=npy(latent()))).status_code == 200
        finally:
            server.should_exit = True
            await serving


def test_a_certificate_that_is_none_ends_the_start(models, certificate, tmp_path):
    settings = Settings(models=models, device="cpu")
    (tmp_path / "junk").write_text("junk")
    junk, none = tmp_path / "junk", tmp_path / "none"
    for cert, key in ((none, None), (junk, None), (certificate[0], junk), (certificate[0], None)):
        with pytest.raises(InvalidSetting, match=r"^ssl-certfile: "):
            server_of(create_app(settings), settings, Listening(certificate=cert, key=key))
