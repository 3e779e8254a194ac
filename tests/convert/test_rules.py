"""A table is complete in both directions: nothing unused, nothing missing, nothing twice, all problems at once."""

import numpy as np
import pytest

from vlm.convert.rules import Rule, export_tensors, import_tensors, prefixed
from vlm.convert.transforms import SPLIT_QKV_KERNEL, TRANSPOSE, leading_ones
from vlm.convert.views import from_array
from vlm.errors import UserError

rng = np.random.default_rng(0)
RULES = [
    Rule("cls", "class_embedding", leading_ones(2)),
    Rule("blocks.{i}.qkv.weight", ("layers/query", "layers/key", "layers/value"), SPLIT_QKV_KERNEL),
    Rule("blocks.{i}.(fc1|up).weight", "layers/up", TRANSPOSE),
    Rule("blocks.{i}.merge.weight", "merge", TRANSPOSE, layers=range(1, 3)),
    Rule("embed.weight", "embed"),
    Rule("head.weight", "embed", duplicate=True),
    Rule("*position_ids", None),
    Rule("blocks.{i}.attn_mask", None),
]


def random(*shape):
    return rng.normal(size=shape).astype(np.float32)


def checkpoint(layers=3):
    tensors = {"cls": random(1, 1, 4), "embed.weight": random(5, 4), "text.position_ids": np.arange(4)}
    for i in range(layers):
        tensors |= {f"blocks.{i}.qkv.weight": random(12, 4), f"blocks.{i}.fc1.weight": random(8, 4)}
        tensors |= {f"blocks.{i}.attn_mask": random(2, 2)}
    tensors |= {f"blocks.{i}.merge.weight": random(4, 8) for i in (1, 2)}
    tensors["head.weight"] = tensors["embed.weight"]
    return tensors


def lazy(tensors):
    return {name: from_array(array) for name, array in tensors.items()}


def expected(tensors, layers=3):
    qkv = np.stack([tensors[f"blocks.{i}.qkv.weight"] for i in range(layers)])
    return {
        "class_embedding": tensors["cls"][0, 0],
        "layers/query": qkv[:, :4].transpose(0, 2, 1),
        "layers/key": qkv[:, 4:8].transpose(0, 2, 1),
        "layers/value": qkv[:, 8:].transpose(0, 2, 1),
        "layers/up": np.stack([tensors[f"blocks.{i}.fc1.weight"].T for i in range(layers)]),
        "merge": np.stack([tensors[f"blocks.{i}.merge.weight"].T for i in (1, 2)]),
        "embed": tensors["embed.weight"],
    }


def problems(tensors, target=None, rules=RULES):
    target = expected(checkpoint()) if target is None else target
    with pytest.raises(UserError) as error:
        import_tensors(lazy(tensors), rules, target, source="file")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_import_and_export_are_inverse():
    tensors = checkpoint(12)  # ten and more layers: sorted by number, not by text
    target = expected(tensors, 12)
    params = import_tensors(lazy(tensors), RULES, target, source="file")
    assert list(params) == list(target)
    for path, array in target.items():
        np.testing.assert_array_equal(params[path].read(), array)
    written = export_tensors(params, RULES)
    ignored = {name for name in tensors if "position_ids" in name or "attn_mask" in name}
    assert written.keys() == tensors.keys() - ignored - {"head.weight"}  # a duplicate is not written
    for name, view in written.items():
        np.testing.assert_array_equal(view.read(), tensors[name])


def test_both_spellings_and_only_one_of_them():
    tensors = checkpoint()
    tensors["blocks.1.up.weight"] = tensors.pop("blocks.1.fc1.weight")
    assert import_tensors(lazy(tensors), RULES, expected(checkpoint()), source="file")
    tensors["blocks.1.fc1.weight"] = tensors["blocks.1.up.weight"]
    assert "blocks.1.fc1.weight and blocks.1.up.weight are the same parameter" in problems(tensors)


def test_duplicates_are_written_on_request():
    tensors = checkpoint()
    tensors["head.weight"] = tensors["embed.weight"]
    views = {name: from_array(array) for name, array in tensors.items()}
    written = export_tensors(import_tensors(views, RULES, None, source="file"), RULES, duplicates=True)
    assert written.keys() == tensors.keys() - {name for name in tensors if "ids" in name or "mask" in name}
    np.testing.assert_array_equal(written["head.weight"].read(), tensors["embed.weight"])


def test_what_can_be_filled_in_spite_of_problems():
    views = {name: from_array(array) for name, array in checkpoint().items()} | {"stranger": from_array(random(2))}
    del views["blocks.1.qkv.weight"]
    filled = import_tensors(views, RULES, None, source="file", partial=True)
    assert "layers/up" in filled and "layers/query" not in filled
    with pytest.raises(UserError, match="2 problems: unknown tensor stranger; missing tensor blocks.1.qkv.weight"):
        import_tensors(views, RULES, None, source="file")


def test_a_duplicate_fills_in_and_is_compared():
    tensors = checkpoint()
    del tensors["embed.weight"]
    params = import_tensors(lazy(tensors), RULES, expected(checkpoint()), source="file")
    np.testing.assert_array_equal(params["embed"].read(), tensors["head.weight"])
    tensors = checkpoint()
    tensors["head.weight"] = tensors["head.weight"].copy()
    tensors["head.weight"][3, 2] += 1e-6
    assert problems(tensors) == "file: 1 problems: head.weight differs from embed.weight"
    tensors["head.weight"] = tensors["embed.weight"][:4]
    assert problems(tensors) == "file: 1 problems: head.weight differs from embed.weight"


def test_every_problem_is_named_in_one_message():
    tensors = checkpoint()
    tensors["surprise"] = random(2)
    tensors["cls"] = random(1, 1, 5)
    del tensors["blocks.1.qkv.weight"]
    tensors["blocks.2.fc1.weight"] = random(9, 4)
    del tensors["embed.weight"], tensors["head.weight"]
    message = problems(tensors)
    for part in (
        "unknown tensor surprise",
        "class_embedding: expected shape [4], found [5] (from cls)",
        "missing tensor blocks.1.qkv.weight",
        "blocks.2.fc1.weight: shape [9, 4] float32 differs from the layers before it",
        "missing embed (from embed.weight)",
    ):
        assert part in message, (part, message)


def test_only_the_first_twenty_are_spelt_out():
    message = problems(checkpoint() | {f"extra{i:02}": random(1) for i in range(30)})
    assert "30 problems" in message and "extra19" in message and "extra20" not in message and "10 more" in message


def test_what_the_architecture_lacks_and_what_is_filled_twice():
    target = {path: array for path, array in expected(checkpoint()).items() if path != "merge"}
    assert "blocks.{i}.merge.weight has no place in this architecture" in problems(checkpoint(), target)
    rules = [*RULES, Rule("other", "embed")]
    assert "embed is filled by embed.weight and by other" in problems(
        checkpoint() | {"other": random(5, 4)}, rules=rules
    )


def test_layer_counts_must_agree_with_the_architecture():
    message = problems(checkpoint(4))
    assert "layers/up: expected shape [3, 4, 8], found [4, 4, 8]" in message


def test_wrong_dimensions_name_tensor_and_shape():
    message = problems(checkpoint() | {"blocks.0.fc1.weight": random(8)})
    assert "blocks.0.fc1.weight: expected 2 dimensions, found shape [8]" in message


def test_export_refuses_what_it_cannot_name():
    params = import_tensors(lazy(checkpoint()), RULES, expected(checkpoint()), source="file")
    del params["layers/key"]
    with pytest.raises(UserError, match=r"needs layers/query, layers/key, layers/value, found only layers/query"):
        export_tensors(params, RULES)
    with pytest.raises(UserError, match="unknown/path has no name in this format"):
        export_tensors({"unknown/path": from_array(random(1))}, RULES)


def test_prefixes_on_both_sides():
    rules = prefixed([Rule("a.weight", "a"), Rule("b", ("x", "y"), SPLIT_QKV_KERNEL), Rule("ids", None)], "(m.|)", "t/")
    assert [rule.paths for rule in rules] == [("t/a",), ("t/x", "t/y"), ()]
    assert rules[0].pattern.fullmatch("a.weight") and rules[0].pattern.fullmatch("m.a.weight")
    assert rules[0].name() == "m.a.weight" and rules[2].ours is None
    assert not rules[0].pattern.fullmatch("mxa.weight")  # a dot is a dot


def test_an_unknown_architecture_takes_what_is_there():
    params = import_tensors(lazy(checkpoint()), RULES, None, source="file")
    assert params.keys() == expected(checkpoint()).keys()
