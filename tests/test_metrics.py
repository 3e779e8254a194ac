"""Files, rates and progress of a run, with made-up numbers and clocks."""

import io
import json
import math
import os
import sys
import types

import pytest
from tensorboardX import proto

from vlm import metrics
from vlm.errors import UserError
from vlm.flops import StepFlops


def lines(workdir):
    return [json.loads(line) for line in (workdir / metrics.METRICS).read_text().splitlines()]


def test_jsonl_is_valid_and_restarts_drop_what_will_run_again(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, tensorboard=False)
    for step in (2, 4, 6):
        writer.write(step, {"loss": math.nan if step == 4 else step / 2})
    assert lines(tmp_path)[-1]["loss"] == 3.0 and lines(tmp_path)[1]["loss"] is None  # readable before close
    writer.close()
    with (tmp_path / metrics.METRICS).open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    writer = metrics.MetricsWriter(tmp_path, start_step=4, tensorboard=False)
    writer.write(6, {"loss": 9.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 1.0), (4, None), (6, 9.0)]


def test_dropping_lines_loses_none_when_the_disk_fails(tmp_path, monkeypatch):
    old = '{"step": 2}\n{"step": 4}\n'
    (tmp_path / metrics.METRICS).write_text(old)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        metrics.MetricsWriter(tmp_path, start_step=2, tensorboard=False)
    assert (tmp_path / metrics.METRICS).read_text() == old and os.listdir(tmp_path) == [metrics.METRICS]


def test_tensorboard_events(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    writer.write(3, {"loss": 1.5, "bad": math.inf})
    writer.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data, values = path.read_bytes(), {}
    while data:  # length, crc, payload, crc
        length = int.from_bytes(data[:8], "little")
        event = proto.event_pb2.Event.FromString(data[12 : 12 + length])
        values |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + length :]
    assert values == {"loss": (3, 1.5)}


def test_wandb_without_the_extra(tmp_path):
    with pytest.raises(UserError, match=r"pip install 'vlm\[wandb\]'"):
        metrics.MetricsWriter(tmp_path, tensorboard=False, wandb="project")


def test_wandb_goes_on_with_the_run_of_the_workdir(tmp_path, monkeypatch):
    started = []
    fake = types.SimpleNamespace(init=lambda **options: started.append(options))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("a", "a", "b"):
        (folder := tmp_path / name).mkdir(exist_ok=True)
        metrics.MetricsWriter(folder, tensorboard=False, wandb="project").close()
    ids = [options["id"] for options in started]
    assert ids[0] == ids[1] != ids[2] and all(options["resume"] == "allow" for options in started)


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)


def test_rates(monkeypatch):
    clock = Clock(monkeypatch)
    rates = metrics.Rates(examples=32, peak=20e12)
    for flops in (2e12, 8e12, 8e12, 2e12):
        rates.step(tokens=100, waited=0.25, flops=flops)
    clock.now += 10
    rates.pause(8)
    values = rates.report()
    assert values == {
        "steps_per_second": 2.0,
        "examples_per_second": 64.0,
        "tokens_per_second": 200.0,
        "data_wait_share": 0.5,
        "model_tflops_per_second": 10.0,
        "mfu": 0.5,
    }
    clock.now += 1
    assert rates.report()["steps_per_second"] == 0
    assert "mfu" not in metrics.Rates(1, None).report()


def test_progress_lines(monkeypatch):
    clock, stream = Clock(monkeypatch), io.StringIO()
    progress = metrics.Progress(100, start=20, stream=stream)
    clock.now += 50
    progress.report(30, {"loss": 2.3456, "examples_per_second": 870.0, "data_wait_share": 0.02, "mfu": 0.41})
    assert stream.getvalue() == ("step 30/100 | loss 2.346 | 870 examples/s | mfu 41.0% | data wait 2% | eta 5m50s\n")
    silent = metrics.Progress(10, stream=stream, enabled=False)
    silent.say("nothing")
    assert "nothing" not in stream.getvalue()


def test_progress_of_work_that_is_not_steps(monkeypatch):
    clock, stream = Clock(monkeypatch), io.StringIO()
    progress = metrics.Progress(100, start=20, stream=stream, unit="picture")
    for seconds, step, examples in ((9, 30, None), (2, 42, None), (3, 60, None), (10, 80, 12), (1, 100, None)):
        clock.now += seconds
        progress.moved(step, examples)
    assert stream.getvalue().splitlines() == [
        "picture 42/100 | 2 examples/s | eta 29s",
        "picture 80/100 | 0.5 examples/s | eta 8s",
        "picture 100/100 | 3.2 examples/s | eta 0s",
    ]


def test_progress_on_a_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    progress = metrics.Progress(10, stream=stream)
    progress.advance(4)
    progress.report(4, {"loss": 1.0})
    progress.close()
    assert "4/10" in stream.getvalue() and "loss 1" in stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59, "59s"), (245, "4m05s"), (14340, "3h59m")])
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text


class Scalar(float):
    """A device scalar that remembers when it was read."""

    read = ()

    def __int__(self):
        Scalar.read += (float(self),)
        return int(float(self))


def test_metrics_are_read_late_and_in_order(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, tensorboard=False)
    progress = metrics.Progress(9, stream=io.StringIO())
    report = metrics.Report(metrics.Rates(1, None), progress, writer, log_every=2, max_bad_steps=3)
    Scalar.read = ()
    for step in range(1, 6):
        report.dispatched(step, {"bad_steps_in_a_row": Scalar(step / 10), "loss": step}, 0, 0, StepFlops(0.0))
        assert len(Scalar.read) == max(0, step - report.LAG)
    with report.paused():
        assert Scalar.read == (0.1, 0.2, 0.3, 0.4, 0.5)
    report.evaluated(5, {"accuracy": 0.5})
    assert [line.get("loss") for line in lines(tmp_path)] == [2, 4, None]
    assert lines(tmp_path)[-1]["eval/accuracy"] == 0.5
    with pytest.raises(metrics.Diverged, match="3 steps in a row, up to step 8"):
        for step in range(6, 12):
            report.dispatched(step, {"bad_steps_in_a_row": step - 5}, 0, 0, StepFlops(0.0))
    writer.close()


def test_the_last_step_is_logged_whatever_the_interval(tmp_path):
    for last, log_every, logged in ((5, 2, [2, 4, 5]), (4, 2, [2, 4]), (5, 0, [])):
        (folder := tmp_path / f"{last} {log_every}").mkdir()
        writer = metrics.MetricsWriter(folder, tensorboard=False)
        stream = io.StringIO()
        progress = metrics.Progress(last, stream=stream)
        report = metrics.Report(metrics.Rates(1, None), progress, writer, log_every, 3, last)
        for step in range(1, last + 1):
            report.dispatched(step, {"bad_steps_in_a_row": 0, "loss": step}, 0, 0, StepFlops(0.0))
        report.settle()
        writer.close()
        assert [line["step"] for line in lines(folder)] == logged
        assert [int(line.split("/")[0][5:]) for line in stream.getvalue().splitlines()] == logged


def test_a_full_disk_stops_the_run_where_all_hosts_can_hear_of_it(tmp_path, monkeypatch):
    writer = metrics.MetricsWriter(tmp_path, tensorboard=False)
    report = metrics.Report(metrics.Rates(1, None), metrics.Progress(9, stream=io.StringIO()), writer, 1, 3)
    monkeypatch.setattr(writer, "write", lambda step, values: (_ for _ in ()).throw(OSError(28, "No space left")))
    for step in range(1, 5):
        report.dispatched(step, {"bad_steps_in_a_row": 0}, 0, 0, StepFlops(0.0))
    with pytest.raises(UserError, match=r"metrics\.jsonl: No space left"), report.paused():
        raise AssertionError("the run went on")
    writer.close()


def test_metrics_of_streams_are_means_of_the_steps_that_had_them(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, tensorboard=False)
    progress, counts = metrics.Progress(4, stream=io.StringIO()), {2: {"a": 1, "b": 1}, 4: {"a": 3, "b": 1}}
    report = metrics.Report(metrics.Rates(1, None), progress, writer, 2, 3, None, counts.get)
    shared = {"bad_steps_in_a_row": 0, "bad_steps": 0}
    steps = [
        {"loss": 1.0, "mim": 1.0, "learning_rate": 0.1},
        {"loss": 3.0, "mlm": 3.0, "learning_rate": 0.2},
        {"loss": 5.0, "mim": 5.0, "learning_rate": 0.3},
        {"loss": math.nan, "mim": math.nan, "learning_rate": 0.4, "bad_steps_in_a_row": 1, "bad_steps": 1},
    ]
    for step, values in enumerate(steps, 1):
        report.dispatched(step, shared | values, 0, 0, StepFlops(0.0))
    report.settle()
    writer.close()
    first, second = lines(tmp_path)
    wanted = {"loss": 2.0, "mim": 1.0, "mlm": 3.0, "learning_rate": 0.2, "steps/a": 1, "steps/b": 1}
    assert {name: first[name] for name in wanted} == wanted
    wanted = {"loss": 5.0, "mim": 5.0, "learning_rate": 0.4, "steps/a": 3, "bad_steps": 1}
    assert {name: second[name] for name in wanted} == wanted and "mlm" not in second
