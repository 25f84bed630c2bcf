"""A VAE of a latentd service with the methods and attributes that ComfyUI's nodes ask of a VAE."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from .convention import CONVENTIONS, RAW, cropped, from_service, picture_array, pictures_of, to_service
from .wire import LatentdError, Model, Server, model, models, send_array

REQUEST_PIXELS = 16 << 20  # of one request: 96 MiB of answer


class RemoteVAE:
    """Pictures (N, H, W, C) in [0, 1] and latents (N, C, h, w) as ComfyUI has them; the service does the work.

    Where ComfyUI's latents have frames these are (N, C, 1, h, w): N pictures, not a video of N frames.

    `check` is called while the service is waited for and raises when the user cancels; `place` brings a result to the
    device and the type that the next node expects. The tiled methods are the whole ones: the service uses bands of
    rows where its memory is short, and they give the same picture.
    """

    latent_dim = 2
    crop_input = True
    extra_1d_channel = None
    downscale_index_formula = None  # of video
    upscale_index_formula = None

    def __init__(
        self,
        server: Server,
        row: Model,
        check: Callable[[], None],
        place: Callable[[Tensor], Tensor],
    ) -> None:
        self.server, self.check, self.place = server, check, place
        self.convention = CONVENTIONS.get(row.family, RAW)
        self.query = {"model": row.name, "latents": self.convention.latents}
        self.latent_channels = row.latent_channels * self.convention.patch**2
        self.output_channels = row.pixel_channels
        self.downscale_ratio = self.upscale_ratio = row.spatial_factor * self.convention.patch

    def decode(self, samples_in: Tensor, vae_options: Mapping[str, object] | None = None) -> Tensor:
        """Pictures of latents; of latents with frames that are not a video's, the first."""
        if vae_options:
            raise LatentdError(f"a remote VAE has no options, not {', '.join(vae_options)}")
        if self.convention.frames and samples_in.ndim == 5 and samples_in.shape[2] != 1:
            raise LatentdError(f"video is not supported yet: these latents have {samples_in.shape[2]} frames")
        latents = samples_in[:, :, 0] if samples_in.ndim == 5 else samples_in
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise LatentdError(
                f"{self.query['model']!r} takes latents of {self.latent_channels} channels, "
                f"these are {tuple(samples_in.shape)}: they belong to another VAE"
            )
        rows, columns = (side * self.upscale_ratio for side in latents.shape[2:])
        array = to_service(latents, self.convention)
        return self.place(
            torch.cat(
                [
                    pictures_of(self._send("decode", part, "float16", (len(part), rows, columns, self.output_channels)))
                    for part in parts(array, rows * columns)
                ]
            )
        )

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Latents of pictures: the middle of the encoder's distribution, as ComfyUI takes it."""
        factor = self.downscale_ratio
        pixels = cropped(pixel_samples, factor, self.output_channels)
        rows, columns = pixels.shape[1:3]
        array = picture_array(pixels)
        latent = (self.latent_channels, rows // factor, columns // factor)
        latents = torch.cat(
            [
                from_service(self._send("encode", part, "float32", (len(part), *latent)), self.convention)
                for part in parts(array, rows * columns)
            ]
        )
        return self.place(latents.unsqueeze(2) if self.convention.frames else latents)

    def decode_tiled(self, samples: Tensor, *tiles: int | None, **more: int | None) -> Tensor:
        return self.decode(samples)

    def encode_tiled(self, pixel_samples: Tensor, *tiles: int | None, **more: int | None) -> Tensor:
        return self.encode(pixel_samples)

    def spacial_compression_decode(self) -> int:
        return self.upscale_ratio

    def spacial_compression_encode(self) -> int:
        return self.downscale_ratio

    def temporal_compression_decode(self) -> int | None:
        return None

    def is_dynamic(self) -> bool:
        return False

    def model_size(self) -> int:
        return 0  # nothing of it is here

    def throw_exception_if_invalid(self) -> None:
        """The service has answered for it."""

    def get_sd(self) -> dict[str, Tensor]:
        raise LatentdError(f"the weights of {self.query['model']!r} are at {self.server.url}: they are not saved here")

    def _send(self, path: str, part: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        return send_array(self.server, f"/{path}", {**self.query, "dtype": dtype}, part, dtype, shape, self.check)


def parts(array: np.ndarray, pixels: int) -> Iterator[np.ndarray]:
    """The pictures or latents in lots of REQUEST_PIXELS, one at least, of `pixels` each."""
    lot = max(1, REQUEST_PIXELS // pixels)
    for start in range(0, len(array), lot):
        yield array[start : start + lot]


def remote_vae(server: Server, name: str, check: Callable[[], None], place: Callable[[Tensor], Tensor]) -> RemoteVAE:
    """The VAE of this name; without one, the VAE that the service means then."""
    if not name:
        names, default = models(server, check)
        if default is None:
            raise LatentdError(f"latentd at {server.url} has no default model, choose one of: {', '.join(names)}")
        name = default
    return RemoteVAE(server, model(server, name, check), check, place)
