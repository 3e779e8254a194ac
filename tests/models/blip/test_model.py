"""BLIP against Hugging Face on random checkpoints; what only the original has against compositions of tested parts."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlm.encoders.vit import ViT
from vlm.fusion.med import Med, MedConfig
from vlm.models.blip import example
from vlm.models.blip.config import VIT, BLIPConfig
from vlm.models.blip.model import BLIP
from vlm.tree import flatten, unflatten

TOKENS = np.array([[58, 11, 12, 13, 14, 2], [58, 21, 22, 2, 0, 0], [58, 31, 32, 33, 2, 0]])
MASK = TOKENS != 0
IDS = {"bos_id": 58, "enc_id": 59, "sep_id": 2, "cls_id": 1}
LABELS = np.where(MASK, TOKENS, -100)
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile
CASES = [(None, True), ((41, 30), False)]  # image size, masked


def _close(found, expected, name="", atol=2e-5):
    if isinstance(expected, tuple):
        expected = torch.stack(expected)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=atol, err_msg=name)


@functools.cache
def _compiled(model, method, constants):
    def run(params, arguments, flags):
        return model.apply({"params": params}, *arguments, method=method, **flags, **dict(constants))

    return jax.jit(run, compiler_options=QUICK)


def _apply(model, params, *arguments, method=None, **flags):
    """`model.apply`, compiled: flags are constants, arrays are arguments."""
    constants = {name: flags.pop(name) for name in sorted(flags) if isinstance(flags[name], bool | int | float)}
    return _compiled(model, method, tuple(constants.items()))(params, arguments, flags)


ALL = {"output_hidden_states": True, "output_attentions": True}


def _call(pair, torch_image, size, masked=True, ours=None, **theirs):
    """Ours and theirs on the same random image of a size and on TOKENS."""
    reference, model, params = pair
    image, pixels = torch_image(*(size or (24, 24)))
    found = _apply(
        model,
        params,
        image,
        TOKENS,
        MASK if masked else None,
        interpolate_positions=size is not None,
        **ALL,
        **(ours or {}),
    )
    expected = reference(
        pixel_values=pixels,
        input_ids=torch.tensor(TOKENS),
        attention_mask=torch.tensor(MASK.astype(int)) if masked else None,
        interpolate_pos_encoding=size is not None,
        **ALL,
        **theirs,
    )
    return found, expected


def _vision_equal(found, expected):
    for name in ("last_hidden_state", "hidden_states", "attentions"):
        _close(getattr(found, name), getattr(expected, name), name)


@pytest.mark.parametrize(("size", "masked"), CASES)
def test_captioning_equals_hf(hf_pair, torch_image, size, masked):
    pair = hf_pair("captioning")
    if masked:
        found, expected = _call(pair, torch_image, size, masked, {"labels": LABELS}, labels=torch.tensor(LABELS))
        _close(found.loss, expected.loss)
    else:
        found, expected = _call(pair, torch_image, size, masked, {"logits_to_keep": 2}, logits_to_keep=2)
        assert found.logits.shape == (3, 2, 60)
    _vision_equal(found, expected)
    for name in ("logits", "image_embeds"):
        _close(getattr(found, name), getattr(expected, name), name)
    decoder = pair[0].text_decoder(
        torch.tensor(TOKENS),
        attention_mask=torch.tensor(MASK.astype(int)) if masked else None,
        encoder_hidden_states=expected.image_embeds,
        **ALL,
    )
    for name in ("hidden_states", "attentions", "cross_attentions"):
        _close(getattr(found.decoder_output, name), getattr(decoder, name), name)


def test_smoothed_loss_equals_hf(hf_pair, torch_image, monkeypatch):
    pair = hf_pair("captioning")
    monkeypatch.setattr(pair[0].text_decoder, "label_smoothing", 0.1)
    ours = {"labels": LABELS, "label_smoothing": 0.1}
    found, expected = _call(pair, torch_image, None, True, ours, labels=torch.tensor(LABELS))
    _close(found.loss, expected.loss)


@pytest.mark.parametrize(("size", "masked"), CASES)
def test_matching_equals_hf(hf_pair, torch_image, size, masked):
    pair = hf_pair("retrieval")
    found, expected = _call(pair, torch_image, size, masked)
    _vision_equal(found, expected)
    for name in ("itm_score", "question_embeds"):
        _close(getattr(found, name), getattr(expected, name), name)
    encoder = pair[0].text_encoder(
        torch.tensor(TOKENS),
        attention_mask=torch.tensor(MASK.astype(int)) if masked else None,
        encoder_hidden_states=expected.last_hidden_state,
        **ALL,
    )
    for name in ("last_hidden_state", "hidden_states", "attentions", "cross_attentions"):
        _close(getattr(found.text_model_output, name), getattr(encoder, name), name)


def test_cosines_equal_hf(hf_pair, torch_image):
    pair = hf_pair("retrieval")
    found, expected = _call(pair, torch_image, None, True, {"use_itm_head": False}, use_itm_head=False)
    for name in ("itm_score", "question_embeds"):
        _close(getattr(found, name), getattr(expected, name), name)
    image, _ = torch_image()
    ours = [
        _apply(*pair[1:], image, method="encode_image"),
        _apply(*pair[1:], TOKENS, MASK, method="encode_text"),
    ]
    image_unit, text_unit = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in ours)
    np.testing.assert_allclose(image_unit @ text_unit.T, found.itm_score, atol=1e-6)
    np.testing.assert_allclose(found.logits_per_image, found.itm_score, atol=0)  # a model without temperature


def test_answering_equals_hf(hf_pair, torch_image, size=(16, 48)):
    """Questions without padding: HF's decoder reads padded question states, ours does not (`fusion/test_med.py`)."""
    reference, model, params = hf_pair("answering")
    image, pixels = torch_image(*(size or (24, 24)))
    question = np.array([[1, 40, 41, 42], [1, 43, 44, 2], [1, 50, 51, 52]])
    found = _apply(
        model,
        params,
        image,
        question,
        np.ones_like(question, bool),
        answer_tokens=TOKENS,
        answer_mask=MASK,
        labels=LABELS,
        interpolate_positions=size is not None,
        **ALL,
    )
    expected = reference(
        pixel_values=pixels,
        input_ids=torch.tensor(question),
        attention_mask=torch.ones(question.shape, dtype=int),
        decoder_input_ids=torch.tensor(TOKENS),
        decoder_attention_mask=torch.tensor(MASK.astype(int)),
        labels=torch.tensor(LABELS),
        interpolate_pos_encoding=size is not None,
        **ALL,
    )
    _vision_equal(found, expected)
    for name in ("loss", "image_embeds"):
        _close(getattr(found, name), getattr(expected, name), name)
    states = reference.text_encoder(torch.tensor(question), encoder_hidden_states=expected.image_embeds)[0]
    _close(found.question_embeds, states)
    answer = reference.text_decoder(
        torch.tensor(TOKENS), attention_mask=torch.tensor(MASK.astype(int)), encoder_hidden_states=states
    )
    _close(found.logits, answer.logits)


def test_answers_default_to_the_labels(hf_pair, torch_image):
    _, model, params = hf_pair("answering")
    image, _ = torch_image()
    losses = [
        _apply(model, params, image, TOKENS, MASK, answer_tokens=answers, labels=LABELS).loss
        for answers in (None, TOKENS)
    ]
    np.testing.assert_array_equal(*losses)


@pytest.mark.parametrize(("size", "masked"), CASES[:1])
def test_features_equal_hf(hf_pair, torch_image, size, masked):
    pair = hf_pair("features")
    found, expected = _call(pair, torch_image, size, masked, {"return_loss": True}, return_loss=True)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds", "loss"):
        _close(getattr(found, name), getattr(expected, name), name, atol=5e-5)
    for name in ("text_model_output", "vision_model_output"):
        for field in ("last_hidden_state", "pooler_output", "hidden_states", "attentions"):
            _close(getattr(getattr(found, name), field), getattr(expected, name)[field], f"{name}.{field}")


def test_multimodal_features_equal_hf(hf_pair, torch_image):
    reference, model, params = hf_pair("features")
    image, pixels = torch_image()
    expected = reference.get_multimodal_features(torch.tensor(TOKENS), pixels, torch.tensor(MASK.astype(int)))
    states = _apply(model, params, image, method="encode_image_states").last_hidden_state
    output = _apply(model, params, TOKENS, MASK, states, method="encode_multimodal")
    kernel = params["text_projection"]["kernel"]
    _close(output.pooler_output @ kernel, expected)


@pytest.mark.parametrize("kind", ["captioning", "retrieval"])
def test_gradients_equal_hf(hf_pair, torch_image, kind, our_tree):
    reference, model, params = hf_pair(kind)
    image, pixels = torch_image(32, 16)
    reference.zero_grad()
    theirs = {"pixel_values": pixels, "input_ids": torch.tensor(TOKENS), "interpolate_pos_encoding": True}
    theirs["attention_mask"] = torch.tensor(MASK.astype(int))
    classes = np.array([0, 1, 1])
    if kind == "captioning":
        reference(**theirs, labels=torch.tensor(LABELS)).loss.backward()
    else:
        scores = reference(**theirs).itm_score
        torch.nn.functional.cross_entropy(scores, torch.tensor(classes)).backward()

    def loss(params):
        labels = LABELS if kind == "captioning" else None
        flags = {"labels": labels, "interpolate_positions": True}
        found = model.apply({"params": params}, image, TOKENS, MASK, **flags)
        if kind == "captioning":
            return found.loss
        return -jnp.take_along_axis(jax.nn.log_softmax(found.itm_score), classes[:, None], axis=1).mean()

    found = flatten(jax.jit(jax.grad(loss), compiler_options=QUICK)(params))
    parameters = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in reference.named_parameters()}
    expected = flatten(our_tree(parameters))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=2e-5 * max(1, np.abs(value).max()), err_msg=path)
    assert sum(np.abs(v).max() > 0 for v in expected.values()) > 40


# ------------------------------------------------------------------------------------- what only the original has

SMALL = dataclasses.replace(VIT, hidden_size=24, num_layers=2, num_heads=3, mlp_dim=36, image_size=16, patch_size=8)
STACK = MedConfig(60, 16, 2, 2, 28, 20, 24)
NONE = {"shared_decoder": False, "projection_dim": None, "itm": False, "temperature": None}
CLS = np.where(TOKENS == 58, 1, TOKENS)


def _model(seed=0, **parts):
    """A small model with random parameters, norms and biases included."""
    model = BLIP(BLIPConfig(**{"vision": SMALL, "text": STACK, **parts}, **IDS))
    return model, _random(model, seed)


def _shapes(config):
    model = BLIP(config)
    return flatten(nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), **example(config)))["params"]))


def _random(model, seed):
    rng = np.random.default_rng(seed)
    drawn = {k: 0.15 * rng.normal(size=v.shape) + k.endswith("/scale") for k, v in _shapes(model.config).items()}
    drawn |= {"temperature": 0.2} if "temperature" in drawn else {}
    return unflatten({k: np.float32(v) for k, v in drawn.items()})


@pytest.fixture(scope="module")
def pretraining():
    return _model()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(5).normal(size=(3, 16, 16, 3)).astype(np.float32)


def _stack(model, params, name, *arguments, **flags):
    """One text stack alone, with its part of the parameters."""
    stack = Med(getattr(model.config, name), model.config.shared_decoder)
    return _apply(stack, params[name], *arguments, **flags).last_hidden_state


def test_pretraining_runs_one_stack_in_three_ways(pretraining, images):
    model, params = pretraining
    found = _apply(model, params, images, CLS, MASK)
    compared = _apply(model, params, images, CLS, MASK, use_itm_head=False)
    states = found.last_hidden_state
    enc, dec = (np.where(CLS == 1, new, CLS) for new in (59, 58))

    alone = _stack(model, params, "text", CLS, MASK)[:, 0]
    embeds = np.asarray(alone @ params["text_projection"]["kernel"]) + np.asarray(params["text_projection"]["bias"])
    unit = embeds / np.linalg.norm(embeds, axis=-1, keepdims=True)
    np.testing.assert_allclose(compared.text_embeds, unit, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.image_embeds, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(compared.itm_score, found.image_embeds @ unit.T, atol=1e-5)
    np.testing.assert_allclose(compared.logits_per_image, compared.itm_score / 0.2, rtol=1e-5)
    np.testing.assert_allclose(compared.logits_per_text, compared.logits_per_image.T)

    grounded = _stack(model, params, "text", enc, MASK, context=states)[:, 0]
    scores = np.asarray(grounded @ params["itm_head"]["kernel"]) + np.asarray(params["itm_head"]["bias"])
    np.testing.assert_allclose(found.itm_score, scores, atol=1e-5)
    decoded = _stack(model, params, "text", dec, MASK, context=states, causal=True)
    logits = _apply(model, params, decoded, method="lm_logits")
    np.testing.assert_allclose(found.logits, logits, atol=2e-5)


def test_which_token_is_written(pretraining, images):
    """[ENC] and [DEC] over [CLS] only; `encoder_token="cls"` and small vocabularies leave it."""
    model, params = pretraining
    states = _apply(model, params, images, method="encode_image_states").last_hidden_state
    match = lambda model, tokens: np.asarray(_apply(model, params, tokens, MASK, states, method="match"))  # noqa: E731
    ours = match(model, CLS)
    np.testing.assert_array_equal(ours, match(model, np.where(CLS == 1, 59, CLS)))
    kept = BLIP(dataclasses.replace(model.config, encoder_token="cls"))
    assert np.abs(ours - match(kept, CLS)).max() > 1e-3
    tiny = BLIP(dataclasses.replace(model.config, enc_id=60))
    np.testing.assert_array_equal(match(kept, CLS), match(tiny, CLS))


def test_answers_come_from_states_of_the_question_width_and_hide_its_padding(images):
    """Hugging Face builds this decoder for the image's width, and shows it padded question states."""
    model, params = _model(decoder=dataclasses.replace(STACK, context_size=16), **NONE)
    assert params["decoder"]["layers"]["cross_attention"]["key"]["kernel"].shape == (2, 16, 16)
    assert params["text"]["layers"]["cross_attention"]["key"]["kernel"].shape == (2, 24, 16)
    answers = np.stack([CLS, CLS[::-1]], 1)
    answer_mask = answers != 0
    found = _apply(model, params, images, CLS, MASK, answer_tokens=answers, answer_mask=answer_mask, labels=answers)
    question = np.where(CLS == 1, 59, CLS)
    memory = _stack(model, params, "text", question, MASK, context=found.last_hidden_state)
    np.testing.assert_allclose(found.question_embeds, memory, atol=1e-5)
    for i in range(2):
        start = np.where(answers[:, i] == 1, 58, answers[:, i])
        flags = {"context": memory, "context_mask": MASK, "causal": True}
        decoded = _stack(model, params, "decoder", start, answer_mask[:, i], **flags)
        logits = _apply(model, params, decoded, method="lm_logits")
        np.testing.assert_allclose(found.logits[:, i], logits, atol=2e-5)


def test_pairs_of_images(images):
    model, params = _model(text=STACK, num_images=2, num_labels=2, **NONE)
    pairs = np.stack([images, images[::-1]], 1)
    found = _apply(model, params, pairs, CLS, MASK)
    states = _apply(ViT(SMALL), params["vision"], pairs.reshape(-1, 16, 16, 3)).last_hidden_state
    context = states.reshape(3, 2, *states.shape[1:])
    np.testing.assert_allclose(found.last_hidden_state, context, atol=1e-5)
    stack = Med(STACK, average_layers=1)
    hidden = _apply(stack, params["text"], np.where(CLS == 1, 59, CLS), MASK, context=context).last_hidden_state[:, 0]
    head = jax.tree.map(np.asarray, params["classifier"])
    hidden = np.maximum(np.asarray(hidden) @ head["dense"]["kernel"] + head["dense"]["bias"], 0)
    np.testing.assert_allclose(found.logits, hidden @ head["out"]["kernel"] + head["out"]["bias"], atol=1e-5)
    with pytest.raises(ValueError, match=r"image: expected \[B, 2, H, W, 3\], found \[3, 16, 16, 3\]"):
        _apply(model, params, images, CLS, MASK)


def test_videos(pretraining, images):
    model, params = pretraining
    video = np.stack([images, images[::-1]], 1)
    each = [_apply(model, params, x, method="encode_image_states") for x in (images, images[::-1])]
    embeds = [_apply(model, params, x, method="encode_image") for x in (images, images[::-1])]
    joined = {
        "concatenate": jnp.concatenate([e.last_hidden_state for e in each], 1),
        "average": (each[0].last_hidden_state + each[1].last_hidden_state) / 2,
    }
    for mode, expected in joined.items():
        shown = BLIP(dataclasses.replace(model.config, video=mode))
        found = _apply(shown, params, video, method="encode_image_states", **ALL)
        np.testing.assert_allclose(found.last_hidden_state, expected, atol=1e-5)
        assert found.hidden_states.shape == (3, 3, 2, 5, 24)
        assert found.attentions.shape == (2, 3, 2, 3, 5, 5)
        embed = _apply(shown, params, video, method="encode_image")
        np.testing.assert_allclose(embed, (embeds[0] + embeds[1]) / 2, atol=1e-5)
    with pytest.raises(ValueError, match="video='none'"):
        _apply(model, params, video, method="encode_image_states")


def test_candidates_share_their_context(pretraining, images):
    model, params = pretraining
    states = _apply(model, params, images, method="encode_image_states").last_hidden_state
    visible = np.arange(5)[None] < np.array([[5], [3], [4]])
    candidates = np.stack([CLS, CLS[::-1]], 1)
    for method in ("match", "decode_logits"):
        found = _apply(model, params, candidates, candidates != 0, states, visible, method=method)
        for i in range(2):
            tokens = candidates[:, i]
            alone = _apply(model, params, tokens, tokens != 0, states, visible, method=method)
            np.testing.assert_allclose(found[:, i], alone, atol=1e-5)


def test_visual_dialog_reads_image_then_caption(images):
    parts = {"text": dataclasses.replace(STACK, hidden_size=24), **NONE, "itm": True}
    model, params = _model(**parts)
    context, mask = _apply(model, params, images, CLS, MASK, method="encode_dialog")
    states = _apply(model, params, images, method="encode_image_states").last_hidden_state
    caption = _apply(model, params, CLS, MASK, method="encode_text_states").last_hidden_state
    np.testing.assert_allclose(context, np.concatenate([states, caption], 1), atol=1e-5)
    np.testing.assert_array_equal(mask, np.concatenate([np.ones((3, 5), bool), MASK], 1))
    candidates = np.stack([CLS, CLS[::-1]], 1)
    assert _apply(model, params, candidates, candidates != 0, context, mask, method="match").shape == (3, 2, 2)


def test_an_untied_head_has_its_own_kernel(images):
    model, params = _model(text=None, decoder=STACK, tied_lm_head=False, **NONE)
    found = _apply(model, params, images, CLS, MASK).logits
    params["lm_head"]["kernel"] = params["decoder"]["token_embedding"]["embedding"].T
    tied = BLIP(dataclasses.replace(model.config, tied_lm_head=True))
    same = _apply(model, params, images, CLS, MASK).logits
    np.testing.assert_allclose(same, _apply(tied, params, images, CLS, MASK).logits, atol=1e-5)
    assert np.abs(found - same).max() > 0.01
