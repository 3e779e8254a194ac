"""SentencePiece layouts against the golden ids and against the Hugging Face classes."""

import json
import pickle
import shutil

import pytest

from vlm.errors import UserError
from vlm.tokenizers import load, train_sentencepiece
from vlm.tokenizers.spm import LlamaTokenizer, XLMRobertaTokenizer

LINES = ["one small cat", "two small dogs and a cat", "drei kleine Katzen", "一只猫", "two  cats\tand one dog"] * 5


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "sentencepiece.bpe.model"
    train_sentencepiece(LINES, path, 30)
    return path


@pytest.fixture(scope="session")
def reference(models, tmp_path_factory):
    """Hugging Face's XLM-R tokenizer built from the same model file."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    shutil.copyfile(models / "torchtext_spm_example.model", folder / "sentencepiece.bpe.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    return transformers.XLMRobertaTokenizer.from_pretrained(folder)


def test_xlm_r_layout_equals_the_golden_ids(models, differences):
    tokenizer = load(models / "torchtext_spm_example.model")
    assert differences(tokenizer, "xlmr_like_fairseq_ids") == []
    ids = [tokenizer.token_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>", ".", "no such piece")]
    assert ids == [0, 1, 2, 3, 20001, 4, None]
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (20002, 20001)


def test_llama_layout_equals_the_golden_ids(models, differences):
    tokenizer = load(models / "mistral_v1_tokenizer.model")
    assert differences(tokenizer, "mistral_spm") == []
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (32000, 1, 2, 0)
    assert tokenizer.decode(tokenizer.encode("Ein Satz 🙂  mit  Bytes")) == "Ein Satz 🙂  mit  Bytes"


def test_xlm_r_batches_equal_hugging_face(models, goldens, reference):
    """All lines but two: a tie between equally likely segmentations, and special tokens spelled out."""
    tokenizer = load(models / "torchtext_spm_example.model")
    lines = goldens["lines"]
    theirs = reference(lines)["input_ids"]
    differ = [line for line, ids in zip(lines, theirs, strict=True) if [0, *tokenizer.encode(line), 2] != ids]
    assert [set(line) == {"a"} or "<s>" in line for line in differ] == [True, True]
    equal = [line for line in lines if line not in differ][::3]
    for options in ({}, {"max_length": 77}, {"max_length": 12, "padding": "max_length"}):
        theirs = reference(
            equal, truncation="max_length" in options, return_tensors="np", **{"padding": True, **options}
        )
        ours = tokenizer(equal, **options)
        assert (ours["tokens"] == theirs["input_ids"]).all()
        assert (ours["mask"] == theirs["attention_mask"]).all()


@pytest.mark.parametrize("max_length", [11, 30, 77])
def test_xlm_r_pairs_equal_hugging_face(models, goldens, reference, max_length):
    tokenizer = load(models / "torchtext_spm_example.model")
    firsts, seconds = goldens["lines"][:300], goldens["lines"][900:1200]
    theirs = reference(firsts, seconds, truncation=True, max_length=max_length, padding=True, return_tensors="np")
    ours = tokenizer(firsts, pairs=seconds, max_length=max_length)
    assert (ours["tokens"] == theirs["input_ids"]).all()
    assert (ours["mask"] == theirs["attention_mask"]).all()


def test_spelled_out_special_tokens_are_text_unless_asked_for(models, reference):
    model = (models / "torchtext_spm_example.model").read_bytes()
    text = "[SEP] <s>a <mask>b</s> c<pad>"
    assert not {0, 1, 2, 20001} & set(XLMRobertaTokenizer(model).encode(text))
    parsing = XLMRobertaTokenizer(model, parse_special=True)
    assert parsing.encode(text) == reference(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["torchtext_spm_example.model", "mistral_v1_tokenizer.model"])
def test_save_then_load_is_the_identity(models, tmp_path, name):
    first = load(models / name)
    type(first)((models / name).read_bytes(), {"<image>": first.vocab_size + 1, "<x>": first.vocab_size}).save(tmp_path)
    second = load(tmp_path)
    assert type(second) is type(first)
    assert second.vocab_size == first.vocab_size + 2
    text = "a photo of a cat"
    assert second.encode(f"{text}<image>{text}") == [*first.encode(text), first.vocab_size + 1, *first.encode(text)]
    assert second.decode(second.encode(f"{text}<image>")) == f"{text}<image>"


def test_hugging_face_reads_what_is_saved(models, goldens, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = load(models / "torchtext_spm_example.model")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "XLMRobertaTokenizer"
    assert theirs(goldens["lines"][:50])["input_ids"] == [
        row[mask].tolist() for row, mask in zip(*tokenizer(goldens["lines"][:50]).values(), strict=True)
    ]


def test_decode_drops_specials_and_refuses_foreign_ids(tiny):
    tokenizer = load(tiny)
    ids = tokenizer(["two small cats"], max_length=20, padding="max_length")["tokens"][0]
    assert tokenizer.decode(ids) == "two small cats"
    assert tokenizer.decode([0, *tokenizer.encode("one"), 2, 1], skip_special=False) == "<s>one</s><pad>"
    with pytest.raises(UserError, match=f"{tokenizer.vocab_size} is outside"):
        tokenizer.decode([tokenizer.vocab_size])


def test_training_is_deterministic_and_usable_as_xlm_r(tiny, tmp_path):
    train_sentencepiece(iter(LINES), tmp_path / "again.model", 30)
    assert (tmp_path / "again.model").read_bytes() == tiny.read_bytes()
    tokenizer = load(tiny)
    assert isinstance(tokenizer, XLMRobertaTokenizer)
    assert tokenizer.vocab_size == 32
    assert tokenizer.unk_id not in tokenizer.encode("two small 猫")
    assert tokenizer.encode("ф")[-1] == tokenizer.unk_id
    assert tokenizer.encode("two  cats") == tokenizer.encode(" two cats ")


@pytest.mark.parametrize(
    ("texts", "size", "message"), [([], 50, "no text"), (["a b"], 5000, "5000 pieces"), (["a"], 2, "2 pieces")]
)
def test_impossible_training_is_refused_and_writes_nothing(tmp_path, texts, size, message):
    with pytest.raises(UserError, match=message):
        train_sentencepiece(texts, tmp_path / "x.model", size)
    assert list(tmp_path.iterdir()) == []


def test_llama_options(models):
    model = (models / "mistral_v1_tokenizer.model").read_bytes()
    tokenizer = LlamaTokenizer(model, {"<pad>": 32000}, pad_id=32000, add_bos=False, add_eos=True)
    ids = tokenizer.encode("hi")
    assert tokenizer(["hi"], max_length=4, padding="max_length")["tokens"].tolist() == [
        [*ids, 2, *[32000] * (3 - len(ids))]
    ]
    assert LlamaTokenizer(model)(["hi"], pairs=["hi"])["tokens"].tolist() == [[1, *ids, 1, *ids]]


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"<s>": 7}, "contradicts"),
        ({"<x>": 5}, "contradicts"),
        ({"<x>": 32010}, "gaps"),
        ({"<x>": 32000, "<y>": 32000}, "same id"),
    ],
)
def test_contradicting_added_tokens_are_refused(models, added, message):
    with pytest.raises(UserError, match=message):
        LlamaTokenizer((models / "mistral_v1_tokenizer.model").read_bytes(), added)


def test_tokenizers_can_be_sent_to_other_processes(tiny):
    tokenizer = load(tiny)
    assert pickle.loads(pickle.dumps(tokenizer)).encode("one cat") == tokenizer.encode("one cat")
