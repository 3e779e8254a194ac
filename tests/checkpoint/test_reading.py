import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm.checkpoint import Checkpoints, abstract_params, restore_params, verify_step
from vlm.errors import UserError
from vlm.manifest import write_manifest

KERNEL = np.arange(64 * 512, dtype=np.float32).reshape(64, 512)


@pytest.fixture
def workdir(tmp_path):
    """A run with steps 1 and 2; the kernel is averaged, the frozen table is not."""
    (tmp_path / "config.json").write_text(json.dumps({"family": "altclip", "model": {"width": 8}}))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        state = {
            "params": {"text": {"kernel": jnp.asarray(KERNEL * step)}, "frozen": jnp.ones(4, jnp.bfloat16)},
            "ema": {"text": {"kernel": jnp.asarray(KERNEL * step + 0.5)}},
            "opt_state": {"mu": jnp.zeros((64, 512))},
        }
        checkpoints.save(step, state, {}, "hash")
    checkpoints.close()
    return tmp_path


@pytest.mark.parametrize("where, step", [(".", 2), ("checkpoints", 2), ("checkpoints/1", 1)])
def test_parameters_alone(workdir, where, step):
    config, params = restore_params(workdir / where)
    assert config["model"] == {"width": 8}
    assert set(params) == {"text", "frozen"}
    np.testing.assert_array_equal(params["text"]["kernel"], KERNEL * step)
    assert params["frozen"].dtype == jnp.bfloat16


def test_averages_and_what_has_none(workdir):
    _, params = restore_params(workdir, ema=True)
    np.testing.assert_array_equal(params["text"]["kernel"], KERNEL * 2 + 0.5)
    np.testing.assert_array_equal(params["frozen"], np.ones(4))


def test_onto_a_mesh(workdir):
    mesh = Mesh(np.array(jax.devices()[:4]), ("a",))
    config, shapes = abstract_params(workdir)
    assert shapes["text"]["kernel"].shape == (64, 512) and config["family"] == "altclip"
    shardings = {"text": {"kernel": NamedSharding(mesh, P("a"))}, "frozen": NamedSharding(mesh, P())}
    _, params = restore_params(workdir, shardings=shardings)
    assert params["text"]["kernel"].sharding == shardings["text"]["kernel"]
    np.testing.assert_array_equal(params["text"]["kernel"], KERNEL * 2)
    with pytest.raises(UserError, match="no sharding given for frozen"):
        restore_params(workdir, shardings={"text": shardings["text"]})


def test_only_the_named_parameters(workdir):
    _, params = restore_params(workdir, only=["frozen"])
    assert params.keys() == {"frozen"}
    with pytest.raises(UserError, match="holds no parameters text/bias"):
        restore_params(workdir, only=["frozen", "text/bias"])


def damage(step_directory):
    data = max(step_directory.glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    return data


def test_damage_is_an_error_and_never_another_step(workdir):
    data = damage(workdir / "checkpoints" / "2")
    with pytest.raises(UserError, match=f"{data.name}: corrupted, SHA-256"):
        restore_params(workdir)
    assert (workdir / "checkpoints" / "2").exists()


def test_wrong_values_in_whole_files(workdir):
    path = workdir / "checkpoints" / "2"
    manifest = json.loads((path / "vlm_manifest.json").read_text())
    manifest["extra"]["leaves"]["params/text/kernel"]["hash"] = "0" * 16
    write_manifest(path, manifest["extra"])
    for call in (restore_params, verify_step):
        with pytest.raises(UserError, match="values differ from those that were saved: params/text/kernel"):
            call(path)


@pytest.mark.parametrize(
    "missing, message", [("config.json", "config.json: missing"), ("checkpoints", "no checkpoint")]
)
def test_what_is_missing_is_named(workdir, missing, message):
    (workdir / missing).rename(workdir / "elsewhere")
    with pytest.raises(UserError, match=message):
        restore_params(workdir)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_broken_configuration(workdir, text):
    (workdir / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="config.json"):
        restore_params(workdir)


def test_a_run_without_averages(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"params": {"w": jnp.ones(2)}, "ema": {}}, {}, "hash")
    checkpoints.close()
    with pytest.raises(UserError, match="without EMA"):
        restore_params(tmp_path, ema=True)


def test_model_folders_are_not_steps(tmp_path):
    write_manifest(tmp_path, {"family": "altclip"})
    with pytest.raises(UserError, match="holds no training step"):
        restore_params(tmp_path)
