import asyncio
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import typing

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm.checkpoint import Checkpoints, fingerprint, saving, steps
from vlm.errors import UserError
from vlm.manifest import MANIFEST_NAME, read_manifest


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: typing.Any
    ema: dict
    rng: jax.Array


def make_state(seed=0, width=8):
    key = jax.random.key(seed)
    params = {
        "text": {"kernel": jax.random.normal(key, (width, 16)), "bias": jnp.zeros(16, jnp.bfloat16)},
        "logit_scale": jnp.float32(2.5 + seed),
        "empty": jnp.zeros((0, 4)),
    }
    opt_state = optax.adam(1e-3).init(params)
    return State(jnp.int32(seed), params, opt_state, {"text": {"kernel": params["text"]["kernel"]}}, key)


def abstract(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def raw(leaf):
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert raw(x).tobytes() == raw(y).tobytes()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def checkpoints(folder):
    opened = Checkpoints(folder)
    yield opened
    opened.close()


def save_steps(checkpoints, *numbers):
    for number in numbers:
        checkpoints.save(number, make_state(number), {"position": 10 * number}, "hash")
    checkpoints.wait()


def corrupt(step_directory, bit=4):
    data = sorted(step_directory.glob("ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)[-1]
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1 << bit
    data.write_bytes(content)
    return data


def test_round_trip(checkpoints):
    assert checkpoints.restore(abstract(make_state())) is None
    state = make_state(3)
    checkpoints.save(3, state, {"position": 30, "ledger": [1, 2]}, "abc", wait=True)
    restored, step, data_state = checkpoints.restore(abstract(state))
    assert (step, data_state) == (3, {"position": 30, "ledger": [1, 2]})
    assert_identical(restored, state)
    extra = read_manifest(checkpoints.directory / "3")["extra"]
    assert extra["step"] == 3 and extra["config_hash"] == "abc" and extra["parent"] is None
    assert extra["leaves"]["params/text/bias"] == {
        "shape": [16],
        "dtype": "bfloat16",
        "hash": fingerprint.host_fingerprint(raw(state.params["text"]["bias"])).digest,
    }
    assert extra["leaves"]["rng"]["key"] == "threefry2x32"


def test_manifests_form_a_chain(checkpoints):
    save_steps(checkpoints, 1, 2)
    parent = read_manifest(checkpoints.directory / "2")["extra"]["parent"]
    assert parent == {"step": 1, "sha256": read_manifest(checkpoints.directory / "1")["sha256"]}


@pytest.mark.parametrize("save_shape", [(2, 4), (8, 1), (1, 1)])
@pytest.mark.parametrize("load_shape", [(4, 2), (1, 1)])
def test_any_mesh(checkpoints, monkeypatch, save_shape, load_shape):
    monkeypatch.setattr(fingerprint, "HOST_BYTES", 64)  # the kernels are hashed on the devices

    def place(shape):
        mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("a", "b"))
        return lambda leaf: NamedSharding(mesh, P("a", "b") if leaf.ndim == 2 and leaf.size else P())

    state = make_state(5)
    put, get = place(save_shape), place(load_shape)
    checkpoints.save(5, jax.tree.map(lambda x: jax.device_put(x, put(x)), state), {}, "hash")
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=get(x)), state)
    restored, _, _ = checkpoints.restore(target)
    assert_identical(restored, state)
    assert restored.params["text"]["kernel"].sharding == get(state.params["text"]["kernel"])


def test_donated_buffers_do_not_reach_the_file(checkpoints):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"params": {str(i): jnp.full((256, 1024), i, jnp.float32) for i in range(8)}}
    target = abstract(tree)
    for number in range(4):
        checkpoints.save(number, tree, {}, "hash")
        for _ in range(20):
            tree = step(tree)
        restored, _, _ = checkpoints.restore(target)
        for i in range(8):
            np.testing.assert_array_equal(restored["params"][str(i)], np.float32(i + 20 * number))


def test_keeps_the_newest_and_every_nth(folder):
    checkpoints = Checkpoints(folder, keep=3, keep_every=4)
    save_steps(checkpoints, *range(1, 11))
    assert checkpoints.steps() == [4, 8, 9, 10]
    checkpoints.close()


def test_never_fewer_than_two(folder):
    checkpoints = Checkpoints(folder, keep=1)
    save_steps(checkpoints, 1, 2, 3)
    assert checkpoints.steps() == [2, 3]
    checkpoints.close()


def test_a_broken_step_does_not_push_out_a_sound_one(checkpoints):
    save_steps(checkpoints, 1, 2)
    (checkpoints.directory / "2" / MANIFEST_NAME).unlink()
    save_steps(checkpoints, 3)
    assert checkpoints.steps() == [1, 2, 3]


def flip_a_bit(step_directory):
    data = max(step_directory.glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_corrupted_newest_step_does_not_push_out_a_sound_one(folder, restarted):
    """Every size fits; only the digests tell. The two sound steps stay until there are two newer sound ones."""
    checkpoints = Checkpoints(folder, keep=2)
    save_steps(checkpoints, 1, 2, 3)
    flip_a_bit(folder / "3")
    if restarted:
        checkpoints.close()
        checkpoints = Checkpoints(folder, keep=2)
    save_steps(checkpoints, 4)
    assert checkpoints.steps() == [2, 3, 4]
    save_steps(checkpoints, 5)
    assert checkpoints.steps() == [4, 5]
    checkpoints.close()


def test_retention_hashes_each_step_once_and_in_the_background(folder, monkeypatch):
    hashed, verify = [], steps.verify_manifest

    def spy(path, level):
        if level == "full":
            assert threading.current_thread() is not threading.main_thread()
            hashed.append(path.name)
        return verify(path, level)

    monkeypatch.setattr(steps, "verify_manifest", spy)
    checkpoints = Checkpoints(folder, keep=3)
    save_steps(checkpoints, *range(1, 8))
    assert checkpoints.steps() == [5, 6, 7]
    assert hashed == ["3", "2", "4", "5", "6"]
    checkpoints.close()


def test_same_values_twice_is_one_save(checkpoints):
    save_steps(checkpoints, 1)
    before = (checkpoints.directory / "1" / MANIFEST_NAME).stat()
    save_steps(checkpoints, 1)
    assert (checkpoints.directory / "1" / MANIFEST_NAME).stat().st_mtime_ns == before.st_mtime_ns
    assert steps.quarantined(checkpoints.directory) == []


def test_other_values_at_the_same_step_set_the_old_aside(checkpoints):
    save_steps(checkpoints, 1)
    state = make_state(2)
    checkpoints.save(1, state, {}, "hash", wait=True)
    restored, _, _ = checkpoints.restore(abstract(state))
    assert_identical(restored, state)
    assert steps.quarantined(checkpoints.directory) == ["1.0"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_is_never_committed(checkpoints, value):
    save_steps(checkpoints, 1)
    state = make_state(2)
    state.params["text"]["kernel"] = state.params["text"]["kernel"].at[3, 3].set(value)
    with pytest.raises(UserError, match=r"step 2 is not saved: NaN or Inf in 1 leaves.*params/text/kernel"):
        checkpoints.save(2, state, {}, "hash")
    checkpoints.wait()
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize(
    "leaf, found",
    [(np.int64(3), "int64 NumPy value"), (3, "int"), (1.5, "float"), ("text", "str"), (np.float64(1), "float64")],
)
def test_leaves_that_would_not_come_back_are_refused(checkpoints, leaf, found):
    with pytest.raises(UserError, match=f"'step' is a {found}"):
        checkpoints.save(1, {"step": leaf}, {}, "hash")
    assert list(checkpoints.directory.glob("1*")) == []


def test_numpy_leaves_of_exact_types_are_saved(checkpoints):
    checkpoints.save(1, {"w": np.arange(3, dtype=np.float32), "n": np.int32(7)}, {}, "hash")
    restored, _, _ = checkpoints.restore(
        {"w": jax.ShapeDtypeStruct((3,), "float32"), "n": jax.ShapeDtypeStruct((), "int32")}
    )
    assert restored["w"].tolist() == [0, 1, 2] and int(restored["n"]) == 7


def test_data_position_must_be_json(checkpoints):
    with pytest.raises(UserError, match="data position is not plain JSON.*int64"):
        checkpoints.save(1, make_state(), {"position": np.int64(3)}, "hash")


def test_bad_newest_step_is_set_aside_and_the_one_before_used(checkpoints):
    save_steps(checkpoints, 1, 2)
    data = corrupt(checkpoints.directory / "2")
    restored, step, data_state = checkpoints.restore(abstract(make_state()))
    assert step == 1 and data_state == {"position": 10}
    assert_identical(restored, make_state(1))
    assert checkpoints.steps() == [1]
    reason = json.loads((checkpoints.directory / "quarantine" / "reasons.jsonl").read_text())
    assert reason["step"] == 2 and data.name in reason["reason"] and "SHA-256" in reason["reason"]
    assert (checkpoints.directory / "quarantine" / reason["moved_to"] / MANIFEST_NAME).exists()


def test_when_every_step_is_bad_nothing_restarts_silently(checkpoints):
    save_steps(checkpoints, 1, 2)
    for step in "12":
        corrupt(checkpoints.directory / step)
    for _ in range(2):
        with pytest.raises(UserError, match="every checkpoint failed verification"):
            checkpoints.restore(abstract(make_state()))
    assert steps.quarantined(checkpoints.directory) == ["1.0", "2.0"]


def test_asked_for_by_number(checkpoints):
    save_steps(checkpoints, 1, 2)
    restored, step, _ = checkpoints.restore(abstract(make_state()), step=1)
    assert step == 1
    assert_identical(restored, make_state(1))
    with pytest.raises(UserError, match=r"no step 7; there are \[1, 2\]"):
        checkpoints.restore(abstract(make_state()), step=7)
    corrupt(checkpoints.directory / "1")
    with pytest.raises(UserError, match="SHA-256"):
        checkpoints.restore(abstract(make_state()), step=1)
    assert checkpoints.steps() == [1, 2]


def test_corruption_between_memory_and_disk(checkpoints, monkeypatch):
    save_steps(checkpoints, 1)
    honest = checkpoints._orbax.save

    def flip_one_bit(target, args):
        kernel = np.array(args.item["params"]["text"]["kernel"])
        kernel.view(np.uint32)[2, 3] ^= 1
        args.item["params"]["text"]["kernel"] = jnp.asarray(kernel)
        honest(target, args=args)

    monkeypatch.setattr(checkpoints._orbax, "save", flip_one_bit)
    save_steps(checkpoints, 2)  # its files are exactly what was written: only the fingerprint can tell
    restored, step, _ = checkpoints.restore(abstract(make_state()))
    assert step == 1
    assert "values differ" in (checkpoints.directory / "quarantine" / "reasons.jsonl").read_text()


def test_the_first_step_of_a_run_is_read_back(checkpoints, monkeypatch):
    monkeypatch.setattr(saving, "wrong_on_disk", lambda path, records: ["params/text/kernel"])
    with pytest.raises(UserError, match="step 1 failed: values on disk differ.*params/text/kernel"):
        save_steps(checkpoints, 1)
    assert checkpoints.steps() == [] and list(checkpoints.directory.glob("1*")) == []


def test_another_structure_lists_every_difference(checkpoints):
    save_steps(checkpoints, 1)
    other = make_state(width=4)
    other.params["extra"] = jnp.zeros(2)
    other = other.replace(rng=jnp.zeros(2, jnp.uint32), ema={})
    with pytest.raises(UserError) as caught:
        checkpoints.restore(abstract(other))
    message = str(caught.value)
    assert "missing in the checkpoint: params/extra" in message
    assert "unknown to this model and optimizer: ema/text/kernel" in message
    assert "params/text/kernel is float32[8, 16], expected float32[4, 16]" in message
    assert "rng is PRNG key threefry2x32[2], expected uint32[2]" in message
    assert checkpoints.steps() == [1] and "\n" not in message


def test_an_error_while_reading_a_sound_step_is_not_its_fault(checkpoints, monkeypatch):
    save_steps(checkpoints, 1)

    def out_of_memory(path, targets):
        raise MemoryError("no room")

    monkeypatch.setattr(saving, "read_arrays", out_of_memory)
    with pytest.raises(MemoryError, match="no room"):
        checkpoints.restore(abstract(make_state()))
    assert checkpoints.steps() == [1]


def test_fast_verification_still_compares_values(folder):
    checkpoints = Checkpoints(folder, verify="fast")
    for number in (1, 2):
        checkpoints.save(number, make_state(number, width=4096), {}, "hash", wait=True)
    written = np.asarray(make_state(2, width=4096).params["text"]["kernel"]).tobytes()[:64]
    damaged = []
    for path in (checkpoints.directory / "2").glob(
        "ocdbt.process_0/d/*"
    ):  # one of them may be a copy that nobody reads
        content = bytearray(path.read_bytes())
        if (place := content.find(written)) >= 0:
            content[place] ^= 1
            path.write_bytes(content)
            damaged.append(path.name)
    _, step, _ = checkpoints.restore(abstract(make_state(width=4096)))
    assert step == 1
    reasons = (folder / "quarantine" / "reasons.jsonl").read_text()
    assert damaged and any(name in reasons for name in damaged)
    checkpoints.close()


def test_failed_save_surfaces_at_the_next_call(checkpoints, monkeypatch):
    save_steps(checkpoints, 1)

    def full(directory, extra, digests=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_manifest", full)
    checkpoints.save(2, make_state(2), {}, "hash")
    with pytest.raises(UserError, match=r"step 2 failed: No space left on device; the newest complete step is 1"):
        checkpoints.save(3, make_state(3), {}, "hash")
    assert checkpoints.steps() == [1]
    assert list(checkpoints.directory.glob("*unverified*")) == []


def test_a_checkpoint_of_two_writers_is_refused(checkpoints):
    code = "import sys; from vlm.checkpoint import Checkpoints; Checkpoints(sys.argv[1]).save(1, {}, {}, 'hash')"
    (checkpoints.directory / "3.unverified").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, checkpoints.directory], capture_output=True, text=True, check=False
    )
    assert f"is being written by process {os.getpid()}" in done.stderr
    assert (checkpoints.directory / "3.unverified").exists()  # not a leftover: its writer lives


def test_addresses_are_not_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gs://bucket/run: checkpoints need a folder"):
        Checkpoints("gs://bucket/run")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_removed_at_the_start(folder):
    for name in ("7.unverified", "8.unverified.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-3", "5.deleting"):
        (folder / name / "d").mkdir(parents=True)
    (folder / "notes").mkdir()
    Checkpoints(folder).close()
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "notes"]


def test_restores_where_a_step_lost_its_manifest(checkpoints):
    save_steps(checkpoints, 1, 2)
    (checkpoints.directory / "2" / MANIFEST_NAME).unlink()
    assert checkpoints.restore(abstract(make_state()))[1] == 1


def test_a_copied_step_is_not_the_step_of_its_name(checkpoints):
    save_steps(checkpoints, 1, 2)
    shutil.copytree(checkpoints.directory / "1", checkpoints.directory / "3")
    assert checkpoints.restore(abstract(make_state()))[1] == 2
    assert "holds step 1" in (checkpoints.directory / "quarantine" / "reasons.jsonl").read_text()


def test_what_asyncio_logs_of_tensorstores_other_errors_is_not_repeated(checkpoints):
    """An error that no Python code has raised has no traceback; one that some code has raised is told."""
    raised = []
    try:
        raise ValueError("of a task")
    except ValueError as error:
        raised.append(error)
    loop, told = asyncio.new_event_loop(), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(str(record.exc_info[1]))
    logger = logging.getLogger("asyncio")
    logger.addHandler(handler)
    try:
        for error in (ValueError("of a file"), *raised):
            loop.create_future().set_exception(error)  # never retrieved
            gc.collect()
    finally:
        logger.removeHandler(handler)
        loop.close()
    assert told == ["of a task"]
