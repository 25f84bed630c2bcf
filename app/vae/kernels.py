"""Knows how an autoencoder gets the convolution kernels that are kept beside its weights; see `execution.preparing`."""

from app.execution.preparing import prepare
from app.execution.program import record
from app.vae.autoencoder import Autoencoder

SIDE = 4  # of the latent by which its layers are looked through


def add_kernels(module: Autoencoder) -> int:
    """Prepares the kernels of both halves, in float32, on the weights' device; their bytes."""
    config = module.config
    pixels = (1, config.pixel_channels, SIDE * config.spatial_factor, SIDE * config.spatial_factor)
    latents = (1, config.latent_channels, SIDE, SIDE)
    return prepare([record(module.encode, pixels), record(module.decode, latents)])
