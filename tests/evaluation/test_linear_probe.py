"""The linear probe learns what the embeddings hold, and says what it did."""

import numpy as np
import pytest

from vlm.errors import UserError
from vlm.evaluation import logistic
from vlm.evaluation.embed import Embedder
from vlm.evaluation.evaluator import Sampling
from vlm.evaluation.linear_probe import LinearProbe, LinearProbeConfig


def prepare(train, data, **settings):
    config = LinearProbeConfig(train, data, **{"bootstrap": Sampling(10), "max_iterations": 1000} | settings)
    return LinearProbe.prepare(config, "config.eval.probe")


def test_learns_colours(model, params, processor, colours):
    (train, _), (test, _) = colours(count=60, noise=60, name="train"), colours(count=21, noise=60, name="test")
    result = prepare(train, test, solver="sklearn", penalty=1e-2)(Embedder(model, params, processor))
    assert result.metrics["top1"] >= 0.9 and (result.n, result.unreadable) == (21, 0)
    assert result.details["train_examples"] == 60 and result.examples[2]["key"] == "k2"


def test_sweeps_on_held_out_training_images(model, params, processor, colours):
    (train, _), (test, _) = colours(count=40, noise=60, name="train"), colours(count=15, noise=60, name="test")
    progress = []
    result = prepare(train, test, max_iterations=20)(Embedder(model, params, processor), progress.append)
    assert result.details["sweep"] and f"{result.details['penalty']:.6g}" in result.details["sweep"]
    assert result.metrics["top1"] >= 0.8 and progress[-1] == 55


def test_every_class_is_held_out_in_whatever_order_they_come():
    probe = LinearProbe(LinearProbeConfig({}, {}), None, None)
    for labels in (np.arange(100) % 10, np.arange(100) // 10):
        held_out = probe._held_out(labels)
        assert (np.bincount(labels[held_out]) == 2).all() and (np.bincount(labels[~held_out]) == 8).all()


def test_wrong_inputs(model, params, processor, colours):
    spec, _ = colours(count=3)
    with pytest.raises(UserError, match="expected a class number as label, found 'red'"):
        prepare(spec, spec, label="word")
    with pytest.raises(ValueError, match="penalty"):
        LinearProbeConfig(spec, spec, penalty=0.0)
    with pytest.raises(UserError, match="at least 5 training images"):
        prepare(spec, spec)(Embedder(model, params, processor))


def test_class_tokens_and_a_validation_source(model, params, processor, colours, monkeypatch):
    parts = {name: colours(count=n, noise=60, name=name)[0] for name, n in (("train", 30), ("valid", 10), ("test", 15))}
    settings = {"features": "class_token", "validation_data": parts["valid"], "max_iterations": 20}
    task, seen, progress = prepare(parts["train"], parts["test"], **settings), [], []
    fit = logistic.fit
    monkeypatch.setattr(
        logistic, "fit", lambda features, *rest, **more: seen.append(features) or fit(features, *rest, **more)
    )
    embedder = Embedder(model, params, processor)
    task.check(embedder)
    result = task(embedder, progress.append)
    assert {len(features) for features in seen[:-1]} == {30} and len(seen[-1]) == 40  # refitted on both parts
    assert progress == sorted(progress) and progress[-1] == 55
    # The class token of a colour is its mean, as it is: not projected, not of unit length.
    means = np.stack([image.mean((0, 1)) for image, _ in colours(count=30, noise=60, name="again")[1]])
    np.testing.assert_allclose(seen[-1][:30], means, atol=1e-6)
    assert result.metrics["top1"] >= 0.8 and result.details["features"] == "class_token"
