"""Rows of a dialog: what stands in them, what is left out where there is no room, which candidate training draws."""

import numpy as np
import pytest

from vlm.errors import UserError
from vlm.models.blip import dialog
from vlm.tokenizers import load

WORDS = ["is", "it", "a", "dog", "?", "yes", "no", "what", "brown", "two"]
EXAMPLE = {
    "caption": "Two!",
    "history": [["is it a dog", "Yes."], ["what is it?", "a dog"]],
    "question": "is it two?",
    "options": ["no", "yes", "brown two"],
    "answer": 1,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return load(path)


def _texts(found, tokenizer):
    return [tokenizer.decode(row[mask].tolist(), skip_special=False) for row, mask in zip(*found.values(), strict=True)]


@pytest.mark.parametrize(
    ("length", "before"),
    [
        (32, "is it a dog? yes [SEP] what is it? a dog [SEP] "),
        (22, "is it a dog? yes [SEP] what is it? a dog [SEP] "),  # exactly the longest candidate's room
        (21, "what is it? a dog [SEP] "),
        (10, ""),
    ],
)
def test_earlier_rounds_are_read_whole_the_latest_first(tokenizer, length, before):
    found = dialog.rows(EXAMPLE, None, tokenizer, lambda text: text.lower().strip("."), length, "x")
    assert found["tokens"].shape == found["mask"].shape == (3, length)
    for text, answer in zip(_texts(found, tokenizer), EXAMPLE["options"], strict=True):
        assert text == f"[CLS] {before}is it two? {answer} [SEP]"
    one = dialog.rows(EXAMPLE, (0,), tokenizer, str, length, "x")
    assert _texts(one, tokenizer)[0].endswith("is it two? no [SEP]")


def test_half_of_the_candidates_are_right_and_the_others_any_wrong_one():
    drawn = [dialog.draw(EXAMPLE, np.random.default_rng(seed), "x") for seed in range(400)]
    assert {option for option, right in drawn if right} == {1}
    assert abs(sum(right for _, right in drawn) - 200) < 40
    wrong = [option for option, right in drawn if not right]
    assert set(wrong) == {0, 2} and abs(wrong.count(0) - len(wrong) / 2) < 30
    assert dialog.draw(EXAMPLE, None, "x") == (1, True)


def test_what_is_missing_is_named(tokenizer):
    with pytest.raises(UserError, match="x: expected question, history and options of a dialog, found question"):
        dialog.rows({"question": "a"}, None, tokenizer, str, 9, "x")
    with pytest.raises(UserError, match="x: answer: expected the place of the right one in options, found 'yes'"):
        dialog.draw(EXAMPLE | {"answer": "yes"}, None, "x")
