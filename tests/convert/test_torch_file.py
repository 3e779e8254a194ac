"""Every PyTorch container gives the same numbers; hostile and damaged ones end in one line."""

import argparse
import json
import os
import zipfile

import numpy as np
import pytest
import torch

from vlm.convert.torch_file import find_weights, open_tensors
from vlm.errors import UserError


def tensors():
    torch.manual_seed(0)
    state = {
        "f32": torch.randn(3, 4),
        "f64": torch.randn(2, dtype=torch.float64),
        "f16": torch.randn(5).half(),
        "bf16": torch.randn(2, 2).bfloat16(),
        "i64": torch.arange(5),
        "i32": torch.arange(3, dtype=torch.int32),
        "u8": torch.arange(4, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "transposed": torch.randn(6, 4).t(),
        "empty": torch.empty(0, 3),
        "part": torch.randn(10)[3:7],
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    state["tied"] = state["f32"]
    return state


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        tensor = tensor.detach()
        assert found[name].shape == tuple(tensor.shape), name
        assert str(found[name].dtype) == str(tensor.dtype).removeprefix("torch."), name
        np.testing.assert_array_equal(found[name].read().astype(np.float64), tensor.double().numpy(), name)


FORMATS = {
    "zip": {},
    "stream": {"_use_new_zipfile_serialization": False},
    "protocol 4": {"pickle_protocol": 4},
    "stream protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("wrapper", [(), ("state_dict",), ("model",), ("module", "state_dict")])
def test_formats_and_wrappers(tmp_path, options, wrapper):
    value = tensors()
    for key in wrapper:
        value = {"epoch": 3, key: value, "optimizer": {"state": {0: torch.ones(2)}}, "lr": 0.1}
    torch.save(value, tmp_path / "x.pt", **options)
    assert_same(open_tensors(tmp_path / "x.pt"), tensors())


def test_data_is_mapped_not_copied(tmp_path):
    torch.save(tensors(), tmp_path / "x.pt")
    view = open_tensors(tmp_path / "x.pt")["f32"]
    assert not view.read().flags.owndata and not view.read().flags.writeable
    np.testing.assert_array_equal(view.read((slice(1, 3), slice(0, 2))), view.read()[1:3, :2])


def test_state_dict_with_metadata_and_ddp_prefix(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save({"module." + k: v for k, v in module.state_dict().items()}, tmp_path / "ddp.pt")
    torch.save(module.state_dict(), tmp_path / "plain.pt")  # an OrderedDict with a _metadata attribute
    assert_same(open_tensors(tmp_path / "plain.pt"), module.state_dict())
    assert_same(open_tensors(tmp_path / "ddp.pt"), module.state_dict())


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_torchscript_archive(tmp_path):
    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Parameter(torch.randn(2, 3))
            self.blocks = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3))

        def forward(self, x):
            return self.blocks(x @ self.proj)

    tower = Tower().half()
    torch.jit.script(tower).save(str(tmp_path / "jit.pt"))
    assert_same(open_tensors(tmp_path / "jit.pt"), tower.state_dict())


def shards(folder, suffix):
    state = tensors()
    halves = [dict(list(state.items())[:7]), dict(list(state.items())[7:])]
    weight_map = {}
    for i, half in enumerate(halves):
        name = f"pytorch_model-{i}.{suffix}"
        torch.save(half, folder / name)
        weight_map |= dict.fromkeys(half, name)
    return weight_map, state


def test_sharded_folder(tmp_path):
    weight_map, state = shards(tmp_path, "bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(open_tensors(tmp_path), state)
    assert_same(open_tensors(index), state)
    index.write_text(json.dumps({"weight_map": weight_map | {"other": "pytorch_model-0.bin"}}))
    with pytest.raises(UserError, match="lack other"):
        open_tensors(tmp_path)
    for outside in ("../x.bin", "/etc/passwd", "..", "a/b.bin"):
        index.write_text(json.dumps({"weight_map": {"w": outside}}))
        with pytest.raises(UserError, match="outside the folder"):
            open_tensors(tmp_path)
    for damaged in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {}, "weight_map": {}}', "[" * 100_000):
        index.write_text(damaged)
        with pytest.raises(UserError, match="damaged"):
            open_tensors(tmp_path)


def test_choice_of_the_weight_file(tmp_path):
    with pytest.raises(UserError, match="found none"):
        find_weights(tmp_path)
    (tmp_path / "a.pt").touch()
    assert find_weights(tmp_path).name == "a.pt"
    (tmp_path / "b.pth").touch()
    with pytest.raises(UserError, match=r"several: a\.pt, b\.pth"):
        find_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "model.safetensors").touch()
    assert find_weights(tmp_path).name == "model.safetensors"


def rewrite(source, target, change):
    """Copies a zip archive with changed members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            result = change(info.filename, old.read(info))
            if result is not None:
                new.writestr(info.filename, result)


def test_small_storages_and_bombs_are_refused(tmp_path):
    path, bad = tmp_path / "x.pt", tmp_path / "bad.pt"
    torch.save({"w": torch.randn(100), "v": torch.randn(100)}, path)
    rewrite(path, bad, lambda name, data: data[:100] if name.endswith("data/0") else data)
    with pytest.raises(UserError, match="needs 400 bytes of storage, found 100"):
        open_tensors(bad)
    rewrite(path, bad, lambda name, data: None if name.endswith("data/1") else data)
    with pytest.raises(UserError, match="storage '1' is missing"):
        open_tensors(bad)
    rewrite(path, bad, lambda name, data: None if name.endswith("data.pkl") else data)
    with pytest.raises(UserError, match="not one that PyTorch wrote"):
        open_tensors(bad)
    rewrite(path, bad, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(UserError, match="big-endian"):
        open_tensors(bad)
    torch.save({"bomb": torch.zeros(1).expand(2**16, 2**16)}, bad)
    assert bad.stat().st_size < 4000
    with pytest.raises(UserError, match="4294967296 elements over a storage of 1"):
        open_tensors(bad)
    torch.save({f"t{i}": path for i, path in enumerate([torch.ones(1000)] * 50)}, bad)
    with pytest.raises(UserError, match="more elements than the file has bytes"):
        open_tensors(bad)


@pytest.mark.parametrize("options", [FORMATS["zip"], FORMATS["stream"]])
def test_truncation_and_bit_flips_never_crash(tmp_path, options):
    path, bad = tmp_path / "x.pt", tmp_path / "bad.pt"
    torch.save({"w": torch.randn(20), "v": torch.randn(3, 4)}, path, **options)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for end in [*range(0, len(whole), 97), len(whole) - 1]:
        bad.write_bytes(whole[:end])
        with pytest.raises(UserError):
            open_tensors(bad)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        bad.write_bytes(data)
        try:
            for view in open_tensors(bad).values():
                view.read()
        except UserError:
            pass


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/canary",)

    for options in FORMATS.values():
        torch.save({"state_dict": {"w": torch.ones(2)}, "config": Evil()}, tmp_path / "evil.pt", **options)
        with pytest.raises(UserError, match=r"refused: a reference to (posix|os)\.system"):
            open_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "canary").exists()


class Scales(torch.nn.Module):
    """A module with whatever a state dict has, and things that it has not."""

    def __init__(self, hostile=None):
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.absent = None
        self.register_parameter("nothing", None)
        self.register_buffer("running", torch.ones(2))
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
        self.attribute = {"tensor": torch.ones(5)} if hostile is None else hostile


@pytest.mark.parametrize("options", FORMATS.values())
def test_a_pickled_module_is_read_as_its_state_dict(tmp_path, options):
    module = Scales()
    for value in (module, {"model": module, "epoch": 3}, torch.nn.DataParallel(module)):
        torch.save(value, tmp_path / "module.pkl", **options)
        found = open_tensors(tmp_path / "module.pkl")
        expected = module.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(found[name].read(), tensor.numpy())


def test_code_in_a_pickled_module_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/canary",)

    for options in FORMATS.values():
        torch.save(Scales(hostile=Evil()), tmp_path / "evil.pkl", **options)
        assert open_tensors(tmp_path / "evil.pkl").keys() == Scales().state_dict().keys()
        torch.save([Scales(hostile=Evil())], tmp_path / "evil.pkl", **options)  # no module, but a list
        with pytest.raises(UserError, match=r"refused: a reference to"):
            open_tensors(tmp_path / "evil.pkl")
        torch.save({"_parameters": {"w": torch.ones(1)}, "_modules": {"x": Evil()}}, tmp_path / "evil.pkl", **options)
        with pytest.raises(UserError, match=r"refused: a reference to (posix|os)\.system"):
            open_tensors(tmp_path / "evil.pkl")
    assert not (tmp_path / "canary").exists()


def test_options_beside_the_weights_are_ignored(tmp_path):
    content = {"args": argparse.Namespace(lr=0.1, data=["a"]), "model": {"w": torch.ones(2)}, "epoch": 3}
    for options in FORMATS.values():
        torch.save(content, tmp_path / "checkpoint.pt", **options)
        assert list(open_tensors(tmp_path / "checkpoint.pt")) == ["w"]


def test_modules_nested_without_end_are_refused(tmp_path):
    module = Scales()
    module.layers.add_module("again", module)
    torch.save(module, tmp_path / "loop.pkl")
    with pytest.raises(UserError, match="nested deeper than 32"):
        open_tensors(tmp_path / "loop.pkl")
    wide = torch.nn.Module()
    for _ in range(30):  # 2**30 paths to one module
        wide, inner = torch.nn.Module(), wide
        wide.left, wide.right = inner, inner
    torch.save(wide, tmp_path / "wide.pkl")
    with pytest.raises(UserError, match="more than 200,000 entries"):
        open_tensors(tmp_path / "wide.pkl")
    content = {"w": torch.ones(1)}
    for _ in range(30):
        content = {"left": content, "right": content}
    torch.save(content, tmp_path / "wide.pt")
    with pytest.raises(UserError, match="more than 200,000 entries"):
        open_tensors(tmp_path / "wide.pt")


def test_other_files_are_named(tmp_path):
    path = tmp_path / "x.pt"
    for content, message in (
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
        (b"hello world, this is text", "neither"),
        (b"\x80\x02}q\x00.", "before 0.1.10"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_tensors(path)
    with pytest.raises(UserError, match="No such file"):
        open_tensors(tmp_path / "absent.pt")
    torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="no tensors found"):
        open_tensors(path)
    torch.save({"bad\nname": torch.ones(1)}, path)
    with pytest.raises(UserError, match="not printable"):
        open_tensors(path)
