import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from app import __version__
from app.arguments import parser
from app.cli import main
from app.settings import Settings
from app.tools.fetch import Fetched
from tests.service import latent, listening, npy, picture
from tests.store.weights import as_diffusers, state_of, write


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
    for command in ("serve", "encode", "decode", "models", "inspect", "convert", "merge", "compare", "fetch"):
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
        ["convert", "a.ckpt"],
        ["convert", "a.ckpt", "b.safetensors", "--dtype", "fp8"],
        ["convert", "a.ckpt", "b.safetensors", "--layout", "webui"],
        ["merge", "a.ckpt", "b.ckpt"],
        ["merge", "a.ckpt", "b.ckpt", "-o", "c.safetensors", "--ratio", "2.5"],
        ["merge", "a.ckpt", "b.ckpt", "-o", "c.safetensors", "--ratio", "nan"],
        ["merge", "a.ckpt", "b.ckpt", "-o", "c.safetensors", "--encoder-ratio", "half"],
        ["merge", "a.ckpt", "b.ckpt", "-o", "c.safetensors", "--contrast", "inf"],
        ["compare"],
        ["compare", "a.png", "--models", ""],
        ["compare", "a.png", "--models", " , "],
        ["fetch"],
        ["fetch", "taesd", "--list"],
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
        ("max-body-bytes", "2GB"),
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
    status, out, err = run("encode", tmp_path / "in", "-o", tmp_path / "latents", *where)
    assert (status, out) == (0, [])
    assert [line.split(": ")[1] for line in err] == ["warning", "2 done, 0 failed, 0 skipped"]  # no bar: no terminal
    assert "the family sd1 is a guess" in err[0]  # of two files, once
    for name in ("a.npy", "deep/b.npy"):
        array = np.load(tmp_path / "latents" / name)
        assert (array.dtype, array.shape) == (np.float16, (1, 4, 4, 4))
    save_file({"latents": torch.zeros(1, 4, 4, 4)}, tmp_path / "latents" / "c.safetensors")
    status, out, err = run("decode", tmp_path / "latents", "-o", tmp_path / "out", "--size", "30x31", *where)
    assert (status, out, err[-1]) == (0, [], "latentd: 3 done, 0 failed, 0 skipped")
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


def test_what_exists_is_never_replaced_without_a_word(run, remote, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.npy").write_text("mine")
    inputs = (tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "out", *remote)
    status, _, err = run("encode", *inputs)
    assert (status, len(err)) == (1, 1)
    assert "out/a.npy exists: --resume skips what exists, --force replaces it" in err[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.npy"]
    status, _, err = run("encode", *inputs, "--resume")
    assert (status, err[-1]) == (0, "latentd: 1 done, 0 failed, 1 skipped")
    assert err[0] == "latentd: warning: nothing says what made 1 of the files that exist"
    assert (tmp_path / "out" / "a.npy").read_text() == "mine"
    assert np.load(tmp_path / "out" / "b.npy").shape == (1, 4, 4, 4)
    assert run("encode", *inputs, "--force")[0] == 0
    assert np.load(tmp_path / "out" / "a.npy").shape == (1, 4, 4, 4)
    assert run("encode", *inputs, "--resume") == (0, [], ["latentd: 0 done, 0 failed, 2 skipped"])
    assert run("encode", *inputs, "--resume", "--force")[0] == 2


def test_resume_with_another_model_or_options_is_refused_by_name(run, remote, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    inputs = (tmp_path / "a.png", "-o", tmp_path / "out", *remote)
    assert run("encode", *inputs)[0] == 0
    for other, words in ((("--model", "tiny"), "would be tiny (taesd"), (("--latents", "raw"), "latents=raw")):
        (tmp_path / "b.png").write_bytes(picture())
        status, _, err = run("encode", tmp_path / "b.png", *inputs, "--resume", *other)
        assert status == 1
        assert "out/a.npy was made by kl (sd1" in err[-1]
        assert words in err[-1]
        assert not (tmp_path / "out" / "b.npy").exists()
    assert run("encode", *inputs, "--force", "--model", "tiny")[0] == 0
    assert run("encode", *inputs, "--resume", "--model", "tiny")[0] == 0


def test_one_bad_file_fails_alone_in_one_line(run, remote, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_text("no picture")
    missing, out = tmp_path / "missing.png", tmp_path / "out"
    status, _, err = run("encode", tmp_path / "a.png", tmp_path / "b.png", missing, "-o", out, *remote)
    assert status == 1
    assert any(re.match(r"latentd: .*b\.png: expected PNG, JPEG, ", line) for line in err)
    assert any(re.match(r"latentd: .*missing\.png: .*No such file", line) for line in err)
    assert err[-1] == "latentd: 1 done, 2 failed, 0 skipped"
    assert sorted(path.name for path in out.iterdir()) == [".latentd-manifest.jsonl", "a.npy"]


def test_a_batch_of_latents_becomes_several_pictures(run, remote, tmp_path):
    (tmp_path / "two.npy").write_bytes(npy(latent(2, 4, 4, 4)))
    np.savez(tmp_path / "sizes.npz", a=latent(), b=latent(1, 4, 4, 8))
    inputs = (tmp_path / "two.npy", tmp_path / "sizes.npz", "-o", tmp_path / "out", *remote)
    assert run("decode", *inputs)[0] == 0
    sizes = {}
    for path in (tmp_path / "out").glob("*.png"):
        with Image.open(path) as image:
            sizes[path.name] = image.size
    assert sizes == {
        "two-0000.png": (32, 32),
        "two-0001.png": (32, 32),
        "sizes-0000.png": (32, 32),
        "sizes-0001.png": (64, 32),
    }
    assert run("decode", *inputs)[0] == 1  # they exist
    assert run("decode", *inputs, "--resume")[2] == ["latentd: 0 done, 0 failed, 2 skipped"]
    status, _, err = run("decode", tmp_path / "two.npy", "-o", tmp_path / "x.png", *remote)
    assert (status, len(err)) == (1, 1)
    assert "it holds 2 pictures" in err[0]
    assert run("decode", tmp_path / "two.npy", "-o", tmp_path / "x.zip", *remote)[0] == 0
    assert (tmp_path / "x.zip").read_bytes().startswith(b"PK")


def test_one_file_is_written_where_it_is_named(run, remote, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    assert run("encode", tmp_path / "a.png", "-o", tmp_path / "deep" / "one.npy", *remote)[0] == 0
    assert np.load(tmp_path / "deep" / "one.npy").shape == (1, 4, 4, 4)
    assert run("encode", tmp_path / "a.png", "-o", tmp_path / "one.safetensors", *remote)[0] == 0
    assert load_file(tmp_path / "one.safetensors")["latents"].shape == (1, 4, 4, 4)
    assert run("decode", tmp_path / "one.safetensors", "-o", tmp_path / "one.jpg", *remote)[0] == 0
    with Image.open(tmp_path / "one.jpg") as image:
        assert image.format == "JPEG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "deep", "one.jpg", "one.safetensors"]
    status, _, err = run("encode", tmp_path / "a.png", "-o", tmp_path / "one.safetensors", *remote)
    assert (status, len(err)) == (1, 1)
    assert "exists" in err[0]


def test_stdin_and_stdout(url, remote):
    options = [*map(str, remote), "-o", "-"]
    encoded = subprocess.run(
        [sys.executable, "-m", "app", "encode", "-", *options], input=picture(), capture_output=True, check=True
    )
    assert np.load(io.BytesIO(encoded.stdout)).shape == (1, 4, 4, 4)
    decoded = subprocess.run(
        [sys.executable, "-m", "app", "decode", "-", *options], input=encoded.stdout, capture_output=True, check=True
    )
    assert decoded.stdout.startswith(b"\x89PNG")


def test_decode_takes_what_encode_noted_beside_the_latents(run, remote, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(45, 30))
    assert run("encode", tmp_path / "a.png", "-o", tmp_path / "latents", "--latents", "raw", *remote)[0] == 0
    for inputs, out in ((tmp_path / "latents", "all"), (tmp_path / "latents" / "a.npy", "one")):
        assert run("decode", inputs, "-o", tmp_path / out, *remote)[0] == 0
        with Image.open(tmp_path / out / "a.png") as image:
            assert image.size == (45, 30)
    assert run("decode", tmp_path / "latents", "-o", tmp_path / "b", "--size", "8x8", *remote)[0] == 0


def test_what_would_fail_every_file_is_said_once(run, url, remote, tmp_path):
    for index in range(5):
        (tmp_path / f"{index}.png").write_bytes(picture())
    for options in ((*remote, "--model", "nobody"), ("--url", url), ("--url", "http://127.0.0.1:1")):
        status, _, err = run("encode", tmp_path, "-o", tmp_path / "out", *options)
        assert (status, len(err)) == (1, 1)
    assert not (tmp_path / "out").exists()


def test_what_is_not_read_is_said_in_the_summary(run, remote, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.gif").write_bytes(picture(kind="GIF"))
    (tmp_path / ".c.png").write_text("hidden")
    status, _, err = run("encode", tmp_path, "-o", tmp_path / "out", *remote)
    assert (status, err[-1]) == (0, "latentd: 1 done, 0 failed, 0 skipped; not read: 1 .gif")


def test_the_address_and_key_of_the_environment(run, url, monkeypatch, models, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    monkeypatch.setenv("LATENTD_URL", url)
    monkeypatch.setenv("LATENTD_KEY", "sesame")
    assert run("encode", tmp_path / "a.png", "-o", tmp_path)[0] == 0
    status, out, _ = run("models")
    assert (status, [line.split()[0] for line in out]) == (0, ["NAME", "kl", "tiny"])
    monkeypatch.setenv("LATENTD_KEY", "wrong")
    assert run("models")[0] == 1
    assert run("models", "--key", "sesame")[0] == 0
    assert run("models", "--models", models)[1] == out  # a folder is this process's
    assert run("models", "--models", models, "--url", url)[0] == 2


def test_models_of_a_service_as_json(run, remote):
    status, out, _ = run("models", "--json", *remote)
    rows = {row["name"]: row for row in json.loads("\n".join(out))["models"]}
    assert (status, rows["kl"]["family"]) == (0, "sd1")


def test_an_interrupt_is_130_and_leaves_whole_files(models, tmp_path):
    (tmp_path / "in").mkdir()
    content = picture(256, 256)
    for index in range(1500):  # more than are encoded before the signal comes
        (tmp_path / "in" / f"{index:04}.png").write_bytes(content)
    command = [sys.executable, "-m", "app", "encode", tmp_path / "in", "-o", tmp_path / "out", "--model", "kl"]
    with subprocess.Popen(
        [*command, "--models", models, "--device", "cpu"], stderr=subprocess.PIPE, text=True
    ) as child:
        while not list(tmp_path.glob("out/*.npy")):
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        assert child.stderr is not None
        err = child.stderr.read().splitlines()
        assert child.wait(30) == 130
    assert err[-1] == "latentd: interrupted"
    done = len(list(tmp_path.glob("out/*.npy")))
    assert re.match(f"latentd: {done} done, 0 failed, 0 skipped", err[-2])
    assert not any("Traceback" in line for line in err)


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


@pytest.mark.parametrize("name", ["nothing", "file"])
@pytest.mark.parametrize("command", [("serve", "--port", 0), ("models",), ("encode", "a.png", "-o", "x")])
def test_a_folder_that_is_none_cannot_be_meant(run, tmp_path, command, name):
    (tmp_path / "file").touch()
    status, out, err = run(*command, "--models", f"{tmp_path}:{tmp_path / name}")
    assert (status, out, len(err)) == (2, [], 1)
    assert re.match(f"latentd: setting models: .*{name} (is no folder|does not exist)$", err[0])


def test_every_option_has_its_help():
    commands = next(each for each in parser()._actions if isinstance(each, argparse._SubParsersAction)).choices
    assert commands
    for name, command in commands.items():
        assert [each.dest for each in command._actions if not each.help] == [], name


def test_inspect_says_what_a_file_is(run, models):
    path = models / "VAE" / "kl.safetensors"
    status, out, _ = run("inspect", path, "--json")
    facts = json.loads("\n".join(out))
    assert status == 0
    assert list(facts) == [
        *("name", "path", "family", "family_source", "format", "layout", "dtype", "parameters", "sha256"),
        *("tensors_sha256", "known_as", "copy_of", "fp16", "baked", "latent_channels", "spatial_factor"),
        *("pixel_channels", "scaling_factor", "shift_factor"),
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


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("lora.safetensors", {"lora_unet_down.lora_up.weight": torch.zeros(2, 2)}, "no VAE inside"),
        ("unet.ckpt", {"model.diffusion_model.out.2.weight": torch.zeros(2, 2)}, "no VAE inside"),
        ("taesd_encoder.pth", {"0.weight": torch.zeros(4, 3, 3, 3)}, "only the encoder"),
        ("empty.safetensors", {}, "no VAE inside"),
    ],
)
def test_inspect_of_what_is_no_vae_names_file_and_reason(run, tmp_path, name, content, reason):
    path = write(tmp_path / name, content)
    status, out, err = run("inspect", path, "--json")
    assert (status, out, len(err)) == (1, [], 1)
    assert err[0].startswith(f"latentd: {path}: {reason}")


def test_convert_there_and_back(run, models, tmp_path):
    source = models / "VAE" / "kl.safetensors"
    status, out, err = run("convert", source, tmp_path / "folder", "--layout", "diffusers", "--dtype", "bf16")
    there = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    assert (status, len(err), len(out)) == (0, 1, 1)
    assert out[0].startswith(f"{there}: sd1 (default), bf16, sha256 ")
    assert "warning: the family sd1 is a guess" in err[0]
    assert run("convert", tmp_path / "folder", tmp_path / "b.safetensors", "--layout", "ldm", "--dtype", "fp32")[0] == 0
    back, state = load_file(tmp_path / "b.safetensors"), state_of("sd1")
    assert set(back) == set(state)
    assert all(torch.equal(back[key], value.bfloat16().float()) for key, value in state.items())


def test_a_family_is_settled_by_a_word(run, models, tmp_path):
    source = models / "VAE" / "kl.safetensors"
    status, out, err = run("inspect", source, "--family", "sdxl", "--json")
    facts = json.loads("\n".join(out))
    assert (status, facts["family"], facts["family_source"], err) == (0, "sdxl", "operator", [])
    assert "is a guess" in run("inspect", source)[2][0]
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    status, out, err = run("convert", source, a, "--family", "sdxl")
    assert (status, "sdxl (config)" in out[0], err) == (0, True, [])
    assert run("merge", a, source, "-o", b)[0] == 1  # the guess is another
    status, out, err = run("merge", a, source, "-o", b, "--family", "sdxl")
    assert (status, "sdxl (config)" in out[0], err) == (0, True, [])
    status, _, err = run("inspect", source, "--family", "sd9")
    assert (status, len(err)) == (2, 1)
    assert "latentd-small" in err[0]


def test_convert_names_what_is_in_the_way(run, models, tmp_path):
    source, taken = models / "VAE" / "kl.safetensors", tmp_path / "b.safetensors"
    taken.touch()
    for arguments, reason in (
        ((source, taken), "--force"),
        ((source, source, "--force"), "is the source itself"),
        ((source, tmp_path / "b.ckpt"), "expected the name of a .safetensors file"),
        ((source, tmp_path / "no" / "b.safetensors"), "No such file or directory"),
        ((tmp_path / "no.ckpt", tmp_path / "c.safetensors"), "does not exist"),
        ((taken, tmp_path / "c.safetensors"), "b.safetensors: not a safetensors file"),
    ):
        status, out, err = run("convert", *arguments)
        assert (status, out, len(err)) == (1, [], 1)
        assert reason in err[0]
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]
    assert run("convert", source, taken, "--force")[0] == 0


def test_merge_and_its_ratios(run, models, tmp_path):
    a, c = models / "VAE" / "kl.safetensors", tmp_path / "c.safetensors"
    b = write(tmp_path / "b.ckpt", state_of(seed=1))
    assert run("merge", a, b, "-o", c, "--ratio", "1", "--encoder-ratio", "-0.5", "--brightness", "0.25")[0] == 0
    out, ours, theirs = load_file(c), state_of(), state_of(seed=1)
    key = "encoder.conv_in.weight"
    torch.testing.assert_close(out[key], 1.5 * ours[key] - 0.5 * theirs[key])
    assert torch.equal(out["decoder.conv_in.weight"], theirs["decoder.conv_in.weight"])
    assert torch.equal(out["decoder.conv_out.bias"], theirs["decoder.conv_out.bias"] + 0.25)
    for arguments, reason in (
        ((a, b, "-o", c), "exists"),
        ((a, b, "-o", b, "--force"), ".safetensors"),
        ((a, models / "VAE" / "tiny.safetensors", "-o", tmp_path / "d.safetensors"), "kl is sd1"),
    ):
        status, _, err = run("merge", *arguments)
        assert (status, len(err)) == (1, 1)
        assert reason in err[0]


def test_help_says_whose_weight_the_ratio_is(run):
    assert "(1 - ratio) * A + ratio * B" in "\n".join(run("--help")[1])


def test_compare_is_given_what_was_asked_for(run, monkeypatch, tmp_path):
    calls = []

    def compare_models(*args, **options):
        calls.append((args, options))
        return 0

    monkeypatch.setattr("app.tools.compare.compare_models", compare_models)
    assert run("compare", "a.png", "--models", "a, b,", "--folder", tmp_path, "--json")[0] == 0
    ((image, names, output, settings), options) = calls.pop()
    assert (str(image), names, str(output), settings.models) == ("a.png", ["a", "b"], "compare.png", (tmp_path,))
    assert options == {"url": None, "key": None, "as_json": True}
    assert run("compare", "a.png", "-o", "x.png", "--url", "http://x", "--key", "k", "--device", "cpu")[0] == 0
    ((_, names, output, settings), options) = calls.pop()
    assert (names, str(output), settings.device) == ([], "x.png", "cpu")
    assert options == {"url": "http://x", "key": "k", "as_json": False}


def test_fetch_takes_the_hub_from_flag_or_variable(run, monkeypatch, tmp_path):
    calls = []

    def fetch(name, models, base, token, *, force):
        calls.append((name, models, base, token, force))
        return [Fetched(tmp_path / "new", new=True), Fetched(tmp_path / "old", new=False)]

    monkeypatch.setattr("app.tools.fetch.fetch", fetch)
    for name in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    status, out, _ = run("fetch", "taesd", "--models", tmp_path)
    assert (status, out) == (0, [f"{tmp_path}/new", f"{tmp_path}/old is there already"])
    monkeypatch.setenv("HF_TOKEN", " secret\n")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror")
    run("fetch", "taesd", "--models", tmp_path)
    run("fetch", "taesd", "--models", tmp_path, "--base-url", "http://here", "--force")
    assert calls == [
        ("taesd", tmp_path, "https://huggingface.co", None, False),
        ("taesd", tmp_path, "https://mirror", "secret", False),
        ("taesd", tmp_path, "http://here", "secret", True),
    ]


def test_fetch_of_nothing_known_is_one_line_and_its_list_is_not(run, tmp_path):
    status, out, err = run("fetch", "nothing", "--models", tmp_path)
    assert (status, out, len(err)) == (1, [], 1)
    assert "sdxl-vae-fp16-fix" in err[0]
    status, out, err = run("fetch", "--list")
    assert (status, err) == (0, [])
    assert any(line.startswith("taesd ") for line in out)


def test_a_port_that_is_taken_is_1(models, url):
    port = url.rpartition(":")[2]
    result = python("-m", "app", "serve", "--models", str(models), "--device", "cpu", "--port", port)
    assert result.returncode == 1
    assert "address already in use" in result.stderr
    assert "Traceback" not in result.stderr
