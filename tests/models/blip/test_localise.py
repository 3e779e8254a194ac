"""Grad-CAM: attention, gradient and logits equal Hugging Face's and PyTorch's autograd; maps are what they say."""

import jax
import numpy as np
import pytest
import torch

from vlm.errors import UserError
from vlm.models.blip.localise import attended, default_layer, localise


@pytest.fixture(scope="module")
def text():
    tokens = np.random.default_rng(3).integers(4, 58, (2, 7)).astype(np.int32)
    mask = np.arange(7)[None] < np.array([[7], [5]])
    tokens[:, 0] = 1
    return np.where(mask, tokens, 0), mask


@pytest.mark.parametrize("layer", [0, 2])
def test_attention_and_its_gradient_equal_torch(hf_pair, torch_image, text, layer):
    reference, model, params = hf_pair("retrieval")
    image, theirs = torch_image(batch=2)
    tokens, mask = text
    kept = []

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    attention = reference.text_encoder.encoder.layer[layer].crossattention.self
    handle = attention.dropout.register_forward_hook(keep)
    found = reference(
        input_ids=torch.from_numpy(tokens).long(), pixel_values=theirs, attention_mask=torch.from_numpy(mask).long()
    )
    handle.remove()
    found.itm_score[:, 1].sum().backward()
    ours = attended(model, params, image, tokens, mask, layer)
    np.testing.assert_allclose(ours.logits, found.itm_score.detach(), atol=1e-5)
    np.testing.assert_allclose(ours.weights, kept[0].detach(), atol=1e-5)
    np.testing.assert_allclose(ours.gradient, kept[0].grad, atol=1e-5)
    assert np.abs(np.asarray(ours.gradient)).max() > 1e-3


def test_maps(hf_pair, torch_image, text):
    _, model, params = hf_pair("retrieval")
    image, _ = torch_image(batch=2)
    tokens, mask = text
    maps = localise(model, params, image, tokens, mask, 1)
    found = attended(model, params, image, tokens, mask, 1)
    product = np.asarray(found.weights * jax.nn.relu(found.gradient))
    assert maps.tokens.shape == (2, 7, 3, 3) and maps.average.shape == (2, 3, 3)
    for row, length in enumerate((7, 5)):
        expected = product[row].mean(0)[:, 1:].reshape(7, 3, 3)
        np.testing.assert_allclose(maps.tokens[row, :length], expected[:length], atol=1e-7)
        np.testing.assert_allclose(maps.average[row], expected[1 : length - 1].mean(0), atol=1e-7)
        assert not np.asarray(maps.tokens[row, length:]).any()
    default = localise(model, params, image, tokens, mask)
    same = localise(model, params, image, tokens, mask, 3 * 7 // 12)
    np.testing.assert_array_equal(default.tokens, same.tokens)
    assert default_layer(12) == 7


def test_wrong_inputs(hf_pair, torch_image, text):
    image, _ = torch_image(batch=2)
    with pytest.raises(UserError, match="from 0 to 2, found 3"):
        localise(*hf_pair("retrieval")[1:], image, *text, 3)
    with pytest.raises(UserError, match="matching head"):
        localise(*hf_pair("captioning")[1:], image, *text)
