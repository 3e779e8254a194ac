"""Answers of a random model: rank equals a loop over candidates, accuracy equals the official one."""

import json
import pathlib

import jax
import numpy as np
import pytest

from vlm import evaluation
from vlm.errors import UserError
from vlm.evaluation.answers import Ranker
from vlm.evaluation.embed import Embedder
from vlm.evaluation.metrics import files, vqa
from vlm.evaluation.vqa import Vqa, VqaConfig
from vlm.generation import GenerationConfig, generate

ANSWERS = ("yes", "no", "two", "a five on the left", "five on the right", "twelve", "two digits", "the left")


@pytest.fixture
def spec(scenes_folder):
    data = {"kind": "json", "path": str(scenes_folder / "vqa_test.json"), "split": "[:11]"}
    return {"kind": "vqa", "data": data, "bootstrap": {"resamples": 10}, "batch_size": 4}


@pytest.fixture(scope="module")
def losses(tiny_blip):
    """Explicit losses [questions, answers], and the probability of each answer's first token."""
    model, params, processor = tiny_blip("vqa")

    apply = jax.jit(lambda **batch: model.apply({"params": params}, **batch).logits)

    def compute(examples, smoothing):
        total, first = np.zeros((len(examples), len(ANSWERS))), np.zeros((len(examples), len(ANSWERS)))
        answers = processor.tokenizer(list(ANSWERS))
        for row, example in enumerate(examples):
            batch = processor(images=[example["image"]], texts=[example["question"]])
            texts = {"answer_tokens": answers["tokens"][None], "answer_mask": answers["mask"][None]}
            logits = np.asarray(apply(**batch, **texts)[0], np.float64)
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            for column, (tokens, mask) in enumerate(zip(answers["tokens"], answers["mask"], strict=True)):
                first[row, column] = log_probs[column, 0, tokens[1]]
                for place, token in enumerate(tokens[1 : mask.sum()]):
                    right = (1 - smoothing) * log_probs[column, place, token]
                    total[row, column] -= right + smoothing * log_probs[column, place].mean()
        return total, first

    return compute


def test_ranking_equals_a_loop(tiny_blip, spec, losses):
    model, params, processor = tiny_blip("vqa")
    source = evaluation.prepare({"q": spec}).evaluators["q"][0].source
    examples = [source[index] for index in (0, 3, 7, 8)]
    total, first = losses(examples, 0.1)
    embedder = Embedder(model, params, processor, batch_size=4)
    batch = processor(images=[e["image"] for e in examples], texts=[e["question"] for e in examples])
    for shortlist in (128, 4):
        found = Ranker.of(embedder, ANSWERS, shortlist=shortlist, chunk=3)(embedder.feed, batch)
        count = min(shortlist, len(ANSWERS))
        np.testing.assert_allclose(found.losses, np.take_along_axis(total, found.candidates, 1), atol=2e-4)
        for row in range(4):
            assert len(set(found.candidates[row])) == count
            listed = np.sort(first[row])[::-1][:count]
            np.testing.assert_allclose(first[row, found.candidates[row]], listed, atol=1e-5)
            expected = found.candidates[row][np.argmin(total[row, found.candidates[row]])]
            assert found.best[row] == expected
    assert not np.allclose(total, losses(examples, 0.0)[0], atol=0.01)


def test_ranks_the_same_in_any_batch_and_on_a_mesh(tiny_blip, spec, tmp_path, mesh8):
    model, params, processor = tiny_blip("vqa")
    spec |= {"mode": "rank", "answer_list": ANSWERS, "shortlist": 5, "chunk": 3}
    metrics = evaluation.run({"q": spec}, model, params, processor, output=tmp_path / "r.json", progress=False)
    answers = files.vqa_results(tmp_path / "r.q.results.json")
    annotations = files.vqa_annotations(pathlib.Path(spec["data"]["path"]))
    expected = vqa.score(answers, {i: annotations[i] for i in answers})
    assert metrics["q/accuracy"] == pytest.approx(expected.accuracy / 100, abs=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "r.q.jsonl").read_text().splitlines()]
    assert len(answers) == 11 and len({row["loss"] for row in rows}) > 5
    assert rows[5]["question"] in (tmp_path / "r.html").read_text() and rows[5]["answer"] == answers[5]
    with jax.set_mesh(mesh8):
        again = spec | {"batch_size": 7}
        evaluation.run({"q": again}, model, params, processor, output=tmp_path / "m.json", progress=False)
    other = [json.loads(line) for line in (tmp_path / "m.q.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in other] == [row["answer"] for row in rows]
    np.testing.assert_allclose([row["loss"] for row in other], [row["loss"] for row in rows], rtol=1e-4)


def test_generates_as_published(tiny_blip, spec, tmp_path):
    model, params, processor = tiny_blip("vqa")
    spec |= {"data": spec["data"] | {"split": "[:3]"}, "batch_size": 1}
    metrics = evaluation.run({"q": spec}, model, params, processor, output=tmp_path / "r.json", progress=False)
    example = evaluation.prepare({"q": spec}).evaluators["q"][0].source[2]
    batch = processor(images=[example["image"]], texts=[example["question"]])
    settings = {"num_beams": 3, "max_length": 10, "min_length": 1, "beam_normalisation": "legacy"}
    found = generate(model, params, batch, **settings)
    answers = files.vqa_results(tmp_path / "r.q.results.json")
    assert answers[2] == processor.tokenizer.decode(found.completions[0].tolist())
    assert metrics["q/accuracy"] == 0


def test_an_answer_longer_than_the_decoder_reads_is_named(tiny_blip):
    embedder = Embedder(*tiny_blip("vqa"), batch_size=4)
    longest = embedder.model.context_length
    Ranker.of(embedder, ["a " * (longest - 1)])
    with pytest.raises(UserError, match=f"answers of at most {longest} tokens, found 'a a.* with {longest + 1}"):
        Ranker.of(embedder, ["yes", "a " * longest])


@pytest.mark.parametrize("ids", ["as_is", "distinct"])
def test_annotators_count_as_the_score_command_counts_them(scenes_folder, tmp_path, ids):
    """VizWiz' answers have no ids: equal records are one annotator's, unless told otherwise."""
    picture = next((scenes_folder / "images").iterdir())
    questions = {"questions": [{"question_id": i, "question": "what?", "image_id": picture.stem} for i in (4, 9)]}
    people = [[{"answer": text, "answer_confidence": "yes"} for text in row] for row in (["a"] * 9 + ["b"], ["c"] * 10)]
    records = {"annotations": [{"question_id": i, "answers": row} for i, row in zip((4, 9), people, strict=True)]}
    for name, content in (("questions", questions), ("annotations", records)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    fields = {"image": "{image_id}" + picture.suffix, "question": "question", "question_id": "question_id"}
    fields |= {"answer": "answer", "answers": "answers"}
    data = {"kind": "json", "path": str(tmp_path / "questions.json"), "annotations": str(tmp_path / "annotations.json")}
    data |= {"fields": fields, "root": str(picture.parent)}
    evaluator = evaluation.prepare({"q": {"kind": "vqa", "data": data, "answer_ids": ids}}).evaluators["q"][0]
    notes = [{"index": i} | evaluator.note(evaluator.source[i]) for i in range(2)]
    result = evaluator._result([note | {"answer": answer} for note, answer in zip(notes, "ac", strict=True)])
    (tmp_path / "results.json").write_text(json.dumps(result.official))
    annotations = files.vqa_annotations(tmp_path / "annotations.json")
    again = vqa.score(files.vqa_results(tmp_path / "results.json"), annotations, answer_ids=ids)
    assert result.metrics["accuracy"] == pytest.approx(again.accuracy / 100, abs=1e-6)
    assert result.metrics["accuracy"] == pytest.approx({"as_is": 0.05, "distinct": 1.0}[ids])


def test_one_answer_is_right_or_wrong():
    """MSRVTT-QA and others have no ten people's answers; VQA's formula asks for three others who agree."""
    task = Vqa(VqaConfig({}), None, GenerationConfig(), [])
    rows = [{"key": wanted, "answers": [wanted], "answer": "yes"} for wanted in ("Yes.", "no")]
    assert task._score(rows)[0] == {"accuracy": 0.5} and [row["correct"] for row in rows] == [True, False]


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("vqa", {"mode": "rank"}, "answer_list: expected one with mode='rank'"),
        ("vqa", {"answer_list": ("a",)}, "answer_list"),
        ("vqa", {"mode": "rank", "answer_list": ("a", "a")}, "different answers"),
        ("vqa", {"mode": "rank", "answer_list": "/no.json"}, "no such file: /no.json"),
        ("vqa", {"answers": "words"}, "no field 'words'"),
        ("retrieval", {}, "no decoder"),
    ],
)
def test_wrong_settings(tiny_blip, spec, task, change, message):
    with pytest.raises(UserError, match=message):
        evaluation.run({"q": spec | change}, *tiny_blip(task), progress=False)
