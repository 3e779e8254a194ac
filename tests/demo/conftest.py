"""The demonstration's commands without other processes, each of which would import and compile for seconds."""

import contextlib
import functools
import importlib
import io

import jax
import pytest

import train
from vlm import sharding
from vlm.demo import steps

COMMANDS = {"train.py": train, "eval.py": importlib.import_module("eval")}


def python(command):
    """`steps.python` through the scripts' own `main`."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert COMMANDS[command[0]].main(command[1:]) == 0
    return out.getvalue()


@pytest.fixture
def here(monkeypatch):
    """In this process, in the checkout's folder, on one device: as on the machine of a first-time user."""
    monkeypatch.chdir(steps.ROOT)
    monkeypatch.setattr(steps, "python", python)
    monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
