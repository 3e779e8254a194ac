"""Precomputed teacher embeddings: the same loss as the live teacher's, every sentence once, wrong calls in one line."""

import dataclasses
import json
import re
import shlex
import threading

import flax.linen as nn
import jax
import numpy as np
import pytest

import train
import vlm
from vlm import dry_run, precompute
from vlm.config import build, parse_config_flag
from vlm.data.cache_parts import CacheParts
from vlm.data.ledger import FatalDataError
from vlm.data.teacher_cache import TeacherCache, write_cache
from vlm.errors import UserError
from vlm.experiment import experiment, make_loader, make_processor, open_data
from vlm.models import get_family
from vlm.models.altclip import AltCLIP, AltCLIPConfig, example
from vlm.models.flava import FLAVA, FLAVAConfig
from vlm.precompute.running import computed
from vlm.precompute.sentences import _sentences as sentences
from vlm.precompute.words import pictures, training_flags
from vlm.schema import Config
from vlm.sharding import make_mesh

CONFIG = "configs/altclip.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_data):
    """Demo data and a random CLIP in the place of the trained one."""
    folder = tmp_path_factory.mktemp("precompute")
    (folder / "data").symlink_to(demo_data)
    settings = build(Config, parse_config_flag(f"configs/digits.py:clip,{folder}"), "")
    config = build(AltCLIPConfig, settings.model, "model")
    model = AltCLIP(config)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), **example(config)))["params"]
    vlm.save(folder / "clip", model, params)
    return folder


def _loss(variant, folder, extra, **changes):
    """The first batch's loss with the student at its initial weights."""
    config = parse_config_flag(f"{CONFIG}:{variant},{folder}")
    config.data.batch_size = 16
    config.update(changes)
    if "cached" in variant and "data" not in changes:
        config.data.teacher_cache = str(folder / "cache")
    settings = build(Config, config, "")
    parts = experiment(settings)
    split = jax.sharding.NamedSharding(
        make_mesh(settings.sharding.mesh, jax.devices()[:1]), jax.sharding.PartitionSpec()
    )
    loader = make_loader(settings, make_processor(settings, parts.family), split, None)
    with loader.iterate(0) as batches:
        batch = next(batches)
    params = nn.unbox(jax.jit(parts.init.init_params)(jax.random.key(1)))
    value, _ = jax.jit(parts.loss)(params, extra, batch, jax.random.key(2))
    return float(value), set(batch)


@pytest.fixture
def several(folder, tmp_path):
    """Twelve pairs, most with several English sentences, of which training draws one."""
    texts = [[f"a {word} digit", f"{word} on paper", f"the number {word}"] for word in ("zero", "one", "two")]
    lines = [{"source_text": texts[i % 3][: 1 + i % 3], "text": f"cifra {i}"} for i in range(11)]
    lines.append({"source_text": "a nine", "text": "nueve"})
    (tmp_path / "several.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"sources": ({"kind": "jsonl", "path": str(tmp_path / "several.jsonl")},)}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", None)])
def test_of_several_sentences_the_same_one_is_drawn(folder, several, tmp_path, dtype, tolerance, capsys):
    """Float16 rounds numbers to 2^-11 of their size, and the smallest to 2^-25: a loss that is the mean of squared
    distances s - t moves by at most the mean of 2 |s - t| e + e^2, where e is what rounding moves t by.
    """
    flags = [f"--config.data.sources={several['sources']}", f"--dtype={dtype}", f"--output={tmp_path / 'cache'}"]
    assert precompute.main([f"--config={CONFIG}:tiny_teacher,{folder}", *flags]) == 0
    assert "left out" not in capsys.readouterr().err
    cache = TeacherCache(tmp_path / "cache")
    assert len(cache) == 3 + 2 + 1 + 1  # of list 1 of 3 the first, of list 2 two, of list 3 all, and the string
    teacher = {k: v for k, v in vlm.load(folder / "clip")[1].items() if k in ("text", "text_projection")}
    live, _ = _loss("tiny_teacher", folder, {"teacher": teacher}, data=several)
    cached, _ = _loss("tiny_teacher_cached", folder, {}, data=several | {"teacher_cache": str(tmp_path / "cache")})
    if tolerance is None:
        rows = np.abs(cache.lookup(["a zero digit", "one on paper", "the number two", "a nine"]))
        error = max(2.0**-11 * float(rows.max()), 2.0**-25)
        tolerance = (
            2 * np.sqrt(live) * error + error**2
        ) / live  # the mean of |s - t| is at most that of squares' root
    assert live > 0.1 and 0 < tolerance < 0.01
    np.testing.assert_allclose(cached, live, rtol=tolerance)


def test_cached_and_live_teacher_give_the_same_loss(folder, capsys):
    config = f"--config={CONFIG}:tiny_teacher,{folder}"
    assert precompute.main([config, f"--output={folder / 'cache'}", "--dtype=float32", "--batch_size=13"]) == 0
    cache = TeacherCache(folder / "cache", verify=True)
    said = capsys.readouterr()
    command = shlex.split(said.out.partition("train with ")[2])
    followed = build(Config, parse_config_flag(f"{CONFIG}:tiny_teacher,{folder}", command), "")
    assert followed.data.teacher_cache == str(folder / "cache") and experiment(followed).loss_config.teacher is None
    assert [entry.into for entry in followed.init] == ["params"]
    assert f"{len(cache)} sentences" in said.out and re.search(r"^pair (\d+)/\1 \| ", said.err, re.M)
    _, params, _ = vlm.load(folder / "clip")
    live, live_keys = _loss("tiny_teacher", folder, {"teacher": {k: params[k] for k in ("text", "text_projection")}})
    cached, cached_keys = _loss("tiny_teacher_cached", folder, {})
    settings = parse_config_flag(
        f"{CONFIG}:tiny_teacher_cached,{folder}", [f"--config.data.teacher_cache={folder}/cache"]
    )
    from_data = dry_run.describe(build(Config, settings, ""), settings).split("== one batch")[1]
    assert f"target  64x{cache.dim}  float32" in re.sub(" +", "  ", from_data)
    assert live > 0.1 and "teacher_tokens" in live_keys and cached_keys == {"tokens", "mask", "target"}
    np.testing.assert_allclose(cached, live, rtol=1e-6)
    assert precompute.main([config, f"--output={folder / 'half'}", "--dtype=float16", "--batch_size=16"]) == 0
    half = TeacherCache(folder / "half")
    assert (half.teacher, half.dim, len(half)) == (cache.teacher, cache.dim, len(cache))


@pytest.mark.parametrize("data", ["prepared", "absent"])
def test_dry_run_shows_the_targets(folder, data):
    config = parse_config_flag(f"{CONFIG}:tiny_teacher_cached,{folder}")
    config.data.teacher_cache = str(folder / data)
    if data == "prepared":
        write_cache(folder / data, [(["zero"], np.zeros((1, 64), np.float32))], teacher="pooled:x")
        config.data.sources = ({"kind": "jsonl", "path": str(folder / "one.jsonl")},)
        (folder / "one.jsonl").write_text('{"source_text": "zero", "text": "cero"}')
    batch = dry_run.describe(build(Config, config, ""), config).split("== one batch")[1]
    assert re.search(r"^target +64x64 +float32$", batch, re.M), batch
    assert ("not available here" in batch) == (data == "absent") and "teacher_tokens" not in batch


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("tiny", [], "expected objective 'teacher_learning' with a live teacher"),
        ("tiny_teacher_cached", [], "expected objective 'teacher_learning' with a live teacher"),
        ("tiny_teacher", ["--config.init=()"], "no checkpoint gives the teacher's weights"),
    ],
)
def test_wrong_calls_end_in_one_line_and_leave_nothing(variant, options, message, folder, capsys, tmp_path):
    arguments = [f"--config={CONFIG}:{variant},{folder}", f"--output={tmp_path / 'cache'}", *options]
    with pytest.raises(SystemExit) as stop:
        precompute.main(arguments)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in error and error.count("\n") == 0
    assert list(tmp_path.iterdir()) == []


FLAVA_CONFIG = "configs/flava.py"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory, scenes_folder):
    """A folder with scenes and a random codebook of the tiny FLAVA, and the config flag that reads them."""
    folder = tmp_path_factory.mktemp("flava")
    (folder / "scenes").symlink_to(scenes_folder)
    settings = build(Config, parse_config_flag(f"{FLAVA_CONFIG}:tiny,{folder}"), "")
    config = build(FLAVAConfig, settings.model, "model")
    alone = dict.fromkeys(("vision", "text", "fusion", "projection_dim"), None)
    model = FLAVA(dataclasses.replace(config, **alone, heads=False))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(3)))["params"]
    vlm.save(folder / "codebook", model, params)
    init = f"--config.init=({{'path': '{folder / 'codebook'}'}},)"
    return folder, [f"--config={FLAVA_CONFIG}:tiny,{folder}", init], model, params


def _first_batch(folder, **changes):
    config = parse_config_flag(f"{FLAVA_CONFIG}:tiny,{folder}")
    config.data.update({"batch_size": 4, **changes.pop("data", {})})
    config.processor.update(changes)
    config.processor.augment = None
    settings = build(Config, config, "")
    split = jax.sharding.NamedSharding(
        make_mesh(settings.sharding.mesh, jax.devices()[:1]), jax.sharding.PartitionSpec()
    )
    loader = make_loader(settings, make_processor(settings, get_family("flava")), split, None)
    with loader.iterate(0) as batches:
        return loader, next(batches)


def test_cached_visual_words_are_the_codebooks(scenes, capsys):
    folder, flags, model, params = scenes
    words = folder / "words"
    options = ["--config.processor.augment=None", f"--output={words}", "--batch_size=3"]
    assert precompute.main([*flags, *options]) == 0
    said = capsys.readouterr()
    assert "4 pictures" in said.out and re.search(r"^picture (\d+)/\1 \| ", said.err, re.M)
    command = shlex.split(said.out.partition("train with ")[2])
    assert train.main([flags[0], *command, f"--workdir={folder / 'run'}", "--dry_run"]) == 0
    batches = capsys.readouterr().out.split("== one batch of ")[1:]
    shown = [re.search("^patch_labels +32x36 +int32$", batch, re.M) for batch in batches]
    assert [bool(found) for found in shown] == [True, True, False]
    assert "codebook_image" not in "".join(batches)
    cache = TeacherCache(words, verify=True)
    assert (cache.dim, len(cache)) == (36, 4) and cache.teacher.startswith("codebook:")
    live, batch = _first_batch(folder)
    cached, joined = _first_batch(folder, codebook_size=None, data={"codebook_cache": str(words)})
    assert batch.keys() ^ joined.keys() == {"codebook_image", "patch_labels"}
    expected = model.apply({"params": params}, batch["codebook_image"], method=model.codebook_labels)
    assert joined["patch_labels"].dtype == np.int32 and len(np.unique(joined["patch_labels"])) > 1
    np.testing.assert_array_equal(joined["patch_labels"], expected)
    assert live.fingerprint != cached.fingerprint


def _content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_stop_changes_no_byte(scenes, tmp_path, monkeypatch, capsys):
    """Three parts of three records: in one go; stopped after the first and gone on with."""
    _, flags, _, _ = scenes
    flags = [*flags, "--config.processor.augment=None", "--batch_size=2", "--part_size=3"]
    assert precompute.main([*flags, f"--output={tmp_path / 'whole'}"]) == 0
    expected, written, write = _content(tmp_path / "whole"), [], CacheParts.write

    def killed(self, number, *more):
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, *more)

    def counted(self, number, *more):
        written.append(number)
        write(self, number, *more)

    monkeypatch.setattr(CacheParts, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        precompute.main([*flags, f"--output={tmp_path / 'one'}"])
    assert not (tmp_path / "one").exists()
    monkeypatch.setattr(CacheParts, "write", counted)
    with pytest.raises(SystemExit):
        precompute.main([*flags, f"--output={tmp_path / 'one'}", "--batch_size=4"])
    assert "one.parts: begun with other batch_size" in capsys.readouterr().err
    assert precompute.main([*flags, f"--output={tmp_path / 'one'}"]) == 0
    assert written == [1, 2] and _content(tmp_path / "one") == expected

    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "whole"]


def test_visual_words_are_refused_where_they_would_be_wrong(scenes, tmp_path, capsys):
    folder, flags, _, _ = scenes
    output = f"--output={tmp_path / 'words'}"
    whole = ["--config.processor.augment=None", output]
    texts = {"kind": "jsonl", "path": "/nowhere/texts.jsonl", "fields": {"text": "text"}}
    for more, message in (
        ([output], "config.processor.augment: expected None, found random crops"),
        ([*whole, "--config.model.codebook=None"], "config.model.codebook: expected the codebook, found None"),
        ([*whole, "--config.processor.codebook_size=None"], "codebook_size: expected 48, found None"),
        ([*whole, "--config.processor.codebook_size=40"], "codebook_size: expected 48, found 40"),
        ([*whole, "--config.data.streams={}", f"--config.data.sources=({texts},)"], "found no source with an image"),
        ([*whole, "--config.init=()"], "config.init: no checkpoint gives the codebook's weights"),
    ):
        with pytest.raises(SystemExit) as stop:
            precompute.main([*flags, *more])
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and message in error and error.count("\n") == 0
    assert list(tmp_path.iterdir()) == []
    cached = {"data": {"codebook_cache": str(folder / "words")}}
    with pytest.raises(UserError, match="codebook_size: expected None with config.data.codebook_cache, found 48"):
        _first_batch(folder, **cached)
    changes = {"data.codebook_cache": folder / "words", "processor.augment": None, "processor.codebook_size": None}
    changes |= {"model.codebook": None, "model.image_vocab_size": 32}
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    settings = build(Config, parse_config_flag(f"{FLAVA_CONFIG}:tiny,{folder}", flags), "")
    with pytest.raises(UserError, match=r"image_vocab_size: expected the 64 visual words of .*words, found 32"):
        open_data(settings, make_processor(settings, get_family("flava")), settings.data.sources)
    with pytest.raises(UserError, match=r"36 visual words, but \(3, 3\) patches"):
        _first_batch(folder, **cached, codebook_size=None, patch_size=8)


@pytest.mark.parametrize("data", ["prepared", "absent"])
def test_dry_run_shows_visual_words(scenes, data, tmp_path):
    folder = scenes[0] if data == "prepared" else tmp_path
    changes = {"processor.augment": None, "processor.codebook_size": None, "model.codebook": None}
    changes |= {"data.codebook_cache": folder / "words"}
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    config = parse_config_flag(f"{FLAVA_CONFIG}:tiny,{folder}", flags)
    images, pairs, text = dry_run.describe(build(Config, config, ""), config).split("== one batch of ")[1:]
    for batch in (images, pairs):
        assert re.search("^patch_labels +32x36 +int32$", batch, re.M) and "codebook_image" not in batch
    assert "patch_labels" not in text and ("not available here" in images) == (data == "absent")


def test_training_needs_no_codebook_where_its_words_are_cached():
    whole = "--config.init=({'path': 'whole', 'include': '.*'},)"
    settings = build(Config, parse_config_flag(f"{FLAVA_CONFIG}:full", [whole]), "")
    assert training_flags(settings, "words")[-1].count("'include': '(?!codebook/)(?:.*)'") == 1
    settings = build(Config, parse_config_flag(f"{FLAVA_CONFIG}:full"), "")
    flags = training_flags(settings, "words")
    cached = build(Config, parse_config_flag(f"{FLAVA_CONFIG}:full", flags), "")
    assert [(entry.path, entry.include) for entry in cached.init] == [
        ("checkpoints/dino-vitb16", "vision/.*"),
        ("runs/flava_mlm", "text/.*"),
    ]
    assert cached.data.codebook_cache == "words" and experiment(cached).model_config.codebook is None


class Pictures:
    """A source of twelve records: one without picture, one damaged, some alike."""

    name = "pictures"

    def __init__(self):
        self.threads = set()

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.threads.add(threading.current_thread().name)
        if index == 11:
            raise FatalDataError("the disk is gone")
        return {"image": None if index == 3 else b"damaged" if index == 5 else b"%d" % (index // 2)}


class Codebook:
    def codebook_image(self, image):
        if image == b"damaged":
            raise UserError("damaged")
        return np.full(1, int(image))


def test_sentences_that_training_replaces_are_left_out(capsys):
    class Pairs(list):
        name = "pairs"

    texts = ["one", "two", None, "half a pair \ud83d", "one", ["three", 3, "two", "5 \ud83d"], "four", [], [["six"]]]
    source = Pairs([*({"source_text": text} for text in texts), {"text": "uno"}, {"source_text": b"seven"}])
    found = [text for *_, text in sentences([source], lambda part: True, 2)]
    assert found == ["one", "two", "three", "four", "seven"]
    left_out = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert [line.split(": ")[1] for line in left_out] == [f"pairs, record {n}" for n in (2, 3, 5, 5, 7, 8, 9)]


def test_pictures_are_read_by_threads_in_order_and_once(capsys):
    source, seen = Pictures(), []
    with pytest.raises(FatalDataError, match="the disk is gone"):
        seen += [int(image[0]) for *_, image in pictures([source], Codebook(), lambda part: True, 12, 3) if image]
    assert all(name.startswith("pictures_") for name in source.threads)
    assert capsys.readouterr().err == "left out: pictures, record 5: damaged\n"
    eleven = type("Eleven", (Pictures,), {"__len__": lambda self: 11})
    both, read = [eleven(), eleven()], lambda part: part != 2
    found = [(part, key and int(image[0])) for part, key, image in pictures(both, Codebook(), read, 8, 3)]
    parts = [[number for part, number in found if part == wanted and number is not None] for wanted in range(3)]
    assert parts == [[0, 1, 2, 3], [4, 5, 0, 1, 2], []]  # of records 0-7, 8-10 and 0-4, none of another's 5-10
    assert [part for part, _ in found] == [0] * 8 + [1] * 8 + [2]


def test_the_device_has_the_next_batch_before_one_is_taken():
    dispatched = []

    def rows(items):
        dispatched.append(list(items))
        return np.asarray(items)[:, None]

    items = [(str(number), number) for number in range(5)]
    batches = computed(iter(items), rows, 2)
    assert next(batches)[0] == ["0", "1"] and dispatched == [[0, 1], [2, 3]]
    assert [names for names, _ in batches] == [["2", "3"], ["4"]] and dispatched[2:] == [[4, 4]]
