"""AltCLIP against Hugging Face on random checkpoints: every output field, paddings, interpolated sizes, variants."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import vlm
from vlm.encoders.bert import BertConfig
from vlm.encoders.clip_text import ClipTextConfig
from vlm.encoders.vit import ViTConfig
from vlm.models.altclip import example
from vlm.models.altclip.model import AltCLIP, AltCLIPConfig

from ...quick import apply, random_params

TEXT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT |= {"max_position_embeddings": 24, "project_dim": 24, "pad_token_id": 1}
VISION = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 56}
VISION |= {"image_size": 12, "patch_size": 4}
VARIANTS = {
    "narrow": (TEXT, VISION, 20),
    "m18_like": (TEXT | {"hidden_dropout_prob": 0.1}, VISION | {"hidden_size": 160, "num_attention_heads": 2}, 24),
    "deep": (TEXT | {"num_hidden_layers": 5}, VISION | {"num_hidden_layers": 6, "image_size": 20}, 16),
}
TOKENS = np.array([[0, 11, 12, 13, 14, 2], [0, 11, 2, 1, 1, 1], [1, 1, 1, 0, 21, 2]])


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def pair(request, tmp_path_factory, randomise):
    """A random HF model and the same weights as `vlm.load` gives them."""
    text, vision, width = VARIANTS[request.param]
    config = transformers.AltCLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
    reference = randomise(transformers.AltCLIPModel._from_config(config, attn_implementation="eager"))
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    model, params, _ = vlm.load(folder)
    return reference, model, params


def _image(side, rows=None, columns=None):
    shape = (3, rows or side, columns or side, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _compare(found, expected):
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds", "loss"):
        if getattr(expected, name) is not None:
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-4, err_msg=name)
    for name in ("text_model_output", "vision_model_output"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        for field in ("last_hidden_state", "pooler_output"):
            np.testing.assert_allclose(getattr(ours, field), theirs[field], atol=1e-4, err_msg=f"{name}.{field}")
        for field in ("hidden_states", "attentions"):
            if theirs[field]:
                stacked = torch.stack(theirs[field])
                np.testing.assert_allclose(getattr(ours, field), stacked, atol=1e-4, err_msg=f"{name}.{field}")


@pytest.mark.parametrize(("size", "masked"), [(None, True), (None, False), ((16, 8), True), ((23, 41), False)])
def test_every_output_equals_hf(pair, masked, size):
    reference, model, params = pair
    image = _image(model.config.vision.image_size, *(size or ()))
    mask = TOKENS != 1
    found = apply(
        model,
        params,
        image=image,
        tokens=jnp.asarray(TOKENS),
        mask=jnp.asarray(mask) if masked else None,
        return_loss=True,
        interpolate_positions=size is not None,
        output_hidden_states=True,
        output_attentions=True,
    )
    with torch.no_grad():
        expected = reference(
            input_ids=torch.tensor(TOKENS),
            pixel_values=torch.tensor(image.transpose(0, 3, 1, 2)),
            attention_mask=torch.tensor(mask.astype(int)) if masked else None,
            return_loss=True,
            interpolate_pos_encoding=size is not None,
            output_hidden_states=True,
            output_attentions=True,
        )
    _compare(found, expected)


def test_features_are_projected_and_not_normalised(pair):
    reference, model, params = pair
    image, mask = _image(model.config.vision.image_size), TOKENS != 1
    with torch.no_grad():
        pixels = torch.tensor(image.transpose(0, 3, 1, 2))
        theirs = reference.get_image_features(pixel_values=pixels).pooler_output
        attention_mask = torch.tensor(mask.astype(int))
        text = reference.get_text_features(input_ids=torch.tensor(TOKENS), attention_mask=attention_mask).pooler_output
    ours = apply(model, params, image, method="encode_image")
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    ours = apply(model, params, TOKENS, mask, method="encode_text")
    np.testing.assert_allclose(ours, text, atol=1e-4)
    assert np.abs(np.linalg.norm(ours, axis=-1) - 1).max() > 1e-2


def test_given_embeddings_positions_and_types(pair):
    reference, model, params = pair
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(2, 5, 32)).astype(np.float32)
    positions, types = rng.integers(2, 24, (2, 5)), np.zeros((2, 5), int)
    found = apply(model, params, token_embeds=embeds, positions=positions, token_types=types)
    with torch.no_grad():
        given = {"position_ids": torch.tensor(positions), "token_type_ids": torch.tensor(types)}
        expected = reference.text_model(inputs_embeds=torch.tensor(embeds), **given)
    np.testing.assert_allclose(found.text_model_output.last_hidden_state, expected.last_hidden_state, atol=1e-4)
    assert found.image_embeds is None and found.logits_per_text is None


def test_gradients_of_the_loss_equal_hf(pair):
    reference, model, params = pair
    image, mask = _image(model.config.vision.image_size), TOKENS != 1

    def loss(params):
        batch = {"image": image, "tokens": jnp.asarray(TOKENS), "mask": jnp.asarray(mask)}
        return model.apply({"params": params}, **batch, return_loss=True).loss

    grads = jax.jit(jax.grad(loss))(params)
    reference.zero_grad()
    reference(
        input_ids=torch.tensor(TOKENS),
        pixel_values=torch.tensor(image.transpose(0, 3, 1, 2)),
        attention_mask=torch.tensor(mask.astype(int)),
        return_loss=True,
    ).loss.backward()
    scale = reference.logit_scale.grad
    np.testing.assert_allclose(grads["logit_scale"], scale, atol=1e-4)
    np.testing.assert_allclose(grads["text_projection"]["kernel"], reference.text_projection.weight.grad.T, atol=1e-4)
    fc1 = [layer.mlp.fc1.weight.grad.T for layer in reference.vision_model.encoder.layers]
    np.testing.assert_allclose(grads["vision"]["layers"]["mlp"]["up"]["kernel"], torch.stack(fc1), atol=1e-4)
    words = reference.text_model.roberta.embeddings.word_embeddings.weight.grad.clone()
    ours = np.array(grads["text"]["token_embedding"]["embedding"])
    ours[1] = 0  # PyTorch gives the padding row no gradient; ours flows only through padded positions of row 2, 3
    np.testing.assert_allclose(ours, words, atol=1e-4)


SMALL = AltCLIPConfig(
    vision=ViTConfig(hidden_size=16, num_layers=2, num_heads=2, mlp_dim=24, image_size=8, patch_size=4),
    text=BertConfig(vocab_size=30, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=24, max_length=12),
    project_dim=12,
    projection_dim=8,
)


def _init(config):
    model = AltCLIP(config)
    return model, random_params(model, **example(config))


def test_token_level_conditioning_follows_its_definition():
    model, params = _init(dataclasses.replace(SMALL, text_transformation_pre=True))
    tokens, mask = jnp.array([[0, 5, 6, 2]]), jnp.ones((1, 4), bool)
    states = apply(model, params, tokens=tokens, mask=mask, output_hidden_states=True)
    states = np.asarray(states.text_model_output.hidden_states)
    params = jax.tree.map(np.asarray, params)
    linear = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    last = apply(model, params, tokens, mask, method="encode_tokens")
    np.testing.assert_allclose(last, linear("text_transformation", states[-1]), atol=1e-5)
    found = apply(model, params, tokens, mask, layer="penultimate", method="encode_tokens")
    x = states[-2]
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    normed = normed * params["text_norm"]["scale"] + params["text_norm"]["bias"]
    np.testing.assert_allclose(found, linear("text_transformation_pre", normed), atol=1e-5)
    plain, params = _init(SMALL)
    with pytest.raises(ValueError, match="text_transformation_pre"):
        plain.apply({"params": params}, tokens, mask, layer="penultimate", method=plain.encode_tokens)


def test_towers_stand_alone():
    tokens, image = jnp.array([[0, 5, 2]]), jnp.zeros((1, 8, 8, 3))
    text, params = _init(dataclasses.replace(SMALL, vision=None))
    assert set(params) == {"text", "text_norm", "text_transformation", "text_projection"}
    assert apply(text, params, tokens=tokens).text_embeds.shape == (1, 8)
    vision, params = _init(dataclasses.replace(SMALL, text=None, projection_dim=None))
    assert set(params) == {"vision"}
    output = apply(vision, params, image=image)
    assert output.image_embeds is None and output.vision_model_output.last_hidden_state.shape == (1, 5, 16)
    clip = ClipTextConfig(vocab_size=30, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=24, eos_id=2)
    plain, params = _init(dataclasses.replace(SMALL, text=None, clip_text=clip))
    assert set(params) == {"vision", "vision_projection", "text", "text_projection", "logit_scale"}
    assert apply(plain, params, image=image, tokens=tokens).logits_per_text.shape == (1, 1)
    with pytest.raises(ValueError, match="found none"):
        AltCLIPConfig(vision=None, text=None)
    with pytest.raises(ValueError, match=r"\['text', 'clip_text'\]"):
        AltCLIPConfig(vision=None, clip_text=clip)


def test_published_parameter_counts():
    def count(config):
        shapes = jax.eval_shape(lambda: AltCLIP(config).init(jax.random.key(0), **example(config)))
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nn.unbox(shapes)))

    assert count(AltCLIPConfig()) == 864_186_113
    huge = ViTConfig(hidden_size=1280, num_layers=32, num_heads=16, mlp_dim=5120, patch_size=14)
    assert huge.head_dim == 80
    assert count(AltCLIPConfig(vision=huge, project_dim=1024, projection_dim=1024)) == 1_193_017_857
    assert count(AltCLIPConfig(text=None, projection_dim=None)) == 303_179_776
    head_only = AltCLIPConfig(vision=None, projection_dim=None)
    assert count(head_only) == 559_630_080


def test_bfloat16_stays_close():
    model, params = _init(SMALL)
    half = AltCLIP(
        dataclasses.replace(
            SMALL,
            vision=dataclasses.replace(SMALL.vision, dtype="bfloat16"),
            text=dataclasses.replace(SMALL.text, dtype="bfloat16"),
        )
    )
    batch = {"image": jnp.asarray(_image(8)), "tokens": jnp.asarray(TOKENS), "mask": jnp.asarray(TOKENS != 1)}
    a, b = (apply(m, params, **batch) for m in (model, half))
    assert b.vision_model_output.last_hidden_state.dtype == jnp.bfloat16 and b.text_embeds.dtype == jnp.float32
    np.testing.assert_allclose(a.text_embeds, b.text_embeds, atol=0.05)
