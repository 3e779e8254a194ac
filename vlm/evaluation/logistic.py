"""Multinomial logistic regression on fixed features, by L-BFGS (optax), and the sweep over its penalty."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

SWEEP = tuple(float(value) for value in np.logspace(-6, 6, 97))
"""Penalties that `sweep` may choose (Radford et al. 2021, appendix A.3)."""

Weights = tuple[Float[np.ndarray, "d c"], Float[np.ndarray, " c"]]


def fit(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    num_classes: int,
    penalty: float,
    *,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
) -> Weights:
    """Kernel and bias that minimise the mean negative log-likelihood + penalty / (2 n) · ‖kernel‖².

    That is scikit-learn's objective with C = 1 / penalty; the bias is not penalised.

    Args:
      tolerance: iterations end when no gradient entry is larger.
    """
    kernel, bias = _fit(
        jnp.asarray(features, jnp.float32),
        jnp.asarray(labels),
        jnp.asarray(penalty, jnp.float32),
        jnp.asarray(tolerance, jnp.float32),
        num_classes,
        max_iterations,
    )
    return np.asarray(kernel), np.asarray(bias)


def fit_sklearn(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    num_classes: int,
    penalty: float,
    *,
    max_iterations: int = 1000,
) -> Weights:
    """The same by scikit-learn, the protocol of the papers; needs the extra `probe`."""
    from sklearn.linear_model import LogisticRegression

    # Of two classes scikit-learn keeps the difference of the two kernels, whose penalty is twice theirs.
    strength = 1 / penalty if len(np.unique(labels)) > 2 else 2 / penalty
    model = LogisticRegression(C=strength, max_iter=max_iterations).fit(features, labels)
    kernel, bias = np.zeros((features.shape[1], num_classes)), np.full(num_classes, -np.inf)
    if len(model.classes_) == 2:
        kernel[:, model.classes_], bias[model.classes_] = np.stack([-model.coef_[0], model.coef_[0]], 1) / 2, 0.0
        bias[model.classes_] = [-model.intercept_[0] / 2, model.intercept_[0] / 2]
    else:
        kernel[:, model.classes_], bias[model.classes_] = model.coef_.T, model.intercept_
    return kernel, np.where(np.isfinite(bias), bias, -1e9)


def sweep(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The penalty of `SWEEP` with the best score, and all scores that were looked at.

    Seven coarse penalties first, then around the best with a step that halves from 8 to 1, as CLIP did. Of equal scores
    the larger penalty wins.
    """
    seen: dict[int, float] = {}

    def best_of(candidates: list[int]) -> int:
        for index in candidates:
            if 0 <= index < len(SWEEP) and index not in seen:
                seen[index] = score(SWEEP[index])
        return max(seen, key=lambda index: (seen[index], index))

    best = best_of(list(range(0, len(SWEEP), 16)))
    for step in (8, 4, 2, 1):
        best = best_of([best - step, best + step])
    return SWEEP[best], {SWEEP[index]: value for index, value in sorted(seen.items())}


@functools.partial(jax.jit, static_argnums=(4, 5))
def _fit(
    features: jax.Array,
    labels: jax.Array,
    penalty: jax.Array,
    tolerance: jax.Array,
    num_classes: int,
    max_iterations: int,
) -> tuple[jax.Array, jax.Array]:
    count, width = features.shape

    def objective(weights: tuple[jax.Array, jax.Array]) -> jax.Array:
        kernel, bias = weights
        logits = jnp.dot(features, kernel, precision="highest") + bias[None, :]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss + penalty / (2 * count) * jnp.sum(kernel**2)

    solver = optax.lbfgs(memory_size=10)
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: tuple) -> tuple:
        weights, state, iteration, _ = carry
        value, gradient = value_and_grad(weights, state=state)
        updates, state = solver.update(gradient, state, weights, value=value, grad=gradient, value_fn=objective)
        weights = optax.apply_updates(weights, updates)
        largest = functools.reduce(jnp.maximum, (jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient)))
        return weights, state, iteration + 1, largest

    def unfinished(carry: tuple) -> jax.Array:
        return (carry[2] < max_iterations) & (carry[3] > tolerance)

    weights = (jnp.zeros((width, num_classes)), jnp.zeros(num_classes))
    return jax.lax.while_loop(unfinished, step, (weights, solver.init(weights), 0, jnp.inf))[0]
