"""The page: everything escaped, nothing from outside, every script's direction and language marked."""

import html.parser

import numpy as np

from vlm.data.source import open_source
from vlm.evaluation.embed import Embedder
from vlm.evaluation.evaluator import Result, Sampling
from vlm.evaluation.page import _mixed, render
from vlm.evaluation.zero_shot import ZeroShot, ZeroShotConfig

EVIL = '<script>alert("x")</script>\'&\x00'


class Page(html.parser.HTMLParser):
    """Collects tags, sources and text, and that every element is closed."""

    VOID = {"meta", "img", "br"}

    def __init__(self, content):
        super().__init__()
        self.tags, self.sources, self.texts, self.languages, self.open = [], [], [], set(), []
        self.anchors = []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        self.anchors += ["#" + attributes["id"]] if "id" in attributes else []
        self.languages.add(attributes.get("lang"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def zero_shot(model, params, processor, data, names, **settings):
    config = ZeroShotConfig(data, classnames=names, bootstrap=Sampling(5), **settings)
    return ZeroShot.prepare(config, "config.eval.x")(Embedder(model, params, processor))


def test_names_are_escaped_and_marked(model, params, processor, colours):
    data, _ = colours(count=10, noise=150)
    names = ("red " + EVIL, "green", "أزرق blue", "yellow", "红")
    result = zero_shot(model, params, processor, data, names, language='zh"><b>')
    content = render({'n"<i>': result}, {"checkpoint": EVIL, "environment": {"git": None, "devices": {"cpu": 8}}})
    page = Page(content)
    assert not page.open and "script" not in page.tags and "i" not in page.tags
    pictures = [source for source in page.sources if source not in page.anchors]
    assert pictures and all(source.startswith("data:image/png;base64,") for source in pictures)
    assert page.anchors == ["#e0"] and "#e0" in page.sources
    text = "".join(page.texts)
    assert '<script>alert("x")</script>' in text and "أزرق" in text and "红" in text and "\x00" not in content
    assert 'zh"><b>' in page.languages and "8 × cpu" in text
    assert "default-src 'none'" in content
    assert '<bdi dir="auto"' in content


def test_classification_comes_first_and_the_summary_leads_to_every_section(model, params, processor, colours):
    data, _ = colours(count=10)
    result = zero_shot(model, params, processor, data, ("red", "green", "blue", "yellow", "white"))
    results = {"other": Result("embeddings", {"images": 1.0}, {}, 1, 0, {}), "second": result, "third": result}
    page = Page(render(results, {}))
    assert page.anchors == ["#e0", "#e1", "#e2"] == page.sources[:3]
    assert [text for text in page.texts if text in results] == ["second", "third", "other"] * 2


def test_wrong_answers_are_at_most_half():
    examples = [{"index": i, "correct": i % 3 == 0} for i in range(90)]
    chosen = _mixed(examples, 10)
    assert len(chosen) == 10 and sum(not example["correct"] for example in chosen) == 5
    assert len(_mixed(examples[:4], 10)) == 4
    assert len(_mixed([example for example in examples if example["correct"]], 10)) == 10
    assert len(_mixed([example for example in examples if not example["correct"]], 10)) == 10


def test_many_classes_become_a_list_of_pairs(colours):
    data, _ = colours(count=3)
    confusion = np.eye(40, dtype=int) * 5
    confusion[3, 7] = 9
    page = {
        "source": open_source(data), "names": [f"class{i}" for i in range(40)], "pictures": 0,
        "columns": list(range(40)),
        "recall": np.linspace(0, 1, 40), "count": confusion.sum(1), "confusion": confusion,
    }  # fmt: skip
    details = {"classes": 40, "chance": 1 / 40, "templates": 1}
    content = render({"many": Result("zero_shot", {"top1": 0.5}, {}, 3, 1, details, page=page)}, {})
    assert "Most confused" in content and "1 more could not be read" in content
    text = "".join(Page(content).texts)
    assert "class3class79" in text


def test_pictures_that_cannot_be_read_again(model, params, processor, colours, tmp_path):
    data, _ = colours(count=10)
    result = zero_shot(model, params, processor, data, ("red", "green", "blue", "yellow", "white"))
    for path in (tmp_path / "data").glob("*.png"):
        path.write_bytes(b"gone")
    assert "unreadable" in render({"x": result}, {})
