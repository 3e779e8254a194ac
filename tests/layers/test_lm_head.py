"""The language-modelling head against RoBERTa's, tied and with a kernel of its own."""

import jax
import numpy as np
import torch
import transformers

from vlm.layers.lm_head import LMHead
from vlm.sharding import unbox


def test_equals_robertas_head(randomise):
    config = transformers.XLMRobertaConfig(vocab_size=60, hidden_size=32, layer_norm_eps=1e-5)
    head = randomise(transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaLMHead(config))
    table = np.random.default_rng(0).normal(size=(60, 32)).astype(np.float32)
    with torch.no_grad():
        head.decoder.weight.copy_(torch.tensor(table))
        head.decoder.bias.copy_(head.bias)
    hidden = np.random.default_rng(1).normal(size=(2, 3, 32)).astype(np.float32)
    params = {
        "dense": {"kernel": head.dense.weight.detach().numpy().T, "bias": head.dense.bias.detach().numpy()},
        "norm": {"scale": head.layer_norm.weight.detach().numpy(), "bias": head.layer_norm.bias.detach().numpy()},
        "bias": head.bias.detach().numpy(),
    }
    found = LMHead(60, 1e-5).apply({"params": params}, hidden, table)
    np.testing.assert_allclose(found, head(torch.tensor(hidden)).detach(), atol=1e-5)


def test_its_own_kernel_in_place_of_the_token_embedding():
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(2, 3, 8)).astype(np.float32), rng.normal(size=(20, 8)).astype(np.float32)
    params = unbox(LMHead(20, 1e-5).init(jax.random.key(0), hidden, table)["params"])
    tied = LMHead(20, 1e-5).apply({"params": params}, hidden, table)
    alone = LMHead(20, 1e-5, tied=False).apply({"params": {**params, "kernel": table.T}}, hidden)
    np.testing.assert_allclose(alone, tied, atol=1e-6)
