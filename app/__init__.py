"""latentd: one service that turns pictures into latents and latents into pictures."""

__version__ = "0.1.0"
