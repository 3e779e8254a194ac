"""Keeping freed memory: large blocks stop coming fresh from the kernel."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
from vlm.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        bytearray(b"x") * (64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(2)
print(faults(10))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an option of glibc's allocator")
def test_large_blocks_are_reused():
    run = lambda mode: int(  # noqa: E731
        subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True).stdout
    )
    # 10 blocks of 64 MiB are 163,840 pages.
    assert run("keep") * 10 < run("plain")
