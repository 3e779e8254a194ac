"""Elements of JSON documents: what the standard parser finds, and where each stands."""

import json
import random

from vlm.data.json_scan import scan

WORDS = ["", "ü", "漢字", "a\\b", '"', "line\nend", "]", "}", ",", " "]


def value(rng, depth=3):
    kind = rng.randrange(7 if depth else 5)
    if kind == 5:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {rng.choice(WORDS) + str(i): value(rng, depth - 1) for i in range(rng.randrange(4))}
    return [None, True, rng.randrange(-9, 9), rng.random(), rng.choice(WORDS)][kind]


def test_random_documents_come_apart_as_the_standard_parser_reads_them():
    for seed in range(200):
        rng = random.Random(seed)
        lists = rng.random() < 0.5
        document = [value(rng) for _ in range(4)] if lists else {f"s{i}": value(rng) for i in range(4)}
        text = json.dumps(document, ensure_ascii=rng.random() < 0.3, indent=rng.choice([None, 1, "\t"]))
        data = ("\ufeff" * (seed % 2) + f" {text}\r\n").encode()
        found = {} if isinstance(document, dict) else []
        for element in scan(data, "x"):
            assert json.loads(data[element.start : element.stop]) == element.value
            if isinstance(found, list):
                found.append(element.value)
            elif element.number:
                found.setdefault(element.section, []).append(element.value)
                assert len(found[element.section]) == element.number
            else:
                found[element.section] = element.value
        expected = document if lists else {k: v for k, v in document.items() if v != []}
        assert found == expected
