"""The update rule: which parameters learn, how fast, and by which optax transformation.

Frozen parameters are taken out of the tree before anything else happens: no gradient is computed for them, they have
no optimizer state, they count in no norm. The learning rate is a function of the step and is applied outside the
optax chain, so that a skipped step leaves the optimizer state untouched.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlm.errors import UserError
from vlm.schema import GroupConfig, OptimizerConfig
from vlm.tree import flatten, match_first, unflatten

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What `make_optimizer` resolved from a config and the parameters' paths.

    Attributes:
      groups: the settings of every parameter, by path.
      decay: weight decay of every trainable parameter, by path.
      schedule: step → learning rate.
      transform: gradients → descent directions at learning rate 1 (clipped, decayed, sign not yet flipped).
      ema_decay: None without an average.
    """

    groups: Mapping[str, GroupConfig]
    decay: Mapping[str, float]
    schedule: optax.Schedule
    transform: optax.GradientTransformation
    ema_decay: float | None

    def split(self, params: Params) -> tuple[Params, Params]:
        """Takes `params` (boxed or not) apart into (trainable, frozen), both nested dicts."""
        flat = flatten(params)
        frozen = {path: leaf for path, leaf in flat.items() if self.groups[path].freeze}
        return unflatten({path: leaf for path, leaf in flat.items() if path not in frozen}), unflatten(frozen)

    def step_sizes(self, learning_rate: jax.Array) -> Params:
        """The learning rate of every trainable parameter."""
        groups = self.groups.items()
        return unflatten({path: learning_rate * g.lr_multiplier for path, g in groups if not g.freeze})


def merge(trainable: Params, frozen: Params) -> Params:
    """Undoes `Optimizer.split`."""
    return unflatten(flatten(trainable) | flatten(frozen))


def make_optimizer(config: OptimizerConfig, paths: Iterable[str], steps: int) -> Optimizer:
    """Resolves groups, decay and schedule for the parameters at `paths`.

    Raises:
      UserError: a path without a group, a group without a path, nothing to train, warm-up longer than the run.
    """
    groups = match_first(config.groups, sorted(paths))
    trainable = [path for path, group in groups.items() if not group.freeze]
    if not trainable:
        raise UserError("config.optimizer.groups freeze every parameter: nothing is left to train")
    decay = {path: _decay(config, groups[path], path) for path in trainable}
    rule = _rule(config)
    chain = [
        optax.clip_by_global_norm(config.grad_clip_norm) if config.grad_clip_norm is not None else optax.identity(),
        rule,
        _decoupled_decay(decay),
    ]
    return Optimizer(groups, decay, learning_rate(config, steps), optax.chain(*chain), config.ema_decay)


def _decay(config: OptimizerConfig, group: GroupConfig, path: str) -> float:
    try:
        excluded = any(re.fullmatch(pattern, path) for pattern in config.decay_exclude)
    except re.error as error:
        raise UserError(f"config.optimizer.decay_exclude: {error.pattern!r} is not a regular expression") from None
    if excluded:
        return 0.0
    return config.weight_decay if group.weight_decay is None else group.weight_decay


def _rule(config: OptimizerConfig) -> optax.GradientTransformation:
    b1, b2 = config.betas
    if config.name == "adamw":
        return optax.scale_by_adam(b1, b2, config.eps)
    if config.name == "lion":
        return optax.scale_by_lion(b1, b2)
    if config.name == "sgd":
        return optax.trace(b1) if b1 else optax.identity()
    return optax.chain(  # Adafactor (Shazeer & Stern 2018) without momentum; a stack of layers is one matrix stack
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
    )


def _decoupled_decay(decay: Mapping[str, float]) -> optax.GradientTransformation:
    weights = unflatten(decay)

    def update(updates: Any, params: Any) -> Any:
        if params is None:
            raise ValueError("weight decay needs the parameters")
        return jax.tree.map(lambda u, p, w: u + w * p if w else u, updates, params, weights)

    return optax.stateless(update) if any(decay.values()) else optax.identity()


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step (from 0) → learning rate; see `ScheduleConfig`. The first step of a warm-up has rate 0.

    Raises:
      UserError: warm-up and cool-down together are longer than the run.
    """
    schedule, peak = config.schedule, config.lr
    warmup, cooldown = schedule.warmup_steps, schedule.cooldown_steps
    if warmup + cooldown > steps:
        raise UserError(
            f"config.optimizer.schedule: warmup_steps={warmup} and cooldown_steps={cooldown} exceed train.steps={steps}"
        )
    rest = max(steps - warmup, 1)
    if schedule.name == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, schedule.end_factor)
    elif schedule.name == "linear":
        main = optax.linear_schedule(peak, peak * schedule.end_factor, rest)
    elif schedule.name == "rsqrt":
        timescale = max(warmup, 1)
        main = lambda step: peak * jnp.sqrt(timescale / (timescale + step))  # noqa: E731
    else:
        main = optax.constant_schedule(peak)
    joined = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup]) if warmup else main
    if not cooldown:
        return joined
    return lambda step: joined(step) * jnp.clip((steps - step) / cooldown, 0.0, 1.0)


def update_ema(ema: Params, params: Any, decay: float) -> Params:
    """`decay · ema + (1 - decay) · params`."""
    return jax.tree.map(lambda average, value: average + (1.0 - decay) * (value - average), ema, params)
