"""Special tokens, truncation and padding, checked on a tokenizer whose ids are easy to read."""

import numpy as np
import pytest

from vlm.errors import UserError
from vlm.tokenizers.tokenizer import Tokenizer, shares


class Letters(Tokenizer):
    """Ids are code points; rows are `1 text 2`, pairs `1 a 2 2 b 2` with token types 0 and 1."""

    vocab_size, pad_id, bos_id, eos_id = 200, 0, 1, 2
    single = ((1, 0), ("A", 0), (2, 0))
    pair = ((1, 0), ("A", 0), (2, 0), (2, 1), ("B", 1), (2, 1))

    def encode(self, text):
        return [ord(character) for character in text.encode().decode()]

    def decode(self, ids, *, skip_special=True):
        return "".join(map(chr, ids))

    def token_id(self, token):
        return ord(token)

    def save(self, directory):
        raise NotImplementedError


A, B, C = 97, 98, 99


def test_a_batch_is_padded_to_its_longest_row():
    batch = Letters()(["abc", ""])
    assert batch["tokens"].tolist() == [[1, A, B, C, 2], [1, 2, 0, 0, 0]]
    assert batch["mask"].tolist() == [[True] * 5, [True, True, False, False, False]]
    assert (batch["tokens"].dtype, batch["mask"].dtype, set(batch)) == (np.int32, np.bool_, {"tokens", "mask"})


def test_padding_to_max_length_on_the_left():
    tokenizer = Letters()
    tokenizer.padding_side = "left"
    batch = tokenizer(["ab"], max_length=6, padding="max_length")
    assert batch["tokens"].tolist() == [[0, 0, 1, A, B, 2]]
    assert batch["mask"].tolist() == [[False, False, True, True, True, True]]


@pytest.mark.parametrize(("side", "kept"), [("right", [A, B]), ("left", [B, C])])
def test_truncation_keeps_the_special_tokens(side, kept):
    tokenizer = Letters()
    tokenizer.truncation_side = side
    assert tokenizer(["abc"], max_length=4)["tokens"].tolist() == [[1, *kept, 2]]
    assert tokenizer(["abc"], max_length=4, truncation=False)["tokens"].tolist() == [[1, A, B, C, 2]]
    assert tokenizer(["abc"], max_length=2)["tokens"].tolist() == [[1, 2]]


def test_pairs_have_token_types_and_the_longer_text_is_cut_first():
    batch = Letters()(["a", "abc"], pairs=["bb", "c"], max_length=7)
    assert batch["tokens"].tolist() == [[1, A, 2, 2, B, B, 2], [1, A, B, 2, 2, C, 2]]
    assert batch["token_types"].tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [((3, 4), 7, (3, 4)), ((9, 2), 6, (4, 2)), ((2, 9), 6, (2, 4)), ((9, 9), 7, (3, 4)), ((9, 8), 7, (4, 3))],
)
def test_shares_of_a_pair(lengths, budget, expected):
    assert shares(*lengths, budget) == expected


def test_an_empty_batch_has_no_rows():
    assert Letters()([])["tokens"].shape == (0, 0)
    assert Letters()([], max_length=5, padding="max_length")["mask"].shape == (0, 5)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("abc", {}, "a list of strings"),
        (["a", 3], {}, "text 1 must be a string, found int"),
        (["a"], {"pairs": ["b", "c"]}, "1 and 2"),
        (["a"], {"max_length": 1}, "too short for the special tokens"),
        (["a"], {"padding": "max_length"}, "needs max_length"),
        (["a"], {"padding": True}, "'longest' or 'max_length'"),
        (["\ud800"], {}, "not valid Unicode"),
    ],
)
def test_wrong_input_is_named(texts, options, message):
    with pytest.raises(UserError, match=message):
        Letters()(texts, **options)


def test_without_a_padding_token_only_equal_rows_make_a_batch():
    tokenizer = Letters()
    tokenizer.pad_id = None
    assert tokenizer(["ab", "bc"])["tokens"].shape == (2, 4)
    with pytest.raises(UserError, match="no padding token"):
        tokenizer(["ab", "b"])
