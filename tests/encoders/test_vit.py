"""The shared ViT against three different PyTorch vision towers: CLIP, BLIP (fused qkv), FLAVA (masked patches)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from vlm.encoders.vit import ViT, ViTConfig, patchify

from ..quick import apply, random_params

SIZE = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "mlp_dim": 48, "image_size": 12, "patch_size": 4}
HF = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
HF |= {"image_size": 12, "patch_size": 4, "attn_implementation": "eager"}


def _numpy(model) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def _linear(state, name):
    leaf = {"kernel": state[f"{name}.weight"].T}
    return leaf | ({"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {})


def _norm(state, name):
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def _patches(weight):
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _stack(layers):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


def _layer(state, names):
    linear = {path: _linear(state, name) for path, name in names.items() if "norm" not in path}
    return {
        "attention_norm": _norm(state, names["attention_norm"]),
        "mlp_norm": _norm(state, names["mlp_norm"]),
        "attention": {name: linear[name] for name in ("query", "key", "value", "out")},
        "mlp": {name: linear[name] for name in ("up", "down")},
    }


def _clip(randomise):
    model = randomise(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF)))
    state = _numpy(model)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in state) else ""
    state = {name.removeprefix(prefix): value for name, value in state.items()}

    def layer(i):
        at = f"encoder.layers.{i}."
        names = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2"}
        names |= {n: f"self_attn.{t}_proj" for n, t in {"query": "q", "key": "k", "value": "v", "out": "out"}.items()}
        return _layer(state, {path: at + name for path, name in names.items()})

    params = {
        "class_embedding": state["embeddings.class_embedding"],
        "patch_embedding": {"kernel": _patches(state["embeddings.patch_embedding.weight"])},
        "position_embedding": state["embeddings.position_embedding.weight"],
        "input_norm": _norm(state, "pre_layrnorm"),
        "output_norm": _norm(state, "post_layernorm"),
        "layers": _stack([layer(i) for i in range(3)]),
    }
    return model, ViTConfig(**SIZE), params


def _flava(randomise):
    config = transformers.FlavaImageConfig(**HF, qkv_bias=True, mask_token=True)
    model = randomise(transformers.FlavaImageModel(config))
    state = _numpy(model)
    layer_name = "layers" if any(".layers." in name for name in state) else "layer"

    def layer(i):
        at = f"encoder.{layer_name}.{i}."
        names = {"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after"}
        names |= {n: f"attention.attention.{n}" for n in ("query", "key", "value")}
        names |= {"out": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
        return _layer(state, {path: at + name for path, name in names.items()})

    projection = "embeddings.patch_embeddings.projection"
    params = {
        "class_embedding": state["embeddings.cls_token"][0, 0],
        "mask_embedding": state["embeddings.mask_token"][0, 0],
        "patch_embedding": {"kernel": _patches(state[f"{projection}.weight"]), "bias": state[f"{projection}.bias"]},
        "position_embedding": state["embeddings.position_embeddings"][0],
        "output_norm": _norm(state, "layernorm"),
        "layers": _stack([layer(i) for i in range(3)]),
    }
    options = {"patch_bias": True, "input_norm": False, "output_norm": "all", "activation": "gelu", "norm_eps": 1e-12}
    return model, ViTConfig(**SIZE, **options, mask_token=True, init="normal"), params


def _blip(randomise):
    model = randomise(transformers.BlipVisionModel(transformers.BlipVisionConfig(**HF, layer_norm_eps=1e-5)))
    state = _numpy(model)

    def layer(i):
        at = f"encoder.layers.{i}."
        fused = {kind: np.split(state[f"{at}self_attn.qkv.{kind}"], 3) for kind in ("weight", "bias")}
        split = dict(state)
        for j, name in enumerate(("q", "k", "v")):
            split |= {f"{at}{name}.{kind}": parts[j] for kind, parts in fused.items()}
        names = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2"}
        names |= {"query": "q", "key": "k", "value": "v", "out": "self_attn.projection"}
        return _layer(split, {path: at + name for path, name in names.items()})

    embedding = "embeddings.patch_embedding"
    params = {
        "class_embedding": state["embeddings.class_embedding"].reshape(-1),
        "patch_embedding": {"kernel": _patches(state[f"{embedding}.weight"]), "bias": state[f"{embedding}.bias"]},
        "position_embedding": state["embeddings.position_embedding"][0],
        "output_norm": _norm(state, "post_layernorm"),
        "layers": _stack([layer(i) for i in range(3)]),
    }
    options = {"patch_bias": True, "input_norm": False, "output_norm": "all", "activation": "gelu", "init": "normal"}
    return model, ViTConfig(**SIZE, **options), params


@pytest.mark.parametrize("family", ["clip", "flava", "blip"])
@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (18, 30)])
def test_equals_pytorch(family, shape, randomise):
    model, config, params = {"clip": _clip, "flava": _flava, "blip": _blip}[family](randomise)
    image = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
    flags = {"output_hidden_states": True, "output_attentions": True}
    found = apply(ViT(config), params, image, interpolate_positions=shape != (12, 12), **flags)
    with torch.no_grad():
        pixels = torch.tensor(image.transpose(0, 3, 1, 2))
        expected = model(pixels, interpolate_pos_encoding=shape != (12, 12), **flags)
    np.testing.assert_allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(found.hidden_states, torch.stack(expected.hidden_states), atol=1e-5)
    np.testing.assert_allclose(found.attentions, torch.stack(expected.attentions), atol=1e-5)
    if family == "clip":
        np.testing.assert_allclose(found.pooler_output, expected.pooler_output, atol=1e-5)


def test_masked_patches_equal_pytorch(randomise):
    model, config, params = _flava(randomise)
    image = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    mask = np.random.default_rng(1).random((2, 9)) < 0.4
    found = apply(ViT(config), params, image, patch_mask=mask)
    with torch.no_grad():
        expected = model(torch.tensor(image.transpose(0, 3, 1, 2)), bool_masked_pos=torch.tensor(mask))
    np.testing.assert_allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-5)
    plain = apply(ViT(config), params, image)
    assert np.abs(plain.last_hidden_state - found.last_hidden_state).max() > 1e-2


def test_patchify_equals_a_strided_convolution():
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=(2, 11, 9, 3)), rng.normal(size=(5, 3, 4, 4))
    found = patchify(jnp.asarray(image, jnp.float32), 4) @ _patches(kernel).astype(np.float32)
    expected = torch.nn.functional.conv2d(torch.tensor(image.transpose(0, 3, 1, 2)), torch.tensor(kernel), stride=4)
    np.testing.assert_allclose(found, expected.flatten(2).transpose(1, 2), atol=1e-4)


def test_wrong_inputs_say_what_is_wrong():
    model = ViT(ViTConfig(**SIZE))
    params = {"params": random_params(model, jnp.zeros((1, 12, 12, 3)))}
    with pytest.raises(ValueError, match="expected 12x12 pixels, found 12x16"):
        model.apply(params, jnp.zeros((1, 12, 16, 3)))
    with pytest.raises(ValueError, match="no mask embedding"):
        model.apply(params, jnp.zeros((1, 12, 12, 3)), patch_mask=jnp.zeros((1, 9), bool))
    with pytest.raises(ValueError, match="expected a multiple of patch_size=5, found 12"):
        ViTConfig(**SIZE | {"patch_size": 5})


def test_clip_initialisation_has_the_published_scales():
    config = ViTConfig(hidden_size=128, num_layers=4, num_heads=4, mlp_dim=512, image_size=32, patch_size=4)
    params = jax.jit(ViT(config).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    layers = params["layers"]
    stddevs = {
        128**-0.5 * 8**-0.5: [layers["attention"][n]["kernel"] for n in ("query", "key", "value")]
        + [layers["mlp"]["down"]["kernel"]],
        128**-0.5: [layers["attention"]["out"]["kernel"]],
        256**-0.5: [layers["mlp"]["up"]["kernel"]],
        0.02: [params["patch_embedding"]["kernel"], params["position_embedding"]],
    }
    for expected, leaves in stddevs.items():
        for leaf in leaves:
            np.testing.assert_allclose(leaf.value.std(), expected, rtol=0.05)
