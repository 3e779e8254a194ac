"""Caption metrics: the official tool's numbers, and plain re-computations of the definitions."""

import collections
import gzip
import json
import math

import numpy as np
import pytest

from vlm.errors import UserError
from vlm.evaluation.metrics import captions, java
from vlm.evaluation.metrics.bleu import bleu
from vlm.evaluation.metrics.cider import cider
from vlm.evaluation.metrics.rouge import common_subsequence, rouge_l


@pytest.fixture(scope="module")
def corpus():
    """Forty images with one to five references of few words, so that n-grams repeat; one caption is empty."""
    rng = np.random.default_rng(0)

    def sentence():
        return " ".join(rng.choice(list("abc"), rng.integers(1, 9)))

    hypotheses = [sentence() for _ in range(40)]
    hypotheses[3] = ""
    return hypotheses, [[sentence() for _ in range(rng.integers(1, 6))] for _ in range(40)]


def grams(sentence, n):
    words = sentence.split()
    return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def test_bleu_is_the_definition(corpus):
    hypotheses, references = corpus
    total, each = bleu(hypotheses, references)
    length = sum(len(text.split()) for text in hypotheses)
    closest = sum(
        min((abs(len(r.split()) - len(h.split())), len(r.split())) for r in row)[1]
        for h, row in zip(hypotheses, references, strict=True)
    )
    product = 1.0
    for n in range(1, 5):
        hits = guesses = 0
        for h, row in zip(hypotheses, references, strict=True):
            allowed = collections.Counter()
            for r in row:
                allowed |= grams(r, n)
            hits += (grams(h, n) & allowed).total()
            guesses += grams(h, n).total()
        product *= hits / guesses
        assert total[n - 1] == pytest.approx(product ** (1 / n) * min(1, math.exp(1 - closest / length)), rel=1e-6)
    assert each.shape == (4, 40) and each[0, 3] < 1e-6
    exact, _ = bleu(["a b c d e", "a b c d"], [["x", "a b c d e"], ["a b c d"]])
    np.testing.assert_allclose(exact, 1, rtol=1e-6)


def test_bleu_prefers_the_shorter_of_two_equally_close_references():
    _, each = bleu(["a b c"], [["a b c d", "a b"]])
    assert each[0, 0] == pytest.approx(1.0)  # not exp(1 - 4/3)


def test_rouge_is_the_definition(corpus):
    def longest(a, b):
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        return table[-1][-1]

    hypotheses, references = corpus
    scores = rouge_l(hypotheses, references)
    for score, h, row in zip(scores, hypotheses, references, strict=True):
        common = [longest(h.split(" "), r.split(" ")) for r in row]
        assert common == [common_subsequence(h.split(" "), r.split(" ")) for r in row]
        precision = max(common) / len(h.split(" "))
        recall = max(c / len(r.split(" ")) for c, r in zip(common, row, strict=True))
        expected = 2.44 * precision * recall / (recall + 1.44 * precision) if precision and recall else 0
        assert score == pytest.approx(expected, abs=1e-12)


def test_cider_is_the_definition(corpus):
    hypotheses, references = corpus
    documents = collections.Counter()
    for row in references:
        documents.update({gram for r in row for n in range(1, 5) for gram in grams(r, n)})

    def vector(sentence, n):
        return {g: c * (math.log(40) - math.log(max(1, documents[g]))) for g, c in grams(sentence, n).items()}

    for score, h, row in zip(cider(hypotheses, references), hypotheses, references, strict=True):
        total = 0.0
        for r in row:
            apart = (max(len(h.split()) - 1, 0) - max(len(r.split()) - 1, 0)) ** 2
            for n in range(1, 5):
                mine, theirs = vector(h, n), vector(r, n)
                dot = sum(min(value, theirs.get(g, 0)) * theirs.get(g, 0) for g, value in mine.items())
                norms = math.hypot(*mine.values()) * math.hypot(*theirs.values())
                total += (dot / norms if norms else 0) * math.exp(-apart / 72)
        assert score == pytest.approx(10 * total / 4 / len(row), abs=1e-12)


@pytest.mark.parametrize("name", ["coco80_human", "nasty"])
def test_equals_the_official_tool(shared_data, name):
    golden = json.loads(gzip.decompress((shared_data / "goldens" / f"caption_{name}.json.gz").read_bytes()))
    found = captions.score({image: golden["hypotheses"][image][0] for image in golden["ids"]}, golden["references"])
    assert found.ids == tuple(golden["ids"])
    for theirs, value in golden["scores"].items():
        ours = theirs.lower()
        if ours != "meteor":
            assert abs(found.metrics[ours] - value) <= 1e-9
            np.testing.assert_allclose(found.per_image[ours], golden["per_image"][theirs], atol=1e-9)
    assert set(found.metrics) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}


def test_equals_the_official_cider_with_48_references(shared_data):
    golden = json.loads(gzip.decompress((shared_data / "goldens" / "caption_cider_abstract48S.json.gz").read_bytes()))
    folder = shared_data / "captions" / "cider_abstract"
    references = collections.defaultdict(list)
    for row in json.loads((folder / "abstract48S.json").read_bytes()):
        references[row["image_id"]].append(row["caption"])
    for name, expected in golden.items():
        rows = json.loads((folder / f"abstract_cands{name}.json").read_bytes())
        hypotheses = {row["image_id"]: row["caption"] for row in rows}  # the second of each image's two
        wanted = {image: hypotheses[image] for image in expected["per_image"]}
        found = captions.score(wanted, references, ["cider"])
        assert len(found.ids) == expected["n"]
        assert abs(found.metrics["cider"] - expected["CIDEr(pycocoevalcap,=CIDEr-D style)"]) <= 1e-6
        each = dict(zip(found.ids, found.per_image["cider"], strict=True))
        assert max(abs(each[image] - value) for image, value in expected["per_image"].items()) <= 1e-6


def test_domains_are_scored_by_themselves():
    references = {
        i: [f"a {w} on a {v}", f"one {w} near {v}"] for i, (w, v) in enumerate(zip("pqrstu", "vwxyzw", strict=True))
    }
    texts = {i: f"a {w} on a tree" for i, w in enumerate("pqrxyz")}
    domains = dict(enumerate(["in-domain", "in-domain", "near-domain", "near-domain", "out-domain", "out-domain"]))
    found = captions.score_domains(texts, references, domains)
    assert list(found) == ["in", "near", "out", "overall"]
    alone = captions.score({i: texts[i] for i in (2, 3)}, references)
    assert found["near"].metrics == alone.metrics and found["near"].ids == (2, 3)
    assert found["overall"].metrics == captions.score(texts, references).metrics
    assert found["in"].metrics["bleu_1"] > found["out"].metrics["bleu_1"]


def test_wrong_input_is_named():
    with pytest.raises(UserError, match="did you mean 'cider'"):
        captions.score({1: "a"}, {1: ["a"]}, ["cidre"])
    with pytest.raises(UserError, match="1 images have no reference caption, the first is 2"):
        captions.score({1: "a", 2: "b"}, {1: ["a"], 2: []})
    with pytest.raises(UserError, match="nothing to score"):
        captions.score({}, {1: ["a"]})


def test_meteor_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(java.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="meteor needs Java"):
        captions.score({1: "a"}, {1: ["a"]}, ["meteor"])
    monkeypatch.setattr(java.shutil, "which", lambda _: "/bin/java")
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'vlm\[captions\]'"):
        captions.score({1: "a"}, {1: ["a"]}, ["spice"])
