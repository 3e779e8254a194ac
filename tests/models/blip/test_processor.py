"""BLIP's processor: equal to Hugging Face's, and what it makes for each task."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from vlm.data.augment import AugmentSettings
from vlm.data.batch import LoaderSettings
from vlm.data.image import ImageSettings
from vlm.data.loader import Loader
from vlm.data.source import open_source
from vlm.errors import UserError
from vlm.models.blip.processor import Processor, ProcessorConfig
from vlm.models.blip.processor_config import LIMITS
from vlm.strict import build
from vlm.tokenizers import load

VOCABULARY = "a picture of man , riding on horse fast two dogs left right image the is who ? 12 cat un ##der"
WORDS = VOCABULARY.split(" ")
SMALL = ImageSettings(16, None, mode="exact")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return load(path)


@pytest.fixture(scope="module")
def vocabulary(shared_data):
    return shared_data / "tokenizers/bert_base_uncased_vocab.txt"


def make(tokenizer, task, **options):
    return Processor(tokenizer, ProcessorConfig(task=task, image=SMALL, **options))


def ids(tokenizer, text):
    return [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


def picture(mode="RGB", size=(31, 22), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), np.uint8)
    image = Image.fromarray(pixels)
    return image.convert("RGB").convert(mode) if mode in ("L", "P", "1", "CMYK") else image.convert(mode)


def png(image=None):
    buffer = io.BytesIO()
    (image or picture()).save(buffer, "PNG")
    return buffer.getvalue()


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_pictures_equal_hugging_faces(mode):
    blip = pytest.importorskip("transformers.models.blip.image_processing_pil_blip")
    theirs = blip.BlipImageProcessorPil()
    ours = Processor(None)
    for size in ((31, 22), (1, 47), (500, 333)):
        image = picture(mode, size)
        expected = theirs(images=image, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
        batch = ours(images=[image])
        assert batch["image"].shape == (1, 384, 384, 3)
        np.testing.assert_array_equal(batch["image"], expected)


def test_tokens_equal_berts_and_the_two_new_ones_follow(vocabulary):
    transformers = pytest.importorskip("transformers")
    processor = Processor(load(vocabulary), ProcessorConfig(task="retrieval", clean=False))
    theirs = transformers.BertTokenizer(vocab=str(vocabulary))
    texts = ["A picture of Zoë's cat!", "naïve 漢字 [SEP] x", "word " * 60, ""]
    batch = processor(texts=texts)
    expected = theirs(texts, padding="max_length", truncation=True, max_length=35, return_tensors="np")
    np.testing.assert_array_equal(batch["tokens"], expected["input_ids"])
    np.testing.assert_array_equal(batch["mask"], expected["attention_mask"])
    assert (processor.dec_id, processor.enc_id) == (30522, 30523)
    assert processor.tokenizer.vocab_size == 30524
    prompts = processor(texts=["a picture of ", "two dogs"], prompts=True)
    assert prompts["tokens"].tolist() == [[101, 1037, 3861, 1997], [101, 2048, 6077, 0]]
    assert prompts["mask"].sum(axis=1).tolist() == [4, 3]


def test_a_saved_folder_is_read_here_and_by_hugging_face(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers.models.blip.processing_blip")
    first = make(tokenizer, "vqa", max_answers=3, max_length=9)
    first.save(tmp_path)
    second = pickle.loads(pickle.dumps(Processor.load(tmp_path)))
    assert (second.config, second.max_length) == (first.config, 9)
    example = {"image": png(), "question": "who is: the man?", "answer": ["a cat", "12", "12"]}
    rows = [processor.example(example, rng(), True) for processor in (first, second)]
    assert rows[0].keys() == rows[1].keys() == Processor.rows(first.config).keys()
    for key, value in rows[0].items():
        np.testing.assert_array_equal(rows[1][key], value)
    theirs = transformers.BlipProcessor.from_pretrained(tmp_path)
    assert type(theirs.image_processor).__name__.startswith("BlipImageProcessor")
    assert theirs.image_processor.size == {"height": 16, "width": 16}
    texts = ["who is the man?"]
    expected = theirs.tokenizer(texts, padding="max_length", max_length=9, return_tensors="np")
    np.testing.assert_array_equal(second(texts=texts)["tokens"], expected["input_ids"])
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text(json.dumps({"architectures": ["BlipForImageTextRetrieval"]}))
    again = Processor.load(tmp_path / "hf")
    assert (again.config.task, again.config.clean, again.image_settings) == ("retrieval", False, SMALL)
    np.testing.assert_array_equal(again(images=[picture()])["image"], first(images=[picture()])["image"])


def test_published_image_settings_with_another_models_leftovers(tmp_path):
    published = {"image_processor_type": "BlipImageProcessor", "do_pad": True, "size_divisor": 32, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published | {"size": 24}))
    assert Processor.load(tmp_path).image_settings == ImageSettings(24, None, mode="exact")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    assert Processor.load(tmp_path).image_settings == ProcessorConfig().image


@pytest.mark.parametrize("task", list(LIMITS))
def test_examples_have_the_promised_shapes(tokenizer, task):
    processor = make(tokenizer, task, augment=AugmentSettings((0.2, 1.0), flip=0.5, rand_augment=2))
    example = {"image": png(), "text": "The dogs.", "question": "who?", "answer": "a cat", "label": 1, "image_id": 3}
    if task == "nlvr":
        example["image"] = [png(), png(picture("L"))]
    if task == "dialog":
        example |= {"caption": "two dogs", "history": [["who", "a man"]], "options": ["a cat", "dogs"], "answer": 1}
    for train in (True, False):
        row = processor.example(example, rng(), train)
        expected = Processor.rows(processor.config)
        if task == "retrieval" and not train:
            del expected["image_id"]
        assert {key: (value.shape, str(value.dtype)) for key, value in row.items()} == expected
        again = processor.example(example, rng(), train)
        assert all((again[key] == value).all() for key, value in row.items())
    assert row["tokens"][0] == tokenizer.bos_id and row["mask"].shape == (LIMITS[task][0],)


def test_captions_are_labelled_after_the_prompt(tokenizer):
    row = make(tokenizer, "caption").example({"text": "Two DOGS, on (a) horse!"}, rng(), True)
    tokens = ids(tokenizer, "a picture of two dogs, on a horse")
    assert row["tokens"][row["mask"]].tolist() == tokens
    labels = row["labels"].tolist()
    assert labels[:4] == [-100] * 4
    assert labels[4 : len(tokens)] == tokens[4:]
    assert set(labels[len(tokens) :]) == {-100}
    long = make(tokenizer, "caption", max_length=8).example({"text": "a man " * 20}, rng(), True)
    assert long["tokens"].tolist()[-1] == tokenizer.eos_id and long["labels"][-1] == tokenizer.eos_id
    other = make(tokenizer, "caption", prompt="").example({"text": "two dogs"}, rng(), True)
    assert other["labels"][:4].tolist() == [-100, *ids(tokenizer, "two dogs")[1:]]


def test_cleaning_by_task_and_not_at_all(tokenizer):
    text = "A man, riding (on) a horse!!  Fast..."
    wanted = ids(tokenizer, "a man, riding on a horse fast")
    for task in ("pretrain", "retrieval", "vqa"):
        batch = make(tokenizer, task)(texts=[text])
        assert batch["tokens"][0][batch["mask"][0]].tolist() == wanted
        row = make(tokenizer, task).example({"text": text}, rng(), False)
        np.testing.assert_array_equal(row["tokens"], batch["tokens"][0])
    raw = make(tokenizer, "pretrain", clean=False)(texts=[text])
    assert (raw["tokens"] == tokenizer.unk_id).sum() == 7
    short = make(tokenizer, "pretrain", max_words=2)(texts=[text], padding="longest")
    assert short["tokens"][0].tolist() == ids(tokenizer, "a man,")
    vqa = make(tokenizer, "vqa").example({"question": "1:2?", "text": "cat"}, rng(), False)
    assert vqa["tokens"][vqa["mask"]].tolist() == ids(tokenizer, "12?")


def test_prompts_end_where_generation_starts(tokenizer):
    processor = make(tokenizer, "caption")
    batch = processor(images=[picture()] * 3, texts=["a picture of ", "(Two", ""])
    assert batch["tokens"].tolist() == [
        ids(tokenizer, "a picture of")[:-1],
        [*ids(tokenizer, "( two")[:-1], tokenizer.pad_id],
        [tokenizer.bos_id, *[tokenizer.pad_id] * 3],
    ]
    assert batch["mask"].sum(axis=1).tolist() == [4, 3, 1]
    padded = processor(texts=["two"], padding="max_length")
    assert padded["tokens"].shape == (1, 40) and padded["mask"].sum() == 2
    whole = processor(texts=["two"], prompts=False)
    assert whole["mask"].sum() == 3 and whole["tokens"].shape == (1, 40)
    assert set(processor(images=[picture()])) == {"image"}


def test_answers_are_weighted_by_the_people_who_gave_them(tokenizer):
    processor = make(tokenizer, "vqa", max_answers=3, answer_length=5)
    given = ["12", "cat", "cat", "dogs", "cat", "12", "a", "cat", "cat", "cat"]
    row = processor.example({"question": "who?", "answer": given}, rng(), True)
    np.testing.assert_allclose(row["answer_weights"], [0.6, 0.2, 0.1], rtol=1e-6)
    expected = tokenizer(["cat", "12", "dogs"], max_length=5, padding="max_length")
    np.testing.assert_array_equal(row["answer_tokens"], expected["tokens"])
    np.testing.assert_array_equal(row["answer_mask"], expected["mask"])
    row = processor.example({"question": "who?", "answer": "a cat on a fast horse"}, rng(), True)
    np.testing.assert_allclose(row["answer_weights"], [0.2, 0, 0], rtol=1e-6)
    assert row["answer_tokens"][0, -1] == tokenizer.eos_id
    assert row["answer_tokens"][1].tolist() == [tokenizer.bos_id, *[tokenizer.pad_id] * 4]
    assert row["answer_mask"].sum(axis=1).tolist() == [5, 1, 1]
    assert set(processor.example({"question": "who?"}, rng(), False)) == {"tokens", "mask"}


def test_pairs_change_places_with_their_words_in_training_only(tokenizer):
    processor = make(tokenizer, "nlvr")
    first, second = png(picture(seed=1)), png(picture(seed=2))
    example = {"image": [first, second], "text": "The left image is right.", "label": "True"}
    plain = processor.example(example, rng(), False)
    np.testing.assert_array_equal(plain["image"], processor(images=[[first, second]])["image"][0])
    assert plain["tokens"][plain["mask"]].tolist() == ids(tokenizer, "the left image is right")
    swapped = 0
    for seed in range(60):
        row = processor.example(example, rng(seed), True)
        turned = not np.array_equal(row["image"], plain["image"])
        assert np.array_equal(row["image"], plain["image"][::-1] if turned else plain["image"])
        wanted = ids(tokenizer, "the right image is left" if turned else "the left image is right")
        assert row["tokens"][row["mask"]].tolist() == wanted and row["labels"] == 1
        swapped += turned
    assert 18 < swapped < 42


@pytest.mark.parametrize(
    ("value", "label"), [("True", 1), ("false", 0), (True, 1), (False, 0), (5, 5), (np.int64(2), 2), (np.bool_(1), 1)]
)
def test_labels(tokenizer, value, label):
    row = make(tokenizer, "classification").example({"text": "cat", "label": value}, rng(), True)
    assert (row["labels"].dtype, row["labels"].tolist()) == (np.int32, label)


def test_image_numbers(tokenizer):
    processor = make(tokenizer, "retrieval")
    example = {"text": "cat", "image_id": "coco_9", "image_number": 4}
    assert processor.example(example, rng(), True)["image_id"] == 4
    assert processor.example({"text": "cat", "image_id": 9}, rng(), True)["image_id"] == 9


def test_uint8_pictures_in_training_only(tokenizer):
    processor = make(tokenizer, "pretrain", normalise=False)
    assert processor.example({"image": png()}, rng(), True)["image"].dtype == np.uint8
    assert processor.example({"image": [png(), png()]}, rng(), False)["image"].dtype == np.float32
    assert processor(images=[picture()])["image"].dtype == np.float32


@pytest.mark.parametrize(
    ("task", "example", "message"),
    [
        ("nlvr", {"image": png(), "text": "x", "label": 1}, "example 7: image must be a pair"),
        ("nlvr", {"image": [png()] * 2, "text": "x"}, "label: expected a class number, True or False, found None"),
        ("classification", {"text": "x", "label": "maybe"}, "label: expected a class number.*'maybe'"),
        ("classification", {"text": "x", "label": 1.0}, "label: expected a class number.*1.0"),
        ("classification", {"text": "x", "label": 3}, "example 7: label: expected one of the classes 0 to 2, found 3"),
        ("retrieval", {"text": "x", "image_id": "coco_9"}, "image_id: expected a number.*'coco_9'.*number='image_id'"),
        ("retrieval", {"text": "x"}, "image_id: expected a number below"),
        ("vqa", {"question": "x", "answer": []}, "answer: expected a string or a list"),
        ("vqa", {"question": "x", "answer": [3]}, "answer: expected a string or a list"),
        ("vqa", {"question": 3}, "question: expected a string, found int"),
        ("caption", {"caption": "x"}, "expected image, text or question, found key, caption"),
        ("pretrain", {"image": "/etc/passwd"}, "image must be encoded bytes"),
        ("pretrain", {"image": [png(), "/etc/passwd"]}, r"image\[1\] must be encoded bytes"),
        ("pretrain", {"image": []}, "image: an empty list"),
        ("pretrain", {"image": [png(), png()[:90]]}, r"image\[1\]: damaged PNG"),
    ],
)
def test_a_wrong_example_is_named(tokenizer, task, example, message):
    with pytest.raises(UserError, match=message):
        make(tokenizer, task, num_labels=3).example({"key": 7} | example, rng(), True)


def test_wrong_calls_settings_and_folders_are_named(tokenizer, shared_data, tmp_path):
    processor = make(tokenizer, "pretrain")
    with pytest.raises(UserError, match="images must be a list, found one Image"):
        processor(images=picture())
    with pytest.raises(UserError, match="images differ in number or size"):
        processor(images=[[picture()], [picture(), picture()]])
    with pytest.raises(UserError, match="texts must be a list"):
        processor(texts="a cat")
    with pytest.raises(UserError, match="text 1 must be a string"):
        processor(texts=["a", 3])
    with pytest.raises(UserError, match="no tokenizer"):
        Processor(None)(texts=["a"])
    assert processor(images=[])["image"].shape == (0, 16, 16, 3)
    with pytest.raises(UserError, match="BLIP needs BERT's tokenizer"):
        Processor(load(shared_data / "tokenizers/spm_test_ja.model", layout="llama"))
    for section, message in (
        ({"task": "draw"}, "config.processor.task: expected one of"),
        ({"max_length": 2}, "max_length: expected a whole number of at least 3, found 2"),
        ({"answer_length": 0}, "answer_length"),
        ({"single_answer_weight": 0.0}, "single_answer_weight"),
        ({"image": {"sise": 3}}, "config.processor.image.sise"),
    ):
        with pytest.raises(UserError, match=message):
            build(ProcessorConfig, section, "processor")
    assert build(ProcessorConfig, {"image": {"size": 480}}, "processor").image == ImageSettings(480, None, mode="exact")
    with pytest.raises(UserError, match="no such folder"):
        Processor.load(tmp_path / "absent")
    with pytest.raises(UserError, match="no processor found"):
        Processor.load(tmp_path)
    processor.save(tmp_path)
    for content, message in (('{"format_version": 2}', "another format version"), ('{"tusk": "vqa"}', "tusk")):
        (tmp_path / "vlm_processor.json").write_text(content)
        with pytest.raises(UserError, match=f"vlm_processor.json: .*{message}"):
            Processor.load(tmp_path)


def test_a_configuration_opens_its_tokenizer(vocabulary):
    processor = Processor.from_config(build(ProcessorConfig, {"tokenizer": str(vocabulary)}, "processor"))
    assert processor.enc_id == 30523
    assert processor(texts=["a"])["tokens"].shape == (1, 30)


def test_from_a_published_list_to_batches(tokenizer, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png(picture(seed=ord(name))))
    rows = [{"image": f"{n}.png", "caption": f"{c} dogs", "image_id": f"coco_{n}"} for n in "ba" for c in ("two", "a")]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    source = open_source({"kind": "json", "path": str(tmp_path / "train.json"), "number": "image_id"})
    processor = make(tokenizer, "retrieval", augment=AugmentSettings((0.5, 1.0), flip=0.5, rand_augment=2))

    def batches(seed):
        with Loader([source], processor.example, LoaderSettings(4, seed, num_workers=2)).iterate() as loader:
            return [next(loader) for _ in range(2)]

    first, second = batches(0)
    assert sorted(first["image_id"].tolist()) == [0, 0, 1, 1]
    assert first["image"].shape == (4, 16, 16, 3)
    for key, value in batches(0)[1].items():
        np.testing.assert_array_equal(value, second[key])
    order = [np.lexsort((batch["tokens"][:, 1], batch["image_id"])) for batch in (first, second)]
    np.testing.assert_array_equal(first["tokens"][order[0]], second["tokens"][order[1]])
    assert (first["image"][order[0]] != second["image"][order[1]]).any(axis=(1, 2, 3)).sum() >= 3
