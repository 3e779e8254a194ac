import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from vlm.data.tfds import TfdsSource
from vlm.data.tfds_writer import write_tfds
from vlm.errors import UserError


def picture(i):
    return b"\x89PNG\r\n\x1a\n" + bytes([i, 0, 0])  # never decoded; trailing zeros must survive


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    features = {
        "image": "image",
        "text": "text",
        "label": ("cat", "dog"),
        "captions": [
            tfds.features.FeaturesDict({"text": tfds.features.Text(), "id": np.int64, "crop": tfds.features.Image()})
        ],
        "frames": ["image"],
        "nested": "image",
        "box": tfds.features.BBoxFeature(),
    }
    examples = [
        {
            "image": picture(i),
            "text": f"é{i}",
            "label": i % 2,
            "captions": [{"text": f"c{j}", "id": j, "crop": picture(j)} for j in range(i % 3)],
            "frames": [picture(j) for j in range(i % 3)],
            "nested": picture(1),
            "box": tfds.features.BBox(0.0, 0.25, 0.5, 1.0),
        }
        for i in range(41)
    ]
    path = tmp_path_factory.mktemp("tfds")
    return write_tfds(str(path), "toy", {"train": examples, "test": examples[:3]}, features, num_shards=3), examples


@pytest.fixture
def copy(prepared, tmp_path):
    return pathlib.Path(shutil.copytree(prepared[0], tmp_path / "copy"))


def test_bytes_come_back_as_they_were_at_any_nesting(prepared):
    folder, examples = prepared
    source = TfdsSource(folder, "train")
    assert len(source) == 41
    for i in (0, 1, 2, 40):
        example = source[i]
        assert example["image"] == picture(i) and example["text"] == f"é{i}" and example["label"] == i % 2
        assert example["frames"] == examples[i]["frames"]
        assert example["captions"]["text"] == [c["text"] for c in examples[i]["captions"]]
        assert example["captions"]["crop"] == [c["crop"] for c in examples[i]["captions"]]
        assert list(example["captions"]["id"]) == [c["id"] for c in examples[i]["captions"]]
        assert np.allclose(example["box"], [0.0, 0.25, 0.5, 1.0])
    mapped = TfdsSource(folder, "test", fields={"image": "nested", "text": "captions/text"})
    assert mapped[2] == {"key": "test:2", "image": picture(1), "text": ["c0", "c1"]}


def test_parents_of_the_version_folder_are_taken_too(prepared):
    assert len(TfdsSource(str(pathlib.Path(prepared[0]).parents[1]), "test")) == 3


@pytest.mark.parametrize("cut", ["50%", "33%", "7", "40"])
def test_sub_splits_are_disjoint_and_complete(prepared, cut):
    parts = [TfdsSource(prepared[0], f"train[{part}]") for part in (f":{cut}", f"{cut}:")]
    texts = [part[i]["text"] for part in parts for i in range(len(part))]
    assert texts == [f"é{i}" for i in range(41)]
    assert len(TfdsSource(prepared[0], "train[5:10]+test")) == 8


def test_pickled_source_reads_the_same(prepared):
    source = TfdsSource(prepared[0], "train", fields={"text": "text"})
    data = pickle.dumps(source)
    assert len(data) < 20_000 and pickle.loads(data)[7] == source[7]
    with pytest.raises(IndexError):
        source[41]


def test_tensorflow_is_not_imported(prepared):
    code = f"import sys; from vlm.data.tfds import TfdsSource; TfdsSource({prepared[0]!r}, 'test')[0]"
    code += "; print([m for m in ('tensorflow', 'jax', 'flax', 'cv2') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def shard(folder, number=1):
    return folder / f"toy-train.array_record-{number:05d}-of-00003"


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_truncated_shard_is_named_with_counts(copy, keep):
    data = shard(copy).read_bytes()
    shard(copy).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(
        UserError, match="toy-train.array_record-00001-of-00003.*(expected 1[34] records, found 0|cannot open)"
    ):
        TfdsSource(str(copy), "train")
    assert len(TfdsSource(str(copy), "test")) == 3  # other splits are not concerned


def test_missing_empty_and_swapped_shards(copy):
    lengths = TfdsSource(str(copy), "train")._records.dataset_info.splits["train"].shard_lengths
    other = lengths.index(27 - lengths[1])
    shutil.copy(shard(copy, other), shard(copy, 1))
    with pytest.raises(
        UserError, match="00001-of-00003: truncated or garbled shard: expected \\d+ records, found \\d+"
    ):
        TfdsSource(str(copy), "train[:50%]")
    shard(copy).write_bytes(b"")
    with pytest.raises(UserError, match="00001-of-00003: empty shard"):
        TfdsSource(str(copy), "train")
    shard(copy).unlink()
    with pytest.raises(UserError, match="^missing shard: .*00001-of-00003"):
        TfdsSource(str(copy), "train")


def test_garbled_record_concerns_itself_only(copy):
    data = bytearray(shard(copy, 0).read_bytes())
    place = 66  # in the header of the first record's chunk
    data[place] ^= 1
    shard(copy, 0).write_bytes(data)
    source = TfdsSource(str(copy), "train")
    failed = []
    for i in range(41):
        try:
            source[i]
        except UserError as error:
            assert f"train record {i}: damaged record" in str(error)
            failed.append(i)
    assert len(failed) == 1


@pytest.mark.parametrize(
    "split, message",
    [
        ("trian", "no split 'trian'; did you mean 'train'"),
        ("train[50%", "cannot read split"),
        ("train[:0]", "is empty"),
    ],
)
def test_wrong_splits(prepared, split, message):
    with pytest.raises(UserError, match=message):
        TfdsSource(prepared[0], split)


def test_parquet_sub_splits_are_refused(tmp_path):
    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager):
            return {"train": ((i, {"text": str(i)}) for i in range(10))}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Toy(data_dir=str(tmp_path), file_format="parquet")
    builder.download_and_prepare()
    source = TfdsSource(os.fspath(builder.data_path), "train")
    assert sorted(int(source[i]["text"]) for i in range(10)) == list(range(10))
    for split in ("train[:50%]", "train[5:]", "train+train"):
        with pytest.raises(UserError, match="parquet files: sub-splits are ignored"):
            TfdsSource(os.fspath(builder.data_path), split)


def test_tfrecord_and_foreign_folders(tmp_path, copy, shared_data):
    with pytest.raises(UserError, match="file format 'tfrecord' needs TensorFlow"):
        TfdsSource(str(shared_data / "tfds/c4/en/3.0.1"), "train")
    with pytest.raises(UserError, match="no such folder"):
        TfdsSource(str(tmp_path / "nowhere"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no dataset_info.json"):
        TfdsSource(str(tmp_path / "bare"))
    text = (
        (copy / "features.json")
        .read_text()
        .replace("tensorflow_datasets.core.features.image_feature.Image", "evil.module.Image")
    )
    (copy / "features.json").write_text(text)
    with pytest.raises(UserError, match="feature of unknown class 'evil.module.Image'"):
        TfdsSource(str(copy))
    (copy / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the dataset's description"):
        TfdsSource(str(copy))


def test_shard_lengths_that_disagree(copy):
    info = json.loads((copy / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"][0] = "99"
    (copy / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="expected 99 records, found"):
        TfdsSource(str(copy), info["splits"][0]["name"])
