"""The golden ids: what the reference tools made of the same 3,231 lines."""

import gzip
import json

import pytest


@pytest.fixture(scope="session")
def goldens(shared_data):
    return json.loads(gzip.decompress((shared_data / "goldens/tokenizers.json.gz").read_bytes()))


@pytest.fixture(scope="session")
def models(shared_data):
    return shared_data / "tokenizers"


@pytest.fixture(scope="session")
def differences(goldens):
    """Function: the lines whose ids differ from the golden ids of that name."""

    def compare(tokenizer, name):
        lines = goldens["lines"]
        batch = tokenizer(lines)
        rows = [row[mask].tolist() for row, mask in zip(batch["tokens"], batch["mask"], strict=True)]
        assert len(rows) == len(lines) == 3231
        return [line for line, row, expected in zip(lines, rows, goldens["ids"][name], strict=True) if row != expected]

    return compare
