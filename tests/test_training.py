"""The train step on a toy model: against plain optax, on meshes, with accumulation, EMA, and non-finite numbers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from vlm import sharding
from vlm.convert.views import TensorView, from_array
from vlm.errors import UserError
from vlm.flops import StepFlops
from vlm.layers.linear import Linear, constrain, partitioned
from vlm.optimizer import make_optimizer
from vlm.padding import TextLengths
from vlm.schema import GroupConfig, MeshConfig, OptimizerConfig, ScheduleConfig, ShardingConfig
from vlm.training import StateInit, _accumulate, init_state, make_train_step, trace_step
from vlm.tree import flatten

BATCH, WIDTH = 16, 8
CONSTANT = ScheduleConfig("constant")


class Toy(nn.Module):
    """Two towers of two layers; `odd` cannot be split over two devices."""

    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x, y, deterministic=True):
        x = Linear(16, ("embed", "mlp"), name="up")(constrain(x, "batch", None))
        x = nn.Dropout(self.dropout_rate, deterministic=deterministic)(jnp.tanh(x))
        x = Linear(WIDTH, ("mlp", "embed"), use_bias=False, name="down")(constrain(x, "batch", "mlp"))
        y = Linear(7, ("embed", "mlp"), use_bias=False, name="odd")(y)
        return x, Linear(WIDTH, ("mlp", "embed"), use_bias=False, name="last")(y)


def losses(model, kind):
    def loss(params, extra, batch, rng):
        x, y = model.apply(
            {"params": params}, batch["x"], batch["y"], deterministic=not model.dropout_rate, rngs={"dropout": rng}
        )
        if kind == "contrastive":
            logits = x @ y.T
            value = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(x.shape[0])).mean()
        else:
            value = jnp.mean((x - y) ** 2)
        extra = extra | {"seen": extra["seen"] + x.shape[0]}
        return value, ({"mean": x.mean()}, extra)

    return loss


def batch_of(step, bad=None):
    rng = np.random.default_rng(step)
    batch = {name: rng.normal(size=(BATCH, WIDTH)).astype(np.float32) for name in ("x", "y")}
    if bad is not None:
        batch["x"][3, 2] = bad
    return batch


def first_extra(params, key):
    queue = partitioned(jax.random.normal(key, (BATCH, 2)), "batch", None)
    return {"seen": jnp.zeros((), jnp.int32), "queue": queue, "teacher": {"up": params["up"]}}


class Run:
    """A compiled step on a mesh."""

    def __init__(self, config, mesh=None, kind="mse", dropout_rate=0.0, accumulation=1, start=None, frozen="float32"):
        mesh = mesh or MeshConfig(1, 1, 1)
        devices = jax.devices()[: abs(mesh.data * mesh.fsdp * mesh.tensor)]
        self.mesh, self.rules = sharding.make_mesh(mesh, devices), ShardingConfig().rules
        model, zeros = Toy(dropout_rate), jnp.zeros((1, WIDTH))
        init_params = lambda key: model.init(key, zeros, zeros)["params"]  # noqa: E731
        paths = flatten(jax.eval_shape(lambda: sharding.unbox(init_params(jax.random.key(0)))))
        self.optimizer = make_optimizer(config, paths, 10)
        init = StateInit(init_params, first_extra, self.optimizer, frozen)
        sizes = dict(self.mesh.shape)
        self.split = NamedSharding(self.mesh, sharding.batch_spec(ShardingConfig(), BATCH, sizes))
        step = make_train_step(losses(model, kind), self.optimizer, seed=5, accumulation_steps=accumulation)
        with sharding.use(self.mesh, self.rules):
            self.placements = sharding.place(init.abstract(), self.rules, sizes)
            self.state = init_state(init, self.placements, self.mesh, 0, start)
            self.traced = trace_step(step, self.state, self.put(batch_of(0)), self.split)
        self.compiled, self.start = None, jax.device_get(self.state)

    def put(self, batch):
        return sharding.put_batch(batch, self.split, BATCH)

    def reset(self, **changes):
        """Back to the first state, without compiling anything again."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        self.state = jax.device_put(self.start.replace(**changes), shardings)
        return self

    def step(self, batch):
        if self.compiled is None:  # quick to compile rather than quick to run
            options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
            self.compiled = self.traced.lower().compile(compiler_options=options)
        self.state, metrics = self.compiled(self.state, self.put(batch))
        return {name: float(value) for name, value in metrics.items()}


ADAM = OptimizerConfig(lr=1e-2, schedule=CONSTANT, weight_decay=0.1, grad_clip_norm=1.0, ema_decay=0.5)


@functools.cache
def plain_run():
    return Run(ADAM)


def test_a_step_is_plain_optax():
    run = plain_run().reset()
    params = jax.tree.map(jnp.array, run.state.params)
    mask = jax.tree.map(lambda x: x.ndim > 1, params)
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1, mask=mask))
    state, ema = plain.init(params), params
    loss = losses(Toy(), "mse")
    for step in range(3):
        metrics = run.step(batch_of(step))
        batch = {name: jnp.asarray(value) for name, value in batch_of(step).items()}
        objective = lambda p, batch=batch: loss(p, {"seen": 0}, batch, jax.random.key(0))[0]  # noqa: E731
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = plain.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: 0.5 * e + 0.5 * p, ema, params)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
        for name, tree in (("grad_norm", grads), ("param_norm", params)):
            np.testing.assert_allclose(metrics[name], optax.tree.norm(tree), rtol=1e-5, err_msg=name)
    for ours, theirs in ((run.state.params, params), (run.state.ema, ema)):
        for path, value in flatten(ours).items():
            np.testing.assert_allclose(value, flatten(theirs)[path], rtol=1e-4, atol=1e-7, err_msg=path)
    assert int(run.state.step) == 3 and int(run.state.extra["seen"]) == 3 * BATCH
    assert metrics["learning_rate"] == pytest.approx(1e-2) and "mean" in metrics


SETTINGS = {"kind": "contrastive", "dropout_rate": 0.2, "accumulation": 2}


@functools.cache
def single():
    """Losses on one device."""
    run = Run(ADAM, **SETTINGS)
    return [run.step(batch_of(step))["loss"] for step in range(4)]


MESHES = [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2), MeshConfig(1, 2, 4)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_eight_devices_equal_one(mesh):
    """Global contrastive loss, dropout, clipping, accumulation and EMA: the mesh changes the layout, not the run."""
    eight = Run(ADAM, mesh, **SETTINGS)
    kernel = eight.state.params["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (mesh.fsdp * mesh.tensor)
    ours = [eight.step(batch_of(step))["loss"] for step in range(4)]
    np.testing.assert_allclose(ours, single(), rtol=1e-5)
    queue = eight.start.extra["queue"]
    np.testing.assert_array_equal(queue, plain_run().start.extra["queue"])
    assert eight.state.extra["queue"].addressable_shards[0].data.size == queue.size // (mesh.data * mesh.fsdp)
    layouts = jax.tree.map(lambda placed, x: x.sharding.spec == placed.spec, eight.placements, eight.state)
    assert all(jax.tree.leaves(layouts))
    assert bool(sharding.replicated(eight.placements)) == (mesh.tensor > 1)


def test_accumulation_equals_the_whole_batch():
    whole, parts = plain_run().reset(), Run(ADAM, MeshConfig(2, 2, 2), accumulation=4)
    for step in range(3):
        ours, theirs = parts.step(batch_of(step)), whole.step(batch_of(step))
        for name in ("loss", "grad_norm", "mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    for path, value in flatten(parts.state.params).items():
        np.testing.assert_allclose(value, flatten(whole.state.params)[path], rtol=1e-4, atol=1e-6)
    assert int(parts.state.extra["seen"]) == 3 * BATCH


def test_every_micro_batch_draws_its_own_random_numbers():
    gradient = lambda params, extra, batch, rng: ((jax.random.uniform(rng), ({}, extra)), params)  # noqa: E731
    key, batch = jax.random.key(0), {"x": jnp.zeros((4, 1))}
    (value, _), _ = _accumulate(gradient, 2)({"a": jnp.zeros(1)}, {}, batch, key)
    draws = [jax.random.uniform(jax.random.fold_in(key, index)) for index in range(2)]
    np.testing.assert_allclose(value, np.mean(draws), rtol=1e-6)


def test_randomness_is_a_function_of_seed_and_step():
    run = Run(ADAM, dropout_rate=0.5)

    def losses_from(step):
        run.reset(step=np.int32(step))
        return [run.step(batch_of(0))["loss"] for _ in range(2)], jax.device_get(run.state)

    (a, state_a), (b, state_b), (c, _) = losses_from(0), losses_from(0), losses_from(5)
    assert a == b and a[0] != c[0]
    jax.tree.map(np.testing.assert_array_equal, state_a, state_b)


def test_a_bad_step_changes_nothing_but_its_counters():
    run = Run(ADAM, MeshConfig(2, 2, 2), accumulation=2)
    run.step(batch_of(0))
    before = jax.device_get(run.state)
    for count, bad in enumerate((np.nan, np.inf, -np.inf), start=1):
        metrics = run.step(batch_of(count, bad))
        assert metrics["bad_steps_in_a_row"] == count and not np.isfinite(metrics["grad_norm"])
        after = jax.device_get(run.state)
        for part in ("params", "opt_state", "ema", "extra"):
            jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
        assert int(after.step) == 1 + count
    metrics = run.step(batch_of(9))
    assert metrics["bad_steps"] == 3 and metrics["bad_steps_in_a_row"] == 0
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), jax.device_get(run.state.params), before.params)
    assert all(jax.tree.leaves(changed))
    assert int(run.state.opt_state["count"]) == 2


def test_an_infinite_update_is_a_bad_step():
    run = Run(OptimizerConfig(name="sgd", lr=3e38, betas=(0.0, 0.0), schedule=CONSTANT))
    before = jax.device_get(run.state.params)
    assert run.step({name: 100 * value for name, value in batch_of(0).items()})["bad_steps"] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.state.params), before)


def test_frozen_parameters_have_no_gradient_no_state_and_may_be_stored_small():
    groups = (("(up|down)/.*", GroupConfig(freeze=True)), (".*", GroupConfig()))
    config = OptimizerConfig(lr=1e-2, schedule=CONSTANT, groups=groups, ema_decay=0.9)
    run = Run(config, MeshConfig(1, 2, 1), frozen="bfloat16")
    before = jax.device_get(run.state.params)
    run.step(batch_of(0))
    after = jax.device_get(run.state.params)
    assert after["up"]["kernel"].dtype == jnp.bfloat16 and after["odd"]["kernel"].dtype == np.float32
    jax.tree.map(np.testing.assert_array_equal, after["up"], before["up"])
    assert not np.array_equal(after["odd"]["kernel"], before["odd"]["kernel"])
    assert set(run.state.ema) == {"odd", "last"}
    moments = {tuple(leaf.shape) for leaf in jax.tree.leaves(run.state.opt_state)}
    assert before["up"]["kernel"].shape not in moments


def test_starting_weights_are_read_slice_by_slice():
    value, read = np.arange(WIDTH * 16, dtype=np.float64).reshape(WIDTH, 16), []

    def fetch(index):
        read.append(value[index].size)
        return value[index]

    kernel = TensorView(value.shape, value.dtype, fetch)
    start = {"params/up/kernel": kernel, "extra/seen": jnp.asarray(7)}
    run = Run(ADAM, MeshConfig(1, 2, 4), start=start)
    np.testing.assert_array_equal(run.state.params["up"]["kernel"], value)
    np.testing.assert_array_equal(run.state.ema["up"]["kernel"], value)
    assert run.state.params["up"]["kernel"].dtype == np.float32 and int(run.state.extra["seen"]) == 7
    assert max(read) == value.size // 8
    teacher = run.state.extra["teacher"]["up"]["kernel"]
    np.testing.assert_array_equal(teacher, value)  # of the weights that the run starts from
    assert teacher.sharding == run.state.params["up"]["kernel"].sharding
    np.testing.assert_array_equal(run.state.params["down"]["kernel"], plain_run().start.params["down"]["kernel"])


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            {"params/up/kernle": from_array(np.zeros(3))},
            "the model has no 'params/up/kernle'; did you mean 'params/up/kernel'",
        ),
        ({"params/up/bias": from_array(np.zeros(3))}, r"params/up/bias has shape \(3,\), the model needs \(16,\)"),
    ],
)
def test_wrong_starting_weights(start, message):
    with pytest.raises(UserError, match=message):
        Run(ADAM, start=start)


def _text_loss(params, extra, batch, rng):
    """Sums that padding does not enter, of several arrays with a column per token."""
    hidden = params["table"][batch["tokens"]] * batch["mask"][..., None]
    labels = jnp.where(batch["token_labels"] < 0, 0, batch["token_labels"])
    value = (jnp.square(hidden.sum(1)).sum(-1) + labels.sum(1)).mean() + batch["teacher_tokens"].sum() * 0.5
    return value, ({"width": jnp.asarray(batch["tokens"].shape[1], jnp.float32)}, extra)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("devices", [1, 8])
def test_padding_that_no_text_needs_is_cut_off(devices, accumulation):
    """The shortest program that holds the longest text runs, on all devices alike, with the result of whole rows."""
    rng, length = np.random.default_rng(0), 20
    mesh = sharding.make_mesh(MeshConfig(devices, 1, 1), jax.devices()[:devices])
    optimizer = make_optimizer(ADAM, ["table"], 10)
    rows = NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {"table": jnp.asarray(rng.normal(size=(9, 3)), jnp.float32)}
    start = StateInit(lambda key: params, lambda params, key: {}, optimizer).finish(params, {})
    state = jax.device_put(start, NamedSharding(mesh, jax.sharding.PartitionSpec()))

    def batch(longest):
        lengths = np.full((16, 1), 3)
        lengths[13] = longest
        mask = np.arange(length)[None] < lengths
        tokens = np.where(mask, rng.integers(1, 9, (16, length)), 0)
        labels = np.where(mask, tokens, -100)
        return {"tokens": tokens, "mask": mask, "token_labels": labels, "teacher_tokens": tokens[:, :length]}

    with sharding.use(mesh, ShardingConfig().rules):
        whole, cut = (
            jax.jit(make_train_step(_text_loss, optimizer, 0, accumulation, texts))
            for texts in (None, TextLengths((12, 4, 30)))
        )
        for longest, chosen in ((3, 4), (4, 4), (5, 12), (12, 12), (13, 20), (20, 20)):
            placed = {name: jax.device_put(value, rows) for name, value in batch(longest).items()}
            expected, found = whole(state, placed), cut(state, placed)
            assert found[1]["text_length"] == found[1]["width"] == chosen
            assert expected[1]["width"] == length
            np.testing.assert_allclose(found[1]["loss"], expected[1]["loss"], rtol=1e-6)
            np.testing.assert_allclose(found[0].params["table"], expected[0].params["table"], rtol=1e-6)


def test_several_hosts_cut_as_one_does():
    """To one length for all micro-batches, so that dropout's masks do not depend on the number of hosts."""
    optimizer = make_optimizer(ADAM, ["table"], 10)
    rng = np.random.default_rng(0)
    params = {"table": jnp.asarray(rng.normal(size=(9, 3)), jnp.float32)}
    state = StateInit(lambda key: params, lambda params, key: {}, optimizer).finish(params, {})
    mask = np.arange(20) < np.array([[3], [2], [3], [11]])  # in two micro-batches of rows 0 and 2, and 1 and 3
    batch = {"tokens": rng.integers(0, 9, mask.shape), "mask": mask}

    def loss(params, extra, batch, rng):
        hidden = params["table"][batch["tokens"]] * jax.random.bernoulli(rng, 0.5, batch["mask"].shape)[..., None]
        return jnp.square((hidden * batch["mask"][..., None]).sum(1)).mean(), ({}, extra)

    texts = TextLengths((4, 12))
    several, one = (jax.jit(make_train_step(loss, optimizer, 0, 2, texts)) for texts in (texts, None))
    found, expected = several(state, batch)[1]["loss"], one(state, texts.fit(batch))[1]["loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert abs(one(state, batch)[1]["loss"] / expected - 1) > 1e-3  # whole rows have other masks


def test_step_flops_of_cut_rows():
    flops = StepFlops(100.0, (4, 12, 20), (20.0, 60.0, 100.0))
    assert flops.of({"text_length": 12.0}) == 60 and flops.of({"text_length": 8.0}) == 40
    assert flops.of({}) == StepFlops(100.0).of({"text_length": 4.0}) == 100
