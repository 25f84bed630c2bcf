import pytest
import torch
from PIL import ImageFont

from benchmarks.seams import AMPLIFIED, FURTHER, amplified


@pytest.mark.parametrize("factor", [AMPLIFIED, FURTHER])
def test_the_font_has_every_character_of_a_label(factor):
    font = ImageFont.load_default(15)
    missing = bytes(font.getmask("\ue000"))
    _, label = amplified(torch.rand(1, 3, 8, 8), factor, "diffusers, 256 px tiles")
    assert f"{factor}x" in label
    assert all(bytes(font.getmask(char)) != missing for char in set(label) - {" "})
