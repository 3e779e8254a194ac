"""A folder is recognised by its files, a file by its content, and everything else is refused by name."""

import json
import shutil

import pytest

from vlm.errors import UserError
from vlm.tokenizers import load
from vlm.tokenizers.spm import LlamaTokenizer, XLMRobertaTokenizer, open_model
from vlm.tokenizers.tokenizer_json import LibraryTokenizer

XLMR, LLAMA = "torchtext_spm_example.model", "mistral_v1_tokenizer.model"


@pytest.mark.parametrize("file_name", ["sentencepiece.bpe.model", "tokenizer.model"])
@pytest.mark.parametrize(("source", "kind"), [(XLMR, XLMRobertaTokenizer), (LLAMA, LlamaTokenizer)])
def test_the_content_tells_the_layout_not_the_name(models, tmp_path, file_name, source, kind):
    shutil.copyfile(models / source, tmp_path / file_name)
    assert type(load(tmp_path)) is kind
    assert type(load(tmp_path / file_name)) is kind


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast"}}, LlamaTokenizer),
        ({"config.json": {"model_type": "vipllava"}}, LlamaTokenizer),
        ({"config.json": {"model_type": "altclip"}}, XLMRobertaTokenizer),
        ({"config.json": {"model_type": "other"}}, XLMRobertaTokenizer),
    ],
)
def test_the_configuration_decides_where_it_names_the_layout(models, tmp_path, config, kind):
    shutil.copyfile(models / XLMR, tmp_path / "sentencepiece.bpe.model")
    for name, value in config.items():
        (tmp_path / name).write_text(json.dumps(value))
    assert type(load(tmp_path)) is kind
    assert type(load(tmp_path, layout="xlm-roberta")) is XLMRobertaTokenizer


def test_llama_configuration_is_obeyed(models, tmp_path):
    shutil.copyfile(models / LLAMA, tmp_path / "tokenizer.model")
    decoder = {"0": {"content": "<unk>"}, "32000": {"content": "<image>"}, "32001": {"content": "<pad>"}}
    config = {"add_bos_token": False, "add_eos_token": True, "pad_token": "<pad>", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(tmp_path)
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (32001, 32002)
    assert tokenizer(["<image>"])["tokens"].tolist() == [[32000, 2]]
    tokenizer.save(tmp_path / "again")
    assert load(tmp_path / "again")(["<image>a"])["tokens"].tolist() == tokenizer(["<image>a"])["tokens"].tolist()


def test_sentencepiece_comes_before_tokenizer_json_where_its_layout_is_known(models, tmp_path):
    shutil.copyfile(models / "t5_small_tokenizer.json", tmp_path / "tokenizer.json")
    shutil.copyfile(models / XLMR, tmp_path / "sentencepiece.bpe.model")
    assert isinstance(load(tmp_path), XLMRobertaTokenizer)
    shutil.copyfile(models / "t5_spm.model", tmp_path / "sentencepiece.bpe.model")
    assert isinstance(load(tmp_path), LibraryTokenizer)


def test_unknown_sentencepiece_layouts_are_named(models):
    with pytest.raises(UserError, match="t5_spm.model: unknown SentencePiece layout, found unk 2, bos -1, eos 1"):
        load(models / "t5_spm.model")
    with pytest.raises(UserError, match="found .2, -1, 1."):
        load(models / "t5_spm.model", layout="xlm-roberta")


def test_wrong_paths_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="absent: no such file or folder"):
        load(tmp_path / "absent")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="no tokenizer found; expected .*; found weights.bin"):
        load(tmp_path)
    with pytest.raises(UserError, match="choose from xlm-roberta, llama"):
        load(tmp_path, layout="bert")
    with pytest.raises(UserError, match="pads with id 1"):
        load(_tiny(tmp_path), pad_id=0)


def _tiny(folder):
    from vlm.tokenizers import train_sentencepiece

    train_sentencepiece(["a b c a b", "c d e"], folder / "tiny.model", 10)
    return folder / "tiny.model"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "not valid JSON|not a usable tokenizer"),
        ("tokenizer.json", b"{}", "not a usable tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "not a usable tokenizer"),
        ("tokenizer.json", b'{"model":' + b"[" * 100_000, "not a usable tokenizer"),
        ("tokenizer.json", b"", "the file is empty"),
        ("tokenizer.model", b"not a model", "not a SentencePiece model"),
        ("sentencepiece.bpe.model", bytes(100), "not a SentencePiece model"),
        ("vocab.txt", b"\xff\n[UNK]\n", "not UTF-8"),
        ("vocab.txt", b"", "empty"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "[]", "expected a JSON object, found list"),
        ("tokenizer_config.json", "[" * 100_000, "not valid JSON"),
        ("added_tokens.json", '{"<x>": "one"}', "added token '<x>' has the id 'one'"),
        ("added_tokens.json", '{"<x>": 40000}', "gaps"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"20002": {"content": 3}}}', "added token None"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "must be an object"),
        ("config.json", "nonsense", "not valid JSON"),
    ],
)
def test_wrong_configurations_are_named(models, tmp_path, name, content, message):
    shutil.copyfile(models / XLMR, tmp_path / "sentencepiece.bpe.model")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_json_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"hidden_size": 3}')
    with pytest.raises(UserError, match="JSON, but no tokenizer"):
        load(tmp_path / "a.json")


def test_files_above_the_size_limit_are_not_parsed(tmp_path):
    with (tmp_path / "tokenizer.model").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(UserError, match="more than the limit"):
        load(tmp_path)


def test_truncated_models_never_load(models):
    data = (models / XLMR).read_bytes()
    for length in (0, 1, 100, 5000, len(data) // 2, len(data) - 1):
        with pytest.raises(UserError, match="not a SentencePiece model"):
            open_model(data[:length])
