import pytest
import torch

from app.settings import Settings
from app.tools.errand import Errand, pixels_at_once


@pytest.mark.parametrize(
    ("url", "device", "most"), [(None, "cpu", 1 << 19), (None, "auto", 1 << 19), ("http://x", "cpu", 8 << 20)]
)
def test_a_cpu_of_our_own_is_not_given_large_batches(url, device, most):
    if device == "auto" and torch.cuda.is_available():
        pytest.skip("auto is a GPU here")
    asked = Errand("encode", {}, "refuse", url, None, Settings(device=device))
    assert pixels_at_once(asked) == most
