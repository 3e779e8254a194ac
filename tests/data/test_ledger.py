import hashlib
import json

import pytest

from vlm.data.ledger import Skip, SkipLedger, digest
from vlm.errors import UserError

SKIP = Skip("a", 3, "k", "broken", "00")


def test_written_once_also_after_a_restart(tmp_path):
    ledger = SkipLedger(tmp_path)
    assert ledger.add(SKIP) and not ledger.add(SKIP)
    assert ledger.add(Skip("a", 4, "k", "broken", "00"))
    again = SkipLedger(tmp_path)
    assert not again.add(SKIP)
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [3, 4]
    assert json.loads(lines[0]) == {"source": "a", "sample": 3, "key": "k", "error": "broken", "sha256": "00"}


def test_hosts_write_their_own_files_and_know_each_other(tmp_path):
    assert SkipLedger(tmp_path, host_index=2).add(SKIP)
    assert (tmp_path / "skipped-2.jsonl").exists()
    assert not SkipLedger(tmp_path).add(SKIP)


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    SkipLedger(tmp_path).add(SKIP)
    with open(tmp_path / "skipped.jsonl", "a") as file:
        file.write('{"source": "a", "sam')
    ledger = SkipLedger(tmp_path)
    assert ledger.entries == [SKIP]
    ledger.add(Skip("b", 0, "", "x", ""))
    assert len(SkipLedger(tmp_path).entries) == 2


def test_foreign_content_is_refused(tmp_path):
    (tmp_path / "skipped.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="not a skip ledger"):
        SkipLedger(tmp_path)


def test_digest_is_of_the_image_bytes():
    assert digest({"image": b"abc", "text": "t"}) == hashlib.sha256(b"abc").hexdigest()
    assert digest({"text": "t"}) == hashlib.sha256(b"t").hexdigest()
    assert digest({"text": "half a pair \ud83d"}) == hashlib.sha256(b"half a pair \xed\xa0\xbd").hexdigest()
    assert digest(None) == ""
