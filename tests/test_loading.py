"""A saved model loads identically, on one device or sharded; damage is named; nothing half-written ever appears."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm
from vlm import loading
from vlm.convert.views import TensorView, from_array
from vlm.encoders.bert import BertConfig
from vlm.encoders.vit import ViTConfig
from vlm.errors import UserError
from vlm.manifest import MANIFEST_NAME
from vlm.models import get_family
from vlm.models.altclip.model import AltCLIPConfig
from vlm.models.altclip.processor import Processor
from vlm.schema import MeshConfig
from vlm.sharding import make_mesh
from vlm.strict import plain
from vlm.tokenizers.spm import train_sentencepiece
from vlm.tree import flatten, unflatten

FAMILY = get_family("altclip")
CONFIG = AltCLIPConfig(
    vision=ViTConfig(16, 2, 2, 32, 16, 8),
    text=BertConfig(64, 16, 2, 2, 32, 20),
    project_dim=8,
    projection_dim=8,
)


@pytest.fixture(scope="module")
def model():
    return FAMILY.module(CONFIG)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = loading.expected_params(FAMILY, CONFIG)
    return unflatten({name: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for name, leaf in shapes.items()})


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    from vlm.data.image import ImageSettings
    from vlm.tokenizers import load

    path = tmp_path_factory.mktemp("spm") / "sentencepiece.bpe.model"
    train_sentencepiece([f"a photo of {word} number {i}" for i in range(40) for word in ("cat", "dog")], path, 32)
    return Processor(load(path), ImageSettings(size=16, crop=16), max_length=8)


@pytest.fixture
def folder(tmp_path, model, params, processor):
    vlm.save(tmp_path / "saved", model, params, processor)
    return tmp_path / "saved"


def assert_same(found, expected):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype and np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path


def test_save_and_load_are_inverse(folder, model, params, processor):
    loaded, found, other = vlm.load(folder)
    assert loaded == model
    assert_same(found, params)
    batch, again = (p(texts=["a photo of cat"]) for p in (processor, other))
    np.testing.assert_array_equal(batch["tokens"], again["tokens"])
    assert other.image_settings == processor.image_settings
    assert sorted(path.name for path in folder.parent.iterdir()) == ["saved"]
    vlm.save(folder.parent / "again", loaded, found, other)
    for path in folder.iterdir():
        assert path.read_bytes() == (folder.parent / "again" / path.name).read_bytes(), path.name


def test_sharded_loading_reads_only_its_slices(folder, params, monkeypatch):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    sizes = {}
    read = TensorView.read

    def counting(self, index=None):
        data = read(self, index)
        if index is not None:
            sizes[self.shape] = max(sizes.get(self.shape, 0), data.size)
        return data

    monkeypatch.setattr(TensorView, "read", counting)
    _, found, _ = vlm.load(folder, mesh=mesh)
    assert_same(found, params)
    kernel = found["text"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 4, 16)
    assert sizes[(2, 16, 32)] == 2 * 4 * 16  # an eighth, never the whole
    rules = [(name, None) for name, _ in loading.ShardingConfig().rules]
    _, found, _ = vlm.load(folder, mesh=mesh, rules=rules)
    assert found["text"]["layers"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated


def test_loaded_arrays_do_not_alias_the_file():
    """Aligned NumPy memory is adopted by jax without copying: a changed file would change the parameters."""
    memory = np.zeros(4096 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    mapped = memory[start : start + 4096].view(np.float32)
    loaded = loading._put(from_array(mapped), None)
    mapped[:] = 1
    assert not np.asarray(loaded).any()


def test_dtype(folder):
    model, found, _ = vlm.load(folder, dtype="bfloat16")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in flatten(found).values())
    assert model.config.vision.dtype == model.config.text.dtype == "bfloat16"
    batch = {"image": np.zeros((1, 16, 16, 3), np.float32), "tokens": np.array([[0, 5, 2]])}
    image = jax.eval_shape(lambda: model.apply({"params": found}, **batch).vision_model_output.last_hidden_state)
    assert image.dtype == jnp.bfloat16


def test_training_runs_in_all_their_forms(tmp_path, model, params, processor):
    from vlm.checkpoint import Checkpoints

    config = {"family": "altclip", "model": json.loads(json.dumps(plain(CONFIG))), "precision": {"compute": "float32"}}
    del config["model"]["vision"]["dtype"], config["model"]["text"]["dtype"]  # a run records it once, as precision
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor.save(tmp_path / "processor")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    average = jax.tree.map(lambda leaf: leaf + 1, params)
    checkpoints.save(3, {"params": params, "ema": average}, {}, "hash")
    checkpoints.close()
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "3"):
        loaded, found, other = vlm.load(path)
        assert loaded == model and other.max_length == 8
        assert_same(found, params)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    _, found, _ = vlm.load(tmp_path, mesh=mesh, ema=True)
    assert_same(found, average)
    assert not found["text"]["layers"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated
    _, found, _ = vlm.load(tmp_path, dtype="bfloat16")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in flatten(found).values())


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_corrupted_files_are_named(folder):
    rng = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        for bit in rng.integers(0, path.stat().st_size * 8, 5):
            flip(path, int(bit))
            with pytest.raises(UserError, match=path.name):
                vlm.load(folder)
            flip(path, int(bit))
    vlm.load(folder)
    for name in ("params.safetensors", "config.json", MANIFEST_NAME):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-7])
        with pytest.raises(UserError, match=name):
            vlm.load(folder, verify="fast")
        (folder / name).write_bytes(content)


def test_save_refuses_what_it_must(folder, model, params):
    with pytest.raises(UserError, match="saved: exists already"):
        vlm.save(folder, model, params)
    wrong = {**params, "extra": np.zeros(2)}
    del wrong["logit_scale"]
    with pytest.raises(UserError, match="unknown tensor extra; missing logit_scale"):
        vlm.save(folder.parent / "new", model, wrong)

    class Broken:
        def save(self, path):
            (path / "half").write_text("")
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        vlm.save(folder.parent / "new", model, params, Broken())
    assert sorted(path.name for path in folder.parent.iterdir()) == ["saved"]


def test_a_model_folder_without_processor(tmp_path, model, params):
    vlm.save(tmp_path / "bare", model, params)
    assert vlm.load(tmp_path / "bare")[2] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 9}, "format version 9, this release reads 1"),
        ({"family": "altclop"}, "expected a known family, found 'altclop'; did you mean 'altclip'"),
        ({"model": {"visio": {}}}, "model.visio does not exist; did you mean 'vision'"),
    ],
)
def test_foreign_versions_and_families(folder, change, message):
    from vlm.manifest import write_manifest

    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder, {})
    with pytest.raises(UserError, match=message):
        vlm.load(folder)


def test_a_config_that_does_not_fit_the_weights(folder):
    from vlm.manifest import write_manifest

    config = json.loads((folder / "config.json").read_text())
    config["model"]["vision"]["num_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder, {})
    with pytest.raises(UserError, match=r"vision/layers/attention/key/bias: expected shape \[3, 16\], found \[2, 16\]"):
        vlm.load(folder)


def test_paths_that_hold_nothing(tmp_path, folder):
    with pytest.raises(UserError, match="absent: no such file or folder"):
        vlm.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected one weight file"):
        vlm.load(tmp_path / "empty")
    with pytest.raises(UserError, match="load the folder"):
        vlm.load(folder / "params.safetensors")
    with pytest.raises(UserError, match="vlm's own"):
        vlm.load(folder, overrides={"vision.activation": "gelu"})
