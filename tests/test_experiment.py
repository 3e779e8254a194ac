"""The parts of a real family's run: AltCLIP's contrastive training on meshes, checkpoints that start the next stage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from vlm import schema, sharding
from vlm.checks import check_batch, reaches
from vlm.config import build, complete
from vlm.errors import UserError
from vlm.experiment import compile_step, experiment, text_lengths
from vlm.flops import count_flops
from vlm.training import init_state, make_train_step, trace_step
from vlm.tree import flatten

from .quick import no_array_is_gathered_for_want_of_a_layout, products

BATCH, LENGTH = 16, 6
TOWER = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "mlp_dim": 32}
MODEL = {
    "vision": TOWER | {"image_size": 8, "patch_size": 4},
    "text": TOWER | {"vocab_size": 50, "max_length": 12},
    "project_dim": 16,
    "projection_dim": 12,
}
PROCESSOR = {"image": {"size": 8, "crop": 8}, "max_length": LENGTH}
GROUPS = (("vision/.*|vision_projection/.*", {"freeze": True}), (".*", {}))


DATA = {"batch_size": BATCH, "sources": ({"kind": "jsonl", "path": "absent"},)}
FROZEN = (".*", {"freeze": True})
LEARNING = {"objective": "teacher_learning"}
CLIP = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}


def settings(**changes):
    config = {"family": "altclip", "model": MODEL, "processor": PROCESSOR, "data": {"batch_size": BATCH}} | changes
    config.setdefault("optimizer", {"lr": 1e-2, "schedule": {"name": "constant"}, "grad_clip_norm": 1.0})
    config.setdefault("loss", {"lock_image": "groups" in config["optimizer"]})
    return build(schema.Config, complete(config), "")


def batch_of(step):
    rng = np.random.default_rng(step)
    lengths = rng.integers(2, LENGTH + 1, BATCH)
    mask = np.arange(LENGTH) < lengths[:, None]
    return {
        "image": rng.normal(size=(BATCH, 8, 8, 3)).astype(np.float32),
        "tokens": np.where(mask, rng.integers(3, 50, (BATCH, LENGTH)), 1).astype(np.int32),
        "mask": mask,
    }


def losses(config, steps=3, *, in_step=False):
    """The losses of a few steps on as many devices as the mesh names, and the final parameters.

    With `in_step`, the step itself shortens its texts, as on several hosts.
    """
    mesh = config.sharding.mesh
    mesh = sharding.make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    with sharding.use(mesh, config.sharding.rules):
        parts = experiment(config)
        placements = sharding.place(parts.init.abstract(), config.sharding.rules, mesh.shape)
        state = init_state(parts.init, placements, mesh, 0)
        split = NamedSharding(mesh, sharding.batch_spec(config.sharding, BATCH, mesh.shape))
        texts = text_lengths(config)
        hosts = [batch_of(step) for step in range(steps)]
        batches = [sharding.put_batch(batch if in_step else texts.fit(batch), split, BATCH) for batch in hosts]
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        found, chosen, compiled = [], [], {}
        for batch in batches:
            shape = tuple(getattr(batch.get("packing"), "shape", ()))
            if shape not in compiled and in_step:
                step = make_train_step(parts.loss, parts.optimizer, 0, config.optimizer.accumulation_steps, texts)
                compiled[shape] = trace_step(step, state, batch, split).lower().compile(options), None
            elif shape not in compiled:
                compiled[shape] = compile_step(config, parts, state, batch, split, options)
            step, flops = compiled[shape]
            assert flops is None or flops.whole > 0
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
            chosen.append(
                int(metrics["text_length"]) if in_step and texts.lengths else shape[1] // 2 if shape else LENGTH
            )
    return found, jax.device_get(state.params), compiled, chosen


def test_altclip_on_eight_devices_equals_one(capfd):
    """Without recomputation on one device, with it on eight: neither changes the losses."""
    shared = {"optimizer": {"lr": 1e-2, "groups": GROUPS}}
    single = losses(settings(sharding={"mesh": {"data": 1}}, **shared))
    ours = losses(settings(sharding={"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}, remat="full", **shared))
    _check_equal(ours, single)
    assert ours[0][0] != ours[0][1]
    no_array_is_gathered_for_want_of_a_layout(capfd)


@pytest.mark.parametrize("mesh", [(1, 4, 2), (2, 4, 1)])
def test_no_array_is_gathered_for_want_of_a_layout(mesh, capfd):
    mesh = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    losses(settings(sharding={"mesh": mesh}, optimizer={"lr": 1e-2, "groups": GROUPS}), steps=1)
    no_array_is_gathered_for_want_of_a_layout(capfd)


def _check_equal(ours, expected):
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
    for path, value in flatten(ours[1]).items():
        np.testing.assert_allclose(value, flatten(expected[1])[path], rtol=1e-3, atol=1e-3, err_msg=path)


def test_packed_texts_give_the_losses_of_whole_rows(capfd):
    """On one device and on eight, in micro-batches; the step of several hosts packs them itself, to the same length."""
    text = MODEL["text"] | {"dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    shared = {"optimizer": {"lr": 1e-2, "groups": GROUPS, "accumulation_steps": 2}, "model": MODEL | {"text": text}}
    whole = losses(settings(sharding={"mesh": {"data": 1}}, **shared))
    train = {"text_lengths": (3, 4, 5), "pack_texts": 2}
    single = losses(settings(sharding={"mesh": {"data": 1}}, train=train, **shared))
    chosen = single[3]
    assert {shape[1] // 2 for shape in single[2] if shape} == {length for length in chosen if length < LENGTH} != set()
    _check_equal(single, whole)
    mesh = {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}
    for in_step in (False, True):
        several = losses(settings(sharding=mesh, train=train, **shared), in_step=in_step)
        _check_equal(several, whole)
        assert several[3] == chosen
    no_array_is_gathered_for_want_of_a_layout(capfd)


def test_compute_dtype_and_remat_reach_every_tower_and_parameters_stay_float32():
    parts = experiment(settings(precision={"compute": "bfloat16"}, remat="dots"))
    for tower in (parts.model_config.vision, parts.model_config.text):
        assert tower.dtype == "bfloat16" and tower.remat == "dots"
    abstract = sharding.unbox(parts.init.abstract())
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract.params)} == {jnp.dtype("float32")}


def test_model_flops_leave_out_recomputation():
    def flops(remat):
        parts = experiment(settings(), remat=remat)
        state = sharding.unbox(parts.init.abstract())
        gradient = jax.grad(lambda p, b: parts.loss(p, {}, b, jax.random.key(0))[0])
        return count_flops(jax.make_jaxpr(gradient)(state.params, batch_of(0)))

    assert flops("full") > 1.2 * flops("none")


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_float32_is_multiplied_in_float32(compute):
    """Accelerators multiply it in less unless told; half precision is left to them."""
    parts = experiment(settings(precision={"compute": compute}))
    state = sharding.unbox(parts.init.abstract())
    gradient = jax.grad(lambda p, b: parts.loss(p, {}, b, jax.random.key(0))[0])
    found = list(products(jax.make_jaxpr(gradient)(state.params, batch_of(0)).jaxpr))
    assert all(exact == float32 for exact, float32 in found)
    halves = sum(not float32 for _, float32 in found)
    assert halves == 0 if compute == "float32" else halves > len(found) / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "altclop"}, "config.family: .*did you mean 'altclip'"),
        ({"model": {"vision": {"hidden_sise": 3}}}, r"config\.model\.vision\.hidden_sise .*did you mean 'hidden_size'"),
        ({"model": {"vision": {"num_heads": 7}}}, r"config\.model\.vision"),
        ({"model": MODEL | {"vision": TOWER | {"num_layers": 0}}}, r"vision: num_layers: expected at least 1, found 0"),
        ({"model": MODEL | {"text": TOWER | {"mlp_dim": -3}}}, r"config\.model\.text: mlp_dim: expected at least 1"),
        ({"model": MODEL | {"text": TOWER | {"max_length": 2}}}, r"max_tokens: expected at least 1, found 0"),
        (
            {"model": MODEL | {"text": TOWER | {"dropout_rate": 1.0}}},
            r"text: dropout_rate: .* 0 to below 1, found 1\.0",
        ),
        ({"model": MODEL | {"projection_dim": 0}}, r"config\.model: projection_dim: expected at least 1, found 0"),
        ({"processor": PROCESSOR | {"max_length": 11}}, r"max_length: expected at most the 10 positions .*, found 11"),
        ({"train": {"pack_texts": 4}}, r"config\.train: pack_texts: expected 1, or lengths in text_lengths, found 4"),
        (
            {"train": {"text_lengths": (4,), "pack_texts": 4}, "loss": {"objective": "lm"}},
            r"pack_texts: this objective of altclip reads whole rows: expected 1",
        ),
        ({"train": {"text_lengths": (4, 7)}, "data": DATA}, r"text_lengths: .* the 6 tokens of a row, found \(4, 7\)"),
        (
            {"data": {"teacher_cache": "cache"}},
            "teacher_cache: objective 'contrastive' learns from no embeddings computed before; .* found 'cache'",
        ),
        ({"data": {"teacher_cache": "cache"}, "loss": {"objective": "lm"}}, "teacher_cache: objective 'lm' learns"),
        (
            {"data": {"teacher_cache": "cache"}, "loss": LEARNING | {"teacher": CLIP}},
            r"config\.loss\.teacher: expected None with config\.data\.teacher_cache, found a live teacher",
        ),
        (
            {"data": {"teacher_cache": "c"}, "loss": LEARNING, "processor": PROCESSOR | {"teacher_tokenizer": "clip"}},
            r"processor\.teacher_tokenizer: expected None with config\.data\.teacher_cache, found 'clip'",
        ),
        (
            {"processor": PROCESSOR | {"teacher_tokenizer": "clip"}},
            r"processor\.teacher_tokenizer: objective 'contrastive' does not read it; expected None, found 'clip'",
        ),
        (
            {"processor": PROCESSOR | {"teacher_max_length": 9}, "loss": {"objective": "lm"}},
            r"processor\.teacher_max_length: objective 'lm' does not read it; expected 77, found 9",
        ),
        (
            {"model": MODEL | {"vision": MODEL["vision"] | {"class_token": False}}},
            r"config\.model: vision\.class_token: .*expected True, found False",
        ),
        ({"loss": {"objective": "contrast"}}, r"config\.loss\.objective: expected one of"),
        ({"optimizer": {"groups": (("visoin/.*", {}), (".*", {}))}}, "nothing matches the rule visoin"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(UserError, match=message):
        experiment(settings(**changes))


def test_what_is_learned_from_precomputed_embeddings_and_rows_that_lengths_fit_pass():
    fitting = {"data": DATA | {"teacher_cache": "cache"}, "train": {"text_lengths": (4, 6)}}
    fitting["optimizer"] = {"lr": 1e-2, "groups": (("text/.*|text_(norm|transformation)/.*", {}), FROZEN)}
    assert experiment(settings(loss=LEARNING, **fitting)).loss_config.teacher is None


def _check(**changes):
    """`check_batch` for the batches of `batch_of`."""
    parts = experiment(settings(**changes))
    check_batch(parts, sharding.unbox(parts.init.abstract()), batch_of(0))


POOLED = {"model": MODEL | {"text": MODEL["text"] | {"pooler": True}}}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_what_weight_decay_alone_would_change_is_refused(remat):
    rule = {"lr": 1e-2, "weight_decay": 0.1}
    _check(optimizer=rule, remat=remat)
    none = "groups: the objective gives no gradient to text/pooler/kernel, so that weight decay alone would change it"
    with pytest.raises(UserError, match=none):
        _check(**POOLED, optimizer=rule, remat=remat)
    _check(**POOLED, optimizer={"lr": 1e-2}, remat=remat)
    tower = ("(vision|vision_projection)/.*", {"freeze": True})
    still = {"groups": (tower, ("text/pooler/.*", {"lr_multiplier": 0.0}), (".*", {}))}
    _check(**POOLED, optimizer=rule | still, remat=remat)
    frozen = {"groups": (("(vision|vision_projection|text/pooler)/.*", {"freeze": True}), (".*", {}))}
    _check(**POOLED, optimizer=rule | frozen, remat=remat)
    streams = DATA | {"sources": (DATA["sources"][0] | {"stream": "a"},), "streams": {"a": 1.0}}
    _check(**POOLED, optimizer=rule, remat=remat, data=streams)  # another stream's batches may train it


def test_an_unread_norm_is_refused():
    parts = experiment(settings(optimizer={"lr": 1e-2, "weight_decay": 0.1, "decay_exclude": ()}))
    loss = dataclasses.replace(parts, loss=lambda params, *more: parts.loss(params | NORM, *more))
    with pytest.raises(UserError, match="gives no gradient to text_norm/bias, text_norm/scale, so that"):
        check_batch(loss, sharding.unbox(parts.init.abstract()), batch_of(0))


NORM = {"text_norm": {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)}}


def _reached(function, *arguments):
    return reaches(jax.make_jaxpr(function)(*arguments).jaxpr, [True])


@jax.custom_vjp
def _straight(x, y):
    return x


_straight.defvjp(lambda x, y: (x, None), lambda _, g: (g, g))


@pytest.mark.parametrize(
    ("function", "reached"),
    [
        (lambda a, b: a * 2, (True, False)),
        (lambda a, b: a + jax.lax.stop_gradient(b), (True, False)),
        (lambda a, b: a * jnp.asarray(jnp.asarray(b, jnp.int32), jnp.float32), (True, False)),
        (lambda a, b: jax.jit(lambda x, y: (x * 2, y * 2))(a, b)[0], (True, False)),
        (lambda a, b: jax.checkpoint(lambda x, y: (x * 2, y * 2))(a, b)[1], (False, True)),
        (lambda a, b: _straight(a, b), (True, True)),
        (lambda a, b: jax.lax.cond(a > 0, lambda: a, lambda: b), (True, True)),
        (lambda a, b: jax.lax.scan(lambda c, _: ((c[0] * 2, c[1] + b), None), (a, b), length=3)[0][0], (True, True)),
        (lambda a, b: jax.lax.scan(lambda c, _: ((c[1], c[0]), None), (a, b), length=2)[0][0], (True, True)),
        (
            lambda a, b: jax.lax.scan(lambda c, x: (c * 2, x + jax.lax.stop_gradient(b)), a, jnp.ones(3))[0],
            (True, False),
        ),
        (lambda a, b: jnp.float32(3), (False, False)),
        (lambda a, b: b, (False, True)),
    ],
)
def test_which_inputs_have_a_gradient(function, reached):
    assert tuple(_reached(function, 2.0, 3.0)) == reached
    slopes = jax.grad(lambda a, b: function(a, b) * 1.0, argnums=(0, 1), allow_int=False)(2.0, 3.0)
    assert all(on or slope == 0 for on, slope in zip(reached, slopes, strict=True))


def test_a_family_that_reads_whole_rows_packs_no_texts():
    changed = {**complete({"family": "flava"}), "train": {"text_lengths": (4,), "pack_texts": 2}}
    with pytest.raises(UserError, match=r"pack_texts: this objective of flava reads whole rows: expected 1"):
        experiment(build(schema.Config, changed, ""))
