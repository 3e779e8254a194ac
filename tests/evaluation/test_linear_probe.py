"""The linear probe learns what the embeddings hold, and says what it did."""

import pytest

from vlm.errors import UserError
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


def test_wrong_inputs(model, params, processor, colours):
    spec, _ = colours(count=3)
    with pytest.raises(UserError, match="expected a class number as label, found 'red'"):
        prepare(spec, spec, label="word")
    with pytest.raises(ValueError, match="penalty"):
        LinearProbeConfig(spec, spec, penalty=0.0)
    with pytest.raises(UserError, match="at least 5 training images"):
        prepare(spec, spec)(Embedder(model, params, processor))
