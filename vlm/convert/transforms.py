"""Named, invertible changes of layout between a foreign tensor and our parameters.

A transform maps one foreign tensor to one or several parameters (a fused projection to three) and back. Both
directions are lazy: shapes are known at once, data moves when a slice of the result is read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from vlm.convert.views import Index, TensorView, cast, concatenate, expand, narrow, permute, squeeze
from vlm.errors import UserError
from vlm.layers.positions import bicubic_weights


@dataclasses.dataclass(frozen=True)
class Transform:
    """A pair of inverse functions: foreign tensor -> parameters, parameters -> foreign tensor.

    Both raise `ValueError` saying which shape they expected.
    """

    name: str
    forward: Callable[[TensorView], tuple[TensorView, ...]] = dataclasses.field(compare=False)
    backward: Callable[[Sequence[TensorView]], TensorView] = dataclasses.field(compare=False)


def reorder(name: str, axes: Sequence[int]) -> Transform:
    """Permutes the axes of a tensor: `axes` as in `np.transpose`."""
    inverse = tuple(int(k) for k in np.argsort(axes))

    def forward(view: TensorView) -> tuple[TensorView, ...]:
        _expect(len(view.shape) == len(axes), f"{len(axes)} dimensions")
        return (permute(view, axes),)

    return Transform(name, forward, lambda views: permute(views[0], inverse))


def split(parts: int) -> Transform:
    """Cuts the first axis into equal parts, as in q, k, v fused into one projection."""

    def forward(view: TensorView) -> tuple[TensorView, ...]:
        leading = view.shape[0] if view.shape else 1
        _expect(leading % parts == 0, f"a first dimension divisible by {parts}")
        rows = leading // parts
        return tuple(narrow(view, i * rows, rows) for i in range(parts))

    return Transform(f"split{parts}", forward, concatenate)


def leading_ones(count: int) -> Transform:
    """Drops leading axes of size one, as in class tokens stored as [1, 1, E]; a tensor without them passes too."""

    def forward(view: TensorView) -> tuple[TensorView, ...]:
        if view.shape[:count] != (1,) * count:
            return (view,)
        return (squeeze(view, count),)

    return Transform(f"leading_ones{count}", forward, lambda views: expand(views[0], count))


def then(first: Transform, second: Transform) -> Transform:
    """Applies `second` to every result of `first`."""

    def forward(view: TensorView) -> tuple[TensorView, ...]:
        return tuple(second.forward(part)[0] for part in first.forward(view))

    def backward(views: Sequence[TensorView]) -> TensorView:
        return first.backward([second.backward([view]) for view in views])

    return Transform(f"{first.name}+{second.name}", forward, backward)


def resize_table(view: TensorView, side: int, prefix: int = 1) -> TensorView:
    """A table of patch positions [prefix + P, E] for side x side patches: PyTorch's bicubic, as at the original's load.

    The first `prefix` rows (class token) are kept; a table of that size is returned as it is.

    Raises:
        UserError: the table's patches are no square.
    """
    patches, width = view.shape[0] - prefix, view.shape[1]
    old = math.isqrt(max(patches, 0))
    if old * old != patches or not patches:
        raise UserError(f"position table: expected {prefix} rows and a square of patches, found {view.shape[0]} rows")
    if old == side:
        return view
    weights = bicubic_weights(old, side)

    def fetch(index: Index) -> np.ndarray:
        table = view.fetch((slice(0, view.shape[0]), index[1])).astype(np.float32)
        square = table[prefix:].reshape(old, old, -1)
        resized = np.einsum("rs,cd,sde->rce", weights, weights, square, optimize=True)
        return np.concatenate([table[:prefix], resized.reshape(side * side, -1)])[index[0]].astype(view.dtype)

    return TensorView((prefix + side * side, width), view.dtype, fetch)


def _scalar_forward(view: TensorView) -> tuple[TensorView, ...]:
    _expect(view.size == 1, "a single number")
    return (squeeze(view, len(view.shape)),)


def _patch_kernel(channels: int) -> Transform:
    """Convolution [E, C, p, p] <-> matrix [p·p·C, E] whose rows run over (row, column, channel) of a patch."""

    def forward(view: TensorView) -> tuple[TensorView, ...]:
        valid = len(view.shape) == 4 and view.shape[1] == channels and view.shape[2] == view.shape[3]
        _expect(valid, f"a convolution [E, {channels}, p, p]")
        features, _, side, _ = view.shape

        def fetch(index: Index) -> np.ndarray:
            whole = (slice(0, channels), slice(0, side), slice(0, side))
            return view.fetch((index[1], *whole)).transpose(2, 3, 1, 0).reshape(-1, _length(index[1]))[index[0]]

        return (TensorView((side * side * channels, features), view.dtype, fetch),)

    def backward(views: Sequence[TensorView]) -> TensorView:
        (view,) = views
        side = math.isqrt(view.shape[0] // channels)
        _expect(len(view.shape) == 2 and side * side * channels == view.shape[0], f"[p * p * {channels}, E]")

        def fetch(index: Index) -> np.ndarray:
            block = view.fetch((slice(0, view.shape[0]), index[0])).reshape(side, side, channels, -1)
            return block.transpose(3, 2, 0, 1)[(slice(None), *index[1:])]

        return TensorView((view.shape[1], channels, side, side), view.dtype, fetch)

    return Transform("patch_kernel", forward, backward)


def _narrowed(view: TensorView) -> tuple[TensorView, ...]:
    """int64 -> int32, which is what jax computes in."""
    _expect(view.dtype.kind in "iu", "whole numbers")

    def fetch(index: Index) -> np.ndarray:
        values = view.fetch(index)
        if values.size and not -(2**31) <= values.min() <= values.max() < 2**31:
            raise UserError(f"whole numbers between {values.min()} and {values.max()} do not fit into 32 bits")
        return values.astype(np.int32)

    return (TensorView(view.shape, np.dtype(np.int32), fetch),)


def _length(part: slice) -> int:
    return part.stop - part.start


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"expected {what}")


IDENTITY = Transform("identity", lambda view: (view,), lambda views: views[0])
TRANSPOSE = reorder("transpose", (1, 0))
CONVOLUTION = reorder("convolution", (2, 3, 1, 0))  # [O, I, h, w] -> [h, w, I, O]
PATCH_KERNEL = _patch_kernel(3)
SCALAR = Transform("scalar", _scalar_forward, lambda views: views[0])
SPLIT_QKV = split(3)
SPLIT_QKV_KERNEL = then(SPLIT_QKV, TRANSPOSE)
INT32 = Transform("int32", _narrowed, lambda views: cast(views[0], np.dtype(np.int64)))
