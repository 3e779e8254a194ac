import itertools
import json
import os

import numpy as np
import pytest

from vlm.data.batch import LoaderSettings
from vlm.data.ledger import FatalDataError
from vlm.data.loader import Loader
from vlm.errors import UserError


class Numbers:
    """Sample i of source s is {"value": 1000 * s + i}; samples in `bad` cannot be decoded."""

    def __init__(self, number, length, bad=(), unread=()):
        self.name, self.fingerprint = f"numbers{number}", f"{number}:{length}"
        self._number, self._length, self._bad, self._unread = number, length, set(bad), set(unread)

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        if index in self._unread:
            raise UserError(f"record {index} is damaged")
        return {
            "key": f"k{index}",
            "image": b"%d" % index,
            "value": 1000 * self._number + index,
            "bad": index in self._bad,
        }


def transform(example, rng, train):
    if example["bad"]:
        raise OSError("image file is truncated")
    noise = rng.integers(0, 1 << 30, 2) if train else np.zeros(2, np.int64)
    return {"value": np.int64(example["value"]), "noise": noise}


SOURCES = (Numbers(0, 37, bad=[3, 30]), Numbers(1, 11, unread=[5]), Numbers(2, 5))
WEIGHTS = (0.6, 0.3, 0.1)
OF_LOADER = ("weights", "members", "shares", "train", "ledger", "transform")


def make(workers=0, host=0, hosts=1, batch_size=8, sources=SOURCES, **options):
    extra = {k: options.pop(k) for k in OF_LOADER if k in options}
    settings = LoaderSettings(
        batch_size,
        seed=5,
        num_workers=workers,
        host_index=host,
        host_count=hosts,
        **{"max_skip_fraction": 1.0, **options},
    )
    weights = extra.pop("weights", WEIGHTS if extra.get("train", True) and len(sources) == 3 else None)
    return Loader(sources, extra.pop("transform", transform), settings, weights=weights, **extra)


def take(loader, steps, start=0):
    with loader.iterate(start) as batches:
        return list(itertools.islice(batches, steps))


def join(parts):
    """Global batches from the hosts' parts."""
    return [{k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts, strict=True)]


def equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


REFERENCE_STEPS = 24


@pytest.fixture(scope="module")
def reference():
    return take(make(), REFERENCE_STEPS)


@pytest.mark.parametrize("workers", [0, 1, 2, 8])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_stream_does_not_depend_on_workers_or_hosts(reference, workers, hosts):
    parts = [take(make(workers, host, hosts, prefetch=1 + host), REFERENCE_STEPS) for host in range(hosts)]
    equal(join(parts), reference)


@pytest.mark.parametrize("workers, hosts", [(0, 1), (2, 4), (8, 2)])
def test_resume_at_any_step_continues_the_same_stream(reference, workers, hosts):
    for start in range(0, REFERENCE_STEPS, 1 if workers == 0 else 5):
        parts = [take(make(workers, host, hosts), 3, start) for host in range(hosts)]
        equal(join(parts)[: REFERENCE_STEPS - start], reference[start : start + 3])


def test_the_step_is_the_whole_state(reference):
    batches = make(2).iterate()
    taken = [next(batches) for _ in range(7)]
    batches.close()
    assert batches.step == 7
    equal(taken + take(make(8), 5, batches.step), reference[:12])


def test_changing_everything_at_every_restart(reference):
    """Workers 0 -> 4 -> 1 and hosts 1 -> 2 -> 4 between restarts leave the stream as it was."""
    found, start = [], 0
    for workers, hosts, steps in ((0, 1, 5), (4, 2, 4), (1, 4, 6), (3, 8, 2), (2, 1, 7)):
        found += join([take(make(workers, host, hosts), steps, start) for host in range(hosts)])
        start += steps
    equal(found, reference[:start])


def test_randomness_belongs_to_the_example(reference):
    """Same sample, other epoch: other numbers. Same (epoch, sample): the same, wherever it stands."""
    noise = {}
    for value, numbers in zip(
        np.concatenate([b["value"] for b in reference]), np.concatenate([b["noise"] for b in reference]), strict=True
    ):
        noise.setdefault(int(value), []).append(tuple(numbers))
    repeated = [numbers for numbers in noise.values() if len(numbers) > 3]
    assert repeated and all(len(set(numbers)) >= len(numbers) - 2 for numbers in repeated)
    flat = list(itertools.chain.from_iterable(set(numbers) for numbers in noise.values()))
    assert len(set(flat)) == len(flat)
    larger = take(make(batch_size=16), REFERENCE_STEPS // 2)  # the stream is by position, not by batch
    np.testing.assert_array_equal(
        np.concatenate([b["noise"] for b in larger]), np.concatenate([b["noise"] for b in reference])
    )


def test_ledger_lists_exactly_the_unreadable(tmp_path):
    loader = make(4, ledger=tmp_path)
    take(loader, 40)
    entries = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {(e["source"], e["sample"]) for e in entries} == {("numbers0", 3), ("numbers0", 30), ("numbers1", 5)}
    assert len(entries) == 3
    by_sample = {e["sample"]: e for e in entries}
    assert by_sample[3]["error"] == "image file is truncated" and by_sample[3]["key"] == "k3"
    assert by_sample[3]["sha256"] == "4e07408562bedb8b60ce05c1decfe3ad16b72230967de01f640b7e4729b49fce"  # of b"3"
    assert by_sample[5] | {"error": ""} == {"source": "numbers1", "sample": 5, "key": "", "error": "", "sha256": ""}
    take(make(2, ledger=tmp_path), 40, 10)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 3


def test_ledgers_of_all_hosts_together(tmp_path):
    for host in range(4):
        take(make(1, host, 4, ledger=tmp_path), 40)
    lines = [line for path in tmp_path.iterdir() for line in path.read_text().splitlines()]
    assert sorted((json.loads(line)["source"], json.loads(line)["sample"]) for line in lines) == [
        ("numbers0", 3), ("numbers0", 30), ("numbers1", 5)
    ]  # fmt: skip


def test_five_percent_of_five_thousand_corrupt_records(tmp_path):
    bad = set(np.random.default_rng(0).choice(5_000, 250, replace=False).tolist())
    loader = make(8, sources=(Numbers(0, 5_000, bad=bad),), batch_size=100, ledger=tmp_path)
    values = np.concatenate([b["value"] for b in take(loader, 50)])
    assert {entry.sample for entry in loader.ledger.entries} == bad
    assert not bad & set(values.tolist())
    # every readable sample is there; the replacements come on top
    assert set(values.tolist()) == set(range(5_000)) - bad and len(values) == 5_000


def test_too_many_unreadable_stops_at_the_same_step_for_any_workers():
    bad, stops = range(0, 400, 20), set()
    for workers in (0, 1, 8):
        loader = make(workers, sources=(Numbers(0, 400, bad=bad),), max_skip_fraction=0.01, skip_window=200)
        batches = loader.iterate()
        with pytest.raises(UserError, match=r"^3 of \d+ examples were unreadable, more than max_skip_fraction=0.01"):
            for _ in range(100):
                next(batches)
        # 0.01 * 200 allows two; the third stops, at a place that the stream alone decides
        stops.add((batches.step, batches.draws, batches.skipped))
    assert len(stops) == 1 and stops.pop()[2] == 3


def test_one_bad_record_among_the_first_is_no_reason_to_stop():
    loader = make(sources=(Numbers(0, 5000, bad=range(0, 5000, 2500)),), max_skip_fraction=0.001, batch_size=50)
    with loader.iterate() as batches:
        for _ in range(100):
            next(batches)
        assert batches.skipped == 2 and batches.draws == 5000
    with pytest.raises(UserError, match="^1 of"):
        take(make(sources=(Numbers(0, 10, bad=[4]),), max_skip_fraction=0.0), 3)


def test_nothing_readable_ends():
    with pytest.raises(UserError, match="numbers0: 100 replacements of sample .* unreadable too: record . is damaged"):
        take(make(2, sources=(Numbers(0, 3, unread=range(3)),)), 1)


@pytest.mark.parametrize("length, hosts", [(21, 1), (21, 2), (21, 4), (3, 4), (16, 2)])
def test_evaluation_reads_each_example_once_in_order(length, hosts):
    sources = (Numbers(0, length - 2), Numbers(1, 2))
    parts = []
    for host in range(hosts):
        loader = make(host % 3, host, hosts, sources=sources, train=False)
        assert loader.num_steps == -(-length // 8)
        parts.append(take(loader, 99))
        assert len(parts[-1]) == loader.num_steps  # every host makes every step
    batches = join(parts)
    valid = np.concatenate([b["valid"] for b in batches])
    index = np.concatenate([b["index"] for b in batches])
    assert index.dtype == np.int32 and valid.dtype == np.bool_
    assert index[valid].tolist() == list(range(length)) and (index[~valid] == -1).all()
    values = np.concatenate([b["value"] for b in batches])[valid]
    assert values.tolist() == [*range(length - 2), 1000, 1001]
    assert all(len(b["value"]) == 8 for b in batches)


def test_unreadable_evaluation_examples_are_marked_not_replaced():
    loader = make(2, sources=(Numbers(0, 10, bad=[0, 7]),), train=False, batch_size=4)
    with loader.iterate() as iterator:
        batches = list(iterator)
    assert iterator.skipped == 2  # padding rows that read sample 0 again do not count
    index = np.concatenate([b["index"] for b in batches])
    valid = np.concatenate([b["valid"] for b in batches])
    assert index.tolist() == [*range(10), -1, -1]
    assert np.flatnonzero(~valid).tolist() == [0, 7, 10, 11]
    assert sorted(entry.sample for entry in loader.ledger.entries) == [0, 7]


def test_a_failing_disk_is_not_an_unreadable_example():
    class Failing(Numbers):
        def __getitem__(self, index):
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        take(make(2, sources=(Failing(0, 9),)), 1)


def test_an_incomplete_target_cache_is_not_an_unreadable_example():
    def lacking(example, rng, train):
        raise FatalDataError("no embedding")

    loader = make(2, sources=(Numbers(0, 9),), transform=lacking)
    with pytest.raises(FatalDataError, match="no embedding"):
        take(loader, 1)
    assert not loader.ledger.entries


@pytest.mark.parametrize("workers", [0, 3])
def test_an_example_without_what_the_others_of_its_source_have_is_replaced(workers):
    def captioned(example, rng, train):
        row = transform(example, rng, train)
        return row if example["value"] in (4, 1007) else row | {"text": np.int64(1)}

    sources = [Numbers(0, 16, bad=[0]), Numbers(1, 8)]
    loader = make(workers, sources=sources, transform=captioned)
    batches = take(loader, 9)
    assert {name for batch in batches for name in batch} == {"noise", "text", "value"}
    skipped = {(entry.source, entry.key): entry.error for entry in loader.ledger.entries}
    assert set(skipped) == {("numbers0", "k0"), ("numbers0", "k4"), ("numbers1", "k7")}
    assert skipped["numbers1", "k7"] == "gives no text, unlike the first of its source"


def test_programming_errors_stop_with_the_example_named():
    def broken(example, rng, train):
        return {"value": example["absent"]}

    for workers in (0, 2):
        with pytest.raises(KeyError, match="absent") as caught:
            take(make(workers, sources=(Numbers(0, 9),), transform=broken), 1)
        assert any("while transforming 'k" in note and "of numbers0, sample" in note for note in caught.value.__notes__)


def test_fingerprint_follows_what_the_stream_depends_on():
    first = make().fingerprint
    assert make(8, 1, 4).fingerprint == first
    assert make(batch_size=16).fingerprint != first
    assert make(weights=(1, 1, 1)).fingerprint != first
    assert make(sources=SOURCES[:2], weights=(1, 1)).fingerprint != first


def test_evaluation_takes_no_weights():
    with pytest.raises(UserError, match="takes no weights"):
        make(train=False, weights=WEIGHTS)
    with pytest.raises(UserError, match="start_step"):
        make().iterate(-1)


def test_real_images_through_threads(shared_data):
    from PIL import Image

    from vlm.data.source import open_source

    spec = {"kind": "tar", "path": str(shared_data / "nlvr/nlvr_dev_perm0.tar"), "fields": {"image": "png"}}

    def decode(example, rng, train):
        import io

        return {"image": np.asarray(Image.open(io.BytesIO(example["image"])).convert("RGB").resize((8, 8)))}

    results = [take(make(w, sources=(open_source(spec),), transform=decode), 3) for w in (0, 4)]
    equal(*results)
    assert results[0][0]["image"].shape == (8, 8, 8, 3) and os.cpu_count()


def mixed(workers=0, host=0, hosts=1, **options):
    settings = {"members": ("few", "many", "many"), "shares": {"few": 1.0, "many": 2.0}, **options}
    return make(workers, host, hosts, weights=(1, 1, 1), **settings)


@pytest.fixture(scope="module")
def mixed_reference():
    return take(mixed(), REFERENCE_STEPS)


@pytest.mark.parametrize("workers, hosts", [(0, 1), (3, 1), (2, 2), (1, 4)])
def test_mixed_streams_do_not_depend_on_workers_hosts_or_restarts(mixed_reference, workers, hosts):
    for start in (0, 7, 13):
        parts = [take(mixed(workers, host, hosts), 5, start) for host in range(hosts)]
        equal(join(parts), mixed_reference[start : start + 5])
    streams = [set((batch["value"] >= 1000).tolist()) for batch in mixed_reference]
    assert all(len(found) == 1 for found in streams) and {True} in streams and {False} in streams


def test_streams_are_part_of_the_fingerprint():
    first = mixed().fingerprint
    assert mixed(2, 1, 2).fingerprint == first == mixed(shares={"many": 2, "few": 1}).fingerprint
    assert mixed(shares={"few": 2.0, "many": 1.0}).fingerprint != first
    assert mixed(members=("few", "few", "many")).fingerprint != first
    assert make(weights=(1, 1, 1)).fingerprint != first
