"""BLIP in bfloat16, which every published configuration computes in, beside itself in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm
from vlm.data.masking import IGNORE
from vlm.models.blip.loss import LossConfig, loss

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
compiled = functools.partial(jax.jit, compiler_options=FAST)


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
        found = compiled(lambda params: model.apply({"params": params}, **batch))(params)
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

    def value(params, model):
        return loss(model, params, {}, batch, jax.random.key(0), LossConfig("caption"))[0]

    exact = compiled(functools.partial(value, model=model))(params)
    rounded, gradient = compiled(jax.value_and_grad(functools.partial(value, model=half)))(params)
    assert rounded.dtype == jnp.float32 and abs(rounded - exact) < 0.02 * exact
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    found = vlm.generate(half, params, {"image": image}, max_new_tokens=6)
    exact = compiled(lambda params: model.apply({"params": params}, image, found.sequences).logits)(params)
    log_probs = np.asarray(jax.nn.log_softmax(exact))
    for row, length in enumerate(found.lengths):  # each token is the most probable one, or as good as that
        for place in range(1, length):
            before = log_probs[row, place - 1]
            assert before[found.sequences[row, place]] > before.max() - 0.05
