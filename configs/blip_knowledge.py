"""BLIP on questions that need knowledge: OK-VQA (Marino et al. 2019) and A-OKVQA (Schwenk et al. 2022).

    python train.py --config=configs/blip_knowledge.py:okvqa --workdir=runs/okvqa
    python eval.py  --config=configs/blip_knowledge.py:okvqa --checkpoint=runs/okvqa

The recipe of LAVIS (Li et al. 2022, published code): `base_vqa` of `configs/blip.py`, which it starts from, with less
weight decay, none on biases and norms, and a learning rate that falls to 1e-5 in 7 epochs. Without that start A-OKVQA
is reported 8 points lower.

| variant  | starts from     | batch, hardware | expected (ViT-B, reported by LAVIS) |
|----------|-----------------|-----------------|-------------------------------------|
| `okvqa`  | runs/base_vqa   | 128, 8 GPUs     | test 55.4                           |
| `aokvqa` | runs/base_vqa   | 128, 8 GPUs     | val 56.2, test 50.1                 |

`data/okvqa` and `data/aokvqa` hold the published files and `answer_list.json`, the answers that are ranked; images are
COCO's. A-OKVQA's own accuracy compares with all ten answers, the one here, VQA's, with the other nine of each.
"""

from ml_collections import ConfigDict

from configs.blip import get_config as blip

BATCH, EPOCHS, LAST_RATE = 128, 7, 1e-5
RECIPES = {"okvqa": (9_009, 3e-5), "aokvqa": (17_056, 2e-5)}  # training questions, first learning rate


def get_config(variant: str = "okvqa") -> ConfigDict:
    """Returns the configuration of one data set."""
    if variant not in RECIPES:
        raise ValueError(f"unknown variant {variant!r}; choose from {', '.join(RECIPES)}")
    (questions, rate), source = RECIPES[variant], {"okvqa": _okvqa, "aokvqa": _aokvqa}[variant]
    steps = questions // BATCH
    config = blip("base_vqa")
    config.init = ({"path": "runs/base_vqa"},)
    config.data.batch_size = BATCH
    config.data.sources = (source("train"),)
    config.optimizer.update({"lr": rate, "weight_decay": 0.02})
    config.optimizer.schedule.update({"epoch_steps": steps, "end_factor": LAST_RATE / rate})
    del config.optimizer["decay_exclude"]  # biases and norms, unless told otherwise
    config.train.update({"steps": EPOCHS * steps, "checkpoint_every": steps})
    ranked = {"mode": "rank", "answer_list": f"data/{variant}/answer_list.json"}
    config.eval = {variant: {"kind": "vqa", "data": source("val"), **ranked}}
    return config


def _okvqa(split: str) -> dict:
    """VQA's form; what papers call the test questions are those about val2014."""
    folder = "data/okvqa"
    questions = f"{folder}/OpenEnded_mscoco_{split}2014_questions.json"
    answers = f"{folder}/mscoco_{split}2014_annotations.json"
    return {"kind": "json", "path": questions, "annotations": answers, "root": "data/coco"}


def _aokvqa(split: str) -> dict:
    fields = {"image": f"{split}2017/{{image_id:012d}}.jpg", "answer": "direct_answers"}
    fields |= {name: name for name in ("question", "question_id")}
    return {"kind": "json", "path": f"data/aokvqa/aokvqa_v1p0_{split}.json", "fields": fields, "root": "data/coco"}
