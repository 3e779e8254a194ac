"""A run's folder: one writer, one configuration, records that name what a number depends on."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vlm import workdir
from vlm.config import complete
from vlm.errors import UserError


def test_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "a" / "b"
    code = (
        "import pathlib, sys; from vlm import workdir\n"
        f"with workdir.claim(pathlib.Path({str(folder)!r})): print('claimed')"
    )
    run = lambda: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: E731
    with workdir.claim(folder):
        other = run()
        assert "another process is writing" in other.stderr and not other.stdout
    assert run().stdout == "claimed\n"


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"), workdir.claim(tmp_path / "file"):
        pass


def test_a_folder_that_cannot_be_locked_is_not_called_busy(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"cannot lock .*\.lock: No locks available"), workdir.claim(tmp_path):
        pass


class Processor:
    def save(self, folder):
        folder.mkdir(exist_ok=True)


def test_another_configuration_is_refused_with_the_difference(tmp_path):
    config = complete({"family": "altclip", "model": {"width": 3}})
    workdir.check_config(tmp_path, config)
    workdir.record(tmp_path, config, Processor())
    workdir.check_config(tmp_path, config)
    changed = complete({"family": "altclip", "model": {"width": 4}, "optimizer": {"lr": 0.5}})
    with pytest.raises(UserError, match=r"model\.width: 3 -> 4; optimizer\.lr: 0\.0001 -> 0\.5 .*--allow"):
        workdir.check_config(tmp_path, changed)
    workdir.check_config(tmp_path, changed, allow_change=True)
    other = {"mesh": {"data": 2, "fsdp": 4}}
    workdir.check_config(tmp_path, complete({"family": "altclip", "model": {"width": 3}, "sharding": other}))
    with pytest.raises(UserError, match=r"configuration: optimizer\.lr: 0\.0001 -> 0\.5 \(another"):
        both = {"family": "altclip", "model": {"width": 3}, "sharding": other, "optimizer": {"lr": 0.5}}
        workdir.check_config(tmp_path, complete(both))
    many = complete({"family": "altclip", "model": {"width": 3} | {f"k{i}": i for i in range(30)}})
    with pytest.raises(UserError, match="and 22 more"):
        workdir.check_config(tmp_path, many)
    older = json.loads((tmp_path / "config.json").read_text())
    del older["train"]["keep"]  # written before this setting existed
    (tmp_path / "config.json").write_text(json.dumps(older))
    workdir.check_config(tmp_path, config)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not a JSON configuration"):
        workdir.check_config(tmp_path, config)


def test_environment_is_recorded_at_every_start(tmp_path):
    for _ in range(2):
        workdir.record(tmp_path, complete({"family": "altclip"}), Processor())
    starts = json.loads((tmp_path / "env.json").read_text())
    assert len(starts) == 2 and starts[0]["devices"] == {"cpu": 8} and "jax" in starts[0]["versions"]
    assert {"git", "time", "command", "python", "processes"} <= starts[0].keys()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    workdir.write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        workdir.write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_samples_are_a_grid(tmp_path):
    images = np.zeros((5, 4, 6, 3), np.float32)
    images[1, :, :, 0] = 2.0
    path = workdir.save_samples(tmp_path, images, 7, 4)
    assert path is not None and path.name == "step_00000007.png"
    grid = np.asarray(Image.open(path))
    assert grid.shape == (8, 12, 3)
    assert (grid[:4, 6:] == (255, 0, 0)).all() and not grid[:4, :6].any()
    assert workdir.save_samples(tmp_path, images, 8, 0) is None


def test_samples_of_the_first_batch_of_each_kind(tmp_path):
    samples, image = workdir.Samples(tmp_path, 4), jnp.zeros((2, 4, 4, 3))
    for step, more in enumerate(((), (), ("tokens",), ("tokens", "packing"), ("mask", "tokens"))):
        samples.keep(step, {"image": image} | dict.fromkeys(more))
    samples.keep(9, {"tokens": None})
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"step_{step:08d}.png" for step in (0, 2, 4)
    ]
