"""Paths and nested dicts are two views of one tree; rules over paths are proven complete and alive."""

import pytest

from vlm.errors import UserError
from vlm.tree import flatten, listing, match_first, unflatten

TREE = {"text": {"layers": {"kernel": 1, "bias": 2}, "norm": {"scale": 3}}, "logit_scale": 4}
FLAT = {"text/layers/kernel": 1, "text/layers/bias": 2, "text/norm/scale": 3, "logit_scale": 4}


def test_flatten_and_unflatten_are_inverse_and_keep_the_order():
    assert flatten(TREE) == FLAT
    assert list(flatten(TREE)) == list(FLAT)
    assert unflatten(FLAT) == TREE
    assert flatten({"a": {}, "b": 1}) == {"b": 1}
    assert unflatten({}) == {}


@pytest.mark.parametrize("key", ["a/b", "", 3])
def test_ambiguous_names_are_refused(key):
    with pytest.raises(UserError, match="must be a non-empty string"):
        flatten({"x": {key: 1}})


@pytest.mark.parametrize("flat", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}, {"a": {"c": 1}, "a/b/c": 2, "a/b": 3}])
def test_a_path_cannot_be_leaf_and_subtree(flat):
    with pytest.raises(UserError, match="leaf"):
        unflatten(flat)


def test_first_match_wins_on_the_whole_path():
    rules = [(r".*/bias", "no decay"), (r"text/.*", "decay"), (r".*", "rest")]
    assert match_first(rules, FLAT) == {
        "text/layers/kernel": "decay",
        "text/layers/bias": "no decay",
        "text/norm/scale": "decay",
        "logit_scale": "rest",
    }
    assert match_first([("logit_scale", 1)], ["logit_scale"]) == {"logit_scale": 1}
    with pytest.raises(UserError):  # a search would accept this, a full match does not
        match_first([("logit", 1)], ["logit_scale"])


def test_every_problem_is_listed_at_once():
    with pytest.raises(UserError) as error:
        match_first([("text/.*", 1), ("vision/.*", 2), ("tetx/.*", 3)], [*FLAT, "other"])
    message = str(error.value)
    assert "no rule matches logit_scale, other" in message
    assert "nothing matches the rule vision/.*, tetx/.*" in message


def test_a_shadowed_catch_all_is_not_dead():
    assert match_first([("a", 1), (".*", 2)], ["a"]) == {"a": 1}


def test_a_wrong_expression_is_named():
    with pytest.raises(UserError, match=r"'\(x' is not a regular expression"):
        match_first([("(x", 1)], ["x"])


def test_long_lists_are_cut():
    assert listing(["a", "b", "c"], limit=2) == "a, b and 1 more"
