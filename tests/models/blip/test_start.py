"""Towers saved alone are read and written; a model to be pretrained is made of a ViT and a BERT, as the authors do."""

import jax
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import PartitionSpec
from transformers.models.blip import modeling_blip, modeling_blip_text

import vlm
from vlm.convert.__main__ import main
from vlm.convert.torch_writer import write_pth
from vlm.convert.views import from_array
from vlm.encoders.vit import ViTConfig
from vlm.fusion.med import MedConfig
from vlm.initial import starting_weights
from vlm.loading import expected_params
from vlm.models.blip import FAMILY
from vlm.models.blip.config import BLIPConfig
from vlm.models.blip.loss import LossConfig, init_extra
from vlm.models.blip.model import BLIP
from vlm.models.blip.weights import write_original
from vlm.schema import InitConfig, MeshConfig
from vlm.sharding import Placement, make_mesh, unbox
from vlm.training import TrainState
from vlm.tree import flatten, unflatten

TEXT = {"vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 8, "max_position_embeddings": 6}
BLIP_TEXT = TEXT | {"encoder_hidden_size": 12, "bos_token_id": 1, "sep_token_id": 2}
VISION = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
VISION |= {"image_size": 8, "patch_size": 4}
TOWER = {
    "activation": "gelu",
    "norm_eps": 1e-6,
    "patch_bias": True,
    "input_norm": False,
    "output_norm": "all",
    "init": "normal",
}
IMAGE = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
TOKENS = np.array([[3, 4, 5, 0], [6, 7, 8, 9]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, randomise):
    """Folders as transformers writes them, and timm's names as a .pth."""
    folder = tmp_path_factory.mktemp("towers")
    bert = transformers.BertForPreTraining(transformers.BertConfig(**TEXT))
    models = {
        "vision": modeling_blip.BlipVisionModel(transformers.BlipVisionConfig(**VISION)),
        "text": modeling_blip_text.BlipTextModel(transformers.BlipTextConfig(**BLIP_TEXT)),
        "vit": transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),
        "bert": bert,
    }
    for name, model in models.items():
        randomise(model, scale=0.3).eval().save_pretrained(folder / name)
    state = models["vision"].state_dict()
    names = {"embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed"}
    names |= {"embeddings.patch_embedding": "patch_embed.proj", "encoder.layers": "blocks", "layer_norm": "norm"}
    names |= {"self_attn.projection": "attn.proj", "self_attn": "attn", "post_norm": "norm", "post_layernorm": "norm"}
    timm = {"head.weight": torch.zeros(5, 12), "head.bias": torch.zeros(5)}
    for name, value in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        timm[name] = value
    torch.save({"model": timm}, folder / "deit.pth")
    old = {
        n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
        for n, v in bert.state_dict().items()
    }
    (folder / "old").mkdir()
    torch.save(old, folder / "old" / "pytorch_model.bin")
    (folder / "old" / "config.json").write_bytes((folder / "bert" / "config.json").read_bytes())
    return folder, models


def test_an_image_encoder_alone(saved, tmp_path):
    folder, models = saved
    model, params, _ = vlm.load(folder / "vision")
    found = jax.jit(lambda p: model.apply({"params": p}, IMAGE).last_hidden_state)(params)
    with torch.no_grad():
        expected = models["vision"](torch.tensor(IMAGE.transpose(0, 3, 1, 2))).last_hidden_state
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)
    with pytest.raises(AttributeError):
        model.apply({"params": params}, TOKENS, method="encode_text_states")
    main([str(folder / "vision"), str(tmp_path / "hf"), "--to=hf"])
    options = {"output_loading_info": True}
    again, info = modeling_blip.BlipVisionModel.from_pretrained(tmp_path / "hf", **options)
    assert not any(info.values()), info
    assert all(torch.equal(value, models["vision"].state_dict()[name]) for name, value in again.state_dict().items())


def test_a_text_stack_alone(saved, tmp_path):
    folder, models = saved
    model, params, _ = vlm.load(folder / "text")
    mask = TOKENS != 0
    call = lambda p: model.apply({"params": p}, tokens=TOKENS, mask=mask).text_model_output  # noqa: E731
    found = jax.jit(call)(params)
    with torch.no_grad():
        expected = models["text"](torch.tensor(TOKENS), torch.tensor(mask).long(), is_decoder=False)
    np.testing.assert_allclose(found.last_hidden_state, expected.last_hidden_state.numpy(), atol=2e-5)
    np.testing.assert_allclose(found.pooler_output, expected.pooler_output.numpy(), atol=2e-5)
    with pytest.raises(ValueError, match="no image encoder"):
        model.apply({"params": params}, IMAGE)
    main([str(folder / "text"), str(tmp_path / "hf"), "--to=hf"])
    _, info = modeling_blip_text.BlipTextModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info


def test_vit_and_bert_become_a_model_to_pretrain(saved, tmp_path, capsys):
    folder, models = saved
    for source, text in (("deit.pth", "bert"), ("vit", "old")):
        override = ["--override=vision.num_heads=2"] if source == "deit.pth" else []
        main([str(folder / source), str(tmp_path / source), f"--text={folder / text}", *override])
    note = [line for line in capsys.readouterr().out.splitlines() if "initialised from seed 0" in line]
    assert len(note) == 2 and all("cross_attention" in line and "vision/" not in line for line in note)
    model, params, _ = vlm.load(tmp_path / "vit")
    config, flat, bert = model.config, flatten(params), models["bert"].state_dict()
    assert config.shared_decoder and config.itm and (config.bos_id, config.enc_id) == (24, 25)
    assert config.vision.norm_eps == 1e-6 and config.text.vocab_size == 26 and config.text.context_size == 12
    query = bert["bert.encoder.layer.1.attention.self.query.weight"].numpy().T
    for name in ("attention", "decoder_attention"):
        np.testing.assert_array_equal(flat[f"text/layers/{name}/query/kernel"][1], query)
    words = flat["text/token_embedding/embedding"]
    np.testing.assert_array_equal(words[:24], bert["bert.embeddings.word_embeddings.weight"].numpy())
    assert np.abs(words[24:]).max() < 0.1 and not np.any(flat["lm_head/bias"][24:])
    np.testing.assert_array_equal(flat["lm_head/bias"][:24], bert["cls.predictions.bias"].numpy())
    kernel = models["vit"].state_dict()["vit.layers.1.attention.v_proj.weight"].numpy().T
    np.testing.assert_array_equal(flat["vision/layers/attention/value/kernel"][1], kernel)
    timm = flatten(vlm.load(tmp_path / "deit.pth")[1])
    np.testing.assert_array_equal(
        timm["vision/position_embedding"], models["vision"].state_dict()["embeddings.position_embedding"][0]
    )


def test_a_model_to_pretrain_needs_both(saved, tmp_path, capsys):
    folder, _ = saved
    for source, text, lacks in (("text", "bert", "has no image encoder"), ("vit", "vit", "has no text stack")):
        with pytest.raises(SystemExit) as stopped:
            main([str(folder / source), str(tmp_path / "out"), f"--text={folder / text}"])
        assert stopped.value.code == 2 and lacks in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_retrieval_goes_on_from_a_pretraining_file(tmp_path):
    """Weights, teacher and queues of an authors' .pth, as `config.init` names them, fill a new run's state."""
    stack = MedConfig(30, 64, 1, 1, 8, 8, 64, dropout_rate=0.0)
    config = BLIPConfig(ViTConfig(64, 1, 1, 8, 8, 4, **TOWER), stack, projection_dim=6)
    model, settings = BLIP(config), LossConfig("pretrain", queue_size=4)
    rng = np.random.default_rng(0)
    shapes = expected_params(FAMILY, config)
    params = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    extra = flatten(unbox(init_extra(model, unflatten(params), jax.random.key(0), settings)))
    extra = {path: np.asarray(leaf) for path, leaf in extra.items() if path != "step"}
    extra = {path: leaf * 2 if path.startswith("teacher") else leaf for path, leaf in extra.items()}
    views = [{path: from_array(leaf) for path, leaf in part.items()} for part in (params, extra)]
    write_pth(tmp_path / "model_base.pth", write_original(config, *views))

    at = lambda leaf: Placement("x", leaf.shape, np.dtype(leaf.dtype), PartitionSpec(), 1)  # noqa: E731
    whole, kept = ({path: at(leaf) for path, leaf in part.items()} for part in (params, extra))
    state = TrainState(at(np.zeros(())), unflatten(whole), {}, {}, unflatten(kept), {})  # pyright: ignore
    path, mesh = str(tmp_path / "model_base.pth"), make_mesh(MeshConfig(), jax.devices())
    found = starting_weights([InitConfig(path), InitConfig(path, into="extra")], state, mesh)
    assert found.keys() == {f"params/{name}" for name in params} | {f"extra/{name}" for name in extra}
    for name, leaf in [*params.items(), *extra.items()]:
        place = f"{'params' if name in params else 'extra'}/{name}"
        np.testing.assert_array_equal(found[place].read(), leaf, err_msg=name)
