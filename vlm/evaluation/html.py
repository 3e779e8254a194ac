"""Pieces of a self-contained HTML page: escaped text, pictures as data URIs, style. No script, no network."""

from __future__ import annotations

import base64
import functools
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

THUMBNAIL = 160
TINY = 64

CSS = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --line: #e4e7ec; --paper: #ffffff; --card: #f8f9fb;
  --good: #12805c; --bad: #c4320a; --accent: #3538cd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2b3340; --paper: #12161d;
  --card: #1a202a; --good: #47cd9a; --bad: #ff8a5c; --accent: #a4a8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 2.5rem 1.5rem 4rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "Noto Sans Arabic", "DejaVu Sans",
  sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .2rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.8rem 0 .6rem; } details { margin: 1.2rem 0; } summary { cursor: pointer; }
p, dl { margin: .2rem 0; } .soft, dt { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .87rem; }
dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: start; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: .82rem; } .n { text-align: end; } .scroll { overflow-x: auto; }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .7rem 1.1rem; min-width: 8.5rem; }
.figures b { display: block; font-size: 1.5rem; line-height: 1.25; } .figures small { color: var(--soft); }
.side { display: flex; flex-wrap: wrap; gap: 0 4rem; align-items: start; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .6rem; font-size: .85rem; }
.card.good { border-color: var(--good); } .card.bad { border-color: var(--bad); }
.good > .mark, .mark.good { color: var(--good); } .bad > .mark, .mark.bad { color: var(--bad); }
.picture { height: 120px; display: flex; align-items: center; justify-content: center; margin-bottom: .4rem; }
.picture img { max-width: 100%; max-height: 120px; border-radius: 6px; }
img.tiny { height: 120px; image-rendering: pixelated; }
.bar { display: grid; grid-template-columns: 1fr 3.2em; gap: .4rem; align-items: center; }
.bar span:last-child { color: var(--soft); text-align: end; font-size: .78rem; }
.query { display: grid; grid-template-columns: 170px 1fr; gap: 1rem; padding: .8rem 0;
  border-bottom: 1px solid var(--line); }
.query ol { margin: 0; padding-inline-start: 1.4rem; } .query li { padding: .1rem 0; }
.row { display: flex; flex-wrap: wrap; gap: .6rem; } .row .card { width: 130px; text-align: center; }
.matrix td, .matrix th { padding: .2rem .3rem; text-align: center; border: 0; min-width: 2.1rem; font-size: .78rem; }
.matrix td { border-radius: 4px; } .matrix th:first-child { text-align: end; white-space: nowrap; }
.matrix td.zero { color: transparent; }
"""


def text(value: object, language: str = "") -> str:
    """Escaped text that keeps its own direction; `language` picks the right glyphs for Chinese and Japanese."""
    # Lone surrogates cannot be written as UTF-8; control characters would be dropped or break the page.
    clean = str(value).encode("utf-8", "replace").decode("utf-8")
    clean = "".join(c if c >= " " or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in clean)
    mark = f' lang="{html.escape(language)}"' if language else ""
    return f'<bdi dir="auto"{mark}>{html.escape(clean)}</bdi>'


def picture(image: Image.Image | None) -> str:
    """A picture, scaled down, inside the page; a note where there is none."""
    if image is None:
        return '<div class="picture soft">unreadable</div>'
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    tiny = max(image.size) < TINY
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if tiny else "JPEG", **({} if tiny else {"quality": 85}))
    data = base64.b64encode(buffer.getvalue()).decode()
    kind, mark = ("png", ' class="tiny"') if tiny else ("jpeg", "")
    return f'<div class="picture"><img{mark} alt="" src="data:image/{kind};base64,{data}"></div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table of cells that are HTML already; columns in `numbers` are set flush."""
    flush = set(numbers)

    def line(tag: str, cells: Sequence[str]) -> str:
        marks = ((' class="n"' if column in flush else "") for column in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{m}>{c}</{tag}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{line("th", head)}</thead><tbody>{body}</tbody></table></div>'


def facts(values: Iterable[tuple[str, object]]) -> str:
    """Names with values, one per line; empty values are left out."""
    items = (f"<dt>{html.escape(name)}</dt><dd>{text(value)}</dd>" for name, value in values if value not in (None, ""))
    return f"<dl>{''.join(items)}</dl>"


def figure(name: str, value: float, interval: tuple[float, float] | None = None) -> str:
    """One number, with its confidence interval."""
    show = (lambda value: f"{value:g}") if name.endswith("rank") else functools.partial(number, name=name)
    small = "" if interval is None else f"<small>95 %: {show(interval[0])} to {show(interval[1])}</small>"
    return f"<div><small>{html.escape(name)}</small><b>{show(value)}</b>{small}</div>"


def number(value: float, name: str = "") -> str:
    """A share as a percentage; CIDEr, which is none and may exceed 1, a hundredfold as in papers."""
    return "–" if value != value else f"{100 * value:.1f}{'' if name.endswith('cider') else ' %'}"


def page(title: str, body: str) -> str:
    """The whole document. Its policy forbids scripts and any request."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head><body>\n{body}\n</body></html>\n"
    )
