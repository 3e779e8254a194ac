import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm.checkpoint import fingerprint
from vlm.checkpoint.fingerprint import fingerprints, host_fingerprint


def device_digest(array):
    lanes = np.asarray(fingerprint._device_lanes(array))
    return fingerprint._fingerprint(lanes).digest


@pytest.mark.parametrize("spec", [P(), P("a"), P(None, "b"), P("b", "a"), P(None, None, ("a", "b"))])
def test_same_on_every_mesh(spec):
    array = jax.random.normal(jax.random.key(0), (8, 16, 24))
    expected = host_fingerprint(np.asarray(array))
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))
    assert device_digest(jax.device_put(array, NamedSharding(mesh, spec))) == expected.digest
    assert device_digest(array) == expected.digest
    assert expected.finite


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool", "float8_e4m3fn", "uint16"]
)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4, 5), (0, 4)])
def test_host_and_device_agree(dtype, shape):
    values = np.random.default_rng(0).integers(0, 100, shape)
    array = np.asarray(values).astype(getattr(ml_dtypes, dtype, dtype))
    assert device_digest(jnp.asarray(array)) == host_fingerprint(array).digest


def test_host_in_chunks(monkeypatch):
    array = np.random.default_rng(0).standard_normal((37, 11)).astype(np.float32)
    whole = host_fingerprint(array)
    monkeypatch.setattr(fingerprint, "_CHUNK", 20)
    assert host_fingerprint(array) == whole


def test_every_single_bit_counts():
    array = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)
    seen = {host_fingerprint(array).digest}
    for bit in range(array.nbytes * 8):
        flipped = array.copy()
        flipped.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << (bit % 8)
        lanes = fingerprint._host_lanes(flipped)
        assert lanes[0] != fingerprint._host_lanes(array)[0]  # the first lane alone is enough for one element
        seen.add(f"{lanes[0]:08x}{lanes[1]:08x}")
    assert len(seen) == array.nbytes * 8 + 1


def test_order_and_sign_of_zero_count():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    digests = {host_fingerprint(x).digest for x in (array, array[::-1], array[:, ::-1], array.T, array.reshape(4, 3))}
    assert len(digests) == 5
    assert host_fingerprint(np.float32([0.0])) != host_fingerprint(np.float32([-0.0]))


def test_exchanged_pairs_are_found():
    rng = np.random.default_rng(2)
    array = rng.standard_normal((64, 64)).astype(np.float32)
    expected = host_fingerprint(array).digest
    for _ in range(500):
        (i, j), flat = rng.choice(array.size, 2, replace=False), array.reshape(-1).copy()
        flat[i], flat[j] = flat[j], flat[i]
        assert host_fingerprint(flat.reshape(array.shape)).digest != expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("host_bytes", [0, 2**20])
def test_not_finite(monkeypatch, value, dtype, host_bytes):
    monkeypatch.setattr(fingerprint, "HOST_BYTES", host_bytes)
    array = np.zeros((4, 4), dtype)
    array[1, 2] = value
    prints = fingerprints({"good": jnp.ones(3), "bad": jnp.asarray(array), "integers": jnp.full(3, 0x7F800000)})
    assert {name: found.finite for name, found in prints.items()} == {"good": True, "bad": False, "integers": True}


def test_one_collective_at_a_time(monkeypatch):
    """Those of several arrays in flight on two hosts of CPUs have waited for each other for good."""
    events, lanes, wait = [], fingerprint._device_lanes, jax.block_until_ready
    monkeypatch.setattr(fingerprint, "HOST_BYTES", 0)
    monkeypatch.setattr(fingerprint, "_device_lanes", lambda leaf: (events.append("start"), lanes(leaf))[1])
    monkeypatch.setattr(jax, "block_until_ready", lambda value: (wait(value), events.append("end"))[0])
    fingerprint.fingerprints({name: jnp.arange(5) for name in "abc"})
    assert events == ["start", "end"] * 3
