"""Block masks: the published statistics, Hugging Face's generator driven by the same numbers, odd settings."""

import random

import numpy as np
import pytest

from vlm.data.block_masking import BlockSettings, block_mask
from vlm.errors import UserError

DRAWS = 5_000


def test_published_statistics():
    rng, grid = np.random.default_rng(0), (14, 14)
    masks = np.stack([block_mask(grid, 75, rng) for _ in range(DRAWS)])
    counts = masks.sum(axis=(1, 2))
    error = counts.std() / DRAWS**0.5
    assert abs(counts.mean() - 74.47) < 4 * error + 0.005  # known to two digits
    assert counts.max() == 75 and 60 <= counts.min() <= 67
    known = {0.666: counts == 75, 0.72: masks[:, 6:8, 6:8].mean(axis=(1, 2)), 0.04: masks[:, 0, 0]}
    for value, found in known.items():
        assert abs(found.mean() - value) < 4 * (value * (1 - value) / DRAWS) ** 0.5 + 0.005


@pytest.mark.parametrize("options", [{}, {"min_patches": 4, "max_patches": 20, "min_aspect": 0.5, "max_aspect": 1.5}])
def test_equals_hugging_face_driven_by_the_same_numbers(options, monkeypatch):
    pytest.importorskip("transformers")
    from transformers.models.flava.image_processing_pil_flava import FlavaMaskingGenerator

    names = {"min_patches": "group_min_patches", "max_patches": "group_max_patches"}
    names |= {"min_aspect": "group_min_aspect_ratio", "max_aspect": "group_max_aspect_ratio"}
    theirs = FlavaMaskingGenerator((9, 11), 40, **{f"mask_{names[name]}": value for name, value in options.items()})
    rng = np.random.default_rng(3)
    monkeypatch.setattr(random, "uniform", lambda low, high: low + (high - low) * rng.random())
    monkeypatch.setattr(random, "randint", lambda low, high: int(rng.integers(low, high + 1)))
    expected = [theirs().numpy().astype(bool) for _ in range(200)]
    rng, settings = np.random.default_rng(3), BlockSettings(**options)
    found = [block_mask((9, 11), 40, rng, settings) for _ in range(200)]
    np.testing.assert_array_equal(found, expected)
    assert len({mask.sum() for mask in found}) > 1 and max(mask.sum() for mask in found) == 40


def test_small_grids_and_nothing_to_hide():
    rng = np.random.default_rng(0)
    assert not block_mask((14, 14), 0, rng).any()
    assert not block_mask((1, 1), 1, rng).any()  # no block is smaller
    assert block_mask((4, 4), 6, rng, BlockSettings(min_patches=1)).sum() <= 6


@pytest.mark.parametrize("options", [{"min_patches": 0}, {"max_patches": 0}, {"min_aspect": 0.0}, {"max_aspect": 0.2}])
def test_impossible_blocks_are_refused(options):
    with pytest.raises(UserError, match="^blocks: expected"):
        BlockSettings(**options)
