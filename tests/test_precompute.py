"""Precomputed teacher embeddings: the same loss as the live teacher's, every sentence once, wrong calls in one line."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest

import vlm
from vlm import dry_run, precompute
from vlm.config import build, parse_config_flag
from vlm.data.teacher_cache import TeacherCache, write_cache
from vlm.experiment import experiment, make_loader, make_processor
from vlm.models.altclip import AltCLIP, AltCLIPConfig, example
from vlm.schema import Config
from vlm.sharding import make_mesh

CONFIG = "configs/altclip.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_data):
    """Demo data and a random CLIP in the place of the trained one."""
    folder = tmp_path_factory.mktemp("precompute")
    (folder / "data").symlink_to(demo_data)
    settings = build(Config, parse_config_flag(f"configs/digits.py:clip,{folder}"), "")
    config = build(AltCLIPConfig, settings.model, "model")
    model = AltCLIP(config)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), **example(config)))["params"]
    vlm.save(folder / "clip", model, params)
    return folder


def _loss(variant, folder, extra, **changes):
    """The first batch's loss with the student at its initial weights."""
    config = parse_config_flag(f"{CONFIG}:{variant},{folder}")
    config.data.batch_size = 16
    config.update(changes)
    if "cached" in variant:
        config.data.teacher_cache = str(folder / "cache")
    settings = build(Config, config, "")
    parts = experiment(settings)
    split = jax.sharding.NamedSharding(
        make_mesh(settings.sharding.mesh, jax.devices()[:1]), jax.sharding.PartitionSpec()
    )
    loader = make_loader(settings, make_processor(settings, parts.family), split, None)
    with loader.iterate(0) as batches:
        batch = next(batches)
    params = nn.unbox(jax.jit(parts.init.init_params)(jax.random.key(1)))
    value, _ = jax.jit(parts.loss)(params, extra, batch, jax.random.key(2))
    return float(value), set(batch)


def test_cached_and_live_teacher_give_the_same_loss(folder, capsys):
    config = f"--config={CONFIG}:tiny_teacher,{folder}"
    assert precompute.main([config, f"--output={folder / 'cache'}", "--dtype=float32", "--batch_size=100"]) == 0
    cache = TeacherCache(folder / "cache", verify=True)
    assert f"{len(cache)} sentences" in capsys.readouterr().out
    _, params, _ = vlm.load(folder / "clip")
    live, live_keys = _loss("tiny_teacher", folder, {"teacher": {k: params[k] for k in ("text", "text_projection")}})
    cached, cached_keys = _loss("tiny_teacher_cached", folder, {})
    settings = parse_config_flag(
        f"{CONFIG}:tiny_teacher_cached,{folder}", [f"--config.data.teacher_cache={folder}/cache"]
    )
    from_data = dry_run.describe(build(Config, settings, ""), settings).split("== one batch")[1]
    assert f"target  64x{cache.dim}  float32" in re.sub(" +", "  ", from_data)
    assert live > 0.1 and "teacher_tokens" in live_keys and cached_keys == {"tokens", "mask", "target"}
    np.testing.assert_allclose(cached, live, rtol=1e-6)
    assert precompute.main([config, f"--output={folder / 'half'}", "--dtype=float16"]) == 0
    half = TeacherCache(folder / "half")
    assert (half.teacher, half.dim, len(half)) == (cache.teacher, cache.dim, len(cache))


@pytest.mark.parametrize("data", ["prepared", "absent"])
def test_dry_run_shows_the_targets(folder, data):
    config = parse_config_flag(f"{CONFIG}:tiny_teacher_cached,{folder}")
    config.data.teacher_cache = str(folder / data)
    if data == "prepared":
        write_cache(folder / data, [(["zero"], np.zeros((1, 64), np.float32))], teacher="pooled:x")
        config.data.sources = ({"kind": "jsonl", "path": str(folder / "one.jsonl")},)
        (folder / "one.jsonl").write_text('{"source_text": "zero", "text": "cero"}')
    batch = dry_run.describe(build(Config, config, ""), config).split("== one batch")[1]
    assert re.search(r"^target +64x64 +float32$", batch, re.M), batch
    assert ("not available here" in batch) == (data == "absent") and "teacher_tokens" not in batch


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("tiny", [], "expected objective 'teacher_learning' with a live teacher"),
        ("tiny_teacher_cached", [], "expected objective 'teacher_learning' with a live teacher"),
        ("tiny_teacher", ["--config.init=()"], "no checkpoint gives the teacher's weights"),
    ],
)
def test_wrong_calls_end_in_one_line_and_leave_nothing(variant, options, message, folder, capsys, tmp_path):
    arguments = [f"--config={CONFIG}:{variant},{folder}", f"--output={tmp_path / 'cache'}", *options]
    with pytest.raises(SystemExit) as stop:
        precompute.main(arguments)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in error and error.count("\n") == 0
    assert list(tmp_path.iterdir()) == []
