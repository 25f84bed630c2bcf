import time
from random import Random

import pytest

from tests.fuzz.mutation import form_of, mutated
from tests.fuzz.seeds import kept
from tests.fuzz.targets import TARGETS

WRONG = 200
"""Files made of each target's; guided runs, `make fuzz`, try millions."""
SECONDS = 2.0
"""Of the processor, for one file."""


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_sound_is_taken_and_what_is_wrong_is_refused(name):
    target, random = TARGETS[name], Random(name)
    bodies = [*target.seeds(), *kept(name)]
    assert any(target.try_on(body) for body in bodies)
    wrong = [mutated(random, random.choice(bodies)) for _ in range(WRONG)]
    refused = 0
    for body in wrong:
        before = time.thread_time()
        refused += not target.try_on(body)
        assert time.thread_time() - before < SECONDS
    assert refused


@pytest.mark.parametrize("name", ["npy", "npz", "safetensors", "png", "jpeg", "webp", "avif"])
def test_files_are_taken_apart_and_put_together_without_loss(name):
    found = form_of(next(TARGETS[name].seeds()))
    assert found is not None
    split, join = found
    for body in TARGETS[name].seeds():
        assert split(join(split(body))) == split(body) != []
