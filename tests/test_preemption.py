"""Stop signals are remembered; a second one ends the process; several hosts agree on the step."""

import os
import signal
import subprocess
import sys

import pytest

from vlm import sharding
from vlm.preemption import LAG, Preemption
from vlm.schema import MeshConfig


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.stop()
        os.kill(os.getpid(), number)
        assert preemption.stop() and preemption.stop()
    assert signal.getsignal(number) == before


def test_a_second_signal_ends_the_process():
    code = (
        "import os, signal; from vlm.preemption import Preemption\n"
        "with Preemption():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('not reached', flush=True)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "still here\n" and run.returncode == 128 + signal.SIGTERM


def test_hosts_agree_after_a_fixed_number_of_steps():
    with Preemption(sharding.make_mesh(MeshConfig())) as preemption:
        answers = [preemption.stop() for _ in range(3)]
        os.kill(os.getpid(), signal.SIGTERM)
        answers += [preemption.stop() for _ in range(LAG + 1)]
    assert answers == [False] * (3 + LAG) + [True]
