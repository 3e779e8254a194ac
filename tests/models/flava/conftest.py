"""A random Hugging Face FLAVA and, written independently of the converter, the same weights in our tree."""

import re

import numpy as np
import pytest
import torch
import transformers

from vlm.models.flava.model import FLAVA
from vlm.tree import unflatten

from . import published
from .small import architecture

ENCODER = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 36}
NAMES = (  # foreign, ours; each applied to what the ones before made of the name
    (r"^flava\.", ""),
    (r"^image_model\.", "vision."),
    (r"^text_model\.", "text."),
    (r"^multimodal_model\.", "fusion."),
    (r"^image_projection", "vision_projection"),
    (r"^(image|text)_to_mm_projection", r"\1_to_fusion"),
    (r"^image_to_fusion", "vision_to_fusion"),
    (r"^image_codebook\.blocks\.", "codebook."),
    (r"\.group\.block_", ".block_"),
    (r"\.res_path\.path\.", "."),
    (r"\.id_path\.", ".identity."),
    (r"codebook\.output\.conv", "codebook.out"),
    (r"\.embeddings\.(word|position|token_type)_embeddings\.weight", r".\1_embedding.embedding"),
    (r"\.word_embedding\.", ".token_embedding."),
    (r"\.embeddings\.LayerNorm", ".embedding_norm"),
    (r"\.embeddings\.(mask|position)_(token|embeddings)", r".\1_embedding"),
    (r"\.(embeddings\.)?cls_token", ".class_embedding"),
    (r"\.embeddings\.patch_embeddings\.projection", ".patch_embedding"),
    (r"\.encoder\.layer\.(\d+)\.", r".layers/\1."),
    (r"\.attention\.attention\.", ".attention."),
    (r"\.attention\.output\.dense", ".attention.out"),
    (r"\.intermediate\.dense", ".mlp.up"),
    (r"(layers/\d+)\.output\.dense", r"\1.mlp.down"),
    (r"layernorm_before", "attention_norm"),
    (r"layernorm_after", "mlp_norm"),
    (r"\.layernorm\.", ".output_norm."),
    (r"pooler\.dense", "pooler"),
    (r"itm_head\.seq_relationship", "itm_head.out"),
    (r"_head\.transform\.dense", "_head.dense"),
    (r"_head\.transform\.LayerNorm", "_head.norm"),
    (r"_head\.decoder\.bias", "_head.bias"),
    (r"_head\.decoder\.weight", "_head.kernel"),
)


def our_tree(state):
    """Parameters, or their gradients, of `FlavaForPreTraining` as our nested dict."""
    ours = {}
    for name, value in state.items():
        value = np.asarray(value)
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".weight"):
            scale = value.ndim == 1
            name = name.removesuffix("weight") + ("scale" if scale else "kernel")
        if name == "vision.patch_embedding.kernel":
            value = value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
        elif value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif name.endswith("kernel"):
            value = value.T
        elif value.ndim == 3:
            value = value[0, 0] if value.shape[1] == 1 else value[0]
        ours[name.replace(".", "/")] = value
    stacks = {}
    for path in [path for path in ours if re.search(r"/layers/\d+/", path)]:
        number = int(re.search(r"/layers/(\d+)/", path)[1])
        stacks.setdefault(re.sub(r"/layers/\d+/", "/layers/", path), {})[number] = ours.pop(path)
    ours |= {path: np.stack([rows[i] for i in range(len(rows))]) for path, rows in stacks.items()}
    return unflatten(ours)


@pytest.fixture(scope="package")
def pair(randomise):
    """(Hugging Face's model, ours, our parameters) with random weights, biases, norms and tokens."""
    config = transformers.FlavaConfig(
        image_config=ENCODER | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8, "vocab_size": 40},
        text_config=ENCODER | {"num_hidden_layers": 3, "vocab_size": 50, "max_position_embeddings": 20},
        multimodal_config=ENCODER | {"num_hidden_layers": 2},
        image_codebook_config={"hidden_size": 8, "vocab_size": 40},
        hidden_size=24,
        projection_dim=12,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    reference = randomise(transformers.FlavaForPreTraining(config)).eval()
    return reference, FLAVA(architecture()), params_of(reference)


def params_of(reference):
    """Our parameters of a Hugging Face model."""
    return our_tree({k: v for k, v in reference.state_dict().items() if not re.fullmatch(r"\w+_head\.bias", k)})


@pytest.fixture(scope="session")
def models(randomise):
    """A small random model of every class; the joint one without heads has three different widths."""
    odd = {
        "image_config": published.IMAGE | {"hidden_size": 24},
        "multimodal_config": published.ENCODER | {"hidden_size": 12},
    }
    configs = {
        "FlavaForPreTraining": published.full_config(),
        "FlavaModel": published.full_config(**odd),
        "FlavaTextModel": transformers.FlavaTextConfig(**published.TEXT),
        "FlavaImageModel": transformers.FlavaImageConfig(**published.IMAGE, qkv_bias=False, mask_token=False),
        "FlavaMultimodalModel": transformers.FlavaMultimodalConfig(**published.ENCODER),
        "FlavaImageCodebook": transformers.FlavaImageCodebookConfig(**published.CODEBOOK),
    }
    return {name: randomise(getattr(transformers, name)(configs[name]), scale=0.2) for name in published.CLASSES}


@pytest.fixture(scope="session")
def expected(models):
    """What Hugging Face's file of the pretraining model gives."""
    return published.read(published.lazy(models["FlavaForPreTraining"].state_dict()), published.full_config().to_dict())
