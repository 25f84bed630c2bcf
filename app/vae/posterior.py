"""What an encoder's output says about the latent: a distribution with `mode()` and `sample()`."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)  # CompVis latent-diffusion, ldm/modules/distributions/distributions.py


class Posterior(Protocol):
    """A distribution over raw latents (B, z, h, w)."""

    def mode(self) -> Tensor:
        """The most likely latent."""

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw with the generator's own randomness, so that a seed repeats it on any device."""


@dataclass(frozen=True)
class DiagonalGaussian:
    """A normal distribution from moments (B, 2z, h, w): mean and log-variance, half the channels each."""

    moments: Tensor

    def mode(self) -> Tensor:
        """The mean."""
        return self.moments.chunk(2, dim=1)[0]

    def sample(self, generator: torch.Generator) -> Tensor:
        """mean + exp(logvar / 2) * normal noise, drawn on the generator's device in float32."""
        mean, logvar = self.moments.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        return mean + (0.5 * logvar.clamp(*LOGVAR_RANGE)).exp() * noise.to(mean)


@dataclass(frozen=True)
class Dirac:
    """A point: what an autoencoder without a variance knows."""

    latents: Tensor

    def mode(self) -> Tensor:
        """The point."""
        return self.latents

    def sample(self, generator: torch.Generator) -> Tensor:
        """The point; `generator` is left as it is."""
        return self.latents
