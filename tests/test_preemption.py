"""Stop signals are remembered or interrupt; a second one ends the process; several hosts agree on the step."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from vlm import sharding
from vlm.errors import UserError
from vlm.preemption import FAILED, LAG, Preemption, Stopped
from vlm.schema import MeshConfig


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        preemption.poll()
        os.kill(os.getpid(), number)
        for _ in range(2):
            with pytest.raises(Stopped):
                preemption.poll()
        with pytest.raises(Stopped), preemption.interrupting():
            raise AssertionError("began although a signal had come")
    assert signal.getsignal(number) == before


def test_a_signal_interrupts_a_wait():
    with Preemption() as preemption:
        began, timer = time.monotonic(), threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        with pytest.raises(Stopped), preemption.interrupting():
            time.sleep(30)
    assert time.monotonic() - began < 10


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


def several():
    """As with several hosts, all of them this one."""
    return Preemption(sharding.make_mesh(MeshConfig()))


@pytest.mark.parametrize(("made", "lag"), [(Preemption, 0), (several, LAG)])
def test_items_end_after_the_same_one_on_all_hosts(made, lag):
    """Every host has the items up to there; what is drawn ahead is dropped."""
    drawn = []

    def draw():
        drawn.append(len(drawn))
        if len(drawn) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        return drawn[-1]

    with made() as preemption:
        assert list(preemption.in_step(lambda: drawn.append(0) or len(drawn), 5)) == [1, 2, 3, 4, 5] == [*range(1, 6)]
        assert len(drawn) == 5
        drawn.clear()
        items = preemption.in_step(draw, 100)
        assert next(items) == 0 and len(drawn) == 1 + lag
        assert list(items) == [1, 2, 3, 4, 5, 6]
        assert list(preemption.in_step(draw, 100)) == []


@pytest.mark.parametrize("made", [Preemption, several])
def test_a_failure_comes_after_the_items_before_it(made):
    found = []

    def draw():
        if len(found) == 3:
            raise MemoryError
        found.append(len(found))
        return found[-1]

    taken = []
    with made() as preemption, pytest.raises(MemoryError):
        for item in preemption.in_step(draw, 9):
            taken.append(item)
    assert taken == found == [0, 1, 2]


def test_a_failure_of_another_host_is_an_error_here(monkeypatch):
    with several() as preemption:
        monkeypatch.setattr(preemption, "_several", lambda word: FAILED)
        with pytest.raises(UserError, match="another host failed"):
            next(preemption.in_step(int, 9))
