"""AltCLIP's whole recipe on real handwritten digits: minutes on two CPU cores. `make demo` runs all of this.

    data       python -m vlm.demo --output=demo_output --data_only
    CLIP       python train.py --config=configs/digits.py:clip        --workdir=demo_output/clip
    stage 1    python train.py --config=configs/digits.py:teacher     --workdir=demo_output/teacher
    stage 2    python train.py --config=configs/digits.py:contrastive --workdir=demo_output/contrastive
    evaluate   python eval.py  --config=configs/digits.py:contrastive --checkpoint=demo_output/contrastive

`clip` trains a small CLIP on English captions only. `teacher` teaches a multilingual text tower to say in eight
languages what CLIP's own says in English. `contrastive` tunes that tower on image-text pairs, the image tower locked.
`configs/digits.py:clip,FOLDER` reads and expects everything in FOLDER instead of `demo_output`.

Expected on 360 scans that no stage has seen: zero-shot accuracy 97.8 to 98.3 % in every language
(chance is 10 %), retrieval mean recall 0.99. `clip` takes about a minute on two CPU cores, `teacher` half of
that, `contrastive` and the evaluation ten seconds each. A batch of 64 holds about six captions that are right for a
picture, of which the contrastive loss knows one: it settles near ln 6 = 1.8, not near 0.
"""

from ml_collections import ConfigDict

from vlm.demo.phrases import LANGUAGES
from vlm.demo.prepare import ENGLISH_VOCAB, MULTILINGUAL_PIECES

IMAGE_SIZE = 16
WIDTH = 64
IMAGE = {"size": IMAGE_SIZE, "crop": IMAGE_SIZE}
JOINT = {"project_dim": WIDTH, "projection_dim": WIDTH}
TOWER = {"hidden_size": WIDTH, "num_layers": 2, "num_heads": 4, "mlp_dim": 4 * WIDTH}
VISION = {**TOWER, "num_layers": 3, "image_size": IMAGE_SIZE, "patch_size": 4}
TEXT = {**TOWER, "vocab_size": MULTILINGUAL_PIECES + 2, "max_length": 42}
TEXT |= {"dropout_rate": 0.0, "attention_dropout_rate": 0.0}
CLIP_TEXT = {**TOWER, "vocab_size": ENGLISH_VOCAB, "eos_id": 1}


def get_config(variant: str = "contrastive") -> ConfigDict:
    """Returns the configuration of one stage."""
    stage, _, folder = variant.partition(",")
    stages = {"clip": _clip, "teacher": _teacher, "contrastive": _contrastive}
    if stage not in stages:
        raise ValueError(f"unknown variant {variant!r}; choose from {', '.join(stages)}")
    config = ConfigDict({"family": "altclip"})
    stages[stage](config, folder or "demo_output")
    return config


def _clip(config: ConfigDict, folder: str) -> None:
    """Contrastive training of both towers from random weights (Radford et al. 2021), in English."""
    config.model = {"vision": VISION, "text": None, "clip_text": CLIP_TEXT, **JOINT}
    config.loss = {"objective": "contrastive", "lock_image": False}
    config.processor = {
        "tokenizer": f"{folder}/data/tokenizers/english",
        "image": IMAGE,
        "augment": {"scale": (0.7, 1.0), "ratio": (0.8, 1.25)},
        "max_length": 12,
    }
    config.data = {"batch_size": 64, "sources": (_images(folder, "train", "en"),)}
    config.optimizer = _adamw(lr=2e-3, warmup_steps=80)
    config.train = {"steps": 800, "log_every": 100}
    config.eval = _evaluations(folder, ("en",))


def _teacher(config: ConfigDict, folder: str) -> None:
    """Stage 1, teacher learning: English with itself, and English with its translations."""
    clip = f"{folder}/clip"
    config.model = {"vision": VISION, "text": TEXT, **JOINT}
    config.loss = {"objective": "teacher_learning", "teacher": CLIP_TEXT, "teacher_projection_dim": WIDTH}
    config.processor = _multilingual(folder) | {"teacher_tokenizer": f"{folder}/data/tokenizers/english"}
    config.init = (
        {"path": clip, "include": r"vision/.*|(vision|text)_projection/.*|logit_scale"},
        {"path": clip, "include": "text/.*|text_projection/.*", "into": "extra/teacher"},
    )
    parallel = {code: {"kind": "jsonl", "path": f"{folder}/data/parallel/en-{code}.jsonl"} for code in LANGUAGES}
    sources = tuple({**source, "weight": 2.0 if code == "en" else 1.0} for code, source in parallel.items())
    config.data = {"batch_size": 64, "sources": sources}
    groups = (
        (r"vision/.*|(vision|text)_projection/.*|logit_scale", {"freeze": True}),
        (r"text/.*|text_(norm|transformation)/.*", {}),
    )
    config.optimizer = _adamw(lr=2e-3, warmup_steps=30, groups=groups)
    config.train = {"steps": 300, "log_every": 50}
    config.eval = _evaluations(folder, tuple(LANGUAGES))


def _contrastive(config: ConfigDict, folder: str) -> None:
    """Stage 2, contrastive tuning with a locked image tower, captions in all languages."""
    config.model = {"vision": VISION, "text": TEXT, **JOINT}
    config.loss = {"objective": "contrastive", "lock_image": True}
    config.processor = _multilingual(folder)
    config.init = ({"path": f"{folder}/teacher"},)
    sources = tuple(_images(folder, "train", code) | {"weight": 1.0} for code in LANGUAGES)
    config.data = {"batch_size": 64, "sources": sources}
    groups = (
        (r"vision/.*|vision_projection/.*", {"freeze": True}),
        (r"text/.*|text_(norm|transformation|projection)/.*|logit_scale", {}),
    )
    config.optimizer = _adamw(lr=2e-4, warmup_steps=40, groups=groups)
    config.train = {"steps": 40, "log_every": 10}
    config.eval = _evaluations(folder, tuple(LANGUAGES))


def _multilingual(folder: str) -> dict:
    return {"tokenizer": f"{folder}/data/tokenizers/multilingual", "image": IMAGE, "max_length": 36}


def _adamw(lr: float, warmup_steps: int, **more: tuple) -> dict:
    schedule = {"name": "cosine", "warmup_steps": warmup_steps}
    common = {"betas": (0.9, 0.98), "weight_decay": 0.1, "grad_clip_norm": 1.0}
    return {"name": "adamw", "lr": lr, "schedule": schedule, **common, **more}


def _images(folder: str, split: str, code: str) -> dict:
    fields = {"image": "image", "text": code, "label": "label"}
    return {"kind": "tfds", "path": f"{folder}/data/digits/1.0.0", "split": split, "fields": fields}


def _evaluations(folder: str, codes: tuple[str, ...]) -> dict:
    """Zero-shot classification and retrieval on the test split in every language."""
    prompts = f"{folder}/data/prompts"
    evaluations = {}
    for code in codes:
        evaluations[f"zero_shot_{code}"] = {
            "kind": "zero_shot",
            "data": _images(folder, "test", code),
            "classnames": f"{prompts}/{code}_classnames.json",
            "templates": f"{prompts}/{code}_zeroshot_classification_templates.json",
            "language": code,
            "batch_size": 120,
        }
    for code in codes[:2]:
        evaluations[f"retrieval_{code}"] = {
            "kind": "retrieval",
            "data": _images(folder, "test", code),
            "group": "label",
            "language": code,
            "batch_size": 120,
        }
    return evaluations
