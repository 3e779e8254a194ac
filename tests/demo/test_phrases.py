import unicodedata

import pytest

from vlm.demo.phrases import DIGITS, LANGUAGES, captions, pairs

SCRIPTS = {
    "en": {"LATIN"},
    "es": {"LATIN"},
    "fr": {"LATIN"},
    "ru": {"CYRILLIC"},
    "ar": {"ARABIC"},
    "hi": {"DEVANAGARI"},
    "zh": {"CJK"},
    "ja": {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"},
}


def test_the_languages_asked_for_are_there():
    assert {"en", "zh", "es", "ar"} <= set(LANGUAGES)


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_digit_has_its_own_sentences(code):
    language = LANGUAGES[code]
    assert len(set(language.words)) == len(set(language.numerals)) == len(DIGITS) == 10
    assert len(set(language.phrases)) == len(LANGUAGES["en"].phrases) >= 4
    assert all(phrase.count("{c}") == 1 and phrase.count("{") == 1 for phrase in language.phrases)
    sentences = [sentence for digit in DIGITS for sentence in captions(code, digit)]
    assert len(set(sentences)) == len(sentences) == 10 * 2 * len(language.phrases)


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_language_is_written_in_its_own_script(code):
    language = LANGUAGES[code]
    text = "".join((*language.words, *(phrase.replace("{c}", "") for phrase in language.phrases)))
    letters = {unicodedata.name(c).split()[0] for c in text if c.isalpha() or unicodedata.category(c) in ("Mn", "Mc")}
    assert letters and letters <= SCRIPTS[code]
    assert [int(numeral) for numeral in language.numerals] == list(DIGITS)


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_pair_is_about_one_digit_in_both_languages(code):
    language, english = LANGUAGES[code], LANGUAGES["en"]
    found = list(pairs(code))
    assert len(found) == 20 * len(language.phrases)
    for number, pair in enumerate(found):
        of_word, phrase = number % 2 == 0, number // 2 % len(language.phrases)
        names = (language.words, english.words) if of_word else (language.numerals, english.numerals)
        assert pair.text == language.phrases[phrase].replace("{c}", names[0][pair.digit])
        assert pair.english == english.phrases[phrase].replace("{c}", names[1][pair.digit])
        assert code != "en" or pair.text == pair.english
