"""FLAVA against Hugging Face on a random checkpoint: every output of every input, masked or not."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlm.models.flava.config import BERT, VIT, ClassifierConfig, FLAVAConfig
from vlm.models.flava.model import FLAVA
from vlm.tree import flatten

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(3, 32, 32, 3)).astype(np.float32)
TOKENS = np.array([[1, 11, 12, 13, 14, 2], [1, 21, 22, 2, 0, 0], [1, 31, 32, 33, 2, 0]])
MASKED_TOKENS = np.array([[1, 11, 4, 13, 14, 2], [1, 4, 22, 2, 0, 0], [1, 31, 32, 33, 2, 0]])
MASK = TOKENS != 0
TYPES = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0] * 6])
PATCH_MASK = RNG.random((3, 16)) < 0.4
CODEBOOK_IMAGE = RNG.uniform(0.1, 0.9, (3, 32, 32, 3)).astype(np.float32)
ALL = {"output_hidden_states": True, "output_attentions": True}


def torch_of(x, dtype=None):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2) if np.ndim(x) == 4 else np.asarray(x), dtype=dtype)


@functools.cache
def compiled(model, method, constants):
    def run(params, arguments):
        return model.apply({"params": params}, method=method, **arguments, **dict(constants))

    return jax.jit(run)


def apply(model, params, method=None, **arguments):
    constants = {name: arguments.pop(name) for name in sorted(arguments) if isinstance(arguments[name], bool)}
    return compiled(model, method, tuple(constants.items()))(params, arguments)


def close(found, expected, name=""):
    if isinstance(expected, tuple):
        expected = torch.stack(expected)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=2e-5, rtol=1e-5, err_msg=name)


def same_output(found, expected, name):
    for field in ("last_hidden_state", "pooler_output", "hidden_states", "attentions"):
        if getattr(expected, field) is not None:
            close(getattr(found, field), getattr(expected, field), f"{name}.{field}")


CASES = {
    "pair": ({"image": IMAGE, "tokens": TOKENS, "mask": MASK, "masked_tokens": MASKED_TOKENS}, True),
    "types": ({"image": IMAGE, "tokens": TOKENS, "mask": MASK, "token_types": TYPES}, True),
    "no mask": ({"image": IMAGE, "tokens": TOKENS, "masked_tokens": MASKED_TOKENS}, True),
    "image": ({"image": IMAGE}, True),
    "text": ({"tokens": TOKENS, "mask": MASK, "masked_tokens": MASKED_TOKENS}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_hugging_face(pair, case):
    reference, model, params = pair
    inputs, patches = CASES[case]
    inputs = inputs | ({"patch_mask": PATCH_MASK} if patches else {})
    names = {"tokens": "input_ids", "mask": "attention_mask", "masked_tokens": "input_ids_masked"}
    names |= {"image": "pixel_values", "token_types": "token_type_ids", "patch_mask": "bool_masked_pos"}
    theirs = {names[k]: torch_of(v, torch.float32 if k == "image" else torch.long) for k, v in inputs.items()}
    if patches:
        theirs["bool_masked_pos"] = torch_of(PATCH_MASK)
    with torch.no_grad():
        expected = reference(**theirs, **ALL, return_loss=False, skip_unmasked_multimodal_encoder=False)
    found = apply(model, params, **inputs, **ALL)
    compared = 0
    for field in dataclasses.fields(found):
        theirs = getattr(expected, field.name)
        ours = getattr(found, field.name)
        if field.name.endswith("_output"):
            if ours is not None:
                same_output(ours, theirs, field.name)
        else:
            assert (ours is None) == (theirs is None), field.name
            if ours is not None:
                close(ours, theirs, field.name)
                compared += 1
    assert compared == {"pair": 11, "types": 11, "no mask": 11, "image": 3, "text": 3}[case]


def test_other_image_sizes_equal_hugging_face(pair):
    reference, model, params = pair
    image = RNG.normal(size=(2, 48, 24, 3)).astype(np.float32)
    with torch.no_grad():
        expected = reference.flava.get_image_features(torch_of(image), interpolate_pos_encoding=True)
    found = apply(model, params, image=image, interpolate_positions=True)
    close(found.image_embeddings, expected.last_hidden_state)
    embeds = apply(model, params, model.encode_image, image=image, interpolate_positions=True)
    close(embeds, expected.pooler_output[:, 0])  # Hugging Face projects every token
    with pytest.raises(ValueError, match="image: expected 32x32 pixels, found 48x24"):
        model.apply({"params": params}, image=image)


def test_codebook_equals_hugging_face(pair):
    reference, model, params = pair
    with torch.no_grad():
        logits = reference.image_codebook(torch_of(CODEBOOK_IMAGE))
        labels = reference.image_codebook.get_codebook_indices(torch_of(CODEBOOK_IMAGE))
    found = apply(model, params, model.codebook_logits, image=CODEBOOK_IMAGE)
    close(np.asarray(found).transpose(0, 3, 1, 2), logits)
    shares = apply(model, params, model.codebook_probabilities, image=CODEBOOK_IMAGE)
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(shares.argmax(-1), found.argmax(-1))
    every = apply(model, params, model.codebook_labels, image=CODEBOOK_IMAGE)
    np.testing.assert_array_equal(every, labels.reshape(3, -1))
    some = np.array([[3, 1], [0, 15], [7, 7]])
    chosen = apply(model, params, model.codebook_labels, image=CODEBOOK_IMAGE, positions=some)
    np.testing.assert_array_equal(chosen, np.take_along_axis(np.asarray(every), some, axis=1))


def test_padding_and_hidden_image_tokens_change_nothing(pair):
    """Longer padding leaves all real outputs as they are, and so do hidden image tokens' contents."""
    _, model, params = pair
    longer = [np.pad(x, ((0, 0), (0, 5))) for x in (TOKENS, MASK)]
    short = apply(model, params, image=IMAGE, tokens=TOKENS, mask=MASK)
    long = apply(model, params, image=IMAGE, tokens=longer[0], mask=longer[1])
    real = np.pad(MASK, ((0, 0), (18, 0)), constant_values=True)
    np.testing.assert_allclose(
        long.multimodal_embeddings[:, : real.shape[1]][real], short.multimodal_embeddings[real], atol=1e-5
    )
    image_mask = np.ones((3, 17), bool)
    image_mask[:, 9:13] = False
    other = IMAGE.copy()
    other[:, 16:24] += 1.0  # the third row of patches, tokens 9 to 12
    one, two = (apply(model, params, image=x, tokens=TOKENS, mask=MASK, image_mask=image_mask) for x in (IMAGE, other))
    np.testing.assert_allclose(one.image_embeddings[:, :9], two.image_embeddings[:, :9], atol=1e-5)
    np.testing.assert_allclose(one.multimodal_embeddings[:, 0], two.multimodal_embeddings[:, 0], atol=1e-5)
    assert np.abs(one.image_embeddings[:, 9:13] - two.image_embeddings[:, 9:13]).max() > 0.01


def test_fusion_can_attend_to_padding(pair):
    """As in torchmultimodal: Hugging Face's fusion without an attention mask there, with one in the text encoder."""
    reference, model, params = pair
    old = FLAVA(dataclasses.replace(model.config, mask_text_padding=False))
    found = apply(old, params, image=IMAGE, tokens=TOKENS, mask=MASK)
    with torch.no_grad():
        image = reference.flava.image_model(torch_of(IMAGE), output_hidden_states=True).hidden_states[-1]
        text = reference.flava.text_model(torch_of(TOKENS), torch_of(MASK, torch.long), output_hidden_states=True)
        states = reference.flava.image_to_mm_projection(image), reference.flava.text_to_mm_projection(text[2][-1])
        expected = reference.flava.multimodal_model(torch.cat(states, 1)).last_hidden_state
    close(found.multimodal_embeddings, expected)


@pytest.mark.parametrize("reads", ["image", "text", "multimodal"])
def test_classifier_reads_the_class_token(pair, reads):
    _, model, params = pair
    head = ClassifierConfig(4, reads, 7)
    ours = FLAVA(dataclasses.replace(model.config, classifier=head))
    kernels = {"dense": RNG.normal(size=(24, 7)), "out": RNG.normal(size=(7, 4))}
    biases = {"dense": RNG.normal(size=7), "out": RNG.normal(size=4)}
    own = {name: {"kernel": kernels[name], "bias": biases[name]} for name in kernels}
    inputs = {"image": IMAGE, "tokens": TOKENS, "mask": MASK, "token_types": TYPES}
    if reads == "image":
        inputs = {"image": IMAGE}
    if reads == "text":
        inputs.pop("image")
    found = apply(ours, {**params, "classifier": own}, ours.classify, **inputs)
    state = np.asarray(getattr(apply(model, params, **inputs), f"{reads}_embeddings")[:, 0])
    hidden = np.maximum(state @ kernels["dense"] + biases["dense"], 0)
    np.testing.assert_allclose(found, hidden @ kernels["out"] + biases["out"], atol=1e-4)


def test_matching_needs_no_masks(pair):
    reference, model, params = pair
    found = apply(model, params, model.match, image=IMAGE, tokens=TOKENS, mask=MASK)
    with torch.no_grad():
        output = reference.flava(torch_of(TOKENS), torch_of(IMAGE), torch_of(MASK, torch.long))
        close(found, reference.itm_head(output.multimodal_embeddings))


def shapes_of(config, **inputs):
    inputs = inputs or {"image": jnp.zeros((1, 224, 224, 3)), "tokens": jnp.zeros((1, 2), jnp.int32)}
    tree = jax.eval_shape(lambda key: FLAVA(config).init(key, **inputs)["params"], jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten(nn.unbox(tree)).items()}


def test_published_size():
    """Parameter counts of `facebook/flava-full`."""
    shapes = shapes_of(FLAVAConfig())

    def count(*prefixes):
        return sum(int(np.prod(shape)) for path, shape in shapes.items() if path.startswith(prefixes))

    assert count("") == 357_645_303
    assert count("") - count("codebook/") == 303_859_063
    assert [count(part) for part in ("vision/", "text/", "fusion/", "codebook/")] == [
        86_390_016,
        109_483_776,
        43_120_128,
        53_786_240,
    ]
    assert [count(head) for head in ("mlm_head", "mmm_text_head", "mim_head", "mmm_image_head", "itm_head")] == [
        24_063_546,
        24_063_546,
        6_891_776,
        6_891_776,
        592_130,
    ]


def test_a_model_has_the_parts_of_its_config():
    """`init` creates every part, whatever the inputs reach."""
    assert set(shapes_of(FLAVAConfig(), image=jnp.zeros((1, 224, 224, 3)))) == set(shapes_of(FLAVAConfig()))
    alone = {"projection_dim": None, "heads": False, "codebook": None}
    only = shapes_of(FLAVAConfig(text=None, fusion=None, **alone), image=jnp.zeros((1, 224, 224, 3)))
    assert {path.split("/")[0] for path in only} == {"vision"}
    only = shapes_of(FLAVAConfig(vision=None, fusion=None, **alone), tokens=jnp.zeros((1, 2), jnp.int32))
    assert {path.split("/")[0] for path in only} == {"text"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": None, "text": None, "fusion": None, "codebook": None}, "at least one of vision, text"),
        ({"image_vocab_size": 100}, "image_vocab_size: expected the codebook's 8192, found 100"),
        ({"fusion": None, "classifier": ClassifierConfig(2)}, "classifier.input: the model has no 'multimodal'"),
        ({"text": dataclasses.replace(BERT, pre_norm=False)}, "text.pre_norm: expected True"),
        ({"vision": dataclasses.replace(VIT, output_norm="class", pooler=False)}, "output_norm='all'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FLAVAConfig(**changes)


def test_initial_values():
    """N(0, 0.02), but for the padding row, the mask token and biases at 0 and the codebook's kernels.

    A class token at zero would have gradients a million times too large: the norms' epsilon is 1e-12.
    """
    from vlm.encoders.dvae import DVAEConfig, DVAEEncoder

    small = dataclasses.replace(VIT, hidden_size=48, num_layers=2, num_heads=4, mlp_dim=96, image_size=32)
    text = dataclasses.replace(BERT, hidden_size=48, num_layers=2, num_heads=4, mlp_dim=96, vocab_size=90)
    config = FLAVAConfig(small, text, None, 48, heads=False, codebook=None)
    inputs = {"image": jnp.zeros((1, 32, 32, 3)), "tokens": jnp.zeros((1, 2), jnp.int32)}
    params = flatten(nn.unbox(jax.jit(lambda key: FLAVA(config).init(key, **inputs)["params"])(jax.random.key(0))))
    assert not np.any(params["vision/mask_embedding"])
    assert 0.018 < params["vision/position_embedding"].std() < 0.022
    assert 0.014 < params["vision/class_embedding"].std() < 0.026
    table = params["text/token_embedding/embedding"]
    assert not np.any(table[0]) and 0.018 < table[1:].std() < 0.022
    assert 0.019 < params["vision/layers/mlp/up/kernel"].std() < 0.021
    assert params["logit_scale"] == np.float32(2.6592)
    codebook = DVAEEncoder(DVAEConfig(hidden_size=32, vocab_size=64))
    init = jax.jit(lambda key: codebook.init(key, jnp.zeros((1, 8, 8, 3)))["params"])
    kernels = flatten(nn.unbox(init(jax.random.key(0))))
    kernel = kernels["group_1/block_1/conv_1/kernel"]
    np.testing.assert_allclose(kernel.std(), (9 * 32) ** -0.5, rtol=0.05)
