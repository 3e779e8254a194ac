"""The rules of Penn Treebank tokenisation as the Stanford tokenizer applies them: patterns and word lists.

At every place the rule that matches most characters wins, what has to follow included; of equally long ones the first.
A rule's token is its group `t` where it has one, otherwise all it matched. The kind says how the token is written.
The lists and character classes were measured from the tool's answers, not taken from its source.
"""

from __future__ import annotations

import re

# Abbreviations keep their period, in any case of letters. The first win over a single letter that follows ("Inc.x").
ENDINGS = """al ala apr ariz assn aug bhd bldg blvd bros calif co colo conn corp cos ct dak dec ed.d esq est etc ext feb
fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn ph.d plc
ppte ppty pte ptes pty ptys rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo"""
TITLES = """adj adm adv alex asst atty attys ave brig capt cf cie cmdr col cpl dept det dr drs elec ens ft gen gov govs
hon insp invt jos lieut lt m.b.a maj messrs mfg mlle mme mr mrs ms msgr mt mtg natl pfc ph pres prof pvt rep reps rev
sen sens sfc sgt spc st ste supt treas vs wm"""
# These, being words too, need a capital,
CAPITALISED = "ark az del ill la mass miss ore pa tex wash"
# and these a number behind them, which may be the one that the next line starts with.
NUMBERED = "art ca fig figs no nos op pp prop"

# An initial keeps its period unless one of these, with a capital, follows: then a sentence has ended.
STARTERS = """a about according additionally after an as at but earlier he her here however if in it last many more mr.
ms. now once one other our she since so some such that the their then there these they this we what when while yet
you"""

# Words written together that are two, and where they are cut: "gonna" is "gon na".
SPLIT = {"cannot": 3, "gonna": 3, "gotta": 3, "lemme": 3, "gimme": 3, "wanna": 3}

# Code points, hexadecimal: what counts as a letter inside words besides letters, and what is a token by itself.
_MARKS = """02c2-02c5 02d2-02df 02e5-02eb 02ed 02ef-036f 0375 0378-0379 0384-0385 03f6 0483-0487 055a-055f 0591-05bd
05bf 05c1-05c2 05c4-05c5 05c7 0615-061a 064b-065e 0670 06d6-06e4 06e7-06ed 06fd-06fe 070f 0711 0730-074c 07a6-07b0
07eb-07f3 0900-0903 093c 093e-094e 0951-0955 0962-0963 0981-0983 09bc 09be-09c4 09c7-09c8 09cb-09cd 09d7 09e2-09e3
0a01-0a03 0a3c 0a3e-0a4f 0a81-0a83 0abc 0abe-0acf 0b82 0bbe-0bc2 0bc6-0bc8 0bca-0bcd 0c01-0c03 0c3e-0c56 0d3e-0d44
0d46-0d48 0e31 0e34-0e3a 0e47-0e4e 0eb1 0eb4-0ebc 0ec8-0ecd"""
_SYMBOLS = """0024-0027 002a 002b 003b-003e 005c 005e 0060 007c 007e 00a1 00a5-00a9 00ac 00ae-00b4 00b6-00b9 00bf 00d7
00f7 037e 0387 0589 05be 05c0 05c3 05c6 05f3-05f4 0600-0603 0606-060c 0614 061b 061e-061f 066a 066d 06d4 0700-070d
07f6-07f8 0964-0965 0e3f 0e4f 1fbd 2016-2017 201a 201e-2023 2030-2038 203b 203e-2042 2070 2074-207e 2080-208e 20a4
2100-2101 2103-2106 2108-2109 2114 2116-2118 211e-2123 2125 2127 2129 212e 213a-213b 2140-2144 214a-214d 214f 2155-215e
2190-2bff 3001-3002 3012 30fb ff01-ff0f ff1a-ff20 ff3b-ff40 ff5b-ff65 ffe0-ffe1 ffe5-ffe6"""


def _inside(ranges: str) -> str:
    """The inside of a character class from ranges of hexadecimal code points."""
    return "".join("-".join(f"\\u{code}" for code in part.split("-")) for part in ranges.split())


def _letters() -> str:
    """The inside of the class of all letters of the basic plane; beyond it the tool knows no characters."""
    codes = [code for code in range(0x10000) if chr(code).isalpha()]
    starts = [code for before, code in zip([-2, *codes], codes, strict=False) if code != before + 1]
    ends = [code for code, after in zip(codes, [*codes[1:], -2], strict=True) if after != code + 1]
    return "".join(f"\\u{start:04x}-\\u{end:04x}" for start, end in zip(starts, ends, strict=True))


def _either(words: str) -> str:
    return "|".join(sorted(map(re.escape, words.split()), key=len, reverse=True))


_L = _letters()
_W = rf"{_L}{_inside(_MARKS)}\u00ad"  # letters inside words
_A = r"(?:['\u0092\u2019]|&apos;)"  # an apostrophe
_Q = r"(?:['\u0092\u2019`\u0091\u2018\u201b]|&apos;)"  # an apostrophe, or what people type for it
_AUX = rf"{_A}(?:[msdMSD]|[rR][eE]|[vV][eE]|[lL][lL])"
_NOT = rf"[nN]{_Q}[tT]"
_ACCENTED = "&[aeiouAEIOU](?:acute|grave|uml);"
_SYLLABLE = rf"(?:[{_W}]|{_ACCENTED})(?:[{_W}\d]|{_ACCENTED})*"
_WORD = rf"{_SYLLABLE}(?:[.!?]{_SYLLABLE})*"
_ALNUM = rf"(?:[dDoOlL]{_Q}[{_L}\d])?[{_L}\d]+"
_THING = rf"{_ALNUM}(?:[-_\u058a\u2010\u2011]{_ALNUM})*"
_HYPHENATED = r"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9\u00ad]+))+"
_JOINED = "[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"
_NUMBER = r"(?:\d*(?:[.:,\u00ad\u066b\u066c]\d+)+|\d+)"
_INITIALS = r"[A-Za-z](?:\.[A-Za-z])*"
_PART = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_GAP = r"[- \u00a0]"
_URL_END = r"[^\s\"<>|.!?(){},-]"
_PATH = rf"(?:/[^\s\"<>|()]+{_URL_END})?"
_NAME = r"[A-Za-z][A-Za-z0-9_:.-]*"
_VALUE = rf"(?:'[^'\n]*'|\"[^\"\n]*\"|{_NAME})"
_TAG = rf"<(?:[!?][A-Za-z-][^>\n]*|/?{_NAME}(?:[ ]+{_NAME}(?:[ ]*=[ ]*{_VALUE})?)*[ ]*/?)[ ]*>"
_EXTENSION = _either(
    """htm html jpg jpeg gif png bmp bat cgi class cpp doc docx dll exe gz java jar mov mp3 mp4 mpg pdf php pl ppt ps py
    sql tar txt wav wma wmv xml zip 3gp avi flv c h x"""
)
_CAPITALISED = "|".join(f"{word[0].upper()}(?i:{word[1:]})" for word in CAPITALISED.split())
_STARTERS = "|".join(rf"{re.escape(word.capitalize())}|{re.escape(word.upper())}" for word in STARTERS.split())

RULES: tuple[tuple[str, str], ...] = (
    ("word", _TAG),
    ("dash", r"&(?:MD|mdash|ndash);|[\u0096\u0097\u2013-\u2015]"),
    ("word", r"&amp;|&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#\d+);"),
    ("split", rf"(?i:{'|'.join(SPLIT)})"),
    ("word", rf"(?P<t>{_WORD}){_AUX}"),
    ("word", rf"(?P<t>[A-Za-z]*[A-MO-Za-mo-z]\u00ad*){_NOT}"),
    ("word", _WORD),
    ("raw", rf"{_A}[nN]{_A}?|[lLdDjJ]{_A}|Dunkin{_A}|somethin{_A}|ol{_A}|{_A}em|{_A}[2-9]0s|{_A}till?|{_A}cause"),
    ("raw", rf"[A-HJ-XZn]{_Q}[{_L}]{{2}}[{_L}]*|[{_L}]+[aeiouyAEIOUY]{_Q}[aeiouA-Z][{_L}]*"),
    ("word", r"cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|diff'rent"),
    ("word", rf"(?P<t>[yY]{_A})[{_L}]"),
    ("word", r"(?P<t>'[tT])(?i:is|was)"),
    ("raw", rf"https?://[^\s\"<>|(){{}}]+{_URL_END}"),
    ("raw", rf"www\.(?:[^\s\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}{_PATH}"),
    ("raw", rf"(?:[^\s\"`'<>|.!?(){{}},-_$]+\.)+(?:com|net|org|edu){_PATH}"),
    ("raw", r"(?:<|&lt;)?[a-zA-Z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+(?:>|&gt;)?"),
    ("word", rf"@[a-zA-Z_][a-zA-Z_0-9]*|#[{_L}]+"),
    ("word", rf"(?P<t>{_AUX}|{_NOT})[^A-Za-z]"),
    ("word", rf"\d{{1,2}}[-/]\d{{1,2}}[-/]\d{{2,4}}|[-+]?{_NUMBER}"),
    ("word", r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    ("word", rf"(?:\d{{1,4}}{_GAP})?\d{{1,4}}(?:\\?/|\u2044)\d{{1,4}}"),
    ("fraction", r"[\u00bc-\u00be\u2153\u2154]"),
    ("word", r"-(?:RRB|LRB|RCB|LCB|RSB|LSB)-|C\.D\.s|pro-|anti-|S(?:&|&amp;)P-500"),
    ("raw", rf"Cap{_A}n|c{_A}est"),
    ("word", rf"{_PART}(?:\\?/{_PART}){{1,2}}"),
    ("word", r"[A-Z]*\$|#"),
    ("currency", r"[\u00a2-\u00a4\u0080\u20a0\u20ac]"),
    ("word", rf"(?P<t>(?:(?i:{_either(ENDINGS)})|{_CAPITALISED})\.)(?:[\s\S]{{2}})?"),
    ("word", rf"(?:(?i:{_either(TITLES)})|{_INITIALS})\."),
    ("word", rf"(?P<t>(?i:{_either(NUMBERED)})\.)\s?\d"),
    ("word", rf"(?P<t>[A-Za-z])\.\s+(?:{_STARTERS}|{_TAG})\s"),
    ("word", rf"(?P<t>(?:{_WORD}|{_HYPHENATED}|{_JOINED})\.)[,;:\u3001]"),
    ("raw", rf"(?P<t>{_THING}\.)[,;:\u3001]"),
    ("raw", rf"(?P<t>{_A}\d\d)\s"),
    ("word", rf"(?P<t>[{_L}\d]+(?:\.[{_L}\d]+)*\.(?i:{_EXTENSION}))[\s.?!,]"),
    ("word", rf"\(\d{{2,3}}\)[ \u00a0]?\d{{3,4}}{_GAP}?\d{{3,5}}"),
    ("word", rf"(?:\+\+?)?(?:\d{{2,4}}{_GAP})?\d{{2,4}}{_GAP}\d{{3,4}}{_GAP}?\d{{3,5}}"),
    ("word", r"(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}"),
    ("drop", '"|&quot;'),
    ("word", "<<|>>|&lt;|&gt;"),
    ("smiley", r"(?P<t>[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]"),
    ("word", r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)"),
    ("word", r"[()\[\]{}]"),
    ("dash", "-{2,4}"),
    ("word", "-{5,}"),
    ("drop", r"-|\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[\u0085\u2026]"),
    ("word", r"@+|#+|_+|\*+|(?:\\\*){1,3}|[?!]+|[.,:=/]"),
    ("raw", _THING),
    ("word", _HYPHENATED),
    ("word", _JOINED),
    ("drop", rf"(?P<t>')[A-Za-z][^\s\u00a0]|{_A}|[`\u0091\u2018\u201b\u2039\u203a]"),
    ("word", rf"{_AUX}|{_NOT}"),
    ("quote", r"''|[`\u2018\u2019\u201b-\u201d\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{1,2}"),
    ("drop", "&nbsp;"),
    ("word", rf"[{_inside(_SYMBOLS)}]"),
)
