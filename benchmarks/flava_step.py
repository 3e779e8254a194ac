"""FLAVA's training step on pairs (ViT-B/16, BERT base, 6 fusion layers) against Hugging Face: all six parts, AdamW.

    python -m benchmarks.flava_step [--batch=8] [--words=12.1] [--rounds=5] [--labels=live] [--lengths=16,24,32,48]
        [--alone=0]

Both start from the same random weights, get the same arrays and train everything but the codebook in float32,
alternating in one process; the first losses are compared and printed. Ours is the step that train.py runs
(`vlm.training.make_train_step`: non-finite guard, norms, metrics) with the loss of configs/flava.py:full: heads on
gathered positions. `--lengths` are `train.text_lengths`, for batches small enough that no text is long: the step then
cuts the padding that the batch does not need. Theirs is `FlavaForPreTraining`, `backward` and fused
`torch.optim.AdamW` on rows padded to 77, as its processor makes them. Texts have 12.1 words on average, as the
published pretraining data. `--labels=precomputed` leaves the codebook out of both.
Prints medians and the ratio of the medians (> 1: ours is faster) as one JSON line. Run it on an otherwise idle machine.
With `--alone=N`, N times, each runs in a process of its own, in turn: ours then has the heap that train.py sets for
itself (`vlm.heap`) and would serve both in one process.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import NAMES, alternate, alternate_alone, report
from configs import flava
from vlm import schema
from vlm.convert.views import from_array
from vlm.data.block_masking import BlockSettings, block_mask
from vlm.heap import keep_freed_memory
from vlm.models.flava import weights
from vlm.models.flava.loss import LossConfig, loss
from vlm.models.flava.model import FLAVA
from vlm.optimizer import make_optimizer
from vlm.padding import TextLengths
from vlm.strict import build
from vlm.training import StateInit, make_train_step
from vlm.tree import flatten, unflatten


def make_batch(rows: int, words: float, labels: str) -> dict[str, np.ndarray]:
    """Random pairs with the published masking rates and lengths."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.poisson(words * 1.2, rows) + 2, 4, 77)  # 1.2 word pieces a word, and two special tokens
    mask = np.arange(77)[None] < lengths[:, None]
    tokens = np.where(mask, rng.integers(1000, 30522, (rows, 77)), 0).astype(np.int32)
    chosen = np.zeros_like(mask)
    for row, length in enumerate(lengths):
        count = max(1, round(0.15 * int(length)))
        chosen[row, rng.choice(np.arange(1, length - 1), min(count, length - 2), replace=False)] = True
    batch = {
        "image": rng.normal(size=(rows, 224, 224, 3)).astype(np.float32),
        "tokens": tokens,
        "mask": mask,
        "masked_tokens": np.where(chosen, 103, tokens).astype(np.int32),
        "token_labels": np.where(chosen, tokens, -100).astype(np.int32),
        "patch_mask": np.stack([block_mask((14, 14), 75, rng, BlockSettings()).reshape(-1) for _ in range(rows)]),
        "itm_labels": (rng.random(rows) > 0.1).astype(np.int32),
    }
    if labels == "live":
        batch["codebook_image"] = rng.uniform(0.1, 0.9, (rows, 112, 112, 3)).astype(np.float32)
    else:
        batch["patch_labels"] = rng.integers(0, 8192, (rows, 196)).astype(np.int32)
    return batch


def their_model():
    """A random FLAVA of the published size; text and image towers attend as the library does (explicitly)."""
    import torch
    import transformers

    torch.manual_seed(0)
    return transformers.FlavaForPreTraining(transformers.FlavaConfig()).train()


def their_step(model, batch: dict[str, np.ndarray]):
    """Returns a function that runs one step and gives the loss."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    names = {"image": "pixel_values", "tokens": "input_ids", "mask": "attention_mask", "patch_mask": "bool_masked_pos"}
    names |= {"masked_tokens": "input_ids_masked", "token_labels": "mlm_labels", "itm_labels": "itm_labels"}
    names |= {"codebook_image": "codebook_pixel_values", "patch_labels": "mim_labels"}
    inputs = {}
    for name, value in batch.items():
        value = np.ascontiguousarray(value.transpose(0, 3, 1, 2)) if value.ndim == 4 else value
        integer = value.dtype != np.float32 and name != "patch_mask"
        inputs[names[name]] = torch.tensor(value, dtype=torch.long if integer else None)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        copied = {name: value.clone() for name, value in inputs.items() if name == "mim_labels"}  # it is written to
        value = model(**inputs | copied, return_loss=True).loss
        value.backward()
        optimizer.step()
        return float(value.detach())

    return run


def our_step(theirs, batch: dict[str, np.ndarray], lengths: tuple[int, ...], full: Any):
    """The same from the same weights."""
    views = {name: from_array(value.detach().numpy()) for name, value in theirs.state_dict().items()}

    def shapes(config):
        arrays = {"image": jnp.zeros((1, 224, 224, 3)), "tokens": jnp.zeros((1, 2), jnp.int32)}
        tree = jax.eval_shape(lambda key: FLAVA(config).init(key, **arrays)["params"], jax.random.key(0))
        return flatten(nn.unbox(tree))

    read = weights.read(views, theirs.config.to_dict(), source="benchmark", shapes=shapes)
    model = FLAVA(read.config)
    params = {path: np.array(view.read(())) for path, view in read.params.items()}
    config = build(LossConfig, full.loss, "loss")
    constant = schema.ScheduleConfig("constant")
    groups = ((config.locked, schema.GroupConfig(freeze=True)), (".*", schema.GroupConfig()))
    optimizer = make_optimizer(
        schema.OptimizerConfig(lr=1e-5, schedule=constant, weight_decay=0.01, groups=groups), list(params), 1000
    )
    start = StateInit(lambda key: {}, lambda params, key: {}, optimizer)
    state = start.finish(unflatten({path: jnp.asarray(value) for path, value in params.items()}), {})
    objective = functools.partial(loss, model, config=config)
    step = make_train_step(objective, optimizer, seed=0)
    arrays = {name: jnp.asarray(value) for name, value in TextLengths(tuple(lengths)).fit(batch).items()}
    compiled = jax.jit(step, donate_argnums=0).lower(state, arrays).compile()

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, arrays)
        return float(metrics["loss"])

    return run


def main() -> None:
    """Measures and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--words", type=float, default=12.1, help="mean words of a text")
    parser.add_argument("--labels", choices=("live", "precomputed"), default="live")
    parser.add_argument("--lengths", default="", help="lengths that the step is compiled for besides 77")
    parser.add_argument("--only", choices=NAMES, help="one alone, with the heap as train.py sets it")
    parser.add_argument("--alone", type=int, default=0, help="so many processes for each, in turn")
    options = parser.parse_args()
    if options.alone:
        times = alternate_alone("benchmarks.flava_step", options)
        report("flava_step", times, reference="transformers", settings=vars(options))
        return
    if options.only == "vlm":
        keep_freed_memory()
    batch = make_batch(options.batch, options.words, options.labels)
    lengths = tuple(int(length) for length in options.lengths.split(",") if length)
    theirs = their_model()
    contenders = {}
    if options.only != "transformers":
        contenders["vlm"] = our_step(theirs, batch, lengths, flava.get_config("full"))
    if options.only != "vlm":
        contenders["transformers"] = their_step(theirs, batch)
    del theirs
    losses = {name: run() for name, run in contenders.items()}
    times = alternate(contenders, rounds=options.rounds, warmup=1)
    reference = options.only or "transformers"
    report("flava_step", times, reference=reference, settings=vars(options), first_losses=losses)


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"# {time.perf_counter() - start:.0f} s in all")
