"""A run's parameters one at a time."""

import gc
import json
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from vlm.checkpoint import Checkpoints, lazy, lazy_params
from vlm.convert.torch_file import open_tensors
from vlm.convert.writer import write_tensors
from vlm.errors import UserError

PARAMS = {"a": {"kernel": jnp.arange(96.0).reshape(8, 12)}, "b": jnp.ones(5, jnp.bfloat16), "c": jnp.float32(3)}
PARAMS |= {"empty": jnp.zeros((0, 4)), "d": jnp.arange(7)}


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"params": PARAMS, "opt_state": jnp.zeros(9)}, {}, "hash", wait=True)
    checkpoints.close()
    return tmp_path


def test_written_with_one_leaf_alive_and_each_read_once(workdir, tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    read, original = [], lazy.read_on_host

    def spy(step, records):
        gc.collect()
        assert not [ref for ref in alive if ref() is not None], "an earlier leaf is still in memory"
        arrays = {name: np.array(array) for name, array in original(step, records).items()}
        read.extend(arrays)
        alive.extend(weakref.ref(array) for array in arrays.values())
        return arrays

    monkeypatch.setattr(lazy, "read_on_host", spy)
    views = lazy_params(workdir)
    assert not read and views["a/kernel"].shape == (8, 12)
    write_tensors(tmp_path, "params", views)
    assert sorted(read) == ["params/a/kernel", "params/b", "params/c", "params/d"]
    found = open_tensors(tmp_path / "params.safetensors")
    assert found.keys() == views.keys()
    np.testing.assert_array_equal(found["a/kernel"].read(), PARAMS["a"]["kernel"])
    np.testing.assert_array_equal(found["d"].read(), np.arange(7))
    assert found["b"].dtype == jnp.bfloat16 and found["empty"].shape == (0, 4) and found["c"].read() == 3


def test_blocks_in_flight_do_not_hold_the_leaf(workdir):
    view = lazy_params(workdir)["a/kernel"]
    block = view.read((slice(2, 3),))
    assert block.base is None and block.nbytes == 48


def test_the_step_is_chosen_at_the_start(workdir):
    views = lazy_params(workdir)
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(2, {"params": PARAMS | {"c": jnp.float32(4)}}, {}, "hash", wait=True)
    checkpoints.close()
    assert views["c"].read() == 3 and lazy_params(workdir)["c"].read() == 4


def test_wrong_values_are_named(workdir, monkeypatch):
    original = lazy.read_on_host
    monkeypatch.setattr(
        lazy, "read_on_host", lambda step, records: {n: a + 1 for n, a in original(step, records).items()}
    )
    with pytest.raises(UserError, match="values differ from those that were saved: params/d"):
        lazy_params(workdir)["d"].read()
