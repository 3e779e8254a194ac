"""Joining several hosts: what is incomplete or wrong ends in one line; nothing given means one host."""

import argparse

import jax
import pytest

from vlm.errors import UserError
from vlm.hosts import add_host_flags, connect


@pytest.fixture
def joined(monkeypatch):
    """Records calls of jax.distributed.initialize."""
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    return calls


def _connect(*flags):
    parser = argparse.ArgumentParser()
    add_host_flags(parser)
    connect(parser.parse_args(flags))


def test_alone_by_flags_by_environment_and_by_cluster(joined, monkeypatch):
    _connect()
    assert joined == []
    _connect("--coordinator=a:1", "--num_processes=2", "--process_id=1")
    _connect("--distributed")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "b:2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    _connect()
    assert joined == [("a:1", 2, 1), (None, None, None), ("b:2", 4, 3)]


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--num_processes=2"], {}, "need --coordinator"),
        (["--coordinator=a"], {}, "expected HOST:PORT, found 'a'"),
        (["--coordinator=a:1"], {}, "needs --num_processes and --process_id"),
        ([], {"JAX_COORDINATOR_ADDRESS": "a:1"}, "needs --num_processes and --process_id"),
        ([], {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: expected a number .* found 'two'"),
    ],
)
def test_what_is_incomplete_is_named(joined, monkeypatch, flags, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        _connect(*flags)
    assert joined == []


def test_a_failure_of_jax_is_one_line(monkeypatch, joined):
    def fail(*_):
        raise ValueError("no cluster")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match="joining the other hosts failed: no cluster"):
        _connect("--distributed")
