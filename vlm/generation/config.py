"""How to generate: one frozen config for every family. Names are Hugging Face's where it has the field."""

from __future__ import annotations

import dataclasses
from typing import Literal

DEFAULT_NEW_TOKENS = 20
_POSITIVE = 1e-30, 1e30  # where single precision neither vanishes nor overflows


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Greedy decoding unless told otherwise. Lengths are counted per row, in real tokens.

    Attributes:
      max_new_tokens: most tokens to add to a prompt; 20 if neither limit is given.
      max_length: longest sequence, prompt included; in place of `max_new_tokens`.
      min_new_tokens, min_length: no stop token before so many new tokens, or so long a sequence.
      num_beams: sequences that beam search keeps per example; 1 is no beam search.
      num_return_sequences: results per example; at most num_beams, or any number of samples.
      do_sample: draw tokens; with beams, draw continuations without replacement (beam-sample).
      temperature, top_k, top_p: shape the distribution to draw from, in this order (nucleus sampling, Holtzman et al.
        2020); None: no limit.
      repetition_penalty: logits of tokens that the sequence has, prompt included, are divided by it if positive and
        multiplied if negative (Keskar et al. 2019); beam search applies it to log-probabilities.
      no_repeat_ngram_size: no n-gram occurs twice in a sequence, prompt included; 0: allowed.
      bad_words_ids: token sequences that must not occur.
      length_penalty: beam scores are divided by length ** length_penalty; above 0 longer sequences gain.
      beam_normalisation: the length in that: "hf", tokens generated, stop token included (transformers since 4.4x), or
        "legacy", prompt and generated tokens without the stop token (transformers 4.15, the original BLIP).
      early_stopping: True ends an example when num_beams sequences have ended; False also when no running beam at its
        present length beats them; "never" assumes the most favourable length instead ("hf" only).
      stop_ids: tokens that end a sequence; None: the model's own.
      log_probs: return the log-probability of each generated token as well.
      seed: of the draws, below 2³²; the key of row i is folded from it and i.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    length_penalty: float = 1.0
    beam_normalisation: Literal["hf", "legacy"] = "hf"
    early_stopping: bool | Literal["never"] = False
    stop_ids: tuple[int, ...] | None = None
    log_probs: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for message in self._problems():
            raise ValueError(message)

    def _problems(self) -> list[str]:
        at_least: dict[str, int] = {"num_beams": 1, "num_return_sequences": 1, "max_new_tokens": 1, "max_length": 1}
        at_least |= {"min_new_tokens": 0, "min_length": 0, "top_k": 1, "no_repeat_ngram_size": 0}
        problems = []
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(f"{name}: expected at least {least}, found {value}")
        if self.max_new_tokens is not None and self.max_length is not None:
            problems.append("max_length: expected only one of max_new_tokens and max_length")
        if self.max_length is not None and self.min_length > self.max_length:
            problems.append(f"min_length: expected at most max_length, found {self.min_length}")
        for name, more in (("temperature", "; greedy is do_sample=False"), ("repetition_penalty", "")):
            value = getattr(self, name)
            if not _POSITIVE[0] <= value <= _POSITIVE[1]:
                problems.append(f"{name}: expected a finite number of more than 0, found {value}{more}")
        if not abs(self.length_penalty) <= 10:
            problems.append(f"length_penalty: expected a number from -10 to 10, found {self.length_penalty}")
        if not 0 <= self.seed < 2**32:
            problems.append(f"seed: expected a number from 0 to {2**32 - 1}, found {self.seed}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p: expected a number in (0, 1], found {self.top_p}")
        if any(not word or min(word) < 0 for word in self.bad_words_ids):
            problems.append(f"bad_words_ids: expected non-empty tuples of ids, found {self.bad_words_ids}")
        return problems + self._contradictions()

    def _contradictions(self) -> list[str]:
        problems = []
        sampling = [name for name in ("temperature", "top_k", "top_p") if getattr(self, name) not in (None, 1.0)]
        if sampling and not self.do_sample:
            problems.append(f"{sampling[0]}: only draws use it; expected do_sample=True")
        if self.seed and not self.do_sample:
            problems.append("seed: only draws use it; expected do_sample=True")
        beams = {"length_penalty": 1.0, "early_stopping": False, "beam_normalisation": "hf"}
        beams = [name for name, usual in beams.items() if getattr(self, name) != usual]
        if beams and self.num_beams == 1:
            problems.append(f"{beams[0]}: only beam search uses it; expected num_beams of at least 2")
        least, limit = self.min_new_tokens, self.max_new_tokens or DEFAULT_NEW_TOKENS
        if self.max_length is not None:
            limit = self.max_length - 1  # a prompt has at least one token
        if least > limit:
            problems.append(f"min_new_tokens: expected at most {limit}, the limit on new tokens, found {least}")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            problems.append(f"num_return_sequences: expected at most num_beams, found {self.num_return_sequences}")
        if self.num_beams == 1 and self.num_return_sequences > 1 and not self.do_sample:
            problems.append("num_return_sequences: greedy decoding has one result; expected num_beams or do_sample")
        if self.beam_normalisation == "legacy" and self.early_stopping == "never":
            problems.append("early_stopping: 'never' exists with beam_normalisation='hf' only")
        return problems

    @property
    def rows(self) -> int:
        """Sequences per example that run side by side."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences
