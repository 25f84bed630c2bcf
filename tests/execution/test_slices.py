"""A clip in slices is the clip as a whole, whatever the slices; and so is diffusers' of Wan, in tests/vae."""

from collections import deque

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.engine.forecast import CountingMode
from app.execution import slices
from app.execution.banded import Banded, execute, forecast_bytes, gather
from app.execution.causal import Carry, Slice, carried_bytes
from app.execution.causal_winograd import convolve
from app.execution.norms import RMSNorm
from app.execution.primitive import Whole
from app.execution.slices import Sliced


class Causal(nn.Module):
    """One layer of each kind, (T, c, h, w) -> (T', c, h, w)."""

    def __init__(self, c: int = 4) -> None:
        super().__init__()
        self.norm = RMSNorm(c)
        self.conv = nn.Conv3d(c, c, kernel_size=3, padding=(0, 1, 1))
        self.flat = nn.Conv2d(c, c, kernel_size=1)
        self.more = nn.Conv3d(c, 2 * c, kernel_size=(3, 1, 1))
        self.fewer = nn.Conv3d(c, c, kernel_size=(3, 1, 1), stride=(2, 1, 1))

    def forward(self, run, x):
        x = run.conv(x, self.conv, norm=self.norm, act=F.silu, add=run.conv(x, self.flat))
        return run.between(run.between(x, self.more), self.fewer)


def plain(net: Causal, x: Tensor) -> Tensor:
    """The same as it is defined, over the whole clip at once, in torch's own layers: (T, C, h, w)."""

    def over(conv: nn.Conv3d, frames: Tensor) -> Tensor:
        return conv(frames.transpose(0, 1)[None])[0].transpose(0, 1)

    zeros = torch.zeros(2, *x.shape[1:])
    x = over(net.conv, torch.cat((zeros, F.silu(net.norm(x))))) + net.flat(x)
    if len(x) > 1:
        doubled = over(net.more, torch.cat((zeros, x[1:])))
        pairs = [half for frame in doubled for half in frame.chunk(2)]
        x = torch.cat((x[:1], torch.stack(pairs)))
        x = torch.cat((x[:1], over(net.fewer, x)))
    return x


def in_slices(net: nn.Module, x: Tensor, sizes: list[int]) -> tuple[Tensor, Carry]:
    carry: Carry = deque()
    return torch.cat([net(Sliced(carry), part) for part in x.split(sizes)]), carry


@pytest.mark.parametrize("sizes", [[1], [5], [1, 1, 1, 1, 1], [1, 4], [2, 2, 1], [3, 1, 3]], ids=str)
@torch.inference_mode()
def test_slices_are_the_clip(sizes):
    torch.manual_seed(0)
    net = Causal()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(sum(sizes), 4, 5, 7).contiguous(memory_format=memory_format)
        before = x.clone()
        found, _ = in_slices(net, x, sizes)
        torch.testing.assert_close(found, plain(net, x), atol=2e-6, rtol=1e-5)
        assert torch.equal(x, before), "a slice is the caller's"


@torch.inference_mode()
def test_slices_of_a_wide_network_are_the_clip(monkeypatch):
    """Whose convolutions are products, but for the first frame's: that is too small."""
    used = []

    def noted(*how):
        used.append(how)
        return convolve(*how)

    monkeypatch.setattr(slices, "convolve", noted)
    torch.manual_seed(0)
    net, x = Causal(64), torch.randn(6, 64, 27, 30)
    for sizes in ([1, 2, 3], [6], [1, 4, 1]):
        used.clear()
        found, _ = in_slices(net, x, sizes)
        torch.testing.assert_close(found, plain(net, x), atol=5e-6, rtol=1e-5)
        assert len(used) == sum(size > 1 for size in sizes)


@torch.inference_mode()
def test_what_is_carried_does_not_grow_or_hold_the_maps():
    net, x = Causal(), torch.randn(9, 4, 5, 7)
    sizes = []
    for n in (1, 2, 5, 9):
        _, carry = in_slices(net, x[:n], [1] * n)
        kept = [rows.joined(0, rows.stop) for rows in carry]
        assert all(frames.untyped_storage().nbytes() == frames.nbytes for frames in kept)
        sizes.append(carried_bytes(carry))
    assert set(sizes) == {(2 + 2 + 1) * 4 * 5 * 7 * 4}
    _, carry = in_slices(net, x, [9])
    assert carried_bytes(carry) == sizes[0]


@torch.inference_mode()
def test_a_run_is_cancelled_between_layers():
    checks: list[None] = []

    def check() -> None:
        checks.append(None)
        if len(checks) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        Causal()(Sliced(deque(), check), torch.randn(1, 4, 5, 7))


@torch.inference_mode()
def test_pictures_have_no_taps_in_time():
    net = Causal()
    with pytest.raises(ValueError, match="two dimensions"):
        net(Whole(), torch.randn(1, 4, 5, 7))
    x = torch.randn(1, 4, 5, 7)
    assert Whole().between(x, net.more) is x


def in_bands(net: nn.Module, x: Tensor, sizes: list[int], band_elements: int = 1) -> tuple[Tensor, Carry]:
    carry: Carry = deque()
    execution = Banded("strips", band_elements)
    return torch.cat([gather(execution, net, part, carry=carry) for part in x.split(sizes)]), carry


@pytest.mark.parametrize("sizes", [[1], [5], [1, 4], [2, 2, 1], [3, 1, 3]], ids=str)
def test_bands_of_slices_are_the_clip(sizes):
    torch.manual_seed(0)
    net, x = Causal(), torch.randn(sum(sizes), 4, 5, 7)
    with torch.inference_mode():
        expected = plain(net, x)
        for band_elements in (1, 200, 1000):
            found, carry = in_bands(net, x, sizes, band_elements)
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
            assert carried_bytes(carry) == (2 + 2 + 1) * 4 * 5 * 7 * 4
        torch.testing.assert_close(gather(Banded("strips", 1), net, x), expected, atol=2e-6, rtol=1e-5)


@torch.inference_mode()
def test_a_clip_may_go_on_in_bands_and_back():
    torch.manual_seed(0)
    net, x = Causal(), torch.randn(4, 4, 5, 7)
    carry: Carry = deque()
    found = [
        net(Sliced(carry), x[:1]),
        gather(Banded("strips", 100), net, x[1:3], carry=carry),
        net(Sliced(carry), x[3:]),
    ]
    torch.testing.assert_close(torch.cat(found), plain(net, x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("place", [Slice(True, True), Slice(True, False), Slice(False, False)], ids=str)
@torch.inference_mode()
def test_the_forecast_of_bands_holds(place):
    net = Causal()
    execution = Banded("strips", 32000)
    frames = 9 if place.last else 4
    x = torch.randn(frames, 4, 128, 128)
    carry: Carry | None = None if place.last else deque()
    with CountingMode([x, *net.parameters()]) as live:
        if not place.first:
            for part in (x[:1], x):
                gather(execution, net, part, carry=carry)
            live.peak = live.alive
        for _, band in execute(execution, net, x, carry=carry):
            del band
    forecast = forecast_bytes(execution, net, tuple(x.shape), x.dtype, x.device, place)
    assert live.peak <= forecast <= 1.25 * live.peak
