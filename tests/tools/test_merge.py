"""A merge is the weighted mean, half by half; contrast and brightness act on the picture exactly as they say."""

import itertools

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from app.errors import FamilyMismatch, UnsupportedCheckpoint
from app.execution.primitive import Whole
from app.store.checkpoint import Checkpoint, load_autoencoder
from app.store.store import open_checkpoint
from app.tools.convert import Output
from app.tools.merge import Blend, merge, same_space
from app.vae.families import FAMILIES
from tests.store.weights import as_diffusers, state_of, write

CPU = torch.device("cpu")


def saved(path, state, family: str | None = None) -> Checkpoint:
    return open_checkpoint(write(path, state, {"family": family} if family else None), "sd1")


def pair(tmp_path, family="sd1") -> tuple[Checkpoint, Checkpoint]:
    a = saved(tmp_path / "a.safetensors", state_of(family), family)
    return a, saved(tmp_path / "b.ckpt", state_of(family, seed=1))


def decoded(checkpoint: Checkpoint) -> torch.Tensor:
    module = load_autoencoder(checkpoint, torch.float32, CPU)
    latents = torch.randn(1, checkpoint.config.latent_channels, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return module.decode(Whole(), latents)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.5, -0.5])
def test_ratio_is_the_weight_of_b(tmp_path, ratio):
    a, b = pair(tmp_path)
    out = load_file(merge(a, b, Blend(ratio, ratio), Output(tmp_path / "c.safetensors")))
    ours, theirs = state_of(), state_of(seed=1)
    assert set(out) == set(ours)
    for key, value in out.items():
        torch.testing.assert_close(value, (1 - ratio) * ours[key] + ratio * theirs[key], rtol=1e-5, atol=1e-6)


def test_none_and_all_of_b_are_exact(tmp_path):
    a, b = pair(tmp_path)
    for ratio, state in ((0.0, state_of()), (1.0, state_of(seed=1))):
        out = load_file(merge(a, b, Blend(ratio, ratio), Output(tmp_path / "c.safetensors", force=True)))
        assert all(torch.equal(out[key], state[key]) for key in state)
    for ratio in (0.3, 0.5, 0.77):
        out = load_file(merge(a, a, Blend(ratio, ratio), Output(tmp_path / "c.safetensors", force=True)))
        assert all(torch.equal(out[key], value) for key, value in state_of().items())


def test_each_half_has_its_ratio_and_its_quant_conv(tmp_path):
    a, b = pair(tmp_path)
    out = load_file(merge(a, b, Blend(encoder_ratio=0.0, decoder_ratio=1.0), Output(tmp_path / "c.safetensors")))
    for key, value in out.items():
        of_a = key.startswith(("encoder.", "quant_conv."))
        assert torch.equal(value, state_of(seed=0 if of_a else 1)[key])
    assert {key.split(".")[0] for key in out} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}


def test_layout_and_dtypes_are_those_of_a(tmp_path):
    half = {key: value.bfloat16() for key, value in as_diffusers(state_of()).items()}
    a, b = saved(tmp_path / "a.safetensors", half), saved(tmp_path / "b.safetensors", state_of(seed=1))
    out = load_file(merge(a, b, Blend(), Output(tmp_path / "c.safetensors")))
    theirs = as_diffusers(state_of(seed=1))
    for key, value in out.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, torch.lerp(half[key].float(), theirs[key], 0.5).bfloat16())
    asked = load_file(merge(a, b, Blend(), Output(tmp_path / "d.safetensors", "ldm", torch.float32)))
    assert set(asked) == set(state_of())
    assert {value.dtype for value in asked.values()} == {torch.float32}


@pytest.mark.parametrize("family", ["sd1", "flux2", "latentd-small", "taesd", "taef2", "taesana"])
@pytest.mark.parametrize(("contrast", "brightness"), [(1.25, 0.0), (1.0, -0.125), (0.8, 0.1), (0.0, 0.5)])
def test_the_picture_is_contrast_times_it_plus_brightness(tmp_path, family, contrast, brightness):
    a = saved(tmp_path / "a.safetensors", state_of(family), family)
    blend = Blend(contrast=contrast, brightness=brightness)
    before = decoded(a)
    after = decoded(open_checkpoint(merge(a, a, blend, Output(tmp_path / "c.safetensors"))))
    if FAMILIES[family].architecture == "tiny":  # pixels in [0, 1]
        before, after = before * 2 - 1, after * 2 - 1
    torch.testing.assert_close(after, contrast * before + brightness, rtol=1e-4, atol=1e-4)
    assert before.std() > 0.01


def test_the_encoder_is_left_alone_by_them(tmp_path):
    a, _ = pair(tmp_path)
    out = load_file(merge(a, a, Blend(contrast=2.0, brightness=1.0), Output(tmp_path / "c.safetensors")))
    changed = {key for key, value in out.items() if not torch.equal(value, state_of()[key])}
    assert changed == {"decoder.conv_out.weight", "decoder.conv_out.bias"}


def test_a_decoder_without_such_a_convolution_says_so(tmp_path):
    state = state_of("taesd")
    for half in ("encoder", "decoder"):
        last = max(int(key.split(".")[1]) for key in state if key.startswith(half))
        del state[f"{half}.{last}.bias"]  # a convolution that resamples
    a = open_checkpoint(write(tmp_path / "a.safetensors", state, {"scaling_factor": "1.5"}))
    with pytest.raises(UnsupportedCheckpoint, match="plain convolution with a bias"):
        merge(a, a, Blend(contrast=1.1), Output(tmp_path / "c.safetensors"))
    merge(a, a, Blend(), Output(tmp_path / "c.safetensors"))


def test_statistics_of_the_latents_are_those_of_a(tmp_path):
    a, b = pair(tmp_path, "flux2")
    out = load_file(merge(a, b, Blend(1.0, 1.0), Output(tmp_path / "c.safetensors")))
    ours, theirs = state_of("flux2"), state_of("flux2", seed=1)
    for key, value in out.items():
        assert torch.equal(value, (ours if key.startswith("bn.") else theirs)[key])


def test_latent_spaces():
    same = {frozenset(two) for two in itertools.product(FAMILIES, repeat=2) if same_space(*(FAMILIES[n] for n in two))}
    assert {tuple(sorted(two)) for two in same if len(two) == 2} == {("sd1", "sd2")}
    assert len(same) == len(FAMILIES) + 1


def test_other_spaces_and_other_networks_are_refused_and_named(tmp_path):
    sd1 = saved(tmp_path / "one.safetensors", state_of(), "sd1")
    sd2 = saved(tmp_path / "two.safetensors", state_of(), "sd2")
    sdxl = saved(tmp_path / "xl.safetensors", state_of(), "sdxl")
    wide = saved(tmp_path / "wide.safetensors", state_of(decoder_widths=(64,) * 4), "sd1")
    merge(sd1, sd2, Blend(), Output(tmp_path / "c.safetensors"))
    with pytest.raises(FamilyMismatch, match=r"one is sd1 \(config\) and xl is sdxl \(config\)"):
        merge(sd1, sdxl, Blend(), Output(tmp_path / "d.safetensors"))
    with pytest.raises(FamilyMismatch, match=r"one and wide: they differ in decoder_widths: \(32, .*\(64"):
        merge(sd1, wide, Blend(), Output(tmp_path / "d.safetensors"))
    assert not (tmp_path / "d.safetensors").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_result_that_is_not_finite_is_refused(tmp_path, value):
    state = state_of()
    state["encoder.conv_in.bias"][0] = value
    a, b = saved(tmp_path / "a.safetensors", state_of()), saved(tmp_path / "b.safetensors", state)
    with pytest.raises(UnsupportedCheckpoint, match=r"encoder\.conv_in\.bias is not finite"):
        merge(a, b, Blend(), Output(tmp_path / "c.safetensors"))
    with pytest.raises(UnsupportedCheckpoint, match=r"decoder\.conv_out.* beyond the range of fp16"):
        merge(a, a, Blend(contrast=1e7), Output(tmp_path / "c.safetensors", dtype=torch.float16))
    assert not (tmp_path / "c.safetensors").exists()


def test_metadata_has_both_sources_and_the_recipe(tmp_path):
    a, b = pair(tmp_path)
    out = merge(a, b, Blend(0.25, 0.75, 1.1, -0.1), Output(tmp_path / "c.safetensors"))
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["source_sha256"] == a.sha256
    assert (metadata["merge_sha256"], metadata["merge_name"]) == (b.sha256, "b.ckpt")
    recipe = ("encoder_ratio", "decoder_ratio", "contrast", "brightness")
    assert [float(metadata[key]) for key in recipe] == [0.25, 0.75, 1.1, -0.1]
    assert open_checkpoint(out).family.name == "sd1"


def test_a_guess_in_either_is_one_in_the_result(tmp_path):
    guess = open_checkpoint(write(tmp_path / "guess.safetensors", state_of()), "sd1")
    fact = saved(tmp_path / "fact.safetensors", state_of(seed=1), "sd1")
    for name, a, b in (("ab", guess, fact), ("ba", fact, guess)):
        out = open_checkpoint(merge(a, b, Blend(), Output(tmp_path / f"{name}.safetensors")), "sd1")
        assert (out.family.name, out.family_source) == ("sd1", "default")
    out = open_checkpoint(merge(fact, fact, Blend(), Output(tmp_path / "c.safetensors")), "sd1")
    assert out.family_source == "config"
