"""The three nodes, and what of ComfyUI they touch."""

import os
from typing import Any, ClassVar

from torch import Tensor

from .remote_vae import RemoteVAE, remote_vae
from .wire import server_of

DEFAULT = "(the service's default)"
CATEGORY = "latentd"
SERVICE: dict[str, Any] = {
    "model": ([DEFAULT], {"tooltip": "Of the service's models. Press R to look again."}),
    "url": ("STRING", {"default": "", "tooltip": "Of the service; empty: LATENTD_URL, or else this machine's."}),
}


def connect(model: str, url: str) -> RemoteVAE:
    """The VAE, its work given up when ComfyUI's Cancel is pressed, its results where ComfyUI wants them."""
    from comfy import model_management

    def place(result: Tensor) -> Tensor:
        return result.to(model_management.intermediate_device(), model_management.intermediate_dtype())

    check = model_management.throw_exception_if_processing_interrupted
    return remote_vae(server_of(url, os.environ), "" if model == DEFAULT else model, check, place)


class LatentdLoader:
    """A VAE for every node that takes one."""

    CATEGORY = CATEGORY
    DESCRIPTION = "A VAE of a latentd service, for ComfyUI's own VAE nodes. Tile sizes mean nothing to it."
    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"
    TAKES: ClassVar[dict[str, Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  ComfyUI's name
        return {"required": {**cls.TAKES, **SERVICE}}

    @classmethod
    def VALIDATE_INPUTS(cls, model: str) -> bool:  # noqa: N802  ComfyUI's name
        """The list is the service's: only it knows whether there is such a model."""
        return True

    def load(self, model: str, url: str) -> tuple[RemoteVAE]:
        return (connect(model, url),)


class LatentdDecode(LatentdLoader):
    """Latents to pictures."""

    DESCRIPTION = "Decodes latents on a latentd service."
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"
    TAKES: ClassVar[dict[str, Any]] = {"samples": ("LATENT",)}

    def decode(self, samples: dict[str, Any], model: str, url: str) -> tuple[Tensor]:
        latents = samples["samples"]
        if latents.is_nested:  # several kinds in one: the pictures' come first
            latents = latents.unbind()[0]
        return (connect(model, url).decode(latents),)


class LatentdEncode(LatentdLoader):
    """Pictures to latents."""

    DESCRIPTION = "Encodes pictures on a latentd service."
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "encode"
    TAKES: ClassVar[dict[str, Any]] = {"pixels": ("IMAGE",)}

    def encode(self, pixels: Tensor, model: str, url: str) -> tuple[dict[str, Tensor]]:
        return ({"samples": connect(model, url).encode(pixels)},)


NODE_CLASS_MAPPINGS = {
    "LatentdVAELoader": LatentdLoader,
    "LatentdVAEDecode": LatentdDecode,
    "LatentdVAEEncode": LatentdEncode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LatentdVAELoader": "Load remote VAE (latentd)",
    "LatentdVAEDecode": "VAE Decode (latentd)",
    "LatentdVAEEncode": "VAE Encode (latentd)",
}
