"""Short sentences about the ten digits in eight languages, each sentence the translation of its English neighbour.

`LANGUAGES["es"].phrases[k]` says the same as `LANGUAGES["en"].phrases[k]`. In every sentence the number word stands
as a name after the word for "digit", which leaves it in its citation form where a language inflects numerals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

DIGITS = range(10)


@dataclasses.dataclass(frozen=True)
class Language:
    """One language.

    Attributes:
      name: its English name.
      words: the number words from zero to nine.
      numerals: the figures 0 to 9 as this language's texts write them.
      phrases: sentences with `{c}` where the word or the figure stands, in the same order for all languages.
    """

    name: str
    words: tuple[str, ...]
    phrases: tuple[str, ...]
    numerals: tuple[str, ...] = tuple("0123456789")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A sentence and its English original (itself, in English)."""

    language: str
    digit: int
    text: str
    english: str


LANGUAGES = {
    "en": Language(
        "English",
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        (
            "the digit {c}",
            "a photo of the digit {c}",
            "the digit {c} written by hand",
            "this is the digit {c}",
            "the picture shows the digit {c}",
            "a scan of the handwritten digit {c}",
        ),
    ),
    "zh": Language(
        "Chinese",
        ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九"),
        (
            "数字{c}",
            "一张数字{c}的照片",
            "手写的数字{c}",
            "这是数字{c}",
            "图片上显示的是数字{c}",
            "手写数字{c}的扫描件",
        ),
    ),
    "es": Language(
        "Spanish",
        ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"),
        (
            "el dígito {c}",
            "una foto del dígito {c}",
            "el dígito {c} escrito a mano",
            "este es el dígito {c}",
            "en la imagen se ve el dígito {c}",
            "un escaneo del dígito {c} manuscrito",
        ),
    ),
    "ar": Language(
        "Arabic",
        ("صفر", "واحد", "اثنان", "ثلاثة", "أربعة", "خمسة", "ستة", "سبعة", "ثمانية", "تسعة"),
        (
            "الرقم {c}",
            "صورة فوتوغرافية: الرقم {c}",
            "الرقم {c} مكتوب بخط اليد",
            "هذا هو الرقم {c}",
            "في الصورة يظهر الرقم {c}",
            "مسح ضوئي: الرقم {c} بخط اليد",
        ),
        tuple("٠١٢٣٤٥٦٧٨٩"),
    ),
    "fr": Language(
        "French",
        ("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf"),
        (
            "le chiffre {c}",
            "une photo du chiffre {c}",
            "le chiffre {c} écrit à la main",
            "c'est le chiffre {c}",
            "l'image montre le chiffre {c}",
            "un scan du chiffre {c} manuscrit",
        ),
    ),
    "hi": Language(
        "Hindi",
        ("शून्य", "एक", "दो", "तीन", "चार", "पाँच", "छह", "सात", "आठ", "नौ"),
        (
            "अंक {c}",
            "अंक {c} की एक तस्वीर",
            "हाथ से लिखा हुआ अंक {c}",
            "यह अंक {c} है",
            "चित्र में अंक {c} दिख रहा है",
            "हाथ से लिखे हुए अंक {c} का स्कैन",
        ),
        tuple("०१२३४५६७८९"),
    ),
    "ja": Language(
        "Japanese",
        ("ゼロ", "一", "二", "三", "四", "五", "六", "七", "八", "九"),
        (
            "数字の{c}",
            "数字の{c}の写真",
            "手書きの数字の{c}",
            "これは数字の{c}です",
            "画像には数字の{c}が写っています",
            "手書きの数字の{c}のスキャン",
        ),
    ),
    "ru": Language(
        "Russian",
        ("ноль", "один", "два", "три", "четыре", "пять", "шесть", "семь", "восемь", "девять"),
        (
            "цифра {c}",
            "фотография цифры {c}",
            "цифра {c}, написанная от руки",
            "это цифра {c}",
            "на картинке показана цифра {c}",
            "скан рукописной цифры {c}",
        ),
    ),
}


def pairs(code: str) -> Iterator[Pair]:
    """All sentences of a language with their English originals: words with words, figures with figures."""
    language, english = LANGUAGES[code], LANGUAGES["en"]
    for digit in DIGITS:
        for phrase, original in zip(language.phrases, english.phrases, strict=True):
            for names, original_names in ((language.words, english.words), (language.numerals, english.numerals)):
                yield Pair(code, digit, phrase.format(c=names[digit]), original.format(c=original_names[digit]))


def captions(code: str, digit: int) -> list[str]:
    """A language's sentences about a digit, with its word and with its figure."""
    return [pair.text for pair in pairs(code) if pair.digit == digit]
