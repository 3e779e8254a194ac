import numpy as np
import pytest

from vlm.data.batch import LoaderSettings, Row, collate
from vlm.errors import UserError


def row(name, **arrays):
    return Row(f"example {name!r} (source s, sample 1)", {k: np.asarray(v) for k, v in arrays.items()}, ())


def test_collate_stacks():
    batch = collate([row("a", x=[1, 2], y=3.0), row("b", x=[3, 4], y=5.0)])
    assert batch["x"].tolist() == [[1, 2], [3, 4]] and batch["y"].tolist() == [3.0, 5.0]


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": [1, 2, 3], "y": 1.0}, "'x' is int64\\[3\\], others are int64\\[2\\]"),
        ({"x": [1.0, 2.0], "y": 1.0}, "'x' is float64\\[2\\], others are int64\\[2\\]"),
        ({"x": [1, 2]}, "has fields \\['x'\\], others have \\['x', 'y'\\]"),
    ],
)
def test_rows_that_do_not_fit_are_named(arrays, message):
    with pytest.raises(UserError, match=f"^example 'b' \\(source s, sample 1\\): {message}"):
        collate([row("a", x=[1, 2], y=1.0), row("b", **arrays)])


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
