"""What public functions take as an array: jax's own, traced or not, or NumPy's. They return jax's."""

from __future__ import annotations

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
