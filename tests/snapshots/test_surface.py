import pytest

from tests.snapshots.surface import NAMES, current, read


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_what_callers_hold_on_to_is_a_decision(name):
    """If it is one: python -m tests.snapshots, a line in CHANGELOG.md, and what it breaks for whom."""
    assert current(name) == read(name)
