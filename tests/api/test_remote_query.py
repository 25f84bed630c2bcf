import numpy as np
import pytest
from pydantic import ValidationError

from app.api.remote_query import RemoteDecodeQuery, RemoteEncodeQuery
from app.errors import InvalidLatent, InvalidParameter, NonFiniteOutput

Z = np.array([[1.0, -2.0]], np.float32)


def query(**given: object) -> RemoteDecodeQuery:
    return RemoteDecodeQuery.model_validate(given)


@pytest.mark.parametrize(
    ("given", "convention", "expected"),
    [
        ({}, "raw", Z),
        ({"do_scaling": "False"}, "raw", Z),
        ({"do_scaling": "True"}, "scaled", Z),
        ({"do_scaling": "True", "shift_factor": "3"}, "scaled", Z),  # the model's own constants, and nothing else
        ({"scaling_factor": "0.5"}, "raw", Z / 0.5),
        ({"scaling_factor": "0.5", "shift_factor": "3"}, "raw", Z / 0.5 + 3),
        ({"scaling_factor": "0.5", "do_scaling": "True"}, "raw", Z / 0.5),
        ({"scaling_factor": "0.5", "do_scaling": "False"}, "raw", Z),
        ({"shift_factor": "3"}, "raw", Z + 3),
    ],
)
def test_the_rules_of_scaling(given, convention, expected):
    asked = query(**given)
    assert asked.convention == convention
    np.testing.assert_array_equal(asked.unscaled(Z), expected)


def test_half_precision_is_unscaled_in_float32():
    found = query(scaling_factor=0.1).unscaled(np.array([30_000], np.float16))
    np.testing.assert_allclose(found, 300_000)


@pytest.mark.parametrize("given", [{"scaling_factor": 1e-300}, {"scaling_factor": 1e-38}, {"shift_factor": 1e300}])
def test_factors_that_make_latents_infinite_are_refused(given):
    with pytest.raises(InvalidLatent, match="infinite"):
        query(**given).unscaled(np.array([1e4], np.float32))


def test_encode_scales_the_other_way_round_and_rounds_once():
    asked = RemoteEncodeQuery.model_validate({"scaling_factor": "0.5", "shift_factor": "0.25"})
    found = asked.scaled(np.array([1, 1e5], np.float32))
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, np.array([0.375, 5e4], np.float16))
    with pytest.raises(NonFiniteOutput, match="float16"):
        RemoteEncodeQuery().scaled(np.array([1e5], np.float32))


@pytest.mark.parametrize(
    ("given", "sides"),
    [
        (["1", "4", "64", "64"], [1, 4, 64, 64]),
        (["64"], [64]),
        (["1,4,64,64"], [1, 4, 64, 64]),
        (["[1, 4, 64, 64]"], [1, 4, 64, 64]),
        (["(1, 4, 64, 64,)"], [1, 4, 64, 64]),
        ([1, 4, 64, 64], [1, 4, 64, 64]),
    ],
)
def test_a_shape_comes_in_many_forms(given, sides):
    assert query(shape=given, dtype="float16").tensor == (sides, "float16")


@pytest.mark.parametrize("given", [["a"], ["1.5"], ["1"] * 9, "5", {"a": 1}, [None], [[1]], ["-" * 5000]])
def test_what_is_no_shape_is_refused(given):
    with pytest.raises((ValidationError, InvalidParameter)):
        _ = query(shape=given).tensor


def test_both_sides_make_a_size():
    assert query(height="32", width="48").size == (32, 48)
    assert query(height="32").size is None
