"""Two real processes with two devices each: the same metrics and the same contrastive loss as one device."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from vlm import evaluation, losses

PROGRAM = """
import os, signal, sys, json, runpy
import jax, numpy as np, jax.numpy as jnp
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from vlm import evaluation, losses
from vlm.errors import UserError
from vlm.evaluation import results

fake = runpy.run_path(sys.argv[3])
specs, words, projection, image, text = json.loads(sys.argv[4])
mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
params = {"words": np.asarray(words, np.float32), "projection": np.asarray(projection, np.float32)}
params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

def spread(rows):
    rows = np.asarray(rows, np.float32)
    return jax.make_array_from_callback(rows.shape, split, lambda index: rows[index])

with jax.set_mesh(mesh):
    metrics = evaluation.run(specs, fake["ColourModel"](), params, fake["ColourProcessor"](), output=sys.argv[5])
    for form in ("rows", "ring"):
        loss = lambda a, b: losses.contrastive(a, b, 10.0, form=form)
        value, gradient = jax.jit(jax.value_and_grad(loss))(spread(image), spread(text))
        metrics[form] = float(value)
        metrics[form + "_gradient"] = float(jnp.sum(gradient * gradient))
print(json.dumps(metrics))

# The first host alone writes; when it cannot, both stop.
def full(*_):
    raise OSError(28, "No space left on device")

writers = {"colours": (evaluation.results, "write"), "vectors": (np, "save")}
for name, (module, function) in writers.items():
    usual = getattr(module, function)
    if sys.argv[2] == "0":
        setattr(module, function, full)
    embeddings = {"kind": "embeddings", "data": specs["colours"]["data"], "max_skip_fraction": 0.5}
    spec = specs["colours"] if name == "colours" else embeddings
    with jax.set_mesh(mesh):
        try:
            evaluation.run({name: spec}, fake["ColourModel"](), params, fake["ColourProcessor"](), output=sys.argv[6])
        except UserError as error:
            assert "No space left on device" in str(error), error
        else:
            raise AssertionError(f"{name}: nobody heard of it")
    setattr(module, function, usual)

# One host meets a wrong label, or gets a signal: both stop, at the same batch.
from vlm.preemption import Preemption, Stopped

wrong = {**specs["colours"], "data": json.loads(sys.argv[7])}
with jax.set_mesh(mesh), Preemption(mesh) as preemption:
    for spec, kind, words in ((wrong, UserError, "another host" if sys.argv[2] == "0" else "label"),
                              (specs["colours"], Stopped, "")):
        if kind is Stopped and sys.argv[2] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            model, processor = fake["ColourModel"](), fake["ColourProcessor"]()
            evaluation.run({"any": spec}, model, params, processor, poll=preemption.poll)
        except kind as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{words}: nobody heard of it")
"""


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def test_two_processes_equal_one(model, params, processor, colours, tmp_path):
    data, _ = colours(count=11, noise=150, broken=(4,))
    bootstrap = {"resamples": 10}
    names = ("red", "green", "blue", "yellow", "white")
    data_and_limit = {"data": data, "max_skip_fraction": 0.5}
    specs = {
        "colours": {
            "kind": "zero_shot",
            **data_and_limit,
            "classnames": names,
            "batch_size": 3,
            "bootstrap": bootstrap,
        },
        "pairs": {"kind": "retrieval", **data_and_limit, "batch_size": 3, "bootstrap": bootstrap},
    }
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(8, 4)), rng.normal(size=(8, 4))
    expected = evaluation.run(specs, model, params, processor, output=tmp_path / "one" / "r.json", progress=False)
    for form in ("rows", "ring"):
        value, gradient = jax.value_and_grad(lambda a, b: losses.contrastive(a, b, 10.0))(
            *map(np.float32, (image, text))
        )
        expected |= {form: float(value), f"{form}_gradient": float((gradient**2).sum())}

    values = [specs, *(np.asarray(value).tolist() for value in (params["words"], params["projection"], image, text))]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    port, fake = f"localhost:{free_port()}", str(pathlib.Path(__file__).with_name("conftest.py"))
    wrong, _ = colours(count=8, name="wrong", label=lambda i: 99 if i == 7 else 0)
    outputs = [str(tmp_path / "two" / "r.json"), str(tmp_path / "none" / "r.json"), json.dumps(wrong)]
    commands = [
        [sys.executable, "-c", PROGRAM, port, str(host), fake, json.dumps(values), *outputs] for host in range(2)
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err[-3000:]
        assert json.loads(out.splitlines()[-1]) == pytest.approx(expected, rel=1e-5)
    assert not [path for path in (tmp_path / "none").rglob("*") if path.is_file()]
    for name in ("r.colours.jsonl", "r.pairs.jsonl"):
        one, two = (
            [json.loads(line) for line in (tmp_path / n / name).read_text().splitlines()] for n in ("one", "two")
        )
        assert len(one) == len(two)
        for theirs, ours in zip(one, two, strict=True):
            assert {**theirs, "top": None} == {**ours, "top": None}  # scores differ in the last digit
