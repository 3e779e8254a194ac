"""Freed memory is kept: the second use of a large block touches no new page."""

import platform
import subprocess
import sys

import pytest

from vlm import heap

PROGRAM = """
import resource, threading
import numpy as np
from vlm.heap import keep_freed_memory

print(keep_freed_memory())

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(32 << 20, 1, np.uint8)  # 8192 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def run():
    faults()
    print(faults())

thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


def run(**environment):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env={"NUMPY_MADVISE_HUGEPAGE": "0", **environment},
    )
    kept, faults = result.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_a_block_is_used_again():
    assert run(JAX_PLATFORMS="cpu") == (True, pytest.approx(0, abs=100))
    kept, faults = run(JAX_PLATFORMS="cpu", MALLOC_ARENA_MAX="4")
    assert not kept and faults > 4000


def test_accelerators_and_own_settings_are_left_alone(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert not heap.keep_freed_memory()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert not heap.keep_freed_memory()
