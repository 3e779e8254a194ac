"""Every published layout gives the parameters that make our model equal the original, and is written back as it was."""

import functools
import json
import re

import jax
import numpy as np
import pytest
import torch
import transformers

from vlm.convert.torch_file import open_tensors
from vlm.convert.torch_writer import write_pth
from vlm.convert.views import TensorView, from_array
from vlm.convert.writer import write_tensors
from vlm.errors import UserError
from vlm.loading import expected_params
from vlm.models import get_family
from vlm.models.blip import weights
from vlm.models.blip.hf_config import architecture
from vlm.models.blip.model import BLIP
from vlm.tree import unflatten

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 32, "max_position_embeddings": 20}
VISION = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
VISION |= {"image_size": 16, "patch_size": 4}
HEADS = {"vision.num_heads": 2, "text.num_heads": 2, "decoder.num_heads": 2}
CLASSES = ("BlipForConditionalGeneration", "BlipForQuestionAnswering", "BlipForImageTextRetrieval", "BlipModel")
HEAD = "text_decoder.cls.predictions"

IMAGE = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
TOKENS = np.array([[9, 5, 6, 7, 2], [9, 8, 2, 0, 0]])
MASK = TOKENS != 0


@pytest.fixture(scope="module")
def models(randomise):
    """A small random model of every class; the one that answers questions needs one width for both towers."""

    def make(name):
        vision = VISION | ({"hidden_size": 16} if name == "BlipForQuestionAnswering" else {})
        config = transformers.BlipConfig(text_config=TEXT, vision_config=vision, image_text_hidden_size=10)
        config.projection_dim = 10
        return randomise(getattr(transformers, name)(config), scale=0.3)

    return {name: make(name) for name in CLASSES}


@functools.cache
def shapes(config):
    return expected_params(get_family("blip"), config)


def lazy(state):
    return {name: from_array(np.asarray(value.detach())) for name, value in state.items()}


def read(tensors, config=None, overrides=HEADS):
    kept = {name: value for name, value in overrides.items() if config is None}
    if config is None:
        present = {"text": r"text_encoder\.", "decoder": r"text_decoder\.", "vision": ""}
        sharing = any(name.startswith(("text_encoder_m", "itm_head")) for name in tensors)
        kept = {
            k: v
            for k, v in kept.items()
            if any(re.match(present[k.split(".")[0]], n) for n in tensors) and not (sharing and "decoder" in k)
        }
    return weights.read(tensors, config, source="file", shapes=shapes, overrides=kept)


def opened(folder):
    return read(open_tensors(folder), json.loads((folder / "config.json").read_text()))


def values(views):
    return {path: view.read() for path, view in views.items()}


def same(left, right):
    assert left.keys() == right.keys()
    for name, view in left.items():
        assert view.dtype == right[name].dtype and view.shape == right[name].shape, name
        assert view.read().tobytes() == right[name].read().tobytes(), name


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), atol=2e-5, rtol=0)


@functools.cache
def compiled(config, method):
    model = BLIP(config)
    return jax.jit(lambda p, x: model.apply({"params": p}, **x, method=method))


def outputs(imported, method=None, **inputs):
    return compiled(imported.config, method)(unflatten(values(imported.params)), inputs)


def torch_inputs():
    return {
        "pixel_values": torch.tensor(IMAGE.transpose(0, 3, 1, 2)),
        "input_ids": torch.tensor(TOKENS),
        "attention_mask": torch.tensor(MASK.astype(np.int64)),
    }


def assert_equal_outputs(imported, model):
    """Our model against transformers' (which ignores masks in cross-attention: questions are not padded here)."""
    name, inputs = type(model).__name__, torch_inputs()
    with torch.no_grad():
        if name == "BlipForConditionalGeneration":
            ours = outputs(imported, image=IMAGE, tokens=TOKENS, mask=MASK)
            close(ours.logits, model(**inputs).logits)
        elif name == "BlipForImageTextRetrieval":
            ours = outputs(imported, image=IMAGE, tokens=TOKENS, mask=MASK)
            close(ours.itm_score, model(**inputs).itm_score)
            cosines = model(**inputs, use_itm_head=False).itm_score
            image = outputs(imported, BLIP.encode_image, image=IMAGE)
            text = outputs(imported, BLIP.encode_text, tokens=TOKENS, mask=MASK)
            units = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in map(np.asarray, (image, text))]
            close(units[0] @ units[1].T, cosines)
        elif name == "BlipModel":
            ours = outputs(imported, image=IMAGE, tokens=TOKENS, mask=MASK)
            theirs = model(**inputs)
            for field in ("text_embeds", "image_embeds", "logits_per_image", "logits_per_text"):
                close(getattr(ours, field), getattr(theirs, field))
            close(ours.vision_pooler_output, theirs.vision_model_output.pooler_output)
        else:
            question, answer = TOKENS[:1], TOKENS[:1, :3]
            ours = outputs(
                imported,
                image=IMAGE[:1],
                tokens=question,
                mask=question > 0,
                answer_tokens=answer,
                answer_mask=answer > 0,
            )
            states = model.text_encoder(
                input_ids=torch.tensor(question),
                encoder_hidden_states=model.vision_model(inputs["pixel_values"][:1]).last_hidden_state,
            ).last_hidden_state
            close(ours.logits, model.text_decoder(torch.tensor(answer), encoder_hidden_states=states).logits)


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_to_ours_and_back(models, name, tmp_path):
    models[name].save_pretrained(tmp_path / "source")
    imported = opened(tmp_path / "source")
    assert imported.notes == [] and imported.layout == f"{name} (Hugging Face)" and not imported.extra
    assert_equal_outputs(imported, models[name])
    tensors, config = weights.write(imported.config, imported.params)
    (tmp_path / "target").mkdir()
    write_tensors(tmp_path / "target", "model", tensors, metadata={"format": "pt"})
    (tmp_path / "target" / "config.json").write_text(json.dumps(config))
    loaded, info = type(models[name]).from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not any(info.values()), info
    for (key, ours), (_, theirs) in zip(loaded.state_dict().items(), models[name].state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), key
    assert loaded.config.text_config.num_attention_heads == 2
    again = opened(tmp_path / "target")
    assert again.config == imported.config and again.config.vision.norm_eps == 1e-5
    same(again.params, imported.params)


# The authors' names, written here from the published list of keys, independently of the tables.
VISION_NAMES = [
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
    (".layer_norm1", ".norm1"),
    (".layer_norm2", ".norm2"),
    (".self_attn.projection", ".attn.proj"),
    (".self_attn", ".attn"),
    ("vision_model.encoder.layers", "visual_encoder.blocks"),
    ("vision_model.post_layernorm", "visual_encoder.norm"),
]


def original(model):
    """A transformers model's state dict under the authors' names, with the integer buffers of their files."""
    state = {}
    for name, value in model.state_dict().items():
        for theirs, authors in VISION_NAMES if name.startswith("vision_model") else ():
            name = name.replace(theirs, authors)
        state[name] = value.clone()
    stacks = {re.sub("word_embeddings.weight", "", name) for name in state if "word_embeddings" in name}
    return state | {f"{stack}position_ids": torch.arange(20)[None] for stack in stacks}


def queues(columns=12):
    generator = torch.Generator().manual_seed(1)
    return {
        "image_queue": torch.randn(10, columns, generator=generator),
        "text_queue": torch.randn(10, columns, generator=generator),
    }


def momentum(state):
    """The teacher, with values of its own."""
    parts = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.")
    names = {name: re.sub(r"^(\w+)\.", r"\1_m.", name) for name in state if name.startswith(parts)}
    return {new: state[old] + (0 if "position_ids" in old else 1) for old, new in names.items()}


@pytest.fixture(scope="module")
def retrieval(models):
    state = original(models["BlipForImageTextRetrieval"])
    state |= momentum(state) | queues() | {"temp": torch.tensor(0.05), "ptr_queue": torch.tensor([4])}
    return state | {"idx_queue": torch.arange(-6, 6)[None]}


@pytest.fixture(scope="module")
def pretraining(models):
    """Encoder and decoder stored whole, equal but for self-attention, as modules that share parameters save them."""
    state = original(models["BlipForImageTextRetrieval"])
    decoder = original(models["BlipForConditionalGeneration"])
    for name, value in decoder.items():
        encoder = name.replace("text_decoder.bert.", "text_encoder.")
        if name.startswith("text_decoder.cls") or "/attention" in name.replace(".attention", "/attention"):
            state[name] = value
        elif name.startswith("text_decoder"):
            state[name] = state[encoder]
    state[f"{HEAD}.decoder.weight"] = state["text_encoder.embeddings.word_embeddings.weight"]
    return state | momentum(state) | queues() | {"temp": torch.tensor(0.05), "queue_ptr": torch.tensor([4])}


@pytest.fixture(scope="module")
def nlvr(models, pretraining):
    state = {k: v for k, v in pretraining.items() if k.startswith(("visual_encoder.", "text_encoder."))}
    twin = {}
    for name, value in state.items():
        if "crossattention.self" in name:
            twin |= {name.replace(".self", f".self{i}"): value + i for i in (0, 1)}
        elif "crossattention.output.dense" in name:
            twin |= {name.replace(".dense", f".dense{i}"): value + i for i in (0, 1)}
        else:
            twin[name] = value
    merge = "text_encoder.encoder.layer.1.crossattention.output.merge_layer"
    twin |= {f"{merge}.weight": torch.randn(16, 32), f"{merge}.bias": torch.randn(16)}
    return twin | classifier()


def classifier(classes=2):
    generator = torch.Generator().manual_seed(2)
    sizes = {"cls_head.0.weight": (16, 16), "cls_head.0.bias": (16,)}
    sizes |= {"cls_head.2.weight": (classes, 16), "cls_head.2.bias": (classes,)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def families(models, pretraining, retrieval, nlvr):
    part = {k: v for k, v in pretraining.items() if k.startswith(("visual_encoder.", "text_encoder."))}
    return {
        "pretraining": pretraining,
        "retrieval": retrieval,
        "captioning": original(models["BlipForConditionalGeneration"]),
        "question answering": original(models["BlipForQuestionAnswering"]),
        "NLVR2": nlvr,
        "classification": part | classifier(5),
    }


FAMILIES = ("pretraining", "retrieval", "captioning", "question answering", "NLVR2", "classification")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_authors_files_are_read_and_written_back(families, name, tmp_path):
    torch.save({"model": families[name], "epoch": 3, "config": {"image_size": 384}}, tmp_path / "model.pth")
    imported = read(open_tensors(tmp_path / "model.pth"))
    assert imported.layout == f"BLIP for {name} (.pth)" and imported.notes == []
    assert imported.config.vision.norm_eps == 1e-6 and imported.config.encoder_token == "enc"
    write_pth(tmp_path / "again.pth", weights.write_original(imported.config, imported.params, imported.extra))
    written = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    stored = {key: value for key, value in families[name].items() if "position_ids" not in key}
    assert written.keys() == stored.keys()
    for key, value in stored.items():
        assert written[key].dtype == value.dtype and torch.equal(written[key], value), key
    again = read(open_tensors(tmp_path / "again.pth"))
    assert again.config == imported.config
    same(again.params, imported.params)
    same(again.extra, imported.extra)


def test_a_pretraining_file_is_one_encoder_and_a_second_self_attention(models, pretraining):
    imported = read(lazy(pretraining))
    config = imported.config
    assert config.shared_decoder and config.decoder is None and config.itm and config.projection_dim == 10
    assert config.temperature == 0.07 and imported.params["temperature"].read() == np.float32(0.05)
    assert config.text.dropout_rate == 0.1 and config.text.context_size == 24
    ours = outputs(imported, BLIP.match, tokens=TOKENS, mask=MASK, context=states(models, "BlipForImageTextRetrieval"))
    with torch.no_grad():
        theirs = models["BlipForImageTextRetrieval"]
        context = theirs.vision_model(torch_inputs()["pixel_values"]).last_hidden_state
        text = theirs.text_encoder(torch.tensor(TOKENS), torch.tensor(MASK), encoder_hidden_states=context)
        close(ours, theirs.itm_head(text.last_hidden_state[:, 0]))
        decoder = models["BlipForConditionalGeneration"].text_decoder
        decoder = type(decoder)(decoder.config).eval()
        names = {k.removeprefix("text_decoder."): v for k, v in pretraining.items() if k.startswith("text_decoder.")}
        names.pop("bert.embeddings.position_ids")
        decoder.load_state_dict(names)
        logits = decoder(torch.tensor(TOKENS), torch.tensor(MASK), encoder_hidden_states=context).logits
    ours = outputs(imported, BLIP.decode_logits, tokens=TOKENS, mask=MASK, context=context.numpy())
    close(ours, logits)


def states(models, name):
    with torch.no_grad():
        return models[name].vision_model(torch_inputs()["pixel_values"]).last_hidden_state.numpy()


def test_teacher_and_queues_are_the_extra_state(pretraining, retrieval):
    extra = values(read(lazy(pretraining)).extra)
    assert extra["queue_index"].dtype == np.int32 and extra["queue_index"].shape == () and extra["queue_index"] == 4
    np.testing.assert_array_equal(extra["image_queue"], pretraining["image_queue"].numpy().T)
    np.testing.assert_array_equal(extra["text_queue"], pretraining["text_queue"].numpy().T)
    assert "id_queue" not in extra and not any("decoder" in path for path in extra)
    student = {
        path: view.read()
        for path, view in read(lazy(pretraining)).params.items()
        if path.startswith(("vision/", "text/", "vision_projection/", "text_projection/")) and "decoder" not in path
    }
    assert {path.removeprefix("teacher/") for path in extra if path.startswith("teacher/")} == student.keys()
    for path, value in student.items():
        np.testing.assert_array_equal(extra[f"teacher/{path}"], value + np.float32(1))
    extra = values(read(lazy(retrieval)).extra)
    assert extra["id_queue"].dtype == np.int32 and extra["id_queue"].tolist() == list(range(-6, 6))
    renamed = {("queue_ptr" if name == "ptr_queue" else name): v for name, v in retrieval.items()}  # LAVIS
    assert read(lazy(renamed)).extra["queue_index"].read() == 4


def test_nlvr_layers_average_or_merge(nlvr):
    imported = read(lazy(nlvr))
    config, params = imported.config, values(imported.params)
    assert config.num_images == 2 and config.num_labels == 2 and config.average_layers is None
    layer = "text_encoder.encoder.layer.{}.crossattention.{}.weight"
    for number, stack in enumerate(("average", "merge")):
        for i in "01":
            names = {"self" + i + ".key": "key", "self" + i + ".query": "query", "output.dense" + i: "out"}
            for theirs, ours in names.items():
                kernel = params[f"text/{stack}_layers/cross_attention_{i}/{ours}/kernel"]
                assert kernel.shape[0] == 1
                np.testing.assert_array_equal(kernel[0].T, nlvr[layer.format(number, theirs)].numpy())
    np.testing.assert_array_equal(
        params["text/merge_layers/merge/kernel"][0].T, nlvr[layer.format(1, "output.merge_layer")].numpy()
    )
    np.testing.assert_array_equal(params["classifier/out/kernel"].T, nlvr["cls_head.2.weight"].numpy())
    every = {name: value for name, value in nlvr.items() if "merge_layer" not in name}
    assert read(lazy(every)).config.average_layers == 2


def tied_file(model, case, kind, folder):
    """A captioning model whose head's copies are equal, different or not there, as a file of one of three formats."""
    names = original(model) if kind == "pth" else {k: v.clone() for k, v in model.state_dict().items()}
    if case == "different":
        names[f"{HEAD}.decoder.weight"] = names[f"{HEAD}.decoder.weight"] + 0.5
        names[f"{HEAD}.decoder.bias"] = names[f"{HEAD}.decoder.bias"] - 0.5
    if case == "missing":
        names = {name: value for name, value in names.items() if ".predictions.decoder." not in name}
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(names, folder / "model.safetensors")
    else:
        torch.save(names, folder / ("pytorch_model.bin" if kind == "bin" else "model.pth"))
    config = None if kind == "pth" else model.config.to_dict()
    return read(open_tensors(folder), config)


@pytest.mark.parametrize("kind", ["bin", "safetensors", "pth"])
@pytest.mark.parametrize("case", ["equal", "different", "missing"])
def test_tied_copies_of_the_output_weight(models, case, kind, tmp_path):
    model = models["BlipForConditionalGeneration"]
    imported = tied_file(model, case, kind, tmp_path)
    warnings = [note for note in imported.notes if note.startswith("warning")]
    assert imported.config.tied_lm_head == (case != "different")
    assert ("lm_head/kernel" in imported.params) == (case == "different")
    assert len(warnings) == (2 if case == "different" else 0), warnings
    context = states(models, "BlipForConditionalGeneration")
    ours = outputs(imported, BLIP.decode_logits, tokens=TOKENS, mask=MASK, context=context)
    with torch.no_grad():
        theirs = model.text_decoder(
            torch.tensor(TOKENS),
            torch.tensor(MASK),
            encoder_hidden_states=torch.tensor(context),
            output_hidden_states=True,
        )
        hidden = model.text_decoder.cls.predictions.transform(theirs.hidden_states[-1])
        shift = 0.5 if case == "different" else 0.0
        close(ours, theirs.logits + shift * hidden.sum(-1, keepdim=True) - shift)
    again = weights.write_original(imported.config, imported.params, {})
    same(read(again).params, imported.params)


def test_an_untied_head_loads_in_transformers(models, tmp_path):
    model = models["BlipForConditionalGeneration"]
    imported = tied_file(model, "different", "bin", tmp_path)
    tensors, config = weights.write(imported.config, imported.params)
    (tmp_path / "out").mkdir()
    write_tensors(tmp_path / "out", "model", tensors, metadata={"format": "pt"})
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_outputs(imported, loaded.eval())
    assert_equal_outputs(opened(tmp_path / "out"), loaded)


def test_a_bias_of_its_own_is_the_one_that_counts(models):
    state = {k: v.clone() for k, v in models["BlipForConditionalGeneration"].state_dict().items()}
    state[f"{HEAD}.bias"] += 1
    imported = read(lazy(state), models["BlipForConditionalGeneration"].config.to_dict())
    assert imported.config.tied_lm_head and "decoder.bias differs" in imported.notes[0]
    np.testing.assert_array_equal(imported.params["lm_head/bias"].read(), state[f"{HEAD}.decoder.bias"].numpy())


def test_declared_untied_without_an_output_weight_is_refused(models):
    state = lazy(models["BlipForConditionalGeneration"].state_dict())
    del state[f"{HEAD}.decoder.weight"]
    config = models["BlipForConditionalGeneration"].config.to_dict() | {"tie_word_embeddings": False}
    with pytest.raises(UserError, match=r"tie_word_embeddings is false, but .*decoder\.weight is missing"):
        read(state, config)


def test_shared_tensors_that_differ_are_refused(pretraining):
    changed = dict(pretraining)
    changed["text_decoder.bert.encoder.layer.0.output.dense.weight"] = torch.zeros(16, 32)
    with pytest.raises(UserError, match=r"1 problems: text_decoder\.bert.*output\.dense\.weight differs from text_enc"):
        read(lazy(changed))


def test_all_problems_are_in_one_line(retrieval):
    broken = {name: value for name, value in retrieval.items() if name != "text_proj.bias"}
    broken |= {"surprise": torch.zeros(1), "itm_head.weight": torch.zeros(3, 16), "image_queue": torch.zeros(9, 12)}
    del broken["vision_proj_m.bias"]
    with pytest.raises(UserError) as error:
        read(lazy(broken))
    message = str(error.value)
    for part in (
        "unknown tensor surprise",
        "missing text_projection/bias",
        "missing extra/teacher/vision_projection/bias",
    ):
        assert part in message, message
    assert "itm_head/kernel: expected shape [16, 2], found [16, 3]" in message and "\n" not in message
    assert "extra/image_queue: expected shape [12, 10], found [12, 9]" in message


def test_without_the_tensors_that_tell_sizes(retrieval):
    broken = {name: value for name, value in retrieval.items() if "word_embeddings" not in name}
    with pytest.raises(UserError, match=r"missing (text|extra/teacher/text)/token_embedding/embedding"):
        read(lazy(broken))
    del broken["visual_encoder.patch_embed.proj.weight"]
    with pytest.raises(UserError, match="vision"):
        read(lazy(broken))


def stub(shape):
    return TensorView(shape, np.dtype(np.float32), lambda index: np.zeros(0))


def stubs(width):
    """Shapes of a captioning model of a published width."""
    return {
        "vision/patch_embedding/kernel": stub((768, 768)),
        "vision/patch_embedding/bias": stub((768,)),
        "vision/position_embedding": stub((577, 768)),
        "vision/layers/mlp/up/kernel": stub((12, 768, 3072)),
        "decoder/token_embedding/embedding": stub((30524, width)),
        "decoder/position_embedding/embedding": stub((512, width)),
        "decoder/layers/mlp/up/kernel": stub((12, width, 3072)),
        "decoder/layers/cross_attention/key/kernel": stub((12, 768, width)),
        "lm_head/dense/kernel": stub((width, width)),
    }


@pytest.mark.parametrize(
    ("given", "overrides", "heads", "warned"),
    [
        ({"num_attention_heads": 12}, {}, 12, False),
        ({"num_attention_heads": 8}, {}, 12, True),
        ({}, {}, 12, True),
        ({"num_attention_heads": 8}, {"decoder.num_heads": 8}, 8, False),
        ({"num_attention_heads": 6}, {}, 6, False),
    ],
)
def test_the_head_count_is_never_guessed_silently(given, overrides, heads, warned):
    notes: list[str] = []
    config = {"text_config": {"hidden_size": 768, **given}, "vision_config": {"num_attention_heads": 12}}
    built = architecture(config, stubs(768), notes, hf=True, overrides=overrides)
    assert built.decoder.num_heads == heads and built.vision.num_heads == 12
    assert bool(notes) == warned and (not warned or "num_attention_heads" in notes[0])


def test_heads_of_a_pth_file():
    notes: list[str] = []
    built = architecture(None, stubs(768), notes, hf=False, overrides={})
    assert built.decoder.num_heads == 12 and "heads of 64 assumed" in notes[0]
    given: list[str] = []
    architecture(None, stubs(768), given, hf=False, overrides={"vision.num_heads": 8, "decoder.num_heads": 8})
    assert given == []
    assert built.vision.image_size == 384 and built.vision.patch_size == 16 and built.vision.norm_eps == 1e-6
    with pytest.raises(UserError, match=r"decoder: nothing tells .* width 80.*--override=decoder\.num_heads=N"):
        architecture(None, stubs(80), notes, hf=False, overrides={})


def test_nothing_is_read_but_the_tied_copies(pretraining):
    seen = set()

    def counted(name, view):
        return TensorView(view.shape, view.dtype, lambda index: seen.add(name) or view.fetch(index))

    tensors = {name: counted(name, view) for name, view in lazy(pretraining).items()}
    imported = read(tensors)
    assert all(name.startswith(("text_encoder.", "text_decoder.")) for name in seen)
    seen.clear()
    weights.write_original(imported.config, imported.params, imported.extra)
    assert not seen


def test_parts_that_transformers_cannot_hold(retrieval, pretraining, nlvr):
    notes: list[str] = []
    imported = read(lazy(retrieval))
    tensors, config = weights.write(imported.config, imported.params, notes)
    assert "temp" not in tensors and len(notes) == 1 and "temperature" in notes[0]
    assert config["architectures"] == ["BlipForImageTextRetrieval"] and config["image_text_hidden_size"] == 10
    for state, message in ((pretraining, "--task=caption"), (nlvr, "--to=original")):
        imported = read(lazy(state))
        with pytest.raises(UserError, match=message):
            weights.write(imported.config, imported.params)
