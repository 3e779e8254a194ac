"""CLIP's BPE from the original file and from vocab.json with merges.txt."""

import gzip
import json

import pytest

from vlm.errors import UserError
from vlm.tokenizers import load

ORIGINAL = "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture
def hugging_face_files(models, tmp_path):
    model = json.loads((models / "clip_tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return tmp_path


@pytest.mark.parametrize("name", [ORIGINAL, "clip_tokenizer.json"])
def test_files_equal_the_golden_ids(models, differences, name):
    tokenizer = load(models / name)
    assert differences(tokenizer, "clip_fast") == []
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (49406, 49407, 49407, 49408)


def test_vocabulary_with_merges_equals_the_original(models, goldens, hugging_face_files):
    tokenizer, original = load(hugging_face_files), load(models / ORIGINAL)
    lines = goldens["lines"][::20]
    assert tokenizer(lines)["tokens"].tolist() == original(lines)["tokens"].tolist()
    assert load(hugging_face_files / "vocab.json").encode("a cat") == [320, 2368]


def test_rows_of_77_end_with_the_end_token_and_are_padded_as_asked(models):
    tokenizer = load(models / ORIGINAL)
    batch = tokenizer(["a cat", "cat " * 100], max_length=77, padding="max_length")
    assert batch["tokens"].shape == (2, 77)
    assert batch["tokens"][0, :5].tolist() == [49406, 320, 2368, 49407, 49407]
    assert batch["mask"].sum(axis=1).tolist() == [4, 77]
    assert batch["tokens"][1, -1] == 49407
    openai = load(models / ORIGINAL, pad_id=0)
    assert openai(["a cat"], max_length=6, padding="max_length")["tokens"].tolist() == [[49406, 320, 2368, 49407, 0, 0]]


def test_save_keeps_the_padding(models, tmp_path):
    load(models / ORIGINAL, pad_id=0).save(tmp_path)
    assert load(tmp_path).pad_id == 0
    load(models / ORIGINAL).save(tmp_path)
    assert load(tmp_path).pad_id == 49407


def test_decode_puts_spaces_between_words(models):
    tokenizer = load(models / ORIGINAL)
    assert tokenizer.decode(tokenizer(["A  Photo of\ncafé"])["tokens"][0]) == "a photo of café"


def test_damaged_files_are_refused(models, tmp_path):
    data = (models / ORIGINAL).read_bytes()
    path = tmp_path / "bpe.txt.gz"
    for content, message in [
        (data[: len(data) // 2], "truncated gzip"),
        (data[:100] + bytes(100) + data[200:], "damaged gzip|not a merges file|expected the 49408"),
        (gzip.compress(b"#version\na b\n"), "expected the 49408 tokens of CLIP, found 515"),
        (gzip.compress(bytes(70 * 2**20), 1), "when unpacked"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load(path)
