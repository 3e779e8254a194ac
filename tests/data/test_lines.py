"""Lists of lines as XTD10, Multi30K, COCO-CN and Flickr30k-CN are published; names and texts here are made up."""

import pickle

import pytest

from vlm.data.lines import LinesSource
from vlm.data.source import open_source
from vlm.errors import UserError

COCO_CN = (
    "COCO_train2014_000000000005#0\t一只狗 在跑\n"
    "COCO_val2014_000000000007#0\t两只猫\u2028睡觉\n"
    "COCO_train2014_000000000009#0\t不在测试集\n"
    "COCO_train2014_000000000005#1\t狗#1, 很快 \n"
)
TRANSLATED = "COCO_val2014_000000000007#zhm#3 猫 ，在床上\nCOCO_train2014_000000000005#zhm#0  一只狗\n"
IDS = "COCO_val2014_000000000007\nCOCO_train2014_000000000005\n"
COMMA = 'image,caption\n36.jpg,一条警犬, "坐"\n37.jpg,a #1 dog\n36.jpg,警车前.jpg,狗\n'


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def texts_of(source, field="text"):
    return [(source[i]["key"], source[i][field]) for i in range(len(source))]


def without_images(path, **more):
    return open_source({"kind": "lines", "path": path, "fields": {"text": "text"}, **more})


def test_captions_are_grouped_by_image_in_the_order_of_the_ids(tmp_path):
    path, ids = write(tmp_path / "c.txt", COCO_CN), write(tmp_path / "test.txt", IDS)
    expected = [
        ("COCO_val2014_000000000007", ["两只猫\u2028睡觉"]),
        ("COCO_train2014_000000000005", ["一只狗 在跑", "狗#1, 很快"]),
    ]
    assert texts_of(without_images(path, ids=ids)) == expected
    third = ("COCO_train2014_000000000009", ["不在测试集"])
    assert texts_of(without_images(path)) == [expected[1], expected[0], third]
    translated = write(tmp_path / "t.txt", TRANSLATED)
    assert texts_of(without_images(translated, ids=ids)) == [
        ("COCO_val2014_000000000007", ["猫 ，在床上"]),
        ("COCO_train2014_000000000005", ["一只狗"]),
    ]


def test_commas_with_and_without_a_header(tmp_path):
    expected = [("36.jpg", ['一条警犬, "坐"', "警车前.jpg,狗"]), ("37.jpg", ["a #1 dog"])]
    for name, text in (("a", COMMA), ("b", COMMA.split("\n", 1)[1]), ("c", "\ufeff" + COMMA.replace("\n", "\r\n"))):
        assert texts_of(without_images(write(tmp_path / name, text))) == expected
    token = write(tmp_path / "results.token", "1.jpg#0\tTwo men, one dog .\n1.jpg#1\tTwo\n")
    assert texts_of(without_images(token)) == [("1.jpg", ["Two men, one dog .", "Two"])]


def test_line_i_is_of_image_i_in_every_language(tmp_path):
    """XTD10: some files have CRLF and no last line end. Multi30K: five files, the n-th captions of all images."""
    path = write(tmp_path / "names.txt", "b.jpg\na.jpg\nc.jpg\n")
    write(tmp_path / "es.txt", "gato, #1\r\nperro\r\nárbol")
    write(tmp_path / "zh.txt", "猫\n狗\n树\n\n")
    for number in (1, 2):
        write(tmp_path / f"de.{number}", "\n".join(f"{word} {number}" for word in ("Katze", "Hund", "Baum")))
    for name in "abc":
        write(tmp_path / f"{name}.jpg", name)
    texts = {"es": f"{tmp_path}/es.txt", "zh": f"{tmp_path}/zh.txt", "de": f"{tmp_path}/de.{{1..2}}"}
    source = open_source({"kind": "lines", "path": path, "texts": texts, "num_examples": 3})
    expected = {"key": "a.jpg", "name": "a.jpg", "image": b"a", "es": "perro", "zh": "狗", "de": ["Hund 1", "Hund 2"]}
    assert source[1] == expected
    assert texts_of(source, "es") == [("b.jpg", "gato, #1"), ("a.jpg", "perro"), ("c.jpg", "árbol")]
    ids = write(tmp_path / "ids", "c.jpg\nb.jpg")
    assert texts_of(LinesSource(path, texts=texts, ids=ids), "zh") == [("c.jpg", "树"), ("b.jpg", "猫")]


def test_images_lie_in_one_of_several_folders_and_never_outside(tmp_path):
    path = write(tmp_path / "lists/c.txt", COCO_CN + "../secret#0\tx\nabsent#0\tx\n")
    write(tmp_path / "coco/train2014/COCO_train2014_000000000005.jpg", "five")
    write(tmp_path / "coco/val2014/COCO_val2014_000000000007.jpg", "seven")
    for folder in (tmp_path, tmp_path / "lists", tmp_path / "coco"):
        write(folder / "secret.jpg", "secret")
    spec = {"path": path, "root": f"{tmp_path}/coco", "image": "train2014/{name}.jpg; val2014/{name}.jpg"}
    source = pickle.loads(pickle.dumps(open_source({"kind": "lines", **spec})))
    assert [source[i]["image"] for i in (0, 1)] == [b"five", b"seven"]
    with pytest.raises(UserError, match=r"c.txt: absent: image 'train2014/absent.jpg': no such .*; image 'val2014/abs"):
        source[4]
    with pytest.raises(UserError, match=r"'\.\./secret.jpg' leaves the data's folder"):
        LinesSource(path, image="{name}.jpg")[3]
    with pytest.raises(UserError, match=r"lies outside"):
        LinesSource(path, root=f"{tmp_path}/lists", image="{name}.jpg")[3]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            source[index]


def test_the_fingerprint_is_of_what_the_lists_say(tmp_path):
    path = write(tmp_path / "c.txt", COCO_CN)
    first = LinesSource(path)
    assert LinesSource(write(tmp_path / "elsewhere/d.txt", COCO_CN)).fingerprint == first.fingerprint
    others = [
        LinesSource(path, ids=write(tmp_path / "ids", IDS)),
        LinesSource(write(tmp_path / "same_size.txt", COCO_CN.replace("狗", "猫"))),
        LinesSource(path, fields={"text": "text"}),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize(
    "content, message",
    [
        ("a#0\tx\na 1\n", r"line 2: expected 'name#0 caption' or 'name.jpg,caption', found 'a 1' \(names alone need"),
        ("a.jpg\nb.jpg\n", r"line 1: expected 'name#0 caption' .* found 'a.jpg' \(names alone need `texts`\)"),
        ("a#0\tx\n\na#1\t \n", "line 3: expected .* found 'a#1'"),
        ("a.jpg,x\nimage,caption\n", "line 2: expected .* found 'image,caption'"),
        ("image,caption\n", r"no caption \(only a header\)"),
        (b"a#0\tx\nb#0\t\xff\n", r"line 2: not UTF-8 \(invalid start byte at byte 4\)"),
        ("", r"empty shard \(0 bytes\)"),
        ("\n \n", "empty shard"),
        (b"\x1f\x8b\x08", "gzip-compressed"),
    ],
)
def test_wrong_captions(tmp_path, content, message):
    path = write(tmp_path / "c.txt", content)
    with pytest.raises(UserError, match=f"^{path}: {message}") as caught:
        LinesSource(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names, captions, message",
    [
        ("a\nb\n", "x\n", "en.txt: expected 2 lines as in .*names.txt, found 1$"),
        ("a\nb\n", "x\ny\nz\n", "en.txt: expected 2 lines as in .*names.txt, found 3$"),
        ("a\nb\n", "x\n\ny\n", "en.txt: line 2: expected text, found a blank line"),
        ("a\nb\n", "x\n      \n", "en.txt: expected 2 lines as in .*names.txt, found 1$"),
        ("a\nb\nb\n", "x\ny\nz\n", "names.txt: line 3: 'b' is listed twice"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, names, captions, message):
    texts = {"en": write(tmp_path / "en.txt", captions)}
    with pytest.raises(UserError, match=message):
        LinesSource(write(tmp_path / "names.txt", names), texts=texts)


def test_wrong_ids_and_settings(tmp_path, monkeypatch):
    path, names = write(tmp_path / "c.txt", COCO_CN), write(tmp_path / "names.txt", "a\nb\n")
    other = write(tmp_path / "ids.txt", IDS + "COCO_val2014_000000000008\nx\n")
    for more, message in (
        ({"ids": other}, "ids.txt: 2 of 4 names are not in lines:.*c.txt, the first is 'COCO_val2014_000000000008'"),
        ({"ids": write(tmp_path / "twice.txt", IDS + IDS)}, "twice.txt: line 3: 'COCO_val2014_.*' is listed twice"),
        ({"ids": f"{tmp_path}/absent.txt"}, "missing shard: .*absent.txt"),
        ({"image": "val2014/x.jpg"}, "image: expected paths with {name}, .* found 'val2014/x.jpg'"),
        ({"root": f"{tmp_path}/absent"}, "root: no such folder"),
        ({"texts": {}}, "texts: expected fields other than key, name and image, found none"),
        ({"texts": {"image": names}}, "texts: expected fields .* found image"),
        ({"texts": {"en": 3}}, "texts: expected a file or files for 'en', found 3"),
        ({"texts": {"en": f"{tmp_path}/fr.txt"}}, "missing shard: .*fr.txt"),
        ({"texts": {"en": names}, "path": [path, names]}, "with `texts`, `path` is one file of names, found 2"),
        ({"fields": {"text": "en"}}, "field 'text' needs 'en', found"),
    ):
        with pytest.raises(UserError, match=message):
            open_source({"kind": "lines", "path": path, **more})
    monkeypatch.setattr("vlm.data.lines._MAX_BYTES", 100)
    with pytest.raises(UserError, match=r"c.txt: \d+ bytes \(limit 100; make it a jsonl source\)"):
        LinesSource(path)


def real(shared_data, name):
    """The published files, as cloned or unpacked into the folder of sample files; their licences forbid copies here."""
    folder = shared_data / name
    if not folder.is_dir():
        pytest.skip(f"published files not found at {folder}")
    return folder


def test_published_xtd10(shared_data):
    folder = real(shared_data, "xtd10")
    places = {"en": "XTD10", "zh": "XTD10", "es": "XTD10", "ko": "XTD10", "fr": "MIC", "de": "MIC", "jp": "STAIR"}
    texts = {code: f"{folder}/{place}/test_1kcaptions_{code}.txt" for code, place in places.items()}
    fields = {code: code for code in texts}
    source = LinesSource(f"{folder}/XTD10/test_image_names.txt", texts=texts, fields=fields)
    first, last = source[0], source[999]
    assert len(source) == 1000 and first["key"] == "COCO_train2014_000000061844.jpg"
    assert first["en"].startswith("major league baseball game") and first["zh"].startswith("棒球大联盟联赛上")
    assert last["en"].endswith("umpire look on") and last["es"].endswith("rbitro miran")


def test_published_coco_cn(shared_data):
    folder = real(shared_data, "coco-cn-version1805v1.1")
    for captions, count in (("human-written", 1053), ("manually-translated", 5000)):
        source = without_images(f"{folder}/imageid.{captions}-caption.txt", ids=f"{folder}/coco-cn_test.txt")
        assert len(source) == 1000 and sum(len(texts) for _, texts in texts_of(source)) == count


def test_published_flickr30k_cn(shared_data):
    source = without_images(f"{real(shared_data, 'flickr30k_cn')}/flickr30k_test_CNA.txt")
    assert len(source) == 1000 and {len(texts) for _, texts in texts_of(source)} == {5}
