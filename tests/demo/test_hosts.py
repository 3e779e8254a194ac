"""AltCLIP's own towers on two hosts of four devices: the losses of one device, with rows packed and without."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
STEPS = 3
SETTINGS = {
    "train.steps": STEPS, "train.log_every": 1, "train.eval_every": 0, "optimizer.schedule.warmup_steps": 1,
    "train.tensorboard": False, "eval": "{}",
}  # fmt: skip
MESH = {f"sharding.mesh.{axis}": 2 for axis in ("data", "fsdp", "tensor")}


def losses(folder, workdir, hosts, devices, settings):
    """Of a run of the command, by step."""
    flags = [f"--config.{key}={value}" for key, value in (SETTINGS | settings).items()]
    command = [sys.executable, "train.py", f"--config=configs/digits.py:clip,{folder}", f"--workdir={workdir}", *flags]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    if hosts > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            command += [f"--coordinator=localhost:{free.getsockname()[1]}", f"--num_processes={hosts}"]
    numbers = [[f"--process_id={host}"] if hosts > 1 else [] for host in range(hosts)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, *more], cwd=ROOT, env=environment, **pipes) for more in numbers]
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:  # where one waits for the other
        for process in running:
            process.kill()
    for process, error in zip(running, errors, strict=True):
        assert process.returncode == 0, error[-3000:]
    assert (workdir / "checkpoints" / str(STEPS)).is_dir()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.long
@pytest.mark.parametrize("settings", [{}, {"train.text_lengths": "(4,6,8)", "train.pack_texts": 8}], ids=str)
def test_two_hosts_of_four_devices_train_as_one_device(demo_data, tmp_path, settings):
    folder = demo_data.parent
    several = losses(folder, tmp_path / "several", 2, 4, settings | MESH)
    single = losses(folder, tmp_path / "single", 1, 1, settings)
    assert len(single) == STEPS
    np.testing.assert_allclose(several, single, rtol=1e-5)
