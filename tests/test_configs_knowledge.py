"""OK-VQA's and A-OKVQA's recipes read the published files and train with the published numbers."""

import json

import numpy as np
import pytest

from vlm import evaluation
from vlm.config import build, parse_config_flag
from vlm.data.source import open_source
from vlm.optimizer import learning_rate
from vlm.schema import Config

QUESTION = {"question_id": 7, "question": "which breed?", "image_id": 9}
OKVQA = {"questions": [QUESTION]}
ANSWERS = {"annotations": [{"question_id": 7, "answers": [{"answer": "pug", "answer_id": i} for i in range(10)]}]}
AOKVQA = [{"question_id": "22Mq", "question": "which breed?", "image_id": 9, "direct_answers": ["pug"] * 10}]


def settings_of(name):
    return build(Config, parse_config_flag(f"configs/blip_knowledge.py:{name}"), "")


@pytest.mark.parametrize(("name", "first", "question"), [("okvqa", 3e-5, 7), ("aokvqa", 2e-5, "22Mq")])
def test_published_recipes(name, first, question, tmp_path, monkeypatch):
    settings = settings_of(name)
    rate, epoch = learning_rate(settings.optimizer, settings.train.steps), settings.train.steps // 7
    np.testing.assert_allclose(rate(0), first, rtol=1e-6)
    falling = 1e-5 + (first - 1e-5) * (1 + np.cos(6 / 7 * np.pi)) / 2
    np.testing.assert_allclose([rate(7 * epoch - 1), rate(7 * epoch)], [falling, 1e-5], rtol=1e-5)
    assert settings.optimizer.weight_decay == 0.02 and settings.optimizer.decay_exclude
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        contents = {
            f"okvqa/OpenEnded_mscoco_{split}2014_questions": OKVQA | {"data_subtype": f"{split}2014"},
            f"okvqa/mscoco_{split}2014_annotations": ANSWERS,
            f"aokvqa/aokvqa_v1p0_{split}": AOKVQA,
            f"{name}/answer_list": ["pug", "poodle"],
        }
        for path, content in contents.items():
            (tmp_path / "data" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / f"{path}.json").write_text(json.dumps(content))
        for file in (f"{split}2014/COCO_{split}2014_000000000009.jpg", f"{split}2017/000000000009.jpg"):
            (tmp_path / "data/coco" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "data/coco" / file).write_bytes(split.encode())
    row = open_source(settings.data.sources[0])[0]
    assert row["image"] == b"train" and row["answer"] == ["pug"] * 10
    evaluator = evaluation.prepare(settings.eval).evaluators[name][0]
    assert evaluator.source[0]["image"] == b"val" and evaluator.note(evaluator.source[0])["question_id"] == question


def test_unknown_variants_are_named():
    with pytest.raises(ValueError, match="unknown variant 'vizwiz'; choose from okvqa, aokvqa"):
        settings_of("vizwiz")
