"""What is recorded of a network, against what the network does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from app.execution.norms import RMSNorm
from app.execution.primitive import Whole
from app.execution.program import inside, record
from app.vae.autoencoder_kl import AutoencoderKL, KLConfig


@pytest.fixture
def vae():
    return AutoencoderKL(KLConfig((32, 64), (32, 64), 1, 2, 4, norm_groups=8)).requires_grad_(False)


@pytest.mark.parametrize("size", [(16, 16), (7, 10), (6, 5)])
def test_shapes_and_work_are_the_networks(vae, size):
    for network, x in ((vae.encode, torch.randn(2, 3, *size)), (vae.decode, torch.randn(2, 4, *size))):
        program = record(network, tuple(x.shape))
        counter = FlopCounterMode(display=False)
        with counter:
            out = network(Whole(), x)
        assert program.output.shape == tuple(out.shape)
        assert program.flops == counter.get_total_flops()


def test_nodes_stand_after_their_sources(vae):
    program = record(vae.decode, (1, 4, 8, 8))
    place = {node: i for i, node in enumerate(program.nodes)}
    assert all(place[source] < place[node] for node in program.nodes for source in node.sources)
    assert program.nodes[0] is program.input
    assert program.nodes[-1] is program.output


def test_cuts_are_where_one_map_is_live(vae):
    program = record(vae.decode, (1, 4, 8, 8))
    for cut in program.cuts():
        before = program.nodes[: program.nodes.index(cut)]
        after = program.nodes[program.nodes.index(cut) + 1 :]
        assert not any(source in before for node in after for source in node.sources)
    # post_quant_conv, conv_in, three in the middle, two blocks a level, one enlargement, output, and the input
    assert len(program.cuts()) == 1 + 2 + 3 + 2 * 2 + 1 + 1


def test_what_the_output_does_not_need_is_left_out():
    conv = nn.Conv2d(3, 3, 3, padding=1)

    def network(run, x):
        run.conv(x, conv)
        return run.conv(x, conv, act=F.silu)

    program = record(network, (1, 3, 4, 4))
    assert len(program.nodes) == 2
    assert inside((program.output,), (program.input,)) == (program.output,)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 3, 3, dilation=2),
        nn.Conv2d(3, 3, 3, padding="same"),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 3, 3, padding=3, padding_mode="replicate"),
        nn.Conv2d(3, 3, 1, stride=2),
        nn.Conv2d(3, 3, 5),
    ],
    ids=str,
)
def test_what_bands_cannot_do_is_refused(conv):
    with pytest.raises(ValueError, match=r"bands need|too small|is padded by numbers"):
        record(lambda run, x: run.conv(x, conv), (1, 3, 4, 4))


def test_pointwise_norms_need_no_statistics():
    conv, norms = nn.Conv2d(4, 4, 3, padding=1), (nn.GroupNorm(2, 4), RMSNorm(4))

    def network(run, x):
        x = run.conv(x, conv)
        for norm in norms:
            x = run.conv(x, conv, norm=norm, act=F.silu)
        return x

    normed = [node.normed for node in record(network, (1, 4, 8, 8)).nodes]
    assert [node is not None for node in normed] == [False, False, True, False]
