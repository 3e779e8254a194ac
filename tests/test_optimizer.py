"""Groups, decay, clipping, schedules and averages, each against plain optax or arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm.errors import UserError
from vlm.optimizer import learning_rate, make_optimizer, merge, update_ema
from vlm.schema import GroupConfig, OptimizerConfig, ScheduleConfig
from vlm.tree import flatten

PATHS = ("text/kernel", "text/bias", "vision/kernel", "logit_scale")


def tree(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "text": {"kernel": draw(4, 3), "bias": draw(3)},
        "vision": {"kernel": draw(2, 2)},
        "logit_scale": draw(),
    }


def run(optimizer, params, steps, gradient=tree):
    state = optimizer.rule.init(optimizer.split(params)[0])
    for step in range(steps):
        trainable, frozen = optimizer.split(params)
        grads, _ = optimizer.split(gradient(step))
        norm, sizes = optax.tree.norm(grads), optimizer.step_sizes(optimizer.schedule(step))
        trainable, state, good = optimizer.rule.apply(grads, norm, state, trainable, sizes, jnp.array(True))
        assert good
        params = merge(trainable, frozen)
    return params, state


def run_optax(transform, params, steps):
    state = transform.init(params)
    for step in range(steps):
        updates, state = transform.update(tree(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(ours, theirs):
    for path, value in flatten(ours).items():
        np.testing.assert_allclose(value, flatten(theirs)[path], rtol=2e-6, atol=1e-7, err_msg=path)


def test_adamw_with_clipping_decay_mask_and_schedule_is_optax():
    schedule = ScheduleConfig("cosine", warmup_steps=2, end_factor=0.1)
    config = OptimizerConfig(
        lr=1e-2, schedule=schedule, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, grad_clip_norm=0.5
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 6, 1e-3)
    mask = {"text": {"kernel": True, "bias": False}, "vision": {"kernel": True}, "logit_scale": False}
    plain = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(rate, 0.9, 0.95, 1e-6, weight_decay=0.1, mask=mask))
    ours, _ = run(make_optimizer(config, PATHS, 6), tree(99), 6)
    assert_close(ours, run_optax(plain, tree(99), 6))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("sgd", optax.sgd(1e-2, momentum=0.9)),
        ("lion", optax.lion(1e-2, 0.9, 0.999, weight_decay=0.0)),
        ("adafactor", optax.adafactor(1e-2)),
    ],
)
def test_other_rules_are_optax(name, plain):
    config = OptimizerConfig(name=name, lr=1e-2, schedule=ScheduleConfig("constant"))
    ours, _ = run(make_optimizer(config, PATHS, 4), tree(99), 4)
    assert_close(ours, run_optax(plain, tree(99), 4))


def test_groups_freeze_scale_and_decay():
    groups = (
        ("vision/.*", GroupConfig(freeze=True)),
        (".*/kernel", GroupConfig(lr_multiplier=0.5, weight_decay=0.2)),
        (".*", GroupConfig()),
    )
    config = OptimizerConfig(
        name="sgd", lr=0.1, betas=(0.0, 0.0), schedule=ScheduleConfig("constant"), weight_decay=0.4, groups=groups
    )
    optimizer = make_optimizer(config, PATHS, 1)
    before, gradient = tree(99), tree(0)
    after, state = run(optimizer, before, 1)
    np.testing.assert_array_equal(after["vision"]["kernel"], before["vision"]["kernel"])
    expected = before["text"]["kernel"] - 0.05 * (gradient["text"]["kernel"] + 0.2 * before["text"]["kernel"])
    np.testing.assert_allclose(after["text"]["kernel"], expected, rtol=1e-6)
    expected = before["text"]["bias"] - 0.1 * gradient["text"]["bias"]
    np.testing.assert_allclose(after["text"]["bias"], expected, rtol=1e-6)
    assert optimizer.decay == {"text/kernel": 0.2, "text/bias": 0.0, "logit_scale": 0.0}
    adam = make_optimizer(OptimizerConfig(groups=groups), PATHS, 1)
    shapes = {leaf.shape for leaf in jax.tree.leaves(adam.rule.init(adam.split(before)[0]))}
    assert (2, 2) not in shapes and (4, 3) in shapes


def test_clipping_counts_trainable_gradients_only():
    groups = (("vision/.*", GroupConfig(freeze=True)), (".*", GroupConfig()))
    config = OptimizerConfig(
        name="sgd", lr=1.0, betas=(0.0, 0.0), schedule=ScheduleConfig("constant"), grad_clip_norm=0.25, groups=groups
    )
    before = tree(99)
    after, _ = run(make_optimizer(config, PATHS, 1), before, 1)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, after, before))
    np.testing.assert_allclose(moved, 0.25, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": (("text/.*", GroupConfig()),)}, "no rule matches logit_scale, vision/kernel"),
        ({"groups": (("txet/.*", GroupConfig()), (".*", GroupConfig()))}, "nothing matches the rule txet"),
        ({"groups": ((".*", GroupConfig(freeze=True)),)}, "nothing is left to train"),
        ({"groups": (("(", GroupConfig()),)}, "not a regular expression"),
        ({"decay_exclude": ("(",)}, "decay_exclude: '\\(' is not a regular expression"),
        ({"schedule": ScheduleConfig(warmup_steps=11)}, "warmup_steps=11 .* exceed train.steps=10"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimizerConfig(**changes), PATHS, 10)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleConfig("constant"), [2, 2, 2, 2]),
        (ScheduleConfig("constant", warmup_steps=8), [0, 0.5, 1, 1.75]),
        (ScheduleConfig("linear", warmup_steps=4), [0, 1, 2, 0.5]),
        (ScheduleConfig("linear", end_factor=0.5), [2, 1.75, 1.5, 1.125]),
        (ScheduleConfig("rsqrt", warmup_steps=1), [0, 2 / 2**0.5, 1, 2 / 7**0.5]),
        (ScheduleConfig("constant", warmup_steps=2, cooldown_steps=4), [0, 2, 2, 0.5]),
        (ScheduleConfig("constant", warmup_steps=4, start_factor=0.5), [1, 1.5, 2, 2]),
        (ScheduleConfig("linear", epoch_steps=4), [2, 2, 1, 1]),
        (ScheduleConfig("cosine", epoch_steps=4, end_factor=0.5), [2, 2, 1.5, 1.5]),
        (ScheduleConfig("exponential", epoch_steps=3, decay_rate=0.5, end_factor=0.375), [2, 2, 1, 0.75]),
        (ScheduleConfig("exponential", 2, 0.25, epoch_steps=3, decay_rate=0.5), [0.5, 2, 1, 0.5]),
    ],
)
def test_schedules(schedule, expected):
    rate = learning_rate(OptimizerConfig(lr=2.0, schedule=schedule), 8)
    np.testing.assert_allclose([rate(jnp.asarray(step)) for step in (0, 2, 4, 7)], expected, rtol=1e-6)


def test_ema():
    average = update_ema({"a": jnp.asarray([1.0, 2.0])}, {"a": jnp.asarray([3.0, 2.0])}, 0.75)
    np.testing.assert_allclose(average["a"], [1.5, 2.0])


@pytest.mark.parametrize("changes", [{"grad_clip_norm": 0.0}, {"eps": 0.0}])
def test_zeros_that_would_break_the_update_are_refused(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: .* found 0"):
        OptimizerConfig(**changes)


def test_bounds_keep_a_parameter_in_its_range_unless_the_step_is_bad():
    optimizer = make_optimizer(OptimizerConfig(bounds=(("logit_scale", 0.0, 4.6), ("text/bias", -1.0, 1.0))), PATHS, 1)
    params = tree(0) | {"logit_scale": jnp.float32(5.0)}
    kept = optimizer.bounded(params, jnp.array(True))
    assert kept["logit_scale"] == jnp.float32(4.6) and np.abs(kept["text"]["bias"]).max() <= 1
    np.testing.assert_array_equal(kept["text"]["kernel"], params["text"]["kernel"])
    assert optimizer.bounded(params, jnp.array(False))["logit_scale"] == 5.0
    default = make_optimizer(OptimizerConfig(), PATHS, 1)
    np.testing.assert_allclose(default.bounds["logit_scale"], (0.0, np.log(100.0)), rtol=1e-12)
