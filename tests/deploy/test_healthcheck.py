from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from tests.service import listening

spec = spec_from_file_location("healthcheck", Path(__file__).parents[2] / "deploy" / "healthcheck.py")
assert spec is not None
assert spec.loader is not None
healthcheck = module_from_spec(spec)
spec.loader.exec_module(healthcheck)


@pytest.mark.parametrize(
    ("words", "port"),
    [
        (["python", "latentd", "serve", "--port", "9000", ""], "9000"),
        (["latentd", "serve", "--port=9001"], "9001"),
        (["latentd", "serve", "--port"], None),
        (["latentd", "serve"], None),
    ],
)
def test_the_port_is_that_of_the_command_line(words, port):
    assert healthcheck.option(words, "port") == port


def test_it_asks_where_the_service_listens():
    assert type(healthcheck.connect(["latentd", "serve", "--uds", "/run/socket"])) is healthcheck.Local
    plain = healthcheck.connect(["latentd", "serve"])
    assert (type(plain).__name__, plain.host, plain.port) == ("HTTPConnection", "127.0.0.1", 8000)
    assert type(healthcheck.connect(["latentd", "serve", "--ssl-certfile=c.pem"])).__name__ == "HTTPSConnection"


def test_it_asks_the_service(models, monkeypatch):
    with listening(models) as (server, port):
        words = ["latentd", "serve", "--port", str(port)]
        assert healthcheck.lives(words)
        monkeypatch.setattr(type(server.engine), "alive", False)
        assert not healthcheck.lives(words)
    with pytest.raises(OSError, match="refused"):
        healthcheck.lives(words)
