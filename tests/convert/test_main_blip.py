"""The command on BLIP's files: pretraining state kept, one task's model from another's, the authors' format written."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers

import vlm
import vlm.errors
from vlm.checkpoint import Checkpoints
from vlm.convert.__main__ import main
from vlm.convert.torch_file import open_tensors
from vlm.data.image import ImageSettings
from vlm.loading import open_extra, open_model
from vlm.manifest import verify_manifest, write_manifest
from vlm.models.blip.processor import Processor, ProcessorConfig
from vlm.tree import flatten, unflatten

TEXT = {"vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 8, "max_position_embeddings": 6}
VISION = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
VISION |= {"image_size": 8, "patch_size": 4}
HEADS = ("--override=vision.num_heads=2", "--override=text.num_heads=2")


@pytest.fixture(scope="module")
def source(tmp_path_factory, randomise):
    """A pretraining file: two transformers models' weights, shared as the authors share them, under their names."""
    config = transformers.BlipConfig(text_config=TEXT, vision_config=VISION, image_text_hidden_size=6)
    matching = randomise(transformers.BlipForImageTextRetrieval(config), scale=0.3).state_dict()
    decoder = randomise(transformers.BlipForConditionalGeneration(config), seed=1, scale=0.3).state_dict()
    names = {"vision_model.embeddings.class_embedding": "visual_encoder.cls_token", "layer_norm": "norm"}
    names |= {"vision_model.embeddings.position_embedding": "visual_encoder.pos_embed"}
    names |= {"vision_model.embeddings.patch_embedding": "visual_encoder.patch_embed.proj"}
    names |= {"vision_model.encoder.layers": "visual_encoder.blocks", "vision_model.post_norm": "visual_encoder.norm"}
    names |= {
        "self_attn.projection": "attn.proj",
        "self_attn": "attn",
        "vision_model.post_layernorm": "visual_encoder.norm",
    }
    state = {}
    for name, value in matching.items():
        for theirs, authors in names.items() if name.startswith("vision_model") else ():
            name = name.replace(theirs, authors)
        state[name] = value
    for name, value in decoder.items():
        inside = name.removeprefix("text_decoder.bert.")
        own = ".attention." in name or ".cls." in name
        if name.startswith("text_decoder"):
            state[name] = value if own else state[f"text_encoder.{inside}"]
    state["text_decoder.cls.predictions.decoder.weight"] = state["text_encoder.embeddings.word_embeddings.weight"]
    for part in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
        state |= {n.replace(part, f"{part}_m", 1): v * 2 for n, v in state.items() if n.startswith(f"{part}.")}
    state |= {"image_queue": torch.randn(6, 4), "text_queue": torch.randn(6, 4), "temp": torch.tensor(0.06)}
    state["queue_ptr"] = torch.tensor([2])
    path = tmp_path_factory.mktemp("pth") / "model_base.pth"
    torch.save({"model": {name: value.clone() for name, value in state.items()}}, path)
    return path


@pytest.fixture(scope="module")
def ours(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("ours") / "model"
    main([str(source), str(target), *HEADS])
    return target


def same_file(written, source):
    written, source = (torch.load(path, weights_only=True)["model"] for path in (written, source))
    assert written.keys() == source.keys()
    for name, value in source.items():
        assert written[name].dtype == value.dtype and torch.equal(written[name], value), name


def test_pretraining_state_survives_the_way_there_and_back(source, ours, tmp_path):
    assert "extra.safetensors" in verify_manifest(ours)["files"]
    extra, stored = open_extra(ours), open_extra_of_pth(source)
    assert extra.keys() == stored.keys() and extra["image_queue"].shape == (4, 6) and extra["queue_index"].read() == 2
    assert all(view.read().tobytes() == stored[name].read().tobytes() for name, view in extra.items())
    main([str(ours), str(tmp_path / "pth"), "--to=original"])
    same_file(tmp_path / "pth" / "model.pth", source)
    main([str(ours), str(tmp_path / "half"), "--dtype=bfloat16"])
    half = open_extra(tmp_path / "half")
    assert str(half["text_queue"].dtype) == "bfloat16" and half["queue_index"].dtype == np.int32


def open_extra_of_pth(source):
    return open_model(source, overrides={"vision.num_heads": 2, "text.num_heads": 2}).extra


def test_python_saves_what_it_loads(ours, tmp_path):
    model, params, processor = vlm.load(ours)
    extra = vlm.load_extra(ours)
    assert extra is not None and extra["image_queue"].shape == (4, 6) and int(extra["queue_index"]) == 2
    vlm.save(tmp_path / "again", model, params, processor, extra=extra | {"step": np.int32(3)})
    for path in ours.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    vlm.save(tmp_path / "bare", model, params)
    assert vlm.load_extra(tmp_path / "bare") is None
    with pytest.raises(vlm.errors.UserError, match="blip keeps teacher, image_queue, .*found queue"):
        vlm.save(tmp_path / "wrong", model, params, extra={"queue": np.zeros(3)})
    assert not (tmp_path / "wrong").exists()


def test_the_processor_is_made_for_the_task(ours, tmp_path):
    pictures = ImageSettings(8, None, mode="exact")
    settings = ProcessorConfig(task="pretrain", image=pictures, max_length=5, max_words=4, prompt="see ")
    shutil.copytree(ours, tmp_path / "source")
    Processor(None, settings).save(tmp_path / "source")
    write_manifest(tmp_path / "source", {})
    for task, length in (("vqa", 35), ("retrieval", 35), ("caption", 40)):
        main([str(tmp_path / "source"), str(tmp_path / task), f"--task={task}", "--image-size=12"])
        stored = json.loads((tmp_path / task / "vlm_processor.json").read_text())
        assert stored["task"] == task and stored["max_length"] == min(length, 6) and stored["max_words"] is None
        found = Processor.load(tmp_path / task)
        assert found.config.prompt == "see " and found.image_settings == dataclasses.replace(pictures, size=12)


def test_a_training_run_keeps_its_teacher(source, ours, tmp_path):
    _, params, _ = vlm.load(ours)
    extra = {name: view.read() for name, view in open_extra(ours).items()}
    state = {"params": params, "extra": unflatten(extra | {"step": np.int32(7)})}
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(1, state, {}, "hash", wait=True)
    checkpoints.close()
    settings = json.loads((ours / "config.json").read_text()) | {"precision": {"compute": "float32"}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    assert open_extra(tmp_path / "run").keys() == extra.keys()  # without the step
    main([str(tmp_path / "run"), str(tmp_path / "again")])
    for name in ("params.safetensors", "extra.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (ours / name).read_bytes()
    main([str(tmp_path / "run"), str(tmp_path / "pth"), "--to=original"])
    same_file(tmp_path / "pth" / "model.pth", source)


def test_a_captioner_from_a_pretraining_model(ours, tmp_path, capsys):
    main([str(ours), str(tmp_path / "hf"), "--task=caption", "--to=hf"])
    assert "left out of the training state: image_queue, queue_index, teacher, text_queue" in capsys.readouterr().out
    options = {"output_loading_info": True}
    model, info = transformers.BlipForConditionalGeneration.from_pretrained(tmp_path / "hf", **options)
    assert not any(info.values()), info
    module, params, _ = vlm.load(ours)
    image = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    tokens = np.array([[3, 4, 5]])
    found = jax.jit(lambda p: module.apply({"params": p}, image, tokens, np.ones((1, 3), bool)).logits)(params)
    with torch.no_grad():
        expected = model.eval()(torch.tensor(image.transpose(0, 3, 1, 2)), torch.tensor(tokens)).logits
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)


def test_what_a_task_lacks_is_refused_or_initialised(ours, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(ours), str(tmp_path / "nlvr"), "--task=nlvr"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and not (tmp_path / "nlvr").exists()
    for name in ("text/merge_layers/merge/kernel", "classifier/dense/kernel", "classifier/out/bias"):
        assert name in error
    assert "lacks 6 parameters" in error and "--random" in error
    main([str(ours), str(tmp_path / "nlvr"), "--task=nlvr", "--random", "--seed=3"])
    params = flatten(vlm.load(tmp_path / "nlvr")[1])
    before = flatten(vlm.load(ours)[1])
    for part, layer in (("average", 0), ("merge", 1)):
        for i in (0, 1):
            for name in ("query/kernel", "out/bias"):
                copy = params[f"text/{part}_layers/cross_attention_{i}/{name}"]
                np.testing.assert_array_equal(copy[0], before[f"text/layers/cross_attention/{name}"][layer])
        norm = params[f"text/{part}_layers/attention_norm/scale"]
        np.testing.assert_array_equal(norm[0], before["text/layers/attention_norm/scale"][layer])
    assert 0.01 < np.std(params["classifier/dense/kernel"]) < 0.03 and not np.any(params["classifier/out/bias"])
    main([str(tmp_path / "nlvr"), str(tmp_path / "pth"), "--to=original"])
    names = open_tensors(tmp_path / "pth")
    assert "text_encoder.encoder.layer.1.crossattention.output.merge_layer.weight" in names


def test_the_decoder_of_a_question_answering_model_is_a_copy(ours, tmp_path):
    main([str(ours), str(tmp_path / "vqa"), "--task=vqa", "--image-size=12"])
    model, params, _ = vlm.load(tmp_path / "vqa")
    assert model.config.vision.image_size == 12 and params["vision"]["position_embedding"].shape == (10, 8)
    before, after = flatten(vlm.load(ours)[1]), flatten(params)
    for name in ("query/kernel", "out/bias"):
        np.testing.assert_array_equal(
            after[f"decoder/layers/attention/{name}"], before[f"text/layers/decoder_attention/{name}"]
        )
        for stack in ("text", "decoder"):
            copy = after[f"{stack}/layers/cross_attention/{name}"]
            np.testing.assert_array_equal(copy, before[f"text/layers/cross_attention/{name}"])
    assert not any("decoder_attention" in name for name in after)


def test_retrieval_keeps_the_teacher_but_not_the_place_in_the_queue(ours, tmp_path):
    main([str(ours), str(tmp_path / "retrieval"), "--task=retrieval", "--image-size=16"])
    extra, before = open_extra(tmp_path / "retrieval"), open_extra(ours)
    assert before.keys() - extra.keys() == {"queue_index"}
    assert extra["teacher/vision/position_embedding"].shape == (17, 8)
    table = before["teacher/vision/position_embedding"].read()
    square = torch.tensor(table[1:].reshape(1, 2, 2, 8)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(square, (4, 4), mode="bicubic", align_corners=False)
    expected = resized.permute(0, 2, 3, 1).reshape(16, 8).numpy()
    np.testing.assert_allclose(extra["teacher/vision/position_embedding"].read()[1:], expected, atol=1e-5)


def test_transformers_files_are_recognised_with_and_without_config(ours, tmp_path, capsys):
    main([str(ours), str(tmp_path / "hf"), "--task=retrieval", "--to=hf"])
    out = capsys.readouterr().out
    assert "left out temperature" in out and "left out image_queue, teacher, text_queue" in out
    main([str(tmp_path / "hf"), str(tmp_path / "again")])
    (tmp_path / "hf" / "config.json").unlink()
    main([str(tmp_path / "hf"), str(tmp_path / "bare"), *HEADS])
    out = capsys.readouterr().out
    assert out.count("BlipForImageTextRetrieval (Hugging Face) -> vlm") == 2 and "no config.json" in out
    params = (tmp_path / "bare" / "params.safetensors").read_bytes()
    assert params == (tmp_path / "again" / "params.safetensors").read_bytes()
    assert not (tmp_path / "bare" / "extra.safetensors").exists() and open_extra(tmp_path / "bare") is None


def test_a_model_of_ones_own_reads_videos(ours, tmp_path):
    main([str(ours), str(tmp_path / "video"), "--override=video=concatenate"])
    stored = json.loads((tmp_path / "video" / "config.json").read_text())["model"]
    before = json.loads((ours / "config.json").read_text())["model"]
    assert stored.pop("video") == "concatenate" and before.pop("video") == "none" and stored == before
    assert (tmp_path / "video" / "params.safetensors").read_bytes() == (ours / "params.safetensors").read_bytes()
    assert vlm.load(ours, overrides={"video": "average", "encoder_token": "cls"})[0].config.encoder_token == "cls"


def vocabulary(folder, cls):
    words = [f"w{number}" for number in range(22)]
    for place, token in ((0, "[PAD]"), (cls, "[CLS]"), (cls + 1, "[SEP]"), (21, "[UNK]"), (20, "[MASK]")):
        words[place] = token
    (folder / "vocab.txt").write_text("\n".join(words))


def test_ids_are_those_of_the_tokenizer_beside_the_weights(source, tmp_path, capsys):
    """[DEC] and [ENC] follow the 22 words; what transformers has no key for is kept beside its own."""
    shutil.copy(source, tmp_path / "model_base.pth")
    vocabulary(tmp_path, 4)
    ids = ("--override=bos_id=22", "--override=enc_id=23")
    main([str(tmp_path / "model_base.pth"), str(tmp_path / "ours"), "--task=caption", *HEADS, *ids])
    kept = {"cls_id": 4, "sep_id": 5, "bos_id": 22, "enc_id": 23}
    assert kept.items() <= json.loads((tmp_path / "ours" / "config.json").read_text())["model"].items()
    main([str(tmp_path / "ours"), str(tmp_path / "hf"), "--to=hf"])
    text = json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]
    assert [text[f"{name}_token_id"] for name in ("cls", "sep", "bos", "enc")] == [4, 5, 22, 23]
    for name in ("hf", "bare"):
        if name == "bare":  # no tokenizer: the keys tell
            (tmp_path / "bare").mkdir()
            for file in ("config.json", "model.safetensors"):
                shutil.copy(tmp_path / "hf" / file, tmp_path / "bare")
        assert kept.items() <= dataclasses.asdict(open_model(tmp_path / name).config).items()
    transformers.BlipForConditionalGeneration.from_pretrained(tmp_path / "hf")
    capsys.readouterr()
    vocabulary(tmp_path / "bare", 6)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "bare"), str(tmp_path / "new")])
    error = capsys.readouterr().err
    assert "sep_token_id: expected 7, as the tokenizer in" in error and error.count("\n") == 1
    assert open_model(tmp_path / "bare", overrides={"sep_id": 5, "cls_id": 4}).config.sep_id == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed=5"], "--seed has no effect without --text or --random"),
        (["--task=vqa", "--random", "--seed=-1"], "--seed: expected a number of at least 0, found -1"),
        (("--to=hf",), "--task=caption"),
        (("--task=captions",), "expected one of caption, retrieval"),
        (("--task=classification",), "--labels"),
        (("--random",), "no effect without --task"),
        (("--labels=0",), "--labels has no effect without --task"),
        (("--task=classification", "--labels=0", "--random"), "--labels: expected a number of at least 1, found 0"),
        (("--task=vqa", "--labels=3"), "--labels has no effect with --task=vqa"),
        (("--override=video=concat",), "model.video: expected one of 'none', 'concatenate', 'average', found 'concat'"),
        (("--override=itm=False",), "only of a foreign checkpoint; this is one of vlm's own (allowed: video, encoder"),
        (("--image-size=9",), "multiple of patch_size=4"),
        (("--drop=temperature",), "no effect with --to=vlm"),
    ],
)
def test_wrong_calls_end_with_one_line(ours, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main([str(ours), str(tmp_path / "out"), *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.fixture
def words(tmp_path):
    """A folder with a vocabulary and nothing else."""
    letters = [*"abcdefgh", *(f"##{letter}" for letter in "abcdef")]
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    return tmp_path / "words"


@pytest.mark.parametrize(
    ("task", "more", "length", "most_words"),
    [
        ("pretrain", None, 30, 30),
        ("retrieval", (), 35, 30),
        ("caption", (), 40, 30),
        ("vqa", (), 35, 50),
        ("nlvr", ("--random",), 64, 40),
        ("classification", ("--random", "--labels=3"), 64, 40),
    ],
)
def test_beside_the_authors_files_the_model_tells_how_its_examples_are_made(
    source, ours, words, tmp_path, capsys, task, more, length, most_words
):
    file, side = source, 8
    if more is not None:
        side = 12
        main([str(ours), str(tmp_path / "sized"), f"--task={task}", "--image-size=12", *more])
        main([str(tmp_path / "sized"), str(tmp_path / "pth"), "--to=original"])
        file = tmp_path / "pth" / "model.pth"
    heads = {f"{part}.num_heads": 2 for part in ("vision", "text", "decoder")}
    heads = {name: 2 for name in heads if task != "caption" or not name.startswith("text")}
    heads = {name: 2 for name in heads if task in ("caption", "vqa") or not name.startswith("decoder")}
    assert vlm.load(file, overrides=heads)[2] is None
    processor = vlm.load(file, overrides=heads, tokenizer=words)[2]
    assert (processor.config.task, processor.config.length) == (task, length)
    assert processor.config.clean and processor.config.words == most_words
    assert processor.image_settings == ImageSettings(side, None, mode="exact")
    assert processor.max_length == 6  # the model's positions
    capsys.readouterr()
    flags = [f"--override={name}=2" for name in heads]
    main([str(file), str(tmp_path / "bare"), *flags])
    assert "no tokenizer beside the weights (--tokenizer=FOLDER)" in capsys.readouterr().out
    main([str(file), str(tmp_path / "whole"), *flags, f"--tokenizer={words}"])
    again = vlm.load(tmp_path / "whole")[2]
    assert dataclasses.replace(again.config, max_length=None) == processor.config and again.max_length == 6
    assert again(texts=["A (b)!"], prompts=False)["tokens"][0, :4].tolist() == [2, 5, 6, 3]  # cleaned
    if task == "retrieval":
        main([str(file), str(tmp_path / "video"), *flags, "--override=video=average", f"--tokenizer={words}"])
        assert vlm.load(tmp_path / "video")[2].config.words == 40  # MSR-VTT's
    shutil.copy(words / "vocab.txt", tmp_path / "bare")
    assert vlm.load(file, overrides=heads, tokenizer=words)[0].config == vlm.load(tmp_path / "whole")[0].config


def test_of_the_tokenizers_folder_only_the_tokenizer_is_read(source, ours, words, tmp_path):
    other = ImageSettings(16, None, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), mode="exact")
    stranger = Processor(None, ProcessorConfig(task="caption", image=other, clean=False, prompt="see "))
    stranger.save(words)  # beside its vocabulary
    heads = {"vision.num_heads": 2, "text.num_heads": 2}
    alone = vlm.load(source, overrides=heads, tokenizer=words)[2]
    assert (alone.config.task, alone.config.clean, alone.config.prompt) == ("pretrain", True, "a picture of ")
    assert alone.image_settings == ImageSettings(8, None, mode="exact")
    shutil.copytree(ours, tmp_path / "own")
    own = ProcessorConfig(task="vqa", image=other, clean=False, prompt="look ", max_words=7)
    Processor(None, own).save(tmp_path / "own")
    write_manifest(tmp_path / "own", {})
    found = vlm.load(tmp_path / "own", tokenizer=words)[2]
    assert (found.config.task, found.config.clean, found.config.prompt, found.config.max_words) == (
        "vqa", False, "look ", 7,
    )  # fmt: skip
    assert found.image_settings == other and found.tokenizer is not None
    lines = [*(words / "vocab.txt").read_text().splitlines(), *"ijklmnop"]
    (words / "vocab.txt").write_text("\n".join(lines))
    with pytest.raises(
        vlm.errors.UserError, match="words: expected a tokenizer of at most the model's 24 tokens, found"
    ):
        vlm.load(source, overrides=heads, tokenizer=words)


def test_a_folder_without_tokenizer_is_refused(ours, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(ours), str(tmp_path / "out"), f"--tokenizer={tmp_path}"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(f"error: {tmp_path}: expected a folder with one of ")
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
