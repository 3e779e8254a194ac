"""AltCLIP contrastive training step (ViT-B/16 + XLM-R base) against Hugging Face: forward, backward, AdamW.

    python -m benchmarks.altclip_step [--batch=8] [--length=77] [--rounds=7] [--alone=0] [--lock_image] [--whole_rows]

Both train every parameter (with `--lock_image`, as in AltCLIP's second stage, the image tower is frozen) in float32
with the same loss on the same arrays, alternating in one process; ours is the step that train.py runs
(`vlm.training.make_train_step`: non-finite guard, norms and metrics included), theirs is
`AltCLIPModel(..., return_loss=True)`, `backward` and fused `torch.optim.AdamW`. Prints medians and the ratio of the
medians (> 1: ours is faster) as one JSON line. Run it on an otherwise idle machine.
Texts have 10 to 77 tokens, drawn evenly. As with `train.pack_texts=8` and lengths in steps of 8, we compute little of
their padding; with `--whole_rows` we compute all of it, as theirs does.
With `--alone=N`, N times, each runs in a process of its own, in turn: ours then has the heap that train.py sets for
itself (`vlm.heap`) and would serve both in one process.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import NAMES, alternate, alternate_alone, report
from vlm import schema
from vlm.encoders.bert import BertConfig
from vlm.encoders.vit import ViTConfig
from vlm.heap import keep_freed_memory
from vlm.models.altclip.loss import LossConfig, loss
from vlm.models.altclip.model import AltCLIP, AltCLIPConfig
from vlm.optimizer import make_optimizer
from vlm.padding import TextLengths
from vlm.training import StateInit, make_train_step
from vlm.tree import flatten

LENGTHS = (16, 24, 32, 40, 48, 56, 64)
LOCKED = "vision/.*|vision_projection/.*"


def our_step(arrays: dict[str, np.ndarray], layers: int, lock_image: bool, whole_rows: bool):
    """Returns a function that runs one step and gives the loss."""
    text = BertConfig(hidden_size=768, num_layers=layers, num_heads=12, mlp_dim=3072, dropout_rate=0.0,
                      attention_dropout_rate=0.0)  # fmt: skip
    model = AltCLIP(AltCLIPConfig(vision=ViTConfig(patch_size=16, num_layers=layers), text=text, projection_dim=512))
    example = {name: value[:1] for name, value in arrays.items()}
    init = lambda key: model.init(key, **example)["params"]  # noqa: E731
    paths = list(flatten(nn.unbox(jax.eval_shape(init, jax.random.key(0)))))
    constant = schema.ScheduleConfig("constant")
    groups = ((LOCKED, schema.GroupConfig(freeze=True)),) if lock_image else ()
    settings = schema.OptimizerConfig(
        lr=1e-5, schedule=constant, weight_decay=0.1, groups=(*groups, (".*", schema.GroupConfig()))
    )
    optimizer = make_optimizer(settings, paths, 1000)
    start = StateInit(init, lambda params, key: {}, optimizer)
    state = jax.jit(lambda: nn.unbox(start.finish(start.params(0), {})))()
    objective = functools.partial(loss, model, config=LossConfig(lock_image=lock_image))
    step = jax.jit(make_train_step(objective, optimizer, seed=0), donate_argnums=0)
    texts = TextLengths() if whole_rows else TextLengths(LENGTHS, math.gcd(8, len(arrays["tokens"])))
    batch = {name: jnp.asarray(value) for name, value in texts.fit(arrays).items()}

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return run


def their_step(arrays: dict[str, np.ndarray], layers: int, lock_image: bool):
    """Returns a function that runs one step and gives the loss."""
    import torch
    import transformers

    vision = {"patch_size": 16, "num_hidden_layers": layers}
    text = {"hidden_size": 768, "num_hidden_layers": layers, "num_attention_heads": 12, "intermediate_size": 3072}
    text |= {"vocab_size": 250002, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.AltCLIPConfig(text_config=text | {"project_dim": 768}, vision_config=vision)
    model = transformers.AltCLIPModel._from_config(config, attn_implementation="sdpa").train()
    if lock_image:
        model.vision_model.requires_grad_(False)
        model.visual_projection.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.1, fused=True)
    inputs = {
        "pixel_values": torch.tensor(arrays["image"].transpose(0, 3, 1, 2)).contiguous(),
        "input_ids": torch.tensor(arrays["tokens"], dtype=torch.long),
        "attention_mask": torch.tensor(arrays["mask"], dtype=torch.long),
    }

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = model(**inputs, return_loss=True).loss
        value.backward()
        optimizer.step()
        return float(value.detach())

    return run


def main() -> None:
    """Measures and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("batch", 8), ("length", 77), ("layers", 12), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lock_image", action="store_true", help="train the text tower only")
    parser.add_argument("--whole_rows", action="store_true", help="compute padding, too")
    parser.add_argument("--only", choices=NAMES, help="one alone, with the heap as train.py sets it")
    parser.add_argument("--alone", type=int, default=0, help="so many processes for each, in turn")
    options = parser.parse_args()
    if options.alone:
        times = alternate_alone("benchmarks.altclip_step", options)
        report("altclip_step", times, reference="transformers", settings=vars(options))
        return
    if options.only == "vlm":
        keep_freed_memory()
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 250_000, (options.batch, options.length)).astype(np.int32)
    mask = np.arange(options.length)[None] < rng.integers(10, options.length + 1, (options.batch, 1))
    tokens = np.where(mask, tokens, 1).astype(np.int32)
    image = rng.normal(size=(options.batch, 224, 224, 3)).astype(np.float32)
    arrays = {"image": image, "tokens": tokens, "mask": mask}
    steps = {"vlm": functools.partial(our_step, whole_rows=options.whole_rows), "transformers": their_step}
    contenders = {
        name: step(arrays, options.layers, options.lock_image)
        for name, step in steps.items()
        if options.only in (None, name)
    }
    times = alternate(contenders, rounds=options.rounds)
    report("altclip_step", times, reference=options.only or "transformers", settings=vars(options))


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"# {time.perf_counter() - start:.0f} s in all")
