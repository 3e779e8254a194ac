"""The published weights give the published numbers; runs where they are, in the folder that VLM_TEST_WEIGHTS names.

Expected there: `flava-full` (facebook/flava-full as downloaded) and `000000039769.jpg` (of COCO val2017).
"""

import os
import pathlib
import random

import jax
import numpy as np
import pytest
from PIL import Image

import vlm
from vlm.models.flava.loss import LossConfig, loss

TEXTS = ["a photo of a cat", "a photo of a dog"]


@pytest.fixture(scope="module")
def published():
    """The model, its parameters and its batch of one picture twice with both texts."""
    folder = pathlib.Path(os.environ.get("VLM_TEST_WEIGHTS", ""))
    if not os.environ.get("VLM_TEST_WEIGHTS") or not (folder / "flava-full").is_dir():
        pytest.skip("VLM_TEST_WEIGHTS names no folder with flava-full")
    model, params, processor = vlm.load(folder / "flava-full")
    return model, params, processor(images=[folder / "000000039769.jpg"] * 2, texts=TEXTS)


def test_sums_of_embeddings(published):
    model, params, batch = published
    output = model.apply({"params": params}, **batch)
    sums = [float(np.sum(getattr(output, f"{part}_embeddings"))) for part in ("image", "text", "multimodal")]
    np.testing.assert_allclose(sums, [-1352.53540, -198.98225, -3988.51367], atol=0.05)
    np.testing.assert_allclose(output.contrastive_logits_per_image, [[16.1291, 8.4033]] * 2, atol=1e-3)


@pytest.mark.parametrize(
    ("itm_labels", "mmm_image", "total"), [(None, 7.0290069, 11.0626), ([1, 0], 6.89590501, 9.1995)]
)
def test_losses(published, itm_labels, mmm_image, total):
    """The picture's hidden patches are drawn by transformers' own processor from the published seed."""
    import transformers

    model, params, batch = published
    folder = pathlib.Path(os.environ["VLM_TEST_WEIGHTS"])
    draw = transformers.FlavaImageProcessorPil.from_pretrained(folder / "flava-full")
    random.seed(1)
    picture = Image.open(folder / "000000039769.jpg")
    drawn = draw([picture] * 2, return_image_mask=True, return_codebook_pixels=True, return_tensors="np")
    masked, labels = batch["tokens"].copy(), np.full_like(batch["tokens"], -100)
    masked[0, 4:6] = 103
    labels[0, 4:6] = batch["tokens"][0, 4:6]
    batch = batch | {"masked_tokens": masked, "token_labels": labels}
    batch["patch_mask"] = np.asarray(drawn["bool_masked_pos"], bool).reshape(2, -1)
    batch["codebook_image"] = np.asarray(drawn["codebook_pixel_values"]).transpose(0, 2, 3, 1)
    if itm_labels is not None:
        batch["itm_labels"] = np.asarray(itm_labels, np.int32)
    value, (terms, _) = loss(model, params, {}, batch, jax.random.key(0), LossConfig())
    np.testing.assert_allclose(terms["mmm_text"], 1.75533199, atol=1e-3)
    np.testing.assert_allclose(terms["mmm_image"], mmm_image, atol=1e-3)
    np.testing.assert_allclose(value, total, atol=1e-3)
