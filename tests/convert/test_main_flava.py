"""The command on FLAVA's files: a Hugging Face folder there and back, one part of it, files without a configuration."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil

import vlm
from vlm.convert.__main__ import main
from vlm.convert.torch_file import open_tensors
from vlm.loading import open_model
from vlm.manifest import verify_manifest

ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
TEXT = ENCODER | {"vocab_size": 12, "max_position_embeddings": 8}
IMAGE = ENCODER | {"image_size": 8, "patch_size": 4, "vocab_size": 10}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "two", "##s", ".", "of")
TEXTS = ["a cat", "two dogs of a cat of two cats ."]


@pytest.fixture(scope="module")
def model(randomise):
    sections = {"text_config": TEXT, "image_config": IMAGE, "multimodal_config": ENCODER}
    config = transformers.FlavaConfig(
        **sections, image_codebook_config={"hidden_size": 4, "vocab_size": 10}, hidden_size=16, projection_dim=6
    )
    return randomise(transformers.FlavaForPreTraining(config), scale=0.3)


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    """Weights, tokenizer and image settings as transformers saves them, with an old configuration's empty sections."""
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_codebook_config_dict": None}))
    size, codebook = {"height": 8, "width": 8}, {"height": 16, "width": 16}
    images = FlavaImageProcessorPil(
        size=size, crop_size=size, codebook_size=codebook, codebook_crop_size=codebook, input_size_patches=2
    )
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=8)
    transformers.FlavaProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("ours") / "model"
    main([str(source), str(target)])
    return target


def test_there_and_back_is_byte_identical(source, converted, tmp_path, capsys):
    verify_manifest(converted)
    main([str(converted), str(tmp_path / "hf"), "--to=hf"])
    main([str(tmp_path / "hf"), str(tmp_path / "again")])
    for name in ("params.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (converted / name).read_bytes()
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert "FLAVA (Hugging Face) -> vlm" in capsys.readouterr().out.splitlines()[-1]


def test_transformers_loads_the_export_and_agrees(model, converted, tmp_path):
    main([str(converted), str(tmp_path / "hf"), "--to=hf"])
    theirs, report = transformers.FlavaModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8))
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")(
        TEXTS, return_tensors="pt", padding="max_length", truncation=True, max_length=8
    )
    pixels = FlavaImageProcessorPil.from_pretrained(tmp_path / "hf")([image], return_tensors="pt").pixel_values
    ours, params, processor = vlm.load(converted)
    batch = processor(images=[image], texts=TEXTS)
    np.testing.assert_array_equal(batch["tokens"], inputs.input_ids.numpy())
    np.testing.assert_allclose(batch["image"], pixels.numpy().transpose(0, 2, 3, 1), atol=1e-6)
    embeds = ours.apply({"params": params}, batch["tokens"], batch["mask"], method=ours.encode_text)
    with torch.no_grad():
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        expected = theirs.get_text_features(**inputs).pooler_output[:, 0].numpy()
    np.testing.assert_allclose(np.asarray(embeds), expected, atol=2e-5)


def test_one_encoder_of_the_whole_model(model, converted, tmp_path, capsys):
    main([str(converted), str(tmp_path / "text"), "--to=hf", "--drop=(?!text/).*"])
    theirs, report = transformers.FlavaTextModel.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not any(report.values()), report
    for (name, found), expected in zip(
        theirs.state_dict().items(), model.flava.text_model.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name
    with pytest.raises(SystemExit) as stop:
        main([str(converted), str(tmp_path / "none"), "--to=hf", "--drop=fusion/.*|codebook/.*"])
    assert stop.value.code == 2 and not (tmp_path / "none").exists()
    assert "no FLAVA class with this combination" in capsys.readouterr().err


def test_a_file_without_a_configuration_needs_its_heads(model, tmp_path, capsys):
    names = {f"model.{part}_encoder": f"flava.{part}_model" for part in ("image", "text")}
    state = model.flava.state_dict(prefix="flava.")
    state = {name.replace("flava.", "model.").replace("multimodal_model", "mm_encoder"): v for name, v in state.items()}
    for new, old in names.items():
        state = {name.replace(old.replace("flava", "model"), new): value for name, value in state.items()}
    state["loss.contrastive_loss.logit_scale"] = state.pop("model.logit_scale")
    parts = {"attention.attention": "attention", "attention.output.dense": "attention.output"}
    parts |= {"intermediate.dense": "intermediate", ".output.dense": ".output"}
    for old, new in parts.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    torch.save(state, tmp_path / "flava.pt")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "flava.pt"), str(tmp_path / "ours")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--override=vision.num_heads=N" in error
    heads = [f"--override={part}.num_heads=2" for part in ("vision", "text", "fusion")]
    main([str(tmp_path / "flava.pt"), str(tmp_path / "ours"), *heads])
    assert "heads" in capsys.readouterr().out
    opened = open_model(tmp_path / "ours")
    assert not opened.config.mask_text_padding and not opened.config.heads and opened.config.codebook is None
    main([str(tmp_path / "ours"), str(tmp_path / "hf"), "--to=hf"])
    assert "warning: transformers leaves padding out of the fusion" in capsys.readouterr().out
    exported = open_tensors(tmp_path / "hf")
    for name, value in model.flava.state_dict().items():
        np.testing.assert_array_equal(exported[name].read(), value.numpy())


def test_the_codebook_alone(model, tmp_path):
    model.image_codebook.save_pretrained(tmp_path / "hf")
    main([str(tmp_path / "hf"), str(tmp_path / "ours"), "--dtype=bfloat16"])
    opened = open_model(tmp_path / "ours")
    assert opened.config.vision is None and opened.config.codebook.vocab_size == 10
    assert {str(view.dtype) for view in opened.params.values()} == {"bfloat16"}
