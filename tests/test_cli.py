import json
import os
import re
import shutil
import subprocess
import sys
import termios

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from app import __version__
from app.cli import main
from app.settings import Settings
from tests.service import latent, listening, npy, picture
from tests.store.weights import as_diffusers, state_of


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def run(capsys):
    """(exit status, lines of stdout, lines of stderr) of one command."""

    def run(*arguments: object) -> tuple[int, list[str], list[str]]:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as left:
            status = int(left.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out.splitlines(), err.splitlines()

    return run


def test_help_does_not_wait_for_torch():
    script = "import sys; sys.argv = ['latentd', '--help']\nfrom app.cli import main\n"
    script += (
        "try: main()\nexcept SystemExit as left: print(left.code, 'torch' in sys.modules, 'uvicorn' in sys.modules)"
    )
    result = python("-c", script)
    assert result.stdout.splitlines()[-1] == "0 False False"
    for command in ("serve", "encode", "decode", "models", "inspect"):
        assert command in result.stdout


def test_the_module_is_the_command():
    result = python("-m", "app", "--version")
    assert (result.returncode, result.stdout) == (0, f"latentd {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["encode"],
        ["encode", "a.png"],
        ["decode", "a.npy", "-o", "x", "--fit", "pad"],
        ["encode", "a.png", "-o", "x", "--latents", "half"],
        ["encode", "a.png", "-o", "x", "--seed", "x"],
        ["serve", "--port", "65536"],
        ["serve", "--port", "-1"],
        ["serve", "--bogus"],
        ["inspect"],
    ],
)
def test_usage_is_2(run, arguments):
    status, out, err = run(*arguments)
    assert status == 2
    assert not out
    assert err[-1].startswith("latentd")


def test_serve_has_a_flag_for_every_setting(run):
    status, out, _ = run("serve", "--help")
    assert status == 0
    text = "\n".join(out)
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text
        assert f"LATENTD_{name.upper()}" in text
    assert "--host" in text
    assert "--port" in text


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("queue-size", "0"),
        ("max-pixels", "many"),
        ("precision", "fp8"),
        ("device", "gpu"),
        ("device", "cuda:999"),
        ("default-family", "sd9"),
        ("metrics-public", "perhaps"),
        ("api-keys", ","),
    ],
)
def test_an_invalid_setting_is_2_and_named(run, tmp_path, flag, value):
    status, _, err = run("serve", "--models", tmp_path, "--port", 0, f"--{flag}", value)
    assert status == 2
    assert len(err) == 1
    assert f"setting {flag.replace('-', '_')}: " in err[0]


def test_an_invalid_variable_is_2_and_named(run, monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTD_QUEUE_SIZE", "none")
    status, _, err = run("models", "--models", tmp_path)
    assert (status, len(err)) == (2, 1)
    assert "queue_size" in err[0]


def test_encode_and_decode_in_process(run, models, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.png").write_bytes(picture())
    (tmp_path / "in" / "deep" / "b.jpg").write_bytes(picture(kind="JPEG"))
    where = ("--models", models, "--device", "cpu", "--model", "kl")
    assert run("encode", tmp_path / "in", "-o", tmp_path / "latents", *where) == (0, [], [])  # no bar: no terminal
    for name in ("a.npy", "deep/b.npy"):
        array = np.load(tmp_path / "latents" / name)
        assert (array.dtype, array.shape) == (np.float16, (1, 4, 4, 4))
    save_file({"latents": torch.zeros(1, 4, 4, 4)}, tmp_path / "latents" / "c.safetensors")
    assert run("decode", tmp_path / "latents", "-o", tmp_path / "out", "--size", "30x31", *where) == (0, [], [])
    for name in ("a.png", "deep/b.png", "c.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert (image.format, image.size) == ("PNG", (30, 31))
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert not [name for name in left if name.endswith(".part")]


@pytest.fixture(scope="module")
def url(models):
    with listening(models, default_model="kl", api_keys="sesame") as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def remote(url):
    return ("--url", url, "--key", "sesame")


def test_through_a_running_service(run, remote, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    query = ("--posterior", "sample", "--seed", 1, "--latents", "raw", "--fit", "crop", "--precision", "fp32")
    assert run("encode", tmp_path / "a.png", "-o", tmp_path, *remote, *query)[0] == 0
    assert run("decode", tmp_path / "a.npy", "-o", tmp_path / "out", *remote, "--tiling", "never")[0] == 0
    assert (tmp_path / "out" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_resume_leaves_what_exists(run, remote, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.npy").write_text("mine")
    inputs = (tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "out", *remote)
    assert run("encode", *inputs, "--resume")[0] == 0
    assert (tmp_path / "out" / "a.npy").read_text() == "mine"
    assert np.load(tmp_path / "out" / "b.npy").shape == (1, 4, 4, 4)
    assert run("encode", *inputs)[0] == 0
    assert np.load(tmp_path / "out" / "a.npy").shape == (1, 4, 4, 4)


def test_one_bad_file_fails_alone_in_one_line(run, remote, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_text("no picture")
    missing, out = tmp_path / "missing.png", tmp_path / "out"
    status, _, err = run("encode", tmp_path / "a.png", tmp_path / "b.png", missing, "-o", out, *remote)
    assert status == 1
    assert len(err) == 2
    assert any(re.match(r"latentd: .*b\.png: expected PNG, JPEG or WebP", line) for line in err)
    assert any(re.match(r"latentd: .*missing\.png: .*No such file", line) for line in err)
    assert [path.name for path in out.iterdir()] == ["a.npy"]


def test_a_batch_of_latents_is_no_png(run, remote, tmp_path):
    (tmp_path / "two.npy").write_bytes(npy(latent(2, 4, 4, 4)))
    status, _, err = run("decode", tmp_path / "two.npy", "-o", tmp_path / "out", *remote)
    assert (status, len(err)) == (1, 1)
    assert "2 pictures" in err[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "nothing", "http://[", "ftp://127.0.0.1/", "http://a..b/"])
def test_a_service_that_is_not_there_is_one_line(run, tmp_path, address):
    (tmp_path / "a.png").write_bytes(picture())
    status, _, err = run("encode", tmp_path / "a.png", "-o", tmp_path, "--url", address)
    assert (status, len(err)) == (1, 1)
    assert err[0].startswith("latentd: ")
    assert len(err[0].split(": ", 2)[-1]) > 3


def test_a_service_of_somebody_else_is_not_believed(run, url, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    status, _, err = run("encode", tmp_path / "a.png", "-o", tmp_path, "--url", f"{url}/elsewhere")
    assert (status, len(err)) == (1, 1)
    assert not (tmp_path / "a.npy").exists()


def test_a_missing_or_wrong_key_is_one_line(run, url, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    for key in ((), ("--key", "wrong")):
        status, _, err = run("encode", tmp_path / "a.png", "-o", tmp_path, "--url", url, *key)
        assert (status, len(err)) == (1, 1)
        assert "key" in err[0]


def test_a_terminal_sees_progress(remote, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-m", "app", "encode", tmp_path / "a.png", "-o", tmp_path, *remote]
    subprocess.run(command, stderr=theirs, check=True)
    seen = os.read(ours, 1 << 16)
    os.close(ours)
    os.close(theirs)
    assert b"1/1" in seen


def test_models_is_the_table_of_a_folder(run, models, tmp_path):
    shutil.copytree(models / "VAE", tmp_path / "VAE")
    (tmp_path / "VAE" / "broken.pt").write_text("no")
    status, out, err = run("models", "--models", tmp_path)
    assert (status, err) == (0, [])
    assert [line.split()[:2] for line in out] == [
        ["NAME", "FAMILY"],
        ["broken", "-"],
        ["kl", "sd1"],
        ["tiny", "taesd"],
    ]
    assert "ERROR: " in out[1]
    status, out, _ = run("models", "--models", tmp_path, "--json")
    rows = {row["name"]: row for row in json.loads("\n".join(out))["models"]}
    assert rows["kl"]["family"] == "sd1"
    assert rows["broken"]["error"]


def test_models_of_no_folder_is_an_error(run, tmp_path):
    status, out, err = run("models", "--models", tmp_path / "nothing")
    assert (status, out, len(err)) == (1, [], 1)


def test_inspect_says_what_a_file_is(run, models):
    path = models / "VAE" / "kl.safetensors"
    status, out, _ = run("inspect", path, "--json")
    facts = json.loads("\n".join(out))
    assert status == 0
    assert list(facts) == [
        *("name", "path", "family", "family_source", "format", "layout", "dtype", "parameters", "sha256", "known_as"),
        *("fp16", "baked", "latent_channels", "spatial_factor", "scaling_factor", "shift_factor"),
    ]
    assert (facts["family"], facts["layout"], facts["dtype"], facts["baked"]) == ("sd1", "ldm", "fp32", False)
    assert facts["fp16"] == "unknown"
    status, out, _ = run("inspect", path)
    assert status == 0
    assert {line.split()[0] for line in out} == set(facts)


@pytest.mark.parametrize("family", ["sd1", "taesd"])
def test_inspect_tells_the_layouts_apart(run, tmp_path, family):
    save_file(as_diffusers(state_of(family)), tmp_path / "a.safetensors")
    save_file(
        {f"first_stage_model.{key}": value for key, value in state_of(family).items()}, tmp_path / "b.safetensors"
    )
    for name, layout in (("a", "diffusers"), ("b", "ldm")):
        _, out, _ = run("inspect", tmp_path / f"{name}.safetensors", "--json")
        assert json.loads("\n".join(out))["layout"] == layout


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint"])
def test_inspect_of_what_is_none_is_one_line(run, tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    status, out, err = run("inspect", path)
    assert (status, out, len(err)) == (1, [], 1)
    assert err[0].startswith("latentd: ")


def test_a_port_that_is_taken_is_1(models, url):
    port = url.rpartition(":")[2]
    result = python("-m", "app", "serve", "--models", str(models), "--device", "cpu", "--port", port)
    assert result.returncode == 1
    assert "address already in use" in result.stderr
    assert "Traceback" not in result.stderr
