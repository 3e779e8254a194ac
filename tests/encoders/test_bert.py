"""The BERT-style encoder against XLM-R (post-norm), BERT (pooler) and FLAVA's text tower (pre-norm)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from vlm.encoders.bert import Bert, BertConfig

from ..quick import apply, random_params

HF = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
HF |= {"max_position_embeddings": 20, "attn_implementation": "eager"}
SIZE = {"vocab_size": 50, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "mlp_dim": 48, "max_length": 20}


def _params(state, *, layer, norms, pooler=None, output_norm=None):
    get = lambda name: state[name].numpy()  # noqa: E731
    linear = lambda name: {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}  # noqa: E731
    norm = lambda name: {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}  # noqa: E731

    def block(i):
        at, attention = f"{layer}.{i}", "attention.attention" if output_norm else "attention.self"
        return {
            "attention_norm": norm(f"{at}.{norms[0]}"),
            "mlp_norm": norm(f"{at}.{norms[1]}"),
            "attention": {n: linear(f"{at}.{attention}.{n}") for n in ("query", "key", "value")}
            | {"out": linear(f"{at}.attention.output.dense")},
            "mlp": {"up": linear(f"{at}.intermediate.dense"), "down": linear(f"{at}.output.dense")},
        }

    tables = {"token": "word_embeddings", "position": "position_embeddings", "token_type": "token_type_embeddings"}
    params = {f"{n}_embedding": {"embedding": get(f"embeddings.{t}.weight")} for n, t in tables.items()}
    params["embedding_norm"] = norm("embeddings.LayerNorm")
    params["layers"] = jax.tree.map(lambda *x: np.stack(x), *[block(i) for i in range(3)])
    params |= {"pooler": linear(pooler)} if pooler else {}
    return params | ({"output_norm": norm(output_norm)} if output_norm else {})


def _layer_name(state):
    return "encoder.layers" if any(name.startswith("encoder.layers.") for name in state) else "encoder.layer"


def _model(kind, randomise):
    post = ("attention.output.LayerNorm", "output.LayerNorm")
    if kind == "roberta":
        hf = transformers.XLMRobertaConfig(**HF, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)
        model = randomise(transformers.XLMRobertaModel(hf, add_pooling_layer=False))
        state = model.state_dict()
        params = _params(state, layer=_layer_name(state), norms=post)
        return model, BertConfig(**SIZE, type_vocab_size=1), params
    if kind == "bert":
        hf = transformers.BertConfig(**HF, type_vocab_size=2, pad_token_id=0, layer_norm_eps=1e-12)
        model = randomise(transformers.BertModel(hf))
        state = model.state_dict()
        params = _params(state, layer=_layer_name(state), norms=post, pooler="pooler.dense")
        options = {"type_vocab_size": 2, "pad_id": 0, "positions": "absolute", "norm_eps": 1e-12, "pooler": True}
        return model, BertConfig(**SIZE, **options), params
    hf = transformers.FlavaTextConfig(**HF, type_vocab_size=2, pad_token_id=0, layer_norm_eps=1e-12)
    model = randomise(transformers.FlavaTextModel(hf))
    state = model.state_dict()
    norms = ("layernorm_before", "layernorm_after")
    params = _params(state, layer=_layer_name(state), norms=norms, output_norm="layernorm", pooler="pooler.dense")
    options = {"type_vocab_size": 2, "pad_id": 0, "positions": "absolute", "norm_eps": 1e-12, "pooler": True}
    return model, BertConfig(**SIZE, **options, pre_norm=True), params


TOKENS = np.array([[0, 11, 12, 13, 14, 2], [0, 11, 2, 1, 1, 1], [1, 1, 1, 0, 21, 2]])


@pytest.mark.parametrize("kind", ["roberta", "bert", "flava"])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_pytorch(kind, masked, randomise):
    model, config, params = _model(kind, randomise)
    mask = TOKENS != 1
    flags = {"output_hidden_states": True, "output_attentions": True}
    found = apply(Bert(config), params, TOKENS, mask=mask if masked else None, **flags)
    with torch.no_grad():
        attention_mask = torch.tensor(mask.astype(int)) if masked else None
        expected = model(torch.tensor(TOKENS), attention_mask=attention_mask, **flags)
    np.testing.assert_allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(found.hidden_states, torch.stack(expected.hidden_states), atol=1e-5)
    np.testing.assert_allclose(found.attentions, torch.stack(expected.attentions), atol=1e-5)
    if config.pooler:
        np.testing.assert_allclose(found.pooler_output, expected.pooler_output, atol=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_given_embeddings_positions_and_types_equal_pytorch(kind, randomise):
    model, config, params = _model(kind, randomise)
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(2, 5, 32)).astype(np.float32)
    positions = rng.integers(2, 20, (2, 5))
    types = rng.integers(0, config.type_vocab_size, (2, 5))
    module = Bert(config)
    found = apply(module, params, token_embeds=embeds, positions=positions, token_types=types)
    derived = apply(module, params, token_embeds=embeds)
    with torch.no_grad():
        given = {"inputs_embeds": torch.tensor(embeds)}
        types_and_positions = {"position_ids": torch.tensor(positions), "token_type_ids": torch.tensor(types)}
        expected = model(**given, **types_and_positions).last_hidden_state
        plain = model(**given).last_hidden_state
    np.testing.assert_allclose(found.last_hidden_state, expected, atol=1e-5)
    np.testing.assert_allclose(derived.last_hidden_state, plain, atol=1e-5)


def test_wrong_inputs_say_what_is_wrong():
    model = Bert(BertConfig(**SIZE))
    params = {"params": random_params(model, jnp.zeros((1, 2), jnp.int32))}
    with pytest.raises(ValueError, match="expected at most 18 per row, found 19"):
        model.apply(params, jnp.zeros((1, 19), jnp.int32))
    with pytest.raises(ValueError, match="exactly one of tokens and token_embeds"):
        model.apply(params)
    with pytest.raises(ValueError, match="multiple of num_heads=5, found 32"):
        BertConfig(**SIZE | {"num_heads": 5})


def test_dropout_is_active_in_training_only():
    model = Bert(BertConfig(**SIZE))
    params = random_params(model, jnp.asarray(TOKENS))
    run = lambda **flags: apply(model, params, TOKENS, **flags).last_hidden_state  # noqa: E731
    dropped = run(deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert np.abs(dropped - run()).max() > 1e-2
    np.testing.assert_array_equal(run(), run())
