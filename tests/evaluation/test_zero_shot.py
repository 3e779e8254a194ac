"""Zero-shot classification against a plain computation, and everything a user can get wrong."""

import json

import numpy as np
import pytest

from vlm.errors import UserError
from vlm.evaluation.embed import Embedder
from vlm.evaluation.evaluator import Sampling
from vlm.evaluation.zero_shot import ZeroShot, ZeroShotConfig, class_embeddings

NAMES = ("red", "green", "blue", "yellow", "white")
TEMPLATES = ("{c}", "dark {c}", "photo {c}", "photo {c}")


def prepare(spec, **settings):
    settings = {"classnames": NAMES, "templates": TEMPLATES, "bootstrap": Sampling(20)} | settings
    return ZeroShot.prepare(ZeroShotConfig(spec, **settings), "config.eval.colours")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def expected_classes(params, processor, names=NAMES):
    projection, words = np.asarray(params["projection"]), np.asarray(params["words"])
    rows = []
    for name in names:
        batch = processor(texts=[template.replace("{c}", name) for template in TEMPLATES])
        prompts = (words[batch["tokens"]] * batch["mask"][..., None]).sum(1) @ projection
        rows.append(unit(unit(prompts).mean(0)))
    return np.stack(rows)


def test_class_embeddings_normalise_average_normalise(model, params, processor, monkeypatch):
    monkeypatch.setattr("vlm.evaluation.zero_shot.TEXT_GROUP", 9)  # two classes at a time
    found = class_embeddings(Embedder(model, params, processor), NAMES, TEMPLATES)
    np.testing.assert_allclose(found, expected_classes(params, processor), atol=1e-6)


def test_metrics_equal_a_plain_loop(model, params, processor, colours):
    spec, rows = colours(count=42, noise=200)
    result = prepare(spec)(Embedder(model, params, processor, batch_size=16))
    images = unit(np.stack([image.mean((0, 1)) for image, _ in rows]) @ np.asarray(params["projection"]))
    scores, labels = images @ expected_classes(params, processor).T, np.array([label for _, label in rows])
    right = scores.argmax(1) == labels
    assert 0.3 < right.mean() < 1  # neither trivial nor hopeless, or nothing is tested
    assert result.metrics["top1"] == pytest.approx(right.mean())
    assert result.metrics["top5"] == 1.0
    per_class = [right[labels == c].mean() for c in range(5)]
    assert result.metrics["mean_per_class_recall"] == pytest.approx(np.mean(per_class))
    low, high = result.intervals["top1"]
    assert low <= result.metrics["top1"] <= high and high > low
    assert (result.n, result.unreadable) == (42, 0)
    assert [row["prediction"] for row in result.examples] == scores.argmax(1).tolist()
    assert [row["correct"] for row in result.examples] == right.tolist()
    assert result.examples[3]["key"] == "k3" and result.examples[3]["top"][0][0] == result.examples[3]["prediction"]
    assert result.page["confusion"].sum() == 42 and np.trace(result.page["confusion"]) == right.sum()


def test_labels_by_name_and_other_languages(model, params, processor, colours):
    spec, _ = colours(count=10, noise=0)
    result = prepare(spec, label="word")(Embedder(model, params, processor))
    assert result.metrics["top1"] == 1.0
    red = prepare(spec, classnames=("红", *NAMES[1:]), language="zh")(Embedder(model, params, processor))
    assert red.metrics["top1"] == 1.0 and red.details["language"] == "zh"
    assert red.details["templates_sha256"] != result.details["templates_sha256"]


def test_subset_of_classes_keeps_original_numbers(model, params, processor, colours):
    spec, _ = colours(count=6, noise=0, label=lambda i: (0, 3)[i % 2], image=lambda i: f"{(0, 3)[i % 2]}.png")
    result = prepare(spec, classes=(0, 3))(Embedder(model, params, processor))
    assert {row["prediction"] for row in result.examples} == {0, 3}
    assert result.metrics["top1"] == 1.0 and "top5" not in result.metrics  # fewer than five classes
    assert result.details["chance"] == 0.5


def test_multi_label(model, params, processor, colours):
    spec, _ = colours(count=10, noise=0, label=lambda i: [i % 5, "white"])
    result = prepare(spec, multi_label=True)(Embedder(model, params, processor))
    assert set(result.metrics) == {"mean_average_precision_11", "mean_average_precision"}
    # Every colour finds its own images first; white is always relevant.
    assert result.metrics["mean_average_precision"] == pytest.approx(1.0)
    assert all(row["correct"] for row in result.examples)


def test_average_precision_of_single_labels_on_request(model, params, processor, colours):
    spec, _ = colours(count=10, noise=0)
    result = prepare(spec, mean_average_precision=True)(Embedder(model, params, processor))
    assert result.metrics["mean_average_precision_11"] == pytest.approx(1.0)


def test_unreadable_images_are_counted(model, params, processor, colours):
    spec, _ = colours(count=10, broken=(3,))
    result = prepare(spec)(Embedder(model, params, processor))
    assert (result.n, result.unreadable) == (9, 1)


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({}, {"label": "lable"}, "did you mean 'label'"),
        ({"label": lambda i: 5}, {}, "label 5 is outside the 5 class names"),
        ({"label": lambda i: -1}, {}, "label -1 is outside"),
        ({"label": lambda i: 1.5}, {}, "found 1.5"),
        ({"label": lambda i: "whit"}, {}, "did you mean 'white'"),
        ({"label": lambda i: None}, {}, "found None"),
        ({}, {"classes": (1, 2)}, "not among `classes`"),
        ({}, {"classes": (1, 9)}, "classes: expected class numbers below 5, found 9"),
        ({}, {"classnames": ("red",)}, "at least two classes"),
        ({}, {"templates": ("a photo",)}, r"no \{c\}"),
        ({}, {"multi_label": True}, "expected a list of labels"),
        ({}, {"classnames": "/nowhere/names.json"}, "no such file: /nowhere/names.json"),
    ],
)
def test_wrong_settings_are_found_before_the_model_runs(fields, settings, message, colours):
    spec, _ = colours(count=4, **fields)
    with pytest.raises(UserError, match=message) as caught:
        prepare(spec, **settings)
    assert "\n" not in str(caught.value)


def test_a_later_wrong_label_stops_the_evaluation(model, params, processor, colours):
    spec, _ = colours(count=9, label=lambda i: 99 if i == 7 else i % 5)
    with pytest.raises(UserError, match="'k7': label 99 is outside"):
        prepare(spec)(Embedder(model, params, processor, batch_size=4))


def test_classnames_of_another_data_set(tmp_path, colours):
    spec, _ = colours(count=4)
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"colours": list(NAMES), "digits": ["one", "two"]}))
    assert prepare(spec, classnames=str(path), dataset="colours").names == list(NAMES)
    with pytest.raises(UserError, match="did you mean 'colours'"):
        prepare(spec, classnames=str(path), dataset="colors")
