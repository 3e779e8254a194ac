import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.checkpoint import Checkpoints, verify_step
from vlm.checkpoint.processes import any_process, from_primary
from vlm.errors import UserError


def test_one_process_then_two_then_one(tmp_path):
    """What one process wrote two read, resharded; what two wrote one reads; failures reach both, and end both."""
    folder = tmp_path / "checkpoints"
    (tmp_path / "config.json").write_text("{}")
    kernel = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    state = {"params": {"kernel": jnp.asarray(kernel)}, "step": jnp.int32(1), "rng": jax.random.key(1)}
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state, {"position": 1}, "hash")
    checkpoints.close()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = str(pathlib.Path(__file__).with_name("two_processes.py"))
    running = [
        subprocess.Popen(
            [sys.executable, script, port, str(index), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in running]
    finally:  # where one waits for the other
        for process in running:
            process.kill()
    for out, err in said:
        assert out.strip().endswith("fine"), err[-3000:]
    assert running[1].returncode == 2 and said[1][1].splitlines()[-1] == "error: only this one failed", said[1][1]
    assert running[0].returncode == 1 and "Gloo" in said[0][1].splitlines()[-1], said[0][1]

    checkpoints = Checkpoints(folder)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    restored, step, data_state = checkpoints.restore(target)
    checkpoints.close()
    assert (step, data_state) == (6, {"position": 6})
    np.testing.assert_array_equal(restored["params"]["kernel"], kernel * 6)
    assert restored["rng"] == jax.random.key(6)
    verify_step(folder / "6")


def test_what_one_process_runs_alone_cannot_ask_the_others():
    """With one process nothing would hang, so the mistake is refused there too, and the refusal does not last."""
    for ask in (lambda: from_primary(int), lambda: any_process(True)):
        with pytest.raises(RuntimeError, match="cannot ask the others"):
            from_primary(ask)
    assert from_primary(lambda: 3) == 3 and any_process(True)


def test_a_system_error_is_one_line_naming_the_file(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/absent: No such file or directory$"):
        from_primary(lambda: (tmp_path / "absent").read_text())
    with pytest.raises(UserError, match="^No space left on device$"):
        from_primary(lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
