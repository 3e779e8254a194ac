"""FLAVA's evaluation (Singh et al. 2022, arXiv 2112.04482): 35 data sets, and what the paper reports on them.

    python -m vlm.tasks --config=configs/flava_tasks.py --checkpoint=CHECKPOINT --output=results/flava

8 GLUE tasks: the text encoder is fine-tuned (RoBERTa's settings). 22 image data sets: logistic regression on the image
encoder's class token. VQAv2, SNLI-VE, Hateful Memes: all encoders are fine-tuned. Flickr30k, COCO: zero-shot retrieval.
Zero-shot ImageNet is run too; the paper has no number of it. All are percentages (tables 4 to 6 and the supplement).

Averages as in the paper: NLP over 8 tasks (MNLI: mean of both dev sets; MRPC, QQP: mean of accuracy and F1; CoLA:
Matthews; STS-B: Pearson), vision over 22, multimodal over 11 numbers (retrieval counts eight times); macro over these.

What the paper does not say: which of a fine-tuning run's checkpoints is evaluated (here the last), on which part of
Hateful Memes (here test_seen). VQAv2 test-dev needs the server: here train 2014 is learned and val 2014 answered.
"""

from ml_collections import ConfigDict

MODELS = ("FLAVA", "FLAVA_MM", "FLAVA_C", "CLIP PMD", "CLIP 400M")
"""Whose numbers are known: the paper's model, pairs only, contrastive only, CLIP-B/16 on the same data and OpenAI's."""


def _paper(*values: float) -> dict:
    return dict(zip(MODELS, values, strict=False))


ENTAILMENT = ("entailment", "neutral", "contradiction")
FOLLOWS = ("entailment", "not_entailment")
BINARY = ("0", "1")
BOTH = ("accuracy", "f1")
GLUE = {  # folder, sentences, label, its classes, metrics, the paper's name of them, numbers
    "mnli": ("MNLI", ("sentence1", "sentence2"), "gold_label", ENTAILMENT, ("accuracy",), "accuracy, mean of m and mm",
             _paper(80.33, 76.82, 70.99, 32.85, 33.52)),
    "cola": ("CoLA", ("sentence",), "label", BINARY, ("matthews",), "Matthews",
             _paper(50.65, 38.97, 17.58, 11.02, 25.37)),
    "mrpc": ("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, BOTH, "mean of accuracy and F1",
             _paper(84.16, 79.14, 76.31, 68.74, 69.91)),
    "qqp": ("QQP", ("question1", "question2"), "is_duplicate", BINARY, BOTH, "mean of accuracy and F1",
            _paper(88.74, 88.49, 85.94, 59.17, 65.33)),
    "sst2": ("SST-2", ("sentence",), "label", BINARY, ("accuracy",), "accuracy",
             _paper(90.94, 89.33, 86.47, 83.49, 88.19)),
    "qnli": ("QNLI", ("question", "sentence"), "label", FOLLOWS, ("accuracy",), "accuracy",
             _paper(87.31, 84.77, 71.85, 49.46, 50.54)),
    "rte": ("RTE", ("sentence1", "sentence2"), "label", FOLLOWS, ("accuracy",), "accuracy",
            _paper(57.76, 51.99, 51.99, 53.07, 55.23)),
    "stsb": ("STS-B", ("sentence1", "sentence2"), "score", None, ("pearson", "spearman"), "Pearson",
             _paper(85.67, 84.29, 57.28, 13.70, 15.98)),
}  # fmt: skip
GLUE_FORMAT = {"cola": {"columns": ("source", "label", "star", "sentence")}, "qqp": {"max_broken": 100}}
"""What the published files have of their own: no header; questions that were broken over several lines."""

VISION = {  # name, folder, metric (as CLIP's protocol has it), number
    "imagenet": ("ImageNet", None, "top1", 75.54),
    "food101": ("Food101", "wds_food101", "top1", 88.51),
    "cifar10": ("CIFAR-10", "wds_vtab-cifar10", "top1", 92.87),
    "cifar100": ("CIFAR-100", "wds_vtab-cifar100", "top1", 77.68),
    "cars": ("Cars", "wds_cars", "top1", 70.87),
    "aircraft": ("Aircraft", "wds_fgvc_aircraft", "mean_per_class_recall", 47.31),
    "dtd": ("DTD", "wds_vtab-dtd", "top1", 77.29),
    "pets": ("Pets", "wds_vtab-pets", "mean_per_class_recall", 84.82),
    "caltech101": ("Caltech101", "wds_vtab-caltech101", "mean_per_class_recall", 95.74),
    "flowers": ("Flowers102", "wds_vtab-flowers", "mean_per_class_recall", 96.37),
    "mnist": ("MNIST", "wds_mnist", "top1", 98.42),
    "stl10": ("STL-10", "wds_stl10", "top1", 98.89),
    "eurosat": ("EuroSAT", "wds_vtab-eurosat", "top1", 97.26),
    "gtsrb": ("GTSRB", "wds_gtsrb", "top1", 79.46),
    "kitti": ("KITTI", "wds_vtab-kitti_closest_vehicle_distance", "top1", 89.04),
    "pcam": ("PCAM", "wds_vtab-pcam", "top1", 85.31),
    "ucf101": ("UCF101", "wds_ucf101", "top1", 83.32),
    "clevr": ("CLEVR", "wds_vtab-clevr_count_all", "top1", 79.66),
    "fer2013": ("FER2013", "wds_fer2013", "top1", 61.12),
    "sun397": ("SUN397", "wds_sun397", "top1", 82.17),
    "sst": ("SST (rendered)", "wds_renderedsst2", "top1", 57.11),
    "country211": ("Country211", "wds_country211", "top1", 28.92),
}
OTHERS = ("vqa", "snli_ve", "hateful_memes")
RETRIEVAL = {  # file, numbers: text recall at 1 and 5 (of images), image recall at 1 and 5 (of texts)
    "flickr30k": ("Flickr30k", "data/flickr30k/flickr30k_test.json", (67.70, 94.00, 65.22, 89.38)),
    "coco": ("COCO", "data/coco/coco_karpathy_test.json", (42.74, 76.76, 38.38, 67.47)),
}


def get_config() -> ConfigDict:
    """Returns all tasks, in the order of the table."""
    names = (*GLUE, *VISION, *OTHERS, *RETRIEVAL, "imagenet_zero_shot")
    tasks = tuple({"key": name, **task(name)} for name in names)
    return ConfigDict({"compare": "FLAVA", "averages": ("NLP", "vision", "multimodal"), "tasks": tasks})


def task(name: str) -> dict:
    """One task, see `vlm.tasks.settings.Task`."""
    for makes, known in ((_glue, GLUE), (_probe, VISION), (_retrieval, RETRIEVAL)):
        if name in known:
            return makes(name)
    return {"vqa": _vqa, "snli_ve": _snli_ve, "hateful_memes": _memes, "imagenet_zero_shot": _zero_shot}[name]()


def _row(metric: str, of: tuple, paper: dict) -> dict:
    return {"metric": metric, "of": of, "paper": paper}


def _glue(task: str) -> dict:
    folder, sentences, label, classes, metrics, metric, paper = GLUE[task]
    names = ("text", "text_pair")[: len(sentences)]
    source = {"kind": "tsv", "fields": dict(zip(names, sentences, strict=True)) | {"label": label}}
    source |= GLUE_FORMAT.get(task, {}) | ({"classes": {"label": classes}} if classes else {})
    common = {"kind": "classification", "text_pair": "text_pair" if len(names) == 2 else None, "metrics": metrics}
    parts = ("dev_matched", "dev_mismatched") if task == "mnli" else ("dev",)
    return {
        "name": folder,
        "group": "NLP",
        "train": f"flava.py:glue_{task}",
        "changes": {"data": {"sources": ({**source, "path": f"data/glue/{folder}/train.tsv"},)}},
        "eval": {part: {**common, "data": {**source, "path": f"data/glue/{folder}/{part}.tsv"}} for part in parts},
        "rows": (_row(metric, tuple(f"{part}/{m}" for part in parts for m in metrics if m != "spearman"), paper),),
    }


def _probe(task: str) -> dict:
    """The class token; in tars of CLIP_benchmark's form, but ImageNet."""
    name, folder, metric, number = VISION[task]
    source = {"kind": "tar", "fields": {"image": "webp;jpg;png", "label": "cls"}}
    train, test = (f"data/{folder}/{part}/*.tar" for part in ("train", "test"))
    train, test = {**source, "path": train}, {**source, "path": test}
    if folder is None:
        source = {"kind": "tfds", "path": "data/imagenet2012/5.1.0"}
        train, test = {**source, "split": "train"}, {**source, "split": "validation"}
    probe = {"kind": "linear_probe", "features": "class_token", "train": train, "data": test, "batch_size": 256}
    kind = "accuracy" if metric == "top1" else "mean per class"
    row = _row(kind, (f"probe/{metric}",), {"FLAVA": number} if folder else _paper(75.54, 74.34, 74.09, 72.95, 80.20))
    return {"name": name, "group": "vision", "eval": {"probe": probe}, "rows": (row,)}


def _vqa() -> dict:
    def source(part: str) -> dict:
        return {
            "kind": "json",
            "path": f"data/vqa/v2_OpenEnded_mscoco_{part}_questions.json",
            "annotations": f"data/vqa/v2_mscoco_{part}_annotations.json",
            "root": "data/coco",
        }

    train = source("train2014")
    asked = {"kind": "vqa", "data": source("val2014"), "mode": "classify", "types": "answer_type", "batch_size": 64}
    return {
        "name": "VQAv2",
        "group": "multimodal",
        "train": "flava.py:vqa",
        "changes": {
            "data": {"sources": ({**train, "fields": {"image": "image", "text": "question", "answer": "answer"}},)},
        },
        "answers": {"annotations": (train["annotations"],), "count": 3129},
        "eval": {"vqa": asked},
        "rows": (_row("VQA accuracy", ("vqa/accuracy",), _paper(72.49, 71.69, 67.13, 59.81, 54.83)),),
        "note": "val 2014; the paper: test-dev",
    }


def _snli_ve() -> dict:
    source = {
        "kind": "jsonl",
        "root": "data/flickr30k/flickr30k_images",
        "fields": {"image": "{Flickr30K_ID}.jpg", "text": "sentence2", "label": "gold_label"},
        "classes": {"label": ENTAILMENT},
    }
    test = {"kind": "classification", "data": {**source, "path": "data/snli_ve/snli_ve_test.jsonl"}}
    return {
        "name": "SNLI-VE",
        "group": "multimodal",
        "train": "flava.py:snli_ve",
        "changes": {"data": {"sources": ({**source, "path": "data/snli_ve/snli_ve_train.jsonl"},)}},
        "eval": {"test": {**test, "batch_size": 128}},
        "rows": (_row("accuracy", ("test/accuracy",), _paper(78.89, 78.36, 73.27, 73.53, 74.27)),),
    }


def _memes() -> dict:
    """The text is what is written in the picture."""
    source = {"kind": "jsonl", "fields": {"image": "img", "text": "text", "label": "label"}}
    test = {"kind": "classification", "data": {**source, "path": "data/hateful_memes/test_seen.jsonl"}}
    return {
        "name": "Hateful Memes",
        "group": "multimodal",
        "train": "flava.py:hateful_memes",
        "changes": {"data": {"sources": ({**source, "path": "data/hateful_memes/train.jsonl"},)}},
        "eval": {"test": {**test, "metrics": ("auroc", "accuracy"), "batch_size": 128}},
        "rows": (_row("AUROC", ("test/auroc",), _paper(76.09, 70.72, 55.58, 56.59, 63.93)),),
    }


def _retrieval(task: str) -> dict:
    name, path, numbers = RETRIEVAL[task]
    data = {"kind": "json", "path": path}
    spec = {"kind": "retrieval", "data": data, "text": "caption", "captions": 5, "k": (1, 5), "batch_size": 256}
    ways = (("image_to_text", "text recall"), ("text_to_image", "image recall"))
    kinds = [(f"retrieval/{way}_recall@{k}", f"{words}@{k}") for way, words in ways for k in (1, 5)]
    rows = (_row(words, (of,), {"FLAVA": number}) for (of, words), number in zip(kinds, numbers, strict=True))
    return {"name": name, "group": "multimodal", "eval": {"retrieval": spec}, "rows": tuple(rows)}


def _zero_shot() -> dict:
    spec = {
        "kind": "zero_shot",
        "data": {"kind": "tfds", "path": "data/imagenet2012/5.1.0", "split": "validation"},
        "classnames": "data/prompts/en_classnames.json",
        "templates": "data/prompts/en_zeroshot_classification_templates.json",
        "dataset": "imagenet1k",
        "batch_size": 256,
    }
    row = _row("accuracy", ("zero_shot/top1",), {})
    return {"name": "ImageNet zero-shot", "group": "zero-shot", "eval": {"zero_shot": spec}, "rows": (row,)}
