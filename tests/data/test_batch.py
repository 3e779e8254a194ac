import itertools

import numpy as np
import pytest

from vlm.data.batch import BatchBuilder, LoaderSettings, Row
from vlm.data.ledger import Skip
from vlm.errors import UserError


def row(name, **arrays):
    return Row(f"example {name!r} (source s, sample 1)", {k: np.asarray(v) for k, v in arrays.items()}, ())


def build(*rows, order=None):
    builder = BatchBuilder(len(rows))
    last = [builder.put(number, rows[number]) for number in order or range(len(rows))]
    assert last == [False] * (len(rows) - 1) + [True]
    return builder


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_rows_stack_in_any_order_of_arrival(order):
    batch = build(row("a", x=[1, 2], y=3.0), row("b", x=[3, 4], y=5.0), row("c", x=[5, 6], y=7.0), order=order).finish()
    assert batch["x"].tolist() == [[1, 2], [3, 4], [5, 6]] and batch["y"].tolist() == [3.0, 5.0, 7.0]
    assert batch["x"].dtype == np.int64 and batch["y"].shape == (3,)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": [1, 2, 3], "y": 1.0}, "'x' is int64\\[3\\], others are int64\\[2\\]"),
        ({"x": [1.0, 2.0], "y": 1.0}, "'x' is float64\\[2\\], others are int64\\[2\\]"),
        ({"x": [1, 2]}, "has fields \\['x'\\], others have \\['x', 'y'\\]"),
    ],
)
def test_the_odd_row_is_named_whichever_came_first(arrays, message, order):
    builder = build(row("a", x=[1, 2], y=1.0), row("b", **arrays), row("c", x=[1, 2], y=1.0), order=order)
    with pytest.raises(UserError, match=f"^example 'b' \\(source s, sample 1\\): {message}"):
        builder.finish()


def test_skips_stay_with_their_row():
    skip = Skip("s", 4, "k", "broken", "")
    assert build(row("a", x=1), Row("b", {"x": np.int64(2)}, (skip,)), order=[1, 0]).skips() == [(), (skip,)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 6, "host_count": 4}, "batch_size 6 does not divide over 4 hosts"),
        ({"host_index": 2, "host_count": 2}, "host_index 2 of 2 hosts"),
        ({"num_workers": -1}, "num_workers -1"),
        ({"prefetch": 0}, "prefetch 0"),
        ({"max_skip_fraction": 1.5}, "max_skip_fraction must be in \\[0, 1\\], found 1.5"),
        ({"seed": -1}, "seed must be in"),
        ({"timeout_seconds": 0.0}, "must be positive"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        LoaderSettings(**{"batch_size": 8, **options})
