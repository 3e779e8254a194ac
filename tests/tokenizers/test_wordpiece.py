"""BERT's WordPiece against the golden ids, the Hugging Face class and a clock."""

import json
import shutil
import time

import pytest

from vlm.errors import UserError
from vlm.tokenizers import load


def test_uncased_equals_the_golden_ids(models, differences):
    tokenizer = load(models / "bert_base_uncased_vocab.txt")
    assert differences(tokenizer, "bert_uncased_fast") == []
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id)
    assert ids == (0, 100, 101, 102, 103)


@pytest.mark.parametrize(("name", "lower"), [("bert_base_cased", False), ("bert_base_chinese", True)])
def test_other_vocabularies_equal_hugging_face(models, goldens, name, lower):
    transformers = pytest.importorskip("transformers")
    path = models / f"{name}_vocab.txt"
    ours, theirs = load(path), transformers.BertTokenizer(str(path), do_lower_case=lower)
    firsts, seconds = goldens["lines"][2500:3100:3], goldens["lines"][:200]
    batch = ours(firsts, pairs=seconds, max_length=40)
    expected = theirs(firsts, seconds, max_length=40, truncation=True, padding=True, return_tensors="np")
    assert (batch["tokens"] == expected["input_ids"]).all()
    assert (batch["token_types"] == expected["token_type_ids"]).all()
    assert (batch["mask"] == expected["attention_mask"]).all()


def test_added_tokens_get_their_ids(models, tmp_path):
    shutil.copyfile(models / "bert_base_uncased_vocab.txt", tmp_path / "vocab.txt")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[ENC]": 30523, "[DEC]": 30522}))
    tokenizer = load(tmp_path)
    assert tokenizer.encode("[DEC] a cat") == [30522, 1037, 4937]
    assert tokenizer.vocab_size == 30524
    tokenizer.save(tmp_path / "again")
    assert load(tmp_path / "again").encode("[ENC]a") == [30523, 1037]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[DEC]": 30600}))
    with pytest.raises(UserError, match=r"'\[DEC\]' has the id 30600, the vocabulary gives 30522"):
        load(tmp_path)


def test_do_lower_case_of_the_configuration_is_obeyed(models, tmp_path):
    shutil.copyfile(models / "bert_base_uncased_vocab.txt", tmp_path / "vocab.txt")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert load(tmp_path).encode("Cat cat") == [100, 4937]


def test_a_text_file_that_is_no_vocabulary_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\ncat\n")
    with pytest.raises(UserError, match=r"it lacks \[SEP\], \[PAD\]"):
        load(tmp_path)


def test_speed(models, goldens):
    """5,000 lines per second is a fifth of what it does alone; processor time, because the machine may be busy."""
    tokenizer = load(models / "bert_base_uncased_vocab.txt")
    lines = goldens["lines"]
    seconds = []
    for _ in range(3):
        start = time.thread_time()
        tokenizer(lines, max_length=77)
        seconds.append(time.thread_time() - start)
    assert len(lines) / min(seconds) >= 5000
