"""CLIP's text tower against PyTorch: causal attention, end-of-text pooling, padding of both conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from vlm.encoders.clip_text import ClipText, ClipTextConfig


@pytest.mark.parametrize("masked", [True, False])
def test_equals_pytorch(masked, randomise):
    hf = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    hf |= {"intermediate_size": 48, "max_position_embeddings": 9, "eos_token_id": 49, "attn_implementation": "eager"}
    model = randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**hf)))
    state = {name.removeprefix("text_model."): value.numpy() for name, value in model.state_dict().items()}
    linear = lambda name: {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}  # noqa: E731
    norm = lambda name: {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}  # noqa: E731

    def layer(i):
        at, heads = f"encoder.layers.{i}.", {"query": "q", "key": "k", "value": "v", "out": "out"}
        return {
            "attention_norm": norm(f"{at}layer_norm1"),
            "mlp_norm": norm(f"{at}layer_norm2"),
            "attention": {ours: linear(f"{at}self_attn.{theirs}_proj") for ours, theirs in heads.items()},
            "mlp": {"up": linear(f"{at}mlp.fc1"), "down": linear(f"{at}mlp.fc2")},
        }

    params = {
        "token_embedding": {"embedding": state["embeddings.token_embedding.weight"]},
        "position_embedding": {"embedding": state["embeddings.position_embedding.weight"]},
        "layers": jax.tree.map(lambda *x: np.stack(x), *[layer(i) for i in range(3)]),
        "output_norm": norm("final_layer_norm"),
    }
    config = ClipTextConfig(
        vocab_size=50, hidden_size=32, num_layers=3, num_heads=4, mlp_dim=48, max_length=9, eos_id=49
    )
    tokens = np.array([[48, 5, 6, 7, 49], [48, 5, 49, 49, 49], [48, 8, 9, 49, 0]])
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    flags = {"output_hidden_states": True, "output_attentions": True}
    found = ClipText(config).apply(
        {"params": params}, jnp.asarray(tokens), jnp.asarray(mask, bool) if masked else None, **flags
    )
    with torch.no_grad():
        given = {"attention_mask": torch.tensor(mask)} if masked else {}
        expected = model(torch.tensor(tokens), **given, **flags)
    np.testing.assert_allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(found.pooler_output, expected.pooler_output, atol=1e-5)
    np.testing.assert_allclose(found.hidden_states, torch.stack(expected.hidden_states), atol=1e-5)
    np.testing.assert_allclose(found.attentions, torch.stack(expected.attentions), atol=1e-5)
    with pytest.raises(ValueError, match="expected at most 9 per row, found 10"):
        ClipText(config).apply({"params": params}, jnp.zeros((1, 10), jnp.int32))
