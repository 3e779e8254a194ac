"""The processor against Hugging Face's AltCLIPProcessor, and every kind of example and wrong input."""

import io
import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from vlm.data.augment import AugmentSettings
from vlm.data.image import ImageSettings
from vlm.errors import UserError
from vlm.models.altclip.processor import Processor, ProcessorConfig
from vlm.strict import build
from vlm.tokenizers import load, train_sentencepiece

LINES = ["a small cat", "two small dogs", "eine kleine Katze", "两只小狗", "a dog and a cat"] * 4
TEXTS = ["a small cat", "两只小狗 and   two small dogs", ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "tiny.model"
    train_sentencepiece(LINES, path, 28)
    return load(path)


@pytest.fixture(scope="module")
def teacher(shared_data):
    return load(shared_data / "tokenizers/bpe_simple_vocab_16e6.txt.gz")


@pytest.fixture
def processor(tokenizer):
    return Processor(tokenizer, ImageSettings(16, 16), 12)


def picture(seed=0, size=(30, 20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def png(seed=0):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def rng(seed=0):
    return np.random.default_rng(seed)


def test_saved_folder_gives_the_same_batches_here_and_in_hugging_face(shared_data, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers.models.altclip.processing_altclip")
    Processor(tokenizer, ImageSettings(), 20).save(tmp_path)
    theirs = transformers.AltCLIPProcessor.from_pretrained(tmp_path)
    ours = Processor.load(tmp_path)
    assert ours.max_length == 20
    paths = sorted((shared_data / "images").glob("*.jp*g"))[:4]
    pictures = [Image.open(path) for path in paths]
    batch = ours(images=[str(paths[0]), paths[1].read_bytes(), *pictures[2:]], texts=TEXTS)
    expected = theirs(
        images=pictures, text=TEXTS, padding="max_length", truncation=True, max_length=20, return_tensors="np"
    )
    np.testing.assert_array_equal(batch["tokens"], expected["input_ids"])
    np.testing.assert_array_equal(batch["mask"], expected["attention_mask"])
    np.testing.assert_array_equal(batch["image"], expected["pixel_values"].transpose(0, 2, 3, 1))
    assert {key: value.dtype for key, value in batch.items()} == {"image": "f4", "tokens": "i4", "mask": "?"}
    theirs.save_pretrained(tmp_path / "hf5")  # a folder with tokenizer.json and processor_config.json instead
    again = Processor.load(tmp_path / "hf5")
    assert (again.max_length, again.image_settings) == (77, ImageSettings())
    again.max_length = 20
    for key, value in again(images=pictures, texts=TEXTS).items():
        np.testing.assert_array_equal(value, batch[key])


def test_a_folder_as_published_is_read(shared_data, tmp_path):
    shutil.copyfile(shared_data / "tokenizers/torchtext_spm_example.model", tmp_path / "sentencepiece.bpe.model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "altclip"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 24, "crop_size": 24}))
    processor = Processor.load(tmp_path)
    assert processor.image_settings == ImageSettings(24, 24)
    batch = processor(images=[picture()], texts=["word " * 200])
    assert batch["tokens"].shape == (1, 77)
    assert batch["tokens"][0, [0, -1]].tolist() == [0, 2]
    assert "tokens" not in processor(images=[picture()])
    assert processor(texts=["a", "b c"], padding="longest")["tokens"].shape[1] < 10


def test_all_kinds_of_images_are_accepted(processor):
    array = np.asarray(picture())
    kinds = [picture(), png(), array, picture().convert("RGBA"), np.dstack([array, np.full((20, 30), 255, np.uint8)])]
    images = processor(images=kinds)["image"]
    assert images.shape == (5, 16, 16, 3)
    for image in images[1:]:
        np.testing.assert_array_equal(image, images[0])
    grey = processor(images=[array[..., 0], array[..., :1]])["image"]
    np.testing.assert_array_equal(grey[0], grey[1])
    assert processor(images=[])["image"].shape == (0, 16, 16, 3)


def test_an_image_text_pair_becomes_one_row(processor):
    row = processor.example({"image": png(), "text": "a small cat", "key": "7", "label": 3}, rng(), train=True)
    batch = processor(images=[png()], texts=["a small cat"])
    assert {key: value.shape for key, value in row.items()} == {"image": (16, 16, 3), "tokens": (12,), "mask": (12,)}
    for key, value in row.items():
        np.testing.assert_array_equal(value, batch[key][0])
    row = processor.example({"image": png(), "label": 3, "text": None}, rng(), train=False)
    assert set(row) == {"image", "labels"}
    assert (row["labels"].dtype, row["labels"].tolist()) == (np.int32, 3)


def test_training_draws_a_caption_and_evaluation_takes_the_first(processor):
    captions = ["a small cat", "two small dogs", "a dog"]
    rows = [processor.example({"text": captions}, rng(seed), train=True)["tokens"].tolist() for seed in range(40)]
    expected = processor(texts=captions)["tokens"].tolist()
    assert [rows.count(row) > 5 for row in expected] == [True] * 3
    assert processor.example({"text": captions}, rng(5), train=False)["tokens"].tolist() == expected[0]
    assert processor.example({"text": b"two small dogs"}, rng(), train=False)["tokens"].tolist() == expected[1]


def test_a_parallel_pair_gets_the_teachers_tokens(tokenizer, teacher, processor):
    processor.teacher_tokenizer = teacher
    example = {"source_text": "two small dogs", "text": "两只小狗"}
    row = processor.example(example, rng(), train=True)
    assert row["teacher_tokens"].shape == row["teacher_mask"].shape == (77,)
    assert row["teacher_tokens"][:5].tolist() == [49406, *teacher.encode("two small dogs"), 49407]
    assert row["teacher_mask"].sum() == 5
    np.testing.assert_array_equal(row["tokens"], processor(texts=["两只小狗"])["tokens"][0])
    processor.teacher_max_length = 4
    short = processor.example(example, rng(), train=True)
    assert short["teacher_tokens"].tolist() == [*row["teacher_tokens"][:3].tolist(), 49407]
    row = processor.example(example | {"target": [0.5, 1.0]}, rng(), train=True)
    assert set(row) == {"tokens", "mask", "target"}
    assert (row["target"].dtype, row["target"].tolist()) == (np.float32, [0.5, 1.0])
    processor.teacher_tokenizer = None
    assert set(processor.example(example, rng(), train=True)) == {"tokens", "mask"}


def test_augmentation_only_in_training_and_only_from_the_generator(tokenizer):
    processor = Processor(tokenizer, ImageSettings(16, 16), augment=AugmentSettings((0.2, 1.0)), normalise=False)
    plain = processor(images=[png()])["image"][0]
    one, two, other = (processor.example({"image": png()}, rng(seed), True)["image"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any() and one.dtype == np.uint8 and plain.dtype == np.float32
    np.testing.assert_array_equal(processor.example({"image": png()}, rng(1), False)["image"], plain)


def test_save_then_load_keeps_everything(tokenizer, teacher, tmp_path):
    first = Processor(tokenizer, ImageSettings((8, 10), None, mode="exact"), 9, teacher, teacher_max_length=20)
    first.save(tmp_path / "a" / "b")
    second = Processor.load(tmp_path / "a" / "b")
    assert (second.image_settings, second.max_length) == (first.image_settings, 9)
    assert second.teacher_max_length == 20
    example = {"image": png(), "text": "a dog", "source_text": "a dog"}
    rows = [
        processor.example(example, rng(), False) for processor in (first, second, pickle.loads(pickle.dumps(second)))
    ]
    assert set(rows[0]) == {"image", "tokens", "mask", "teacher_tokens", "teacher_mask"}
    for row in rows[1:]:
        for key, value in rows[0].items():
            np.testing.assert_array_equal(row[key], value)


def test_a_missing_part_is_an_error_only_when_it_is_asked_for(tokenizer, tmp_path):
    Processor(None, ImageSettings(16, 16)).save(tmp_path / "vision")
    vision = Processor.load(tmp_path / "vision")
    assert vision(images=[picture()])["image"].shape == (1, 16, 16, 3)
    with pytest.raises(UserError, match="no tokenizer"):
        vision(texts=["a"])
    Processor(tokenizer, None).save(tmp_path / "text")
    text = Processor.load(tmp_path / "text")
    assert text(texts=["a"])["tokens"].shape == (1, 77)
    with pytest.raises(UserError, match="no image settings"):
        text(images=[picture()])


def test_a_configuration_section_builds_it(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    section = {"tokenizer": str(tmp_path), "image": {"size": 20, "crop": 20}, "max_length": 8, "augment": {"flip": 1.0}}
    processor = Processor.from_config(build(ProcessorConfig, section, "processor"))
    row = processor.example({"image": png(), "text": "a"}, rng(), train=True)
    assert (row["image"].shape, row["tokens"].shape) == ((20, 20, 3), (8,))
    with pytest.raises(UserError, match="config.processor.image.sise"):
        build(ProcessorConfig, {"image": {"sise": 20}}, "processor")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("/absent/photo.jpg", "/absent/photo.jpg: no such file"),
        (b"not a picture", "image 1: not a picture"),
        (png()[:200], "image 1: damaged PNG"),
        (np.zeros((3, 20, 30), np.uint8), r"image 1: expected uint8\[H, W\].* found uint8\[3, 20, 30\]"),
        (np.zeros((20, 30, 3), np.float32), "found float32"),
        (np.zeros((0, 30, 3), np.uint8), "without pixels"),
        (None, "image 1: expected a path, bytes.*found NoneType"),
        (Image.open(io.BytesIO(png()[:300])), "image 1: damaged picture"),
    ],
)
def test_a_wrong_image_is_named(processor, image, message):
    with pytest.raises(UserError, match=message):
        processor(images=[picture(), image])


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"key": "a/1", "image": b"\xff\xd8\xff0"}, "example a/1: image: damaged JPEG"),
        ({"key": "a/1", "image": "/etc/passwd"}, "example a/1: image must be encoded bytes"),
        ({"text": []}, "text: an empty list"),
        ({"text": 3}, "text: expected a string, found int"),
        ({"text": b"\xff"}, "text: not valid UTF-8"),
        ({"text": "\ud800"}, "not valid Unicode"),
        ({"target": ["x"]}, "target: expected a vector"),
        ({"target": [1.0, float("nan")]}, "target: expected a vector of finite"),
        ({"key": "9", "caption": "x"}, "example 9: expected image, text or source_text, found key, caption"),
    ],
)
def test_a_wrong_example_is_named(processor, example, message):
    with pytest.raises(UserError, match=message):
        processor.example(example, rng(), train=True)


def test_wrong_calls_and_folders_are_named(processor, tokenizer, tmp_path):
    with pytest.raises(UserError, match="images must be a list, found one Image"):
        processor(images=picture())
    with pytest.raises(UserError, match="differ in size"):
        Processor(None, ImageSettings(16, None))(images=[picture(), picture(size=(20, 30))])
    with pytest.raises(UserError, match="max_length"):
        Processor(tokenizer, None, 1)
    with pytest.raises(UserError, match="no such folder"):
        Processor.load(tmp_path / "absent")
    with pytest.raises(UserError, match="no processor found"):
        Processor.load(tmp_path)
    processor.save(tmp_path)
    (tmp_path / "vlm_processor.json").write_text('{"format_version": 2}')
    with pytest.raises(UserError, match="format version 2, expected 1"):
        Processor.load(tmp_path)
