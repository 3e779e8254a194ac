"""BLIP in bfloat16, which every published configuration computes in, beside itself in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm
from vlm.data.masking import IGNORE
from vlm.models.blip.loss import LossConfig, loss


def _half(config):
    stacks = {name: getattr(config, name) for name in ("vision", "text", "decoder")}
    halves = {name: dataclasses.replace(x, dtype="bfloat16") for name, x in stacks.items() if x is not None}
    return dataclasses.replace(config, **halves)


@pytest.mark.parametrize("task", ["caption", "retrieval"])
def test_outputs_are_those_of_float32_to_its_digits(tiny_blip, task):
    model, params, processor = tiny_blip(task)
    half = type(model)(_half(model.config))
    rng = np.random.default_rng(0)
    batch = processor(texts=["a five on the left", "two"]) | {"image": rng.normal(size=(2, 24, 24, 3)).astype("f4")}

    def run(model):
        found = jax.jit(lambda params: model.apply({"params": params}, **batch))(params)
        return found.logits if task == "caption" else found.itm_score

    exact, rounded = run(model), run(half)
    assert rounded.dtype == jnp.bfloat16 or rounded.dtype == jnp.float32
    error, spread = np.asarray(rounded, np.float32) - exact, float(np.std(exact))
    assert 1e-5 * spread < np.abs(error).mean() < 0.05 * spread, (np.abs(error).mean(), spread)


def test_it_learns_and_writes(tiny_blip):
    model, params, processor = tiny_blip("caption")
    half = type(model)(_half(model.config))
    image = np.random.default_rng(1).normal(size=(3, 24, 24, 3)).astype(np.float32)
    batch = processor.tokenizer(["a five on the left", "two digits", "a nine"], max_length=12, padding="max_length")
    batch |= {"image": image, "labels": np.where(batch["mask"], batch["tokens"], IGNORE)}

    def value(model):
        config = LossConfig("caption")
        step = jax.value_and_grad(lambda params: loss(model, params, {}, batch, jax.random.key(0), config)[0])
        return jax.jit(step)(params)

    (exact, _), (rounded, gradient) = value(model), value(half)
    assert rounded.dtype == jnp.float32 and abs(rounded - exact) < 0.02 * exact
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    prompts = {"image": image}
    found = vlm.generate(half, params, prompts, max_new_tokens=6, log_probs=True)
    assert np.isfinite(found.scores).all() and all(len(set(row)) >= 1 for row in found.completions)
    first = vlm.generate(model, params, prompts, max_new_tokens=6, log_probs=True)
    np.testing.assert_allclose(found.log_probs[:, 0], first.log_probs[:, 0], atol=0.1)
