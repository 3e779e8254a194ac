"""Generation against Hugging Face's `generate`, and its invariances: batch, padding, beams, cache, mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import vlm
from vlm import sharding
from vlm.errors import UserError
from vlm.generation import GenerationConfig, generate, prepare
from vlm.generation.beams import generate_beams
from vlm.generation.generate import continue_prompts, prefill
from vlm.generation.processors import numbers
from vlm.generation.rows import Prompt
from vlm.schema import MeshConfig, ShardingConfig

CASES = {  # what shapes the program, and how the numbers vary over random models
    "greedy": ({}, {"repetition_penalty": (1.0, 1.6)}),
    "greedy_ngram": ({"no_repeat_ngram_size": 2}, {"min_new_tokens": (1, 5)}),
    "beam": ({"num_beams": 3}, {"length_penalty": (-1.0, 2.5)}),
    "beam_all": ({"num_beams": 3, "num_return_sequences": 3}, {"length_penalty": (0.0, 2.0), "min_new_tokens": (1, 6)}),
    "beam_early": ({"num_beams": 2, "early_stopping": True}, {"repetition_penalty": (1.1, 1.6)}),
    "beam_never": ({"num_beams": 2, "early_stopping": "never"}, {"length_penalty": (0.1, 2.0)}),
    "beam_ngram": (
        {"num_beams": 4, "no_repeat_ngram_size": 2, "bad_words_ids": ((5,), (3, 4))},
        {"length_penalty": (0.0, 2.0), "repetition_penalty": (1.1, 1.5), "min_new_tokens": (1, 4)},
    ),
    "beam_stops": ({"num_beams": 2, "stop_ids": (2, 7)}, {"length_penalty": (0.0, 2.0)}),
}


def _hf(model, batch, settings):
    settings = dict(settings)
    if "stop_ids" in settings:
        settings["eos_token_id"] = list(settings.pop("stop_ids"))
    if "bad_words_ids" in settings:
        settings["bad_words_ids"] = [list(word) for word in settings["bad_words_ids"]]
    with torch.inference_mode():
        return model.generate(
            input_ids=torch.tensor(batch["tokens"]).long(),
            attention_mask=torch.tensor(batch["mask"]).long(),
            return_dict_in_generate=True,
            output_scores=True,
            do_sample=False,
            **settings,
        )


MODELS = 35
"""Of each case, all different: 210 with beams."""


@pytest.mark.parametrize("case", CASES)
def test_equals_hugging_face_on_random_models(pair, prompts, case):
    """Token for token and score for score; of every model 2 rows, of different lengths where theirs allows it."""
    shape, ranges = CASES[case]
    number = list(CASES).index(case)
    rng = np.random.default_rng(number)
    torch.set_num_threads(1)
    for seed in range(number * MODELS, (number + 1) * MODELS):
        numbers = {k: type(low)(round(rng.uniform(low, high), 2)) for k, (low, high) in ranges.items()}
        settings = {**shape, **numbers, "max_new_tokens": 7}
        params = pair.draw(seed)
        lengths = [4, 4] if "no_repeat_ngram_size" in shape else [2, 4]  # theirs counts n-grams of padding
        batch = prompts(lengths, seed, "left")
        found = generate(pair.model, params, batch, **settings)
        expected = _hf(pair.hf, batch, settings)
        tokens = expected.sequences.numpy()
        for row in range(len(tokens)):
            skip = 4 - found.prompt_lengths[row]
            ours = found.sequences[row, : found.lengths[row]]
            np.testing.assert_array_equal(
                ours, tokens[row, skip : skip + len(ours)], err_msg=f"{case} {seed} {settings}"
            )
            assert set(tokens[row, skip + len(ours) :]) <= {0, 2, 7}  # theirs fills up with padding or stop tokens
        if "num_beams" in shape:
            np.testing.assert_allclose(found.scores, expected.sequences_scores, rtol=2e-5, atol=1e-5)


@pytest.fixture(scope="module")
def drawn(pair):
    """Parameters whose sequences end at different steps."""
    return pair.draw(3)


STOPS = (2, 5, 7)
ROWS = {
    "greedy": {"max_new_tokens": 9},
    "beams": {"max_length": 12, "num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2},
    "legacy": {"max_length": 12, "num_beams": 2, "beam_normalisation": "legacy", "length_penalty": 0.2},
    "samples": {"max_new_tokens": 9, "do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
    "beam_sample": {"max_new_tokens": 9, "do_sample": True, "top_k": 6, "num_beams": 2},
}


@pytest.mark.parametrize("mode", ROWS)
def test_rows_depend_on_neither_batch_nor_padding(pair, drawn, prompts, mode):
    """Each row as in a batch of three copies of itself (of itself alone: "beams"), padded on either side."""
    settings, lengths = ROWS[mode] | {"stop_ids": STOPS}, [2, 5, 3]
    count, copies = settings.get("num_return_sequences", 1), 1 if mode == "beams" else 3
    keys = jax.random.split(jax.random.key(7), 3)
    rng = {"rng": keys} if "sample" in mode else {}
    right, left = (generate(pair.model, drawn, prompts(lengths, side=s), **settings, **rng) for s in ("right", "left"))
    np.testing.assert_array_equal(right.sequences, left.sequences)
    assert len(set(right.lengths)) > 1
    batch = prompts(lengths)
    for row in range(3):
        alone = {name: np.repeat(x[row : row + 1], copies, axis=0) for name, x in batch.items()}
        own = {"rng": jnp.repeat(keys[row : row + 1], copies)} if rng else {}
        one = generate(pair.model, drawn, alone, **settings, **own)
        for k in range(count):
            together = row * count + k
            length = right.lengths[together]
            np.testing.assert_array_equal(one.sequences[k, :length], right.sequences[together, :length])
            np.testing.assert_allclose(one.scores[k], right.scores[together], rtol=1e-4)
            np.testing.assert_array_equal(one.completions[k], right.completions[together])


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_steps_equal_the_full_pass(pair, drawn, prompts, side):
    batch = prompts([2, 5, 3], side=side)
    found = generate(pair.model, drawn, batch, max_new_tokens=8, num_beams=3, log_probs=True, length_penalty=0.0)
    real = np.arange(found.sequences.shape[1])[None] < found.lengths[:, None]
    logits = pair.model.apply({"params": drawn}, jnp.asarray(found.sequences), jnp.asarray(real))
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    for row, (start, stop) in enumerate(zip(found.prompt_lengths, found.lengths, strict=True)):
        expected = [log_probs[row, i - 1, found.sequences[row, i]] for i in range(start, stop)]
        np.testing.assert_allclose(found.log_probs[row, : stop - start], expected, atol=2e-5)
        np.testing.assert_allclose(found.scores[row], sum(expected), atol=1e-4)
        assert not found.log_probs[row, stop - start :].any()


def test_greedy_is_one_beam(pair, prompts):
    """With one beam, the first sequence to end is the greedy one."""
    settings = {"max_new_tokens": 8, "min_new_tokens": 2, "no_repeat_ngram_size": 3}
    one = GenerationConfig(**settings)
    object.__setattr__(one, "early_stopping", True)  # of one beam it is refused
    arrays = prompts([4, 4])
    prompt = Prompt(*map(jnp.asarray, (arrays["tokens"], np.full(2, 4, np.int32), np.full(2, 8, np.int32))))
    decoder, traced = pair.model.clone(decoding=True), numbers(one, (2,), 12)

    @jax.jit
    def beam(params):
        apply = partial(decoder.apply, {"params": params})
        logits, cache = apply(**arrays, method="prefill")
        step = partial(apply, method="decode")
        return generate_beams(step, logits, cache, prompt, one, traced, None, 8, 0)

    for seed in range(5):
        prepared = prepare(pair.model, pair.draw(seed))
        found, greedy = beam(prepared.params), generate(pair.model, prepared, arrays, **settings)
        for row, length in enumerate(greedy.lengths - 4):
            assert found.lengths[row, 0] == length
            np.testing.assert_array_equal(found.tokens[row, 0, :length], greedy.sequences[row, 4 : 4 + length])


def test_one_program_for_a_bucket_of_lengths_and_any_numbers(pair, drawn, prompts):
    prepared = prepare(pair.model, drawn)
    run = partial(generate, pair.model, prepared, max_new_tokens=9, num_beams=2)
    run(prompts([5, 3]), length_penalty=0.5, min_new_tokens=1, repetition_penalty=1.2)
    programs = prefill._cache_size(), continue_prompts._cache_size()
    for i, lengths in enumerate([[6, 2], [7, 7], [8, 1]]):
        run(prompts(lengths), length_penalty=0.6 + i, min_new_tokens=2 + i, repetition_penalty=1.3 + i)
    assert (prefill._cache_size(), continue_prompts._cache_size()) == programs
    run(prompts([9, 1]), length_penalty=0.5, min_new_tokens=1, repetition_penalty=1.2)
    assert prefill._cache_size() == programs[0] + 1


def test_the_loop_ends_when_all_rows_have(pair, prompts):
    """It runs the model once less than the longest row has tokens, and not at all for one token."""
    calls = []

    class Counting(type(pair.model)):
        def decode(self, tokens, cache):
            jax.debug.callback(lambda: calls.append(1))
            return super().decode(tokens, cache)

    model, params = Counting(pair.model.config), pair.draw(0)
    ends = []
    for settings in ({}, {"num_beams": 2, "early_stopping": True}):
        settings |= {"max_new_tokens": 30, "min_new_tokens": 4, "stop_ids": tuple(range(2, 11))}
        found = generate(model, params, prompts([3, 3]), **settings)
        jax.effects_barrier()
        ends.append((len(calls), int((found.lengths - 3).max())))
        calls.clear()
    assert ends[0][0] == ends[0][1] - 1 < 29
    assert ends[1][1] - 1 <= ends[1][0] < 29
    generate(model, params, prompts([3, 3]), max_new_tokens=1)
    jax.effects_barrier()
    assert not calls


def test_samples_have_the_model_probabilities(pair, drawn, prompts):
    batch = prompts([4])
    found = generate(
        pair.model, drawn, batch, max_new_tokens=1, do_sample=True, num_return_sequences=2000, temperature=1.5, top_k=5
    )
    logits = np.asarray(pair.model.apply({"params": drawn}, **{k: jnp.asarray(v) for k, v in batch.items()}))[0, -1]
    kept = np.where(logits >= np.sort(logits)[-5], np.exp(logits / 1.5), 0)
    frequency = np.bincount(found.sequences[:, 4], minlength=11) / 2000
    np.testing.assert_allclose(frequency, kept / kept.sum(), atol=0.04)
    seeds = [generate(pair.model, drawn, batch, do_sample=True, seed=seed).sequences for seed in (0, 0, 1)]
    np.testing.assert_array_equal(seeds[0], seeds[1])
    assert seeds[0].shape != seeds[2].shape or (seeds[0] != seeds[2]).any()


def test_beam_sample_without_randomness_is_beam_search(pair, drawn, prompts):
    settings = {"num_beams": 3, "max_new_tokens": 6, "num_return_sequences": 3}
    cold = generate(pair.model, drawn, prompts([4, 2]), do_sample=True, temperature=1e-4, **settings)
    beams = generate(pair.model, drawn, prompts([4, 2]), **settings)
    np.testing.assert_array_equal(cold.sequences, beams.sequences)


def test_sharded_equals_one_device(pair, prompts):
    """Eight devices, batch and weights split over all three mesh axes."""
    batch, params = prompts([4, 2, 3, 3]), pair.draw(1)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rules = ShardingConfig().rules
    abstract = jax.eval_shape(pair.model.init, jax.random.key(0), *map(jnp.asarray, batch.values()))["params"]
    for settings in ({"max_new_tokens": 6}, {"max_new_tokens": 6, "num_beams": 2}):
        expected = generate(pair.model, params, batch, **settings)
        with sharding.use(mesh, rules):
            placed = sharding.named(sharding.place(abstract, rules, dict(mesh.shape)), mesh)
            split = jax.device_put(params, placed)
            prepared = prepare(pair.model, split)
            found = generate(pair.model, prepared, batch, **settings)
        kernel = prepared.params["text"]["layers_0"]["attention"]["qkv"]["transposed_kernel"]
        assert not kernel.sharding.is_fully_replicated
        np.testing.assert_array_equal(found.sequences, expected.sequences)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beam": 3}, "num_beam does not exist; did you mean 'num_beams'"),
        ({"num_beams": "3"}, "num_beams: expected int, found '3'"),
        ({"temperature": 0.7}, "temperature: only draws use it; expected do_sample=True"),
        ({"do_sample": True, "temperature": 0.0}, "temperature: expected a finite number of more than 0"),
        (
            {"do_sample": True, "temperature": 1e-39},
            "temperature: expected a finite number of more than 0, found 1e-39",
        ),
        ({"seed": 2**70}, "seed: expected a number from 0 to 4294967295, found 1180591620717411303424"),
        ({"seed": -1}, "seed: expected a number from 0 to 4294967295, found -1"),
        ({"num_beams": 2, "length_penalty": 400.0}, "length_penalty: expected a number from -10 to 10, found 400"),
        ({"max_length": 9, "max_new_tokens": 3}, "only one of max_new_tokens and max_length"),
        ({"max_length": 4}, "expected more than the longest prompt, found 4 and a prompt of 4 tokens in row 1"),
        ({"max_new_tokens": 45}, "reads at most 48 tokens; asked for 49"),
        ({"num_return_sequences": 2}, "greedy decoding has one result"),
        ({"num_beams": 2, "num_return_sequences": 3}, "at most num_beams, found 3"),
        ({"stop_ids": (11,)}, "stop_ids: expected ids from 0 to 10, found 11"),
        ({"bad_words_ids": ((3,), (2,))}, "a stop token cannot be forbidden"),
        ({"beam_normalisation": "legacy", "num_beams": 2, "early_stopping": "never"}, "'never' exists with"),
        ({"do_sample": True, "rng": jnp.zeros(2, jnp.uint32)}, "rng: expected a key"),
        ({"rng": jax.random.key(0)}, "rng: only draws use it; expected do_sample=True"),
        ({"seed": 4}, "seed: only draws use it; expected do_sample=True"),
        ({"length_penalty": 3.0}, "length_penalty: only beam search uses it; expected num_beams of at least 2"),
        ({"early_stopping": True}, "early_stopping: only beam search uses it"),
        ({"early_stopping": "never", "do_sample": True}, "early_stopping: only beam search uses it"),
        ({"beam_normalisation": "legacy"}, "beam_normalisation: only beam search uses it"),
        ({"min_new_tokens": 50}, "min_new_tokens: expected at most 20, the limit on new tokens, found 50"),
        ({"min_new_tokens": 4, "max_new_tokens": 3}, "min_new_tokens: expected at most 3"),
        ({"min_new_tokens": 9, "max_length": 9}, "min_new_tokens: expected at most 8"),
    ],
)
def test_wrong_settings_die_at_the_door(pair, drawn, prompts, settings, message):
    with pytest.raises(UserError, match=message):
        generate(pair.model, drawn, prompts([2, 4]), **settings)


def test_wrong_prompts_die_at_the_door(pair, drawn, prompts):
    batch = prompts([2, 4])
    with pytest.raises(UserError, match="tokens: expected ids from 0 to 10, found 1"):
        generate(pair.model, drawn, batch | {"tokens": batch["tokens"] + 7 * batch["mask"]})
    with pytest.raises(UserError, match="at least one token in every row, found none in row 1"):
        generate(pair.model, drawn, batch | {"mask": batch["mask"] & (np.arange(2) == 0)[:, None]})
    for change, message in (
        (
            {"tokens": batch["tokens"][:, :3]},
            r"tokens: expected \[B, L\] with a mask of this shape, found \(2, 3\) and",
        ),
        ({"mask": batch["mask"][:1]}, "expected at least one row, and as many of everything, found tokens 2, mask 1"),
        ({name: x[:0] for name, x in batch.items()}, "expected at least one row, .* found tokens 0, mask 0"),
        ({"tokens": batch["tokens"] - ~batch["mask"]}, "tokens: expected ids from 0 to 10, found -1"),
    ):
        with pytest.raises(UserError, match=message):
            generate(pair.model, drawn, batch | change)
    broken = jax.tree.map(lambda x: x * np.nan, drawn)
    with pytest.raises(UserError, match="scores are not finite"):
        generate(pair.model, broken, batch)
    with pytest.raises(UserError, match="dict does not generate text"):
        generate({}, drawn, batch)


def test_defaults_that_are_given_pass():
    given = {"seed": 0, "length_penalty": 1.0, "early_stopping": False, "beam_normalisation": "hf", "temperature": 1.0}
    assert GenerationConfig(**given, min_new_tokens=20) == GenerationConfig(min_new_tokens=20)
    beams = {"length_penalty": 3.0, "early_stopping": "never", "min_new_tokens": 8, "max_length": 9}
    assert GenerationConfig(num_beams=2, **beams).length_penalty == 3


def test_prefill_options_die_at_the_door(pair, drawn, prompts):
    with pytest.raises(UserError, match="prefill_options: Toy has no option 'interpolate'; it takes none"):
        generate(pair.model, drawn, prompts([2, 4]), prefill_options={"interpolate": True})


def test_what_the_model_refuses_is_a_user_error(pair, drawn, prompts):
    class Refusing(type(pair.model)):
        def prefill(self, tokens, mask):
            raise TypeError("tokens:\n of another kind")

    message = r"batch: the model cannot read tokens \(2, 4\), mask \(2, 4\): tokens: of another kind"
    with pytest.raises(UserError, match=message):
        generate(Refusing(pair.model.config), drawn, prompts([2, 4]))


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty", "length_penalty"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_are_finite(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected .*, found {value}"):
        GenerationConfig(do_sample=True, **{name: value})


def test_the_public_door_and_a_config_with_changes(pair, drawn, prompts):
    config = GenerationConfig(num_beams=2, max_new_tokens=4)
    found = vlm.generate(pair.model, drawn, prompts([2, 4]), config=config, num_return_sequences=2)
    assert found.sequences.dtype == np.int32 and len(found.sequences) == 4
    np.testing.assert_array_equal(found.prompt_lengths, [2, 2, 4, 4])
    np.testing.assert_array_equal(found.sequences[2:, :4], np.tile(prompts([2, 4])["tokens"][1], (2, 1)))
