"""Counting the arithmetic of a traced program, and what devices could do at best.

XLA's own cost analysis counts the body of a loop once, which under a scan over layers is 10 to 40 times too low; here
a scan counts as often as it runs. Only matrix products and convolutions count, as is usual for utilisation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# Dense bfloat16 TFLOP/s of one device, from the vendors' data sheets. Matched on the beginning of `device_kind`.
PEAK_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
    "TPU v3": 61.5,  # JAX sees each of a chip's two cores as a device
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v6": 918.0,
    "TPU7x": 1153.0,  # half a chip per device
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one device, or None when the table does not know it."""
    for kind, tflops in PEAK_TFLOPS.items():
        if device_kind.startswith(kind):
            return tflops * 1e12
    return None


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Model FLOPs of a training step, without recomputation.

    Attributes:
      whole: with whole rows of text.
      lengths, counts: with texts of each length (`train.text_lengths`), ascending.
    """

    whole: float
    lengths: tuple[int, ...] = ()
    counts: tuple[float, ...] = ()

    def of(self, metrics: Mapping[str, Any]) -> float:
        """FLOPs of the step that gave these metrics."""
        if not self.lengths or "text_length" not in metrics:
            return self.whole
        return float(np.interp(float(metrics["text_length"]), self.lengths, self.counts))


def count_flops(jaxpr: Any) -> float:
    """FLOPs of one run of a jaxpr (open or closed): 2 per multiply-add, loops as often as they run.

    A `while` loop counts once (its trip count is not in the program) and of a `cond` the costliest branch.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_count(equation) for equation in jaxpr.eqns)


def _count(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * equation.outvars[0].aval.size * depth
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * equation.outvars[0].aval.size * kernel.size / features
    if name.startswith("dot_product_attention"):  # cuDNN: query [B, T, N, D], key [B, S, K, D]
        query, key = (equation.invars[i].aval.shape for i in (0, 1))
        return (10.0 if "bwd" in name else 4.0) * math.prod(query) * key[1]
    inner = [count_flops(value) for value in _programs(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner, default=0.0)
    if name == "shard_map":  # the body sees the shapes of one device
        mesh, manual = params["mesh"], params.get("manual_axes") or params["mesh"].axis_names
        return math.prod(mesh.shape[axis] for axis in manual) * sum(inner)
    return float(sum(inner))


def _programs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters; rules for derivatives are functions and are not among them."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                found.append(item)
    return found
