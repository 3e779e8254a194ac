"""The evaluations of AltCLIP's published results: ImageNet and retrieval in every language that has numbers.

    python eval.py --config=configs/altclip_evaluations.py:altclip --checkpoint=runs/altclip --output=altclip.json
    python eval.py --config=configs/altclip_evaluations.py:m9 --checkpoint=runs/m9 --only=xtd_ko --only=xtd_ja

The data of every evaluation that is run must be there; `--only` names some. A checkpoint is any that eval.py takes.

| evaluation     | data, in `data/`                                       | where it comes from                      |
|----------------|--------------------------------------------------------|------------------------------------------|
| `flickr30k`    | flickr30k/test.jsonl, the Karpathy test split          | made from Karpathy's file                |
| `flickr30k_cn` | flickr30k_cn/flickr30k_test_CNA.txt, images in         | github.com/flageval-baai/FlagEval,       |
|                | flickr30k/flickr30k_images                             | mCLIPEval/download/flickr                |
| `coco`         | coco/coco_karpathy_test.json                           | BLIP's, as for `configs/blip.py`         |
| `coco_cn_1k`   | coco-cn-version1805v1.1, human-written captions        | github.com/li-xirong/coco-cn, on request |
| `coco_cn_5k`   | the same 1,000 images, 5,000 human-translated captions | the same archive                         |
| `xtd_…`        | xtd10, a clone of the repository                       | github.com/adobe-research/               |
|                |                                                        | Cross-lingual-Test-Dataset-XTD10         |

COCO's images lie in coco/train2014 and coco/val2014. Files of segmented words (`…bosonseg…`, `seg.…`), which have
part-of-speech tags in their captions, are not what was evaluated.

Expected (arXiv 2211.06679; recall in %, of images for a text, then of texts for an image):

| `altclip`      | R@1, R@5, R@10     | R@1, R@5, R@10     | mean | stage 1 alone, mean |
|----------------|--------------------|--------------------|------|---------------------|
| `flickr30k`    | 72.5   91.6   95.4 | 86.0   98.0   99.1 | 90.4 | 88.3                |
| `flickr30k_cn` | 69.8   89.9   94.7 | 84.8   97.4   98.8 | 89.2 | 87.2                |
| `coco`         | 42.9   68.0   77.4 | 58.6   80.6   87.8 | 69.2 | 66.1                |
| `coco_cn_1k`   | 63.9   87.2   93.9 | 62.8   88.8   95.5 | 82.0 | 78.4                |
| `coco_cn_5k`   | 61.3   86.0   93.2 | 77.8   94.4   97.5 | 85.0 | 82.5                |

| `m9`, `image_to_text_recall@10` | `xtd_en` | `es` | `fr` | `zh` | `it` | `ko` | `ru` | `ja` |
|---------------------------------|----------|------|------|------|------|------|------|------|
|                                 | 95.4     | 94.1 | 92.9 | 95.1 | 94.2 | 94.4 | 91.8 | 91.7 |

Zero-shot ImageNet of `altclip`: 74.5 in English, 59.6 in Chinese. Of m18 no number is published. The authors' own
files (mCLIPEval) lose XTD's first image, in some languages its last as well, and cut nine captions of COCO-CN 5K short:
a number from whole files may differ by about 0.1.
"""

from ml_collections import ConfigDict

PROMPTS = {"altclip": ("en", "cn"), "m9": ("en", "cn", "it", "jp"), "m18": ("en", "cn", "it", "jp")}
XTD_FILES = {  # German and French captions are of the MIC set, the Japanese ones of STAIR
    **{code: f"XTD10/test_1kcaptions_{code}.txt" for code in ("en", "es", "it", "ko", "pl", "ru", "tr", "zh")},
    **{code: f"MIC/test_1kcaptions_{code}.txt" for code in ("de", "fr")},
    "ja": "STAIR/test_1kcaptions_jp.txt",
}
XTD_LANGUAGES = {
    "altclip": (),
    "m9": ("en", "es", "fr", "zh", "it", "ko", "ru", "ja"),
    "m18": tuple(XTD_FILES),
}


def get_config(variant: str = "altclip") -> ConfigDict:
    """Returns a configuration that evaluates and cannot train."""
    if variant not in PROMPTS:
        raise ValueError(f"unknown variant {variant!r}; choose from {', '.join(PROMPTS)}")
    chinese = _chinese() if variant == "altclip" else {}
    evaluations = in_training(variant) | chinese | _xtd(XTD_LANGUAGES[variant])
    return ConfigDict({"family": "altclip", "eval": evaluations})


def in_training(variant: str) -> dict:
    """What the training configuration lists: ImageNet and Flickr30k, whose data a run then needs from its start."""
    imagenet = {"kind": "tfds", "path": "data/imagenet2012/5.1.0", "split": "validation"}
    evaluations: dict = {
        f"imagenet_{language}": {
            "kind": "zero_shot",
            "data": imagenet,
            "classnames": f"data/prompts/{language}_classnames.json",
            "templates": f"data/prompts/{language}_zeroshot_classification_templates.json",
            "dataset": "imagenet1k",
            "language": language,
        }
        for language in PROMPTS[variant]
    }
    evaluations["flickr30k"] = _retrieval({"kind": "jsonl", "path": "data/flickr30k/test.jsonl"}, "en", captions=5)
    return evaluations


def _retrieval(data: dict, language: str, **settings: object) -> dict:
    return {"kind": "retrieval", "data": data, "language": language, **settings}


def _chinese() -> dict:
    """The Chinese sets, and English COCO beside them."""
    flickr = {
        "kind": "lines",
        "path": "data/flickr30k_cn/flickr30k_test_CNA.txt",
        "root": "data/flickr30k/flickr30k_images",
        "image": "{name};{name}.jpg",  # 360's release of the same test set has names without an ending
        "num_examples": 1000,
    }
    coco = {"kind": "json", "path": "data/coco/coco_karpathy_test.json"}
    return {
        "flickr30k_cn": _retrieval(flickr, "zh"),
        "coco": _retrieval(coco, "en", text="caption", captions=5),
        "coco_cn_1k": _retrieval(_coco_cn("human-written"), "zh"),
        "coco_cn_5k": _retrieval(_coco_cn("manually-translated"), "zh"),
    }


def _coco_cn(captions: str) -> dict:
    folder = "data/coco-cn-version1805v1.1"
    return {
        "kind": "lines",
        "path": f"{folder}/imageid.{captions}-caption.txt",
        "ids": f"{folder}/coco-cn_test.txt",
        "root": "data/coco",
        "image": "train2014/{name}.jpg;val2014/{name}.jpg",
        "num_examples": 1000,
    }


def _xtd(languages: tuple[str, ...]) -> dict:
    """One source with a field per language, so that the images are encoded once for all of them."""
    data = {
        "kind": "lines",
        "path": "data/xtd10/XTD10/test_image_names.txt",
        "texts": {code: f"data/xtd10/{XTD_FILES[code]}" for code in languages},
        "root": "data/coco",
        "image": "train2014/{name};val2014/{name}",
        "num_examples": 1000,
    }
    return {f"xtd_{code}": _retrieval(data, code, text=code) for code in languages}
