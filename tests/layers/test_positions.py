"""Position tables against PyTorch's bicubic resize; RoBERTa and rotary positions against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlm.layers import positions


@pytest.mark.parametrize("grid", [(14, 24), (24, 14), (30, 7), (12, 12), (33, 33), (1, 1)])
def test_resize_equals_pytorch_bicubic(grid):
    side = 14
    table = np.random.default_rng(0).normal(size=(1 + side * side, 6)).astype(np.float32)
    found = positions.resize_positions(table, grid)
    square = torch.tensor(table[1:]).reshape(1, side, side, 6).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    expected = resized.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    np.testing.assert_array_equal(found[0], table[0])
    np.testing.assert_allclose(found[1:], expected, atol=1e-5)


def test_resize_keeps_an_equal_grid_and_refuses_a_ragged_table():
    table = jnp.arange(10.0).reshape(10, 1)
    assert positions.resize_positions(table, (3, 3)) is table
    with pytest.raises(ValueError, match="square grid of patches, found 7 rows"):
        positions.resize_positions(table[:8], (3, 3))


def test_roberta_positions_count_real_tokens_only():
    tokens = jnp.array([[0, 11, 2, 1, 1], [1, 1, 0, 11, 2]])
    np.testing.assert_array_equal(positions.roberta_positions(tokens, 1), [[2, 3, 4, 1, 1], [1, 1, 2, 3, 4]])


def test_padded_positions_make_left_padding_invisible():
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    np.testing.assert_array_equal(positions.padded_positions(mask), [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])


def test_rotary_rotates_pairs_and_scores_depend_on_distance_only():
    x = np.random.default_rng(0).normal(size=(1, 2, 1, 8)).astype(np.float32)

    def rotated(first, second):
        tables = positions.rotary_tables(jnp.array([[first, second]]), 8)
        return np.asarray(positions.apply_rotary(jnp.asarray(x), tables))[0, :, 0]

    a, b = rotated(3, 7), rotated(10, 14)
    np.testing.assert_allclose(a[0] @ a[1], b[0] @ b[1], rtol=1e-4)
    assert abs(a[0] @ a[1] - rotated(3, 8)[0] @ rotated(3, 8)[1]) > 1e-3
    angle = 3 * 10_000.0 ** (-2 / 8)
    expected = x[0, 0, 0, 1] * np.cos(angle) - x[0, 0, 0, 5] * np.sin(angle)
    np.testing.assert_allclose(a[0, 1], expected, rtol=1e-5)
