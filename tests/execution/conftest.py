"""A program of five maps in a row."""

import pytest
from torch import nn

from app.execution.program import record


def conv(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


@pytest.fixture
def chain():
    """Input - a - b (reads norm of a) - c (reads norm of b) - output: every node a cut."""
    convs = [conv(4, 8), conv(8, 8), conv(8, 8), conv(8, 4)]
    norm = nn.GroupNorm(2, 8)

    def network(run, x):
        x = run.conv(x, convs[0])
        x = run.conv(x, convs[1], norm=norm)
        x = run.conv(x, convs[2], norm=norm)
        return run.conv(x, convs[3])

    return record(network, (1, 4, 64, 16))
