"""Which patches of a picture are hidden: blocks of random size and shape (BEiT, Bao et al. 2021, algorithm 1)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Bool

from vlm.errors import UserError

_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """Sizes of blocks; the defaults are FLAVA's for 14 × 14 patches.

    Attributes:
        min_patches, max_patches: of a block; None: no limit but the number that is still missing.
        min_aspect, max_aspect: range of height / width, drawn evenly on a log scale; None: 1 / min_aspect.
    """

    min_patches: int = 16
    max_patches: int | None = None
    min_aspect: float = 0.3
    max_aspect: float | None = None

    def __post_init__(self) -> None:
        if self.min_patches < 1 or (self.max_patches is not None and self.max_patches < 1):
            raise UserError(f"blocks: expected at least 1 patch, found {self.min_patches} to {self.max_patches}")
        if not 0 < self.min_aspect <= self.highest_aspect:
            raise UserError(
                f"blocks: expected 0 < min_aspect <= max_aspect, found {self.min_aspect}, {self.max_aspect}"
            )

    @property
    def highest_aspect(self) -> float:
        """The upper end of the range of aspects."""
        return self.max_aspect or 1 / self.min_aspect


def block_mask(
    grid: tuple[int, int], total: int, rng: np.random.Generator, settings: BlockSettings | None = None
) -> Bool[np.ndarray, "rows columns"]:
    """Draws blocks until `total` patches are hidden, or until ten in a row do not fit.

    So a mask never has more than `total`, and may have fewer: of 75 in 14 × 14, two masks of three have all. A block
    is strictly smaller than the grid in both directions.
    """
    settings = settings or BlockSettings()
    mask = np.zeros(grid, bool)
    missing = total
    while missing > 0:
        limit = missing if settings.max_patches is None else min(missing, settings.max_patches)
        added = _add_block(mask, limit, rng, settings)
        if not added:
            break
        missing -= added
    return mask


def _add_block(mask: np.ndarray, limit: int, rng: np.random.Generator, settings: BlockSettings) -> int:
    """Hides one block that adds at most `limit` patches; returns how many it added, 0 where none fitted."""
    rows, columns = mask.shape
    lowest, highest = math.log(settings.min_aspect), math.log(settings.highest_aspect)
    for _ in range(_ATTEMPTS):
        area = _uniform(rng, settings.min_patches, limit)
        aspect = math.exp(_uniform(rng, lowest, highest))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        block = mask[top : top + height, left : left + width]
        added = block.size - int(np.count_nonzero(block))
        if 0 < added <= limit:
            block[:] = True
            return added
    return 0


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Between two numbers in either order: the last blocks may be smaller than `min_patches`."""
    return low + (high - low) * rng.random()
