"""Metrics of result files, as the official tools compute them: captions, answers, sentence pairs.

Pure functions of strings and NumPy arrays; no model, no jax. `files` reads the official formats, `python -m vlm.score`
is the command line.
"""
