"""The command, run as users run it: whole runs of a toy family, stopped, resumed, on several devices and hosts."""

import functools
import json
import os
import pathlib
import re
import runpy
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import vlm.evaluation
from vlm.checkpoint import restore_params
from vlm.tree import flatten

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "train_toy" / "config.py"
train = runpy.run_path(str(ROOT / "train.py"))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": str(1000 + i * 2741 % 9000)}) + "\n" for i in range(40)))
    return path


def arguments(data, workdir, *more):
    return [f"--config={CONFIG}:{data}", f"--workdir={workdir}", "--config.train.tensorboard=False", *more]


def environment(devices):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONWARNINGS": "error::DeprecationWarning:vlm"}


def start(*arguments, devices=1):
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(
        command, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*arguments, capsys):
    """In this process, on its eight devices; returns (status, stdout, stderr)."""
    try:
        status = train["main"](list(arguments))
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


@pytest.fixture
def one_device(monkeypatch):
    """What runs in this process uses its first device."""
    import jax

    from vlm import sharding

    monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return {line["step"]: line["loss"] for line in metrics(workdir)}


def params(workdir):
    return {path: np.asarray(leaf) for path, leaf in flatten(restore_params(workdir)[1]).items()}


def test_a_run_leaves_its_records_and_can_be_continued(tmp_path, data, capsys):
    straight, split = tmp_path / "straight", tmp_path / "split"
    status, _, err = run(*arguments(data, straight, "--config.data.num_workers=0"), capsys=capsys)
    assert status == 0, err
    assert re.search(r"step 6/6 \| loss \d.* examples/s .* eta 0s", err) and "peak unknown" in err
    names = {path.name for path in straight.iterdir()}
    assert names >= {"config.json", "env.json", "metrics.jsonl", "checkpoints", "processor", "samples"}
    assert [p.name for p in (straight / "samples").iterdir()] == ["step_00000000.png"]
    last = metrics(straight)[-1]
    wanted = {"loss", "contrastive", "learning_rate", "grad_norm", "param_norm", "examples_per_second"}
    assert last["step"] == 6 and last.keys() >= wanted | {"tokens_per_second", "data_wait_share", "bad_steps"}

    same = arguments(data, split, "--config.data.num_workers=0")
    assert run(*same, "--config.train.steps=4", capsys=capsys)[0] == 0
    status, _, err = run(*same, capsys=capsys)
    assert status == 2 and "train.steps: 4 -> 6" in err and len(err.strip().splitlines()) == 1
    status, _, err = run(*same, "--allow_config_change", capsys=capsys)
    assert status == 0 and "resumed from step 4" in err
    assert losses(split) == losses(straight)
    ours, theirs = params(split), params(straight)
    assert ours.keys() == theirs.keys() and all((ours[path] == theirs[path]).all() for path in ours)
    assert len(json.loads((split / "env.json").read_text())) == 2


def test_a_signal_saves_and_the_next_start_goes_on_bit_for_bit(tmp_path, data, capsys, one_device):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    many = ("--config.train.steps=400", "--config.train.checkpoint_every=0", "--config.train.log_every=1")
    process = start(*arguments(data, stopped, *many))
    deadline = time.monotonic() + 90
    while not (stopped / "metrics.jsonl").exists() or len(metrics_so_far(stopped)) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    (step,) = [int(path.name) for path in (stopped / "checkpoints").iterdir() if path.name.isdigit()]
    assert 5 <= step < 400 and f"saved at step {step}" in err
    assert max(losses(stopped)) == step

    assert run(*arguments(data, stopped, *many), capsys=capsys)[0] == 0
    assert run(*arguments(data, straight, *many), capsys=capsys)[0] == 0
    assert losses(stopped) == losses(straight)
    ours, theirs = params(stopped), params(straight)
    assert all((ours[path] == theirs[path]).all() for path in theirs)


def metrics_so_far(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


@pytest.fixture
def mixed(data, tmp_path):
    """A configuration with two streams: texts with images, and texts alone."""
    alone = tmp_path / "alone.jsonl"
    alone.write_text("".join(json.dumps({"text": str(2000 + i * 7), "alone": 1}) + "\n" for i in range(30)))
    config = tmp_path / "mixed.py"
    config.write_text(
        f"import runpy\ndef get_config(data=''):\n    config = runpy.run_path({str(CONFIG)!r})['get_config'](data)\n"
        "    config.data.streams = {'pairs': 2.0, 'text': 1.0}\n"
        "    pairs, alone = {'kind': 'jsonl', 'path': data}, {'kind': 'jsonl', 'path': data[:-10] + 'alone.jsonl'}\n"
        "    alone |= {'fields': {'text': 'text', 'alone': 'alone'}}\n"
        "    config.data.sources = ({**pairs, 'stream': 'pairs'}, {**alone, 'stream': 'text'})\n"
        "    config.train.steps = 12\n    config.data.num_workers = 0\n    return config\n"
    )
    return f"--config={config}:{data}"


def test_a_run_of_two_streams_and_its_continuation(tmp_path, mixed, capsys):
    straight, split = (("--config.train.log_every=4", "--workdir=" + str(tmp_path / name)) for name in "ab")
    assert run(mixed, *straight, "--config.train.tensorboard=False", capsys=capsys)[0] == 0
    lines = metrics(tmp_path / "a")
    assert [line["steps/pairs"] + line["steps/text"] for line in lines] == [4, 8, 12]
    assert 0 < lines[-1]["steps/text"] < 12 and any("text" in line and "contrastive" in line for line in lines)
    for line, before in zip(lines, [{"steps/pairs": 0, "steps/text": 0}, *lines], strict=False):
        pairs, text = (line[f"steps/{name}"] - before[f"steps/{name}"] for name in ("pairs", "text"))
        assert ("text" in line, "contrastive" in line) == (text > 0, pairs > 0)
        mean = (pairs * line.get("contrastive", 0) + text * line.get("text", 0)) / 4
        assert line["loss"] == pytest.approx(mean, rel=1e-6)
    assert len(list((tmp_path / "a" / "samples").iterdir())) == 1

    assert run(mixed, *split, "--config.train.steps=5", "--config.train.tensorboard=False", capsys=capsys)[0] == 0
    more = ("--allow_config_change", "--config.train.tensorboard=False")
    status, _, err = run(mixed, *split, *more, capsys=capsys)
    assert status == 0 and "resumed from step 5" in err and re.search(r"batches of .*: .* GFLOP per step", err)
    ours, theirs = params(tmp_path / "b"), params(tmp_path / "a")
    assert ours.keys() == theirs.keys() and all((ours[path] == theirs[path]).all() for path in ours)
    last = metrics(tmp_path / "b")[-1]
    assert all(last[name] == lines[-1][name] for name in last if name in ("loss", "text", "contrastive", "steps/text"))
    status, _, err = run(mixed, *split, "--config.data.streams.pairs=3.0", capsys=capsys)
    assert status == 2 and "data.streams.pairs: 2.0 -> 3.0" in err


def test_two_streams_on_eight_devices_equal_one(tmp_path, mixed, capsys, monkeypatch):
    import jax

    from vlm import sharding

    more = ("--config.train.log_every=1", "--config.data.batch_size=16", "--config.optimizer.accumulation_steps=2")
    more += ("--config.train.tensorboard=False", "--config.model.dropout_rate=0.0")
    mesh = ("--config.sharding.mesh.data=2", "--config.sharding.mesh.fsdp=2", "--config.sharding.mesh.tensor=2")
    assert run(mixed, *more, *mesh, f"--workdir={tmp_path / 'several'}", capsys=capsys)[0] == 0
    one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", one)
    assert run(mixed, *more, f"--workdir={tmp_path / 'single'}", capsys=capsys)[0] == 0
    several, single = metrics(tmp_path / "several"), metrics(tmp_path / "single")
    assert [line["steps/text"] for line in several] == [line["steps/text"] for line in single]
    np.testing.assert_allclose([line["loss"] for line in several], [line["loss"] for line in single], rtol=1e-4)
    flops = [line["model_tflops_per_second"] / line["steps_per_second"] for line in single]
    kinds = {"text" in line: round(value * 1e18) for line, value in zip(single, flops, strict=True)}
    assert kinds[False] > kinds[True] > 0
    assert all(line["tokens_per_second"] / line["steps_per_second"] == pytest.approx(64) for line in single)


def test_a_run_that_cannot_report_leaves_nothing_behind(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, _, err = run(*arguments(data, tmp_path / "a" / "run", "--config.train.wandb=x"), capsys=capsys)
    assert status == 2 and "error: config.train.wandb needs the extra" in err
    assert not (tmp_path / "a").exists()


def test_two_processes_of_four_devices_equal_one_device(tmp_path, data, capsys, one_device):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    mesh = ("--config.sharding.mesh.data=2", "--config.sharding.mesh.fsdp=2", "--config.sharding.mesh.tensor=2")
    several, single = tmp_path / "several", tmp_path / "single"
    more = ("--config.train.log_every=1",)
    hosts = [
        start(
            *arguments(data, several, *mesh, *more),
            f"--coordinator=localhost:{port}",
            "--num_processes=2",
            f"--process_id={index}",
            devices=4,
        )
        for index in range(2)
    ]
    for process in hosts:
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
    assert run(*arguments(data, single, *more), capsys=capsys)[0] == 0
    ours, theirs = losses(several), losses(single)
    assert len(ours) == 6
    np.testing.assert_allclose([ours[s] for s in sorted(ours)], [theirs[s] for s in sorted(theirs)], rtol=1e-5)
    ours, theirs = params(several), params(single)
    for path in theirs:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-3, atol=1e-4, err_msg=path)


def host_pair(*arguments, devices=1):
    """Two processes of one run; returns their (status, stderr)."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = f"--coordinator=localhost:{port}", "--num_processes=2"
    hosts = [start(*arguments, *flags, f"--process_id={index}", devices=devices) for index in range(2)]
    try:
        errors = [process.communicate(timeout=120)[1] for process in hosts]
    finally:  # where one waits for the other
        for process in hosts:
            process.kill()
    return [(process.returncode, err) for process, err in zip(hosts, errors, strict=True)]


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_two_processes_refuse_the_folder_of_another_run(tmp_path, data, capsys):
    workdir = tmp_path / "run"
    assert run(*arguments(data, workdir, "--config.train.steps=2"), capsys=capsys)[0] == 0
    before = contents(workdir)
    for status, err in host_pair(*arguments(data, workdir, "--config.train.steps=4")):
        assert status == 2 and [line.startswith("error: ") for line in err.strip().splitlines()] == [True], err
        assert "was started with another configuration: train.steps: 2 -> 4" in err
    assert contents(workdir) == before


@pytest.mark.parametrize(("name", "message"), [("samples", "File exists"), ("metrics.jsonl", "Is a directory")])
def test_two_processes_stop_when_the_first_cannot_write(tmp_path, data, name, message):
    """`samples` is a file, or `metrics.jsonl` a folder: only the first host meets it."""
    path = tmp_path / "run" / name
    path.parent.mkdir()
    path.write_text("") if name == "samples" else path.mkdir()
    for status, err in host_pair(*arguments(data, path.parent)):
        assert status == 2 and f"error: {path}: {message}" in err, err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [".lock"]


def test_a_full_disk_is_one_line_after_the_metrics(tmp_path, data):
    """A limit on the size of files stands for the disk: configuration and metrics fit, the checkpoint does not."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments(data, tmp_path / "run", "--config.model.width=8192")]
    limited = ["sh", "-c", 'ulimit -f 32; exec "$@"', "sh", *command]
    done = subprocess.run(limited, env=environment(1), capture_output=True, text=True, check=False)
    *progress, last = done.stderr.strip().splitlines()
    assert done.returncode == 2 and last.startswith("error: checkpoint of step 2 failed: File too large; there is no")
    assert len(progress) <= 4 and all(re.match(r"1 x cpu|batches of|step \d/6 \| loss", line) for line in progress), (
        done.stderr
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [".lock"]


def test_evaluation_during_training_splits_batches_as_training_does(tmp_path, data, capsys, monkeypatch):
    config = tmp_path / "config.py"
    config.write_text(
        f"import runpy\ndef get_config(data=''):\n    config = runpy.run_path({str(CONFIG)!r})['get_config'](data)\n"
        "    rules = (('batch', 'data'), ('embed', None), ('mlp', 'fsdp'))\n"
        "    config.sharding = {'mesh': {'data': 4, 'fsdp': 2}, 'rules': rules}\n"
        "    config.eval = {'any': {'kind': 'zero_shot'}}\n    return config\n"
    )
    asked = []
    monkeypatch.setattr(vlm.evaluation, "prepare", lambda specs: specs)
    monkeypatch.setattr(vlm.evaluation, "check", lambda *_, **__: None)
    monkeypatch.setattr(vlm.evaluation, "run", lambda *_, **options: asked.append(options["batch_axes"]) or {"top1": 1})
    more = ("--config.train.eval_every=2", "--config.train.steps=2", "--config.train.tensorboard=False")
    flags = f"--config={config}:{data}", f"--workdir={tmp_path / 'run'}", *more
    assert run(*flags, capsys=capsys)[0] == 0
    assert asked == [("data",)]


def test_what_stays_whole_is_said_at_the_start_and_old_multiples_are_kept(tmp_path, data, capsys):
    mesh = ("--config.sharding.mesh.data=1", "--config.sharding.mesh.fsdp=8", "--config.train.steps=7")
    more = ("--config.train.checkpoint_every=1", "--config.train.keep=2", "--config.train.keep_every=3")
    status, _, err = run(*arguments(data, tmp_path / "run", *mesh, *more), capsys=capsys)
    assert status == 0
    found = [line for line in err.splitlines() if "replicated although a rule would split them" in line]
    reasons = "image/kernel: embed=3 is not divisible by fsdp=8, text/kernel: embed=4 is not divisible by fsdp=8"
    assert found == [f"replicated although a rule would split them: {reasons}"]
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept >= {"3", "6", "7"} and not kept & {"1", "2"}, kept
    assert metrics(tmp_path / "run")[-1]["step"] == 7


def test_endless_bad_steps_stop_the_run_and_leave_it_sound(tmp_path, data, capsys):
    """Every batch holds the poisoned example (the data are one batch long), so no step changes anything."""
    text = data.read_text().splitlines()[:8]
    data.write_text("\n".join(text) + "\n")
    more = ("--config.processor.poison=9223", "--config.train.max_bad_steps=3")
    status, _, err = run(*arguments(data, tmp_path / "run", *more), capsys=capsys)
    assert status.startswith("error: 3 steps in a row, up to step 3"), err
    (step,) = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert step == "2" and all(np.isfinite(leaf).all() for leaf in params(tmp_path / "run").values())


def test_dry_run(tmp_path, data, capsys):
    more = ("--config.sharding.mesh.fsdp=3", "--config.sharding.mesh.data=1", "--config.data.batch_size=9")
    status, out, _ = run(f"--config={CONFIG}:{data}", "--dry_run", *more, capsys=capsys)
    assert status == 0 and [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
    assert '"lr": 0.01' in out
    assert re.search(r"^total\s+64\s+64$", out, re.M) and re.search(
        r"^image/kernel\s+3x8\s+float32\s+fsdp, tensor", out, re.M
    )
    assert "text/kernel: embed=4 is not divisible by fsdp=3" in out
    assert re.search(r"^image\s+9x4x4x3\s+float32$", out, re.M)


def test_dry_run_without_the_data_tells_the_batch_from_the_settings(capsys):
    status, out, _ = run(f"--config={CONFIG}:/nowhere.jsonl", "--dry_run", capsys=capsys)
    batch = out.split("== one batch\n")[1]
    assert status == 0 and "/nowhere.jsonl" in batch
    assert re.search(r"^tokens\s+8x4\s+int32$", batch, re.M) and "unused" not in batch


def test_dry_run_shows_the_batches_of_every_stream(mixed, capsys):
    status, out, _ = run(mixed, "--dry_run", capsys=capsys)
    pairs, text = out.split("== one batch of ")[1:]
    assert status == 0 and pairs.startswith("pairs, 66.7% of the steps") and text.startswith("text, 33.3%")
    assert re.search(r"^image\s+8x4x4x3\s+float32$", pairs, re.M) and "image" not in text and "tokens" in text
    paths = [f"--config.data.sources[{i}].path=/nowhere.jsonl" for i in range(2)]
    pairs, text = run(mixed, "--dry_run", *paths, capsys=capsys)[1].split("== one batch of ")[1:]
    assert "8x4x4x3" in pairs and "8x4x4x3" not in text and "tokens" in text and "/nowhere.jsonl" in text


def test_help_is_quick():
    began = time.monotonic()
    out = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True, check=True)
    assert "--workdir" in out.stdout and "executed" in out.stdout
    assert time.monotonic() - began < 5  # 1.5 s on an idle machine
