"""Random autoencoders of diffusers, one of each family that its pipelines have."""

from typing import Any

import diffusers
import torch

CHANNELS = {
    "sd1": 4,
    "sdxl": 4,
    "sd3": 16,
    "flux": 16,
    "flux2": 32,
    "taesd": 4,
    "wan": 16,
    "qwen": 16,
    "wan22": 48,
    "qwen21": 64,
    "sana": 32,
    "hunyuan": 64,
}
CONSTANTS = {"sd1": (0.18215, None), "sdxl": (0.13025, None), "sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}

QWEN: dict[str, Any] = {
    # latents_mean and latents_std of the class are Wan's; lists that differ show which ones are read
    "latents_mean": [0.1 * (channel - 8) for channel in range(16)],
    "latents_std": [1 + 0.1 * channel for channel in range(16)],
}
WAN22: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 48,
    "is_residual": True,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "in_channels": 12,
    "out_channels": 12,
    "latents_mean": [0.1 * (channel - 24) for channel in range(48)],
    "latents_std": [1 + 0.1 * channel for channel in range(48)],
}
SANA: dict[str, Any] = {
    "latent_channels": 32,
    "attention_head_dim": 8,
    "scaling_factor": 0.41407,
    "encoder_block_out_channels": (8, 8, 16, 32, 32, 32),
    "decoder_block_out_channels": (8, 8, 16, 32, 32, 32),
    "encoder_layers_per_block": (1,) * 6,
    "decoder_layers_per_block": (1,) * 6,
    "encoder_block_types": ("ResBlock",) * 5 + ("EfficientViTBlock",),
    "decoder_block_types": ("ResBlock",) * 5 + ("EfficientViTBlock",),
    "encoder_qkv_multiscales": ((), (), (), (), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (), (), (5,)),
    "upsample_block_type": "interpolate",
}
HUNYUAN: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 64,
    "layers_per_block": 1,
    "block_out_channels": (32, 32, 32, 32, 64, 128),
    "spatial_compression_ratio": 32,
    "sample_size": 384,
    "scaling_factor": 0.75289,
}


def autoencoder(family: str) -> Any:
    """A random VAE of the family, as diffusers builds it."""
    torch.manual_seed(sorted(CHANNELS).index(family))
    if family == "taesd":
        widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
        blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
        return diffusers.AutoencoderTiny(**widths, **blocks).eval()
    if family == "wan":
        return diffusers.AutoencoderKLWan(base_dim=8).eval()
    if family == "qwen":
        return diffusers.AutoencoderKLQwenImage(base_dim=8, **QWEN).eval()
    if family == "wan22":
        return diffusers.AutoencoderKLWan(**WAN22).eval()
    if family == "qwen21":
        return diffusers.AutoencoderKLQwenImage21(base_dim=8, decoder_base_dim=8).eval()
    if family == "sana":
        return diffusers.AutoencoderDC(**SANA).eval()
    if family == "hunyuan":
        return diffusers.AutoencoderKLHunyuanImage(**HUNYUAN).eval()
    levels = 4
    common: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (32,) * levels,
        "latent_channels": CHANNELS[family],
        "norm_num_groups": 32,
    }
    if family == "flux2":
        vae = diffusers.AutoencoderKLFlux2(**common)
        vae.bn.running_mean.normal_(0, 0.1)
        vae.bn.running_var.uniform_(0.5, 2)
    else:
        scale, shift = CONSTANTS[family]
        quant = family in ("sd1", "sdxl")
        vae = diffusers.AutoencoderKL(
            **common,
            scaling_factor=scale,
            shift_factor=shift,
            use_quant_conv=quant,
            use_post_quant_conv=quant,
            force_upcast=False,
        )
    return vae.eval()
