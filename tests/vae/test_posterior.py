"""mode() and sample() against diffusers' distribution, and seeds that repeat."""

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from app.vae.posterior import DiagonalGaussian, Dirac


def moments() -> torch.Tensor:
    return torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(1)) * 2


def test_mode_is_the_mean():
    assert torch.equal(DiagonalGaussian(moments()).mode(), DiagonalGaussianDistribution(moments()).mode())


def test_sample_is_diffusers_draw():
    ours = DiagonalGaussian(moments()).sample(torch.Generator().manual_seed(7))
    theirs = DiagonalGaussianDistribution(moments()).sample(torch.Generator().manual_seed(7))
    torch.testing.assert_close(ours, theirs)


def test_a_seed_repeats_and_another_differs():
    posterior = DiagonalGaussian(moments())
    first, again, other = (posterior.sample(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_seed_s_noise_is_the_same_in_half_precision():
    full = DiagonalGaussian(moments()).sample(torch.Generator().manual_seed(3))
    half = DiagonalGaussian(moments().bfloat16()).sample(torch.Generator().manual_seed(3))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.3, rtol=0.05)


def test_a_log_variance_out_of_range_stays_finite():
    wild = torch.cat([torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), 1e4)], dim=1)
    assert DiagonalGaussian(wild).sample(torch.Generator().manual_seed(0)).isfinite().all()


def test_dirac_is_a_point():
    latents = torch.randn(1, 4, 2, 2)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(Dirac(latents).mode(), latents)
    assert torch.equal(Dirac(latents).sample(generator), latents)
    assert torch.equal(generator.get_state(), before)
