"""CapFilt: equal to an explicit loop, the same bytes however it is shared or interrupted, readable by training."""

import hashlib
import io
import json
import tarfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vlm
from vlm.capfilt import __main__ as command
from vlm.capfilt import pipeline
from vlm.data.batch import LoaderSettings
from vlm.data.image import ImageSettings
from vlm.data.loader import Loader
from vlm.data.source import open_source
from vlm.data.tar_writer import TarWriter
from vlm.encoders.vit import ViTConfig
from vlm.fusion.med import MedConfig
from vlm.generation import prepare
from vlm.models.altclip.model import AltCLIP
from vlm.models.blip import BLIP, BLIPConfig, Processor, ProcessorConfig, example
from vlm.schema import MeshConfig, ShardingConfig
from vlm.sharding import make_mesh, use
from vlm.tokenizers import load
from vlm.tree import flatten, unflatten

WORDS = ["a", "picture", "of", "man", "riding", "on", "horse", "fast", "two", "dogs", "left", "right", ",", "cat"]
WORDS += ["red", "blue", "tree", "house"]
IDS = {"cls_id": 2, "sep_id": 3, "pad_id": 0, "bos_id": 5 + len(WORDS), "enc_id": 6 + len(WORDS)}
VIT = ViTConfig(
    8, 1, 2, 16, 16, 8, activation="gelu", patch_bias=True, input_norm=False, output_norm="all", init="normal"
)
MED = MedConfig(7 + len(WORDS), 8, 1, 2, 16, 24, 8, dropout_rate=0.0, attention_dropout_rate=0.0)
ALONE = {"shared_decoder": False, "projection_dim": None, "itm": False, "temperature": None, **IDS}
KINDS = {
    "captioner": ("caption", BLIPConfig(VIT, None, MED, **ALONE)),
    "filter": ("retrieval", BLIPConfig(VIT, MED, None, **ALONE | {"itm": True})),
    "vqa": ("vqa", BLIPConfig(VIT, MED, MED, **ALONE)),
    "pretrained": ("caption", BLIPConfig(VIT, MED, None, projection_dim=4, **IDS)),
}
FAST = ("--devices=2", "--batch_size=4", "--num_workers=0")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of random models by kind."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = load(folder / "vocab.txt")
    for number, (name, (task, config)) in enumerate(KINDS.items()):
        model, settings = BLIP(config), ImageSettings(16, None, mode="exact")
        shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), **example(config)))["params"]
        rng = np.random.default_rng(number)
        params = unflatten({path: _weights(path, leaf.shape, rng) for path, leaf in flatten(shapes).items()})
        if name == "filter":
            params["itm_head"]["bias"] = np.array([0, 2], np.float32)  # about half of the texts match
        vlm.save(
            folder / name,
            model,
            params,
            Processor(tokenizer, ProcessorConfig(task=task, image=settings, max_length=12)),
        )
    return folder


def _weights(path, shape, rng):
    """Random, of a size at which texts and images make a difference to what comes out."""
    noise = rng.normal(size=shape).astype(np.float32)
    return 1 + 0.1 * noise if path.endswith("scale") else 0.1 * noise if path.endswith("bias") else noise


def picture(seed, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Web shards of 6, 3 and 5 records: one image is broken, one has no text, one has two; and a human one."""
    folder = tmp_path_factory.mktemp("web")
    rng = np.random.default_rng(0)
    for number, count in enumerate((6, 3, 5)):
        with TarWriter(folder / f"cc-{number:05d}-of-00003.tar") as writer:
            for i in range(count):
                text = " ".join(rng.choice(WORDS, 4)).title() + "!"
                record = {"jpg": picture(i + 10 * number, "JPEG" if i % 2 else "PNG"), "txt": text.encode()}
                if (number, i) == (0, 2):
                    record["jpg"] = record["jpg"][:100]
                if (number, i) == (0, 4):
                    del record["txt"]
                if (number, i) == (2, 1):
                    record = {"jpg": record["jpg"], "json": json.dumps({"caption": ["Two Dogs.", "a cat"]}).encode()}
                writer.add(f"{number}/{i:03d}", record)
            writer.finish()
    with TarWriter(folder / "coco.tar") as writer:
        writer.add("7", {"png": picture(7), "json": b'{"caption": ["A Man, riding.", "a man on a horse"]}'})
        writer.finish()
    return folder


def call(models, shards, output, *options, web="cc-*.tar"):
    paths = [f"--captioner={models / 'captioner'}", f"--filter={models / 'filter'}", f"--output={output}"]
    chosen = [option.split("=")[0] for option in options]
    return [str(shards / web), *(path for path in paths if path.split("=")[0] not in chosen), *FAST, *options]


def content(folder):
    """Bytes of everything that must not depend on how the work was done."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("skipped")}


@pytest.fixture(scope="module")
def baseline(models, shards, tmp_path_factory):
    """One plain run over everything."""
    output = tmp_path_factory.mktemp("run") / "out"
    assert command.main(call(models, shards, output, f"--human={shards / 'coco.tar'}")) == 0
    return output


def explicit_loop(models, shards):
    """Image by image: (shard, key, provenance, text, probability) of every candidate."""
    mesh, rules = make_mesh(MeshConfig(), jax.devices()[:2]), ShardingConfig().rules
    with use(mesh, rules):
        captioner, matcher = (vlm.load(models / name, mesh=mesh) for name in ("captioner", "filter"))
        params = prepare(*captioner[:2])
        yield from _explicit_loop((captioner[0], params, captioner[2]), matcher, shards)


def _explicit_loop(captioner, matcher, shards):
    (captioner, captioner_params, processor), (matcher, matcher_params, matching) = captioner, matcher
    settings = {"do_sample": True, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}
    settings |= {"min_length": 5, "max_length": 20}
    for path in sorted(shards.glob("cc-*.tar")):
        name = path.stem.removesuffix("-of-00003")
        words = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=8).digest(), ">u4").tolist()
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), words[0]), words[1])
        records: dict = {}
        with tarfile.open(path) as file:
            for member in file:
                stem, _, field = member.name.partition(".")
                records.setdefault(stem, {})[field] = file.extractfile(member).read()
        for number, (stem, record) in enumerate(records.items()):
            if stem == "0/002":
                continue
            texts = json.loads(record["json"])["caption"] if "json" in record else [record.get("txt", b"").decode()]
            rows = [("web", text.lower().strip("!.")) for text in texts if text]
            batch = processor(images=[record["jpg"]] * 4, texts=["a picture of "] * 4, prompts=True)
            keys = jnp.stack([jax.random.fold_in(key, number)] * 4)  # four times the same, as compiled before
            found = vlm.generate(captioner, captioner_params, batch, rng=keys, **settings)
            assert 5 <= found.lengths[0] <= 20
            rows.append(("synthetic", processor.tokenizer.decode(found.completions[0])))
            for provenance, text in rows:
                inputs = matching(images=[record["jpg"]], texts=[text])
                scores = _score(matcher, matcher_params, inputs)
                yield name, stem, provenance, text, float(scores)


@jax.jit
def _softmax(scores):
    return jax.nn.softmax(scores)[0, 1]


def _score(model, params, inputs, compiled={}):  # noqa: B006
    apply = compiled.setdefault("apply", jax.jit(lambda p, b: model.apply({"params": p}, **b).itm_score))
    return _softmax(apply(params, inputs))


def test_pairs_and_statistics_equal_an_explicit_loop(models, shards, baseline):
    expected = list(explicit_loop(models, shards))
    kept = [row for row in expected if row[-1] >= 0.5]
    assert 3 < len(kept) < len(expected) - 3
    source = open_source({"kind": "tar", "path": str(baseline / "cc-*.tar")})
    found = [source[i] for i in range(len(source))]
    assert [(e["json"]["key"], e["json"]["provenance"], e["text"]) for e in found] == [row[1:4] for row in kept]
    for example_, row in zip(found, kept, strict=True):
        assert example_["json"]["probability"] == pytest.approx(row[-1], abs=1e-5)
    total = json.loads((baseline / "statistics.json").read_text())
    assert total["images"] == 14 and total["unreadable"] == 1 and total["human_texts"] == 2
    for name in ("web", "synthetic"):
        texts, survivors = (sum(row[2] == name for row in rows) for rows in (expected, kept))
        assert (total[name]["texts"], total[name]["kept"]) == (texts, survivors) and texts == 13
        assert total[name]["noise_ratio"] == pytest.approx(1 - survivors / texts, abs=1e-6)
        probabilities = [row[-1] for row in expected if row[2] == name]
        assert total[name]["histogram"] == np.histogram(probabilities, 20, (0, 1))[0].tolist()
    assert total["records"] == len(kept) + 2 and total["texts_per_image"] == pytest.approx(
        (len(kept) + 2) / 14, abs=1e-6
    )
    one = json.loads((baseline / "cc-00001.json").read_text())
    assert one["records"] == sum(row[0] == "cc-00001" for row in kept) and one["images"] == 3
    assert one["sha256"] == hashlib.sha256((baseline / "cc-00001.tar").read_bytes()).hexdigest()


def test_images_stay_as_they_were_and_human_pairs_pass(shards, baseline):
    source = open_source({"kind": "tar", "path": str(baseline / "human-coco.tar")})
    assert [source[i]["text"] for i in range(2)] == ["a man, riding", "a man on a horse"]
    assert source[0]["json"] == {"key": "7", "provenance": "human"} and source[0]["png"] == picture(7)
    written = open_source({"kind": "tar", "path": str(baseline / "cc-00001.tar")})
    originals = {picture(i + 10, "JPEG" if i % 2 else "PNG") for i in range(3)}
    assert {written[i]["image"] for i in range(len(written))} <= originals
    (skipped,) = map(json.loads, (baseline / "skipped.jsonl").read_text().splitlines())
    assert skipped["key"] == "0/002" and skipped["sample"] == 2 and "truncated" in skipped["error"]


def test_training_reads_the_output(models, baseline):
    processor = vlm.load(models / "filter")[2]
    source = open_source({"kind": "tar", "path": str(baseline / "*.tar")})
    loader = Loader([source], processor.example, LoaderSettings(4, num_workers=0, max_skip_fraction=0), train=False)
    with loader.iterate() as batches:
        batch = next(batches)
    assert batch["image"].shape == (4, 16, 16, 3) and batch["tokens"].shape == (4, 12) and batch["valid"].all()
    assert processor.tokenizer.decode(batch["tokens"][0]) == source[0]["text"]


def test_the_threshold_keeps_what_reaches_it(models, shards, baseline, tmp_path, capsys):
    source = open_source({"kind": "tar", "path": str(baseline / "cc-*.tar")})
    kept = sorted(source[i]["json"]["probability"] for i in range(len(source)))
    for threshold, survivors in ((kept[2], len(kept) - 2), (float(np.nextafter(kept[2], 1)), len(kept) - 3)):
        output = tmp_path / str(survivors)
        assert command.main(call(models, shards, output, f"--threshold={threshold!r}", "--score_only")) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["web"]["kept"] + found["synthetic"]["kept"] == survivors
        assert not list(output.glob("*.tar"))
    assert command.main(call(models, shards, tmp_path / "none", "--threshold=1")) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 0 and not list((tmp_path / "none").glob("*.tar"))


def test_a_killed_run_goes_on_to_the_same_bytes(models, shards, baseline, tmp_path, monkeypatch, capsys):
    output, human = tmp_path / "out", f"--human={shards / 'coco.tar'}"
    records = []

    class Dying(TarWriter):
        def add(self, key, members):
            super().add(key, members)
            records.append(key)
            if key.startswith("1/"):
                self._done = True  # as after a SIGKILL nothing is cleaned up
                self._file.close()
                raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "TarWriter", Dying)
    with pytest.raises(KeyboardInterrupt):
        command.main(call(models, shards, output, human))
    assert {"cc-00000.tar", "cc-00000.json", ".cc-00001.tar.tmp"} <= content(output).keys()
    assert not {"cc-00001.tar", "cc-00001.json", "cc-00002.tar", "statistics.json"} & content(output).keys()
    first = (output / "cc-00000.tar").stat().st_mtime_ns
    monkeypatch.setattr(pipeline, "TarWriter", TarWriter)
    assert command.main(call(models, shards, output, human)) == 0
    assert (output / "cc-00000.tar").stat().st_mtime_ns == first
    assert content(output) == content(baseline)
    assert (output / "skipped.jsonl").read_bytes() == (baseline / "skipped.jsonl").read_bytes()
    (output / "cc-00002.tar").unlink()  # a lost output is made again, and nothing else
    assert command.main(call(models, shards, output, human)) == 0
    assert "cc-00002" in (line := capsys.readouterr().err.splitlines()[-1]) and "3/" not in line[:9]
    assert content(output) == content(baseline)


def test_processes_share_the_shards(models, shards, baseline, tmp_path, capsys):
    human = f"--human={shards / 'coco.tar'}"
    for index, finished in ((1, 2), (0, 4)):
        share = ("--num_processes=2", f"--process_id={index}", "--num_workers=2")
        assert command.main(call(models, shards, tmp_path / "out", human, *share)) == 0
        assert json.loads(capsys.readouterr().out)["finished"] == finished
    assert content(tmp_path / "out") == content(baseline)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--captioner=nowhere"], "--captioner: no such file or folder: nowhere"),
        (["--captioner=altclip"], "--captioner: expected a BLIP model, found AltCLIP"),
        (["--captioner=filter"], "--captioner: expected a model that writes captions, found one without a decoder"),
        (["--captioner=vqa"], "expected a model that writes captions, found one that answers questions"),
        (["--filter=captioner"], "--filter: expected a model with a matching head"),
        (["--threshold=2"], "--threshold: expected a number from 0 to 1, found 2.0"),
        (
            ["--max_length=4", "--min_length=1"],
            "--max_length: expected more than the prompt's 4 tokens and at most 24, found 4",
        ),
        (["--top_p=0"], "error: --top_p: expected a number in (0, 1], found 0.0"),
        (["--process_id=2", "--num_processes=2"], "found --process_id=2 and --num_processes=2"),
        (["--devices=9"], "--devices: expected at most 8, found 9"),
        (["--human=none.tar"], "missing shard: none.tar"),
        (["--max_skip_fraction=0"], "1 of 4 images were unreadable, more than --max_skip_fraction=0 allows"),
        (["--output=inputs"], "--output: expected another folder than that of the input"),
        (["--output=other"], "holds other files and no capfilt.json"),
    ],
)
def test_wrong_calls_end_in_one_line_and_leave_nothing(models, shards, altclip, tmp_path, capsys, options, message):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    places = {"altclip": altclip, "inputs": shards, "other": tmp_path / "other"}
    places |= {name: models / name for name in KINDS}
    flag, _, value = options[0].partition("=")
    options = [f"{flag}={places.get(value, value)}", *options[1:]]
    with pytest.raises(SystemExit) as stop:
        command.main(call(models, shards, tmp_path / "out", *options))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error
    left = {path.name for path in (tmp_path / "out").glob("*")}
    assert left <= ({"capfilt.json", "skipped.jsonl"} if "max_skip" in options[0] else set())


def test_a_pretraining_model_as_captioner_gives_a_note(models, shards, tmp_path, capsys):
    with pytest.raises(SystemExit):
        options = [f"--captioner={models / 'pretrained'}", f"--filter={models / 'captioner'}"]
        command.main(call(models, shards, tmp_path / "out", *options))
    note, error = capsys.readouterr().err.splitlines()
    assert note == "note: --captioner is a pretraining model; one fine-tuned for captions writes better"
    assert error.startswith("error: --filter: expected a model with a matching head")


@pytest.fixture(scope="module")
def altclip(tmp_path_factory):
    """A model of another family."""
    from vlm.encoders.bert import BertConfig
    from vlm.models.altclip import AltCLIPConfig, example

    text = BertConfig(vocab_size=24, hidden_size=8, num_layers=1, num_heads=2, mlp_dim=8, max_length=8)
    config = AltCLIPConfig(vision=ViTConfig(8, 1, 2, 8, 16, 8), text=text, project_dim=8, projection_dim=8)
    model = AltCLIP(config)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), **example(config)))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    vlm.save(tmp_path_factory.mktemp("altclip") / "model", model, params)
    return tmp_path_factory.getbasetemp() / "altclip0" / "model"


def test_a_folder_takes_one_run_only(models, shards, baseline, tmp_path, capsys):
    before = content(baseline)
    for options, message in (
        (["--threshold=0.6"], "holds a run with another threshold (0.5, now 0.6); give a new folder"),
        ([f"--filter={models / 'vqa'}"], "--filter: expected a model with a matching head"),
        (["--seed=1"], "another seed (0, now 1)"),
    ):
        with pytest.raises(SystemExit):
            command.main(call(models, shards, baseline, *options))
        assert message in capsys.readouterr().err
    with TarWriter(tmp_path / "cc-00001-of-00003.tar") as writer:
        writer.add("1", {"png": picture(1)})
        writer.finish()
    with pytest.raises(SystemExit):
        command.main(call(models, tmp_path, baseline, web="cc-00001*"))
    assert "missing shard" in capsys.readouterr().err
    (tmp_path / "cc-00001-of-00003.tar").rename(tmp_path / "cc-00001.tar")
    with pytest.raises(SystemExit):
        command.main(call(models, tmp_path, baseline, web="cc-00001*"))
    assert "made from a shard of" in capsys.readouterr().err
    assert content(baseline) == before
