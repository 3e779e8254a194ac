"""Generation against Hugging Face's `generate`, and its invariances: batch, padding, beams, cache, mesh."""

import numpy as np
import pytest
import torch

from vlm.generation import generate

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


@pytest.mark.parametrize("case", CASES)
def test_equals_hugging_face_on_random_models(pair, prompts, case):
    """Token for token and score for score; 8 cases of 30 models with 2 rows of different lengths each."""
    shape, ranges = CASES[case]
    rng = np.random.default_rng(len(case))
    torch.set_num_threads(1)
    for seed in range(30):
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
