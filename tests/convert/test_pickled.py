"""No pickle executes anything, whatever it contains, and none exhausts memory or time."""

import collections
import contextlib
import os
import pickle
import pickletools
import struct
import sys
import time

import numpy as np
import pytest

from vlm.convert import pickled
from vlm.errors import UserError

PROTO = b"\x80\x04"


def load(data, **options):
    return pickled.load(memoryview(data), **options)[0]


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


@pytest.fixture
def canary(tmp_path):
    """A file that an executed payload would create; any import or process is an error as well."""
    path = tmp_path / "canary"
    events = []
    armed = [True]

    def audit(event, arguments):
        if armed[0] and event in ("import", "exec", "subprocess.Popen", "os.system", "pickle.find_class"):
            events.append((event, arguments[:1]))

    sys.addaudithook(audit)
    yield path
    armed[0] = False
    assert not path.exists()
    assert not [e for e in events if e[0] != "import" or e[1][0] in ("posix", "nt", "subprocess", "builtins")]


def payloads(path):
    """One pickle per instruction that can name, create, call or change an object."""
    command = f"touch {path}"
    reach = {
        "GLOBAL": b"cos\nsystem\n",
        "STACK_GLOBAL": short("os") + short("system") + b"\x93",
        "GLOBAL through torch": b"ctorch\nos.system\n",
        "GLOBAL dotted": short("torch._utils") + short("_rebuild_tensor.__globals__") + b"\x93",
        "builtins": b"cbuiltins\neval\n",
        "__builtin__": b"c__builtin__\nexec\n",
        "getattr": b"cbuiltins\ngetattr\n",
    }
    call = short(command) + b"\x85R."
    yield from ((f"REDUCE of {name}", PROTO + data + call) for name, data in reach.items())
    yield "INST", b"(S'" + command.encode() + b"'\nios\nsystem\n."
    yield "OBJ", PROTO + b"(cos\nsystem\n" + short(command) + b"o."
    yield "NEWOBJ", PROTO + b"cos\nsystem\n" + short(command) + b"\x85\x81."
    yield "NEWOBJ_EX", PROTO + b"cos\nsystem\n" + short(command) + b"\x85}\x92."
    for code, width in ((b"\x82", 1), (b"\x83", 2), (b"\x84", 4)):
        yield f"EXT{width}", PROTO + code + (7).to_bytes(width, "little") + call
    yield "PERSID", b"Pos.system\n."
    yield "BINPERSID", PROTO + short("os.system") + b"Q."
    yield "BUILD of a tuple", PROTO + b")}" + short("__class__") + short("x") + b"sb."
    yield "BUILD with slots", PROTO + b"ccollections\nOrderedDict\nN}\x86b."
    yield "BUILD of a storage class", PROTO + b"ctorch\nFloatStorage\n}" + short("size") + b"K\x01sb."
    yield "REDUCE of a string", PROTO + short("os.system") + call
    yield "REDUCE of a storage class", PROTO + b"ctorch\nFloatStorage\n" + call
    yield "REDUCE without a tuple", PROTO + b"ccollections\nOrderedDict\n]R."
    yield "NEXT_BUFFER", b"\x80\x05\x97."
    yield "typed tensor", PROTO + b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n)}tR."

    class Evil:
        def __reduce__(self):
            return os.system, (command,)

    for protocol in range(6):
        yield f"protocol {protocol}", pickle.dumps({"state_dict": Evil()}, protocol)


def test_nothing_is_executed(canary):
    for name, data in payloads(canary):
        with pytest.raises(UserError, match="refused|damaged") as error:
            load(data)
        assert "\n" not in str(error.value), name


def test_nothing_is_executed_where_objects_become_records(canary):
    """Every payload is refused, or what is left of it is data."""
    inert = 0
    for name, data in payloads(canary):
        try:
            value = load(data, objects=True)
        except UserError as error:
            assert "\n" not in str(error), name
            continue
        inert += 1
        assert plain(value), name
    assert inert >= 10


def plain(value):
    """Whether a value is made of nothing but data."""
    if isinstance(value, dict):
        return type(value) in (dict, pickled.Record) and all(map(plain, value)) and all(map(plain, value.values()))
    return value is None or type(value) in (str, int, float, bool, bytes, pickled._Name) or all(map(plain, value))


def test_objects_become_records_of_their_attributes():
    class Point:
        def __init__(self):
            self.x, self.label, self.inner = 3, "p", None

        def __setstate__(self, state):
            raise AssertionError("called")

    class Sized(dict):
        pass

    for cls in (Point, Sized):
        cls.__qualname__ = cls.__name__
        globals()[cls.__name__] = cls
    outer, sized = Point(), Sized(a=1)
    outer.inner, outer.sized, outer.names, sized.note = Point(), sized, {"b"}, "n"
    for protocol in (2, 3, 4, 5):
        data = pickle.dumps([outer, outer.inner, frozenset("c")], protocol)
        with pytest.raises(UserError, match=r"refused: a reference to .*Point"):
            load(data)
        first, second, third = load(data, objects=True)
        assert type(first) is pickled.Record and first["inner"] is second
        assert second == {"x": 3, "label": "p", "inner": None} and third == ["c"]
        assert first["sized"] == {"a": 1, "note": "n"} and first["names"] == ["b"]


def test_the_payloads_are_real(tmp_path):
    """The same pickles do run code in Python's own unpickler: the corpus is not a dummy."""
    path = tmp_path / "ran"
    for name, data in payloads(path):
        if name in ("REDUCE of GLOBAL", "INST", "OBJ", "protocol 2"):
            pickle.loads(data)
            assert path.exists(), name
            path.unlink()


def test_every_unknown_instruction_is_refused():
    known = pickled._CONSTANTS | set(pickled._VALUES) | set(pickled._INSTRUCTIONS)
    dangerous = {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
    assert not known & dangerous
    for opcode in pickletools.opcodes:
        if opcode.name not in known:
            with pytest.raises(UserError):
                load(PROTO + opcode.code.encode("latin-1") + b"0\n0\n" * 8 + b".")


def test_damaged_pickles_end_in_one_line():
    whole = pickle.dumps(collections.OrderedDict(a=[1, 2.5, "x", None, (True, b"b")], b={"c": 10**9}), 2)
    for end in range(len(whole)):
        with pytest.raises(UserError):
            load(whole[:end])
    rng = np.random.default_rng(0)
    for _ in range(1500):
        data = bytearray(whole)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            data[position] = rng.integers(256)
        with contextlib.suppress(UserError):
            load(bytes(data))


def test_bombs_are_bounded():
    def rss():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    bombs = {
        "memo index": PROTO + b"]r\xff\xff\xff\x7f.",  # the C unpickler would allocate 16 GB
        "string length": PROTO + b"\x8d" + struct.pack("<Q", 2**62) + b"x.",
        "bytes length": PROTO + b"B" + struct.pack("<I", 2**31) + b"x.",
        "dictionaries": PROTO + b"}" * 2_000_000 + b".",
        "endless line": PROTO + b"c" + b"a" * 10_000_000,
        "nested tuple as key": PROTO + b"})" + b"\x85" * 300_000 + b"Ns.",
        "long integer": PROTO + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",
    }
    for name, data in bombs.items():
        before, start = rss(), time.process_time()
        with contextlib.suppress(UserError):
            load(data)
        assert rss() - before < len(data) + 200e6, name
        assert time.process_time() - start < 5, name


def test_plain_containers_and_positions():
    value = {"a": [1, -2, 3.5, None, True], "b": ("x", b"y", 2**70), 3: {}}
    for protocol in (3, 4, 5):
        data = pickle.dumps(value, protocol)
        assert pickled.load(memoryview(b"junk" + data + b"rest"), 4) == (value, 4 + len(data))
    assert load(pickle.dumps(collections.OrderedDict([("k", 1)]), 2)) == {"k": 1}
