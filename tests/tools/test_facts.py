"""What inspect and models say of every form of file."""

from dataclasses import replace

import pytest

from app.store.names import Unreadable
from app.store.row import row_of
from app.store.store import open_checkpoint
from app.tools.facts import facts_of, file_layout, lines, table
from tests.store.weights import as_diffusers, state_of, under, write, write_folder

FACTS = [
    *("name", "path", "family", "family_source", "format", "layout", "dtype", "parameters", "sha256"),
    *("tensors_sha256", "known_as", "copy_of", "fp16", "baked", "latent_channels", "spatial_factor"),
    *("pixel_channels", "scaling_factor", "shift_factor"),
]


def halves(folder):
    for half in ("encoder", "decoder"):
        bare = {key.removeprefix(f"{half}."): value for key, value in state_of("taesd").items() if key.startswith(half)}
        write(folder / f"taesd_{half}.pth", bare)
    return folder / "taesd_encoder.pth"


def full(folder):
    state = under("first_stage_model.")(state_of())
    state["model.diffusion_model.out.2.weight"] = state["first_stage_model.quant_conv.weight"]
    return write(folder / "full.ckpt", state)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda f: write(f / "a.safetensors", state_of()), ("sd1", "safetensors", "ldm", False)),
        (lambda f: write(f / "a.pt", as_diffusers(state_of())), ("sd1", "pt", "diffusers", False)),
        (full, ("sd1", "ckpt", "ldm", True)),
        (halves, ("taesd", "pth", "ldm", False)),
        (
            lambda f: write_folder(
                f / "d", state_of("sdxl"), {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025}
            ),
            ("sdxl", "diffusers", "diffusers", False),
        ),
        (lambda f: write(f / "a.bin", as_diffusers(state_of("taesd"))), ("taesd", "bin", "diffusers", False)),
    ],
)
def test_facts_of_every_form(tmp_path, make, expected):
    facts = facts_of(open_checkpoint(make(tmp_path), "sd1"))
    assert list(facts) == FACTS
    assert tuple(facts[key] for key in ("family", "format", "layout", "baked")) == expected
    assert facts["dtype"] == "fp32"
    assert facts["fp16"] == "unknown"


def test_a_pair_of_two_layouts_is_not_ldm(tmp_path):
    for half, state in (("encoder", state_of("taesd")), ("decoder", as_diffusers(state_of("taesd")))):
        write(tmp_path / f"x_{half}.pt", {key: value for key, value in state.items() if key.startswith(half)})
    assert file_layout(open_checkpoint(tmp_path / "x_encoder.pt")) == "diffusers"


def test_the_table(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "a.safetensors", state_of()), "sd1")
    known = replace(checkpoint, name="longer-name", known_as="some.ckpt", copy_of="a")
    broken = Unreadable("b", tmp_path / "b.pt", "pt", "no VAE inside")
    heads, first, second, third = table([row_of(checkpoint), row_of(known), row_of(broken)])
    assert heads.split() == ["NAME", "FAMILY", "FROM", "FORMAT", "SHA256", "FP16", "KNOWN", "AS"]
    assert first.split() == ["a", "sd1", "default", "safetensors", checkpoint.sha256[:10], "unknown"]
    assert second.endswith("unknown  some.ckpt (a copy of a)")
    assert third.split(maxsplit=6) == ["b", "-", "-", "pt", "-", "-", "ERROR: no VAE inside"]
    assert len({line.find("sd1") for line in (first, second)}) == 1
    assert facts_of(broken) == {"name": "b", "path": str(tmp_path / "b.pt"), "format": "pt", "error": "no VAE inside"}


def test_lines_have_no_python_in_them():
    assert lines({"a": None, "long": True, "b": False, "c": 0.5}) == ["a     -", "long  yes", "b     no", "c     0.5"]
