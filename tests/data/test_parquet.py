import concurrent.futures
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm.data.parquet import ParquetSource
from vlm.errors import UserError


def write(path, columns, row_group_size=3):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, write_page_checksum=True)
    return str(path)


def test_rows_across_groups_and_files(tmp_path):
    for name in range(2):
        texts = [f"{name}{i}" for i in range(7)]
        write(tmp_path / f"{name}.parquet", {"image": [t.encode() for t in texts], "TEXT": texts, "n": list(range(7))})
    source = ParquetSource(f"{tmp_path}/*.parquet", fields={"image": "image", "text": "TEXT"}, cache_bytes=1)
    source = pickle.loads(pickle.dumps(source))
    expected = [
        {"key": f"{n}.parquet:{i}", "image": f"{n}{i}".encode(), "text": f"{n}{i}"} for n in range(2) for i in range(7)
    ]
    assert [source[i] for i in range(14)] == expected
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: source[i * 5 % 14], range(280))) == [expected[i * 5 % 14] for i in range(280)]
    assert ParquetSource(f"{tmp_path}/*.parquet")[13]["n"] == 6


def test_image_columns_of_every_kind(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"A")
    path = write(
        tmp_path / "d.parquet",
        {
            "path": ["a.jpg"],
            "struct": [{"bytes": b"B", "path": "b.jpg"}],
            "only_path": [{"bytes": None, "path": "a.jpg"}],
            "many": [[b"1", b"2"]],
            "texts": [["x", None, "y"]],
        },
    )
    for column, expected in (("path", b"A"), ("struct", b"B"), ("only_path", b"A"), ("many", [b"1", b"2"])):
        assert ParquetSource(path, fields={"image": column, "text": "texts"})[0]["image"] == expected
    assert ParquetSource(path, fields={"text": "texts"})[0]["text"] == ["x", None, "y"]
    with pytest.raises(UserError, match="row 0: image has 1 bytes \\(limit 0\\)"):
        ParquetSource(path, fields={"image": "struct"}, max_bytes=0)[0]


def test_rows_that_img2dataset_could_not_fetch_are_left_out(tmp_path):
    columns = {"url": ["u"] * 4, "key": list("abcd"), "status": ["success", "failed_to_download", "success", "x"]}
    path = write(tmp_path / "d.parquet", columns)
    source = ParquetSource(path)
    assert [source[i]["key"] for i in range(len(source))] == ["a", "c"]
    assert len(ParquetSource(path, where={})) == 4
    assert len(ParquetSource(path, where={"status": "x"})) == 1
    with pytest.raises(UserError, match="where: no column 'statsu'; did you mean 'status'"):
        ParquetSource(path, where={"statsu": "x"})
    with pytest.raises(UserError, match="empty shard \\(4 rows, none with {'key': 'z'}\\)"):
        ParquetSource(path, where={"key": "z"})


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_files_stop_at_start(tmp_path, keep):
    path = write(tmp_path / "d.parquet", {"text": ["a" * 50] * 9})
    data = (tmp_path / "d.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match=f"^{path}: (empty shard|not a readable parquet file)"):
        ParquetSource(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    texts = [f"text number {i} {hash(i) % 977}" for i in range(60)]
    path = write(tmp_path / "d.parquet", {"text": texts}, row_group_size=20)
    data = bytearray((tmp_path / "d.parquet").read_bytes())
    data[60] ^= 4
    (tmp_path / "d.parquet").write_bytes(data)
    source = ParquetSource(path)
    with pytest.raises(UserError, match="damaged row group"):
        source[0]
    assert source[59]["text"] == texts[59]


def test_files_must_agree(tmp_path):
    write(tmp_path / "0.parquet", {"text": ["a"]})
    write(tmp_path / "1.parquet", {"txt": ["a"]})
    with pytest.raises(UserError, match="1.parquet: columns txt differ from text before"):
        ParquetSource(f"{tmp_path}/*.parquet")
    write(tmp_path / "0.parquet", {"text": pa.array([], pa.string())})
    with pytest.raises(UserError, match="0.parquet: empty shard \\(0 rows\\)"):
        ParquetSource(f"{tmp_path}/0.parquet")


def test_real_metadata(shared_data):
    source = ParquetSource(str(shared_data / "wds/img2dataset_test_1000.parquet"), fields={"text": "TEXT"})
    assert len(source) == 1000
    assert source[1]["text"] == "Tavern Brawl by velinov"
    with pytest.raises(UserError, match="row 0: field 'text' needs 'text', found URL, TEXT"):
        ParquetSource(str(shared_data / "wds/img2dataset_test_1000.parquet"), fields={"text": "text"})[0]
