"""Lazy arrays: a tensor that knows its shape and dtype and reads only the slice it is asked for.

A checkpoint of any size is transformed as a graph of such views (transposed, stacked, split ...) over
memory-mapped files; bytes move only when a device or an output file wants its slice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class TensorView:
    """A lazy array: `read(index)` returns the slice as NumPy, without copying where the layout allows it.

    Attributes:
        fetch: returns the data at a normalised index: one slice with explicit bounds and step 1 per dimension.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[Index], np.ndarray] = dataclasses.field(repr=False, compare=False)

    def read(self, index: Sequence[slice] | None = None) -> np.ndarray:
        """Returns the whole array, or the part that one slice per dimension selects (missing ones select all).

        Raises:
            ValueError: a slice with another step than 1.
        """
        index = tuple(index or ())
        index += (slice(None),) * (len(self.shape) - len(index))
        bounds = [part.indices(size) for part, size in zip(index, self.shape, strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise ValueError(f"only slices with step 1 can be read, found {index}")
        return self.fetch(tuple(slice(start, max(start, stop)) for start, stop, _ in bounds))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.size * self.dtype.itemsize


def from_array(array: np.ndarray) -> TensorView:
    """A view of an array in memory (or memory-mapped)."""
    return TensorView(array.shape, array.dtype, lambda index: array[index])


def permute(view: TensorView, axes: Sequence[int]) -> TensorView:
    """Reorders the axes like `np.transpose`: axis k of the result is axis `axes[k]` of the source."""
    axes = tuple(axes)
    inverse = tuple(np.argsort(axes))

    def fetch(index: Index) -> np.ndarray:
        return view.fetch(tuple(index[k] for k in inverse)).transpose(axes)

    return TensorView(tuple(view.shape[k] for k in axes), view.dtype, fetch)


def narrow(view: TensorView, start: int, length: int) -> TensorView:
    """Rows start ... start + length of the first axis."""

    def fetch(index: Index) -> np.ndarray:
        return view.fetch((slice(index[0].start + start, index[0].stop + start), *index[1:]))

    return TensorView((length, *view.shape[1:]), view.dtype, fetch)


def concatenate(views: Sequence[TensorView]) -> TensorView:
    """Joins along the first axis; shapes must agree on the others."""
    offsets = np.cumsum([0] + [view.shape[0] for view in views])

    def fetch(index: Index) -> np.ndarray:
        parts = []
        for view, offset in zip(views, offsets, strict=False):
            start, stop = max(index[0].start - offset, 0), min(index[0].stop - offset, view.shape[0])
            if start < stop:
                parts.append(view.fetch((slice(int(start), int(stop)), *index[1:])))
        if not parts:
            return views[0].fetch((slice(0, 0), *index[1:]))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return TensorView((int(offsets[-1]), *views[0].shape[1:]), views[0].dtype, fetch)


def stack(views: Sequence[TensorView]) -> TensorView:
    """Adds a leading axis: entry i is `views[i]`. Only the layers that a slice touches are read."""

    def fetch(index: Index) -> np.ndarray:
        chosen = views[index[0]]
        if len(chosen) == 1:
            return chosen[0].fetch(index[1:])[None]
        shape = tuple(part.stop - part.start for part in index)
        out = np.empty(shape, views[0].dtype)
        for i, view in enumerate(chosen):
            copy_into(out[i], view.fetch(index[1:]))
        return out

    return TensorView((len(views), *views[0].shape), views[0].dtype, fetch)


def unstack(view: TensorView, i: int) -> TensorView:
    """Entry i of the leading axis."""

    def fetch(index: Index) -> np.ndarray:
        return view.fetch((slice(i, i + 1), *index))[0]

    return TensorView(view.shape[1:], view.dtype, fetch)


def squeeze(view: TensorView, count: int) -> TensorView:
    """Drops `count` leading axes of size one."""

    def fetch(index: Index) -> np.ndarray:
        return view.fetch((slice(0, 1),) * count + index)[(0,) * count]

    return TensorView(view.shape[count:], view.dtype, fetch)


def expand(view: TensorView, count: int) -> TensorView:
    """Adds `count` leading axes of size one."""

    def fetch(index: Index) -> np.ndarray:
        data = view.fetch(index[count:])[(None,) * count]
        return data[tuple(slice(0, part.stop - part.start) for part in index[:count])]

    return TensorView((1,) * count + view.shape, view.dtype, fetch)


def cast(view: TensorView, dtype: np.dtype) -> TensorView:
    """Converts the element type on reading."""
    if dtype == view.dtype:
        return view
    return TensorView(view.shape, dtype, lambda index: view.fetch(index).astype(dtype))


def contiguous(array: np.ndarray) -> np.ndarray:
    """Returns the array in C order, copying only where it is not."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    copy_into(out, array)
    return out


def copy_into(out: np.ndarray, array: np.ndarray) -> None:
    """Copies `array` into `out`; a transposed source band by band, so that each cache line is read once."""
    if array.ndim < 2 or abs(array.strides[-1]) <= abs(array.strides[-2]):
        out[...] = array
        return
    band = max(1, _CACHE_LINE // array.itemsize)
    for start in range(0, array.shape[-1], band):
        out[..., start : start + band] = array[..., start : start + band]


_CACHE_LINE = 64
