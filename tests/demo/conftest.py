"""The demonstration's data, prepared once."""

import pytest

from vlm.demo.prepare import prepare


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("demo") / "data")
