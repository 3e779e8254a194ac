"""The command: transformers -> ours -> transformers with equal outputs and bytes; wrong inputs end with status 2."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vlm
from vlm.checkpoint import Checkpoints, lazy
from vlm.convert.__main__ import main
from vlm.convert.torch_file import open_tensors
from vlm.data.image import ImageSettings
from vlm.manifest import verify_manifest
from vlm.models.altclip.processor import Processor
from vlm.schema import MeshConfig
from vlm.sharding import make_mesh
from vlm.tokenizers import load
from vlm.tokenizers.spm import train_sentencepiece
from vlm.tree import flatten

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 32, "max_position_embeddings": 20, "project_dim": 12}
VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION |= {"image_size": 16, "patch_size": 4}
WORDS = [f"a photo of {word} number {i}" for i in range(40) for word in ("cat", "dog")]


@pytest.fixture(scope="module")
def source(tmp_path_factory, randomise):
    """A Hugging Face folder with weights, tokenizer and image settings."""
    folder = tmp_path_factory.mktemp("hf")
    config = transformers.AltCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=10)
    randomise(transformers.AltCLIPModel(config), scale=0.3).save_pretrained(folder)
    spm = tmp_path_factory.mktemp("spm") / "sentencepiece.bpe.model"
    train_sentencepiece(WORDS, spm, 32)
    Processor(load(spm), ImageSettings(size=16, crop=16), max_length=18).save(folder)
    (folder / "vlm_processor.json").unlink()  # a foreign folder has none
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("ours") / "model"
    main([str(source), str(target)])
    return target


def test_round_trip_through_ours_is_byte_identical(source, converted, tmp_path, capsys):
    verify_manifest(converted)
    main([str(converted), str(tmp_path / "hf"), "--to=hf"])
    main([str(tmp_path / "hf"), str(tmp_path / "again")])
    for name in ("params.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (converted / name).read_bytes()
    original, exported = open_tensors(source), open_tensors(tmp_path / "hf")
    spelling = {name.replace("vision_model.encoder.layer.", "vision_model.encoder.layers."): name for name in original}
    assert exported.keys() == spelling.keys()
    assert all(view.read().tobytes() == original[spelling[k]].read().tobytes() for k, view in exported.items())
    last = capsys.readouterr().out.splitlines()[-1]
    assert "AltCLIP (Hugging Face, FlagAI) -> vlm" in last and "parameters" in last


def test_another_image_size_reaches_the_position_table_and_the_processor(converted, tmp_path):
    main([str(converted), str(tmp_path / "larger"), "--image-size=24"])
    model, params, processor = vlm.load(tmp_path / "larger")
    assert model.config.vision.image_size == 24 and params["vision"]["position_embedding"].shape == (37, 24)
    assert (processor.image_settings.size, processor.image_settings.crop) == (24, 24)
    batch = processor(images=[Image.new("RGB", (40, 30))])
    assert model.apply({"params": params}, batch["image"], method=model.encode_image).shape == (1, 10)


def test_a_training_run_converts_leaf_by_leaf_to_the_same_bytes(converted, tmp_path, monkeypatch):
    _, params, _ = vlm.load(converted)
    run = tmp_path / "run"
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoints.save(1, {"params": params}, {}, "hash", wait=True)
    checkpoints.close()
    settings = json.loads((converted / "config.json").read_text()) | {"precision": {"compute": "float32"}}
    (run / "config.json").write_text(json.dumps(settings))
    read, original = [], lazy.read_on_host
    monkeypatch.setattr(
        lazy, "read_on_host", lambda step, records: read.append(list(records)) or original(step, records)
    )
    main([str(run), str(tmp_path / "ours")])
    assert sorted(read) == sorted([f"params/{path}"] for path in flatten(params))
    assert (tmp_path / "ours" / "params.safetensors").read_bytes() == (converted / "params.safetensors").read_bytes()
    main([str(run), str(tmp_path / "run_hf"), "--to=hf"])
    main([str(converted), str(tmp_path / "hf"), "--to=hf"])
    assert len(read) == 2 * len(flatten(params))  # stacked layers too are read once
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "run_hf" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours", "run", "run_hf"]


def test_transformers_loads_the_export_and_agrees(source, converted, tmp_path):
    main([str(converted), str(tmp_path / "hf"), "--to=hf"])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8))
    texts = ["a photo of cat number 3", "dog"]
    theirs, report = transformers.AltCLIPModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = transformers.AltCLIPProcessor.from_pretrained(tmp_path / "hf")
    inputs = processor(
        text=texts, images=[image], return_tensors="pt", padding="max_length", truncation=True, max_length=18
    )
    model, params, ours = vlm.load(converted)
    assert ours.max_length == 18  # not the default 77, which this model's position table cannot hold
    batch = ours(images=[image], texts=texts)
    np.testing.assert_array_equal(batch["tokens"], inputs["input_ids"])
    np.testing.assert_array_equal(batch["mask"], inputs["attention_mask"].bool())
    np.testing.assert_allclose(batch["image"], inputs["pixel_values"].permute(0, 2, 3, 1), atol=1e-6)
    with torch.no_grad():
        expected = theirs(**inputs)
    found = model.apply({"params": params}, **batch)
    np.testing.assert_allclose(found.logits_per_image, expected.logits_per_image, atol=2e-5)


def test_foreign_files_load_straight_onto_a_mesh(source, converted):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    _, expected, _ = vlm.load(converted)
    _, found, _ = vlm.load(source, mesh=mesh)
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, path)
    kernel = found["vision/layers/mlp/up/kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 6, 16)


def test_dtype_and_pth_files(source, tmp_path):
    state = {name: torch.from_numpy(np.array(view.read())) for name, view in open_tensors(source).items()}
    (tmp_path / "in").mkdir()
    torch.save({"state_dict": state}, tmp_path / "in" / "x.pth")
    (tmp_path / "in" / "config.json").write_text((source / "config.json").read_text())
    main([str(tmp_path / "in" / "x.pth"), str(tmp_path / "half"), "--dtype=bfloat16"])
    views = open_tensors(tmp_path / "half" / "params.safetensors")
    assert {str(view.dtype) for view in views.values()} == {"bfloat16"}
    rounded = state["text_projection.weight"].bfloat16().float().T
    np.testing.assert_array_equal(views["text_projection/kernel"].read().astype(np.float32), rounded)
    assert (tmp_path / "half" / "params.safetensors").stat().st_size < (tmp_path / "in" / "x.pth").stat().st_size * 0.6


def test_assembly_and_overrides(source, tmp_path, randomise, capsys):
    config = transformers.XLMRobertaConfig(**{**TEXT, "type_vocab_size": 1, "layer_norm_eps": 1e-5})
    randomise(transformers.XLMRobertaForMaskedLM(config)).save_pretrained(tmp_path / "xlmr")
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": 30, "max_position_embeddings": 7, "eos_token_id": 29, "bos_token_id": 28}
    config = transformers.CLIPConfig(text_config=sizes, vision_config=VISION, projection_dim=10)
    clip = randomise(transformers.CLIPModel(config))
    clip.save_pretrained(tmp_path / "clip")
    arguments = [str(tmp_path / "clip"), str(tmp_path / "new"), f"--text={tmp_path / 'xlmr'}", "--seed=5"]
    main([*arguments, "--override=vision.activation=gelu"])
    output = capsys.readouterr().out
    assert "note: initialised text_transformation/kernel [16, 12] from seed 5: no source has it" in output
    model, params, processor = vlm.load(tmp_path / "new")
    assert model.config.vision.activation == "gelu" and model.config.text.hidden_size == 16
    assert processor is None and "no tokenizer" in output
    np.testing.assert_array_equal(params["vision_projection"]["kernel"], clip.visual_projection.weight.T.detach())


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "vlm.convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error, error
    return error


def test_wrong_inputs_end_with_one_line_and_leave_nothing(source, converted, tmp_path, capsys):
    target = tmp_path / "target"
    assert "did you mean 'activation'" in fails(capsys, source, target, "--override=vision.activtion=gelu")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in source.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[:-9])
    assert "not a valid safetensors file" in fails(capsys, damaged, target)
    (damaged / "model.safetensors").write_bytes(whole)
    config = json.loads((damaged / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    (damaged / "config.json").write_text(json.dumps(config))
    assert "expected shape [5, 16, 32], found [2, 16, 32]" in fails(capsys, damaged, target)
    (damaged / "config.json").write_text("{")
    assert "config.json" in fails(capsys, damaged, target)
    assert not target.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_the_command_itself(source, tmp_path):
    done = run(source, tmp_path / "out")
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "out" / "vlm_manifest.json").is_file(), done
    failed = run(source, tmp_path / "out")
    assert failed.returncode == 2 and failed.stdout == "" and failed.stderr.startswith("error: "), failed
    assert "SOURCE TARGET" in run("--help").stdout
