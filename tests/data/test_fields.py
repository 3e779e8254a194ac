import pytest

from vlm.data.fields import FieldMap, parse_json
from vlm.errors import UserError


def test_mapping_picks_nested_and_alternative_names():
    fields = FieldMap.parse({"image": "jpg;png", "text": "json/caption", "label": "objects/label"})
    record = {"png": b"1", "json": {"caption": "c"}, "objects": [{"label": 1}, {"label": 2}], "other": 3}
    assert fields.apply(record, "k", "here") == {"key": "k", "image": b"1", "text": "c", "label": [1, 2]}
    assert fields.reads("jpg") and fields.reads("json") and not fields.reads("other")


def test_only_what_is_needed_is_selected_unless_something_is_missing():
    record = {"png": b"1", "json": {"caption": "c", "id": 1}, "other": 3}
    selected = FieldMap.parse({"image": "jpg;png", "text": "json/caption"}).needed(record)
    assert selected == {"png": b"1", "json": {"caption": "c", "id": 1}}
    assert FieldMap.parse({"image": "jpg"}).needed(record) == record
    assert FieldMap.parse(None).needed(record) == record


def test_names_may_hold_slashes():
    assert FieldMap.parse({"id": "image/id"}).apply({"image/id": 5}, "k", "")["id"] == 5
    assert FieldMap.parse({"id": "a/b/c"}).apply({"a/b": {"c": 5}}, "k", "")["id"] == 5


def test_without_mapping_usual_names_are_known_and_the_rest_stays():
    record = {"jpg": b"1", "txt": "t", "cls": 3}
    assert FieldMap.parse(None).apply(record, "k", "") == {**record, "key": "k", "image": b"1", "text": "t"}
    assert FieldMap.parse({}).apply({"cls": 3}, "k", "") == {"cls": 3, "key": "k"}


def test_absent_field_lists_what_is_there():
    with pytest.raises(
        UserError, match="^shard 1: field 'text' needs 'captoin', found jpg, caption; did you mean 'cap"
    ):
        FieldMap.parse({"text": "captoin"}).apply({"jpg": b"", "caption": "x"}, "k", "shard 1")
    with pytest.raises(UserError, match="needs 'jpg or png', found json/a"):
        FieldMap.parse({"image": "jpg;png"}).apply({"json": {"a": 1}}, "k", "")
    with pytest.raises(UserError, match="needs 'jpg'"):
        FieldMap.parse({"image": "jpg"}).apply({"jpg": None}, "k", "")


def test_key_can_be_mapped_and_is_text():
    assert FieldMap.parse({"key": "id"}).apply({"id": 7}, "k", "") == {"key": "7"}


@pytest.mark.parametrize("fields", [{"image": 3}, {"image": " ; "}, {3: "a"}])
def test_bad_mappings(fields):
    with pytest.raises(UserError, match="^fields: expected"):
        FieldMap.parse(fields)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"{", "not JSON"),
        (b'"\xff"', "not UTF-8"),
        (b"[" * 100_000, "JSON nested too deeply"),
        (b"9" * 5000, "not JSON"),
    ],
)
def test_bad_json(data, message):
    with pytest.raises(UserError, match=f"^line 3: {message}"):
        parse_json(data, "line 3")
