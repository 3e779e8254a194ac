"""Damage to committed checkpoints: never silent, and the run goes on from the step before."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.checkpoint import Checkpoints, saving
from vlm.checkpoint.__main__ import main
from vlm.errors import UserError
from vlm.manifest import MANIFEST_NAME

FLIPS, SEED = 300, 20261121
ABSTRACT = {
    "params": {name: jax.ShapeDtypeStruct((24, 32), jnp.float32) for name in ("up", "down")}
    | {"table": jax.ShapeDtypeStruct((32, 16), jnp.bfloat16)},
    "step": jax.ShapeDtypeStruct((), jnp.int32),
}


def full_state(step):
    """Random values: what weights look like to a compressor."""
    draw = np.random.default_rng(step).standard_normal
    params = {name: jnp.asarray(draw((24, 32)).astype(np.float32)) for name in ("up", "down")}
    return {"params": params | {"table": jnp.asarray(draw((32, 16)).astype(jnp.bfloat16))}, "step": jnp.int32(step)}


def assert_values(state, step):
    for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(full_state(step)), strict=True):
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A checkpoints folder with steps 1, 2 and 3; tests work on copies."""
    folder = tmp_path_factory.mktemp("template") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, full_state(step), {"position": step}, "hash")
    checkpoints.close()
    return folder


@pytest.fixture
def folder(template, tmp_path):
    return shutil.copytree(template, tmp_path / "checkpoints")


def files_of(step_directory):
    return sorted(path for path in step_directory.rglob("*") if path.is_file())


def step_of(path):
    return next(parent for parent in path.parents if parent.name == "3")


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


def draw_flips(step_directory):
    """Half of the flips uniform over all bits, half over files, so that small files get their share."""
    chance = random.Random(SEED)
    files = files_of(step_directory)
    sizes = [path.stat().st_size for path in files]
    for number in range(FLIPS):
        path = chance.choices(files, sizes)[0] if number % 2 else chance.choice(files)
        yield path, chance.randrange(8 * path.stat().st_size)


def test_no_bit_flip_is_silent(folder):
    checkpoints = Checkpoints(folder)
    hit = set()
    for path, bit in draw_flips(folder / "3"):
        flip(path, bit)
        with pytest.raises(UserError) as caught:
            checkpoints.restore(ABSTRACT, step=3)
        assert path.name in str(caught.value)  # the file is named
        flip(path, bit)
        hit.add(path.name)
    assert hit == {path.name for path in files_of(folder / "3")}
    assert_values(checkpoints.restore(ABSTRACT, step=3)[0], 3)
    checkpoints.close()


def test_fingerprints_alone_let_no_wrong_value_pass(folder):
    """Without the checksums of the files: damage that reaches a value is found, other damage does not matter.

    In a process of its own: where orbax gives up half-way it leaves coroutines that warn whenever they are collected.
    """
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["caught"] >= 50, counts


def flip_without_checksums(folder):
    saving._diagnose = lambda path, message: message or "unreadable"
    checkpoints = Checkpoints(folder, verify="fast")
    counts = {"caught": 0, "harmless": 0}
    for path, bit in draw_flips(folder / "3"):
        if path.name == MANIFEST_NAME:
            continue
        flip(path, bit)
        try:
            state, _, _ = checkpoints.restore(ABSTRACT, step=3)
        except UserError:
            counts["caught"] += 1
        else:
            counts["harmless"] += 1
            assert_values(state, 3)
        flip(path, bit)
    checkpoints.close()
    print(json.dumps(counts))


def truncate(path, chance):
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def zero(path, chance):
    content = bytearray(path.read_bytes())
    start = chance.randrange(max(1, len(content) - 4096))
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    path.write_bytes(content)


def delete(path, chance):
    path.unlink()


def grow(path, chance):
    path.write_bytes(path.read_bytes() + b"\0")


def swap(path, chance):
    others = [other for other in files_of(step_of(path)) if other.read_bytes() != path.read_bytes()]
    other = chance.choice(others)
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


def stale(path, chance):
    """The file of an earlier step in its place (or beside it, where names differ from step to step)."""
    step_directory = step_of(path)
    older = chance.choice(files_of(step_directory.with_name("2")))
    target = step_directory / older.relative_to(step_directory.with_name("2"))
    while target.exists() and target.read_bytes() == older.read_bytes():
        older = chance.choice(files_of(step_directory.with_name("2")))
        target = step_directory / older.relative_to(step_directory.with_name("2"))
    shutil.copyfile(older, target)


def stranger(path, chance):
    (path.parent / "notes.txt").write_text("hello")


def link(path, chance):
    target = path.parents[2] / f"outside-{chance.random()}"
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("fault", [truncate, zero, delete, grow, swap, stale, stranger, link])
def test_structural_faults_fall_back(template, tmp_path, fault):
    chance = random.Random(SEED)
    names = [path.relative_to(template / "3") for path in files_of(template / "3")]
    for trial in range(6):
        folder = shutil.copytree(template, tmp_path / str(trial))
        fault(folder / "3" / chance.choice(names), chance)
        checkpoints = Checkpoints(folder)
        state, step, data_state = checkpoints.restore(ABSTRACT)
        assert step == 2 and data_state == {"position": 2}
        assert_values(state, 2)
        assert (folder / "quarantine" / "3.0").is_dir() and checkpoints.steps() == [1, 2]
        checkpoints.save(3, full_state(3), {"position": 3}, "hash")  # and the run goes on
        assert_values(checkpoints.restore(ABSTRACT)[0], 3)
        checkpoints.close()


def test_the_command_finds_every_flip(folder, capsys):
    for number, (path, bit) in enumerate(draw_flips(folder / "3")):
        if number % 10 == 0:
            flip(path, bit)
            assert main(["verify", str(folder / "3")]) == 2
            assert path.name in capsys.readouterr().out
            flip(path, bit)
    assert main(["verify", str(folder)]) == 0


if __name__ == "__main__":
    flip_without_checksums(pathlib.Path(sys.argv[1]))
