"""One of two processes that share a run: `two_processes.py PORT INDEX FOLDER`. Driven by test_processes.py."""

import itertools
import os
import pathlib
import sys
import time

port, index, folder = sys.argv[1:]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))

from vlm import hosts  # noqa: E402
from vlm.checkpoint import Checkpoints, fingerprint, lazy_params, reading, restore_params  # noqa: E402
from vlm.checkpoint.processes import any_process, from_primary  # noqa: E402
from vlm.errors import UserError, exit_on_user_error  # noqa: E402

fingerprint.HOST_BYTES = 1024  # the kernel takes the way of large arrays, the rest that of small ones
KERNEL = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)


def make(step, *axes):
    """A state on all four devices, the kernel split over `axes`."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    split, whole = NamedSharding(mesh, P(*axes)), NamedSharding(mesh, P())
    build = jax.jit(
        lambda kernel: {"params": {"kernel": kernel * step}, "step": jnp.int32(step), "rng": jax.random.key(step)},
        out_shardings={"params": {"kernel": split}, "step": whole, "rng": whole},
    )
    return build(KERNEL)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_restored(found, expected, axes):
    state, step, data_state = found
    assert step == expected and data_state == {"position": expected}, (step, data_state)
    wanted = make(expected, *axes)
    same = jax.jit(lambda a, b: jnp.all(a == b))(state["params"]["kernel"], wanted["params"]["kernel"])
    assert bool(same) and state["params"]["kernel"].sharding == wanted["params"]["kernel"].sharding
    assert jax.random.key_data(state["rng"]).tolist() == jax.random.key_data(wanted["rng"]).tolist()


# More arrays than programs may be in flight, in every layout: unless each is awaited, both processes hang.
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
layouts = [NamedSharding(mesh, P(*axes)) for axes in itertools.permutations(("a", "b", None), 2)]
fill = {layout: jax.jit(lambda value: jnp.full((16, 64), value), out_shardings=layout) for layout in layouts}
many = {str(i): fill[layouts[i % len(layouts)]](np.float32(i)) for i in range(60)}
for _ in range(3):
    found = fingerprint.fingerprints(many)
    assert all(
        found[str(i)] == fingerprint.host_fingerprint(np.full((16, 64), i, np.float32)) for i in range(len(many))
    )

checkpoints = Checkpoints(folder)
# Step 1 was written by one process with one device.
assert_restored(checkpoints.restore(abstract(make(0, "a", "b"))), 1, ("a", "b"))

for step in (2, 3):
    checkpoints.save(step, make(step, ("a", "b")), {"position": step}, "hash")
checkpoints.wait()
assert checkpoints.steps() == [2, 3], checkpoints.steps()
assert_restored(checkpoints.restore(abstract(make(0, "b", "a"))), 3, ("b", "a"))

try:
    checkpoints.restore({"params": {}})
except UserError as error:
    assert "unknown to this model and optimizer: params/kernel" in str(error)
else:
    raise AssertionError("another structure was accepted")


def damage():
    path = max((checkpoints.directory / "3").glob("ocdbt.process_1/d/*"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])


from_primary(damage)
assert_restored(checkpoints.restore(abstract(make(0, None, "a"))), 2, (None, "a"))

bad = make(4)
bad["params"]["kernel"] = jax.jit(lambda x: x.at[3, 3].set(jnp.nan))(bad["params"]["kernel"])
try:
    checkpoints.save(4, bad, {}, "hash")
except UserError as error:
    assert "NaN or Inf" in str(error)
else:
    raise AssertionError("NaN was accepted")

try:
    checkpoints.save(4, {"local": jnp.zeros(3)}, {}, "hash")
except UserError as error:
    assert "one process only" in str(error)
else:
    raise AssertionError("a local array was accepted")

if index == "0":  # the next save fails in one process; both must hear of it
    import vlm.checkpoint.saving as saving

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    write_manifest, saving.write_manifest = saving.write_manifest, full
checkpoints.save(5, make(5, "a"), {"position": 5}, "hash")
try:
    checkpoints.wait()
except UserError as error:
    assert ("No space left" if index == "0" else "failed in another process") in str(error), error
else:
    raise AssertionError("a failed save went unnoticed")
if index == "0":
    saving.write_manifest = write_manifest
assert checkpoints.steps() == [2]

# Whatever the first process raises or returns, the others hear of it and go on.
for function, kind, words in (
    (lambda: object(), RuntimeError, "not JSON serializable"),
    (lambda: 1 // 0, RuntimeError, "ZeroDivisionError"),
    (lambda: pathlib.Path(folder, "absent").read_text(), UserError, "absent: No such file or directory"),
    (lambda: from_primary(int), RuntimeError, "cannot ask the others"),
):
    try:
        from_primary(function)
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"{words}: went unnoticed")

# The second process sees another newest step, which is not there: all read what the first one chose.
if index == "1":
    reading.step_numbers = lambda directory: [1]
assert reading.find_step(folder).name == "2"
assert list(lazy_params(folder)) == ["kernel"]
mesh = Mesh(np.array(jax.devices()).reshape(4), ("a",))
_, params = restore_params(checkpoints.directory, shardings={"kernel": NamedSharding(mesh, P(None, "a"))})
expected = jax.jit(lambda a: jnp.all(a == KERNEL * 2))(params["kernel"])
assert bool(expected)
print("fine", flush=True)

# The second process fails alone, after a save, and asks the first for nothing: both end, and the save is kept.
hosts.PATIENCE = 0.5
closed = pathlib.Path(folder).parent / "closed"
with hosts.may_end_alone(), exit_on_user_error():
    try:
        with checkpoints:
            checkpoints.save(6, make(6), {"position": 6}, "hash")
            if index == "1":
                raise UserError("only this one failed")
            deadline = time.monotonic() + 10
            while not closed.exists():
                assert time.monotonic() < deadline, "the other one waits"
                time.sleep(0.02)
            any_process(False)
    finally:
        closed.touch()
