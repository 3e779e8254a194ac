"""Starting weights: which arrays of which checkpoints go where."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vlm import initial, sharding
from vlm.checkpoint import Checkpoints, reading
from vlm.convert.views import from_array
from vlm.encoders.bert import BertConfig
from vlm.encoders.clip_text import ClipTextConfig
from vlm.encoders.vit import ViTConfig
from vlm.errors import UserError
from vlm.models.altclip.loss import LossConfig
from vlm.models.altclip.model import AltCLIPConfig
from vlm.schema import InitConfig, MeshConfig
from vlm.sharding import Placement
from vlm.training import TrainState


class Opened:
    """What `vlm.loading.open_model` gives, reduced to what is used here."""

    run, notes = None, ()
    config = AltCLIPConfig(vision=ViTConfig(8, 1, 2, 8, 8, 4), text=None, clip_text=ClipTextConfig(9, 8, 1, 4, 8))

    def __init__(self, **params):
        self.params = {path.replace("__", "/"): from_array(np.asarray(value)) for path, value in params.items()}


@pytest.fixture
def opened(monkeypatch):
    checkpoints = {
        "clip": Opened(vision__kernel=[1.0], text__kernel=[2.0], scale=3.0),
        "xlmr": Opened(text__kernel=[4.0]),
    }
    monkeypatch.setattr(initial, "open_model", checkpoints.__getitem__)


def placements():
    at = lambda path: Placement(path, (1,), np.dtype(np.float32), PartitionSpec(), 1)  # noqa: E731
    params = {"vision": {"kernel": at("a")}, "text": {"kernel": at("b")}, "scale": at("c")}
    extra = {"teacher": {"text": {"kernel": at("d")}}}
    return TrainState(at("s"), params, {}, {}, extra, {})  # pyright: ignore


def start(*entries, run=None):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices())
    return initial.starting_weights([InitConfig(**entry) for entry in entries], placements(), mesh, run)


def test_extra_takes_the_checkpoints_own_extra_state(opened, monkeypatch):
    kept = {"pretrained": {"teacher/text/kernel": from_array(np.array([6.0])), "queue": from_array(np.zeros(3))}}
    monkeypatch.setattr(initial, "open_extra", kept.get)
    found = start({"path": "clip"}, {"path": "pretrained", "into": "extra", "include": "teacher/.*"})
    assert float(found["extra/teacher/text/kernel"].read()[0]) == 6 and "extra/queue" not in found
    with pytest.raises(UserError, match=r"config\.init\[0\]: the run has no place for extra/queue"):
        start({"path": "pretrained", "into": "extra"})
    with pytest.raises(UserError, match=r"config\.init\[0\]: clip keeps no extra state"):
        start({"path": "clip", "into": "extra"})


def test_later_entries_win_and_teachers_go_into_extra(opened):
    found = start(
        {"path": "clip", "include": "(vision|text)/.*"},
        {"path": "xlmr"},
        {"path": "clip", "include": "text/.*", "into": "extra/teacher"},
    )
    values = {path: float(view.read()[0]) for path, view in found.items()}
    assert values == {"params/vision/kernel": 1.0, "params/text/kernel": 4.0, "extra/teacher/text/kernel": 2.0}
    assert initial.still_random(found, placements()) == "params/scale"
    assert start() == {}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"path": "clip", "include": "txet/.*"},
            r"init\[0\]\.include: 'txet/\.\*' matches none of vision/",
        ),
        ({"path": "clip", "include": "("}, r"config\.init\[0\]\.include: '\(' is not a regular expression"),
        ({"path": "clip", "into": "extra/teacher"}, "no place for extra/teacher/vision/kernel, extra/teacher/scale"),
    ],
)
def test_wrong_entries(opened, entry, message):
    with pytest.raises(UserError, match=message):
        start(entry)


MODEL = Opened.config
VISION, TEXT = "vision/.*", "text/.*"


@pytest.mark.parametrize(
    ("changes", "include", "told"),
    [
        ({}, ".*", None),
        ({"vision": {"num_heads": 4}}, VISION, "params/vision was .*: num_heads 2 there and 4 in the run"),
        ({"vision": {"num_heads": 4, "activation": "gelu"}}, TEXT, None),
        ({"clip_text": {"num_heads": 2}}, ".*", "params/text was trained .*: num_heads 4 there and 2 in the run"),
        ({"vision": {"activation": "gelu", "norm_eps": 1e-6}}, VISION, None),
        ({"text": BertConfig(9, 8, 1, 4, 8), "clip_text": None}, TEXT, "positions absolute there and roberta in the"),
    ],
)
def test_towers_must_compute_what_their_weights_were_trained_for(opened, caplog, changes, include, told):
    parts = {k: dataclasses.replace(getattr(MODEL, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
    run = initial.towers_of_run(dataclasses.replace(MODEL, **parts), LossConfig())
    if told is not None:
        with pytest.raises(UserError, match=rf"config\.init\[0\]: clip: .*{told}"):
            start({"path": "clip", "include": include}, run=run)
        return
    start({"path": "clip", "include": include}, run=run)
    differs = changes and include == VISION
    line = "other values than it was trained to: activation quick_gelu there and gelu in the run, norm_eps 1e-05"
    assert len(caplog.messages) == bool(differs) and all(line in message for message in caplog.messages)


def test_a_teacher_has_its_own_architecture_and_what_was_assumed_is_said(opened, caplog, monkeypatch):
    monkeypatch.setattr(Opened, "notes", ("heads of 64 assumed",))
    learning = {"objective": "teacher_learning", "teacher": ClipTextConfig(9, 8, 1, 1, 8)}
    run = initial.towers_of_run(MODEL, LossConfig(**learning))
    entry = {"path": "clip", "include": TEXT, "into": "extra/teacher"}
    with pytest.raises(UserError, match="extra/teacher/text .* num_heads 4 there and 1 .*; heads of 64 assumed"):
        start(entry, run=run)
    start(entry, run=initial.towers_of_run(MODEL, LossConfig()))
    assert caplog.messages == ["config.init[0]: clip: heads of 64 assumed"]


class Tokenizer:
    """One id per letter; `changes` are attributes."""

    vocab_size, pad_id, eos_id, first = 300, 1, 2, 3

    def __init__(self, **changes):
        vars(self).update(changes)

    def __call__(self, texts):
        return {"tokens": np.array([[self.first + ord(letter) % 200 for letter in text] for text in texts])}


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({}, None),
        ({"vocab_size": 299}, "vocab_size 299 there and 300 in the run"),
        ({"pad_id": 0, "eos_id": None}, "pad_id 0 there and 1 in the run, eos_id None there and 2 in the run"),
        ({"first": 4}, "'A photo of 2 cats.' .* there and .* in the run"),
        (None, None),
    ],
)
def test_another_tokenizer_than_the_runs_is_told(opened, caplog, monkeypatch, there, told):
    parts = {"params": {"text__token_embedding__embedding": [2.0], "vision__kernel": [1.0]}}
    source = Opened(**parts["params"])
    monkeypatch.setattr(initial, "open_model", lambda _: source)
    theirs = SimpleNamespace(tokenizer=Tokenizer(**there)) if there is not None else None
    monkeypatch.setattr(initial, "load_processor", lambda _: theirs)
    at = lambda: Placement("a", (1,), np.dtype(np.float32), PartitionSpec(), 1)  # noqa: E731
    tower = {"text": {"token_embedding": {"embedding": at()}}}
    state = TrainState(at(), tower | {"vision": {"kernel": at()}}, {}, {}, {"teacher": tower}, {})  # pyright: ignore
    mesh = sharding.make_mesh(MeshConfig(), jax.devices())

    def messages(processor, **entry):
        caplog.clear()
        initial.starting_weights([InitConfig("clip", **entry)], state, mesh, processor=processor)
        return caplog.messages

    run = SimpleNamespace(tokenizer=Tokenizer(), teacher_tokenizer=Tokenizer(vocab_size=7))
    trained = "params/text was trained with another tokenizer than config.processor.tokenizer"
    found = messages(run)
    assert len(found) == (told is not None)
    assert all(re.fullmatch(rf"config\.init\[0\]: clip: {trained}: {told}.*", message) for message in found), found
    assert messages(run, include=VISION) == [] == messages(SimpleNamespace(tokenizer=None))
    teacher = messages(run, include=TEXT, into="extra/teacher")
    assert len(teacher) == (there is not None)
    assert all(
        "extra/teacher/text was" in message and "config.processor.teacher_tokenizer" in message for message in teacher
    )


def test_a_processor_that_cannot_be_read_stops_no_start(opened, caplog, monkeypatch):
    source = Opened(text__token_embedding__embedding=[2.0])

    def damaged(_):
        raise UserError("damaged")

    monkeypatch.setattr(initial, "load_processor", damaged)
    initial._compare_tokenizers("clip", source, ["params/text/token_embedding/embedding"], SimpleNamespace(tokenizer=1))
    assert caplog.messages == []


def test_the_selected_half_of_a_run_is_all_that_is_read(tmp_path, monkeypatch):
    """Each leaf arrives with the target's sharding, and the other half is never asked of the disk."""
    kernel = np.arange(64, dtype=np.float32).reshape(16, 4)
    params = {"vision": {"kernel": jnp.asarray(kernel)}, "text": {"kernel": jnp.ones((8, 8))}}
    (tmp_path / "config.json").write_text("{}")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"params": params}, {}, "hash", wait=True)
    checkpoints.close()
    run = Opened(vision__kernel=kernel, text__kernel=np.ones((8, 8)))
    monkeypatch.setattr(run, "run", tmp_path)
    monkeypatch.setattr(initial, "open_model", lambda _: run)
    read, restore = [], reading._restore
    monkeypatch.setattr(
        reading, "_restore", lambda path, targets, args: read.extend(targets) or restore(path, targets, args)
    )
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8), jax.devices())
    target = Placement("params/vision/kernel", (16, 4), np.dtype(np.float32), PartitionSpec("fsdp"), 8)
    state = TrainState(target, {"vision": {"kernel": target}}, {}, {}, {}, {})  # pyright: ignore
    found = initial.starting_weights([InitConfig(path="run", include="vision/.*")], state, mesh)
    assert read == ["params/vision/kernel"]
    assert found.keys() == {"params/vision/kernel"}
    leaf = found["params/vision/kernel"]
    assert leaf.sharding.shard_shape(leaf.shape) == (2, 4) and len(leaf.addressable_shards) == 8
    np.testing.assert_array_equal(leaf, kernel)
