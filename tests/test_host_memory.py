"""Keeping freed memory: large blocks stop coming fresh from the kernel."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from vlm.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        np.ones(16 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(2)
print(faults(10))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an option of glibc's allocator")
def test_large_blocks_are_reused():
    run = lambda mode: int(  # noqa: E731
        subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True).stdout
    )
    # 10 blocks of 16 MiB are 40,960 small pages, fewer where the kernel hands out huge ones.
    assert run("keep") * 10 < run("plain")
