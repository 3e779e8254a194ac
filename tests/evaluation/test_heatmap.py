"""Maps on images: warm where the map is high, the image elsewhere."""

import numpy as np
from PIL import Image

from vlm.evaluation.heatmap import GAP, LABEL, PANEL, overlay, sheet


def test_the_highest_place_is_the_warmest():
    values = np.zeros((4, 4), np.float32)
    values[1, 3] = 0.2
    drawn = np.asarray(overlay(Image.new("RGB", (64, 64), (0, 0, 200)), values), int)
    row, column = np.unravel_index(drawn[..., 0].argmax(), (64, 64))
    assert 16 <= row < 32 and column >= 48 and drawn[row, column, 0] > 120 and drawn[row, column, 2] < 120
    np.testing.assert_array_equal(drawn[60, 5], (0, 0, 200))
    flat = overlay(Image.new("RGB", (8, 8), (9, 8, 7)), -np.ones((2, 2), np.float32))
    assert (np.asarray(flat) == (9, 8, 7)).all()


def test_the_sheet_shows_the_image_and_every_map():
    panels = [(name, np.eye(3, dtype=np.float32)) for name in ("[ENC]", "a text 狗", "a", "dog")]
    page = sheet(Image.new("RGB", (24, 12), (10, 200, 10)), panels)
    assert page.size == (4 * (PANEL + GAP) + GAP, 2 * (PANEL // 2 + LABEL + GAP) + GAP)
    assert page.getpixel((GAP + 4, GAP + LABEL + 4)) == (10, 200, 10)
