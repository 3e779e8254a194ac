"""FLAVA, small, on pictures of handwritten digits: all six losses on three streams, minutes on two CPU cores.

    python -m vlm.demo flava                      prepares the data, trains, compares with random weights

    pairs   70 %   scenes of two digits with their captions             contrastive, mmm_image, mmm_text, itm
    images  15 %   single digits, small or large                mim
    text    15 %   captions, questions with their answers               mlm

Visual words are the k-means clusters of the training pictures' patches, computed beforehand (`data.codebook_cache`).
`configs/flava_digits.py:digits,FOLDER` reads from FOLDER instead of demo_output.

Expected on scans that training has not seen, beside the random weights that training starts from; 'frequencies' is the
loss of a model that only knows how often each label occurs. One seed, about nine CPU minutes in all.

| loss        | ln of choices | frequencies | random | trained |  | metric                          | random | trained |
|-------------|---------------|-------------|--------|---------|--|---------------------------------|--------|---------|
| contrastive | 4.16          |             | 4.17   | 1.67    |  | linear probe: left digit        | 49.8 % | 50.0 %  |
| itm         | 0.69          | 0.55        | 0.71   | 0.43    |  | linear probe: larger digit      | 65.6 % | 72.8 %  |
| mmm_image   | 4.16          | 1.45        | 4.24   | 1.34    |  | linear probe: single digits     | 64.7 % | 67.6 %  |
| mmm_text    | 3.83          | 2.43        | 3.83   | 0.37    |  | itm, half of the captions wrong | 50.0 % | 84.2 %  |
| mim         | 4.16          | 2.36        | 4.22   | 1.89    |  | text-to-image recall@1          | 1.4 %  | 47.4 %  |
| mlm         | 3.83          | 2.95        | 3.84   | 0.35    |  | image-to-text recall@1          | 0.8 %  | 32.6 %  |

The left digit is read no better than before training: 1,500 steps are few. With text and fusion kernels of N(0, 0.02)
the contrastive loss was still at ln 64 after 150 steps, where it has left it with `init_std`.
"""

from ml_collections import ConfigDict

from vlm.demo import digits, scenes, visual_words

WIDTH = {"hidden_size": 64, "num_heads": 4, "mlp_dim": 256, "num_layers": 2}
INIT_STD = WIDTH["hidden_size"] ** -0.5
MAX_LENGTH, TEXT_LENGTH = 13, 18


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the configuration of `digits`."""
    name, _, folder = variant.partition(",")
    if name != "digits":
        raise ValueError(f"unknown variant {name!r}; choose from digits")
    return _digits(folder or "demo_output")


def _digits(folder: str) -> ConfigDict:
    side = scenes.SIZE
    model = {
        "vision": {**WIDTH, "image_size": side, "patch_size": digits.PATCH, "init": "clip"},
        "text": {**WIDTH, "init_std": INIT_STD, "vocab_size": len(scenes.vocabulary()), "max_length": TEXT_LENGTH},
        "fusion": {**WIDTH, "init_std": INIT_STD},
        "projection_dim": 64,
        "image_vocab_size": visual_words.COUNT,
        "codebook": None,
    }
    config = ConfigDict({"family": "flava", "model": model})
    config.loss = {"max_masked_patches": 14, "max_masked_tokens": 8, "max_masked_words": 2}
    config.processor = {
        "tokenizer": f"{folder}/scenes/tokenizer",
        "image": {"size": side, "crop": None, "mode": "exact"},
        "patch_size": digits.PATCH,
        "codebook_size": None,
        "mask_patches": 14,  # of 36, FLAVA's share
        "blocks": {"min_patches": 3},
        "max_length": MAX_LENGTH,
        "text_length": TEXT_LENGTH,
        "max_masked_tokens": 8,
        "itm_probability": 0.3,
    }
    config.data = {
        "batch_size": 64,
        "streams": {"pairs": 0.7, "images": 0.15, "text": 0.15},
        "sources": tuple({**source, "stream": stream} for stream, source in digits.sources(folder, "train").items()),
        "codebook_cache": f"{folder}/flava/visual_words",
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": {"name": "cosine", "warmup_steps": 100},
        "betas": (0.9, 0.98),
        "weight_decay": 0.05,
        "decay_exclude": ("logit_scale",),
        "grad_clip_norm": 1.0,
        "groups": (("(vision|text|fusion)/pooler/.*", {"freeze": True}), (".*", {})),
    }
    config.train = {"steps": 1500, "log_every": 50}
    config.eval = _evaluations(folder)
    return config


def _evaluations(folder: str) -> dict:
    """On held-out scans: which digit (linear probe), whether a caption is right, which caption, which picture."""
    scene, single = (
        {name: {"kind": "json", "path": f"{folder}/flava/{file}_{name}.json", **root} for name in ("train", "test")}
        for file, root in (("pairs", {"root": f"{folder}/scenes"}), ("digits", {}))
    )
    scene_parts = {"train": scene["train"], "data": scene["test"]}
    probe = {"kind": "linear_probe", "features": "class_token", "batch_size": 120}
    matches = {"kind": "json", "path": f"{folder}/flava/matches_test.json", "root": f"{folder}/scenes"}
    captions = {"kind": "json", "path": f"{folder}/scenes/caption_test.json"}
    return {
        **{f"probe_{label}": {**probe, **scene_parts, "label": label} for label in ("left", "larger")},
        "probe_single": {**probe, "train": single["train"], "data": single["test"]},
        "matching": {"kind": "nlvr2", "head": "match", "data": matches, "batch_size": 100},
        "retrieval": {"kind": "retrieval", "data": captions, "text": "caption", "group": "caption", "batch_size": 100},
    }
