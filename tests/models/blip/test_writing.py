"""BLIP writes what Hugging Face's `generate` writes; its cached steps are its full forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import vlm
from vlm.errors import UserError
from vlm.generation import prepare
from vlm.models.blip.model import BLIP

from ...quick import apply, random_params

PROMPTS = np.array([[58, 11, 12, 13], [58, 21, 22, 23], [58, 31, 32, 33]], np.int32)
SETTINGS = [
    {"max_new_tokens": 8},
    {"max_new_tokens": 8, "num_beams": 3},
    {"max_length": 12, "num_beams": 3, "min_length": 8, "length_penalty": 2.0, "num_return_sequences": 2},
    {"max_new_tokens": 8, "num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
]


def _equal(found, expected):
    expected = np.asarray(expected)
    for row, length in enumerate(found.lengths):
        np.testing.assert_array_equal(found.sequences[row, :length], expected[row, :length])
        assert set(expected[row, length:]) <= {0, 2}


@pytest.fixture(scope="module")
def captioner(hf_pair):
    reference, model, params = hf_pair("captioning")
    return reference, model, prepare(model, params)


@pytest.mark.parametrize("settings", SETTINGS)
def test_captions_equal_hf(captioner, torch_image, settings):
    reference, model, prepared = captioner
    image, pixels = torch_image()
    found = vlm.generate(model, prepared, {"image": image, "tokens": PROMPTS}, **settings)
    ids = torch.tensor(np.pad(PROMPTS, ((0, 0), (0, 1)), constant_values=2)).long()  # theirs drops the last column
    with torch.inference_mode():
        expected = reference.generate(pixels, ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
    _equal(found, expected)


def test_unconditional_captions_equal_hf(captioner, torch_image):
    reference, model, prepared = captioner
    image, pixels = torch_image()
    reference.decoder_input_ids = 58
    with torch.inference_mode():
        expected = reference.generate(pixels, num_beams=3, max_new_tokens=6)
    found = vlm.generate(model, prepared, {"image": image}, num_beams=3, max_new_tokens=6)
    assert (found.prompt_lengths == 1).all()
    _equal(found, expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_equal_hf(hf_pair, torch_image, num_beams):
    reference, model, params = hf_pair("answering")
    image, pixels = torch_image()
    questions = np.array([[1, 11, 12, 2], [1, 21, 22, 2], [1, 31, 32, 2]], np.int32)
    reference.decoder_start_token_id = 58
    settings = {"num_beams": num_beams, "max_new_tokens": 6}
    with torch.inference_mode():
        expected = reference.generate(torch.tensor(questions).long(), pixels, **settings)
    batch = {"image": image, "tokens": questions, "mask": questions != 0}
    found = vlm.generate(model, params, batch, **settings)
    _equal(found, expected)
    wider = {
        "image": image,
        "tokens": np.pad(questions, ((0, 0), (0, 3))),
        "mask": np.pad(questions, ((0, 0), (0, 3))) != 0,
    }
    np.testing.assert_array_equal(vlm.generate(model, params, wider, **settings).sequences, found.sequences)


def test_rows_do_not_depend_on_the_batch_or_its_padding(captioner, torch_image):
    _, model, prepared = captioner
    image, _ = torch_image()
    texts = [[1, 11, 2], [1, 21, 22, 23, 24, 2], [1, 31, 32, 33, 2]]  # with [CLS] and [SEP], as tokenizers write them
    tokens = np.array([text + [0] * (9 - len(text)) for text in texts], np.int32)
    for settings in ({"max_new_tokens": 6}, {"max_length": 11, "num_beams": 3}):
        together = vlm.generate(model, prepared, {"image": image, "tokens": tokens, "mask": tokens != 0}, **settings)
        for row, text in enumerate(texts):
            alone = vlm.generate(
                model, prepared, {"image": image[row : row + 1], "tokens": np.array([text])}, **settings
            )
            length = together.lengths[row]
            assert alone.prompt_lengths == together.prompt_lengths[row] == len(text) - 1
            np.testing.assert_array_equal(alone.sequences[0, :length], together.sequences[row, :length])
            np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=1e-4)


@pytest.mark.parametrize("kind", ["captioning", "shared"])
def test_cached_steps_equal_the_full_pass(hf_pair, torch_image, kind):
    """Greedy tokens and their log-probabilities are those of one causal pass over the finished sequences."""
    _, model, params = hf_pair("captioning")
    image, _ = torch_image()
    if kind == "shared":
        config = dataclasses.replace(model.config, text=model.config.decoder, decoder=None, shared_decoder=True)
        model = BLIP(config)
        params = random_params(model, image[:1], PROMPTS[:1])
    found = vlm.generate(model, params, {"image": image, "tokens": PROMPTS}, max_new_tokens=7, log_probs=True)

    def full(module, tokens):
        states = module.encode_image_states(image).last_hidden_state
        return jax.nn.log_softmax(module.decode_logits(tokens, None, states))

    log_probs = jax.jit(lambda p, t: model.apply({"params": p}, t, method=full))(params, jnp.asarray(found.sequences))
    for row, length in enumerate(found.lengths):
        for step, position in enumerate(range(4, length)):
            token = found.sequences[row, position]
            assert token == log_probs[row, position - 1].argmax()
            np.testing.assert_allclose(found.log_probs[row, step], log_probs[row, position - 1, token], atol=3e-5)


def test_models_and_batches_that_cannot_write(hf_pair, torch_image):
    image, _ = torch_image()
    _, model, params = hf_pair("retrieval")
    with pytest.raises(UserError, match="has no decoder"):
        vlm.generate(model, params, {"image": image})
    _, model, params = hf_pair("answering")
    with pytest.raises(UserError, match="expected questions as tokens and mask, found image"):
        vlm.generate(model, params, {"image": image})
    asked = {"image": image, "tokens": PROMPTS, "mask": PROMPTS != 0}
    for change, message in (
        ({"tokens": PROMPTS + 2}, "question: expected ids from 0 to 59, found 60"),
        ({"mask": np.ones((3, 3), bool)}, r"tokens: expected \[B, L\] with a mask of this shape, found \(3, 4\) and"),
        ({"image": image[:2]}, "as many of everything, found image 2, tokens 2, mask 2, question 3"),
        ({name: x[:0] for name, x in asked.items()}, "expected at least one row"),
        ({"tokens": np.ones((3, 21), int), "mask": None}, "questions of at most 20 tokens, found 21"),
    ):
        with pytest.raises(UserError, match=message):
            vlm.generate(model, params, asked | change)
    _, model, params = hf_pair("captioning")
    with pytest.raises(
        UserError, match=r"cannot read image \(3, 32, 32, 3\), .*: image: expected 24x24 pixels, found 32x32"
    ):
        vlm.generate(model, params, {"image": torch_image(32, 32)[0]}, max_new_tokens=3)
    found = "has no option 'interpolate'; did you mean 'interpolate_positions'"
    with pytest.raises(UserError, match=f"prefill_options: BLIP {found}"):
        vlm.generate(model, params, {"image": image}, prefill_options={"interpolate": True}, max_new_tokens=3)
    with pytest.raises(UserError, match=r"with a mask of this shape, found \(4,\) and \(4,\)"):
        vlm.generate(model, params, {"image": image, "tokens": PROMPTS[0]})
    with pytest.raises(UserError, match="expected image, found tokens"):
        vlm.generate(model, params, {"tokens": PROMPTS})
    with pytest.raises(UserError, match="at most 20 tokens; asked for 24"):
        vlm.generate(model, params, {"image": image, "tokens": PROMPTS}, max_new_tokens=20)


TEXTS = [[1, 11, 12, 13, 14, 2], [1, 21, 22, 2], [1, 31, 32, 33, 2]]


def _padded(texts):
    tokens = np.array([text + [0] * (7 - len(text)) for text in texts], np.int32)
    return tokens, tokens != 0


def _losses(monkeypatch, part, row):
    """Theirs of one row at a time, not smoothed."""
    monkeypatch.setattr(part, "label_smoothing", 0.0)
    with torch.inference_mode():
        return [float(row(number, torch.tensor([text]).long())) for number, text in enumerate(TEXTS)]


def _as_labels(text):
    return torch.where(torch.arange(text.shape[1]) == 0, -100, text)


def test_captions_are_as_likely_as_hf_says(hf_pair, torch_image, monkeypatch):
    """Its loss of every row alone is our mean; padding is nothing to us, and [CLS] is replaced by [DEC]."""
    reference, model, params = hf_pair("captioning")
    image, pixels = torch_image()

    def row(number, text):
        start = torch.where(text == 1, 58, text)
        return reference(pixels[number : number + 1], start, labels=_as_labels(text)).loss

    expected = _losses(monkeypatch, reference.text_decoder, row)
    tokens, mask = _padded(TEXTS)
    counts = mask.sum(1) - 1
    score = functools.partial(apply, model, params, image, method="score")
    found = score(tokens, mask)
    assert found.dtype == np.float32 and found.shape == (3,)
    np.testing.assert_allclose(found / counts, expected, rtol=2e-5)
    np.testing.assert_allclose(score(tokens, mask, mean=True), expected, rtol=2e-5)
    after = np.where(mask & (np.arange(7) > 1), tokens, -100)
    first = score(tokens, mask, labels=np.where(np.arange(7) == 1, tokens, -100))
    np.testing.assert_allclose(score(tokens, mask, labels=after) + first, found, rtol=1e-5)
    np.testing.assert_array_equal(score(tokens, mask, labels=np.full_like(tokens, -100), mean=True), 0)
    candidates = np.stack([tokens, tokens[::-1]], 1), np.stack([mask, mask[::-1]], 1)
    both = score(*candidates)
    assert both.shape == (3, 2) and abs(both[0, 1] - both[0, 0]) > 0.1
    np.testing.assert_allclose(both[:, 0], found, rtol=1e-5)


def test_answers_are_as_likely_as_hf_says(hf_pair, torch_image, monkeypatch):
    """Its loss of every row alone, with a question that is not padded; padding is nothing to us."""
    reference, model, params = hf_pair("answering")
    image, pixels = torch_image()
    questions = np.array([[1, 11, 12, 2, 0], [1, 21, 22, 23, 2], [1, 31, 2, 0, 0]], np.int32)

    def row(number, text):
        question = torch.tensor([[token for token in questions[number] if token]]).long()
        inputs = {"labels": _as_labels(text), "decoder_input_ids": torch.where(text == 1, 58, text)}
        return reference(question, pixels[number : number + 1], **inputs).loss

    expected = _losses(monkeypatch, reference.text_decoder, row)
    inputs = image, *_padded(TEXTS), questions, questions != 0
    np.testing.assert_allclose(apply(model, params, *inputs, method="score", mean=True), expected, rtol=2e-5)


def test_only_a_model_with_all_parts_of_pretraining_is_one(hf_pair):
    config = hf_pair("captioning")[1].config
    shared = {"text": config.decoder, "decoder": None, "shared_decoder": True}
    for parts, expected in (
        ({}, False),
        (shared, False),
        (shared | {"itm": True, "projection_dim": 4, "temperature": 0.07}, True),
    ):
        assert BLIP(dataclasses.replace(config, **parts)).pretrained_only is expected
