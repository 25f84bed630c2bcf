"""RemoteVAE: stands where a diffusers pipeline has its VAE; the network runs on the service."""

import logging
import weakref
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latentd_client.bodies import Array
from latentd_client.calls import Precision, Tiling
from latentd_client.client import Client
from latentd_client.errors import UnexpectedAnswer, UnsupportedCheckpoint
from latentd_client.results import Decoded, Encoded, Model

log = logging.getLogger("latentd_client")


class PointOutput(AutoencoderTinyOutput):  # type: ignore[misc]  # diffusers has no types
    """Latents of a network without a variance, by the name that the tiny ones' have and by DC-AE's."""

    @property
    def latent(self) -> Tensor:
        found: Tensor = self.latents
        return found


EncoderOutput: TypeAlias = AutoencoderKLOutput | PointOutput


class RemoteVAE(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """A VAE of the service at `url`: `pipe.vae = RemoteVAE("http://gpu-host:8000", "sdxl")`.

    What encode and decode return has the dtype and the device of what they are given. Numbers travel as float16, those
    of float32 tensors as float32. No gradient passes. Precision and tiling are the service's own choice where nothing
    is said here. Raises LatentdError, here for a model that is not there or cannot be used.
    """

    config_name = "config.json"

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        precision: Precision | None = None,
        tiling: Tiling | None = None,
        deterministic: bool | None = None,
        timeout: float | None = None,
        client: Client | None = None,
    ) -> None:
        super().__init__()
        self._client = client or Client(url, api_key, timeout=timeout)
        if client is None:
            weakref.finalize(self, self._client.close)
        self._options: dict[str, Any] = {"precision": precision, "tiling": tiling, "deterministic": deterministic}
        row = self._client.model(model)
        # What `.to()`, `.dtype`, `.device` and the offloading of pipelines are about: there are no weights here.
        self.here = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        if row.statistics is not None:
            self.bn = _batch_norm(row)
        config = config_of(row)
        self.temperal_downsample = [False] * (len(config["block_out_channels"]) - 1)  # pipelines take its length
        self.register_to_config(url=url, model=row.name, **config)

    @apply_forward_hook  # type: ignore[untyped-decorator]  # offloads what ran before, if the pipeline offloads
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Any]:
        """Pictures (N, C, H, W) in [-1, 1] to `latent_dist`, or for a VAE without a variance to `latents` and `latent`.

        Pictures of one frame, (N, C, 1, H, W), to latents of one. Raises ValueError for more frames.
        """
        _one_frame(x)
        answer = self._client.encode(
            _array(x[:, :, 0] if x.ndim == 5 else x),
            model=self.config.model,
            latents="raw",
            posterior="moments",
            dtype=_travels(x),
            fit="error",
            **self._options,
        )
        _tell(answer)
        point = answer.posterior == "point"
        rows, columns = (side // self.config.spatial_compression_ratio for side in x.shape[-2:])
        channels = self.config.latent_channels * (1 if point else 2)
        found = _framed(_tensor(_shaped(answer, (len(x), channels, rows, columns)), x), x)
        if point:
            return PointOutput(latents=found) if return_dict else (found,)
        posterior = DiagonalGaussianDistribution(found)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Raw latents (N, C, h, w) to pictures (N, 3, H, W) in about [-1, 1]; `generator` stays as it is.

        Latents of one frame, (N, C, 1, h, w), to pictures of one; of a model with alpha with a fourth channel. Raises
        ValueError for more frames.
        """
        _one_frame(z)
        answer = self._client.decode(
            _array(z), model=self.config.model, convention="raw", dtype=_travels(z), **self._options
        )
        _tell(answer)
        rows, columns = (side * self.config.spatial_compression_ratio for side in z.shape[-2:])
        pictures = _shaped(answer, (len(z), rows, columns, self.config.out_channels))
        sample = _framed(_tensor(pictures.transpose(0, 3, 1, 2), z), z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """There and back."""
        found = self.encode(sample)
        if isinstance(found, PointOutput):
            return self.decode(found.latents, return_dict)
        z = found.latent_dist.sample(generator) if sample_posterior else found.latent_dist.mode()
        return self.decode(z, return_dict)

    def enable_tiling(self, *_: Any, **__: Any) -> None:
        """Nothing: the service decides, and its bands are exact."""

    disable_tiling = enable_slicing = disable_slicing = enable_tiling


def config_of(row: Model) -> dict[str, Any]:
    """What pipelines read of a VAE's configuration."""
    channels, factor = row.latent_channels, row.spatial_factor
    if row.error is not None or channels is None or factor is None:
        raise UnsupportedCheckpoint(f"{row.name} cannot be used: {row.error}")
    if row.family_source == "default":  # a wrong scaling factor makes pale or garish pictures
        log.warning("%s: nothing says of which family it is; the service takes it for %s", row.name, row.family)
    scale, shift = row.scaling_factor, row.shift_factor
    per_channel = isinstance(scale, list)
    config: dict[str, Any] = {
        "in_channels": row.pixel_channels or 3,
        "out_channels": row.pixel_channels or 3,
        "latent_channels": channels,
        "z_dim": channels,  # the same where pipelines of Wan and Qwen-Image look for it
        # Pipelines take 2 ** (len - 1) for the factor; the widths are the service's business.
        "block_out_channels": [0] * factor.bit_length(),
        "encoder_block_out_channels": [0] * factor.bit_length(),  # Sana's look here
        "spatial_compression_ratio": factor,  # HunyuanImage's
        "scale_factor_spatial": factor,  # Wan's, and for how many frames a position stands: of one it says nothing
        "scale_factor_temporal": 4,
        "scaling_factor": 1.0 if per_channel else scale,
        "shift_factor": 0.0 if per_channel else shift,
        "latents_mean": shift if per_channel else None,
        "latents_std": [1 / each for each in scale] if isinstance(scale, list) else None,
        "force_upcast": False,  # the service knows which weights overflow, and runs those in float32
    }
    if row.statistics is not None:
        config |= {"batch_norm_eps": row.statistics.eps, "patch_size": [row.statistics.patch] * 2}
    return config


def _batch_norm(row: Model) -> nn.BatchNorm2d:
    """The latents' statistics, which pipelines of FLUX.2 read off the module."""
    assert row.statistics is not None
    norm = nn.BatchNorm2d(len(row.statistics.mean), eps=row.statistics.eps, affine=False)
    norm.running_mean = torch.tensor(row.statistics.mean)
    norm.running_var = torch.tensor(row.statistics.variance)
    return norm.requires_grad_(False).eval()


def _one_frame(x: Tensor) -> None:
    if x.ndim == 5 and x.shape[2] != 1:
        raise ValueError(f"clips are not taken here: expected one frame, got {x.shape[2]} in {tuple(x.shape)}")


def _tell(answer: Encoded | Decoded) -> None:
    if answer.warning:
        log.warning("%s: %s", answer.model, answer.warning)


def _travels(x: Tensor) -> Literal["float16", "float32"]:
    return "float32" if x.dtype in (torch.float32, torch.float64) else "float16"


def _array(x: Tensor) -> Array:
    return np.asarray(x.detach().to("cpu", getattr(torch, _travels(x))))


def _shaped(answer: Encoded | Decoded, shape: tuple[int, ...]) -> Array:
    """The array of an answer. Raises UnexpectedAnswer for one of another shape."""
    if answer.array.shape != shape:
        raise UnexpectedAnswer(f"{answer.model}: expected an array of {shape}, got {answer.array.shape}")
    return answer.array


def _framed(tensor: Tensor, like: Tensor) -> Tensor:
    """(N, C, H, W) as (N, C, 1, H, W) where `like` has frames."""
    return tensor.unsqueeze(2) if like.ndim == 5 else tensor


def _tensor(array: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like)
