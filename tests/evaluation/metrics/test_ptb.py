"""The caption tokenizer: what the official Java tool prints for the same lines."""

import gzip
import json
import time

import pytest

from vlm.evaluation.metrics.ptb import tokenize

# Each right side was printed by the Java tool, punctuation removed as the official evaluation does.
OFFICIAL = {
    "A man's dog can't sit.": "a man 's dog ca n't sit",
    "don't won't they'll we've I'm x's": "do n't wo n't they 'll we 've i 'm x 's",
    "can't've shan't dogs' 's": "ca n't 've sha n't dogs 's",
    "Mr. Smith vs. Dr. Jones etc. He left.": "mr. smith vs. dr. jones etc. he left",
    "the U.S. army. in the U.S.": "the u.s. army in the u.s.",
    "8th ave. and 22 3/4 st.": "8th ave. and 22\u00a03/4 st.",
    "a no. 5 bus, no. No": "a no. 5 bus no no",
    "approx., he. word.; word.:": "approx. he word. word.",
    "Inc.x Inc.xy Dr.x a.b.c e.g. Ph.D.s": "inc. x inc.xy dr.x a.b.c e.g. ph.d. s",
    "x D. The man": "x d the man",
    "x D. Smith": "x d. smith",
    "10am 10 a.m. 10a.m. 5:30pm 5:30 p.m.": "10am 10 a.m. 10a m. 5:30 pm 5:30 p.m.",
    "$5 US$5 £3 €4 5¢ 50% C$40": "$ 5 us$ 5 # 3 $ 4 5 cents 50 % c$ 40",
    "555-1234 (555) 123-4567 (555) 1.000,5": "555-1234 -lrb-555-rrb-\u00a0123-4567 -lrb- 555 -rrb- 1.000,5",
    "http://www.foo.com/b?x=1 me@foo.com @user #tag #1": "http://www.foo.com/b?x=1 me@foo.com @user #tag # 1",
    "London-underground.blogspot.com 3.gif a-b.gif": "london-underground blogspot.com 3.gif a-b gif",
    "... .... .. – — - -- ----- a--b": "----- a b",
    "'tis 'twas 'cause 'em 'n' 'til 'bout '90s 90's": "'t is 't was 'cause 'em 'n' 'til bout '90s 90 's",
    "rock'n'roll y'all o'clock O’Brien s'mores don’t": "rock 'n' roll y' all o'clock o’brien s'mores do n't",
    "gonna cannot Cannot wanna's cannotx": "gon na can not can not wanna 's cannotx",
    "(a) [b] {c} <d> < 5 > &amp; &lt; &nbsp; &#39;": "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- <d> < 5 > & < &#39;",
    "AT&T a&b m&m's :) :-( <3 ^_^ =)": "at&t a & b m & m 's :-rrb- :--lrb- < 3 ^_^ =-rrb-",
    "\"quoted\" 'quoted' “x” ‘x’ «x» `x`": "quoted quoted x x x x",
    "t-shirt/jeans w/ he/she 24/7 1/2in pre- -ish": "t-shirt/jeans w / he/she 24/7 1/2in pre ish",
    "x² 25°C ½ 1½ ©2010 foo™ ☺ a😀b": "x ² 25 ° c 1/2 1 1/2 © 2010 foo ™ ☺ a b",
    "café 日本語 привет naïve soft\u00adhyphen e\u0301a": "café 日本語 привет naïve softhyphen e\u0301a",
    "hello!!! what?! ?": "hello !!! what ?!",
    "": "",
    " . ": "",
    "A, plain line , of words .": "a plain line of words",
}


def test_prints_what_the_official_tool_prints():
    # One at a time: a caption may depend on the beginning of the next.
    assert {line: tokenize([line])[0] for line in OFFICIAL} == OFFICIAL


def test_a_last_abbreviation_depends_on_the_next_caption():
    assert tokenize(["the no.", "5 a", "the no.", "a 5"]) == ["the no.", "5 a", "the no", "a 5"]
    assert tokenize(["vitamin D.", "The x", "vitamin D.", "Blue"]) == ["vitamin d", "the x", "vitamin d.", "blue"]


def test_no_token_runs_from_one_caption_into_the_next():
    assert tokenize(["room 22", "3/4 cup", "call 555", "1234", "a <b", "c> d"]) == [
        *("room 22", "3/4 cup", "call 555", "1234", "a < b", "c > d")
    ]


def test_line_breaks_are_spaces():
    assert tokenize(["a\nb\r\nc\u2028d", "e"]) == ["a b c d", "e"]


@pytest.mark.parametrize("name", ["coco80_human", "nasty"])
def test_equals_the_official_tool_on_captions(shared_data, name):
    golden = json.loads(gzip.decompress((shared_data / "goldens" / f"caption_{name}.json.gz").read_bytes()))
    for kind in ("references", "hypotheses"):
        lines = [line for image in golden["ids"] for line in golden[kind][image]]
        expected = [line for image in golden["ids"] for line in golden[f"tokenized_{kind}"][image]]
        assert tokenize(lines) == expected


def test_thirty_thousand_captions_take_a_second_or_two():
    lines = [f"A man on bike number {i % 97} rides, near the U.S. flag, at 5:30pm." for i in range(3000)]
    plain = [f"A man on a bike rides near the flag {'x' * (i % 7)}." for i in range(27000)]
    start = time.process_time()
    tokenize([*lines, *plain])
    assert time.process_time() - start < 5
