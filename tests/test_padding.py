"""Which padding a training step leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.padding import TextLengths
from vlm.schema import TrainConfig


def _batch(counts, length=20):
    mask = np.arange(length) < np.array(counts)[:, None]
    return {"tokens": np.arange(mask.size).reshape(mask.shape), "mask": mask}


def test_one_host_cuts_its_own_batches():
    batch = _batch([3, 5, 0]) | {"labels": np.zeros(3), "teacher_tokens": np.ones((3, 20))}
    texts = TextLengths((6, 4, 30))
    for longest, size in ((5, 6), (6, 6), (7, 20), (20, 20)):
        batch["mask"][0] = np.arange(20) < longest
        cut = texts.fit(batch)
        assert cut["tokens"].shape == cut["mask"].shape == (3, size) and cut["teacher_tokens"].shape == (3, 20)
        assert cut["labels"].shape == (3,)
    assert TextLengths().fit(batch) is batch and texts.fit({"image": batch["mask"]}).keys() == {"image"}
    batch["mask"][:] = False
    assert texts.fit(batch)["mask"].shape == (3, 4)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_packed_rows_keep_every_real_token_once(micro_batches):
    """The two rows of a group are neighbours in their micro-batch of rows i, i + A, i + 2A, …"""
    batch = _batch([3, 12, 4, 1, 20, 2, 1, 5]) | {"labels": np.zeros(8)}
    texts = TextLengths((4, 8, 12), rows=2, micro_batches=micro_batches)
    packed = texts.fit(batch)
    assert packed["tokens"] is batch["tokens"] and packed["labels"] is batch["labels"]
    assert packed["packing"].shape == (4, 2 * 12) and packed["packing"].dtype == np.int32
    for micro in range(micro_batches):
        rows, groups = batch["tokens"][micro::micro_batches], packed["packing"][micro::micro_batches]
        real = batch["mask"][micro::micro_batches].reshape(len(groups), -1)
        for tokens, kept, places in zip(rows.reshape(len(groups), -1), real, groups, strict=True):
            assert len(set(places)) == len(places)
            found = tokens[places][: kept.sum()]
            np.testing.assert_array_equal(found, tokens[kept])


def test_the_length_is_that_of_the_fullest_group():
    texts = TextLengths((4, 8, 12), rows=2)
    for counts, size in (([4, 4, 1, 1], 4), ([4, 5, 1, 1], 8), ([1, 1, 15, 0], 8), ([0, 0, 12, 13], 20), ([0] * 4, 4)):
        batch = _batch(counts)
        for mask in (batch["mask"], jnp.asarray(batch["mask"])):
            sizes = texts.sizes(batch)
            assert sizes[np.searchsorted(sizes, int(texts.needed(mask)))] == size, counts
        packed = texts.fit(batch)
        assert packed["packing"].shape == (2, 2 * size) if size < 20 else "packing" not in packed
    device = jax.tree.map(jnp.asarray, batch)
    np.testing.assert_array_equal(texts.shorten(device, 4)["packing"], texts.shorten(batch, 4)["packing"])


def test_packing_needs_lengths():
    with pytest.raises(ValueError, match=r"pack_texts: expected 1, or lengths in text_lengths, found 8"):
        TrainConfig(pack_texts=8)
