"""AltCLIP's objectives against their definitions; what they must not train; what batches must hold."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.encoders.bert import BertConfig
from vlm.encoders.clip_text import ClipTextConfig
from vlm.encoders.vit import ViTConfig
from vlm.errors import UserError
from vlm.experiment import experiment
from vlm.models.altclip import AltCLIP, AltCLIPConfig, example
from vlm.models.altclip.loss import LossConfig, init_extra, loss
from vlm.schema import Config, GroupConfig, OptimizerConfig

from ...quick import apply, random_params

TEXT = BertConfig(
    vocab_size=30, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=24, max_length=12, dropout_rate=0.0,
    attention_dropout_rate=0.0,
)  # fmt: skip
VISION = ViTConfig(hidden_size=16, num_layers=1, num_heads=2, mlp_dim=24, image_size=8, patch_size=4)
CONFIG = AltCLIPConfig(vision=VISION, text=TEXT, project_dim=12, projection_dim=8, lm_head=True)
RNG = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(RNG.normal(size=(3, 8, 8, 3)), jnp.float32),
    "tokens": jnp.asarray(RNG.integers(3, 30, (3, 6)), jnp.int32),
    "mask": jnp.asarray([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]], bool),
}


@pytest.fixture(scope="module")
def model():
    module = AltCLIP(CONFIG)
    return module, random_params(module, **example(CONFIG))


def _loss(model, batch, config, extra=None):
    module, params = model
    run = jax.jit(lambda params, extra, batch: loss(module, params, extra, batch, jax.random.key(2), config))
    return run(params, extra or {}, batch)


def test_masked_language_modelling_is_the_cross_entropy_of_all_logits(model):
    module, params = model
    labels = np.where(RNG.random((3, 6)) < 0.4, RNG.integers(0, 30, (3, 6)), -100)
    value, (metrics, _) = _loss(model, BATCH | {"labels": jnp.asarray(labels)}, LossConfig("lm"))
    logits = apply(module, params, BATCH["tokens"], BATCH["mask"], method="lm_logits")
    likelihood = jax.nn.log_softmax(logits)[np.arange(3)[:, None], np.arange(6), np.maximum(labels, 0)]
    np.testing.assert_allclose(value, -np.asarray(likelihood)[labels >= 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["lm"], value)


def test_contrastive_equals_the_models_own_loss_and_locks_the_image(model):
    module, params = model
    value, (metrics, _) = _loss(model, BATCH, LossConfig())
    expected = apply(module, params, **BATCH, return_loss=True).loss
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["logit_scale"], np.exp(params["logit_scale"]), rtol=1e-6)

    def gradient(config):
        return jax.jit(jax.grad(lambda p: loss(module, p, {}, BATCH, jax.random.key(2), config)[0]))(params)

    largest = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))  # noqa: E731
    locked, free = gradient(LossConfig()), gradient(LossConfig(lock_image=False))
    assert largest(locked["vision"]) == 0 and largest(free["vision"]) > 1e-4
    assert largest(locked["text"]) > 1e-4 and largest(locked["logit_scale"]) > 1e-4


@pytest.mark.parametrize(("target", "width"), [("pooled", 12), ("projected", 8)])
def test_teacher_learning_is_the_mean_squared_error_to_the_teacher(model, target, width):
    module, params = model
    teacher = ClipTextConfig(
        vocab_size=20, hidden_size=12, num_layers=1, num_heads=2, mlp_dim=16, max_length=9, eos_id=19
    )
    config = LossConfig("teacher_learning", target=target, teacher=teacher, teacher_projection_dim=8)
    extra = nn.unbox(jax.jit(lambda key: init_extra(module, params, key, config))(jax.random.key(3)))
    tokens = jnp.array([[1, 2, 19, 0], [1, 19, 0, 0], [1, 3, 4, 19]])
    batch = BATCH | {"teacher_tokens": tokens, "teacher_mask": tokens != 0}
    value, (_, after) = _loss(model, batch, config, extra)
    clip = AltCLIP(AltCLIPConfig(vision=None, text=None, clip_text=teacher, projection_dim=8))
    names = {"pooled": "encode_text_pooled", "projected": "encode_text"}
    wanted = apply(clip, extra["teacher"], tokens, tokens != 0, method=names[target])
    found = apply(module, params, BATCH["tokens"], BATCH["mask"], method=names[target])
    assert wanted.shape == (3, width)
    np.testing.assert_allclose(value, np.square(np.asarray(found) - np.asarray(wanted)).mean(), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after, extra)
    same, _ = _loss(model, BATCH | {"target": wanted}, dataclasses.replace(config, teacher=None))
    np.testing.assert_allclose(same, value, rtol=1e-6)


@pytest.mark.parametrize(
    ("batch", "config", "message"),
    [
        ({"tokens": 0, "mask": 0}, LossConfig(), "objective 'contrastive' needs image; the examples give mask, tokens"),
        (BATCH, LossConfig("lm"), r"needs labels; .*mlm_probability makes labels"),
        (BATCH, LossConfig("teacher_learning"), "needs a live teacher .* or embeddings computed before"),
        (
            BATCH | {"target": jnp.zeros((3, 7))},
            LossConfig("teacher_learning"),
            "embedding has 12 numbers.* teacher's 7",
        ),
    ],
)
def test_what_is_missing_is_named(model, batch, config, message):
    with pytest.raises(UserError, match=message):
        _loss(model, batch, config)


def test_what_the_objective_does_not_train_must_be_frozen():
    section = {"vision": dataclasses.asdict(VISION), "text": dataclasses.asdict(TEXT), "project_dim": 12}
    settings = Config(
        "altclip", model=section | {"projection_dim": 8}, processor={"image": {"size": 8, "crop": 8}, "max_length": 8}
    )
    with pytest.raises(UserError, match=r"gives no gradient to vision/.*freeze 'vision/\.\*\|vision_projection/\.\*'"):
        experiment(settings)
    groups = (("vision/.*|vision_projection/.*", GroupConfig(freeze=True)), (".*", GroupConfig()))
    experiment(dataclasses.replace(settings, optimizer=OptimizerConfig(groups=groups)))
    experiment(dataclasses.replace(settings, loss={"lock_image": False}))
