"""A tiny training run that can be started and killed cheaply, many times.

Importing jax and orbax takes seconds, a run of a tiny model a fraction of one. So this process imports once, without
initialising a backend, and forks a child per run; the children are ordinary processes that can be killed. It
reads one JSON request per line, {"workdir", "kill_after": [steps, share of a step] | null, "die_at": point |
null, "file_limit": bytes | null}, and answers with the exit status, or minus the signal. Moments are counted in steps,
not seconds, so that they are spread alike over a run on an idle and on a busy machine.
"""

import hashlib
import json
import os
import pathlib
import resource
import signal
import sys
import time
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from vlm.checkpoint import Checkpoints, saving, steps
from vlm.errors import exit_on_user_error
from vlm.models.blip.momentum import advance, update_teacher

STEPS, EVERY = 16, 2


def loss(params, batch, key, queue):
    hidden = jnp.tanh(batch @ params["up"]) * jax.random.bernoulli(key, 0.9, (1, 64))
    found = hidden @ params["down"]
    return jnp.mean((found - batch) ** 2) + 0.1 * jnp.mean((found @ queue.T) ** 2)


def train_step(state, batch):
    """Momentum, dropout, a teacher's features in a queue: one step forgotten or repeated changes all that follow."""
    key = jax.random.fold_in(jax.random.key(1), state["step"])
    grads = jax.grad(loss)(state["params"], batch, key, state["extra"]["queue"])
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["opt_state"], grads)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], momentum)
    teacher = update_teacher(state["extra"]["teacher"], params, 0.9)
    features = jnp.tanh(batch @ teacher["up"]) @ teacher["down"]
    extra = advance(state["extra"] | {"teacher": teacher}, {"queue": features})
    return {"params": params, "opt_state": momentum, "extra": extra, "step": state["step"] + 1}


def initial_state():
    """Made by NumPy: compiling initialisers would take longer than the run."""
    random = np.random.default_rng(0)
    params = {name: random.standard_normal(shape) / 8 for name, shape in (("up", (8, 64)), ("down", (64, 8)))}
    params = jax.tree.map(np.float32, params)
    extra = {"teacher": params, "queue": np.zeros((10, 8), np.float32)}  # no multiple of the batch: it wraps around
    extra |= {"queue_index": np.int32(0), "step": np.int32(0)}
    state = {"params": params, "opt_state": jax.tree.map(np.zeros_like, params), "extra": extra, "step": np.int32(0)}
    return jax.device_put(jax.tree.map(np.array, state))  # copies: donated buffers must not be shared


def run(workdir: pathlib.Path, file_limit: int | None, progress: int) -> None:
    """Trains to the end from wherever the workdir is; notes in its log what was durable when."""
    workdir.mkdir(exist_ok=True)
    log = (workdir / "log").open("a", buffering=1)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
    state, start, position = initial_state(), 0, 0
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    if (found := checkpoints.restore(shapes)) is not None:
        state, start, data_state = found
        position = data_state["position"]
    log.write(f"start {start}\n")
    step_function = jax.jit(train_step, donate_argnums=0)
    for step in range(start + 1, STEPS + 1):
        batch = np.random.default_rng(position).standard_normal((4, 8)).astype(np.float32)
        position += 4
        state = step_function(state, batch)
        if step % EVERY == 0:
            checkpoints.save(step, state, {"position": position}, "hash")
            log.write(f"durable {step - EVERY if step - EVERY > start else start}\n")
        os.write(progress, b".")
        if step == 6 and file_limit:
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    checkpoints.close()
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state)))
    (workdir / "final").write_text(digest.hexdigest())


def die_at(point: str) -> None:
    """Arranges for the process to be killed at one moment of its fourth save."""
    calls = {"count": 0}

    def kill(module, name, before):
        honest = getattr(module, name)

        def wrapped(*args, **kwargs):
            calls["count"] += 1
            fatal = calls["count"] == 4
            if fatal and before:
                if point == "deletion":  # half done
                    next(pathlib.Path(args[0]).glob("d/*")).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            result = honest(*args, **kwargs)
            if fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, wrapped)

    where = {
        "blocking": (saving.ocp.AsyncCheckpointer, "save", False),
        "orbax_done": (saving, "_digests", True),
        "manifest": (saving, "write_manifest", False),
        "renamed": (saving.steps, "commit", False),
        "deletion": (steps.shutil, "rmtree", True),
        "deleted": (steps.shutil, "rmtree", False),
    }
    kill(*where[point])


def child(request: dict, progress: int) -> None:
    if request.get("die_at"):
        die_at(request["die_at"])
    with exit_on_user_error():
        run(pathlib.Path(request["workdir"]), request.get("file_limit"), progress)


def start(request: dict) -> tuple[int, int]:
    """Forks a run; returns its process id and the pipe that brings a byte per step."""
    steps_done, progress = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax warns of forks; its threads do not exist yet
        pid = os.fork()
    if pid:
        os.close(progress)
        return pid, steps_done
    status = 1
    try:
        child(request, progress)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def kill_after(pid: int, steps_done: int, steps: int, share: float) -> None:
    """Kills a run `share` of a step's time after its number of steps, unless it ends before."""
    began, count, times = time.monotonic(), 0, [0.02]
    while count < steps and os.read(steps_done, 1):
        count += 1
        times.append(time.monotonic() - began)
    time.sleep(share * times[-1] / len(times) * 2)
    os.kill(pid, signal.SIGKILL)  # not yet waited for, so the number is still its own


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        pid, steps_done = start(request)
        if request.get("kill_after"):
            kill_after(pid, steps_done, *request["kill_after"])
        _, code = os.waitpid(pid, 0)
        os.close(steps_done)
        print(os.waitstatus_to_exitcode(code), flush=True)


if __name__ == "__main__":
    serve()
