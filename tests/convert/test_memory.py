"""A conversion's memory does not grow with the model: what `benchmarks.conversion` measures at the published size."""

import dataclasses

import pytest

from benchmarks.conversion import DEEP_TEXT, MODELS, convert, make_source


@pytest.mark.long
def test_a_deep_model_needs_no_more_than_a_few_of_its_tensors(tmp_path):
    config = dataclasses.replace(MODELS["deep"], text=dataclasses.replace(DEEP_TEXT, num_layers=100))
    largest = make_source(tmp_path / "hf", config)
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size
    limit = 2.5 * largest + 500e6
    assert size > 2 * limit  # else the whole model would pass
    there = convert(tmp_path / "hf", tmp_path / "ours")
    back = convert(tmp_path / "ours", tmp_path / "back", "--to=hf")
    assert 0 < there.peak_anonymous < limit and 0 < back.peak_anonymous < limit
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "hf" / "model.safetensors"
    ).read_bytes()
