"""Files of the `tokenizers` library: special tokens, padding and post-processors as they say."""

import json

import pytest
import tokenizers
from tokenizers import models as library_models
from tokenizers import pre_tokenizers, processors

from vlm.errors import UserError
from vlm.tokenizers import load
from vlm.tokenizers.tokenizer_json import LibraryTokenizer


def words(*extra):
    vocab = {word: id_ for id_, word in enumerate(["<unk>", "<s>", "</s>", "red", "cat", *extra])}
    backend = tokenizers.Tokenizer(library_models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def test_t5_file_equals_the_golden_ids(models, differences):
    tokenizer = load(models / "t5_small_tokenizer.json")
    assert differences(tokenizer, "t5_fast") == []
    assert tokenizer(["cat"], pairs=["cat"])["tokens"][0].tolist() == [*tokenizer.encode("cat"), 1] * 2
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.bos_id) == (0, 1, 2, None)


def test_post_processor_and_token_types_are_respected():
    backend = words("<sep>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A:0 <sep>:1 $B:1", special_tokens=[("<s>", 1), ("<sep>", 5)]
    )
    tokenizer = LibraryTokenizer(backend, {"pad_token": "</s>", "padding_side": "left"})
    assert tokenizer(["red", "red cat"])["tokens"].tolist() == [[2, 1, 3], [1, 3, 4]]
    batch = tokenizer(["red cat"], pairs=["cat cat"], max_length=5)
    assert batch["tokens"].tolist() == [[1, 3, 5, 4, 4]]
    assert batch["token_types"].tolist() == [[0, 0, 1, 1, 1]]


def test_without_a_post_processor_there_are_no_special_tokens():
    tokenizer = LibraryTokenizer(words())
    assert tokenizer(["red"], pairs=["cat"])["tokens"].tolist() == [[3, 4]]


def test_own_truncation_and_padding_of_the_file_do_not_interfere():
    backend = words("<pad>")
    backend.enable_truncation(1)
    backend.enable_padding(length=9, pad_id=5, pad_token="<pad>")
    tokenizer = LibraryTokenizer(backend)
    assert tokenizer(["red cat red"])["tokens"].tolist() == [[3, 4, 3]]
    assert tokenizer.pad_id == 5


def test_ids_come_from_the_configuration_first(tmp_path):
    words("<pad>", "<other>").save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).pad_id == 5
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": {"content": "<other>"}, "eos_token": "cat"})
    )
    assert (load(tmp_path).pad_id, load(tmp_path).eos_id) == (6, 4)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "red", "eos_token": None}))
    assert (load(tmp_path).pad_id, load(tmp_path).eos_id) == (3, 4)
    assert load(tmp_path, pad_id=2).pad_id == 2
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "absent"}))
    with pytest.raises(UserError, match="lacks the pad token 'absent'"):
        load(tmp_path)


def test_save_then_load_keeps_ids_sides_and_padding(tmp_path):
    first = LibraryTokenizer(words(), {"padding_side": "left", "truncation_side": "left"}, pad_id=0)
    first.save(tmp_path)
    second = load(tmp_path)
    texts = ["red", "cat red cat"]
    assert (
        second(texts, max_length=2)["tokens"].tolist()
        == first(texts, max_length=2)["tokens"].tolist()
        == [[0, 3], [3, 4]]
    )
    assert (second.pad_id, second.vocab_size) == (0, 5)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(UserError, match="token id 5 is outside the vocabulary of 5"):
        LibraryTokenizer(words()).decode([3, 5])
    with pytest.raises(UserError, match="pad_id 5 is outside"):
        LibraryTokenizer(words(), pad_id=5)
