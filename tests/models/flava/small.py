"""The architecture of the tests' random FLAVA."""

from vlm.encoders.bert import BertConfig
from vlm.encoders.dvae import DVAEConfig
from vlm.fusion.multimodal import FusionConfig
from vlm.models.flava.config import VIT, FLAVAConfig


def architecture(**changes):
    """Our configuration of the fixture's model."""
    tower = {"hidden_size": 24, "num_heads": 3, "mlp_dim": 36}
    vision = {**vars(VIT), **tower, "num_layers": 2, "image_size": 32, "patch_size": 8}
    text = BertConfig(
        **tower,
        num_layers=3,
        vocab_size=50,
        max_length=20,
        type_vocab_size=2,
        pad_id=0,
        positions="absolute",
        pre_norm=True,
        norm_eps=1e-12,
        pooler=True,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
    )
    parts = {
        "vision": type(VIT)(**vision),
        "text": text,
        "fusion": FusionConfig(**tower, num_layers=2),
        "projection_dim": 12,
        "image_vocab_size": 40,
        "codebook": DVAEConfig(hidden_size=8, vocab_size=40),
    }
    return FLAVAConfig(**parts | changes)
