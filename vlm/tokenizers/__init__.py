"""Text to token ids, exactly as the published checkpoints expect it.

`load(path)` reads a folder or a single file: SentencePiece models in XLM-R's or LLaMA's layout, any
`tokenizer.json`, BERT's `vocab.txt`, CLIP's byte-pair files. Everything returns NumPy; nothing needs a network.
"""

from vlm.tokenizers.loading import load
from vlm.tokenizers.spm import train_sentencepiece
from vlm.tokenizers.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load", "train_sentencepiece"]
