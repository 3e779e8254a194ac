import gc
import threading
import time

import numpy as np
import pytest

from vlm.data.batch import LoaderSettings
from vlm.data.loader import Loader
from vlm.errors import UserError


class Numbers:
    name = fingerprint = "numbers"

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return {"key": str(index), "value": index}


def plain(example, rng, train):
    return {"value": np.int64(example["value"])}


def loader(transform=plain, **options):
    return Loader([Numbers()], transform, LoaderSettings(4, **{"num_workers": 3, **options}))


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("loader-")]


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    deadline = time.monotonic() + 3
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


def test_close_and_with_stop_the_threads():
    with loader().iterate() as batches:
        next(batches)
        assert len(threads()) == 3
    assert not threads()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_dropping_the_iterator_stops_the_threads():
    batches = loader().iterate()
    next(batches)
    del batches
    gc.collect()
    assert not threads()


def test_two_iterations_do_not_disturb_each_other():
    shared = loader()
    with shared.iterate(3) as a, shared.iterate(3) as b:
        for _ in range(5):
            np.testing.assert_array_equal(next(a)["value"], next(b)["value"])


def test_only_so_many_batches_are_made_ahead():
    made = []

    def counting(example, rng, train):
        if example["value"]:  # the first, 0, is looked at to know which arrays there are
            made.append(example["value"])
        return plain(example, rng, train)

    with loader(counting, prefetch=2).iterate() as batches:
        next(batches)
        deadline = time.monotonic() + 2
        while len(made) < 12 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert len(made) == 12  # the one taken and two ahead


def test_an_exception_surfaces_at_once_though_another_worker_hangs():
    release = threading.Event()
    first = threading.Event()

    def failing(example, rng, train):
        if not first.is_set():
            first.set()
            release.wait(20)
        raise ZeroDivisionError("in a worker")

    batches = loader(failing).iterate()
    began = time.monotonic()
    threading.Timer(0.5, release.set).start()
    with pytest.raises(ZeroDivisionError, match="in a worker"):
        next(batches)
    assert time.monotonic() - began < 5


def test_a_killed_worker_is_an_error_not_a_hang():
    def leaving(example, rng, train):
        raise SystemExit(3)

    began = time.monotonic()
    with pytest.raises(SystemExit):
        next(loader(leaving).iterate())
    assert time.monotonic() - began < 5


def test_watchdog_prints_all_stacks_and_goes_on(capfd):
    def slow(example, rng, train):
        time.sleep(0.4)
        return plain(example, rng, train)

    with loader(slow, watchdog_seconds=0.1).iterate() as batches:
        next(batches)
        assert batches.wait_seconds >= 0.4
    printed = capfd.readouterr().err
    assert "data: no batch for 0 s (step 0); stacks of all threads:" in printed
    assert "in slow" in printed and printed.count("stacks of all threads") == 1


def test_a_hung_worker_ends_the_run():
    release = threading.Event()

    def hanging(example, rng, train):
        release.wait(20)
        return plain(example, rng, train)

    batches = loader(hanging, timeout_seconds=0.2).iterate()
    threading.Timer(0.6, release.set).start()
    began = time.monotonic()
    with pytest.raises(UserError, match="no batch for 0 s \\(timeout_seconds\\)"):
        next(batches)
    assert time.monotonic() - began < 5


def test_waiting_for_data_is_measured():
    with loader(num_workers=0).iterate() as batches:
        next(batches)
        assert 0 < batches.wait_seconds < 1
    with loader().iterate() as batches:
        next(batches)
        time.sleep(0.2)
        before = batches.wait_seconds
        next(batches)
        assert batches.wait_seconds - before < 0.1  # it was ready
