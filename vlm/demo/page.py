"""The page of FLAVA's demonstration: the table, and what was hidden and what was guessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.masking import IGNORE
from vlm.demo.held_out import Batches, HeldOut
from vlm.evaluation import html

SHOWN = 8
GREY = 128
TITLE = "FLAVA: six losses on pairs, pictures and texts"
HEAD = ("held-out", "ln of choices", "frequencies", "random", "trained", "change", "mark")
WORDS = (
    "From the left: the picture with the hidden patches grey, the guessed visual words painted in as the mean patch of "
    "each, and the right ones."
)


def page(rows: Sequence[Sequence[str]], pictures: str) -> str:
    """The document.

    Args:
      rows: of the table, as text. pictures: what `pictures` has made.
    """
    cells = ([html.text(cell) for cell in row] for row in rows)
    parts = [f"<h1>{html.text(TITLE)}</h1>", html.table(HEAD, cells, range(1, len(HEAD))), pictures]
    return html.page(TITLE, "\n".join(parts))


def pictures(held_out: HeldOut, params: Any, streams: Batches, means: np.ndarray, of: str) -> str:
    """Hidden and guessed patches and words of held-out pairs and pictures.

    Args:
      means: the visual words' mean patches uint8[V, h, w, 3]. of: what the pictures show, for the titles.
    """
    parts = []
    for stream, title in (("pairs", "Patches and words of pairs"), ("images", "Patches of pictures alone")):
        batch = streams[stream][0]
        guessed = held_out.predictions(params, batch)
        parts.append(f'<h2>{html.text(f"{title}: {of}")}</h2><p class="soft">{html.text(WORDS)}</p>')
        for row in range(min(SHOWN, len(batch["image"]))):
            painted = _painted(batch, guessed["patches"], means, row)
            shown = "".join(f'<div class="card">{html.picture(Image.fromarray(image))}</div>' for image in painted)
            said = _sentence(held_out.processor, batch, guessed["tokens"], row) if "tokens" in guessed else ""
            parts.append(f'{said}<div class="row">{shown}</div>')
    return "\n".join(parts)


def _painted(batch: dict[str, np.ndarray], guessed: np.ndarray, means: np.ndarray, row: int) -> list[np.ndarray]:
    """The picture without its hidden patches, and with guessed and with right ones in their place; uint8[H, W, 3]."""
    hidden, right = batch["patch_mask"][row], batch["patch_labels"][row]
    grid, side = round(len(hidden) ** 0.5), means.shape[1]
    found = []
    for patches in (np.full((len(hidden), *means.shape[1:]), GREY, np.uint8), means[guessed[row]], means[right]):
        patches = np.where(hidden[:, None, None, None], patches, means[right])
        image = patches.reshape(grid, grid, side, side, 3).transpose(0, 2, 1, 3, 4)
        found.append(np.ascontiguousarray(image.reshape(grid * side, grid * side, 3)))
    return found


def _sentence(processor: Any, batch: dict[str, np.ndarray], guessed: np.ndarray, row: int) -> str:
    """The caption; of hidden words the guess, and the right word where that is another one."""

    def word(number: Any) -> str:
        return html.text(processor.tokenizer.decode([int(number)], skip_special=False))

    words = []
    for column in np.flatnonzero(batch["mask"][row])[1:-1]:
        label, guess = batch["token_labels"][row, column], guessed[row, column]
        if label == IGNORE:
            words.append(word(batch["tokens"][row, column]))
        else:
            mark = f'<b class="mark {"good" if label == guess else "bad"}">[{word(guess)}]</b>'
            words.append(mark if label == guess else f"{mark} (is {word(label)})")
    note = "" if batch["itm_labels"][row] else ' <span class="soft">(the caption of another picture)</span>'
    return f"<p>{' '.join(words)}{note}</p>"
