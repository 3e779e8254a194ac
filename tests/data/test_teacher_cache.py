import json
import pickle

import numpy as np
import pytest

from vlm.data.ledger import FatalDataError
from vlm.data.teacher_cache import (
    TeacherCache,
    WithPatchLabels,
    WithTarget,
    decode,
    encode,
    picture_key,
    sentence_key,
    write_cache,
)
from vlm.errors import UserError

SENTENCES = [f"sentence {i}" for i in range(100)]
VALUES = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)


def batches(size=7):
    for i in range(0, 100, size):
        yield SENTENCES[i : i + size], VALUES[i : i + size]


@pytest.fixture
def cache(tmp_path):
    assert write_cache(tmp_path / "c", batches(), teacher="clip", rows_per_shard=30) == 100
    return tmp_path / "c"


@pytest.mark.parametrize("dtype, tolerance", [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_rows_come_back_by_sentence(tmp_path, dtype, tolerance):
    write_cache(tmp_path / "c", batches(), teacher="clip", dtype=dtype, rows_per_shard=30)
    cache = pickle.loads(pickle.dumps(TeacherCache(tmp_path / "c", teacher="clip", verify=True)))
    assert len(cache) == 100 and cache.dim == 6 and len(list((tmp_path / "c").glob("embeddings-*.npy"))) == 4
    order = np.random.default_rng(1).permutation(100)
    found = cache.lookup([SENTENCES[i] for i in order])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, VALUES[order], rtol=tolerance, atol=1e-7 if tolerance else 0)


def test_white_space_and_unicode_form_do_not_matter_case_does(tmp_path):
    write_cache(tmp_path / "c", [(["caf\u00e9  au lait "], VALUES[:1])], teacher="t", dtype="float32")
    cache = TeacherCache(tmp_path / "c")
    np.testing.assert_array_equal(cache["cafe\u0301 au\nlait"], VALUES[0])
    assert sentence_key("A") != sentence_key("a")


def test_repeated_sentences_are_stored_once(tmp_path):
    assert write_cache(tmp_path / "c", [(["a", "b", "a "], VALUES[:3])], teacher="t", dtype="float32") == 2
    np.testing.assert_array_equal(TeacherCache(tmp_path / "c")["a"], VALUES[0])


def test_a_missing_sentence_is_named(cache):
    with pytest.raises(FatalDataError, match="no embedding of 'sentence 100'"):
        TeacherCache(cache).lookup(["sentence 1", "sentence 100"])


def test_hashes_that_share_their_first_half(cache, monkeypatch):
    opened = TeacherCache(cache)
    opened._keys = np.array([[5, 1], [5, 2], [5, 9]], np.uint64)
    opened._rows = np.array([10, 11, 12])
    for low, row in ((1, 10), (2, 11), (9, 12)):
        key = (5).to_bytes(8, "big") + low.to_bytes(8, "big")
        monkeypatch.setattr("vlm.data.teacher_cache.sentence_key", lambda s, key=key: key)
        np.testing.assert_allclose(opened["x"], VALUES[row], rtol=1e-3)
    monkeypatch.setattr("vlm.data.teacher_cache.sentence_key", lambda s: (5).to_bytes(8, "big") + bytes(8))
    with pytest.raises(UserError):
        opened["x"]


def test_bfloat16_rounds_to_nearest_even():
    values = np.array([1.0, 1.00390625, 1.01171875, -2.5, 3.4e38, np.nan, np.inf], np.float32)
    expected = np.array([1.0, 1.0, 1.015625, -2.5, np.inf, np.nan, np.inf], np.float32)
    np.testing.assert_array_equal(decode(encode(values, "bfloat16"), "bfloat16"), expected)
    import ml_dtypes

    numbers = np.random.default_rng(0).normal(size=10_000).astype(np.float32) * 1e3
    np.testing.assert_array_equal(
        decode(encode(numbers, "bfloat16"), "bfloat16"), numbers.astype(ml_dtypes.bfloat16).astype(np.float32)
    )


def broken(cache, name, change):
    path = cache / name
    if change == "remove":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        data = bytearray(path.read_bytes())
        data[change] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["embeddings-00002.npy", "keys.npy", "rows.npy"])
def test_damage_is_found(cache, name):
    for change, message in (
        (-1, "does not match its SHA-256"),
        ("cut", "truncated shard: expected"),
        ("remove", "missing"),
    ):
        broken(cache, name, change)
        with pytest.raises(UserError, match=f"{message}.*{name}|{name}.*{message}"):
            TeacherCache(cache, verify=change == -1)


def test_manifest_decides(cache):
    with pytest.raises(UserError, match="made by teacher clip, expected other"):
        TeacherCache(cache, teacher="other")
    manifest = json.loads((cache / "manifest.json").read_text())
    for key, value in (("dim", 5), ("count", 99), ("format_version", 2), ("dtype", "float8"), ("shards", [])):
        (cache / "manifest.json").write_text(json.dumps({**manifest, key: value}))
        with pytest.raises(UserError, match="expected float16\\[30, 5\\]|no cache of embeddings"):
            TeacherCache(cache)
    for text in ("{", "[]", '{"dim": 1}'):
        (cache / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="no cache of embeddings"):
            TeacherCache(cache)
    with pytest.raises(UserError, match="no cache of embeddings"):
        TeacherCache(cache / "nowhere")


@pytest.mark.parametrize(
    "content, dtype, message",
    [
        ([(["a"], VALUES[:2])], "float16", "1 sentences but embeddings \\[2, 6\\]"),
        ([(["a"], VALUES[:1]), (["b"], VALUES[:1, :3])], "float16", "embeddings of 3 numbers after 6"),
        ([(["a", "b"], np.array([[1.0], [np.nan]]))], "float16", "embedding of 'b' is not finite"),
        ([(["a"], np.array([[1e6]]))], "float16", "embedding of 'a' is not finite in float16"),
        ([(["a"], VALUES[:1])], "fp16", "dtype 'fp16'; "),
        ([], "float16", "no sentences"),
    ],
)
def test_wrong_input_leaves_nothing(tmp_path, content, dtype, message):
    with pytest.raises(UserError, match=message):
        write_cache(tmp_path / "c", content, teacher="t", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_existing_cache_is_kept(cache):
    with pytest.raises(UserError, match="exists already"):
        write_cache(cache, batches(), teacher="clip")


def test_joins_to_examples_of_any_language(cache):
    joined = WithTarget(lambda example, rng, train: {"tokens": np.zeros(3)}, TeacherCache(cache))
    for text, english in (("一", "sentence 3"), ("un", ["sentence 3"])):
        row = joined({"source_text": english, "text": text}, np.random.default_rng(0), True)
        np.testing.assert_allclose(row["target"], VALUES[3], rtol=1e-3)
        assert row["tokens"].shape == (3,)
    for wrong in ({"text": "un"}, {"source_text": None}, {"source_text": []}, {"source_text": "\ud83d"}):
        with pytest.raises(UserError, match="`source_text`") as raised:
            joined(wrong, np.random.default_rng(0), True)
        assert not isinstance(raised.value, FatalDataError)  # replaced, as with a live teacher


def test_whole_numbers_by_encoded_picture(tmp_path):
    words, pictures = np.arange(24).reshape(4, 6) * 2700, [b"a", b"b", b"a ", b"\xff\xd8"]
    assert write_cache(tmp_path / "c", [(pictures, words)], teacher="codebook:1", dtype="uint16") == 4
    cache = pickle.loads(pickle.dumps(TeacherCache(tmp_path / "c", verify=True)))
    assert cache[b"b"].dtype == np.int32
    np.testing.assert_array_equal(cache.lookup(pictures), words)
    with pytest.raises(FatalDataError, match="no row of picture of 3 bytes"):
        cache[b"abc"]
    for wrong in (-1, 65_536, 0.5):
        with pytest.raises(UserError, match="whole numbers from 0 to 65535"):
            write_cache(tmp_path / "d", [([b"a"], np.array([[wrong]]))], teacher="t", dtype="uint16")
    assert not (tmp_path / "d").exists()

    def transform(example, rng, train):
        return {"given": np.array(train)}

    joined = WithPatchLabels(transform, cache)
    assert joined.fingerprint == "codebook:1"
    row = joined({"image": b"b"}, np.random.default_rng(0), True)
    assert row["given"] and (row["patch_labels"] == words[1]).all()
    assert joined({"text": "b"}, np.random.default_rng(0), True).keys() == {"given"}


def test_visual_words_stay_below_their_number(tmp_path):
    words = np.array([[0, 7], [3, 1]])
    write_cache(tmp_path / "c", [(["a", "b"], words)], teacher="codebook:x", dtype="uint16", vocab_size=8)
    assert TeacherCache(tmp_path / "c").vocab_size == 8
    with pytest.raises(UserError, match="visual words: expected numbers below 7, found 7"):
        write_cache(tmp_path / "d", [(["a", "b"], words)], teacher="codebook:x", dtype="uint16", vocab_size=7)


def test_errors_about_visual_words_do_not_speak_of_a_teacher(tmp_path):
    def error(path, batches):
        with pytest.raises(UserError) as raised:
            write_cache(path, batches, teacher="codebook:x", dtype="uint16")
        return str(raised.value)

    assert error(tmp_path / "c", []) == "visual words: no pictures"
    assert error(tmp_path / "c", [([b"a"], np.zeros((2, 3)))]) == "visual words: 1 pictures but rows [2, 3]"
    assert error(tmp_path / "c", [([b"a"], np.full((1, 1), 1e6))]).startswith("visual words: expected whole numbers")
    write_cache(tmp_path / "c", [([picture_key(b"a")], np.zeros((1, 1)))], teacher="codebook:x", dtype="uint16")
    cache = TeacherCache(tmp_path / "c")
    assert cache[b"a"].tolist() == cache[picture_key(b"a")].tolist() == [0]
    with pytest.raises(UserError, match="^visual words .*c: no row of picture of 1 bytes$"):
        cache[b"b"]
