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


@pytest.fixture(scope="session")
def randomise():
    """Gives every parameter of a PyTorch model a random value, norms, biases and gates included: zeros hide bugs."""

    def apply(model, seed: int = 0, scale: float = 0.1):
        import torch

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator) * scale
                is_norm = parameter.ndim == 1 and name.endswith("weight")
                parameter.copy_(noise + 1 if is_norm else noise + 2.6592 if name == "logit_scale" else noise)
        return model.eval()

    return apply


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> pathlib.Path:
    """The demonstration's data, prepared once: digits, parallel sentences, tokenizers, prompts."""
    from vlm.demo.prepare import prepare

    return prepare(tmp_path_factory.mktemp("demo") / "data")
