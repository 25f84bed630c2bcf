"""What every autoencoder is to the rest of the service: a configuration read off shapes, and a module of two halves."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import Field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from app.execution.primitive import Execution
from app.vae.posterior import Posterior

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""The shapes of a state dict, by key."""


class Config(Protocol):
    """A frozen dataclass: what the shapes of a checkpoint say. Networks of equal ones are equal."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def latent_channels(self) -> int:
        """Channels of a raw latent."""

    @property
    def spatial_factor(self) -> int:
        """Pixels per raw latent position along one side."""

    @property
    def pixel_channels(self) -> int:
        """3 of RGB, or 4 where straight alpha comes after them, on both sides."""

    @property
    def statistics_bytes(self) -> int:
        """Bytes of the latents' own statistics, which keep their types in every precision; 0 without any."""

    def __hash__(self) -> int:
        """Forecasts are kept by configuration."""


class Autoencoder(nn.Module, ABC):
    """Built from its own class of `Config`; the names of its attributes are the canonical keys of its weights."""

    config: Config
    bn: nn.BatchNorm2d | None  # the latents' statistics, where the weights bring some

    @abstractmethod
    def posterior(self, moments: Tensor) -> Posterior:
        """What `encode` gave, as a distribution over raw latents."""

    @abstractmethod
    def encode(self, run: Execution[Any], pixels: Any) -> Any:
        """Pixels (B, C, H, W) in the family's range -> what `posterior` takes, H / f by W / f; alpha as colours."""

    @abstractmethod
    def decode(self, run: Execution[Any], latents: Any) -> Any:
        """Raw latents (B, z, h, w) -> pixels (B, C, h * f, w * f), about the family's range."""
