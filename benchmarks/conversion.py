"""Memory and speed of conversion, on made-up checkpoints of published size.

    python -m benchmarks.conversion [--folder=/path/on/the/disk/to/measure] [--models=altclip,deep] [--repeats=2]

`altclip` is the published AltCLIP (864 M parameters, 3.46 GB, largest tensor 1.02 GB), `deep` a text tower of 240
layers (3.0 GB, largest tensor 4 MB): memory that grew with the number of layers would show there. Each conversion is
the command itself in a fresh process, alternating with a plain copy of the same bytes; both end with fsync, and both
read from the page cache. Prints one JSON object per model.

    peak_anonymous_mb   the process's highest RssAnon, sampled every 2 ms; limit_mb is 2.5 x largest tensor + 500
    speed_ratio         copy seconds / conversion seconds, start of Python and import of jax included
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vlm.convert.views import TensorView
from vlm.convert.writer import write_tensors
from vlm.encoders.bert import BertConfig
from vlm.loading import expected_params
from vlm.models import get_family
from vlm.models.altclip import weights
from vlm.models.altclip.model import AltCLIPConfig

DEEP_TEXT = BertConfig(vocab_size=1000, hidden_size=512, num_layers=240, num_heads=8, mlp_dim=2048)
MODELS = {
    "altclip": AltCLIPConfig(),
    "deep": AltCLIPConfig(vision=None, text=DEEP_TEXT, project_dim=512, projection_dim=None),
}
POOL = np.random.default_rng(0).integers(0, 2**8, 2**26, np.uint8)


def noise(shape: tuple[int, ...]) -> TensorView:
    """A lazy array of bytes that do not compress, taken from a fixed pool."""

    def fetch(index):
        sizes = tuple(part.stop - part.start for part in index)
        count = int(np.prod(sizes)) * 4
        return np.resize(POOL, count).view(np.float32).reshape(sizes)

    return TensorView(shape, np.dtype(np.float32), fetch)


def make_source(folder: Path, config: AltCLIPConfig) -> int:
    """Writes a Hugging Face folder of this architecture; returns the bytes of its largest tensor."""
    shapes = expected_params(get_family("altclip"), config)
    tensors, hf_config = weights.write(config, {path: noise(leaf.shape) for path, leaf in shapes.items()})
    tensors = {name: noise(view.shape) for name, view in tensors.items()}
    folder.mkdir()
    write_tensors(folder, "model", tensors, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config))
    return max(view.nbytes for view in tensors.values())


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a file durably."""
    start = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


@dataclasses.dataclass
class Conversion:
    """What one run of the command took."""

    seconds: float
    peak_anonymous: int


def convert(source: Path, target: Path, *options: str) -> Conversion:
    """Runs the command in a new process and watches its memory."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm.convert", str(source), str(target), *options], stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.002)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"conversion failed with status {process.returncode}")
    return Conversion(seconds, peak)


def anonymous_bytes(pid: int) -> int:
    """A process's resident anonymous memory."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def measure(name: str, folder: Path, repeats: int) -> dict[str, object]:
    """Alternates copies and conversions to ours, then converts back once."""
    largest = make_source(folder / "hf", MODELS[name])
    weights_file = folder / "hf" / "model.safetensors"
    copies, conversions = [], []
    for _ in range(repeats):
        copies.append(copy(weights_file, folder / "copy"))
        shutil.rmtree(folder / "ours", ignore_errors=True)
        conversions.append(convert(folder / "hf", folder / "ours"))
    back = convert(folder / "ours", folder / "back", "--to=hf")
    limit = 2.5 * largest + 500e6
    peak = max(run.peak_anonymous for run in (*conversions, back))
    seconds = [run.seconds for run in conversions]
    return {
        "model": name,
        "gigabytes": round(weights_file.stat().st_size / 1e9, 3),
        "largest_tensor_mb": round(largest / 1e6, 1),
        "peak_anonymous_mb": round(peak / 1e6, 1),
        "limit_mb": round(limit / 1e6, 1),
        "within_limit": peak <= limit,
        "copy_seconds": [round(x, 2) for x in copies],
        "convert_seconds": [round(x, 2) for x in seconds],
        "back_seconds": round(back.seconds, 2),
        "speed_ratio": round(statistics.median(copies) / statistics.median(seconds), 3),
    }


def main() -> None:
    """Measures the chosen models in a temporary folder and removes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=None, help="where to work (12 GB free); default: the temporary folder")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            print(json.dumps(measure(name, Path(folder), options.repeats)), flush=True)


if __name__ == "__main__":
    main()
