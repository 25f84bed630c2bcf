"""Pipelines of diffusers, tiny and random: with RemoteVAE they make the pictures that they make with their own VAE."""

import inspect
import re
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="diffusers has its pipelines only beside transformers")

import diffusers
from PIL import Image

from latentd_client import RemoteVAE
from tests.service import pixels

SIDE = 64
TOLERANCE = 2.0**-11
"""Half precision's rounding of a picture in [0, 1]."""


def unet(channels: int = 4, **more: Any) -> Any:
    options: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "sample_size": SIDE // 8,
        "in_channels": channels,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
    }
    return diffusers.UNet2DConditionModel(**(options | more)).eval()


def controlnet(net: Any) -> Any:
    made = diffusers.ControlNetModel.from_unet(net, conditioning_embedding_out_channels=(16,) * 4)
    torch.nn.init.normal_(made.controlnet_mid_block.weight, std=0.1)  # fresh ones say nothing
    return made.eval()


def unet_xl() -> Any:
    return unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def picture() -> Image.Image:
    return Image.fromarray(pixels(SIDE, SIDE))


def mask() -> Image.Image:
    hole = np.zeros((SIDE, SIDE), np.uint8)
    hole[16:48, 16:40] = 255
    return Image.fromarray(hole)


def sd(kind: Any, net: Any, **parts: Any) -> Callable[[Any], Any]:
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    nothing = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    return lambda vae: kind(vae=vae, unet=net, scheduler=scheduler, requires_safety_checker=False, **nothing, **parts)


def sdxl(kind: Any) -> Callable[[Any], Any]:
    net, scheduler = unet_xl(), diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return lambda vae: kind(vae=vae, unet=net, scheduler=scheduler, add_watermarker=False, **nothing)


def flow(kind: Any, net: Any, *without: str) -> Callable[[Any], Any]:
    return lambda vae: kind(
        vae=vae,
        transformer=net.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(without),
    )


def sd3_net() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=SIDE // 8,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=16,
    )


def flux_net() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def flux2_net() -> Any:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
    )


def qwen_net() -> Any:
    return diffusers.QwenImageTransformer2DModel(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


class Processor:
    """What the pipeline of Qwen-Image 2.1 asks of its processor before it sees a prompt."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]


def qwen21_net() -> Any:
    return diffusers.QwenImage21Transformer2DModel(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


def sana_net() -> Any:
    return diffusers.SanaTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=2,
    )


def wan_net() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )


def hunyuan_net() -> Any:
    return diffusers.HunyuanImageTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(8, 8),
    )


SD_TEXT = {"prompt_embeds": noise(1, 7, 32), "negative_prompt_embeds": noise(1, 7, 32) * 0.5}
XL_TEXT = SD_TEXT | {"pooled_prompt_embeds": noise(1, 32), "negative_pooled_prompt_embeds": noise(1, 32) * 0.5}
SD3_TEXT = SD_TEXT | {"pooled_prompt_embeds": noise(1, 64), "negative_pooled_prompt_embeds": noise(1, 64) * 0.5}
FLUX_TEXT = {"prompt_embeds": noise(1, 7, 32), "pooled_prompt_embeds": noise(1, 32)}
FLUX2_TEXT = {"prompt_embeds": noise(1, 7, 16)}
QWEN_TEXT = {"prompt_embeds": noise(1, 7, 16), "prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long)}
SANA_TEXT = {
    "prompt_embeds": noise(1, 7, 16),
    "prompt_attention_mask": torch.ones(1, 7),
    "negative_prompt": None,
    "guidance_scale": 1.0,
    "use_resolution_binning": False,
}
WAN_TEXT = {"prompt_embeds": noise(1, 7, 16), "guidance_scale": 1.0, "num_frames": 1}
HUNYUAN_TEXT = QWEN_TEXT | {
    "prompt_embeds_2": noise(1, 7, 16),
    "prompt_embeds_mask_2": torch.ones(1, 7, dtype=torch.long),
}
SD3_WITHOUT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
FLUX_WITHOUT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
SIZE = {"width": SIDE, "height": SIDE}

PIPELINES: dict[str, tuple[str, Callable[[], Callable[[Any], Any]], dict[str, Any]]] = {
    "SD txt2img": ("sd1", lambda: sd(diffusers.StableDiffusionPipeline, unet()), SD_TEXT | SIZE),
    "SD img2img": (
        "sd1",
        lambda: sd(diffusers.StableDiffusionImg2ImgPipeline, unet()),
        SD_TEXT | {"image": picture(), "strength": 1.0},
    ),
    "SD inpaint": (
        "sd1",
        lambda: sd(diffusers.StableDiffusionInpaintPipeline, unet(9)),
        SD_TEXT | SIZE | {"image": picture(), "mask_image": mask()},
    ),
    "ControlNet": (
        "sd1",
        lambda: sd(diffusers.StableDiffusionControlNetPipeline, net := unet(), controlnet=controlnet(net)),
        SD_TEXT | {"image": picture()},
    ),
    "SDXL": ("sdxl", lambda: sdxl(diffusers.StableDiffusionXLPipeline), XL_TEXT | SIZE),
    "SDXL img2img": (
        "sdxl",
        lambda: sdxl(diffusers.StableDiffusionXLImg2ImgPipeline),
        XL_TEXT | {"image": picture(), "strength": 1.0},
    ),
    "SD3": (
        "sd3",
        lambda: flow(diffusers.StableDiffusion3Pipeline, sd3_net(), *SD3_WITHOUT),
        SD3_TEXT | SIZE,
    ),
    "SD3 img2img": (
        "sd3",
        lambda: flow(diffusers.StableDiffusion3Img2ImgPipeline, sd3_net(), *SD3_WITHOUT),
        SD3_TEXT | SIZE | {"image": picture(), "strength": 1.0},
    ),
    "FLUX.1": ("flux", lambda: flow(diffusers.FluxPipeline, flux_net(), *FLUX_WITHOUT), FLUX_TEXT | SIZE),
    "FLUX.1 img2img": (
        "flux",
        lambda: flow(diffusers.FluxImg2ImgPipeline, flux_net(), *FLUX_WITHOUT),
        FLUX_TEXT | SIZE | {"image": picture(), "strength": 1.0},
    ),
    "FLUX.2": (
        "flux2",
        lambda: flow(diffusers.Flux2Pipeline, flux2_net(), "text_encoder", "tokenizer"),
        FLUX2_TEXT | SIZE,
    ),
    "FLUX.2 with a picture": (
        "flux2",
        lambda: flow(diffusers.Flux2Pipeline, flux2_net(), "text_encoder", "tokenizer"),
        FLUX2_TEXT | SIZE | {"image": [picture()]},
    ),
    "Qwen-Image": (
        "qwen",
        lambda: flow(diffusers.QwenImagePipeline, qwen_net(), "text_encoder", "tokenizer"),
        QWEN_TEXT | SIZE,
    ),
    "Qwen-Image img2img": (
        "qwen",
        lambda: flow(diffusers.QwenImageImg2ImgPipeline, qwen_net(), "text_encoder", "tokenizer"),
        QWEN_TEXT | SIZE | {"image": picture(), "strength": 1.0},
    ),
    "Qwen-Image 2.1": (
        "qwen21",
        lambda: flow(partial(diffusers.QwenImage21Pipeline, processor=Processor()), qwen21_net(), "text_encoder"),
        QWEN_TEXT | SIZE,
    ),
    "Sana": ("sana", lambda: flow(diffusers.SanaPipeline, sana_net(), "text_encoder", "tokenizer"), SANA_TEXT | SIZE),
    "HunyuanImage": (
        "hunyuan",
        lambda: flow(diffusers.HunyuanImagePipeline, hunyuan_net(), *FLUX_WITHOUT),
        HUNYUAN_TEXT | SIZE,
    ),
    "Wan, one frame": (
        "wan",
        lambda: flow(diffusers.WanPipeline, wan_net(), "text_encoder", "tokenizer"),
        WAN_TEXT | SIZE,
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_pictures_are_those_of_the_local_vae(local, url, name):
    family, build, arguments = PIPELINES[name]
    torch.manual_seed(0)
    pipe = build()(local[family])
    pipe.set_progress_bar_config(disable=True)

    def run() -> np.ndarray:
        seeded = torch.Generator().manual_seed(7)
        found = pipe(**arguments, num_inference_steps=2, generator=seeded, output_type="np")
        return found.frames[:, 0] if name == "Wan, one frame" else found.images

    expected = run()
    pipe.vae = RemoteVAE(url, f"{family}-tiny")
    found = run()
    assert found.shape == (1, SIDE, SIDE, pipe.vae.config.out_channels)
    assert expected.std() > 0.01  # a picture, not one colour
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_configuration_has_every_field_that_a_pipeline_reads(url, name):
    family, build, _ = PIPELINES[name]
    vae = RemoteVAE(url, f"{family}-tiny")
    source = inspect.getsource(sys.modules[type(build()(vae)).__module__])
    read = set(re.findall(r"self\.vae\.config\.(\w+)", source))
    assert read - set(vae.config) == set()
    assert read


@pytest.fixture
def saved(local, tmp_path):
    """A pipeline's folder, as from_pretrained reads it."""
    pipe = PIPELINES["SD txt2img"][1]()(local["sd1"])
    pipe.save_pretrained(tmp_path)
    return tmp_path


def quick(pipe: Any, **more: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(7)
    images = pipe(**SD_TEXT, **more, num_inference_steps=1, generator=seeded, output_type="np").images
    assert isinstance(images, np.ndarray)
    return images


def test_from_pretrained_takes_it_for_the_saved_one(saved, url):
    without = {"text_encoder": None, "tokenizer": None}
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(saved, **without)
    vae = RemoteVAE(url, "sd1-tiny")
    ours = diffusers.StableDiffusionPipeline.from_pretrained(saved, vae=vae, **without)
    assert ours.vae is vae
    np.testing.assert_allclose(quick(ours, **SIZE), quick(theirs, **SIZE), rtol=0, atol=TOLERANCE)


def test_a_pipeline_that_is_made_of_another_keeps_it(local, url):
    pipe = PIPELINES["SD txt2img"][1]()(RemoteVAE(url, "sd1-tiny"))
    other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    assert other.vae is pipe.vae
    given = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae)  # by itself it wants the named class
    assert given.vae is pipe.vae
    found = quick(other, image=picture(), strength=1.0)
    pipe.vae = local["sd1"]
    expected = quick(diffusers.AutoPipelineForImage2Image.from_pipe(pipe), image=picture(), strength=1.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_it_goes_where_the_pipeline_goes(url):
    pipe = PIPELINES["SD txt2img"][1]()(RemoteVAE(url, "sd1-tiny"))
    pipe.to(torch.bfloat16)
    assert (pipe.vae.dtype, pipe.dtype, pipe.vae_scale_factor) == (torch.bfloat16, torch.bfloat16, 8)
    assert pipe._execution_device == torch.device("cpu")
    assert quick(pipe, **SIZE).shape == (1, SIDE, SIDE, 3)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    assert quick(pipe, **SIZE, num_images_per_prompt=2).shape == (2, SIDE, SIDE, 3)


def test_a_pipeline_is_saved_and_loaded_with_it(url, tmp_path):
    pipe = PIPELINES["SD txt2img"][1]()(RemoteVAE(url, "sd1-tiny", "secret"))
    pipe.save_pretrained(tmp_path)
    assert not any(b"secret" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert isinstance(again.vae, RemoteVAE)
    np.testing.assert_allclose(quick(again, **SIZE), quick(pipe, **SIZE), rtol=0, atol=TOLERANCE)


def test_offloading_a_pipeline_passes_it_by(url):
    pytest.importorskip("accelerate", reason="diffusers offloads with accelerate")
    pipe = PIPELINES["SD txt2img"][1]()(RemoteVAE(url, "sd1-tiny"))
    expected = quick(pipe, **SIZE)
    pipe.enable_model_cpu_offload(device="cpu")
    np.testing.assert_allclose(quick(pipe, **SIZE), expected, rtol=0, atol=TOLERANCE)
