"""A clip in slices is the clip as a whole, whatever the slices; and so is diffusers' of Wan, in tests/vae."""

from collections import deque

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.execution.norms import RMSNorm
from app.execution.primitive import Whole
from app.execution.slices import Carry, Sliced, carried_bytes


class Causal(nn.Module):
    """One layer of each kind, (T, 4, h, w) -> (T', 4, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(4)
        self.conv = nn.Conv3d(4, 4, kernel_size=3, padding=(0, 1, 1))
        self.flat = nn.Conv2d(4, 4, kernel_size=1)
        self.more = nn.Conv3d(4, 8, kernel_size=(3, 1, 1))
        self.fewer = nn.Conv3d(4, 4, kernel_size=(3, 1, 1), stride=(2, 1, 1))

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
def test_what_is_carried_does_not_grow_or_hold_the_maps():
    net, x = Causal(), torch.randn(9, 4, 5, 7)
    sizes = []
    for n in (1, 2, 5, 9):
        _, carry = in_slices(net, x[:n], [1] * n)
        assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in carry)
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
