"""Shared fixtures. Real sample files are found through `VLM_TEST_DATA` or `../shared/data`."""

import gc
import os
import pathlib
import sys
import types
from importlib import metadata

import beartype
import pytest
from jaxtyping import install_import_hook

# Before jax is imported anywhere: eight host devices for sharding tests, no accelerator probing.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs here are compiled once and run on a few numbers: what compiles fastest, a fifth of the usual time, is best.
COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if metadata.version("jaxlib").startswith("0.10."):  # later versions end the process at a flag that they have dropped
    COMPILE += " --xla_cpu_use_fusion_emitters=false"  # half of the time
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILE} --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # a broadcast over a new axis is written down or is a mistake

# Annotated shapes are checked at run time, in every module that has any: before the first of them is imported.
_ROOT = pathlib.Path(__file__).parents[1]
_CHECKED = [
    ".".join(path.relative_to(_ROOT).with_suffix("").parts)
    for path in sorted(_ROOT.glob("vlm/**/*.py"))
    if "from jaxtyping import" in path.read_text(encoding="utf-8")
]


def _checked(function):
    """Constructors are left out: a pytree's fields hold shapes, shardings or NumPy arrays as jax passes it around."""
    if function.__qualname__.endswith("__init__"):
        return function
    return beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))(function)


sys.modules["vlm_shape_check"] = types.ModuleType("vlm_shape_check")  # the hook finds its checker by name
sys.modules["vlm_shape_check"].checked = _checked
install_import_hook(_CHECKED, "vlm_shape_check.checked")


LONGEST = (  # files, by their seconds
    "models/flava/test_loss.py",
    "models/blip/test_loss.py",
    "demo/test_main.py",
    "demo/test_flava.py",
    "test_train.py",
    "wrong_inputs/test_wrong_inputs.py",
    "models/blip/test_writing.py",
    "generation/test_generate.py",
    "test_precompute.py",
    "models/blip/test_model.py",
    "models/altclip/test_model.py",
    "models/flava/test_model.py",
    "faults/test_kills.py",
    "tasks/test_tasks.py",
    "test_experiment.py",
    "evaluation/test_hosts_blip.py",
    "test_hosts.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no worker is left alone with one of them at the end."""
    place = {_ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Modules stay: the garbage collector need not look through them again and again."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of real sample files; skips the test, naming the folder, where it is absent."""
    default = pathlib.Path(__file__).parents[2] / "shared" / "data"
    path = pathlib.Path(os.environ.get("VLM_TEST_DATA", default))
    if not (path / "MANIFEST.csv").exists():
        pytest.skip(f"sample files not found at {path} (set VLM_TEST_DATA)")
    return path


@pytest.fixture(autouse=True, scope="module")
def _published_families():
    """A test's configuration may add a family of its own; the next module must not see it."""
    yield
    if models := sys.modules.get("vlm.models"):
        models.FAMILIES.pop("toy", None)


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


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory):
    """The demonstration's two-digit scenes, a few of them."""
    from vlm.demo import scenes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SCENES", {"train": 4, "test": 22})
        return scenes.prepare_scenes(tmp_path_factory.mktemp("scenes") / "scenes")


@pytest.fixture(scope="session")
def tiny_blip(scenes_folder):
    """By task, and with other settings of the model: a random BLIP (module, parameters, processor)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vlm.demo import scenes
    from vlm.encoders.vit import ViTConfig
    from vlm.fusion.med import MedConfig
    from vlm.models.blip.config import BLIPConfig
    from vlm.models.blip.model import BLIP
    from vlm.models.blip.processor import Processor, ProcessorConfig
    from vlm.sharding import unbox
    from vlm.strict import build
    from vlm.tree import flatten, unflatten

    words = len(scenes.vocabulary())
    vit = ViTConfig(8, 1, 2, 12, 24, 8, "gelu", patch_bias=True, input_norm=False, output_norm="all", init="normal")
    stack = MedConfig(words + 2, 8, 1, 2, 12, 24, 8)
    alone = {"shared_decoder": False, "projection_dim": None, "itm": False, "temperature": None}
    parts = {
        "caption": {**alone, "text": None, "decoder": stack},
        "vqa": {**alone, "text": stack, "decoder": stack},
        "retrieval": {"shared_decoder": False, "text": stack, "projection_dim": 6},
        "nlvr": {**alone, "text": stack, "num_labels": 2, "num_images": 2},
        "classification": {**alone, "text": stack, "itm": True},
    }
    ids = {"bos_id": words, "enc_id": words + 1, "cls_id": 2, "sep_id": 3}
    made = {}

    def make(task, **settings):
        name = task, *sorted(settings.items())
        if name not in made:
            model = BLIP(BLIPConfig(vision=vit, **parts[task], **ids, **settings))
            size = (1, 2, 24, 24, 3) if task == "nlvr" else (1, 24, 24, 3)
            batch = np.zeros(size, np.float32), np.zeros((1, 2), np.int32)
            shapes = jax.eval_shape(lambda key: model.init(key, *batch)["params"], jax.random.key(0))
            rng = np.random.default_rng(1)
            flat = flatten(unbox(shapes))
            params = unflatten({path: jnp.asarray(_random(path, x.shape, rng)) for path, x in flat.items()})
            image = {"size": 24, "crop": None, "mode": "exact"}
            config = {"task": task, "image": image, "max_length": 20, "tokenizer": str(scenes_folder / "tokenizer")}
            made[name] = model, params, Processor.from_config(build(ProcessorConfig, config, "processor"))
        return made[name]

    return make


@pytest.fixture(scope="session")
def tiny_flava(scenes_folder):
    """By its classifier's input and outputs (None: without one): a random FLAVA (module, parameters, processor)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vlm.demo import scenes
    from vlm.models import get_family
    from vlm.sharding import unbox
    from vlm.strict import build
    from vlm.tree import flatten, unflatten

    family, made = get_family("flava"), {}
    width = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 12}
    parts = {
        "vision": {**width, "image_size": 24, "patch_size": 8},
        "text": {**width, "vocab_size": len(scenes.vocabulary()), "max_length": 24},
        "fusion": width,
    }
    alone = {"text": {"vision": None, "fusion": None}, "image": {"text": None, "fusion": None}}

    def make(reads=None, outputs=2, task="classification", **settings):
        name = reads, outputs, task, *sorted(settings.items())
        if name not in made:
            model = {**parts, "codebook": None, "projection_dim": 6}
            if reads is not None:
                model |= {"projection_dim": None, "heads": False, **alone.get(reads, {})}
                model["classifier"] = {"num_labels": outputs, "input": reads, "hidden_size": 6}
            config = build(family.config_type, model, "model")
            module = family.module(config)
            shapes = jax.eval_shape(lambda key: module.init(key, **family.example(config))["params"], jax.random.key(0))
            rng = np.random.default_rng(1)
            flat = flatten(unbox(shapes))
            params = unflatten({path: jnp.asarray(_random(path, x.shape, rng)) for path, x in flat.items()})
            image = {"size": 24, "crop": None, "mode": "exact"}
            lengths = {"max_length": 20, "text_length": 20, "patch_size": 8, "codebook_size": None}
            given = {"task": task, "image": image, "tokenizer": str(scenes_folder / "tokenizer"), **lengths, **settings}
            made[name] = module, params, family.processor.from_config(build(family.processor_type, given, "processor"))
        return made[name]

    return make


def _random(path, shape, rng):
    """Large enough that every image gets its own answer."""
    import numpy as np

    noise = rng.normal(size=shape).astype(np.float32)
    if path.endswith("token_embedding/embedding"):  # of one length, or the longest would always win
        return 3 * noise / np.linalg.norm(noise, axis=-1, keepdims=True)
    if path in ("lm_head/bias", "classifier/out/bias"):
        return 0 * noise
    if path == "temperature":
        return np.abs(noise) + 0.1
    return 1 + 0.3 * noise if path.endswith("scale") else 0.8 * noise


@pytest.fixture
def mesh8():
    """Two by two by two of the eight host devices."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    grid = np.asarray(jax.devices()[:8]).reshape(2, 2, 2)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
