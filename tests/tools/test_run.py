"""Whole folders become caches: in this process, through a server, and after a kill."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from app.cli import main
from app.execution.primitive import Whole
from app.tools.buckets import cut_picture, parse_buckets
from app.tools.manifest import NAME
from tests.service import listening, picture, pixels
from tests.store.weights import module_of, state_of, write

SIZES = ((96, 64), (64, 96), (128, 128), (90, 70), (64, 96))


def folder_of(folder: Path, sizes: tuple[tuple[int, int], ...] = SIZES) -> Path:
    folder.mkdir()
    for index, size in enumerate(sizes):
        (folder / f"{index:03}.png").write_bytes(picture(*size, seed=index))
    return folder


def encode(source: Path, out: Path, *more: object) -> int:
    return main(["encode", *map(str, (source, "-o", out, *more))])


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_sd_scripts_finds_what_it_looks_for(tmp_path, family):
    write(tmp_path / "models" / "VAE" / "vae.safetensors", state_of(family), {"family": family})
    source, out = folder_of(tmp_path / "in"), tmp_path / "out"
    options = ("--models", tmp_path / "models", "--device", "cpu", "--flip", "--format", "kohya", "--precision", "fp32")
    assert encode(source, out, *options, "--buckets", "64x64:16:32-128") == 0
    module, sides = module_of(family), parse_buckets("64x64:16:32-128")
    for path in sorted(source.iterdir()):
        # As sd-scripts: the name is the picture's with its size, the key that of the bucket's latent.
        with Image.open(path) as image:
            width, height = image.size
        cut = sides.cut(width, height)
        suffix = {"sd1": "sd"}.get(family, family)
        key = f"_{cut.bucket[1] // 8}x{cut.bucket[0] // 8}" if family in {"sd3", "flux"} else ""
        with np.load(out / f"{path.stem}_{width:04d}x{height:04d}_{suffix}.npz") as cache:
            latents, flipped = cache[f"latents{key}"], cache[f"latents_flipped{key}"]
            assert cache[f"original_size{key}"].tolist() == [width, height]
            assert cache[f"crop_ltrb{key}"].shape == (4,)
        assert latents.shape[1:] == (cut.bucket[1] // 8, cut.bucket[0] // 8)
        pixel = torch.from_numpy(cut_picture(pixels(width, height, int(path.stem)), cut).copy())
        for found, seen in ((latents, pixel), (flipped, pixel.flip(1))):
            x = seen.permute(2, 0, 1)[None].float() / 127.5 - 1
            with torch.inference_mode():
                moments = module.encode(Whole(), x)
            mean = moments.chunk(2, 1)[0][0].numpy()
            expected = (mean - 0.1159) * 0.3611 if family == "flux" else mean  # the others are scaled in training
            assert np.abs(found - expected).max() < 2e-3 * max(1.0, np.abs(expected).max())


@pytest.fixture(scope="module")
def url(models):
    with listening(models, default_model="tiny") as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("form", ["npy", "safetensors"])
def test_a_service_gives_the_same_as_this_process(models, url, tmp_path, form):
    source = folder_of(tmp_path / "in")
    wish = ("--buckets", "64x64:32:32-128", "--flip", "--format", form, "--workers", 2, "--precision", "fp32")
    assert encode(source, tmp_path / "a", *wish, "--url", url) == 0
    assert encode(source, tmp_path / "b", *wish, "--models", models, "--model", "tiny", "--device", "cpu") == 0
    names = [f"{index:03}{twin}.{form}" for index in range(len(SIZES)) for twin in ("", "-flipped")]
    for out in (tmp_path / "a", tmp_path / "b"):
        assert sorted(path.name for path in out.iterdir()) == sorted([NAME, *names])
    for name in names:
        a, b = ((tmp_path / out / name).read_bytes() for out in "ab")
        if form == "npy":
            assert np.abs(np.load(tmp_path / "a" / name) - np.load(tmp_path / "b" / name)).max() < 0.01
        assert len(a) == len(b)


def test_the_crop_is_noted_and_the_summary_says_all(url, tmp_path, capsys):
    source = folder_of(tmp_path / "in")
    (source / "torn.png").write_bytes(picture()[:60])
    (source / "x.gif").touch()
    told = tmp_path / "told.json"
    assert encode(source, tmp_path / "out", "--url", url, "--buckets", "64x64:32:32-128", "--summary", told) == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / NAME).read_text().splitlines()]
    (line,) = [line for line in lines if line.get("file") == "003.npy"]
    assert (line["original"], line["resized"], line["size"], line["crop"]) == (
        "90x70",
        "82x64",
        "64x64",
        [9, 0, 73, 64],
    )
    summary = json.loads(told.read_text())
    assert (summary["total"], summary["done"], summary["not_read"]) == (6, 5, {".gif": 1})
    assert summary["failed"] == [{"file": str(source / "torn.png"), "reason": summary["failed"][0]["reason"]}]
    assert sum(summary["buckets"].values()) == 5
    assert summary["ended"] is None
    assert "torn.png" in capsys.readouterr().err


def test_what_ends_it_is_in_the_summary(tmp_path):
    told = tmp_path / "told.json"
    source = folder_of(tmp_path / "in")
    assert encode(source, tmp_path / "out", "--url", "http://127.0.0.1:1", "--summary", told) == 1
    summary = json.loads(told.read_text())
    assert (summary["done"], summary["total"]) == (0, len(SIZES))
    assert "127.0.0.1:1" in summary["ended"]


def test_another_wish_is_another_maker(url, tmp_path, capsys):
    source, out = folder_of(tmp_path / "in"), tmp_path / "out"
    assert encode(source, out, "--url", url, "--buckets", "64x64:32:32-128") == 0
    assert encode(source, out, "--url", url, "--buckets", "64x64:32:32-128", "--resume") == 0
    for wish in (["--buckets", "64x64:16:32-128"], [], ["--buckets", "64x64:32:32-128", "--flip"]):
        assert encode(source, out, "--url", url, *wish, "--resume") == 1
        assert "was made by tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wish",
    [
        ["--buckets", "64x64"],
        ["--buckets", "64x64:32:32-128", "--fit", "crop"],
        ["--format", "kohya"],
        ["--format", "kohya", "--buckets", "64x64:32:32-128", "--latents", "raw"],
        ["--workers", "0"],
        ["--sample", "--mode"],
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(tmp_path, wish):
    try:
        status = encode(tmp_path, tmp_path / "out", *wish)
    except SystemExit as left:
        status = int(left.code or 0)
    assert status == 2


@pytest.mark.parametrize(
    ("out", "wish", "words"),
    [
        ("out", ["--buckets", "64x64:12"], "no multiples of 8"),
        ("out", ["--buckets", "64x64:32:32-128", "--format", "kohya"], "the model is taesd"),
        ("one.npz", ["--buckets", "64x64:32:32-128", "--format", "kohya"], "names its files itself"),
        ("one.npy", ["--format", "safetensors"], "is not of --format safetensors"),
        ("-", ["--flip"], "not -"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(url, tmp_path, capsys, out, wish, words):
    (tmp_path / "a.png").write_bytes(picture())
    to = out if out == "-" else str(tmp_path / out)
    assert main(["encode", str(tmp_path / "a.png"), "-o", to, "--url", url, *wish]) == 1
    assert words in capsys.readouterr().err


def test_sample_and_mode_are_posteriors(models, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    where = ("--models", models, "--model", "kl", "--device", "cpu")
    for name in ("sample", "mode"):
        assert encode(tmp_path / "a.png", tmp_path / f"{name}.npy", f"--{name}", *where) == 0
    assert not np.array_equal(np.load(tmp_path / "sample.npy"), np.load(tmp_path / "mode.npy"))


def made(out: Path) -> int:
    return sum(1 for path in out.glob("*.npy") if not path.name.startswith("."))


async def killed(out: Path, *arguments: object) -> None:
    """Starts the command and kills it once some of its files are there."""
    command = [sys.executable, "-m", "app", *map(str, arguments)]
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.DEVNULL)
    try:
        async with asyncio.timeout(90):
            while made(out) < 21:
                await asyncio.sleep(0.002)
                assert process.returncode is None
    finally:
        if process.returncode is None:
            os.kill(process.pid, signal.SIGKILL)
        await process.wait()
    assert process.returncode == -signal.SIGKILL


async def test_what_a_kill_leaves_is_whole_and_known_and_the_rest_follows(models, tmp_path, capsys):
    source, out = folder_of(tmp_path / "in", SIZES * 24), tmp_path / "out"
    wish: tuple[Any, ...] = ("--buckets", "64x64:32:32-128", "--flip", "--models", models, "--model", "tiny")
    await killed(out, "encode", source, "-o", out, *wish, "--device", "cpu")
    there = [path for path in out.glob("*.npy") if not path.name.startswith(".")]
    assert 20 <= len(there) < 2 * 120
    before = {path: path.stat().st_mtime_ns for path in there}
    for path in there:
        assert np.isfinite(np.load(path)).all()
        if not path.stem.endswith("-flipped"):
            assert path.with_name(f"{path.stem}-flipped.npy").exists()
    assert await asyncio.to_thread(encode, source, out, *wish, "--device", "cpu", "--resume") == 0
    err = capsys.readouterr().err
    whole = sum(not path.stem.endswith("-flipped") for path in there)
    assert f"{120 - whole} done, 0 failed, {whole} skipped" in err
    assert "nothing says" not in err
    assert len([path for path in out.glob("*.npy") if not path.name.startswith(".")]) == 2 * 120
    assert not list(out.glob(".*.part"))
    kept = [path for path in there if not path.stem.endswith("-flipped")]
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)
