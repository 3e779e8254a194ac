"""`python -m vlm.score`: the last line is the official result; wrong files end with one line and status 2."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from vlm import score

IMAGES = [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)]
CAPTIONS = [{"id": 10 + i, "image_id": i % 4, "caption": f"a {w} on a bus"} for i, w in enumerate("pqrstuvw")]
RESULTS = [{"image_id": i, "caption": f"a {w} on a bus"} for i, w in enumerate("pxry")]
SPLIT = [{"image": f"{i}.jpg", "caption": [f"text {i}", f"other {i}"]} for i in range(6)]


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on written files: `run("vqa", results=…, annotations=…)`; gives (status, last line, stderr)."""

    def apply(task, *more, **contents):
        options = [task]
        for name, content in contents.items():
            if content is not None:
                path = tmp_path / f"{name}.json"
                path.write_text(content if isinstance(content, str) else json.dumps(content))
                options.append(f"--{name}={path}")
        try:
            status = score.main([*options, *map(str, more)])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, json.loads(out.splitlines()[-1]) if out else None, err

    return apply


def questions(*answers, ids=True):
    record = [{"answer": answer} | ({"answer_id": i} if ids else {}) for i, answer in enumerate(answers)]
    return [{"question_id": i, "answers": record, "answer_type": "other"} for i in range(2)]


def test_captions(run, tmp_path):
    annotations = {"images": IMAGES, "annotations": CAPTIONS}
    status, found, err = run("captions", f"--output={tmp_path / 'o.json'}", results=RESULTS, annotations=annotations)
    assert status == 0 and not err and found["n"] == 4 and found["task"] == "captions"
    assert 0 < found["bleu_4"] < found["bleu_1"] < 1 and found["rouge_l"] > 0.8 and found["cider"] > 1
    written = json.loads((tmp_path / "o.json").read_text())
    assert written.pop("examples")[1]["caption"] == "a x on a bus" and written == found
    status, found, _ = run("captions", "--metrics=rouge_l", results=RESULTS, annotations=annotations)
    assert found == {"task": "captions", "rouge_l": found["rouge_l"], "n": 4, "missing": "error"}


def test_half_a_surrogate_pair_is_escaped(run, tmp_path):
    results = [{"image_id": 0, "caption": "a \ud800 é"}, *RESULTS[1:]]
    files = {"results": results, "annotations": {"images": IMAGES, "annotations": CAPTIONS}}
    assert run("captions", f"--output={tmp_path / 'o.json'}", **files)[0] == 0
    written = (tmp_path / "o.json").read_bytes()
    assert json.loads(written)["examples"][0]["caption"] == "a \ud800 é" and "é".encode() in written
    status, _, err = run("captions", "--metrics=", **files)
    assert status == 2 and "no caption metric ''" in err


def test_captions_by_domain(run, tmp_path):
    names = ["in-domain", "in-domain", "out-domain", "out-domain"]
    images = [image | {"domain": name} for image, name in zip(IMAGES, names, strict=True)]
    status, found, _ = run("captions", results=RESULTS, annotations={"images": images, "annotations": CAPTIONS})
    assert status == 0 and found["in/n"] == found["out/n"] == 2 and "near/cider" not in found
    parts = []
    for name, ids in (("in", (0, 1)), ("out", (2, 3))):
        path = tmp_path / f"{name}_part.json"
        kept = [row for row in CAPTIONS if row["image_id"] in ids]
        path.write_text(json.dumps({"images": [IMAGES[i] for i in ids], "annotations": kept}))
        parts.append(f"--annotations={name}={path}")
    assert run("captions", *parts, results=RESULTS)[1] == found


def test_missing_results(run):
    annotations = {"images": IMAGES, "annotations": CAPTIONS}
    status, _, err = run("captions", results=RESULTS[:3], annotations=annotations)
    assert status == 2 and err == "error: --results: 1 of 4 image ids have no result, the first is 3\n"
    skipped = run("captions", "--missing=skip", results=RESULTS[:3], annotations=annotations)[1]
    empty = run("captions", "--missing=empty", results=RESULTS[:3], annotations=annotations)[1]
    assert (skipped["n"], empty["n"]) == (3, 4) and empty["rouge_l"] == pytest.approx(skipped["rouge_l"] * 3 / 4)
    extra = [*RESULTS, {"image_id": 9, "caption": "x"}]
    status, _, err = run("captions", "--missing=skip", results=extra, annotations=annotations)
    assert status == 2 and "1 of 5 image ids are not annotated, the first is 9" in err


def test_vqa(run):
    results = [{"question_id": 1, "answer": "Dog."}, {"question_id": 0, "answer": "cat"}]
    annotations = {"annotations": questions(*["cat"] * 10)}
    asked = {"questions": [{"question_id": i, "question": "?"} for i in range(2)]}
    status, found, err = run("vqa", results=results, annotations=annotations, questions=asked)
    assert status == 0 and not err
    assert found["accuracy"] == 50 and found["unit"] == "percent" and found["answer_ids"] == "as_is"
    assert found["per_answer_type"] == {"other": 50} and found["normalise"] == "always"
    asked["questions"][0]["question_id"] = 5
    status, _, err = run("vqa", results=results, annotations=annotations, questions=asked)
    assert status == 2 and "2 ids differ from --annotations" in err
    status, found, err = run("vqa", "--missing=skip", results=results[1:], annotations=annotations)
    assert found["accuracy"] == 100 and found["n"] == 1
    assert run("vqa", "--missing=empty", results=results[1:], annotations=annotations)[1]["accuracy"] == 50


def test_vqa_states_both_modes_where_ids_are_missing(run):
    results = [{"question_id": i, "answer": "cat"} for i in range(2)]
    annotations = {"annotations": questions(*["cat"] * 10, ids=False)}
    status, found, err = run("vqa", results=results, annotations=annotations)
    assert status == 0 and err.startswith("note: annotations without answer_id") and err.count("\n") == 1
    assert (found["accuracy"], found["accuracy_as_is"], found["accuracy_distinct"]) == (0, 0, 100)
    found = run("vqa", "--answer_ids=distinct", results=results, annotations=annotations)[1]
    assert found["accuracy"] == 100 and found["answer_ids"] == "distinct"


def test_nlvr2(run):
    labels = "\n".join(json.dumps({"identifier": f"dev-1-{i}-0", "label": "True"}) for i in range(4))
    status, found, _ = run("nlvr2", results="".join(f"dev-1-{i}-0,{i > 0}\n" for i in range(4)), annotations=labels)
    assert status == 0
    assert found == {"task": "nlvr2", "accuracy": 0.75, "consistency": 0, "n": 4, "sentences": 1}
    status, _, err = run("nlvr2", results="dev-1-0-0,True", annotations=labels)
    assert status == 2 and "3 of 4 example ids have no result" in err
    plain = [{"sentence": f"s{i // 2}", "label": "True", "images": ["0.png", "1.png"]} for i in range(4)]
    results = [{"identifier": f"annotations.json:{i + 1}", "prediction": i > 0} for i in range(4)]
    found = run("nlvr2", results=results, annotations=plain)[1]
    assert found == {"task": "nlvr2", "accuracy": 0.75, "consistency": 0.5, "n": 4, "sentences": 2}


def test_retrieval(run, tmp_path):
    rng = np.random.default_rng(0)
    to_text = rng.normal(size=(6, 12))
    to_image = rng.normal(size=(12, 6))
    np.savez(tmp_path / "s.npz", image_to_text=to_text, text_to_image=to_image)
    status, found, _ = run("retrieval", f"--results={tmp_path / 's.npz'}", annotations=SPLIT)
    best = np.argmax(to_image, axis=1)
    assert status == 0 and found["text_to_image_recall@1"] == pytest.approx((best == np.arange(12) // 2).mean())
    assert found["image_to_text_recall@1"] == (np.argmax(to_text, axis=1) // 2 == np.arange(6)).mean()
    assert (found["images"], found["texts"]) == (6, 12) and found["text_to_image_recall@10"] == 1
    lists = {
        "image_to_text": {f"{i}.jpg": np.argsort(-row).tolist() for i, row in enumerate(to_text)},
        "text_to_image": {str(t): [f"{i}.jpg" for i in np.argsort(-row)] for t, row in enumerate(to_image)},
    }
    assert run("retrieval", results=lists, annotations=SPLIT)[1] == found
    lists["text_to_image"]["3"][0] = "9.jpg"
    status, _, err = run("retrieval", results=lists, annotations=SPLIT)
    assert status == 2 and "text_to_image of 3: '9.jpg' is unknown" in err
    np.savez(tmp_path / "s.npz", image_to_text=to_text, text_to_image=to_text)
    status, _, err = run("retrieval", f"--results={tmp_path / 's.npz'}", annotations=SPLIT)
    assert status == 2 and "expected 'text_to_image', floating point (12, 6), found float64 (6, 12)" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["captions"], "the following arguments are required: --results, --annotations"),
        (["caption", "--results=a", "--annotations=b"], "invalid choice: 'caption'"),
        (
            ["vqa", "--results=/nowhere/r.json", "--annotations=/nowhere/a.json"],
            "No such file or directory: /nowhere/a.json",
        ),
        (
            ["vqa", "--results=r", "--annotations=a", "--metrics=cider"],
            "--metrics is an option of captions, not of vqa",
        ),
        (["vqa", "--results=r", "--annotations=a", "--annotations=b"], "expected one file for vqa, found 2"),
        (["nlvr2", "--results=r", "--annotations=a", "--output=/nowhere/o.json"], "--output: no folder /nowhere"),
        (["nlvr2", "--results=r", "--annotations=a", "--output=."], "--output: expected the name of a file, found the"),
    ],
)
def test_wrong_calls(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        score.main(options)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_an_archive_with_objects_is_refused(run, tmp_path):
    np.savez(tmp_path / "s.npz", image_to_text=np.array([{}], object), text_to_image=np.zeros(1))
    status, _, err = run("retrieval", f"--results={tmp_path / 's.npz'}", annotations=SPLIT)
    assert status == 2 and "not an .npz of plain arrays" in err


def test_the_command_equals_the_official_tool(shared_data, tmp_path):
    """As its own process, which imports no jax."""
    golden = json.loads(gzip.decompress((shared_data / "goldens" / "vqa_textvqa.json.gz").read_bytes()))
    (tmp_path / "r.json").write_text(json.dumps(golden["predictions"]))
    folder = shared_data / "vqa"
    code = "import sys, vlm.score; status = vlm.score.main(); assert 'jax' not in sys.modules; sys.exit(status)"
    files = [f"--annotations={folder / 'textvqa_val_annotations_vqa_format.json'}", f"--results={tmp_path / 'r.json'}"]
    files.append(f"--questions={folder / 'textvqa_val_questions_vqa_format.json'}")
    out = subprocess.run([sys.executable, "-c", code, "vqa", *files], capture_output=True, text=True, check=True).stdout
    assert json.loads(out.splitlines()[-1])["accuracy"] == golden["overall_official_as_is"]
