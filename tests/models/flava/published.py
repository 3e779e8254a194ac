"""Small random models of every published class, and their tensors under the names of every published layout.

The names are written here from the published lists, independently of the converter's tables.
"""

import functools
import re

import jax
import numpy as np
import torch
import transformers

from vlm.convert.views import TensorView, from_array
from vlm.models.flava import weights
from vlm.models.flava.model import FLAVA
from vlm.sharding import unbox
from vlm.tree import flatten, unflatten

ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = ENCODER | {"vocab_size": 40, "max_position_embeddings": 12}
IMAGE = ENCODER | {"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 8, "patch_size": 4, "vocab_size": 20}
CODEBOOK = {"hidden_size": 4, "vocab_size": 20}
SETTINGS = ("hidden_act", "layer_norm_eps", "qkv_bias", "mask_token", "use_cls_token", "num_groups", "pad_token_id")
HEADS = {"vision.num_heads": 4, "text.num_heads": 2, "fusion.num_heads": 2}
HEAD_NAMES = ("mim", "mlm", "mmm_image", "mmm_text")
CLASSES = {
    "FlavaForPreTraining": "FLAVA (Hugging Face)",
    "FlavaModel": "FLAVA (Hugging Face)",
    "FlavaTextModel": "FLAVA text (Hugging Face)",
    "FlavaImageModel": "FLAVA image (Hugging Face)",
    "FlavaMultimodalModel": "FLAVA multimodal (Hugging Face)",
    "FlavaImageCodebook": "FLAVA codebook (Hugging Face)",
}
RNG = np.random.default_rng(0)
PIXELS = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
CODEBOOK_PIXELS = RNG.uniform(0.1, 0.9, (2, 16, 16, 3)).astype(np.float32)
STATES = RNG.normal(size=(2, 5, 16)).astype(np.float32)
TOKENS = np.array([[1, 5, 6, 7, 2], [1, 8, 2, 0, 0]])
MASKED_TOKENS = np.array([[1, 5, 3, 7, 2], [1, 3, 2, 0, 0]])
TYPES = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
PATCHES = np.array([[True, False, False, True], [False, False, True, False]])
MASK = TOKENS != 0


def full_config(**changes):
    sections = {"image_config": IMAGE, "text_config": TEXT, "multimodal_config": ENCODER}
    sections["image_codebook_config"] = CODEBOOK
    config = transformers.FlavaConfig(**(sections | changes), hidden_size=16, projection_dim=10)
    config._attn_implementation = "eager"
    return config


@functools.cache
def shapes(config):
    return flatten(unbox(jax.eval_shape(lambda: FLAVA(config).init(jax.random.key(0)))["params"]))


def lazy(state):
    return {name: from_array(np.asarray(value.detach())) for name, value in state.items()}


def read(tensors, config=None, overrides=None):
    return weights.read(tensors, config, source="file", shapes=shapes, overrides=overrides)


def same(left, right):
    assert left.keys() == right.keys()
    for name, view in left.items():
        assert view.dtype == right[name].dtype and view.shape == right[name].shape, name
        assert view.read().tobytes() == right[name].read().tobytes(), name


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), atol=2e-5, rtol=0)


@functools.cache
def compiled(config, names):
    """Everything that a model of these parts says, in one program."""
    image, text = {"image": PIXELS}, {"tokens": TOKENS, "mask": MASK, "token_types": TYPES}
    masked = {"patch_mask": PATCHES, "masked_tokens": MASKED_TOKENS}

    def run(params):
        model = functools.partial(FLAVA(config).apply, {"params": params})
        calls = {
            "codebook": lambda: model(CODEBOOK_PIXELS, method=FLAVA.codebook_logits),
            "image": lambda: model(**image),
            "text": lambda: model(**text),
            "pair": lambda: model(**image, **text),
            "masked": lambda: model(**image, **text, **masked, fuse=False),
            "heads": lambda: [model(head, STATES, method=FLAVA.predict_masked) for head in HEAD_NAMES],
            "fusion": lambda: model(STATES, MASK, method=lambda module, *x: module.fusion(*x)),
        }
        return {name: calls[name]() for name in names}

    return jax.jit(run)


def outputs(imported, *names):
    return compiled(imported.config, names)(unflatten({path: v.read() for path, v in imported.params.items()}))


def chw(image):
    return torch.tensor(image.transpose(0, 3, 1, 2))


# The other layouts' names, written here from their published lists, independently of the tables.
TMM_NAMES = [
    (r"^flava\.image_model\.", "model.image_encoder."),
    (r"^flava\.text_model\.", "model.text_encoder."),
    (r"^flava\.multimodal_model\.", "model.mm_encoder."),
    (r"^flava\.logit_scale", "loss.contrastive_loss.logit_scale"),
    (r"^flava\.", "model."),
    (r"embeddings\.LayerNorm", "embeddings.layer_norm"),
    (r"attention\.attention\.", "attention."),
    (r"attention\.output\.dense", "attention.output"),
    (r"intermediate\.dense", "feedforward.model.0"),
    (r"(layer\.\d+\.)output\.dense", r"\1feedforward.model.2"),
    (r"layernorm_before", "attention_layernorm"),
    (r"layernorm_after", "feedforward_layernorm"),
    (r"^(mim|mlm)_head\.", r"loss.\1_loss.cls."),
    (r"^mmm_image_head\.", "loss.mmm_loss.mim.cls."),
    (r"^mmm_text_head\.", "loss.mmm_loss.mlm.cls."),
    (r"^itm_head\.pooler", "loss.itm_loss.pooler"),
    (r"^itm_head\.seq", "loss.itm_loss.cls.seq"),
    (r"cls\.transform\.dense", "cls.dense"),
    (r"cls\.transform\.LayerNorm", "cls.layer_norm"),
    (r"^image_codebook\.blocks", "image_codebook.encoder.blocks"),
]
DALLE_NAMES = [(r"(group_\d)\.group", r"\1"), ("res_path.path", "res_path"), (r"\.weight$", ".w"), (r"\.bias$", ".b")]
OLD_NAMES = [  # before August 2022
    (r"feedforward\.model\.0", "intermediate"),
    (r"feedforward\.model\.2", "output"),
    (r"attention_layernorm", "layernorm_before"),
    (r"feedforward_layernorm", "layernorm_after"),
    (r"embeddings\.layer_norm", "embeddings.LayerNorm"),
]
OLDEST_NAMES = [  # before July 2022
    *OLD_NAMES,
    (r"attention\.(query|key|value)", r"attention.attention.\1"),
    (r"model\.(image|text)_projection", r"loss.contrastive_loss.\1_projection"),
]
MMF_NAMES = [
    (r"^flava\.multimodal_model\.cls_token", "mm_encoder.module.encoder.cls_token"),
    (r"^flava\.multimodal_model\.", "mm_encoder.module."),
    (r"^flava\.(image|text)_model\.", r"\1_encoder.module."),
    (r"^flava\.(image|text)_to_mm_projection", r"mm_\1_projection"),
    (r"^flava\.logit_scale", "heads.cmd.clip_head.logit_scale"),
    (r"^flava\.", ""),
    (r"^mmm_image_head\.", "heads.cmd.mim_head.cls.predictions."),
    (r"^mmm_text_head\.", "heads.cmd.mlm_head.cls.predictions."),
    (r"^mlm_head\.", "heads.fairseq_mlm.cls.predictions."),
    (r"^mim_head\.", "heads.imagenet.mim_head.cls.predictions."),
    (r"^itm_head\.pooler", "heads.cmd.itm_head.pooler"),
    (r"^itm_head\.seq", "heads.cmd.itm_head.cls.seq"),
]


def renamed(state, names):
    found = {}
    for old, value in state.items():
        new = functools.reduce(lambda name, pair: re.sub(pair[0], pair[1], name), names, old)
        assert new not in found, (old, new)
        found[new] = value
    return found


def torchmultimodal(model, extra=()):
    """A pretraining file: DALL-E's own names in the codebook."""
    state = renamed(model.state_dict(), TMM_NAMES)
    codebook = {name: value for name, value in state.items() if name.startswith("image_codebook.")}
    rest = {name: value for name, value in state.items() if name not in codebook}
    return renamed(rest | renamed(codebook, DALLE_NAMES), extra)


VARIANTS = {
    "unified": [],
    "with dropout": [(r"feedforward\.model\.2", "feedforward.model.3")],
    "before the unified layers": OLD_NAMES,
    "first release": OLDEST_NAMES,
    "Lightning": [(r"^", "model.")],
}


def stub(shape):
    return TensorView(shape, np.dtype(np.float32), lambda index: np.zeros(0))
