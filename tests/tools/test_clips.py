"""Clips on the command line: films become latents, and latents films, in this process as through a service."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from app.cli import main
from app.wire.clips.video import VideoReel
from tests.store.weights import state_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    (folder / "models" / "VAE").mkdir(parents=True)
    torch.manual_seed(0)
    state = {key: value.contiguous() for key, value in state_of("wan21").items()}
    save_file(state, folder / "models" / "VAE" / "clips.safetensors")
    latents = np.random.default_rng(0).standard_normal((1, 16, 2, 4, 6)).astype(np.float32)
    np.save(folder / "clip.npy", latents)
    return folder


def run(folder, *arguments):
    return main([*map(str, arguments), "--models", str(folder / "models"), "--force"])


def test_a_clip_becomes_a_film_and_comes_back(folder):
    film = folder / "clip.mp4"
    assert run(folder, "decode", folder / "clip.npy", "-o", film, "--fps", 8, "--lossless") == 0
    reel = VideoReel(film.read_bytes(), "a file of MP4's kind", 1 << 16)
    assert (reel.count, reel.size, float(reel.fps)) == (5, (48, 32), 8.0)
    assert run(folder, "encode", film, "-o", folder / "back.npy") == 0
    assert np.load(folder / "back.npy").shape == (1, 16, 2, 4, 6)


def test_frames_that_are_no_clip_say_so(folder, capsys):
    np.save(folder / "four.npy", np.zeros((4, 32, 48, 3), np.uint8))
    assert run(folder, "encode", folder / "four.npy", "-o", folder / "four.safetensors", "--frames", "error") == 1
    assert "as 1 or 5" in capsys.readouterr().err
    assert run(folder, "encode", folder / "four.npy", "-o", folder / "four.safetensors", "--frames", "pad") == 0
