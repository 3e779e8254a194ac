"""Kills real runs of train.py at random moments and compares what they end with; run by hand.

    python tests/faults/kill_training.py [--kills=25] [--per_run=5] [--seed=0] -- --config=configs/altclip.py:tiny [...]

One run is left alone. Others get SIGKILL at moments drawn uniformly from that run's duration, are started again with
the same command, up to `per_run` times, and then may finish. Every run must end with bit-identical parameters and
averages, and after every kill all numbered checkpoints must verify. The last line is JSON.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from vlm.checkpoint import verify_step  # noqa: E402
from vlm.checkpoint.steps import step_numbers  # noqa: E402


def run(arguments, workdir, kill_after=None):
    """Runs train.py; returns (exit status, or None when it was killed, and seconds)."""
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "train.py"), *arguments, f"--workdir={workdir}"]
    with (workdir.parent / f"{workdir.name}.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            return process.wait(kill_after), time.monotonic() - began
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None, time.monotonic() - began


def leaves(workdir):
    """{leaf: fingerprint} of the newest step, after checking it whole."""
    newest = workdir / "checkpoints" / str(step_numbers(workdir / "checkpoints")[-1])
    return {name: record["hash"] for name, record in verify_step(newest)["extra"]["leaves"].items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--per_run", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("train", nargs="+", help="arguments of train.py, after --")
    options = parser.parse_args()
    folder, chance = pathlib.Path(tempfile.mkdtemp(prefix="kills-")), random.Random(options.seed)

    status, seconds = run(options.train, folder / "undisturbed")
    assert status == 0, (folder / "undisturbed.log").read_text()[-3000:]
    expected = leaves(folder / "undisturbed")
    kills, number, left, different = 0, 0, [], 0
    while kills < options.kills:
        workdir = folder / f"run{number}"
        number, status = number + 1, None
        for _ in range(min(options.per_run, options.kills - kills)):
            status, _ = run(options.train, workdir, chance.uniform(0, seconds))
            if status is not None:
                break
            kills += 1
            steps = step_numbers(workdir / "checkpoints")
            for step in steps:
                verify_step(workdir / "checkpoints" / str(step))
            left.append(max(steps, default=0))
            print(f"kill {kills}: newest complete step {left[-1]}", flush=True)
        if status is None:
            status, _ = run(options.train, workdir)
        assert status == 0, (folder / f"{workdir.name}.log").read_text()[-3000:]
        different += leaves(workdir) != expected
    result = {"kills": kills, "runs": number, "different": different, "left": left, "seconds": round(seconds, 1)}
    print(json.dumps(result | {"leaves": len(expected), "folder": str(folder)}))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
