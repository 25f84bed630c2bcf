"""The walks that a choice of kept maps makes necessary."""

from app.execution.passes import MAX_BANDS, band_rows, passes_between
from app.execution.program import record
from app.vae.autoencoder_kl import AutoencoderKL, KLConfig


def test_statistics_come_before_the_walk_that_needs_them(chain):
    start, a, b, c, end = chain.nodes
    passes = passes_between(chain, start, (), end, 1)
    assert [(each.targets, each.nodes, each.keep) for each in passes] == [
        ((a,), (a,), False),
        ((b,), (a, b), False),
        ((end,), (a, b, c, end), True),
    ]


def test_a_kept_map_is_measured_while_it_is_written_and_freed_when_read(chain):
    start, a, b, c, end = chain.nodes
    passes = passes_between(chain, start, (b,), end, 1)
    assert [(each.targets, each.keep, each.frees) for each in passes] == [
        ((a,), False, ()),
        ((b,), True, ()),
        ((end,), True, (b,)),
    ]
    assert passes[-1].nodes == (c, end)


def test_a_block_reads_its_input_once():
    """The shortcut and the first convolution are written in one walk, so the input is freed as they grow."""
    vae = AutoencoderKL(KLConfig((32, 64), (32, 64), 1, 1, 4, norm_groups=8))
    program = record(vae.decode, (1, 4, 8, 8))
    wide = next(node for node in program.nodes if node.shape[1:] == (64, 16, 16))
    first, shortcut = program.readers[wide]
    out = program.readers[first][0]
    passes = passes_between(program, wide, (first, shortcut), out, 1 << 20)
    assert [each.targets for each in passes] == [(first, shortcut), (out,)]
    assert passes[0].frees == (wide,)
    assert set(passes[1].frees) == {first, shortcut}


def test_bands_are_powers_of_two_and_bounded_in_number(chain):
    a = chain.nodes[1]
    assert band_rows((a,), 64, 8 * 16 * 5) == 4
    assert band_rows((a,), 64, 1 << 40) == 64
    assert band_rows((a,), 64, 1) == 64 // MAX_BANDS
