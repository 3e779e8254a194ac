import pickle

import pytest

from vlm.data.ledger import FatalDataError
from vlm.data.others import WithOthers
from vlm.errors import UserError


class Texts:
    name, fingerprint = "texts", "abc"

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 2:
            raise OSError(5, "Input/output error")
        if index > 2:
            raise UserError("damaged")
        return {"key": str(index), "text": "ab"[index]}


def test_examples_know_their_source_and_nothing_else_changes():
    source = pickle.loads(pickle.dumps(WithOthers(Texts())))
    assert (len(source), source.name, source.fingerprint) == (3, "texts", "abc")
    example = source[0]
    others = example.pop("others")
    assert example == {"key": "0", "text": "a"} and len(others) == 3 and others[1] == {"key": "1", "text": "b"}


def test_storage_that_fails_under_another_example_is_fatal():
    others = WithOthers(Texts())[1]["others"]
    with pytest.raises(FatalDataError, match="^texts: sample 2: .*Input/output error"):
        others[2]
    with pytest.raises(UserError, match="damaged") as error:
        others[3]
    assert not isinstance(error.value, FatalDataError)
