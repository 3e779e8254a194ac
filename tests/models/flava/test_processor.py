"""FLAVA's processor: equal to Hugging Face's, and what it makes of images, texts and pairs."""

import dataclasses
import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from vlm.data.augment import AugmentSettings, random_box
from vlm.data.batch import LoaderSettings
from vlm.data.block_masking import BlockSettings
from vlm.data.image import ImageSettings
from vlm.data.ledger import FatalDataError
from vlm.data.loader import Loader
from vlm.data.others import WithOthers
from vlm.errors import UserError
from vlm.models.flava.config import ClassifierConfig, FLAVAConfig
from vlm.models.flava.processor import Processor, ProcessorConfig
from vlm.strict import build
from vlm.tokenizers import load

VOCABULARY = "a picture of man , riding on horse fast two dogs left right image the is who ? 12 cat un ##der ##ing"
WORDS = VOCABULARY.split(" ")
SMALL = {"image": ImageSettings(64, None, mode="exact"), "codebook_size": 32, "mask_patches": 6, "max_length": 12}
SMALL |= {"text_length": 20, "blocks": BlockSettings(min_patches=2)}
TEXT = "a man riding on horse under the picture"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return load(path)


def make(tokenizer, **options):
    return Processor(tokenizer, ProcessorConfig(**{**SMALL, **options}))


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


class Captions:
    """A source of pictures with captions."""

    name, fingerprint = "captions", "captions"

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return {"key": str(index), "image": png(), "text": self.texts[index]}


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("transformers")
    from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil

    return FlavaImageProcessorPil()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_pictures_equal_hugging_faces(mode, theirs):
    """Theirs takes RGB only; whatever else comes is converted first."""
    ours = Processor(None)
    for size in ((31, 22), (1, 47), (500, 333)):
        image = picture(mode, size)
        batch = ours(images=[image], rng=rng())
        image = image.convert("RGB") if mode not in ("RGBA", "LA") else over_white(image)
        expected = theirs(images=image, return_codebook_pixels=True, return_tensors="np")
        for name, key in (("image", "pixel_values"), ("codebook_image", "codebook_pixel_values")):
            np.testing.assert_array_equal(batch[name], expected[key].transpose(0, 2, 3, 1), err_msg=name)
        assert batch["image"].shape == (1, 224, 224, 3) and batch["patch_mask"].shape == (1, 196)
        assert batch["codebook_image"].shape == (1, 112, 112, 3) and batch["codebook_image"].dtype == np.float32


def over_white(image):
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image).convert("RGB")


def test_tokens_equal_berts_alone_and_in_pairs(shared_data):
    transformers = pytest.importorskip("transformers")
    path = shared_data / "tokenizers/bert_base_uncased_vocab.txt"
    processor, theirs = Processor(load(path)), transformers.BertTokenizer(vocab=str(path))
    texts, pairs = ["A picture of Zoë's cat!", "naïve 漢字", "word " * 100], ["What?", "second " * 90, "other " * 100]
    for more in ((), (pairs,)):
        batch = processor(None, texts, *more)
        options = {"max_length": 77, "padding": "max_length", "truncation": True, "return_tensors": "np"}
        expected = theirs(texts, *more, **options)
        np.testing.assert_array_equal(batch["tokens"], expected["input_ids"])
        np.testing.assert_array_equal(batch["mask"], expected["attention_mask"] == 1)
        if more:
            np.testing.assert_array_equal(batch["token_types"], expected["token_type_ids"])


def test_hugging_face_reads_what_is_saved_and_the_other_way_round(tmp_path, tokenizer, theirs):
    from transformers import AutoImageProcessor

    options = {"mask_patches": 5, "max_length": 9, "blocks": BlockSettings(3, 4, 0.5, 3.0), "patch_size": 8}
    ours = make(tokenizer, **options)
    ours.save(tmp_path / "ours")
    again = Processor.load(tmp_path / "ours")
    assert again.config == ours.config and again.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    other = AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    assert type(other).__name__ == "FlavaImageProcessorPil"
    expected = other(images=picture(), return_codebook_pixels=True, return_image_mask=True, return_tensors="np")
    batch = ours(images=[picture()], rng=rng())
    np.testing.assert_array_equal(batch["image"], expected["pixel_values"].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(batch["codebook_image"], expected["codebook_pixel_values"].transpose(0, 2, 3, 1))
    assert expected["bool_masked_pos"].shape == (1, 8, 8) and expected["bool_masked_pos"].sum() <= 5

    theirs.save_pretrained(tmp_path / "theirs")
    read = Processor.load(tmp_path / "theirs")
    assert read.config == ProcessorConfig() and read.tokenizer is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_size": 224}, "codebook_size: expected one square size"),
        ({"codebook_resample": 3}, "codebook_resample: expected 1, found 3"),
        (
            {"codebook_image_mean": [0.5] * 3},
            r"codebook_image_mean: expected \[0.0, 0.0, 0.0\], found \[0.5, 0.5, 0.5\]",
        ),
        ({"codebook_image_std": 2.0}, r"codebook_image_std: expected \[1.0, 1.0, 1.0\], found 2.0"),
        ({"codebook_rescale_factor": 1.0}, "codebook_rescale_factor: expected 0.0039.*, found 1.0"),
        ({"codebook_do_normalize": "no"}, "codebook_do_normalize: expected true or false, found 'no'"),
        ({"codebook_do_center_crop": 0}, "codebook_do_center_crop: expected true or false, found 0"),
        ({"codebook_size": 112, "codebook_crop_size": 96}, "codebook_size: expected one square size"),
        ({"input_size_patches": 15}, "input_size_patches: expected a divisor of 224, found 15"),
        ({"do_pad": True}, "do_pad is not supported"),
    ],
)
def test_settings_of_other_pipelines_are_refused(tmp_path, change, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(change))
    with pytest.raises(UserError, match=message):
        Processor.load(tmp_path)


def test_another_size_has_other_patches_and_visual_words(tmp_path, tokenizer):
    processor = make(tokenizer)
    processor.image_settings = processor.image_settings.for_side(96)
    batch = processor(images=[picture()], rng=rng())
    shapes = {name: value.shape[1:] for name, value in batch.items()}
    assert shapes == {"image": (96, 96, 3), "codebook_image": (48, 48, 3), "patch_mask": (36,)}
    row = processor.example({"image": png()}, rng(), True)
    assert {name: (value.shape, str(value.dtype)) for name, value in row.items()} == Processor.rows(
        processor.config, ["image"]
    )
    assert processor.codebook_image(png()).shape == (48, 48, 3)
    processor.save(tmp_path)
    again = Processor.load(tmp_path).config
    assert (again.grid, again.codebook_size) == ((6, 6), 48)


def test_settings_that_change_nothing_are_read(tmp_path):
    """Without cropping its size is not read, and without normalisation its mean."""
    change = {"codebook_do_center_crop": False, "codebook_size": 96, "codebook_crop_size": 112}
    change |= {"codebook_do_normalize": False, "codebook_image_mean": [0.5] * 3, "codebook_image_std": None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(change))
    assert Processor.load(tmp_path).config.codebook_size == 96


def test_both_pictures_come_from_one_crop(tokenizer):
    size, options = (90, 70), AugmentSettings(scale=(0.4, 0.6))
    example = {"image": png(picture(size=size))}
    varied = make(tokenizer, augment=options).example(example, rng(), True)
    crop = picture(size=size).crop(random_box(*size, options, rng()))
    expected = make(tokenizer)(images=[crop], rng=rng())
    for name in ("image", "codebook_image"):
        np.testing.assert_array_equal(varied[name], expected[name][0])
    assert not np.array_equal(varied["image"], make(tokenizer)(images=[example["image"]])["image"][0])
    assert varied["codebook_image"].min() > 0.1 - 1e-6 and varied["codebook_image"].max() < 0.9 + 1e-6
    raw = make(tokenizer, augment=options, normalise=False).example(example, rng(), True)
    assert raw["image"].dtype == raw["codebook_image"].dtype == np.uint8
    np.testing.assert_allclose(0.8 / 255 * raw["codebook_image"] + 0.1, varied["codebook_image"], atol=1e-6)


def test_fields_decide_the_modality(tokenizer):
    processor, pair = make(tokenizer), WithOthers(Captions([TEXT, "two dogs"]))[0]
    config = processor.config
    kinds = {("image", "text"): pair, ("image",): {"image": pair["image"]}, ("text",): {"text": TEXT}}
    for fields, example in kinds.items():
        row = processor.example(example, rng(), True)
        shapes = {name: (value.shape, str(value.dtype)) for name, value in row.items()}
        assert shapes == Processor.rows(config, fields)
        plain = processor.example(example, rng(), False)
        assert plain.keys() == row.keys() & {"image", "tokens", "mask"}
    assert len(row["tokens"]) == 20 and len(plain["tokens"]) == 12
    row = make(tokenizer, itm_probability=0.0).example(pair, rng(), True)
    assert row["mask"].sum() == 11 and row["patch_mask"].sum() <= 6 and "itm_labels" not in row
    chosen = row["token_labels"] >= 0
    assert (row["token_labels"][chosen] == row["tokens"][chosen]).all()
    assert (row["masked_tokens"][~chosen] == row["tokens"][~chosen]).all() and 1 <= chosen.sum() <= 2


def test_captions_lose_whole_words_and_texts_alone_lose_pieces(tokenizer):
    text = "under " * 8  # un ##der
    pairs, alone = [], []
    for seed in range(60):
        example = WithOthers(Captions([text, "cat"]))[0]
        for found, raw in ((pairs, example), (alone, {"text": text})):
            row = make(tokenizer, text_length=12, mlm_probability=0.3).example(raw, rng(seed), True)
            if row.get("itm_labels", 1) == 1:
                found.append((row["token_labels"] >= 0)[1:11].reshape(5, 2))
    assert all((row[:, 0] == row[:, 1]).all() and row.sum() == 4 for row in pairs)
    assert any((row[:, 0] != row[:, 1]).any() for row in alone)
    assert abs(np.mean(alone) - 0.3) < 4 * (0.21 / 600) ** 0.5


def test_a_text_alone_hides_no_more_than_its_bound(tokenizer):
    processor = make(tokenizer, mlm_probability=0.9, max_masked_tokens=2)
    hidden = [processor.example({"text": TEXT}, rng(seed), True)["token_labels"] >= 0 for seed in range(5)]
    assert [row.sum() for row in hidden] == [2] * 5


def test_one_caption_in_ten_is_anothers(tokenizer):
    texts = ["cat", "man", ["cat", "two dogs"], "cat", "horse"]
    source = WithOthers(Captions(texts))
    processor = make(tokenizer, codebook_size=None, mask_patches=0, max_length=4)
    known = {tuple(processor(None, [text])["tokens"][0]): text for text in ("cat", "man", "two dogs", "horse")}
    replaced, draws = [], 600
    for seed in range(draws):
        row = processor.example(source[0], rng(seed), True)
        text = known[tuple(row["tokens"])]
        assert (text == "cat") == (row["itm_labels"] == 1)
        replaced += [text] if text != "cat" else []
    assert abs(len(replaced) / draws - 0.1) < 4 * (0.09 / draws) ** 0.5
    assert set(replaced) == {"man", "two dogs", "horse"}
    only = {known[tuple(processor.example(source[2], rng(seed), True)["tokens"])] for seed in range(300)}
    assert only == {"cat", "two dogs", "man", "horse"}
    with pytest.raises(FatalDataError, match="100 other examples of its source have no text or the same"):
        [processor.example(WithOthers(Captions(["cat"] * 3))[0], rng(seed), True) for seed in range(60)]
    with pytest.raises(FatalDataError, match="needs `others`"):
        [processor.example({"image": png(), "text": "cat"}, rng(seed), True) for seed in range(60)]


def test_storage_that_fails_under_another_caption_stops_the_run(tokenizer):
    class Failing(Captions):
        def __getitem__(self, index):
            if index:
                raise OSError(5, "Input/output error")
            return super().__getitem__(index)

    source = WithOthers(Failing(["cat", "man"]))
    with pytest.raises(FatalDataError, match="captions: sample 1: .*Input/output error"):
        [make(tokenizer).example(source[0], rng(seed), True) for seed in range(60)]


def test_batches_do_not_depend_on_workers(tokenizer):
    source = WithOthers(Captions(["cat", "man", "two dogs", "horse", "who is"]))

    def batches(workers):
        loader = Loader([source], make(tokenizer, itm_probability=0.5).example, LoaderSettings(4, 3, workers))
        with loader.iterate(2) as iterator:
            return list(itertools.islice(iterator, 3))

    for ours, theirs in zip(batches(0), batches(3), strict=True):
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert {0, 1} == set(np.concatenate([batch["itm_labels"] for batch in batches(0)]).tolist())


def test_labels_of_fine_tuning(tokenizer, tmp_path):
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(["yes", "No", "two", "three"]))
    config = {"task": "soft_labels", "answers": str(answers), "num_answers": 4, "image": {"size": 64, "crop": None}}
    config |= {"image": {"size": 64, "crop": None, "mode": "exact"}}
    processor = Processor.from_config(build(ProcessorConfig, config, "processor"))
    processor.tokenizer = tokenizer
    people = ["yes"] * 4 + ["no"] * 3 + ["two"] * 2 + ["rare"]
    row = processor.example({"image": png(), "text": "who ?", "answer": people}, rng(), True)
    np.testing.assert_allclose(row["label_scores"], [1, 0.9, 0.6, 0], atol=1e-6)
    assert processor.example({"text": "a", "answer": "three"}, rng(), True)["label_scores"].tolist() == [0, 0, 0, 1]
    assert row.keys() == {"image", "tokens", "mask", "label_scores"}
    processor.save(tmp_path / "saved")
    assert Processor.load(tmp_path / "saved").answers == ("yes", "No", "two", "three")
    with pytest.raises(UserError, match="expected 5 different answers, found 4 of 4"):
        Processor.from_config(build(ProcessorConfig, config | {"num_answers": 5}, "processor"))

    classes = make(tokenizer, task="classification")
    row = classes.example({"text": "a cat", "text_pair": "two dogs", "label": "True"}, rng(), True)
    assert (
        row["labels"] == 1
        and row["labels"].dtype == np.int32
        and row["token_types"].tolist() == [0] * 4 + [1] * 3 + [0] * 13
    )
    value = make(tokenizer, task="regression").example({"text": "a", "label": 3.5}, rng(), True)["labels"]
    assert value == np.float32(3.5) and value.dtype == np.float32
    for task, label in (
        ("classification", "maybe"),
        ("classification", None),
        ("regression", "x"),
        ("regression", None),
    ):
        with pytest.raises(UserError, match="example k: label: expected a"):
            make(tokenizer, task=task).example({"key": "k", "text": "a", "label": label}, rng(), True)


def test_sentences_of_a_pair_may_look_alike(tokenizer, tmp_path):
    alike, example = make(tokenizer, token_types=False, task="classification"), {"text": "a", "text_pair": "man"}
    row = alike.example({**example, "label": 1}, rng(), True)
    assert row.keys() == Processor.rows(alike.config, example).keys() == {"tokens", "mask", "labels"}
    both = make(tokenizer)(None, ["a"], ["man"])
    assert "token_types" in both and (both["tokens"] == alike(None, ["a"], ["man"])["tokens"]).all()
    assert "token_types" not in alike(None, ["a"], ["man"])
    alike.save(tmp_path)
    assert not Processor.load(tmp_path).config.token_types


def test_labels_are_compared_with_the_number_of_classes(tokenizer):
    processor = make(tokenizer, task="classification", num_labels=2)
    for label in (0, 1, -1, True):
        assert processor.example({"text": "a", "label": label}, rng(), True)["labels"] == int(label)
    with pytest.raises(UserError, match="example k: label: expected one of the classes 0 to 1, found 2"):
        processor.example({"key": "k", "text": "a", "label": 2}, rng(), True)


def test_in_training_the_labels_are_the_classifiers_classes():
    run = lambda outputs: FLAVAConfig(classifier=ClassifierConfig(outputs))  # noqa: E731
    config = ProcessorConfig(task="classification")
    assert config.for_run(run(3), None).num_labels == 3
    assert config.for_run(run(1), None).num_labels is None  # a number, as of STS-B
    assert dataclasses.replace(config, num_labels=2).for_run(run(3), None).num_labels == 2  # `check` refuses it


def test_pictures_of_fine_tuning_may_be_varied_in_any_way(tokenizer):
    options = {"task": "classification", "augment": AugmentSettings(flip=1.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))}
    processor = make(tokenizer, **options)
    example = {"image": png(picture(size=(64, 64))), "label": 1}
    flipped = processor.example(example, rng(), True)["image"]
    np.testing.assert_array_equal(flipped[:, ::-1], processor.example(example, rng(), False)["image"])
    with pytest.raises(UserError, match="pretraining only crops pictures, found flip"):
        ProcessorConfig(augment=AugmentSettings(flip=0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 2}, "max_length: expected at least 3, found 2"),
        ({"mlm_probability": 1.0}, r"mlm_probability: expected a share in \[0, 1\), found 1.0"),
        ({"itm_probability": -0.1}, "itm_probability"),
        ({"patch_size": 15}, "patch_size: expected a divisor"),
        ({"num_labels": 0}, "num_labels: expected at least 1, found 0"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(UserError, match=message):
        ProcessorConfig(**options)


def test_wrong_examples_are_named(tokenizer):
    for example, message in (
        ({"key": "k"}, "example k: expected image or text, found key"),
        ({"image": "/etc/passwd"}, "must be encoded bytes, found a path"),
        ({"image": b"GIF89a"}, "expected JPEG or PNG or WEBP"),
        ({"text": 3}, "text: expected a string, found int"),
    ):
        with pytest.raises(UserError, match=message):
            make(tokenizer).example(example, rng(), True)
    with pytest.raises(UserError, match="has no tokenizer"):
        Processor(None)(texts=["a"])
    with pytest.raises(UserError, match="images must be a list"):
        Processor(None)(images="a.png")
    assert Processor(None)(images=[])["image"].shape == (0, 224, 224, 3)
