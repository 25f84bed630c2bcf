"""Every autoencoder of diffusers is supported or named; so is what people take for one."""

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKLTemporalDecoder, ConsistencyDecoderVAE, VQModel
from diffusers.models import autoencoders
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from app.errors import UnsupportedCheckpoint
from app.store.store import open_checkpoint
from app.vae.architectures import ARCHITECTURES, diffusers_classes
from app.vae.unsupported import NO_VAE, UNSUPPORTED, no_vae, unsupported
from tests.store.weights import sparse, write

SOUND = "an autoencoder of sound"
CLASSES = {
    # class of diffusers: what its tensors are said to be
    "AsymmetricAutoencoderKL": "an AsymmetricAutoencoderKL (for inpainting)",
    "AutoencoderKLAllegro": "the VAE of Allegro",
    "AutoencoderKLCogVideoX": "the VAE of CogVideoX",
    "AutoencoderKLCosmos": "the VAE of Cosmos 1",
    "AutoencoderKLHunyuanImageRefiner": "the VAE of HunyuanVideo 1.5, or of the refiner of HunyuanImage",
    "AutoencoderKLHunyuanVideo": "the VAE of HunyuanVideo",
    "AutoencoderKLHunyuanVideo15": "the VAE of HunyuanVideo 1.5, or of the refiner of HunyuanImage",
    "AutoencoderKLKVAE": "the VAE of Kandinsky's KVAE",
    "AutoencoderKLKVAEAudio": SOUND,
    "AutoencoderKLKVAEVideo": "the VAE of Kandinsky's KVAE, for clips",
    "AutoencoderKLLTX2Audio": "an AutoencoderKLLTX2Audio (sound of LTX-2)",
    "AutoencoderKLLTX2Video": "the VAE of LTX-Video or LTX-2",
    "AutoencoderKLLTXVideo": "the VAE of LTX-Video or LTX-2",
    "AutoencoderKLMagvit": "the VAE of EasyAnimate (an AutoencoderKLMagvit)",
    "AutoencoderKLMiniMaxH3": "the VAE of MiniMax H3",
    "AutoencoderKLMiniMaxH3Audio": SOUND,
    "AutoencoderKLMochi": "the VAE of Mochi",
    "AutoencoderKLTemporalDecoder": "an AutoencoderKLTemporalDecoder (of Stable Video Diffusion)",
    "AutoencoderOobleck": SOUND,
    "AutoencoderRAE": "an AutoencoderRAE",
    "AutoencoderSAME": SOUND,
    "AutoencoderVidTok": "an AutoencoderVidTok",
    "ConsistencyDecoderVAE": "a ConsistencyDecoderVAE",
    "Cosmos3AVAEAudioTokenizer": SOUND,
    "Kandinsky6SRVAE": "the upscaling VAE of Kandinsky 6",
    "LTX2VideoDiffusionDecoderModel": "the diffusion decoder of LTX-2",
    "LongCatAudioDiTVae": SOUND,
    "MMAudioVAE": SOUND,
    "MMAudioVocoder": SOUND,
    "MiniMaxMusic3Vocoder": SOUND,
    "RFD4ProteinaAutoencoder": "an autoencoder of proteins",
    "VQModel": "a VQModel (its latents are rows of a table)",
}
NEEDED: dict[str, dict[str, Any]] = {
    # what a class cannot be made without
    "RFD4ProteinaAutoencoder": {"atom37_mask": [[True] * 37] * 20, "allowed_residue_types": [True] * 20},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 64,
        "block_out_channels": (128, 256, 512, 512, 1024, 1024),
        "layers_per_block": 2,
        "spatial_compression_ratio": 32,
        "sample_size": 384,
    },
}


def classes() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(autoencoders.__path__):
        name = f"{autoencoders.__name__}.{module.name}"
        for key, value in vars(importlib.import_module(name)).items():
            if inspect.isclass(value) and issubclass(value, ModelMixin) and value.__module__ == name:
                found[key] = value
    return found


FOUND = classes()


@pytest.mark.parametrize("name", FOUND)
def test_every_class_of_diffusers_is_run_or_named(tmp_path, name):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations among themselves
        state = FOUND[name](**NEEDED.get(name, {})).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    if name in CLASSES:
        assert unsupported(shapes) == CLASSES[name]
        with pytest.raises(UnsupportedCheckpoint) as refused:
            open_checkpoint(sparse(tmp_path / "x.safetensors", shapes))
        assert f"this is {CLASSES[name]}" in str(refused.value)
    else:
        row, _ = diffusers_classes()[name]
        assert unsupported(shapes) is None
        assert [each for each in ARCHITECTURES.values() if each.told(shapes)] == [row]


def test_none_is_both():
    assert not CLASSES.keys() & diffusers_classes().keys()


PUBLISHED: dict[str, dict[str, tuple[int, ...]]] = {
    # what it is: keys and shapes of files that are not of diffusers
    "an AutoencoderKLTemporalDecoder (of Stable Video Diffusion)": {
        "decoder.mid.block_1.mix_factor": (1,),
        "encoder.down.0.block.0.conv2.weight": (128, 128, 3, 3),
    },
    "stage A of Stable Cascade (a VQGAN)": {
        "vquantizer.codebook.weight": (8192, 4),
        "in_block.1.weight": (48, 12, 1, 1),
    },
    "the encoder of Stable Cascade": {"backbone.1.0.block.0.1.num_batches_tracked": ()},
    "the previewer of Stable Cascade": {"blocks.11.num_batches_tracked": (), "blocks.0.weight": (512, 16, 1, 1)},
    "the VAE of MiniMax H3": {"encoder.down.5.block.0.conv1.weight": (8, 8, 3, 3, 3)},
    "the VAE of Mochi": {"decoder.blocks.2.blocks.3.stack.5.weight": (256, 256, 3, 3, 3)},
    "the VAE of Cosmos 1": {"decoder.unpatcher3d.wavelets": (2,), "decoder.conv_in.0.conv3d.weight": (8, 16, 1, 3, 3)},
    "the VAE of CogVideoX": {
        "decoder.conv_in.conv.weight": (512, 16, 3, 3, 3),
        "decoder.mid.block_1.norm1.norm_layer.weight": (512,),
    },
    "the VAE of HunyuanVideo 1.5, or of the refiner of HunyuanImage": {
        "decoder.conv_in.conv.weight": (1024, 32, 3, 3, 3),
        "decoder.up.0.block.0.norm1.gamma": (1024, 1, 1, 1),
    },
    "the VAE of LTX-Video or LTX-2": {
        "per_channel_statistics.mean-of-means": (128,),
        "decoder.conv_in.conv.weight": (1024, 128, 3, 3, 3),
    },
    "a tiny autoencoder of clips (TAEHV)": {
        "encoder.2.conv.weight": (64, 64, 1, 1),
        "decoder.7.conv.weight": (256, 256, 1, 1),
        "decoder.1.weight": (256, 16, 3, 3),
    },
    "a T5 text encoder": {"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8), "shared.weight": (9, 8)},
    "an autoencoder of clips, of a kind not known here": {"decoder.conv_in.weight": (8, 4, 3, 3, 3)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_of_the_publishers_are_named(name):
    assert unsupported(PUBLISHED[name]) == name


def test_every_row_is_tested():
    assert UNSUPPORTED.keys() == {*CLASSES.values(), *PUBLISHED}


NOT_ONE: dict[str, dict[str, tuple[int, ...]]] = {
    "a LoRA": {"lora_unet_down_blocks_0.lora_up.weight": (8, 4), "lora_unet_down_blocks_0.alpha": ()},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
    "the UNet of Stable Diffusion, without its VAE": {"down_blocks.0.attentions.0.norm.weight": (320,)},
    "a diffusion transformer, without its VAE": {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (9, 3)},
    "a diffusion model, without its VAE": {"model.diffusion_model.out.2.weight": (4, 320, 3, 3)},
    "a text encoder": {"text_model.encoder.layers.0.mlp.fc1.weight": (8, 8)},
    "a language model": {"model.layers.0.self_attn.q_proj.weight": (8, 8)},
    "an embedding (textual inversion)": {"emb_params": (8, 768)},
    "an upscaler": {"model.0.weight": (64, 3, 3, 3), "model.1.sub.0.RDB1.conv1.0.weight": (32, 64, 3, 3)},
}


@pytest.mark.parametrize("name", NO_VAE)
def test_what_is_no_vae_is_named(tmp_path, name):
    assert no_vae(NOT_ONE[name]) == name
    assert unsupported(NOT_ONE[name]) is None
    path = write(tmp_path / "x.safetensors", {key: torch.zeros(shape) for key, shape in NOT_ONE[name].items()})
    with pytest.raises(UnsupportedCheckpoint) as refused:
        open_checkpoint(path)
    assert str(refused.value).startswith(f"no VAE inside: this is {name} (")
    assert "\n" not in str(refused.value)


SMALL = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",), "norm_num_groups": 4}
FILES: dict[str, Callable[[], nn.Module]] = {
    "a VQModel": lambda: VQModel(block_out_channels=(8,), num_vq_embeddings=4, **SMALL),
    "an AsymmetricAutoencoderKL": lambda: AsymmetricAutoencoderKL(
        down_block_out_channels=(8,), up_block_out_channels=(8,), **SMALL
    ),
    "a ConsistencyDecoderVAE": lambda: ConsistencyDecoderVAE(
        encoder_block_out_channels=(32,),
        encoder_down_block_types=("DownEncoderBlock2D",),
        decoder_block_out_channels=(32,),
        decoder_down_block_types=("ResnetDownsampleBlock2D",),
        decoder_up_block_types=("ResnetUpsampleBlock2D",),
    ),
    "an AutoencoderKLTemporalDecoder": lambda: AutoencoderKLTemporalDecoder(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",)
    ),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_what_is_known_and_not_supported_is_named(tmp_path, name, prefix):
    state = {prefix + key: value for key, value in FILES[name]().state_dict().items()}
    with pytest.raises(UnsupportedCheckpoint, match=f"this is {name}.* not supported"):
        open_checkpoint(write(tmp_path / "x.safetensors", state), "sd1")
