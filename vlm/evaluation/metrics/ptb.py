"""Penn Treebank tokenisation of captions, equal to the Java tokenizer of the official caption evaluation.

The official tool runs Stanford's PTBTokenizer 3.4.1 (lower case, one caption a line) and then removes punctuation.
Its peculiarities are part of the published numbers and kept: brackets stay as `-lrb-`, `$` stays, `cannot` is two
words, and a final `no.` keeps its period when the next caption begins with a digit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlm.evaluation.metrics.ptb_rules import CAPITALISED, ENDINGS, NUMBERED, RULES, SPLIT, TITLES

# Removed after tokenising. Brackets are listed in upper case by the official tool, where tokens are in lower case.
PUNCTUATION = frozenset(["''", "'", "``", "`", *".?!,:;-", "--", "..."])
_NEWLINES = re.compile("\r\n|[\n\r\x0b\x0c\x85\u2028\u2029]")
_COMPILED = [(kind, re.compile(pattern)) for kind, pattern in RULES]
# Most captions, and most words of the others, need no rules.
_PLAIN_LINE = re.compile("([A-Za-z]+(?:,? [A-Za-z]+)*) *(\\.?) *")
_PLAIN_WORD = re.compile("[A-Za-z]+(?=,?[ \n])")
_PERIOD_STAYS = frozenset(" ".join([ENDINGS, TITLES, CAPITALISED, NUMBERED]).split())
_CURRENCIES = {"\u00a2": "cents", "\u00a3": "#"}
_FRACTIONS = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_WRITTEN = str.maketrans(
    {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", " ": "\u00a0", "\u00ad": ""}
    | dict.fromkeys("\u0092\u2019", "'")
)
_QUOTES = str.maketrans(
    dict.fromkeys("\u2018\u201b\u0091\u2039", "`")
    | dict.fromkeys("\u2019\u0092\u203a", "'")
    | dict.fromkeys("\u201c\u201f\u0093\u00ab", "``")
    | dict.fromkeys("\u201d\u0094\u00bb", "''")
)
_ENTITIES = {"&amp;": "&", "&apos;": "'", "&lt;": "<", "&gt;": ">"}


def tokenize(captions: Sequence[str]) -> list[str]:
    """Tokenises captions; returns each as its words, in lower case and without punctuation, between single spaces.

    Line breaks in a caption count as spaces. The captions are read one after the other as the official tool does: one
    that ends in an initial, or in an abbreviation that precedes numbers, depends on how the next begins.
    """
    lines = [_NEWLINES.sub(" ", caption) for caption in captions]
    text = "\n".join([*lines, ""])
    tokenized, start = [], 0
    for line in lines:
        tokenized.append(_line(line, text, start))
        start += len(line) + 1
    return tokenized


def _line(line: str, text: str, start: int) -> str:
    plain = _PLAIN_LINE.fullmatch(line)
    if plain:
        words = plain[1].lower().replace(",", "").split(" ")
        period_matters = plain[2] and (len(words[-1]) == 1 or words[-1] in _PERIOD_STAYS)
        if not period_matters and SPLIT.keys().isdisjoint(words):
            return " ".join(words)
    return " ".join(token for token in _scan(text, start, start + len(line)) if token not in PUNCTUATION)


def _scan(text: str, at: int, end: int) -> list[str]:
    """The tokens of `text[at:end]`; what follows is looked at."""
    tokens: list[str] = []
    while at < end:
        plain = _PLAIN_WORD.match(text, at)
        if plain and plain[0].lower() not in SPLIT:
            tokens.append(plain[0].lower())
            at = plain.end()
            continue
        kind, token = _longest(text, at)
        at += len(token)
        tokens.extend(_written(kind, token))
    return tokens


def _longest(text: str, at: int) -> tuple[str, str]:
    """Kind and text of the token at a place; what no rule matches is dropped like white space, by the character."""
    kind, end, token = "drop", at, text[at]
    for name, pattern in _COMPILED:
        found = pattern.match(text, at)
        if found and found.end() > end:
            kind, end = name, found.end()
            token = (found["t"] if "t" in pattern.groupindex else None) or found[0]
    return kind, token


def _written(kind: str, token: str) -> list[str]:
    """What the official tool prints for a token."""
    if kind == "drop":
        return []
    if kind == "dash":
        return ["--"]
    if kind == "currency":
        return [_CURRENCIES.get(token, "$")]
    if kind == "quote":
        return [token.translate(_QUOTES)]
    if kind == "fraction":
        return [_FRACTIONS[token]]
    token = token.lower()
    if kind == "raw":
        return [token]
    if kind == "smiley":
        return [token.replace("(", "-lrb-").replace(")", "-rrb-")]
    if kind == "split":
        return [token[: SPLIT[token]], token[SPLIT[token] :]]
    for entity, character in _ENTITIES.items():
        token = token.replace(entity, character)
    return [token.translate(_WRITTEN)]
