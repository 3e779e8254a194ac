"""Architectures from configurations old and new and from files without one, and what transformers cannot hold."""

import dataclasses
import json

import pytest
import transformers

from vlm.errors import UserError
from vlm.models.flava import weights
from vlm.models.flava.hf_config import architecture

from .published import (
    ENCODER,
    full_config,
    lazy,
    read,
    stub,
)

LEGACY = {
    "absent": {},
    "null": {"text_config_dict": None},
    "empty": {"text_config_dict": {}, "image_config_dict": {}},
    "partial": {"text_config_dict": {"layer_norm_eps": 1e-6, **ENCODER, "unknown": 3}},
    "codebook": {
        "image_codebook_config_dict": {"vocab_size": 20},
        "multimodal_config_dict": ENCODER | {"num_hidden_layers": 1},
    },
}


@pytest.mark.parametrize("case", LEGACY)
def test_old_configurations_are_merged_as_in_transformers(expected, case):
    config = full_config().to_dict()
    config["text_config"] |= {"layer_norm_eps": 1e-7, "hidden_dropout_prob": 0.5}
    config |= LEGACY[case]
    theirs = transformers.FlavaConfig(**json.loads(json.dumps(config)))
    views = {path: view for path, view in expected.params.items() if not path.startswith("codebook/")}
    notes: list[str] = []
    ours = architecture(config, views, notes, layout="FLAVA (Hugging Face)", overrides={})
    for part, section in (("text", "text_config"), ("vision", "image_config"), ("fusion", "multimodal_config")):
        mine, other = getattr(ours, part), getattr(theirs, section)
        assert (mine.hidden_size, mine.num_layers, mine.num_heads, mine.norm_eps, mine.dropout_rate) == (
            *(other.hidden_size, other.num_hidden_layers, other.num_attention_heads),
            *(other.layer_norm_eps, other.hidden_dropout_prob),
        )
    assert ours.image_vocab_size == theirs.image_config.vocab_size
    warned = "\n".join(notes)
    assert all(note.startswith("warning: config.json: as in transformers, ") for note in notes)
    if case in ("absent", "null"):
        assert not notes
    elif case == "empty":
        assert len(notes) == 2 and "text_config_dict overrides text_config: hidden_size 16 -> 768" in warned
        assert "hidden_dropout_prob 0.5 -> 0.0" in warned and "image_size 8 -> 224" in warned
    elif case == "partial":
        assert len(notes) == 1 and "layer_norm_eps 1e-07 -> 1e-06" in warned and "hidden_size" not in warned
    else:
        assert len(notes) == 1 and "multimodal_config_dict overrides multimodal_config: num_hidden_layers" in warned


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({}, r"35 problems: .*expected shape \[30522\], found \[40\]"),
        ({"hidden_size": 16}, r"text.*hidden_size: expected a multiple of num_heads=12, found 16"),
    ],
)
def test_sizes_that_do_not_fit_name_the_old_configuration(models, section, problem):
    config = full_config().to_dict() | {"text_config_dict": section}
    with pytest.raises(UserError, match=rf"{problem}.*; warning: .*num_attention_heads 2 -> 12") as error:
        read(lazy(models["FlavaForPreTraining"].state_dict()), config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (128, 2), (1280, 16), (1408, 16), (2048, 16), (80, None)])
def test_heads_of_a_file_without_a_configuration(width, heads):
    views = {"fusion/layers/mlp/up/kernel": stub((6, width, 4 * width)), "fusion/pooler/kernel": stub((width, width))}
    notes: list[str] = []
    if heads is None:
        with pytest.raises(UserError, match=r"^fusion: nothing tells .* width 80.*--override=fusion\.num_heads=N$"):
            architecture(None, views, notes, layout="FLAVA (torchmultimodal)", overrides={})
        return
    built = architecture(None, views, notes, layout="FLAVA (torchmultimodal)", overrides={})
    assert built.fusion.num_heads == heads and f"fusion.num_heads={heads}" in notes[0]


def test_what_transformers_cannot_hold(expected):
    config = expected.config
    for changes, message in (
        ({"heads": False}, r"codebook, but no heads.*--drop='codebook/"),
        ({"fusion": None, "heads": False, "codebook": None}, r"--drop='\(\?!text/\)"),
        ({"vision": dataclasses.replace(config.vision, pooler=False)}, "needs a pooler in every encoder: vision"),
        ({"codebook": dataclasses.replace(config.codebook, num_groups=3)}, "4 groups, found 3"),
        (
            {"fusion": dataclasses.replace(config.fusion, hidden_size=8)},
            "one width, found vision 16, text 16, fusion 8",
        ),
    ):
        with pytest.raises(UserError, match=message):
            weights.write(dataclasses.replace(config, **changes), expected.params)
    kept = {path: view for path, view in expected.params.items() if path.startswith("text/")}
    alone = weights.without(config, kept)
    tensors, written = weights.write(alone, kept)
    assert written["model_type"] == "flava_text_model" and "embeddings.word_embeddings.weight" in tensors
    kept = {path: view for path, view in expected.params.items() if "_head" not in path and "codebook" not in path}
    assert weights.write(weights.without(config, kept), kept)[1]["architectures"] == ["FlavaModel"]
