"""Captioning with BLIP-base against Hugging Face `generate`: end to end, and the decoder alone.

    python -m benchmarks.generation [--batch=8] [--num_beams=1 3] [--new_tokens=20] [--rounds=5] [--alone=0]

float32, random weights, 384 px, every row writes exactly `new_tokens` tokens; alternating in one process, medians and
ratios as one JSON line per number of beams. "decode" starts from the image tokens: the context's keys and values, the
prompt and the loop, in both; "first" is the same for a single token, so that the loop alone is their difference. The
parameters are laid out for decoding before, as when many batches are captioned; the line says what that takes. Run it
on an otherwise idle machine. With `--alone=N`, N times, each library runs in a process of its own, in turn: ours then
has the heap that eval.py sets for itself (`vlm.heap`) and would serve both in one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import vlm
from benchmarks.measure import NAMES, Times, alternate, alternate_alone, report
from vlm.fusion.med import MedConfig
from vlm.generation import GenerationConfig, prepare
from vlm.generation.generate import continue_prompts
from vlm.generation.processors import numbers
from vlm.generation.rows import Prompt
from vlm.heap import keep_freed_memory
from vlm.models.blip.config import VIT, BLIPConfig
from vlm.models.blip.model import BLIP

CONFIG = BLIPConfig(
    vision=dataclasses.replace(VIT, image_size=384),
    text=None,
    decoder=MedConfig(),
    shared_decoder=False,
    projection_dim=None,
    itm=False,
    temperature=None,
)


def their_model() -> Any:
    """Hugging Face's model of these sizes."""
    import transformers

    text = {"num_attention_heads": 12, "vocab_size": 30524, "bos_token_id": 30522, "sep_token_id": 102}
    config = transformers.BlipConfig(text_config=text, vision_config={"image_size": 384})
    return transformers.BlipForConditionalGeneration(config).eval()


def theirs(model: Any, image: np.ndarray, settings: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's two contenders."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    pixels = torch.tensor(image.transpose(0, 3, 1, 2)).contiguous()
    start = torch.full((len(image), 1), 30522)
    options = {"eos_token_id": 102, "pad_token_id": 0, "do_sample": False, **settings}
    with torch.inference_mode():
        states = model.vision_model(pixels).last_hidden_state
    seen = torch.ones(states.shape[:2], dtype=torch.long)

    def end_to_end() -> Any:
        with torch.inference_mode():
            return model.generate(pixels, do_sample=False, **settings)

    def decode() -> Any:
        with torch.inference_mode():
            return model.text_decoder.generate(
                input_ids=start, encoder_hidden_states=states, encoder_attention_mask=seen, **options
            )

    return {"transformers": end_to_end, "transformers_decode": decode}


def our_model(image: np.ndarray) -> tuple[BLIP, Any, float]:
    """Our model, its parameters laid out for decoding, and the seconds that takes."""
    model = BLIP(CONFIG)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), image[:1], np.zeros((1, 2), np.int32)))["params"]
    jax.block_until_ready(prepare(model, params).params)  # compiles
    start = time.perf_counter()
    prepared = jax.block_until_ready(prepare(model, params))
    return model, prepared, time.perf_counter() - start


def ours(model: BLIP, prepared: Any, image: np.ndarray, settings: dict[str, Any]) -> dict[str, Any]:
    """Our two contenders."""
    batch = len(image)
    decoder, config = model.clone(decoding=True), GenerationConfig(**settings)
    steps, one = settings["max_new_tokens"], np.ones(batch, np.int32)
    prompt = Prompt(np.full((batch, 1), CONFIG.bos_id, np.int32), one, one * steps)  # pyright: ignore
    traced = numbers(config, decoder.stop_ids, 1 + steps)

    @jax.jit
    def look(params: Any, image: Any) -> Any:
        return decoder.apply({"params": params}, image, method="encode_image_states").last_hidden_state

    def read(module: Any, states: Any) -> Any:
        hidden, cache = module._decoder.prefill(prompt.tokens, prompt.tokens > 0, states)
        return module.lm_logits(hidden[:, 0]), cache

    start_text = jax.jit(lambda params, states: decoder.apply({"params": params}, states, method=read))
    states = look(prepared.params, image)

    def decode() -> Any:
        logits, cache = start_text(prepared.params, states)
        out = continue_prompts(decoder, prepared.params, logits, cache, prompt, traced, None, config, steps)
        return jax.block_until_ready(out)

    def end_to_end() -> Any:
        found = vlm.generate(model, prepared, {"image": image}, **settings)
        assert (found.lengths == 1 + steps).all()

    return {"vlm": end_to_end, "vlm_decode": decode}


def main() -> None:
    """Measures and prints one JSON line per number of beams."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--num_beams", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--new_tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode_only", action="store_true", help="leave out the image encoder")
    parser.add_argument("--only", choices=NAMES, help="one alone, with the heap as eval.py sets it")
    parser.add_argument("--alone", type=int, default=0, help="so many processes for each, in turn")
    options = parser.parse_args()
    if options.only == "vlm":
        keep_freed_memory()
    if options.alone:
        for beams in options.num_beams:
            _report(alternate_alone("benchmarks.generation", options, num_beams=beams), options, beams)
        return
    image = np.random.default_rng(0).normal(size=(options.batch, 384, 384, 3)).astype(np.float32)
    vlm_too, theirs_too = options.only != "transformers", options.only != "vlm"
    model, prepared, seconds = our_model(image) if vlm_too else (None, None, None)
    reference = their_model() if theirs_too else None

    def contend(settings: dict[str, Any]) -> dict[str, Any]:
        found = ours(model, prepared, image, settings) if vlm_too else {}
        return found | (theirs(reference, image, settings) if theirs_too else {})

    for beams in options.num_beams:
        settings = {"num_beams": beams, "max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}
        contenders = contend(settings)
        if options.decode_only:
            contenders = {name: run for name, run in contenders.items() if name.endswith("_decode")}
        single = settings | {"max_new_tokens": 1, "min_new_tokens": 1}
        firsts = contend(single).items()
        contenders |= {name.replace("decode", "first"): run for name, run in firsts if name.endswith("_decode")}
        times = alternate(contenders, rounds=options.rounds, warmup=1)
        _report(times, options, beams, layout_seconds=seconds and round(seconds, 3))


def _report(times: Times, options: argparse.Namespace, beams: int, **more: Any) -> None:
    wall = {name: statistics.median(w for w, _ in runs) for name, runs in times.items()}
    if options.only is None:
        loop = {name: wall[f"{name}_decode"] - wall[f"{name}_first"] for name in NAMES}
        more["decode_times_faster"] = round(wall["transformers_decode"] / wall["vlm_decode"], 3)
        more["loop_times_faster"] = round(loop["transformers"] / loop["vlm"], 3)
    reference = (options.only or "transformers") + ("_decode" if options.decode_only else "")
    report("generation", times, reference=reference, settings=vars(options) | {"num_beams": beams}, **more)


if __name__ == "__main__":
    main()
