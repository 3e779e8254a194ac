"""Shared fixtures. Real sample files are found through `VLM_TEST_DATA` or `../shared/data`."""

import os
import pathlib

import pytest

# Before jax is imported anywhere: eight host devices for sharding tests, no accelerator probing.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of real sample files; skips the test, naming the folder, where it is absent."""
    default = pathlib.Path(__file__).parents[2] / "shared" / "data"
    path = pathlib.Path(os.environ.get("VLM_TEST_DATA", default))
    if not (path / "MANIFEST.csv").exists():
        pytest.skip(f"sample files not found at {path} (set VLM_TEST_DATA)")
    return path
