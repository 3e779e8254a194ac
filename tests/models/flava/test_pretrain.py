"""Batches of evaluation, whose invalid rows count nowhere, and means over groups that devices share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm import sharding
from vlm.models.flava.loss import LossConfig, loss
from vlm.schema import MeshConfig, ShardingConfig

ROWS, LENGTH, PATCHES = 8, 7, 9
TEXTS = ("tokens", "mask", "masked_tokens", "token_labels")


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(5)
    mask = np.arange(LENGTH)[None] < rng.integers(3, LENGTH + 1, ROWS)[:, None]
    tokens = np.where(mask, rng.integers(5, 20, (ROWS, LENGTH)), 0).astype(np.int32)
    chosen = mask & (rng.random(mask.shape) < 0.4)
    return {
        "image": rng.normal(size=(ROWS, 24, 24, 3)).astype(np.float32),
        "tokens": tokens,
        "mask": mask,
        "masked_tokens": np.where(chosen, 4, tokens).astype(np.int32),
        "token_labels": np.where(chosen, tokens, -100).astype(np.int32),
        "patch_mask": rng.random((ROWS, PATCHES)) < 0.4,
        "patch_labels": rng.integers(0, 8192, (ROWS, PATCHES)).astype(np.int32),
        "itm_labels": np.array([1, 0, 1, 1, 0, 1, 0, 1], np.int32),
    }


@functools.cache
def compiled(model, config):
    return jax.jit(lambda params, batch: loss(model, params, {}, batch, jax.random.key(0), config)[1][0])


def measured(tiny_flava, batch, **settings):
    model, params, _ = tiny_flava(task="pretrain")
    found = compiled(model, LossConfig(**settings))(jax.tree.map(jnp.asarray, params), batch)
    return {name: float(value) for name, value in found.items()}


def test_rows_that_are_not_valid_count_nowhere(tiny_flava, batch):
    """Three of eight rows, or these three alone; only full batches have a contrastive loss to be averaged."""
    rows = [0, 4, 5]
    valid = np.isin(np.arange(ROWS), rows)
    for keys in (TEXTS, tuple(batch)):
        given = {name: batch[name] for name in keys}
        found = measured(tiny_flava, given | {"valid": valid})
        alone = measured(tiny_flava, {name: value[rows] for name, value in given.items()} | {"valid": np.ones(3, bool)})
        names = {name for name in alone if f"count/{name}" in alone} - {"contrastive", "positive_cosine"}
        assert names
        for name in (*names, *(f"count/{name}" for name in names)):
            np.testing.assert_allclose(found[name], alone[name], rtol=1e-5, err_msg=name)
    assert (found["count/contrastive"], alone["count/contrastive"]) == (0, 2)  # one of three captions is another's
    right = np.isin(np.arange(ROWS), [0, 5])
    assert found["count/itm"] == 3 and found["count/mmm_image"] == batch["patch_mask"][right].sum()
    assert found["count/mmm_text_accuracy"] == (batch["token_labels"][right] >= 0).sum()


def test_groups_on_eight_devices_equal_one(tiny_flava, batch):
    """A group of four rows lies on four devices, and each group is filtered by its own pairs."""
    itm = {"itm_labels": np.array([0, 0, 0, 0, 1, 1, 0, 1], np.int32)}
    one = measured(tiny_flava, batch | itm, group_size=4)
    settings = ShardingConfig(mesh=MeshConfig(4, 2, 1))
    mesh = sharding.make_mesh(settings.mesh)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with sharding.use(mesh, settings.rules):
        eight = measured(
            tiny_flava, {name: jax.device_put(value, split) for name, value in (batch | itm).items()}, group_size=4
        )
    assert one.keys() == eight.keys()
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=1e-5, err_msg=name)
