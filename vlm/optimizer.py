"""The update rule: which parameters learn, how fast, and how.

Frozen parameters are taken out of the tree before anything else happens: no gradient is computed for them, they have
no optimizer state, they count in no norm. A step that is not finite leaves parameters and optimizer state untouched.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from vlm.errors import UserError
from vlm.schema import GroupConfig, OptimizerConfig, ScheduleConfig
from vlm.tree import flatten, match_first, unflatten

Params = dict[str, Any]
TEMPERATURES = ("logit_scale", "temperature")
"""What a model without a joint space lacks: patterns that configurations of a family share may name it in vain."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What `make_optimizer` resolved from a config and the parameters' paths.

    Attributes:
      groups: the settings of every parameter, by path.
      decay: weight decay of every trainable parameter, by path.
      schedule: step → learning rate.
      rule: how gradients change parameters.
      bounds: range of every trainable parameter that has one, by path.
      ema_decay: None without an average.
    """

    groups: Mapping[str, GroupConfig]
    decay: Mapping[str, float]
    schedule: optax.Schedule
    rule: Rule
    ema_decay: float | None
    bounds: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def bounded(self, params: Params, good: jax.Array | bool = True) -> Params:
        """`params` (boxed or not) with the bounded ones kept in their range, where `good`."""
        flat = flatten(params)
        kept = {}
        for path, ends in self.bounds.items():
            kept[path] = jax.tree.map(lambda x, ends=ends: jnp.where(good, jnp.clip(x, *ends), x), flat[path])
        return unflatten(flat | kept)

    def split(self, params: Params) -> tuple[Params, Params]:
        """Takes `params` (boxed or not) apart into (trainable, frozen), both nested dicts."""
        flat = flatten(params)
        frozen = {path: leaf for path, leaf in flat.items() if self.groups[path].freeze}
        return unflatten({path: leaf for path, leaf in flat.items() if path not in frozen}), unflatten(frozen)

    def step_sizes(self, learning_rate: jax.Array) -> Params:
        """The learning rate of every trainable parameter."""
        groups = self.groups.items()
        return unflatten({path: learning_rate * g.lr_multiplier for path, g in groups if not g.freeze})


class Rule(Protocol):
    """An update rule with clipping and decoupled weight decay."""

    def init(self, params: Params) -> Any:
        """State at step 0."""
        ...

    def apply(
        self, grads: Params, grad_norm: jax.Array, state: Any, params: Params, step_sizes: Params, good: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        """Returns (parameters, state, good); unless `good`, parameters and state are the given ones, bit for bit.

        Args:
          grad_norm: global norm of `grads`; step_sizes: learning rate of each parameter.
          good: bool[], whether loss and gradients are finite; the result may be false where it was true.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Adam:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on clipped gradients.

    Equal to optax's, but written so that the compiled step changes parameters and moments where they lie: the
    direction is computed from the guarded moments, which are outputs anyway. Guarding optax's results instead keeps
    four more copies of the parameters and takes three times as long on CPU.
    """

    b1: float
    b2: float
    eps: float
    clip_norm: float | None
    decay: Params

    def init(self, params: Params) -> dict[str, Any]:
        """Zero moments."""
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"count": jnp.zeros((), jnp.int32), "mu": zeros, "nu": jax.tree.map(jnp.zeros_like, params)}

    def apply(
        self, grads: Params, grad_norm: jax.Array, state: Any, params: Params, step_sizes: Params, good: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        """See `Rule`."""
        good = good & jax.tree.reduce(lambda ok, size: ok & jnp.isfinite(size), step_sizes, good)
        divisor = jnp.ones(()) if self.clip_norm is None else jnp.maximum(grad_norm / self.clip_norm, 1.0)
        count = state["count"] + good.astype(jnp.int32)
        b1, b2 = self.b1, self.b2
        keep = lambda after, before: jnp.where(good, after, before)  # noqa: E731
        mu = jax.tree.map(lambda g, m: keep(b1 * m + (1 - b1) * (g / divisor), m), grads, state["mu"])
        # Not jnp.square, which the norm of the gradients has computed: the compiler would keep it for both as an array.
        nu = jax.tree.map(lambda g, v: keep(b2 * v + ((1 - b2) * (g / divisor)) * (g / divisor), v), grads, state["nu"])
        corrected = jnp.maximum(count, 1).astype(jnp.float32)
        first, second = 1 - b1**corrected, 1 - b2**corrected

        def move(p: jax.Array, m: jax.Array, v: jax.Array, size: jax.Array, decay: float) -> jax.Array:
            direction = (m / first) / (jnp.sqrt(v / second) + self.eps)
            return keep(p - size * (direction + decay * p if decay else direction), p)

        params = jax.tree.map(move, params, mu, nu, step_sizes, self.decay)
        return params, {"count": count, "mu": mu, "nu": nu}, good


@dataclasses.dataclass(frozen=True)
class Optax:
    """Any optax transformation from gradients to descent directions at learning rate 1 (sign not yet flipped)."""

    transform: optax.GradientTransformation

    def init(self, params: Params) -> Any:
        """The transformation's state."""
        return self.transform.init(params)

    def apply(
        self, grads: Params, grad_norm: jax.Array, state: Any, params: Params, step_sizes: Params, good: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        """See `Rule`; a step whose update is not finite is not good either."""
        directions, after = self.transform.update(grads, state, params)
        updates = jax.tree.map(lambda size, d: -size * d, step_sizes, directions)
        good = good & jnp.isfinite(optax.tree.norm(updates))
        new = optax.apply_updates(params, updates)
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), (new, after), (params, state))
        return *kept, good


def merge(trainable: Params, frozen: Params) -> Params:
    """Undoes `Optimizer.split`."""
    return unflatten(flatten(trainable) | flatten(frozen))


def make_optimizer(config: OptimizerConfig, paths: Iterable[str], steps: int) -> Optimizer:
    """Resolves groups, decay and schedule for the parameters at `paths`.

    Raises:
      UserError: a path without a group, a group or another pattern without a path, nothing to train, warm-up longer
        than the run.
    """
    paths = sorted(paths)
    groups = match_first(config.groups, paths)
    trainable = [path for path, group in groups.items() if not group.freeze]
    if not trainable:
        raise UserError("config.optimizer.groups freeze every parameter: nothing is left to train")
    _check_patterns("decay_exclude", config.decay_exclude, OptimizerConfig.decay_exclude, paths)
    _check_patterns("bounds", [bound[0] for bound in config.bounds], [b[0] for b in OptimizerConfig.bounds], paths)
    decay = {path: _decay(config, groups[path], path) for path in trainable}
    rule = _rule(config, unflatten(decay))
    return Optimizer(groups, decay, learning_rate(config, steps), rule, config.ema_decay, _bounds(config, trainable))


def _check_patterns(name: str, patterns: Iterable[str], usual: Sequence[str], paths: Iterable[str]) -> None:
    """Every pattern must match a parameter; those of the defaults need not, which are for all models."""
    for pattern in patterns:
        try:
            found = any(re.fullmatch(pattern, path) for path in (*paths, *TEMPERATURES))
        except re.error:
            raise UserError(f"config.optimizer.{name}: {pattern!r} is not a regular expression") from None
        if not found and pattern not in usual:
            raise UserError(f"config.optimizer.{name}: {pattern!r} matches no parameter")


def _decay(config: OptimizerConfig, group: GroupConfig, path: str) -> float:
    if any(re.fullmatch(pattern, path) for pattern in config.decay_exclude):
        return 0.0
    return config.weight_decay if group.weight_decay is None else group.weight_decay


def _bounds(config: OptimizerConfig, trainable: Iterable[str]) -> dict[str, tuple[float, float]]:
    return {
        path: (low, high) for path in trainable for pattern, low, high in config.bounds if re.fullmatch(pattern, path)
    }


def _rule(config: OptimizerConfig, decay: Params) -> Rule:
    b1, b2 = config.betas
    if config.name == "adamw":
        return Adam(b1, b2, config.eps, config.grad_clip_norm, decay)
    clip = optax.identity() if config.grad_clip_norm is None else optax.clip_by_global_norm(config.grad_clip_norm)
    if config.name == "lion":
        rule = optax.scale_by_lion(b1, b2)
    elif config.name == "sgd":
        rule = optax.trace(b1) if b1 else optax.identity()
    else:  # Adafactor (Shazeer & Stern 2018) without momentum; a stack of layers is one matrix stack
        rule = optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
        )
    return Optax(optax.chain(clip, rule, _decoupled_decay(decay)))


def _decoupled_decay(weights: Params) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        if params is None:
            raise ValueError("weight decay needs the parameters")
        return jax.tree.map(lambda u, p, w: u + w * p if w else u, updates, params, weights)

    return optax.stateless(update) if any(jax.tree.leaves(weights)) else optax.identity()


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step (from 0) → learning rate; see `ScheduleConfig`. The first step of a warm-up has rate start_factor × peak.

    Raises:
      UserError: warm-up and cool-down together are longer than the run.
    """
    schedule, peak = config.schedule, config.lr
    warmup, cooldown = schedule.warmup_steps, schedule.cooldown_steps
    if warmup + cooldown > steps:
        raise UserError(
            f"config.optimizer.schedule: warmup_steps={warmup} and cooldown_steps={cooldown} exceed train.steps={steps}"
        )
    rest, epoch = max(steps - warmup, 1), schedule.epoch_steps or 1
    if schedule.name == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, schedule.end_factor)
    elif schedule.name == "linear":
        main = optax.linear_schedule(peak, peak * schedule.end_factor, rest)
    elif schedule.name == "rsqrt":
        timescale = max(warmup, 1)
        main = lambda step: peak * jnp.sqrt(timescale / (timescale + step))  # noqa: E731
    elif schedule.name == "exponential":
        main = lambda step: peak * _decayed(schedule, (step + warmup) // epoch)  # noqa: E731
    else:
        main = optax.constant_schedule(peak)
    within = main if epoch == 1 or schedule.name == "exponential" else lambda step: main(step // epoch * epoch)
    start = optax.linear_schedule(schedule.start_factor * peak, peak, warmup)
    joined = optax.join_schedules([start, within], [warmup]) if warmup else within
    if not cooldown:
        return joined
    return lambda step: joined(step) * jnp.clip((steps - step) / cooldown, 0.0, 1.0)


def _decayed(schedule: ScheduleConfig, epoch: jax.Array | int) -> jax.Array:
    return jnp.maximum(jnp.float32(schedule.decay_rate) ** epoch, schedule.end_factor)


def update_ema(ema: Params, params: Any, decay: float) -> Params:
    """`decay · ema + (1 - decay) · params`."""
    return jax.tree.map(lambda average, value: average + (1.0 - decay) * (value - average), ema, params)
