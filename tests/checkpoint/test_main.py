import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from vlm.checkpoint import Checkpoints
from vlm.checkpoint.__main__ import main
from vlm.manifest import write_manifest


@pytest.fixture
def workdir(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (10, 20):
        checkpoints.save(step, {"params": {"w": jnp.arange(4096.0) * step}}, {}, "hash")
    checkpoints.close()
    return tmp_path


def run(capsys, path):
    status = main(["verify", str(path)])
    lines = capsys.readouterr().out.splitlines()
    return status, lines[:-1], json.loads(lines[-1])


def test_sound(workdir, capsys):
    status, lines, summary = run(capsys, workdir)
    assert status == 0 and summary["ok"] and summary["problems"] == {"10": None, "20": None}
    assert len(lines) == 2 and lines[0].startswith(f"{workdir}/checkpoints/10: ok") and "1 leaves" in lines[0]
    assert run(capsys, workdir / "checkpoints" / "20")[2]["problems"] == {"20": None}


def test_one_bad_step(workdir, capsys):
    name = next((workdir / "checkpoints" / "10" / "d").iterdir())
    name.write_bytes(name.read_bytes()[:-1])
    status, lines, summary = run(capsys, workdir)
    assert status == 2 and not summary["ok"]
    assert "BAD" in lines[0] and str(name) in lines[0] and "ok" in lines[1]
    assert name.name in summary["problems"]["10"] and summary["problems"]["20"] is None
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.is_dir()) == ["10", "20"]


def test_values(workdir, capsys):
    step = workdir / "checkpoints" / "20"
    manifest = json.loads((step / "vlm_manifest.json").read_text())
    manifest["extra"]["leaves"]["params/w"]["shape"] = [4095]
    write_manifest(step, manifest["extra"])
    status, _, summary = run(capsys, step)
    assert status == 2 and summary["problems"]["20"]


def test_model_folder(tmp_path, capsys):
    (tmp_path / "params.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path, {"family": "altclip"})
    assert run(capsys, tmp_path)[0] == 0
    (tmp_path / "params.safetensors").write_bytes(b"weighty")
    assert run(capsys, tmp_path)[0] == 2


def test_as_a_command(tmp_path):
    command = [sys.executable, "-m", "vlm.checkpoint", "verify", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {tmp_path}/nowhere: no such file or directory\n"
