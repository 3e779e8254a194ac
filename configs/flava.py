"""FLAVA (Singh et al. 2022, arXiv 2112.04482): pretraining on pairs, images and texts, its ablations, fine-tuning.

    text encoder  python train.py --config=configs/flava.py:mlm          --workdir=runs/flava_mlm
    pretrain      python train.py --config=configs/flava.py:full         --workdir=runs/flava
    fine-tune     python train.py --config=configs/flava.py:vqa          --workdir=runs/flava_vqa
    evaluate      python eval.py  --config=configs/flava.py:full         --checkpoint=runs/flava
    all tasks     python -m vlm.tasks --config=configs/flava_tasks.py --checkpoint=runs/flava --output=results/flava

Pretraining takes a whole batch of 8192 from one kind of data at every step: pairs (PMD, 70 million) 70 %, images alone
(ImageNet-1k) 15 %, texts alone (CCNews, BookCorpus) 15 %, until pairs were drawn 150,000 times. Expected: paper, tables
4 and 5, and its supplement (averages over 8 GLUE tasks, 22 linear probes, 5 tasks on images and texts; all of it).

| variant          | what it is                                       | NLP   | vision | both  | macro |
|------------------|--------------------------------------------------|-------|--------|-------|-------|
| `full`           | FLAVA                                            | 78.19 | 79.44  | 69.92 | 75.85 |
| `no_init`        | its encoders start at random                     |       |        |       |       |
| `multimodal`     | pairs only: contrastive, masked pairs, matching  | 74.22 | 79.35  | 69.11 | 74.23 |
| `contrastive`    | pairs only: contrastive                          | 64.80 | 79.14  | 66.25 | 70.06 |
| `mim`            | images of the pairs only                         |       | 57.46  |       |       |
| `mlm`            | texts only; `full` starts from its text encoder  |       |        |       |       |

`full`: zero-shot retrieval, text and image recall@1: Flickr30k 67.70 and 65.22, COCO 42.74 and 38.38; linear probe of
ImageNet 75.54. In the first steps expect ln 8192 = 9.0 for mim and mmm_image, ln 30522 = 10.3 for mlm and mmm_text,
ln 2 = 0.69 for itm (0.33 once it says that all captions are right), and ln 8192 = 9.0 for contrastive.

Texts are read as they are, one record one row of 512: a Parquet column `text` whose records hold about 510 word pieces
of consecutive sentences, also from one document to the next (RoBERTa's "full sentences"). What is longer is cut off,
what is shorter is padded; nothing is packed here. CCNews and BookCorpus are drawn by their gigabytes.

`900m`, `1.8b`, `2.7b`, `4.8b`, `10b`: torchmultimodal's larger sizes with its recipe; nothing is published about what
they reach.

| fine-tuning            | batch, steps     | expected (supplement)                                              |
|------------------------|------------------|--------------------------------------------------------------------|
| `vqa`                  | 256, 44,000      | VQAv2 test-dev 72.49                                               |
| `snli_ve`              | 256, 24,000      | SNLI-VE test accuracy 78.89                                        |
| `hateful_memes`        | 256, 24,000      | AUROC 76.09                                                        |
| `glue_cola`, …         | 16 or 32         | Matthews 50.65; `glue_sst2` 90.94, `glue_qnli` 87.31, `glue_rte`   |
|                        |                  | 57.76, `glue_mnli` (m/mm) 80.33 accuracy; `glue_mrpc` 84.16,       |
|                        |                  | `glue_qqp` 88.74 mean of accuracy and F1; `glue_stsb` Pearson 85.67|
| `probe`                | none (eval.py)   | ImageNet 75.54, Food101 88.51, CIFAR10 92.87, CIFAR100 77.68       |

Small, for two CPU cores, on the two-digit scenes that `python -m vlm.demo blip --output=demo_output --data_only`
prepares (the story `flava` does too, with more): `tiny`, all six losses on three streams in a minute, with a random
codebook. `configs/flava.py:tiny,FOLDER` reads from FOLDER instead. Data and starting checkpoints are paths under
`data/` and `checkpoints/`.
"""

from ml_collections import ConfigDict

from vlm.demo import scenes

WIDTH = {"hidden_size": 768, "num_heads": 12, "mlp_dim": 3072}
PAIRS = ("coco", "sbu", "localized_narratives", "cc3m", "visual_genome", "wit", "cc12m", "redcaps", "yfcc100m")
TEXTS = {"ccnews": 76.0, "bookcorpus": 5.0}
"""Weights: gigabytes; of CCNews after Liu et al. 2019, section 3.2, BookCorpus has about 5."""
PAIR_STEPS = 150_000
CODEBOOK = {"path": "checkpoints/flava-image-codebook", "include": "codebook/.*"}
FULL = "checkpoints/flava-full"
UNUSED = "codebook/.*|(vision|text|fusion)/pooler/.*"
"""What no objective trains: the codebook, and Hugging Face's poolers, which are kept for round trips."""
SIZES = {  # width, mlp, layers of the encoders and of the fusion; 16 heads
    "900m": (1024, 4096, 24, 12),
    "1.8b": (1280, 5120, 32, 16),
    "2.7b": (1408, 6144, 40, 20),
    "4.8b": (1664, 8192, 48, 24),
    "10b": (2048, 10240, 64, 40),
}
GLUE = {  # learning rate, batch, steps, warm-up (RoBERTa's published settings), outputs
    "cola": (1e-5, 16, 5336, 320, 2),
    "sst2": (1e-5, 32, 20_935, 1256, 2),
    "mrpc": (1e-5, 16, 2296, 137, 2),
    "qqp": (1e-5, 32, 113_272, 28_318, 2),
    "stsb": (2e-5, 16, 3598, 214, 1),
    "mnli": (1e-5, 32, 123_873, 7432, 3),
    "qnli": (1e-5, 32, 33_112, 1986, 2),
    "rte": (2e-5, 16, 2036, 122, 2),
}
HELD_OUT = 20_000  # texts of the first source with which the text encoder's checkpoints are compared
VQA = {
    "kind": "json",
    "path": ("data/vqa/vqa_train.json", "data/vqa/vqa_val.json"),
    "fields": {"image": "image", "text": "question", "answer": "answer"},
}
TASKS = {  # objective, outputs, learning rate, steps
    "vqa": ("soft_labels", 3129, 1e-4, 44_000),
    "snli_ve": ("classification", 3, 1e-5, 24_000),
    "hateful_memes": ("classification", 2, 1e-5, 24_000),
}


def get_config(variant: str = "full") -> ConfigDict:
    """Returns the configuration of one variant."""
    name, _, folder = variant.partition(",")
    alone = {"tiny": _tiny, "full": _full, "no_init": _no_init, "multimodal": _multimodal, "contrastive": _contrastive}
    alone |= {"mim": _mim, "mlm": _mlm, "probe": _probe}
    glue = {f"glue_{task}": task for task in GLUE}
    if name == "tiny":
        return _tiny(folder)
    if name in alone:
        return alone[name]()
    if name in SIZES:
        return _scaled(name)
    if name in TASKS:
        return _finetune(name)
    if name in glue:
        return _glue(glue[name])
    raise ValueError(f"unknown variant {name!r}; choose from {', '.join((*alone, *SIZES, *TASKS, *glue))}")


# ---------------------------------------------------------------------------------------------------------- pretraining


def _full() -> ConfigDict:
    """Paper, section 4.1 and supplement: AdamW, 10,000 steps of warm-up to 1e-3, cosine; encoders trained before.

    The image encoder is DINO's ViT-B/16, the text encoder comes from `mlm`, the fusion encoder starts at random. The
    paper's model is the checkpoint that is best at zero-shot ImageNet, of one every 8,000 updates; all are kept.
    """
    config = _start("pairs", "images", "text")
    config.init = (
        CODEBOOK,
        {"path": "checkpoints/dino-vitb16", "include": "vision/.*"},
        {"path": "runs/flava_mlm", "include": "text/.*"},
    )
    return config


def _no_init() -> ConfigDict:
    config = _start("pairs", "images", "text")
    config.init = (CODEBOOK,)
    return config


def _multimodal() -> ConfigDict:
    """FLAVA without unimodal data; the paper's FLAVA_MM."""
    config = _start("pairs")
    config.loss.update({"mim": 0.0, "mlm": 0.0})
    config.optimizer.groups = _frozen(f"{UNUSED}|(mim|mlm)_head/.*")
    config.init = (CODEBOOK,)
    return config


def _contrastive() -> ConfigDict:
    """The contrastive loss alone; the paper's FLAVA_C."""
    config = _start("pairs", fusion=None, codebook=None)
    config.processor.update({"codebook_size": None, "mask_patches": 0, "mlm_probability": 0.0, "itm_probability": 0.0})
    config.loss.update(dict.fromkeys(("mim", "mlm", "itm", "mmm_image", "mmm_text"), 0.0))
    config.optimizer.groups = _frozen("(vision|text)/pooler/.*|vision/mask_embedding|(mim|mlm)_head/.*")
    return config


def _mim() -> ConfigDict:
    """The image encoder alone, on the images of the pairs."""
    config = _start("pairs", text=None, fusion=None, projection_dim=None)
    config.data.sources = tuple({**source, "fields": {"image": "jpg;png;webp"}} for source in config.data.sources)
    config.optimizer.groups = _frozen("codebook/.*|vision/pooler/.*")
    config.init = (CODEBOOK,)
    imagenet = {"kind": "tfds", "path": "data/imagenet2012/5.1.0", "split": "validation", "fields": {"image": "image"}}
    config.eval = _held_out(imagenet, max_masked_patches=75)
    config.eval.held_out.codebook_cache = None  # `vlm.precompute` fills it, and prints the flag that names it
    return config


def _mlm() -> ConfigDict:
    """The text encoder before pretraining (supplement): RoBERTa base's settings, 125,000 steps of 2048 texts.

    The checkpoint should be that of the least `held_out/mlm`, the loss of hidden tokens of 20,000 texts that are not
    learned from; one of every 8,000 steps is kept. `full` starts from the last.
    """
    config = _start("text", vision=None, fusion=None, codebook=None, projection_dim=None)
    config.model.text.update({"dropout_rate": 0.1, "attention_dropout_rate": 0.1})
    config.data.batch_size = 2048
    schedule = {"name": "linear", "warmup_steps": 10_000}
    config.optimizer = _adamw(5e-4, schedule, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    config.optimizer.groups = _frozen("text/pooler/.*")
    config.train.steps = 125_000
    first, *others = config.data.sources
    config.data.sources = ({**first, "split": f"[{HELD_OUT}:]"}, *others)
    config.eval = _held_out({**first, "split": f"[:{HELD_OUT}]"}, max_masked_tokens=128)
    return config


def _scaled(name: str) -> ConfigDict:
    """Sizes of torchmultimodal: 100,000 steps, weights and optimizer split over all devices (900m: whole on each).

    Its batch is 8 per device (4.8b: 12); here as many as 256 devices have.
    """
    hidden_size, mlp_dim, layers, fusion_layers = SIZES[name]
    config = _start("pairs", "images", "text")
    width = {"hidden_size": hidden_size, "num_heads": 16, "mlp_dim": mlp_dim}
    config.model.update({"vision": {**width, "num_layers": layers}, "text": {**width, "num_layers": layers}})
    config.model.fusion = {**width, "num_layers": fusion_layers}
    config.init = (CODEBOOK,)
    config.data.batch_size = 3072 if name == "4.8b" else 2048
    config.train.steps = 100_000
    config.remat = "full"
    if name != "900m":
        config.sharding = {"mesh": {"data": 1, "fsdp": -1}}
    return config


def _start(*streams: str, **parts: None) -> ConfigDict:
    """What all pretraining has in common, on one or several streams; `parts` of the model are left out."""
    sources = {
        "pairs": [
            {"kind": "tar", "path": f"data/pmd/{name}-*.tar", "fields": {"image": "jpg;png;webp", "text": "txt"}}
            for name in PAIRS
        ],
        "images": [{"kind": "tfds", "path": "data/imagenet2012/5.1.0", "split": "train", "fields": {"image": "image"}}],
        "text": [
            {"kind": "parquet", "path": f"data/{name}/*.parquet", "fields": {"text": "text"}, "weight": weight}
            for name, weight in TEXTS.items()
        ],
    }
    model = {
        "vision": {**WIDTH, "num_layers": 12, "image_size": 224, "patch_size": 16},
        "text": {**WIDTH, "num_layers": 12, "vocab_size": 30522, "max_length": 512},
        "fusion": {**WIDTH, "num_layers": 6},
        "projection_dim": 768,
    }
    config = ConfigDict({"family": "flava", "model": {**model, **parts}})
    config.loss = {"objective": "pretrain", "max_masked_patches": 75, "max_masked_tokens": 128, "max_masked_words": 12}
    config.processor = {"tokenizer": "checkpoints/bert-base-uncased", "augment": {"scale": (0.9, 1.0)}}
    config.processor.max_masked_tokens = 128  # of 510, of which 15 % are 77
    config.processor.normalise = False  # a quarter of the bytes; the step does it
    config.data = {"batch_size": 8192, "num_workers": 16, "sources": tuple(sources[streams[0]])}
    config.train = {"steps": PAIR_STEPS, "log_every": 50, "checkpoint_every": 2000}
    config.train.update({"eval_every": 8000, "keep_every": 8000})
    if len(streams) > 1:
        config.data.sources = tuple({**source, "stream": name} for name in streams for source in sources[name])
        config.data.streams = {"pairs": 0.7, "images": 0.15, "text": 0.15}
        config.train.steps = round(PAIR_STEPS / 0.7)
    config.optimizer = _adamw(1e-3, {"name": "cosine", "warmup_steps": 10_000}, weight_decay=0.1)
    config.precision = {"compute": "bfloat16"}
    config.remat = "dots"
    config.eval = _zero_shot() if "pairs" in streams else {}
    return config


def _adamw(lr: float, schedule: dict, **more: object) -> dict:
    """AdamW without clipping, its decay on every parameter but the temperature, which stays in [0, ln 100]."""
    rule = {"name": "adamw", "lr": lr, "schedule": schedule, "betas": (0.9, 0.999), "eps": 1e-8}
    return {**rule, "decay_exclude": ("logit_scale",), "groups": _frozen(UNUSED), **more}


def _frozen(paths: str) -> tuple:
    return ((paths, {"freeze": True}), (".*", {}))


def _zero_shot() -> dict:
    """ImageNet by its classes' names, and retrieval of the 1,000 and 5,000 test images' captions."""
    retrieval = {
        name: {"kind": "retrieval", "data": {"kind": "json", "path": f"data/{name}/{file}"}, "text": "caption"}
        for name, file in (("flickr30k", "flickr30k_test.json"), ("coco", "coco_karpathy_test.json"))
    }
    names = {
        "classnames": "data/prompts/en_classnames.json",
        "templates": "data/prompts/en_zeroshot_classification_templates.json",
        "dataset": "imagenet1k",
    }
    data = {"kind": "tfds", "path": "data/imagenet2012/5.1.0", "split": "validation"}
    return {"imagenet": {"kind": "zero_shot", "data": data, **names}, **retrieval}


def _held_out(data: dict, **loss: int) -> dict:
    return {"held_out": {"kind": "losses", "data": data, "loss": loss, "batch_size": 256}}


# ---------------------------------------------------------------------------------------------------------- fine-tuning


def _finetune(task: str) -> ConfigDict:
    """Supplement: two layers of 1536 on the fusion encoder's class token, AdamW, batches of 256, weight decay 1e-2."""
    objective, outputs, rate, steps = TASKS[task]
    config = _finetuned(objective, "multimodal", outputs, "(vision|text|fusion)/.*|(vision|text)_to_fusion/.*")
    config.model.classifier.hidden_size = 1536
    if task == "vqa":
        config.processor.update({"image": {"size": 480, "crop": None, "mode": "exact"}, "num_answers": outputs})
        config.processor.answers = "data/vqa/answers_3129.json"
        config.loss.interpolate_positions = True
    config.data = {"batch_size": 256, "num_workers": 16}
    if task == "vqa":  # all there is to learn from; the answers to test questions are known to the server alone
        config.data.sources = (VQA,)
    else:
        _use(config, task)
    config.optimizer = _adamw(rate, {"name": "cosine", "warmup_steps": 2000}, weight_decay=1e-2)
    frozen = _frozen("(vision|text|fusion)/pooler/.*|vision/mask_embedding")
    unread = r"(vision|text)/output_norm/.*"  # fusion reads what is before these norms
    config.optimizer.groups = (*frozen[:-1], (unread, {"weight_decay": 0.0}), frozen[-1])
    config.train = {"steps": steps, "log_every": 50, "checkpoint_every": 2000, "text_lengths": (32, 48)}
    return config


def _glue(task: str) -> ConfigDict:
    """RoBERTa's settings of each task (Liu et al. 2019), with torchmultimodal's classifier."""
    rate, batch, steps, warmup, outputs = GLUE[task]
    config = _finetuned("regression" if outputs == 1 else "classification", "text", outputs, "text/.*")
    config.model.update({"vision": None, "fusion": None})
    config.processor.update({"max_length": 512, "text_length": 512})
    config.data = {"batch_size": batch, "num_workers": 4}
    _use(config, task)
    schedule = {"name": "linear", "warmup_steps": warmup}
    config.optimizer = _adamw(rate, schedule, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    config.optimizer.groups = _frozen("text/pooler/.*")
    config.train = {"steps": steps, "log_every": 50, "checkpoint_every": 2000, "text_lengths": (64, 128, 256)}
    return config


def _use(config: ConfigDict, task: str) -> None:
    """Data and evaluation as `configs/flava_tasks.py` has them."""
    from configs import flava_tasks

    given = flava_tasks.task(task)
    config.data.sources, config.eval = given["changes"]["data"]["sources"], given["eval"]


def _probe() -> ConfigDict:
    """Logistic regression on the image encoder's class token, at most 1,000 steps of L-BFGS: for eval.py only.

    Trained as it stands, it is not that: two layers on the class token (768 units, ReLU, dropout) learn ImageNet by
    AdamW, with the encoder kept as it is.
    """
    config = _finetuned("classification", "image", 1000, "vision/.*")
    config.model.update({"text": None, "fusion": None})
    config.processor.tokenizer = None
    imagenet = {"kind": "tfds", "path": "data/imagenet2012/5.1.0"}
    train = {**imagenet, "split": "train", "fields": {"image": "image", "label": "label"}}
    config.data = {"batch_size": 1024, "num_workers": 16, "sources": (train,)}
    config.optimizer = _adamw(1e-3, {"name": "cosine"}) | {"groups": _frozen("vision/.*")}
    config.train = {"steps": 12_500, "log_every": 50, "checkpoint_every": 2000}
    probe = {"kind": "linear_probe", "train": train, "data": {**imagenet, "split": "validation"}}
    probe |= {"features": "class_token", "batch_size": 256}
    config.eval = {"imagenet": probe}
    return config


def _finetuned(objective: str, reads: str, outputs: int, weights: str) -> ConfigDict:
    """A classifier on one encoder of the pretrained model."""
    model = {"projection_dim": None, "heads": False, "codebook": None}
    config = ConfigDict({"family": "flava", "model": model})
    config.model.classifier = {"num_labels": outputs, "input": reads}
    config.loss = {"objective": objective}
    config.processor = {"tokenizer": "checkpoints/bert-base-uncased", "task": objective}
    if objective == "classification":
        config.processor.num_labels = outputs
    config.init = ({"path": FULL, "include": weights},)
    config.precision = {"compute": "bfloat16"}
    return config


# ---------------------------------------------------------------------------------------------------------------- small


def _tiny(folder: str) -> ConfigDict:
    """Pretraining on scenes of two handwritten digits: three streams, all six losses, small. A minute on a CPU."""
    folder = f"{folder or 'demo_output'}/scenes"
    side, patch = scenes.SIZE, 4
    width = {"hidden_size": 32, "num_heads": 4, "mlp_dim": 128, "num_layers": 2}
    model = {
        "vision": {**width, "image_size": side, "patch_size": patch},
        "text": {**width, "vocab_size": len(scenes.vocabulary()), "max_length": 20},
        "fusion": width,
        "projection_dim": 32,
        "image_vocab_size": 64,
        "codebook": {"hidden_size": 8, "vocab_size": 64},
    }
    config = ConfigDict({"family": "flava", "model": model})
    config.loss = {"max_masked_patches": 14, "max_masked_tokens": 8, "max_masked_words": 3}
    config.processor = {
        "tokenizer": f"{folder}/tokenizer",
        "image": {"size": side, "crop": None, "mode": "exact"},
        "augment": {"scale": (0.9, 1.0)},
        "patch_size": patch,
        "codebook_size": 8 * side // patch,
        "mask_patches": 14,
        "blocks": {"min_patches": 3},
        "max_length": 20,
        "text_length": 20,
        "max_masked_tokens": 8,
    }
    names = {"image": "image", "text": "caption"}
    streams = {"pairs": names, "images": {"image": names["image"]}, "text": {"text": names["text"]}}
    config.data = {
        "batch_size": 32,
        "streams": {"pairs": 0.7, "images": 0.15, "text": 0.15},
        "sources": tuple(
            {"kind": "json", "path": f"{folder}/caption_train.json", "stream": stream, "fields": fields}
            for stream, fields in streams.items()
        ),
    }
    schedule = {"name": "cosine", "warmup_steps": 5}
    config.optimizer = _adamw(1e-3, schedule, weight_decay=0.1)
    config.train = {"steps": 40, "log_every": 10}
    return config
