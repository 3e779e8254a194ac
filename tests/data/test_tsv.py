"""GLUE's files as published: quotation marks are text, CoLA has no header, QQP has broken lines."""

import pickle

import pytest

from vlm.data.source import open_source
from vlm.data.tsv import TsvSource
from vlm.errors import UserError

COLA = "gj04\t1\t\tOur friends won't buy this.\ngj04\t0\t*\tThe \"more does Bill smoke.\n"
QQP = "id\tquestion1\tquestion2\tis_duplicate\n1\tWho?\tWhat?\t0\n2\tIs \n this?\n\n3\tWhy\tHow\t1\n"


def write(path, text):
    path.write_bytes(text.encode())
    return str(path)


def test_columns_without_a_header(tmp_path):
    path = write(tmp_path / "train.tsv", COLA)
    spec = {"kind": "tsv", "path": path, "columns": ("source", "label", "star", "sentence")}
    source = open_source(spec | {"fields": {"text": "sentence", "label": "label"}, "classes": {"label": ("0", "1")}})
    assert len(source) == 2 and source[0]["label"] == 1
    assert source[1] == {"key": "train.tsv:2", "text": 'The "more does Bill smoke.', "label": 0}
    assert len(open_source(spec | {"split": "[1:]"})) == 1


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_header_byte_order_mark_and_quotes(tmp_path, end):
    lines = ["\ufeffQuality\t#1 ID\t#1 String", '1\t7\t"He said', '0\t8\ta " b\u2028c', "1\t9\t"]
    path = write(tmp_path / "t.tsv", (end or "\n").join(lines) + end)
    source = pickle.loads(pickle.dumps(TsvSource(path, fields={"text": "#1 String", "label": "Quality"})))
    assert [source[i]["text"] for i in range(3)] == ['"He said', 'a " b\u2028c', ""]
    assert source[1] == {"key": "t.tsv:3", "text": 'a " b\u2028c', "label": "0"}


def test_broken_lines_are_left_out_where_that_is_allowed(tmp_path):
    path = write(tmp_path / "q.tsv", QQP)
    source = TsvSource(path, max_broken=2)
    assert len(source) == 2
    assert source[1] == {"key": "q.tsv:6", "id": "3", "question1": "Why", "question2": "How", "is_duplicate": "1"}
    with pytest.raises(UserError, match=rf"^{path}: line 3: another number of columns .*\(2 lines; .*max_broken=1"):
        TsvSource(path, max_broken=1)
    assert TsvSource(path, max_broken=2).fingerprint == source.fingerprint


def test_several_files_images_and_their_bounds(tmp_path):
    (tmp_path / "a.png").write_bytes(b"A")
    for name in "ab":
        write(tmp_path / f"{name}.tsv", f"image\ttext\na.png\t{name}\n../x.png\t{name}\n")
    source = TsvSource(f"{tmp_path}/{{a,b}}.tsv")
    assert (source[2]["image"], source[2]["text"], len(source)) == (b"A", "b", 4)
    with pytest.raises(UserError, match="leaves the data's folder"):
        source[1]


@pytest.mark.parametrize(
    "content, message",
    [
        ("a\tb\n1\t2\n3", "line 3: expected 2 columns \\(truncated\\?\\)"),
        ("a\tb\n1\n", "no line has the 2 columns a, b"),
        ("a\ta\n1\t2\n", "line 1: expected different column names, found a, a"),
        ("a\tb\n", "no line has the 2 columns a, b"),
        ("\n\n", "empty shard"),
        ("\x1f\x8b\tb\n1\t2\n", "not UTF-8|gzip"),
    ],
)
def test_wrong_files_stop_at_start(tmp_path, content, message):
    path = tmp_path / "t.tsv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=f"^{path}: ({message})"):
        TsvSource(str(path))


def test_a_line_that_is_not_utf8_is_one_unreadable_record(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"a\tb\n\xff\t1\nx\t2\n")
    source = TsvSource(str(path))
    assert source[1]["a"] == "x"
    with pytest.raises(UserError, match=f"^{path}: line 2: not UTF-8"):
        source[0]


def test_names_that_are_no_classes(tmp_path):
    path = write(tmp_path / "t.tsv", "text\tlabel\nx\tentailment\ny\tneutrl\n")
    spec = {"kind": "tsv", "path": path, "classes": {"label": ("entailment", "neutral")}}
    source = open_source(spec)
    assert source[0]["label"] == 0
    with pytest.raises(UserError, match="example 't.tsv:3': label 'neutrl' is not a class; did you mean 'neutral'"):
        source[1]
    assert open_source(spec | {"classes": {"label": ("neutral", "entailment")}}).fingerprint != source.fingerprint
    for wrong in ("ab", ("a", "a"), ()):
        with pytest.raises(UserError, match="classes: expected different names of 'label'"):
            open_source(spec | {"classes": {"label": wrong}})
