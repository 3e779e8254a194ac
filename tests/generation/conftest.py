"""A small decoder that follows the Generative protocol: GPT-2 with stacked layers, filled from Hugging Face's."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.layers.cache import DecoderCache
from vlm.layers.layout import unstacked_layers
from vlm.layers.linear import Embedding
from vlm.layers.masks import causal_mask, padding_mask
from vlm.layers.norms import LayerNorm
from vlm.layers.positions import padded_positions
from vlm.layers.transformer import TransformerBlock, scan_layers


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    vocab_size: int = 11
    hidden_size: int = 8
    num_layers: int = 1
    num_heads: int = 2
    max_length: int = 48


class Toy(nn.Module):
    config: ToyConfig
    decoding: bool = False
    stop_ids: tuple = (2,)
    pad_id: int = 0

    @property
    def vocab_size(self):
        return self.config.vocab_size

    @property
    def context_length(self):
        return self.config.max_length

    @property
    def decoding_parts(self):
        return {"text": self.config.hidden_size // self.config.num_heads}

    def setup(self):
        self.text = Body(self.config, self.decoding)

    @nn.nowrap
    def prompt(self, batch):
        return {"tokens": np.asarray(batch["tokens"]), "mask": np.asarray(batch["mask"])}

    def __call__(self, tokens, mask):
        return self.text(tokens, mask)[0]

    def prefill(self, tokens, mask):
        logits, keys_values = self.text(tokens, mask)
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
        return logits, DecoderCache.of_prompt(keys_values, mask)

    def decode(self, tokens, cache):
        following, mask, positions = cache.begin()
        logits, layers = self.text.run(tokens, positions, mask, cache.layers)
        return logits, following.replace(layers=layers)


class Body(nn.Module):
    config: ToyConfig
    decoding: bool

    @nn.compact
    def run(self, tokens, positions, mask, caches=None):
        config = self.config
        tables = [Embedding(n, config.hidden_size, name=name) for name, n in self.tables.items()]
        hidden = tables[0](tokens) + tables[1](positions)
        block = partial(
            TransformerBlock,
            num_heads=config.num_heads,
            head_dim=config.hidden_size // config.num_heads,
            mlp_dim=4 * config.hidden_size,
            activation="gelu_tanh",
            norm_eps=1e-5,
        )
        state = None
        if self.decoding:
            block = partial(block, fused=True)
            hidden, state = unstacked_layers(block, config.num_layers, hidden, mask, caches=caches)
        else:
            hidden = scan_layers(block, config.num_layers, hidden, mask).hidden
        return tables[0].attend(LayerNorm(1e-5, name="output_norm")(hidden)), state

    @property
    def tables(self):
        return {"token_embedding": self.config.vocab_size, "position_embedding": self.config.max_length}

    def __call__(self, tokens, mask):
        return self.run(tokens, padded_positions(mask), causal_mask(tokens.shape[1]) & padding_mask(mask))


def from_gpt2(model):
    """Our parameters of a GPT-2: Hugging Face stores its kernels [in, out] too, the three projections in one."""
    state = {k.removeprefix("transformer."): v.detach().numpy().copy() for k, v in model.state_dict().items()}

    def stack(name):
        return np.stack([state[f"h.{i}.{name}"] for i in range(model.config.n_layer)])

    def both(name, weight="kernel"):
        return {weight: stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    fused = both("attn.c_attn")
    projections = {
        k: dict(zip(("query", "key", "value"), np.split(v, 3, axis=-1), strict=True)) for k, v in fused.items()
    }
    attention = {p: {k: projections[k][p] for k in projections} for p in ("query", "key", "value")}
    layers = {
        "attention_norm": both("ln_1", "scale"),
        "attention": attention | {"out": both("attn.c_proj")},
        "mlp_norm": both("ln_2", "scale"),
        "mlp": {"up": both("mlp.c_fc"), "down": both("mlp.c_proj")},
    }
    return {
        "text": {
            "token_embedding": {"embedding": state["wte.weight"]},
            "position_embedding": {"embedding": state["wpe.weight"]},
            "layers": layers,
            "output_norm": {"scale": state["ln_f.weight"], "bias": state["ln_f.bias"]},
        }
    }


def make_gpt2(config):
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_positions=config.max_length,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()


@dataclasses.dataclass
class Pair:
    """A model of ours and Hugging Face's with the same, random parameters."""

    model: Toy
    hf: object
    randomise: object

    def draw(self, seed, scale=0.7):
        self.randomise(self.hf, seed, scale)
        return from_gpt2(self.hf)


@pytest.fixture(scope="module")
def pair(randomise):
    config = ToyConfig()
    return Pair(Toy(config), make_gpt2(config), randomise)


@pytest.fixture(scope="session")
def prompts():
    """Random prompts of these lengths as one batch, padded on one side; the first token is 1."""

    def make(lengths, seed=0, side="right", vocab=11):
        rng = np.random.default_rng(seed)
        width = max(lengths)
        tokens, mask = np.zeros((len(lengths), width), np.int32), np.zeros((len(lengths), width), bool)
        for row, length in enumerate(lengths):
            where = slice(0, length) if side == "right" else slice(width - length, width)
            tokens[row, where] = [1, *rng.integers(3, vocab, length - 1)]
            mask[row, where] = True
        return {"tokens": tokens, "mask": mask}

    return make
