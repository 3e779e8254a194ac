"""Text generation for every family with a decoder: greedy, sampling, beam search, beam-sample.

`generate` is the door; `prepare` lays the parameters out for decoding once for many calls. A model generates if it
follows `vlm.family.Generative`.
"""

from vlm.generation.config import GenerationConfig
from vlm.generation.generate import Generation, Prepared, generate, prepare

__all__ = ["Generation", "GenerationConfig", "Prepared", "generate", "prepare"]
