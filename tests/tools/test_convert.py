"""What convert writes is what was read: tensor for tensor, in either layout, and it says what it is."""

import errno
import json
import logging
import os
import resource
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from safetensors import safe_open
from safetensors.torch import load_file

from app.errors import InvalidParameter, UnsupportedCheckpoint
from app.execution.primitive import Whole
from app.store.checkpoint import Checkpoint, CheckpointChanged, load_autoencoder
from app.store.known import Known
from app.store.store import open_checkpoint
from app.tools import convert as rewrite
from app.tools.convert import Output, config_json, convert
from app.vae.families import FAMILIES
from tests.store.weights import (
    SUFFIXES,
    State,
    as_diffusers,
    kl_config,
    module_of,
    state_of,
    under,
    write,
)

CPU = torch.device("cpu")
KL = [name for name, row in FAMILIES.items() if row.architecture == "kl"]
LOADABLE = ["sd1", "sdxl", "sd3", "flux", "taesd", "taesd3"]


def saved(path: Path, state: State, metadata: dict[str, str] | None = None) -> Checkpoint:
    return open_checkpoint(write(path, state, metadata), "sd1")


def same_bits(a: State, b: State) -> bool:
    def bits(tensor):
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return set(a) == set(b) and all(
        a[key].dtype == b[key].dtype and a[key].shape == b[key].shape and torch.equal(bits(a[key]), bits(b[key]))
        for key in a
    )


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_identity(tmp_path, family):
    state = state_of(family)
    source = saved(tmp_path / "a.safetensors", state, {"family": family})
    there = convert(source, Output(tmp_path / "b.safetensors", "diffusers"))
    assert same_bits(load_file(there), as_diffusers(state))
    back = convert(open_checkpoint(there), Output(tmp_path / "c.safetensors", "ldm"))
    assert same_bits(load_file(back), state)
    again = convert(open_checkpoint(back), Output(tmp_path / "d.safetensors", "diffusers"))
    assert same_bits(load_file(again), as_diffusers(state))
    assert open_checkpoint(again).family == source.family


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_out_of_any_container_and_any_full_checkpoint(tmp_path, suffix, prefix):
    state = state_of()
    inside = under(prefix)(state)
    if prefix:
        inside["model.diffusion_model.out.2.weight"] = torch.zeros(4, 3)
        inside["cond_stage_model.transformer.x.weight"] = torch.zeros(2)
    source = saved(tmp_path / f"a{suffix}", inside)
    assert source.baked == bool(prefix)
    assert same_bits(load_file(convert(source, Output(tmp_path / "b.safetensors"))), state)


def test_without_options_layout_and_dtypes_stay(tmp_path):
    state = as_diffusers(state_of("flux2"))
    state = {key: value if key.startswith("bn.") else value.bfloat16() for key, value in state.items()}
    state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"].double()
    out = convert(saved(tmp_path / "a.safetensors", state), Output(tmp_path / "b.safetensors"))
    assert same_bits(load_file(out), state)
    assert open_checkpoint(out).weight_dtype == "mixed"


def test_every_bit_stays_of_a_nan_too(tmp_path):
    state = state_of()
    bits = torch.tensor([0x7FC0_1234, 0x7F80_0001, -1, 0x0000_0001], dtype=torch.int32)
    state["decoder.conv_in.bias"].view(torch.int32)[:4] = bits
    out = load_file(convert(saved(tmp_path / "a.ckpt", state), Output(tmp_path / "b.safetensors", "diffusers")))
    assert out["decoder.conv_in.bias"].view(torch.int32)[:4].tolist() == bits.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_that_of_all_but_the_statistics(tmp_path, dtype):
    state = state_of("flux2")
    out = load_file(convert(saved(tmp_path / "a.safetensors", state), Output(tmp_path / "b.safetensors", None, dtype)))
    for key, value in out.items():
        if key.startswith("bn."):
            assert value.dtype == state[key].dtype
            assert torch.equal(value, state[key])
        else:
            assert value.dtype == dtype
            assert torch.equal(value, state[key].to(dtype))


def test_a_weight_beyond_half_is_refused_by_name_and_value(tmp_path):
    state = state_of()
    state["decoder.conv_out.weight"][0, 0, 0, 0] = -70000.0
    source = saved(tmp_path / "a.safetensors", state)
    with pytest.raises(UnsupportedCheckpoint, match=r"decoder\.conv_out\.weight has the value -70000, .* fp16"):
        convert(source, Output(tmp_path / "b.safetensors", None, torch.float16))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    convert(source, Output(tmp_path / "b.safetensors", None, torch.bfloat16))


def test_an_infinity_that_was_there_stays(tmp_path):
    state = state_of()
    state["decoder.conv_out.bias"][0] = torch.inf
    state["decoder.conv_out.bias"][1] = torch.nan
    source = saved(tmp_path / "a.safetensors", state)
    out = load_file(convert(source, Output(tmp_path / "b.safetensors", None, torch.float16)))
    assert out["decoder.conv_out.bias"][0].isinf()
    assert out["decoder.conv_out.bias"][1].isnan()


def test_a_pair_of_halves_becomes_one_file_and_back(tmp_path):
    state = state_of("taesd3")
    for half in ("encoder", "decoder"):
        bare = {key.removeprefix(f"{half}."): value for key, value in state.items() if key.startswith(half)}
        write(tmp_path / f"taesd3_{half}.pth", bare)
    source = open_checkpoint(tmp_path / "taesd3_decoder.pth")
    out = convert(source, Output(tmp_path / "out.safetensors"))
    assert same_bits(load_file(out), state)
    assert open_checkpoint(out).family.name == "taesd3"
    there = convert(source, Output(tmp_path / "there.safetensors", "diffusers"))
    assert same_bits(load_file(there), as_diffusers(state))


def test_metadata_says_what_it_is_and_keeps_what_was_there(tmp_path):
    theirs = {"author": "someone", "format": "np", "family": "sdxl", "scaling_factor": "0.5"}
    path = write(tmp_path / "a.safetensors", state_of(), theirs)
    (tmp_path / "a.json").write_text('{"family": "sd2"}')
    source = open_checkpoint(path)
    out = convert(source, Output(tmp_path / "b.safetensors"))
    assert metadata_of(out) == {
        "author": "someone",
        "format": "pt",
        "family": "sd2",  # the sidecar overrules; the file's own scale goes with its family
        "family_source": "operator",
        "source_sha256": source.sha256,
        "source_name": "a.safetensors",
    }
    result = open_checkpoint(out)
    assert (result.family, result.family_source) == (FAMILIES["sd2"], "config")


@pytest.mark.parametrize("target", ["b.safetensors", "folder"])
def test_a_guess_stays_one_and_somebody_s_word_settles_it(tmp_path, target):
    path = write(tmp_path / "a.safetensors", state_of())
    source = open_checkpoint(path, "sd1")
    assert source.family_source == "default"
    convert(source, Output(tmp_path / target, "diffusers"))
    for default in ("sd1", "sdxl"):  # it is of whatever family the file itself would be
        again = open_checkpoint(tmp_path / target, default)
        assert (again.family.name, again.family_source) == (default, "default")
        assert again.doubt
    convert(open_checkpoint(tmp_path / target, "sd1", "sdxl"), Output(tmp_path / "c.safetensors"))
    settled = open_checkpoint(tmp_path / "c.safetensors", "sd1")
    assert (settled.family.name, settled.family_source, settled.doubt) == ("sdxl", "config", None)


@pytest.mark.parametrize(
    "sidecar",
    [{"scaling_factor": 0.7, "shift_factor": -0.125}, {"family": "sdxl", "scaling_factor": 0.3}, {"family": "sd2"}],
)
@pytest.mark.parametrize("target", ["b.safetensors", "folder"])
def test_constants_of_its_own_go_along(tmp_path, sidecar, target):
    path = write(
        tmp_path / "a.safetensors", state_of(encoder_widths=(16,) * 4, decoder_widths=(16,) * 4, norm_groups=8)
    )
    (tmp_path / "a.json").write_text(json.dumps(sidecar | {"norm_num_groups": 8}))
    source = open_checkpoint(path)
    convert(source, Output(tmp_path / target, "diffusers"))
    result = open_checkpoint(tmp_path / target)
    assert result.family == source.family
    assert result.config == source.config


def test_the_same_source_gives_the_same_bytes(tmp_path):
    metadata = dict.fromkeys("qwertyuiop", "x")
    source = saved(tmp_path / "a.safetensors", state_of(), metadata)
    first, second = (convert(source, Output(tmp_path / f"{n}.safetensors")).read_bytes() for n in (1, 2))
    assert first == second
    assert int.from_bytes(first[:8], "little") % 8 == 0


@pytest.mark.parametrize("family", LOADABLE)
def test_diffusers_loads_the_folder_and_decodes_alike(tmp_path, family):
    source = saved(tmp_path / "a.safetensors", state_of(family), {"family": family})
    folder = tmp_path / "v1.5"
    convert(source, Output(folder, "diffusers"))
    theirs = (AutoencoderKL if family in KL else AutoencoderTiny).from_pretrained(folder)
    form = source.family.latent_format
    assert theirs.config.scaling_factor == form.scaling_factor
    assert (theirs.config.shift_factor or 0.0) == form.shift_factor
    ours = load_autoencoder(open_checkpoint(folder), torch.float32, CPU)
    latents = torch.randn(1, source.config.latent_channels, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        picture = ours.decode(Whole(), latents)
        expected = theirs.decode(latents).sample
    if family not in KL:
        expected = (expected + 1) / 2
    torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-4)
    assert open_checkpoint(folder).family == source.family


@pytest.mark.parametrize("changes", [{}, {"encoder_widths": (64,) * 4}])
def test_diffusers_loads_flux2(tmp_path, changes):
    state = state_of("flux2", **changes)
    convert(saved(tmp_path / "a.safetensors", state), Output(tmp_path / "out", "diffusers"))
    theirs = AutoencoderKLFlux2.from_pretrained(tmp_path / "out")
    assert same_bits(theirs.state_dict(), as_diffusers(state))


def test_diffusers_finds_nothing_odd(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    convert(
        saved(tmp_path / "a.safetensors", state_of("sdxl"), {"family": "sdxl"}), Output(tmp_path / "o", "diffusers")
    )
    AutoencoderKL.from_pretrained(tmp_path / "o", low_cpu_mem_usage=False)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("family", ["taef2", "taesana"])
def test_what_diffusers_cannot_build_is_refused_as_a_folder_only(tmp_path, family):
    source = saved(tmp_path / "a.safetensors", state_of(family))
    with pytest.raises(UnsupportedCheckpoint, match=r"no class of diffusers .* \.safetensors"):
        convert(source, Output(tmp_path / "out", "diffusers"))
    assert not (tmp_path / "out").exists()
    convert(source, Output(tmp_path / "out.safetensors", "diffusers"))


def test_a_decoder_of_its_own_widths_is_no_autoencoder_kl(tmp_path):
    for changes in ({"decoder_widths": (64,) * 4}, {"decoder_depth": 3}):
        source = saved(tmp_path / "a.safetensors", state_of(**changes))
        assert source.config == kl_config(**changes)
        with pytest.raises(UnsupportedCheckpoint, match="no class of diffusers"):
            convert(source, Output(tmp_path / "out", "diffusers"))


@pytest.mark.parametrize("target", ["a.ckpt", "folder", "b.pt", "there"])
def test_a_target_that_cannot_be(tmp_path, target):
    source = saved(tmp_path / "x" / "a.safetensors", state_of("taesd"))
    (tmp_path / "there").mkdir()
    with pytest.raises(InvalidParameter, match=r"expected the name of a \.safetensors file"):
        convert(source, Output(tmp_path / target, "ldm"))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_whole_under_the_name_of_a_half_would_be_paired(tmp_path, half):
    source = saved(tmp_path / "a.safetensors", state_of("taesd"))
    with pytest.raises(InvalidParameter, match=f"taken for the {half} alone"):
        convert(source, Output(tmp_path / f"x_{half}.safetensors"))


def test_what_exists_is_replaced_by_force_alone(tmp_path):
    source = saved(tmp_path / "a.safetensors", state_of("taesd"))
    (tmp_path / "b.safetensors").write_text("mine")
    with pytest.raises(InvalidParameter, match="exists; --force"):
        convert(source, Output(tmp_path / "b.safetensors"))
    assert (tmp_path / "b.safetensors").read_text() == "mine"
    assert same_bits(load_file(convert(source, Output(tmp_path / "b.safetensors", force=True))), state_of("taesd"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    with pytest.raises(InvalidParameter, match=r"config\.json exists"):
        convert(source, Output(tmp_path / "folder", "diffusers"))
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["config.json"]


def test_the_source_is_never_replaced_under_any_name(tmp_path):
    source = saved(tmp_path / "a.safetensors", state_of("taesd"))
    (tmp_path / "link.safetensors").symlink_to("a.safetensors")
    (tmp_path / "hard.safetensors").hardlink_to(tmp_path / "a.safetensors")
    for name in ("a", "link", "hard"):
        with pytest.raises(InvalidParameter, match="is the source itself"):
            convert(source, Output(tmp_path / f"{name}.safetensors", force=True))
    assert same_bits(load_file(tmp_path / "a.safetensors"), state_of("taesd"))


def test_a_folder_that_is_not_there_or_not_writable(tmp_path):
    source = saved(tmp_path / "a.safetensors", state_of("taesd"))
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        convert(source, Output(tmp_path / "no" / "b.safetensors"))
    with pytest.raises(NotADirectoryError):
        convert(source, Output(tmp_path / "a.safetensors" / "b.safetensors"))
    (tmp_path / "shut").mkdir(mode=0o500)
    if os.access(tmp_path / "shut", os.W_OK):
        pytest.skip("root writes everywhere")
    with pytest.raises(PermissionError):
        convert(source, Output(tmp_path / "shut" / "b.safetensors"))


@pytest.mark.parametrize("target", ["b.safetensors", "folder"])
def test_a_full_disk_leaves_nothing(tmp_path, target):
    source = saved(tmp_path / "a.safetensors", state_of("taesd"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # a write beyond is an OSError, as on a full disk
    try:
        with pytest.raises(OSError, match=r"\.safetensors") as raised:
            convert(source, Output(tmp_path / target, "diffusers"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_source_that_is_truncated_meanwhile_leaves_nothing(tmp_path):
    source = saved(tmp_path / "a.safetensors", state_of("taesd"))
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(UnsupportedCheckpoint):
        convert(source, Output(tmp_path / "b.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_source_that_is_replaced_meanwhile_leaves_nothing(tmp_path, monkeypatch):
    source = saved(tmp_path / "a.safetensors", state_of("taesd"))
    read = rewrite.read_places

    def read_then_replace(places):
        yield from read(places)
        write(tmp_path / "a.safetensors", state_of("taesd", seed=1))

    monkeypatch.setattr(rewrite, "read_places", read_then_replace)
    with pytest.raises(CheckpointChanged, match="written to meanwhile"):
        convert(source, Output(tmp_path / "b.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    source = saved(tmp_path / "a.safetensors", state_of("taesd"))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rewrite, "cast", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, Output(tmp_path / "folder", "diffusers"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_loaded_copy_decodes_as_the_original(tmp_path):
    state = state_of("sd1")
    out = convert(saved(tmp_path / "a.ckpt", state), Output(tmp_path / "b.safetensors", "diffusers"))
    module = load_autoencoder(open_checkpoint(out), torch.float32, CPU)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(module.decode(Whole(), latents), _channels_last().decode(Whole(), latents))


def _channels_last():
    return module_of("sd1").to(memory_format=torch.channels_last)


@pytest.mark.parametrize("family", ["latentd-small", "sdxl"])
def test_the_folder_says_the_family(tmp_path, family):
    assert config_json(saved(tmp_path / "a.safetensors", state_of(), {"family": family}))["_family"] == family


def test_a_file_known_to_be_sound_in_half_may_stay_in_half(tmp_path, monkeypatch):
    assert config_json(saved(tmp_path / "a.safetensors", state_of()))["force_upcast"] is True
    monkeypatch.setattr("app.store.identity.lookup", lambda *_: Known("x", "0", "sd1", "ok"))
    assert config_json(saved(tmp_path / "a.safetensors", state_of()))["force_upcast"] is False
