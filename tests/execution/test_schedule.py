"""The frontier of memory and work, on programs small enough to try every way."""

from itertools import combinations

from torch import nn
from torch.nn import functional as F

from app.execution.footprint import peak_elements, working_set
from app.execution.passes import passes_between
from app.execution.program import record
from app.execution.schedule import plans


def test_frontier_is_the_best_of_all_subsets(chain):
    """The dynamic programme against every way to choose what is kept."""
    start, *inner, end = chain.nodes
    every = []
    for size in range(len(inner) + 1):
        for kept in combinations(inner, size):
            passes = passes_between(chain, start, kept, end, 64)
            every.append((peak_elements(chain, start, passes, 64, working_set), sum(each.flops for each in passes)))
    found = [(plan.peak_elements, plan.flops) for plan in plans(chain, 64)]
    assert found == sorted(found)
    for peak, flops in every:
        assert any(p <= peak and f <= flops for p, f in found)
    assert min(flops for _, flops in found) == chain.flops


def test_without_norms_nothing_is_kept_or_done_twice():
    convs = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(6)]

    def network(run, x):
        for i in range(0, 6, 2):
            x = run.conv(run.conv(x, convs[i], then=F.relu), convs[i + 1], add=x)
        return x

    program = record(network, (1, 4, 512, 16))
    leanest = plans(program, 64)[0]
    assert leanest.flops == program.flops
    assert len(leanest.passes) == 1
    assert leanest.peak_elements < program.input.elements / 2
