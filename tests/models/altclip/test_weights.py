"""Every published layout gives the parameters that make our model equal the original; export loads in transformers."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import torch
import transformers

from vlm.convert.torch_file import open_tensors
from vlm.convert.views import from_array
from vlm.errors import UserError
from vlm.loading import expected_params
from vlm.models import get_family
from vlm.models.altclip import weights
from vlm.tree import unflatten

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 32, "max_position_embeddings": 20, "project_dim": 12}
VISION = {"hidden_size": 24, "num_hidden_layers": 11, "num_attention_heads": 2, "intermediate_size": 32}
VISION |= {"image_size": 16, "patch_size": 4}
CLIP_TEXT = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CLIP_TEXT |= {"vocab_size": 30, "max_position_embeddings": 7, "eos_token_id": 29, "bos_token_id": 28}

TOKENS = np.array([[0, 5, 6, 7, 2, 1], [0, 9, 2, 1, 1, 1]])
MASK = TOKENS != 1
IMAGE = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
CLIP_TOKENS = np.array([[28, 3, 4, 5, 29, 0, 0], [28, 7, 29, 0, 0, 0, 0]])
ALTCLIP = get_family("altclip")


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


@pytest.fixture(scope="module")
def altclip():
    config = transformers.AltCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=10)
    return randomise(transformers.AltCLIPModel(config))


@pytest.fixture(scope="module")
def clip():
    config = transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=10)
    return randomise(transformers.CLIPModel(config))


@pytest.fixture(scope="module")
def xlmr():
    sizes = {k: v for k, v in TEXT.items() if k != "project_dim"}
    config = transformers.XLMRobertaConfig(**sizes, type_vocab_size=1, layer_norm_eps=1e-5)
    return randomise(transformers.XLMRobertaForMaskedLM(config))


def saved(model, path):
    model.save_pretrained(path)
    return read(open_tensors(path), json.loads((path / "config.json").read_text()))


def read(tensors, config, **options):
    return weights.read(tensors, config, source="file", shapes=shapes, **options)


@functools.cache
def shapes(config):
    return expected_params(ALTCLIP, config)


def lazy(state):
    return {name: from_array(np.asarray(value.detach())) for name, value in state.items()}


def apply(imported, method=None, **inputs):
    params = unflatten({path: view.read() for path, view in imported.params.items()})
    module = ALTCLIP.module(imported.config)
    arrays = {name: value for name, value in inputs.items() if not isinstance(value, str)}
    options = {name: value for name, value in inputs.items() if isinstance(value, str)}
    return jax.jit(lambda p, x: module.apply({"params": p}, **x, **options, method=method))(params, arrays)


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), atol=2e-5, rtol=0)


def run(model):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(TOKENS),
            attention_mask=torch.tensor(MASK),
            pixel_values=torch.tensor(IMAGE.transpose(0, 3, 1, 2)),
        )


def assert_equals_altclip(imported, model):
    ours, theirs = apply(imported, image=IMAGE, tokens=TOKENS, mask=MASK), run(model)
    for name in ("logits_per_image", "text_embeds", "image_embeds"):
        close(getattr(ours, name), getattr(theirs, name))
    close(ours.text_model_output.last_hidden_state, theirs.text_model_output.last_hidden_state)
    close(ours.vision_model_output.last_hidden_state, theirs.vision_model_output.last_hidden_state)


def respell(state, text=None, vision=None):
    """Renames the layers of either tower to "layer" or "layers"."""
    renamed = {}
    for name, value in state.items():
        spelling = text if name.startswith("text_model.") else vision
        for old in ("encoder.layers.", "encoder.layer."):
            name = name.replace(old, f"encoder.{spelling}.") if spelling and old in name else name
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("text", ["layer", "layers"])
@pytest.mark.parametrize("vision", ["layer", "layers"])
def test_every_spelling_of_the_layers(altclip, text, vision):
    imported = read(lazy(respell(altclip.state_dict(), text, vision)), altclip.config.to_dict())
    assert imported.layout == "AltCLIP (Hugging Face, FlagAI)" and imported.notes == []
    if text == vision == "layer":
        assert_equals_altclip(imported, altclip)


def test_file_saved_by_transformers(altclip, tmp_path):
    assert_equals_altclip(saved(altclip, tmp_path), altclip)


def test_flagai_files(altclip, tmp_path):
    """Unused poolers, buffers and options, in a .pth wrapped by a trainer; no config.json."""
    state = respell(altclip.state_dict(), "layer", "layers")
    state |= {
        "text_model.roberta.pooler.dense.weight": torch.ones(16, 16),
        "text_model.roberta.pooler.dense.bias": torch.ones(16),
        "text_model.roberta.embeddings.position_ids": torch.arange(20)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.encoder_tfm.weight": torch.ones(12, 16),
    }
    torch.save({"module": state, "epoch": 3}, tmp_path / "flagai.pth")
    tensors = open_tensors(tmp_path / "flagai.pth")
    assert_equals_altclip(read(tensors, altclip.config.to_dict()), altclip)
    guessed = read(tensors, None, overrides={"vision.num_heads": 2, "text.num_heads": 2})
    assert_equals_altclip(guessed, altclip)
    assert "assumed" in guessed.notes[0]


def test_text_tower_alone(altclip, tmp_path):
    imported = saved(altclip.text_model, tmp_path)
    assert imported.config.vision is None and imported.config.projection_dim is None
    theirs = altclip.text_model(torch.tensor(TOKENS), torch.tensor(MASK))
    ours = apply(imported, tokens=TOKENS, mask=MASK).text_model_output
    close(ours.last_hidden_state, theirs.last_hidden_state)
    close(ours.pooler_output, theirs.pooler_output)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_vision_tower_alone(altclip, prefix):
    state = {prefix + name: value for name, value in altclip.vision_model.state_dict().items()}
    for config in (altclip.config.vision_config.to_dict(), altclip.config.to_dict()):
        imported = read(lazy(state), config)
        theirs = altclip.vision_model(torch.tensor(IMAGE.transpose(0, 3, 1, 2)))
        close(apply(imported, image=IMAGE).vision_model_output.pooler_output, theirs.pooler_output)


def test_half_of_a_joint_checkpoint(altclip):
    state = altclip.state_dict()
    text = read(lazy({k: v for k, v in state.items() if k.startswith("text_")}), altclip.config.to_dict())
    assert text.config.vision is None and text.config.projection_dim == 10
    close(apply(text, tokens=TOKENS, mask=MASK).text_embeds, run(altclip).text_embeds)
    vision = read(lazy({k: v for k, v in state.items() if k.startswith("vis")}), altclip.config.to_dict())
    close(apply(vision, image=IMAGE).image_embeds, run(altclip).image_embeds)


def test_altdiffusion_text_encoders(altclip):
    """The m9 form has no norm; the m18 form reads the last layer but one through a second linear map."""
    tower = altclip.text_model
    state = {k: v for k, v in tower.state_dict().items() if not k.startswith("pre_LN")}
    config = tower.config.to_dict() | {
        "model_type": "roberta",
        "architectures": ["RobertaSeriesModelWithTransformation"],
    }
    hidden = tower.roberta(torch.tensor(TOKENS), torch.tensor(MASK), output_hidden_states=True).hidden_states
    m9 = read(lazy(state | {"logit_scale": torch.ones(())}), config)
    assert not m9.config.text_norm
    ours = apply(m9, "encode_tokens", tokens=TOKENS, mask=MASK)
    close(ours, tower.transformation(hidden[-1]))

    pre = randomise(torch.nn.Linear(16, 12))
    state = tower.state_dict() | {f"transformation_pre.{k}": v for k, v in pre.state_dict().items()}
    m18 = read(lazy(state), config | {"has_pre_transformation": True})
    ours = apply(m18, "encode_tokens", tokens=TOKENS, mask=MASK, layer="penultimate")
    close(ours, pre(tower.pre_LN(hidden[-2])))


def test_bert_student(altclip):
    sizes = {k: v for k, v in TEXT.items() if k != "project_dim"}
    bert = randomise(transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=True))
    state = {f"text_model.bert.{k}": v for k, v in bert.state_dict().items()}
    state |= {k: v for k, v in altclip.state_dict().items() if "text_model.roberta" not in k}
    section = {**bert.config.to_dict(), "project_dim": 12}
    imported = read(lazy(state), altclip.config.to_dict() | {"text_config": section})
    assert imported.layout == "AltCLIP with a BERT student (FlagAI)" and imported.config.text.norm_eps == 1e-12
    last = bert(torch.tensor(TOKENS), torch.tensor(MASK)).last_hidden_state
    tower = altclip.text_model
    ours = apply(imported, tokens=TOKENS, mask=MASK).text_model_output
    close(ours.last_hidden_state, tower.transformation(tower.pre_LN(last)))


def test_xlmr_with_its_masked_language_head(xlmr, tmp_path):
    imported = saved(xlmr, tmp_path)
    assert imported.config.lm_head and not imported.config.text_transformation
    theirs = xlmr(torch.tensor(TOKENS), torch.tensor(MASK)).logits
    close(apply(imported, "lm_logits", tokens=TOKENS, mask=MASK), theirs)
    state = xlmr.state_dict()  # with the tied decoder, as older files have it
    assert "lm_head.decoder.weight" in state
    assert read(lazy(state), xlmr.config.to_dict()).config == imported.config
    state["lm_head.decoder.weight"] = state["lm_head.decoder.weight"] + 1
    with pytest.raises(UserError, match="lm_head.decoder.weight differs from"):
        read(lazy(state), xlmr.config.to_dict())


def fuse(state):
    """HF CLIP names to OpenAI's and OpenCLIP's: q, k, v in one tensor, projections transposed."""
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names |= {"self_attn.out_proj": "attn.out_proj", "encoder.layers": "transformer.resblocks"}
    names |= {"vision_model.": "visual.", "text_model.": "", "final_layer_norm": "ln_final", "pre_layrnorm": "ln_pre"}
    names |= {
        "post_layernorm": "ln_post",
        "embeddings.patch_embedding": "conv1",
        "embeddings.token_embedding": "token_embedding",
    }
    names |= {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.class_embedding": "class_embedding",
    }
    names |= {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
    fused = {}
    for name, value in state.items():
        new = name.replace("self_attn.q_proj.", "attn.in_proj_")
        if new != name:
            value = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        elif any(f"self_attn.{x}_proj" in name for x in "kv"):
            continue
        for old, replacement in names.items():
            new = new.replace(old, replacement)
        fused[new] = value.T if new in ("visual.proj", "text_projection") else value
    return fused


def run_clip(model):
    with torch.no_grad():
        return model(torch.tensor(CLIP_TOKENS), torch.tensor(IMAGE.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("source", ["hf", "openai", "open_clip", "custom text"])
def test_clip_from_its_three_code_bases(clip, source, tmp_path):
    if source == "hf":
        imported = saved(clip, tmp_path)
    else:
        state, config = fuse(clip.state_dict()), None
        if source == "openai":
            state |= {
                "input_resolution": torch.tensor(16),
                "context_length": torch.tensor(7),
                "vocab_size": torch.tensor(30),
            }
        if source == "custom text":
            visual = ("visual.", "logit_scale")
            state = {k if k.startswith(visual) else f"text.{k}": v for k, v in state.items()}
            state["text.attn_mask"] = torch.zeros(7, 7)
        if source != "openai":
            vision = {"head_width": 12, "width": 24, "layers": 11}
            config = {"model_cfg": {"quick_gelu": True, "vision_cfg": vision, "text_cfg": {"heads": 2}}}
        heads = {"vision.num_heads": 2, "clip_text.num_heads": 2} if source == "openai" else {}
        imported = read(lazy(state), config, overrides=heads)
        assert imported.layout == "CLIP (OpenAI, OpenCLIP)"
        assert (source == "openai") == bool(imported.notes)
    ours, theirs = apply(imported, image=IMAGE, tokens=CLIP_TOKENS), run_clip(clip)
    close(ours.logits_per_image, theirs.logits_per_image)
    close(ours.text_embeds, theirs.text_embeds)


def test_assembly_from_xlmr_and_clip(xlmr, clip, tmp_path):
    text, vision = saved(xlmr, tmp_path / "xlmr"), saved(clip, tmp_path / "clip")
    built = weights.assemble(text, vision, shapes=shapes, seed=3)
    assert built.config.project_dim == 12 and built.config.clip_text is None and not built.config.lm_head
    initialised = [note for note in built.notes if note.startswith("initialised")]
    assert [note.split()[1] for note in initialised] == [
        "text_norm/bias",
        "text_norm/scale",
        "text_transformation/bias",
        "text_transformation/kernel",
    ]
    again = weights.assemble(text, vision, shapes=shapes, seed=3)
    other = weights.assemble(text, vision, shapes=shapes, seed=4)
    kernel = "text_transformation/kernel"
    np.testing.assert_array_equal(built.params[kernel].read(), again.params[kernel].read())
    assert not np.array_equal(built.params[kernel].read(), other.params[kernel].read())
    close(apply(built, image=IMAGE).image_embeds, run_clip(clip).image_embeds)
    hidden = xlmr.roberta(torch.tensor(TOKENS), torch.tensor(MASK)).last_hidden_state
    ours = apply(built, "encode_tokens", tokens=TOKENS, mask=MASK)
    np.testing.assert_allclose(ours, hidden.detach().numpy() @ built.params[kernel].read(), atol=2e-5)
    np.testing.assert_array_equal(built.params["text_projection/kernel"].read(), clip.text_projection.weight.T.detach())
    with pytest.raises(UserError, match="XLM-R has no vision tower"):
        weights.assemble(text, text, shapes=shapes)
    with pytest.raises(UserError, match=r"CLIP \(Hugging Face\) has no XLM-R or BERT text encoder"):
        weights.assemble(vision, vision, shapes=shapes)


EXPORTS = {
    "altclip": ("AltCLIPModel", lambda a, c, x: a),
    "text": ("AltCLIPTextModel", lambda a, c, x: a.text_model),
    "vision": ("AltCLIPVisionModel", lambda a, c, x: a.vision_model),
    "clip": ("CLIPModel", lambda a, c, x: c),
    "clip text": ("CLIPTextModel", lambda a, c, x: c.text_model),
    "xlmr": ("XLMRobertaForMaskedLM", lambda a, c, x: x),
    "xlmr bare": ("XLMRobertaModel", lambda a, c, x: x.roberta),
}


@pytest.mark.parametrize(("name", "pick"), EXPORTS.values(), ids=EXPORTS)
def test_export_loads_in_transformers_without_missing_or_unexpected_keys(altclip, clip, xlmr, name, pick, tmp_path):
    from vlm.convert.writer import write_tensors

    original = pick(altclip, clip, xlmr)
    imported = saved(original, tmp_path / "original")
    tensors, config = weights.write(imported.config, imported.params)
    assert config["architectures"] == [name]
    write_tensors(tmp_path, "model", tensors, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    cls = getattr(transformers, name)
    options = {"add_pooling_layer": False} if name == "XLMRobertaModel" else {}
    loaded, report = cls.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    state = loaded.state_dict()
    for key, value in original.state_dict().items():
        np.testing.assert_array_equal(state[key].numpy(), value.numpy(), key)

    again = read(open_tensors(tmp_path / "model.safetensors"), config)
    assert again.config == imported.config
    assert list(again.params) == list(imported.params)
    for path, view in imported.params.items():
        assert again.params[path].read().tobytes() == view.read().tobytes()


def test_altdiffusion_round_trip(altclip):
    state = altclip.text_model.state_dict()
    state |= {"transformation_pre.weight": torch.randn(12, 16), "transformation_pre.bias": torch.randn(12)}
    imported = read(lazy(state), altclip.config.text_config.to_dict())
    tensors, config = weights.write(imported.config, imported.params)
    assert config["architectures"] == ["RobertaSeriesModelWithTransformation"] and config["has_pre_transformation"]
    assert read(tensors, config).config == imported.config


def test_parts_that_no_transformers_class_holds(altclip):
    imported = read(lazy(altclip.state_dict()), altclip.config.to_dict())
    config = dataclasses.replace(imported.config, lm_head=True)
    with pytest.raises(UserError, match=r"no transformers class holds this combination"):
        weights.write(config, imported.params)
    assert weights.without(config, imported.params) == imported.config
    bert = dataclasses.replace(config, lm_head=False, text=dataclasses.replace(config.text, positions="absolute"))
    with pytest.raises(UserError, match="BERT text tower"):
        weights.write(bert, imported.params)


def test_mismatches_name_the_layout_and_the_difference(altclip):
    state, config = altclip.state_dict(), altclip.config.to_dict()
    del state["text_model.pre_LN.bias"]
    state["text_model.extra"] = torch.ones(1)
    with pytest.raises(UserError) as error:
        read(lazy(state), config)
    assert str(error.value).startswith("file (AltCLIP (Hugging Face, FlagAI)): ")
    assert "unknown tensor text_model.extra" in str(error.value)
    config["vision_config"]["num_hidden_layers"] = 12
    del state["text_model.extra"]
    with pytest.raises(UserError) as error:
        read(lazy(state), config)
    assert "missing text_norm/bias (from text_model.pre_LN.bias)" in str(error.value)
    assert "vision/layers/mlp/up/kernel: expected shape [12, 24, 32], found [11, 24, 32]" in str(error.value)
    with pytest.raises(UserError, match="unknown layout"):
        read(lazy({"foo.weight": torch.ones(1)}), None)
