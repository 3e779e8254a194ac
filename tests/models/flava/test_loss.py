"""FLAVA's losses and their gradients against Hugging Face, alone, in groups, and on eight devices."""

import dataclasses
import functools
import json
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from vlm import sharding
from vlm.errors import UserError
from vlm.flops import count_flops
from vlm.models.flava.config import ClassifierConfig
from vlm.models.flava.loss import LossConfig, init_extra, loss
from vlm.models.flava.model import FLAVA
from vlm.models.flava.pretrain import masked_positions
from vlm.optimizer import make_optimizer
from vlm.padding import TextLengths
from vlm.schema import MeshConfig, OptimizerConfig, ShardingConfig
from vlm.training import StateInit, make_train_step
from vlm.tree import flatten

from ...quick import apply, no_array_is_gathered_for_want_of_a_layout, products
from .conftest import our_tree

RNG = np.random.default_rng(1)
ROWS, LENGTH, PATCHES = 8, 7, 16


def _batch():
    lengths = RNG.integers(3, LENGTH + 1, ROWS)
    mask = np.arange(LENGTH)[None] < lengths[:, None]
    tokens = np.where(mask, RNG.integers(5, 50, (ROWS, LENGTH)), 0).astype(np.int32)
    chosen = mask & (RNG.random(mask.shape) < 0.4)
    chosen[2] = False  # a text of which nothing is hidden
    patch_mask = RNG.random((ROWS, PATCHES)) < 0.4
    return {
        "image": RNG.normal(size=(ROWS, 32, 32, 3)).astype(np.float32),
        "tokens": tokens,
        "mask": mask,
        "token_types": (np.arange(LENGTH)[None] > lengths[:, None] // 2).astype(np.int32) * mask,
        "masked_tokens": np.where(chosen, 4, tokens).astype(np.int32),
        "token_labels": np.where(chosen, tokens, -100).astype(np.int32),
        "patch_mask": patch_mask,
        "patch_labels": RNG.integers(0, 40, (ROWS, PATCHES)).astype(np.int32),
    }


BATCH = _batch()
CODEBOOK_IMAGE = RNG.uniform(0.1, 0.9, (ROWS, 32, 32, 3)).astype(np.float32)
IMAGE_KEYS = ("image", "patch_mask", "patch_labels")
TEXT_KEYS = ("tokens", "mask", "token_types", "masked_tokens", "token_labels")
ITM = {"mixed": [1, 0, 1, 1, 0, 1, 0, 1], "none": [0] * 8, "all": [1] * 8, "two groups": [0, 0, 0, 0, 1, 1, 0, 1]}
TERMS = {"mim": "mim", "mlm": "mlm", "itm": "itm", "contrastive": "global_contrastive"}
TERMS |= {"mmm_image": "mmm_image", "mmm_text": "mmm_text"}


def _inputs(kind, itm=None, rows=slice(None)):
    keys = {"images": IMAGE_KEYS, "texts": TEXT_KEYS, "pairs": IMAGE_KEYS + TEXT_KEYS}[kind]
    batch = {key: BATCH[key][rows] for key in keys}
    return batch if itm is None else batch | {"itm_labels": np.array(ITM[itm], np.int32)[rows]}


def _theirs(reference, batch, training=True, **weights):
    """Hugging Face's losses and gradients, in training mode or in evaluation."""
    names = {"image": "pixel_values", "tokens": "input_ids", "mask": "attention_mask", "patch_mask": "bool_masked_pos"}
    names |= {"token_types": "token_type_ids", "masked_tokens": "input_ids_masked", "token_labels": "mlm_labels"}
    names |= {"codebook_image": "codebook_pixel_values", "patch_labels": "mim_labels", "itm_labels": "itm_labels"}
    inputs = {}
    for key, value in batch.items():
        value = value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
        integer = value.dtype != np.float32 and key != "patch_mask"
        inputs[names[key]] = torch.tensor(value, dtype=torch.long if integer else None)
    for name in TERMS.values():
        setattr(reference, f"{name}_weight", weights.get(name, 1.0))
    reference.train(training)
    reference.zero_grad(set_to_none=True)
    output = reference(**inputs, return_loss=True)
    output.loss.backward()
    reference.eval()
    named = reference.named_parameters()  # of a bias with two names the first
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}
    terms = {ours: getattr(output.loss_info, theirs) for ours, theirs in TERMS.items()}
    terms = {name: float(value.detach()) for name, value in terms.items() if value is not None}
    return float(output.loss.detach()), terms, flatten(our_tree(gradients))


@functools.cache
def _compiled(model, config):
    def objective(params, batch):
        return loss(model, params, {}, batch, jax.random.key(0), config)

    return jax.jit(jax.value_and_grad(objective, has_aux=True))


def _ours(pair, batch, **settings):
    _, model, params = pair
    step = _compiled(model, LossConfig(**settings))
    (value, (terms, _)), gradients = step(jax.tree.map(jnp.asarray, params), batch)
    return float(value), {name: float(term) for name, term in terms.items()}, flatten(gradients)


def _values(pair, batch, **settings):
    """The losses alone, which compile faster."""
    _, model, params = pair
    run = jax.jit(lambda params, batch: loss(model, params, {}, batch, jax.random.key(0), LossConfig(**settings)))
    value, (terms, _) = run(params, batch)
    return float(value), {name: float(term) for name, term in terms.items()}


def _equal(ours, theirs):
    value, terms, gradients = ours
    np.testing.assert_allclose(value, theirs[0], rtol=2e-5)
    for name, term in theirs[1].items():
        np.testing.assert_allclose(terms[name], term, rtol=2e-5, err_msg=name)
    assert {name for name in TERMS if name in terms} == set(theirs[1])
    assert gradients.keys() == theirs[2].keys()
    for path, gradient in theirs[2].items():
        scale = max(np.abs(gradient).max(), 1e-3)
        np.testing.assert_allclose(gradients[path], gradient, atol=1e-4 * scale, err_msg=path)


CASES = [("images", None), ("texts", None), ("pairs", None), ("pairs", "mixed"), ("pairs", "none"), ("pairs", "all")]


@pytest.mark.parametrize(("kind", "itm"), CASES)
def test_losses_and_gradients_equal_hugging_face(pair, kind, itm):
    batch = _inputs(kind, itm)
    expected = _theirs(pair[0], batch)
    assert len(expected[1]) == {"images": 1, "texts": 1, "pairs": 3 + (itm is not None)}[kind]
    if kind == "pairs" and itm is None:
        _equal(_ours(pair, batch, itm=0.0), expected)
        return
    _equal(_ours(pair, batch), expected)


def test_weights_and_positions_gathered_or_not(pair):
    """Any weights, with the heads on all positions or just enough; a head on too few of them says what it drops."""
    weights = {"mmm_image": 0.5, "mmm_text": 2.0, "itm": 0.25, "contrastive": 3.0}
    batch = _inputs("pairs", "mixed")
    expected = _theirs(pair[0], batch, **{TERMS[name]: weight for name, weight in weights.items()})
    most = int((BATCH["token_labels"] >= 0).sum(1).max()), int(BATCH["patch_mask"].sum(1).max())
    value, terms, gradients = _ours(pair, batch, **weights, max_masked_words=most[0], max_masked_patches=most[1])
    np.testing.assert_allclose(value, expected[0], rtol=2e-5)
    assert terms["mmm_text_dropped"] == terms["mmm_image_dropped"] == 0
    for path, gradient in expected[2].items():
        scale = max(np.abs(gradient).max(), 1e-3)
        np.testing.assert_allclose(gradients[path], gradient, atol=1e-4 * scale, err_msg=path)
    dropped = _values(pair, _inputs("texts"), max_masked_tokens=most[0] - 1)[1]["mlm_dropped"]
    counts = (BATCH["token_labels"] >= 0).sum(1)
    np.testing.assert_allclose(dropped, (counts == most[0]).sum() / counts.sum(), rtol=1e-6)


def test_groups_are_averaged_like_devices_of_the_released_code(pair):
    """Each group's loss is Hugging Face's of those rows alone, but for the contrastive candidates, which are all."""
    halves = [_theirs(pair[0], _inputs("pairs", "two groups", rows)) for rows in (slice(0, 4), slice(4, 8))]
    found = _values(pair, _inputs("pairs", "two groups"), group_size=4)
    for name in ("mmm_image", "mmm_text", "itm"):
        np.testing.assert_allclose(found[1][name], np.mean([half[1][name] for half in halves]), rtol=2e-5)
    _, model, params = pair
    output = apply(model, params, BATCH["image"], BATCH["tokens"], BATCH["mask"], token_types=BATCH["token_types"])
    logits = np.asarray(output.contrastive_logits_per_image, np.float64)
    rows = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    per_pair = (rows + columns) / 2
    expected = (per_pair[:4].mean() + per_pair[[4, 5, 7]].mean()) / 2  # no positive in the first group: all count
    np.testing.assert_allclose(found[1]["contrastive"], expected, rtol=2e-5)


def test_without_matching_pairs_are_filtered_all_the_same(pair):
    """Hugging Face lets replaced captions into the other losses when itm_weight is 0; that is a setting here."""
    batch = _inputs("pairs", "mixed")
    theirs = _theirs(pair[0], batch, itm=0.0)
    unfiltered = _values(pair, batch, itm=0.0, unfiltered_without_itm=True)
    np.testing.assert_allclose(unfiltered[0], theirs[0], rtol=2e-5)
    filtered = _values(pair, batch, itm=0.0)[1]
    expected = _theirs(pair[0], batch)[1]
    for name in ("mmm_image", "mmm_text", "contrastive"):
        np.testing.assert_allclose(filtered[name], expected[name], rtol=2e-5)
        np.testing.assert_allclose(unfiltered[1][name], theirs[1][name], rtol=2e-5)
        assert abs(filtered[name] - theirs[1][name]) > 1e-4


def test_the_codebook_labels_live_or_before(pair):
    """The loss with the codebook's picture is Hugging Face's, and that with the labels it gives."""
    _, model, params = pair
    batch = _inputs("images")
    batch.pop("patch_labels")
    live = _ours(pair, batch | {"codebook_image": CODEBOOK_IMAGE})
    _equal(live, _theirs(pair[0], batch | {"codebook_image": CODEBOOK_IMAGE}))
    find = jax.jit(lambda params, image: model.apply({"params": params}, image, method=model.codebook_labels))
    cached = _ours(pair, batch | {"patch_labels": np.asarray(find(params, CODEBOOK_IMAGE))})
    assert live[0] == cached[0]
    pixels = np.round((CODEBOOK_IMAGE - 0.1) / 0.8 * 255)
    exact, bytes_ = (pixels / 255 * 0.8 + 0.1).astype(np.float32), pixels.astype(np.uint8)
    values = [_ours(pair, batch | {"codebook_image": image})[0] for image in (exact, bytes_)]
    np.testing.assert_allclose(*values, rtol=1e-6)


def test_patches_row_by_row_or_as_their_grid(pair):
    batch = _inputs("pairs", "mixed")
    grids = {name: batch[name].reshape(ROWS, 4, 4) for name in ("patch_mask", "patch_labels")}
    assert _values(pair, batch | grids) == _values(pair, batch)


def test_pictures_of_another_size(pair):
    """Positions are interpolated in pretraining too."""
    _, model, params = pair
    mask = RNG.random((2, 36)) < 0.4
    image, labels = RNG.normal(size=(2, 48, 48, 3)).astype(np.float32), RNG.integers(0, 40, (2, 36)).astype(np.int32)
    batch = {"image": image, "patch_mask": mask, "patch_labels": labels}
    states = apply(model, params, image, mask, method=model.encode_image_states, interpolate_positions=True)
    logits = apply(model, params, head="mim", hidden=states.last_hidden_state[:, 1:], method=model.predict_masked)
    losses = jax.nn.logsumexp(logits, -1) - np.take_along_axis(np.asarray(logits), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(_values(pair, batch, interpolate_positions=True)[0], losses[mask].mean(), rtol=1e-5)
    pairs = _inputs("pairs", "mixed", slice(2)) | batch
    assert np.isfinite(_values(pair, pairs, interpolate_positions=True)[0])


def test_nothing_hidden_costs_nothing(pair):
    """Where Hugging Face divides 0 by 0."""
    batch = _inputs("texts") | {"token_labels": np.full((ROWS, LENGTH), -100, np.int32)}
    value, _, gradients = _ours(pair, batch)
    assert value == 0 and all(not np.any(gradient) for gradient in gradients.values())
    batch = _inputs("pairs", "mixed") | {"patch_mask": np.zeros((ROWS, PATCHES), bool)}
    value, terms, _ = _ours(pair, batch)
    assert terms["mmm_image"] == 0 and np.isfinite(value)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("images", (4, 2, 1)), ("texts", (4, 2, 1)), ("pairs", (4, 2, 1)), ("pairs", (2, 2, 2))],
)
def test_eight_devices_equal_one(pair, kind, mesh, capfd):
    batch = _inputs(kind, "mixed" if kind == "pairs" else None)
    one = _ours(pair, batch)
    settings = ShardingConfig(mesh=MeshConfig(*mesh))
    mesh = sharding.make_mesh(settings.mesh)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with sharding.use(mesh, settings.rules):
        placed = {name: jax.device_put(value, split) for name, value in batch.items()}
        eight = _ours(pair, placed)
    no_array_is_gathered_for_want_of_a_layout(capfd)
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    for path, gradient in one[2].items():
        scale = max(np.abs(gradient).max(), 1e-3)  # that of a key's bias is 0 but for rounding
        np.testing.assert_allclose(eight[2][path], gradient, atol=2e-5 * scale, err_msg=path)


def test_candidate_gradients(pair):
    """Without them an embedding learns from its own row: equal to stopping the gradient of what others compare with."""
    _, model, params = pair
    batch = _inputs("pairs", "mixed")
    batch = {name: batch[name] for name in ("image", "tokens", "mask", "itm_labels")}
    off = {"mmm_image": 0.0, "mmm_text": 0.0, "itm": 0.0}
    found = _ours(pair, batch, **off, candidate_gradients=False)[2]
    positive = batch["itm_labels"] != 0

    def plain(params):
        image = model.apply({"params": params}, batch["image"], method=model.encode_image)
        text = model.apply({"params": params}, batch["tokens"], batch["mask"], method=model.encode_text)
        image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
        scale, total = jnp.exp(params["logit_scale"]), 0.0
        for queries, candidates in ((image, text), (text, image)):
            logits = scale * queries @ jax.lax.stop_gradient(candidates).T
            total += ((jax.nn.logsumexp(logits, 1) - jnp.diag(logits)) * positive).sum() / positive.sum() / 2
        return total

    expected = flatten(jax.jit(jax.grad(plain))(jax.tree.map(jnp.asarray, params)))
    for path, gradient in expected.items():
        scale = max(np.abs(gradient).max(), 1e-4)
        np.testing.assert_allclose(found[path], gradient, atol=1e-4 * scale, err_msg=path)


def test_masked_positions():
    index, real = masked_positions(np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool), 3)
    np.testing.assert_array_equal(real, [[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(index[0, :2], [1, 3])
    np.testing.assert_array_equal(index[2], [0, 1, 2])


def test_heads_run_on_masked_positions_only(pair):
    """The step's products, forward and backward, are fewer by exactly those of the head at the other positions."""
    _, model, params = pair
    cost = {}
    for count in (None, 2):
        step = _compiled(model, LossConfig(max_masked_tokens=count))
        program = step.trace(params, _inputs("texts")).jaxpr
        assert all(exact for exact, _ in products(program.jaxpr))  # float32 is multiplied in float32
        cost[count] = count_flops(program)
    head = 2 * 24 * (24 + 50)  # per position
    layer = 2 * (2 * 24 * 24 + 2 * 24 * 36) + 2 * 2 * LENGTH * 24  # all of the last one but keys and values
    assert cost[None] - cost[2] == 3 * ROWS * (LENGTH - 2) * (head + layer)


@pytest.mark.parametrize(("objective", "labels"), [("classification", 3), ("regression", 1), ("soft_labels", 4)])
def test_fine_tuning(pair, objective, labels):
    _, model, params = pair
    model = FLAVA(dataclasses.replace(model.config, classifier=ClassifierConfig(labels, dropout_rate=0.0)))
    head = {"dense": (24, 768), "out": (768, labels)}
    own = {k: {"kernel": RNG.normal(size=s) * 0.1, "bias": RNG.normal(size=s[1])} for k, s in head.items()}
    params = {**params, "classifier": own}
    batch = {name: BATCH[name] for name in ("image", "tokens", "mask")}
    scores = np.asarray(apply(model, params, **batch, method="classify"), np.float64)
    config = LossConfig(objective=objective)
    if objective == "classification":
        batch["labels"] = np.array([0, 1, 2, -1, 0, 1, 2, 0], np.int32)
        logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        kept = batch["labels"] >= 0
        expected = -logs[kept, batch["labels"][kept]].mean()
    elif objective == "regression":
        batch["labels"] = RNG.normal(size=ROWS).astype(np.float32)
        expected = np.mean((scores[:, 0] - batch["labels"]) ** 2)
    else:
        batch["label_scores"] = RNG.random((ROWS, labels)).astype(np.float32)
        share = 1 / (1 + np.exp(-scores))
        terms = batch["label_scores"] * np.log(share) + (1 - batch["label_scores"]) * np.log(1 - share)
        expected = -terms.sum(-1).mean()
    value, (_, extra) = jax.jit(lambda *arrays: loss(model, *arrays, jax.random.key(0), config))(params, {}, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert extra == {}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (("patch_mask",), {}, r"needs patch_mask \(config.processor.mask_patches\)"),
        (("patch_labels",), {}, "needs codebook_image or patch_labels"),
        (("masked_tokens",), {}, r"needs masked_tokens \(config.processor.mlm_probability\)"),
        (IMAGE_KEYS + TEXT_KEYS, {}, "needs image or tokens"),
        (("itm_labels",), {}, r"needs itm_labels \(config.processor.itm_probability; without them config.loss.itm=0\)"),
        (
            (),
            {"mmm_image": 0.0, "mmm_text": 0.0, "itm": 0.0, "contrastive": 0.0},
            "batches of pairs train nothing: config.loss has 0 for mmm_image and mmm_text and itm and contrastive",
        ),
        (TEXT_KEYS, {"mim": 0.0}, "batches of images train nothing: config.loss has 0 for mim"),
        (IMAGE_KEYS, {"mlm": 0.0}, "batches of texts train nothing: config.loss has 0 for mlm"),
        ((), {"group_size": 3}, "group_size: expected a divisor of the batch of 8, found 3"),
    ],
)
def test_incomplete_batches_are_refused(pair, change, settings, message):
    batch = {name: jnp.asarray(value) for name, value in _inputs("pairs", "mixed").items() if name not in change}
    with pytest.raises(UserError, match=message):
        loss(pair[1], pair[2], {}, batch, jax.random.key(0), LossConfig(**settings))


def _refused(pair, message, batch):
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    with pytest.raises(UserError, match=message):
        loss(pair[1], pair[2], {}, batch, jax.random.key(0), LossConfig())


def test_visual_words_of_another_number_of_patches_are_refused(pair):
    """They would be those of other places."""
    batch = _inputs("images")
    labels = batch.pop("patch_labels")
    message = "as many visual words as patches, found patch_mask 16 and patch_labels 15"
    _refused(pair, message, batch | {"patch_labels": labels[:, 1:]})
    message = "codebook_size: pictures of 48x48 have 36 visual words, expected .* 16 patches"
    _refused(pair, message, batch | {"codebook_image": np.full((ROWS, 48, 48, 3), 0.5, np.float32)})


def test_a_column_of_matching_labels_is_refused(pair):
    batch = _inputs("pairs", "mixed")
    message = r"itm_labels: expected one number for each pair, found shape \(8, 1\)"
    _refused(pair, message, batch | {"itm_labels": batch["itm_labels"][:, None]})


def test_models_without_the_objective_s_parts_are_refused(pair):
    model = FLAVA(dataclasses.replace(pair[1].config, heads=False))
    with pytest.raises(UserError, match="config.loss.mim needs config.model.heads=True"):
        init_extra(model, {}, None, LossConfig())
    alone = dict.fromkeys(("mim", "mlm", "mmm_image", "mmm_text", "itm"), 0.0)
    assert init_extra(model, {}, None, LossConfig(**alone)) == {}
    with pytest.raises(UserError, match="config.loss.contrastive needs config.model.projection_dim"):
        init_extra(FLAVA(dataclasses.replace(pair[1].config, projection_dim=None)), {}, None, LossConfig())
    images = FLAVA(dataclasses.replace(pair[1].config, classifier=ClassifierConfig(2, "image")))
    with pytest.raises(UserError, match="does not reach the text and fusion: config.model.text=None and config.model"):
        init_extra(images, {}, None, LossConfig(objective="classification"))
    with pytest.raises(UserError, match="needs config.model.classifier"):
        init_extra(pair[1], {}, None, LossConfig(objective="classification"))


CONTRASTIVE = {"mmm_image": 0.0, "mmm_text": 0.0, "itm": 0.0}


@pytest.mark.parametrize("settings", [{}, CONTRASTIVE, {**CONTRASTIVE, "mim": 0.0, "mlm": 0.0}])
def test_locked_is_exactly_what_gets_no_gradient(pair, settings):
    """Over batches of all kinds that train something."""
    total = {}
    kinds = {"images": None, "texts": None, "pairs": "mixed"}
    for kind, itm in kinds.items() if "mim" not in settings else (("pairs", "mixed"),):
        given = settings if kind == "pairs" else {}  # the pairs' weights are nothing to the others
        for path, gradient in _ours(pair, _inputs(kind, itm), **given)[2].items():
            total[path] = total.get(path, 0) + np.abs(gradient).max()
    locked = LossConfig(**settings).locked
    for path, size in total.items():
        assert (size == 0) == bool(re.fullmatch(locked, path)), path


def test_two_processes_equal_one(pair, tmp_path):
    """Two real processes of four devices each, every one with half of the rows."""
    np.savez(tmp_path / "pairs.npz", **_inputs("pairs", "mixed"))
    np.savez(tmp_path / "params.npz", **flatten(pair[2]))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    program = pathlib.Path(__file__).with_name("one_of_two.py")
    hosts = [
        subprocess.Popen([sys.executable, program, str(port), str(i), tmp_path], stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for host in hosts:
        assert host.wait(timeout=180) == 0, host.stderr.read()
        host.stderr.close()
    found = json.loads((tmp_path / "losses.json").read_text())
    _, terms, gradients = _ours(pair, _inputs("pairs", "mixed"))
    terms["grad_norm"] = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients.values()))
    assert found.keys() == terms.keys()
    for name, term in terms.items():
        np.testing.assert_allclose(found[name], term, rtol=1e-5, err_msg=name)


def test_the_temperature_is_bounded_before_it_is_used(pair):
    """Hugging Face clamps it in training mode only, before the first loss; `train.py` bounds a starting value."""
    reference, model, params = pair
    batch = _inputs("pairs", "mixed")
    values = {}
    for mode, found in (("eval", 5.0), ("train", 4.6052)):  # their ln 100
        with torch.no_grad():
            before = reference.flava.logit_scale.clone()
            reference.flava.logit_scale.fill_(5.0)
        values[mode] = _theirs(reference, batch, training=mode == "train")
        with torch.no_grad():
            reference.flava.logit_scale.copy_(before)
        ours = _ours((None, model, {**params, "logit_scale": np.float32(found)}), batch)
        np.testing.assert_allclose(ours[0], values[mode][0], rtol=2e-5)
        np.testing.assert_allclose(ours[2]["logit_scale"], values[mode][2]["logit_scale"], rtol=1e-4)
    assert values["train"][1]["contrastive"] < values["eval"][1]["contrastive"] - 1
    optimizer = make_optimizer(OptimizerConfig(), ["logit_scale"], 10)
    state = StateInit(lambda key: {}, lambda params, key: {}, optimizer).finish({"logit_scale": jnp.float32(5.0)}, {})
    np.testing.assert_allclose(state.params["logit_scale"], np.log(100), rtol=1e-6)


def test_lengths_of_text_with_bounded_heads(pair):
    """Rows shorter than a head's bound, or longer: one program, the same losses."""
    _, model, params = pair
    config = LossConfig(max_masked_words=4, max_masked_patches=PATCHES)
    optimizer = make_optimizer(OptimizerConfig(), list(flatten(params)), 10)
    start = jax.jit(StateInit(lambda key: {}, lambda params, key: {}, optimizer).finish)(params, {})
    objective = functools.partial(loss, model, config=config)
    step = jax.jit(make_train_step(objective, optimizer, 0, texts=TextLengths((4,))))
    batch = _inputs("pairs", "mixed")
    for most, chosen in ((4, 4), (LENGTH, LENGTH)):
        kept = np.arange(LENGTH)[None] < most
        texts = {name: batch[name] * kept for name in ("tokens", "mask", "token_types", "masked_tokens")}
        texts["token_labels"] = np.where(kept, batch["token_labels"], -100)
        _, metrics = step(start, batch | texts)
        assert metrics["text_length"] == chosen and metrics["mmm_text_dropped"] == 0
        np.testing.assert_allclose(metrics["loss"], _ours(pair, batch | texts)[0], rtol=2e-5)
