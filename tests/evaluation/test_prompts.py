"""Class names and templates: every form, and one clear line for everything else."""

import json

import pytest

from vlm.errors import UserError
from vlm.evaluation import prompts


def test_clip_benchmark_files(shared_data):
    folder = shared_data / "classes"
    names = prompts.load_classnames(folder / "clip_benchmark_cn_classnames.json", "imagenet1k")
    templates = prompts.load_templates(folder / "clip_benchmark_cn_zeroshot_classification_templates.json")
    assert (len(names), names[1]) == (1000, "金鱼")
    assert (len(templates), len(set(templates))) == (80, 78)  # duplicates weight the mean
    assert prompts.fill(templates[0], names[1]) == "金鱼的照片。"
    english = folder / "clip_benchmark_en_classnames.json"
    assert len(prompts.load_classnames(english, "mnist")) == 10
    with pytest.raises(UserError, match="did you mean 'imagenet1k'"):
        prompts.load_classnames(english, "imagenet")
    with pytest.raises(UserError, match="several data sets"):
        prompts.load_classnames(english)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '["un", "deux"]'),
        ("a.json", '{"0": "un", "1": "deux"}'),
        ("a.json", '{"only": ["un", "deux"]}'),
        ("a.json", '\ufeff["un", "deux"]'),
        ("a.txt", "un\r\n\n  deux \n"),
    ],
)
def test_forms_of_class_names(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert prompts.load_classnames(tmp_path / name) == ["un", "deux"]


def test_templates_given_as_they_are():
    assert prompts.load_templates(("a {c}", "a {c}", "{}!")) == ["a {c}", "a {c}", "{}!"]
    assert prompts.fill("{}! {x} {0}", "cat") == "cat! {x} {0}"
    assert prompts.fill("{c} {c}", "{}") == "{} {}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[", "not JSON"),
        (b"\xff\xfe", "UTF-8"),
        (b"[]", "found none"),
        (b'["a", 3]', "list with int, str"),
        (b'["a", " "]', "number 1 is empty"),
        (b'["a", "\\ud83d"]', r"number 1 is not valid Unicode: '\\ud83d'"),
        (b'"cat"', "found str"),
        (b'{"1": "a", "2": "b"}', "class numbers 0 to 1"),
        (b'{"x": 3}', "found int"),
        (b'{"0": "a", "1": "b", "1": "c"}', "'1' appears twice"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_other_contents_are_one_line(tmp_path, content, message):
    path = tmp_path / "names.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        prompts.load_classnames(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_templates(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        prompts.load_templates(tmp_path / "absent.json")
    with pytest.raises(UserError, match=r"no \{c\} in 'a photo'"):
        prompts.load_templates(["a photo"])
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"0": "a", "1": "b"}))
    with pytest.raises(UserError, match="list of strings"):
        prompts.load_templates(path)


def test_fingerprint_follows_order_and_content():
    first = prompts.fingerprint(["a", "b"], ["{c}"])
    assert first != prompts.fingerprint(["b", "a"], ["{c}"]) != prompts.fingerprint(["a", "b"], ["{c}", "{c}"])
