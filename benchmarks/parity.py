"""The published sizes against Hugging Face: random weights, every output compared, in float32.

    python -m benchmarks.parity [altclip] [blip] [flava]

AltCLIP of 864 million parameters, BLIP's ViT-L captioner and matcher of 446 million, FLAVA of 358 million with its
pretraining heads. Every weight is random, norms and biases included. Each is saved by `transformers`, read by
`vlm.load`, and run once by both, compiled as train.py compiles. Prints one JSON line per model: the largest absolute
difference of each output, and the largest magnitude it has. The tests do the same with small models. Takes 12 GB of
memory and as much of the disk as the largest file (3.5 GB), under the folder of temporary files.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

import vlm

ROWS, LENGTH = 4, 77


def altclip(transformers: Any) -> Any:
    """ViT-L/14 and XLM-R large, as BAAI/AltCLIP."""
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    vision |= {"patch_size": 14, "image_size": 224}
    config = transformers.AltCLIPConfig(text_config={"project_dim": 768}, vision_config=vision, projection_dim=768)
    return transformers.AltCLIPModel._from_config(config)


def blip_captioner(transformers: Any) -> Any:
    """ViT-L/16 at 384 pixels and BERT base, as Salesforce/blip-image-captioning-large."""
    return transformers.BlipForConditionalGeneration(_blip_large(transformers))


def blip_matcher(transformers: Any) -> Any:
    """The same sizes as Salesforce/blip-itm-large-coco."""
    return transformers.BlipForImageTextRetrieval(_blip_large(transformers))


def _blip_large(transformers: Any) -> Any:
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    text = {"encoder_hidden_size": 1024, "num_attention_heads": 12}
    return transformers.BlipConfig(
        text_config=text, vision_config=vision | {"image_size": 384}, image_text_hidden_size=256
    )


def flava(transformers: Any) -> Any:
    """As facebook/flava-full, without the codebook, whose words are labels."""
    return transformers.FlavaForPreTraining(transformers.FlavaConfig())


FIELDS = (
    "logits_per_image",
    "logits_per_text",
    "image_embeds",
    "text_embeds",
    "logits",
    "itm_score",
    "question_embeds",
)
FIELDS += tuple(
    f"{part}_{kind}" for part in ("image", "text", "multimodal") for kind in ("embeddings", "masked_embeddings")
)
FIELDS += ("itm_logits", "contrastive_logits_per_image", "mmm_image_logits", "mmm_text_logits")
MODELS: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "altclip": (altclip,),
    "blip": (blip_captioner, blip_matcher),
    "flava": (flava,),
}


def randomise(model: Any) -> Any:
    """Adds noise to biases and the scales of norms, which libraries start at zeros and ones: they would hide errors."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def compare(build: Callable[[Any], Any]) -> dict[str, Any]:
    """Largest differences of every output of one model."""
    import torch
    import transformers

    theirs = randomise(build(transformers))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, params, _ = vlm.load(folder)
        config = model.config
        vision, text = config.vision, config.text or config.decoder
        lengths = np.array([5, LENGTH, 30, 12])
        mask = np.arange(LENGTH) < lengths[:, None]
        tokens = np.where(mask, rng.integers(5, text.vocab_size - 4, mask.shape), text.pad_id).astype(np.int32)
        image = rng.normal(size=(ROWS, vision.image_size, vision.image_size, 3)).astype(np.float32)
        ours: dict[str, Any] = {"image": image, "tokens": tokens, "mask": mask}
        inputs = {"pixel_values": image.transpose(0, 3, 1, 2), "input_ids": tokens, "attention_mask": mask}
        if build is flava:
            hidden = rng.random((ROWS, (vision.image_size // vision.patch_size) ** 2)) < 0.4
            masked = np.where(mask & (rng.random(mask.shape) < 0.3), 103, tokens).astype(np.int32)
            ours |= {"patch_mask": hidden, "masked_tokens": masked}
            inputs |= {"bool_masked_pos": hidden, "input_ids_masked": masked}
        whole = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in inputs.items()}
        whole |= {
            name: whole[name].long() for name in ("input_ids", "attention_mask", "input_ids_masked") if name in whole
        }
        options = {"skip_unmasked_multimodal_encoder": False, "return_loss": False} if build is flava else {}
        with torch.no_grad():
            expected = theirs(**whole, **options)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        found = jax.jit(lambda params, arrays: model.apply({"params": params}, **arrays))(params, ours)
    differences, largest = {}, {}
    for name in FIELDS:
        value, other = getattr(found, name, None), getattr(expected, name, None)
        if value is not None and other is not None:
            other = other.numpy()
            differences[name] = float(np.abs(np.asarray(value) - other).max())
            largest[name] = round(float(np.abs(other).max()), 2)
    return {"benchmark": "parity", "model": build.__name__, "parameters": count, "largest_difference": differences} | {
        "largest_value": largest
    }


def main() -> None:
    """Prints one JSON line per model."""
    parser = argparse.ArgumentParser(description="The published sizes against Hugging Face.")
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], default=list(MODELS))
    for name in parser.parse_args().models:
        for build in MODELS[name]:
            print(json.dumps(compare(build)), flush=True)


if __name__ == "__main__":
    main()
