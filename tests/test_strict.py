"""Strict construction of dataclasses: nesting, inheritance, and every kind of annotation."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from ml_collections import ConfigDict

from vlm.errors import UserError
from vlm.strict import build, plain


@dataclass(frozen=True)
class Tower:
    width: int = 4
    dtype: str = "float32"
    kind: Literal["a", "b", 3] = "a"

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width: expected at least 1, found {self.width}")


@dataclass(frozen=True)
class Model:
    name: str
    text: Tower = field(default_factory=lambda: Tower(width=9))
    rate: float = 0.0
    size: int | tuple[int, int] = 2
    towers: tuple[Tower, ...] = ()
    pair: tuple[str, float | None] = ("x", None)
    flag: bool = False
    table: dict[str, Any] = field(default_factory=dict)
    anything: Any = None
    maybe: Tower | None = None


def test_every_kind_of_field():
    section = ConfigDict({"name": "m", "rate": 1, "size": (1, 2), "text": {"kind": 3}, "table": {"a": 1}})
    section.towers = ({"width": 1}, {"kind": "b"})
    section.maybe = {"width": 2}
    section.pair = ("y", 2)
    model = build(Model, section, "model", {"dtype": "bfloat16"})
    assert model == Model(
        name="m",
        rate=1.0,
        size=(1, 2),
        text=Tower(9, "bfloat16", 3),
        table={"a": 1},
        towers=(Tower(1, "bfloat16"), Tower(4, "bfloat16", "b")),
        maybe=Tower(2, "bfloat16"),
        pair=("y", 2.0),
    )
    assert isinstance(model.rate, float) and build(Model, plain(model), "model") == model


def test_inherited_values_reach_sections_that_are_not_given_and_yield_to_those_that_are():
    assert build(Model, {"name": "m"}, "model", {"dtype": "bfloat16"}).text == Tower(9, "bfloat16")
    assert build(Model, {"name": "m", "text": {"dtype": "x"}}, "model", {"dtype": "y"}).text.dtype == "x"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, r"config\.model\.name is required"),
        ({"name": "m", "widht": 1}, r"config\.model\.widht does not exist"),
        ({"name": "m", "text": {"widht": 1}}, r"config\.model\.text\.widht does not exist; did you mean 'width'\?"),
        ({"name": 1}, r"config\.model\.name: expected str, found 1"),
        ({"name": "m", "rate": True}, r"config\.model\.rate: expected float, found True"),
        ({"name": "m", "rate": "1"}, r"config\.model\.rate: expected float, found '1'"),
        ({"name": "m", "flag": 1}, r"config\.model\.flag: expected bool, found 1"),
        ({"name": "m", "size": 1.5}, r"config\.model\.size: expected int \| tuple\[int, int\], found 1\.5"),
        ({"name": "m", "size": True}, r"config\.model\.size"),
        ({"name": "m", "text": 3}, r"config\.model\.text: expected a mapping, found 3"),
        ({"name": "m", "text": {"width": 0}}, r"config\.model\.text: width: expected at least 1, found 0"),
        ({"name": "m", "text": {"kind": "3"}}, r"config\.model\.text\.kind: expected one of 'a', 'b', 3, found '3'"),
        ({"name": "m", "towers": ({"width": "w"},)}, r"config\.model\.towers\[0\]\.width: expected int, found 'w'"),
        ({"name": "m", "towers": 3}, r"config\.model\.towers: expected tuple\[.*\], found 3"),
        ({"name": "m", "pair": ("a",)}, r"config\.model\.pair: .* found 1 values"),
        ({"name": "m", "table": 3}, r"config\.model\.table: expected a mapping, found 3"),
        ({"name": "m", "rate": float("nan")}, r"config\.model\.rate: expected a finite number, found nan"),
        (
            {"name": "m", "table": {"a": (1.0, -float("inf"))}},
            r"config\.model\.table\.a\[1\]: .* finite number, found -inf",
        ),
        ({"name": "m", "anything": {1}}, r"config\.model\.anything: expected a number, text, tuple or mapping, found"),
        ({"name": "m", "text": {"kind": "bb"}}, r"found 'bb'; did you mean 'b'\?"),
    ],
)
def test_wrong_sections(section, message):
    with pytest.raises(UserError, match=message):
        build(Model, section, "model")
