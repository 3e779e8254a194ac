"""Legacy beam search against a brute-force reading of the published scorer: lists, loops, one example at a time."""

import numpy as np
import pytest
import torch

from vlm.generation import generate

STOP = 2


class _Hypotheses:
    """The best num_beams ended sequences, as the scorer of transformers 4.15 keeps them."""

    def __init__(self, num_beams, length_penalty, early_stopping):
        self.num_beams, self.penalty, self.early = num_beams, length_penalty, early_stopping
        self.kept, self.worst = [], 1e9

    def add(self, tokens, total):
        score = total / len(tokens) ** self.penalty
        if len(self.kept) < self.num_beams or score > self.worst:
            self.kept.append((score, tokens))
            if len(self.kept) > self.num_beams:
                self.kept.remove(min(self.kept, key=lambda pair: pair[0]))
                self.worst = min(score for score, _ in self.kept)
            else:
                self.worst = min(score, self.worst)

    def is_done(self, best, length):
        if len(self.kept) < self.num_beams:
            return False
        return True if self.early else self.worst >= best / length**self.penalty


def _search(next_log_probs, prompt, num_beams, max_length, length_penalty=1.0, early_stopping=False):
    """Returns the ended sequences, best first, as (score, tokens, ended with the stop token)."""
    found = _Hypotheses(num_beams, length_penalty, early_stopping)
    beams, done = [(0.0, list(prompt))] + [(-1e9, list(prompt))] * (num_beams - 1), False
    while not done and len(beams[0][1]) < max_length:
        table = np.array([total for total, _ in beams])[:, None] + next_log_probs([tokens for _, tokens in beams])
        order = np.argsort(-table, axis=None, kind="stable")[: 2 * num_beams]
        following, length = [], len(beams[0][1])
        for rank, index in enumerate(order):
            beam, token = divmod(int(index), table.shape[1])
            if token == STOP:
                if rank < num_beams:
                    found.add(beams[beam][1], table.flat[index])
            else:
                following.append((table.flat[index], beams[beam][1] + [token]))
            if len(following) == num_beams:
                break
        done = found.is_done(table.max(), length)
        beams = following
    for total, tokens in [] if done else beams:
        found.add(tokens, total)
    return sorted(found.kept, key=lambda pair: -pair[0])


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("num_beams", [2, 3])
def test_equals_the_published_scorer(pair, prompts, num_beams, early_stopping):
    rng, batch = np.random.default_rng(num_beams + 10), prompts([4, 4], 0)  # draws without candidates that nearly tie

    def next_log_probs(rows):
        with torch.inference_mode():
            return pair.hf(torch.tensor(rows)).logits[:, -1].log_softmax(-1).numpy()

    torch.set_num_threads(1)
    shorter = 0
    for seed in range(15):
        params, penalty = pair.draw(seed), round(rng.uniform(0, 2), 2)
        settings = {"num_beams": num_beams, "length_penalty": penalty, "early_stopping": early_stopping}
        settings |= {"max_length": 10, "num_return_sequences": num_beams}
        found = generate(pair.model, params, batch, beam_normalisation="legacy", **settings)
        for row, prompt in enumerate(batch["tokens"]):
            settings.pop("num_return_sequences", None)
            expected = _search(next_log_probs, prompt.tolist(), **settings)
            for rank, (score, tokens) in enumerate(expected):
                i = row * num_beams + rank
                ours = found.sequences[i, : found.lengths[i]].tolist()
                assert ours == tokens + [STOP] * (len(tokens) < 10), (seed, penalty, row, rank)
                np.testing.assert_allclose(found.scores[i], score, rtol=2e-5)
                shorter += len(tokens) < 10
    assert shorter > 10  # both ways of ending occur


def test_the_forms_differ(pair, prompts):
    """The prompt counts in the legacy normaliser only, which prefers shorter sequences."""
    batch, different = prompts([6, 6], 0), 0
    for seed in range(12):
        params = pair.draw(seed)
        runs = [generate(pair.model, params, batch, num_beams=3, beam_normalisation=f) for f in ("hf", "legacy")]
        different += not np.array_equal(runs[0].completions[0], runs[1].completions[0])
    assert different >= 2
