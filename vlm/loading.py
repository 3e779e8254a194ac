"""`vlm.load` and `vlm.save`: a model from any kind of checkpoint, and a folder that holds everything it needs.

A model folder: `config.json` (family and architecture), `params.safetensors` (names are parameter paths), tokenizer
and image settings, and `vlm_manifest.json` (SHA-256 of every file, written last). A model that can go on being
pretrained has `extra.safetensors` too: momentum teacher and queues.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from vlm.checks import check_tokenizer
from vlm.convert.hf_json import config_beside, replaced
from vlm.convert.layouts import detect
from vlm.convert.rules import Rule, import_tensors
from vlm.convert.torch_file import open_tensors
from vlm.convert.transforms import resize_table
from vlm.convert.views import TensorView, cast, from_array
from vlm.convert.writer import Progress, new_folder, write_tensors
from vlm.errors import UserError
from vlm.family import Family
from vlm.manifest import verify_manifest, write_atomically, write_manifest
from vlm.models import FAMILIES, get_family
from vlm.schema import ShardingConfig
from vlm.sharding import named, place, unbox
from vlm.strict import build, plain, replace_everywhere
from vlm.tokenizers.loading import FILE_NAMES
from vlm.tree import flatten, listing, unflatten

FORMAT_VERSION = 1
_CONFIG, _PARAMS, _EXTRA = "config.json", "params", "extra"
_POSITIONS = ("vision/position_embedding", "teacher/vision/position_embedding")
_TOKENIZER_FILES = ("*.model", "tokenizer.json", "vocab.txt", "vocab.json", "bpe_simple_vocab_16e6.txt.gz")
_PROCESSOR_FILES = (*_TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json")

Rules = Sequence[tuple[str, Any]]
Verify = Literal["full", "fast"]


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A checkpoint that has been recognised and checked, but whose weights are not read yet.

    Attributes:
        family, config: what the model is.
        params: lazy parameters by path; of a training run only their shapes are known until `load` restores them.
        processor_folder, tokenizer_folder: where tokenizer and image settings lie, and a tokenizer to take instead.
        origin: what was recognised, in words.
        notes: assumptions and warnings for the user.
        run: the training run or step directory to restore from.
        extra: lazy arrays of a training state beside the parameters (teacher, queues), by path; of a run: none here.
        image_size: side of the images that the model was resized for, if it was.
    """

    family: Family
    config: Any
    params: Mapping[str, TensorView]
    processor_folder: Path | None
    origin: str
    notes: Sequence[str] = ()
    run: Path | None = None
    extra: Mapping[str, TensorView] = dataclasses.field(default_factory=dict)
    image_size: int | None = None
    tokenizer_folder: Path | None = None


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    dtype: str | None = None,
    verify: Verify = "full",
    overrides: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    ema: bool = False,
) -> tuple[Any, dict[str, Any], Any]:
    """Loads a model from a model folder, a training run, a Hugging Face folder or an original .pth/.pt file.

    Files are memory-mapped; with a mesh, each device reads only its own slices.

    Args:
        path: the checkpoint; format, layout and family are detected.
        mesh: devices to shard the parameters over (see `vlm.sharding.make_mesh`); default: the first device.
        rules: logical axis -> mesh axes; default: `ShardingConfig`'s.
        dtype: "bfloat16" or "float32": stores the parameters and computes in it. Default: as stored.
        verify: "full" compares the SHA-256 of every file of a model folder, "fast" only sizes.
        overrides: architecture values to change: {"vision.activation": "gelu"} (foreign only), {"video": "average"}.
            "vision.image_size" resizes the position table (bicubic), of any checkpoint but a training run.
        tokenizer: folder of a tokenizer, of which nothing else is read, where none lies beside the weights (.pth).
        ema: the averaged parameters of a training run.

    Returns:
        The module, its parameters as a nested dict, and the processor (None where the checkpoint has no tokenizer).

    Raises:
        UserError: nothing recognisable, damaged or incomplete files, weights that do not fit the architecture.
    """
    for name, value, choices in (("dtype", dtype, (None, "bfloat16", "float32")), ("verify", verify, ("full", "fast"))):
        if value not in choices:
            raise UserError(f"{name}: expected one of {', '.join(map(repr, choices))}, found {value!r}")
    opened = open_model(path, verify=verify, overrides=overrides, tokenizer=tokenizer)
    if ema and opened.run is None:
        raise UserError(f"{path}: {opened.origin} has no averaged parameters (ema); a training run has")
    for note in opened.notes:
        logging.getLogger("vlm").warning("%s: %s", path, note)
    config = replace_everywhere(opened.config, "dtype", dtype) if dtype else opened.config
    opened = dataclasses.replace(opened, config=config)
    shardings = None if mesh is None else _shardings(opened, mesh, rules or ShardingConfig().rules)
    if opened.run is not None:
        params = _restore(opened.run, shardings, dtype, ema)
    else:
        views = {name: cast(view, _stored(dtype or view.dtype)) for name, view in opened.params.items()}
        params = unflatten({name: _put(view, shardings and shardings[name]) for name, view in views.items()})
    return opened.family.module(config), params, load_processor(opened)


def load_extra(path: str | Path) -> dict[str, Any] | None:
    """The arrays that a checkpoint keeps beside its parameters, for `save(extra=...)`; None where it has none.

    A nested dict as in the training state: "teacher", "image_queue" [Q, D], "text_queue", "queue_index" ...

    Raises:
        UserError: see `load`.
    """
    views = open_extra(path)
    return None if views is None else unflatten({name: _put(view, None) for name, view in views.items()})


def save(
    path: str | Path,
    model: Any,
    params: Mapping[str, Any],
    processor: Any = None,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a self-contained model folder; after a crash it is there whole or not at all.

    Args:
        extra: teacher and queues, from `load_extra` or a training state, so that pretraining can go on from the folder.

    Raises:
        UserError: `path` exists already, the parameters do not fit the model, or are spread over several hosts; the
            family keeps no such `extra`.
    """
    families = [family for family in map(get_family, FAMILIES) if isinstance(model.config, family.config_type)]
    if not families:
        raise UserError(f"save: no family has the configuration {type(model.config).__name__}")
    views = {name: _from_device(name, leaf) for name, leaf in flatten(params).items()}
    views = _fitted(views, families[0], model.config, "save")
    kept = getattr(families[0].weights, "EXTRA", ())
    leaves = {name: leaf for name, leaf in flatten(extra or {}).items() if name != "step"}  # a run counts its own
    if strangers := [name for name in leaves if name.split("/")[0] not in kept]:
        raise UserError(f"save: extra: {families[0].name} keeps {listing(kept) or 'none'}, found {listing(strangers)}")
    held = {name: _from_device(f"extra/{name}", leaf) for name, leaf in leaves.items()}
    save_views(path, families[0], model.config, views, processor, extra=held)


def save_views(
    path: str | Path,
    family: Family,
    config: Any,
    views: Mapping[str, TensorView],
    processor: Any = None,
    progress: Progress = lambda count: None,
    extra: Mapping[str, TensorView] | None = None,
) -> None:
    """`save` for lazy parameters: they are read, hashed and written block by block; so is `extra` (see `OpenModel`)."""
    content = {"format_version": FORMAT_VERSION, "family": family.name, "model": plain(config)}
    leaves = {name: {"shape": list(view.shape), "dtype": str(view.dtype)} for name, view in views.items()}
    with new_folder(path) as folder:
        digests = write_tensors(folder, _PARAMS, views, progress=progress)
        if extra:
            digests |= write_tensors(folder, _EXTRA, extra, progress=progress)
        write_atomically(folder / _CONFIG, json.dumps(content, indent=2).encode())
        if processor is not None:
            processor.save(folder)
        write_manifest(folder, {"parameters": leaves}, digests=digests)


def open_model(
    path: str | Path,
    *,
    verify: Verify = "full",
    overrides: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
) -> OpenModel:
    """Recognises a checkpoint and maps its tensors to parameters, lazily (arguments and errors as `load`)."""
    path, words = Path(path), None if tokenizer is None else Path(tokenizer)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if words is not None and not any((words / name).is_file() for name in FILE_NAMES):
        raise UserError(f"{words}: expected a folder with one of {', '.join(FILE_NAMES)}")
    if path.is_dir() and (path / "model_index.json").is_file() and (path / "text_encoder").is_dir():
        opened = open_model(path / "text_encoder", verify=verify, overrides=overrides)  # a diffusers pipeline
        return dataclasses.replace(opened, processor_folder=path / "tokenizer", tokenizer_folder=words)
    is_run = path.is_dir() and _workdir(path) is not None
    config = config_beside(path)
    overrides = dict(overrides or {})
    size = overrides.pop("vision.image_size", None)
    if is_run or "format_version" in config:
        if is_run and size is not None:
            raise UserError("vision.image_size: this is a training run; convert it first")
        opened = _open_run(path) if is_run else _open_folder(path, config, verify)
        opened = dataclasses.replace(opened, config=replaced(opened.config, overrides, opened.family.weights))
    else:
        opened = _open_foreign(path, config, overrides, words)
    return dataclasses.replace(opened if size is None else _resized(opened, size), tokenizer_folder=words)


def open_extra(path: str | Path) -> Mapping[str, TensorView] | None:
    """Teacher and queues that a checkpoint keeps beside its parameters, lazily, by path; None where it has none.

    Names are those of the training state's `extra`: "teacher/vision/...", "image_queue" [Q, D], "queue_index" ...

    Raises:
        UserError: see `load`.
    """
    opened = open_model(path, verify="fast")
    return with_extra(opened).extra or None


def with_extra(opened: OpenModel) -> OpenModel:
    """The same, of a training run also with the lazy `extra` that its family keeps in model folders."""
    if opened.run is None:
        return opened
    from vlm.checkpoint import lazy_params

    kept = getattr(opened.family.weights, "EXTRA", ())
    extra = lazy_params(opened.run, "extra") if kept else {}
    extra = {path: view for path, view in extra.items() if path.split("/")[0] in kept}
    return dataclasses.replace(opened, extra=extra)


def _resized(opened: OpenModel, image_size: Any) -> OpenModel:
    """The model for images of another size: its table of patch positions, and its teacher's, are resized."""
    vision = getattr(opened.config, "vision", None)
    if vision is None:
        raise UserError("vision.image_size: this model has no vision tower")
    if type(image_size) is not int or image_size < 1 or image_size % vision.patch_size:
        raise UserError(f"vision.image_size: expected a multiple of patch_size={vision.patch_size}, found {image_size}")
    config = dataclasses.replace(opened.config, vision=dataclasses.replace(vision, image_size=image_size))
    side, prefix = image_size // vision.patch_size, int(vision.class_token)

    def resized(views: Mapping[str, TensorView]) -> dict[str, TensorView]:
        return {n: resize_table(view, side, prefix) if n in _POSITIONS else view for n, view in views.items()}

    parts = {"params": resized(opened.params), "extra": resized(opened.extra)}
    return dataclasses.replace(opened, config=config, image_size=image_size, **parts)


def load_processor(opened: OpenModel, task: str | None = None) -> Any:
    """The processor of an opened model, made for `task`, or None where there is no tokenizer or image settings."""
    words, folder = opened.tokenizer_folder, opened.processor_folder or opened.tokenizer_folder
    if folder is None or not (words or any(True for pattern in _PROCESSOR_FILES for _ in folder.glob(pattern))):
        return None
    processor = opened.family.processor.load(folder, opened.config, words)
    if words is not None:
        check_tokenizer(words, processor.tokenizer.vocab_size, opened.config)
    processor = processor if task is None else processor.for_task(task)
    limit = opened.family.weights.max_tokens(opened.config)
    if limit is not None:
        processor.max_length = min(processor.max_length, limit)
    if opened.image_size is not None and processor.image_settings is not None:
        processor.image_settings = processor.image_settings.for_side(opened.image_size)
    return processor


def expected_params(family: Family, config: Any) -> dict[str, Any]:
    """Shape and type of every parameter by path, without allocating any."""
    return flatten(unbox(_abstract(family, config)))


@functools.lru_cache(maxsize=8)  # tracing a model takes a second, and one checkpoint asks several times
def _abstract(family: Family, config: Any) -> Any:
    model = family.module(config)
    try:
        return jax.eval_shape(lambda: model.init(jax.random.key(0), **family.example(config)))["params"]
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"the model cannot be built from its configuration: {error}") from error


def _open_folder(path: Path, config: Mapping[str, Any], verify: Verify) -> OpenModel:
    if not path.is_dir():
        raise UserError(f"{path}: part of a model folder; load the folder {path.parent}")
    verify_manifest(path, verify)
    if config["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path}: format version {config['format_version']}, this release reads {FORMAT_VERSION}")
    family = get_family(str(config.get("family")))
    architecture = build(family.config_type, config.get("model", {}), "model")
    views = _fitted(_stored_tensors(path, _PARAMS), family, architecture, str(path))
    extra = _stored_tensors(path, _EXTRA) if any(path.glob(f"{_EXTRA}*.safetensors")) else {}
    return OpenModel(family, architecture, views, path, "vlm model folder", extra=extra)


def _stored_tensors(folder: Path, stem: str) -> dict[str, TensorView]:
    index = folder / f"{stem}.safetensors.index.json"
    return open_tensors(index if index.is_file() else folder / f"{stem}.safetensors")


def _workdir(path: Path) -> Path | None:
    """The training workdir that a path is, or is the checkpoints folder or a step of."""
    folders = (path, path.absolute().parent, path.absolute().parent.parent)
    names = ("checkpoints", path.absolute().name, path.absolute().parent.name)
    return next((f for f, n in zip(folders, names, strict=True) if n == "checkpoints" and (f / n).is_dir()), None)


def _open_run(path: Path) -> OpenModel:
    from vlm.checkpoint import abstract_params

    settings, shapes = abstract_params(path)
    family = get_family(str(settings.get("family")))
    architecture = build(family.config_type, settings["model"], "model", {"dtype": settings["precision"]["compute"]})
    workdir = _workdir(path)
    assert workdir is not None

    def unread(_: Any) -> np.ndarray:
        raise UserError(f"{path}: parameters of a training run are restored as a whole")

    views = {name: TensorView(leaf.shape, np.dtype(leaf.dtype), unread) for name, leaf in flatten(shapes).items()}
    views = _fitted(views, family, architecture, str(path))
    return OpenModel(family, architecture, views, workdir / "processor", "training run", run=path)


def _open_foreign(
    path: Path, config: Mapping[str, Any], overrides: Mapping[str, Any] | None, tokenizer: Path | None
) -> OpenModel:
    tensors = open_tensors(path)
    families = [get_family(name) for name in FAMILIES]
    chosen = [family for family in families if config.get("model_type") in family.weights.HF_MODEL_TYPES]
    fitting = [f for f in chosen or families if any(layout.fits(tensors) for layout in f.weights.LAYOUTS)]
    if not fitting:  # raises
        detect([layout for family in families for layout in family.weights.LAYOUTS], tensors, str(path))
    family = fitting[0]
    imported = family.weights.read(
        tensors,
        config or None,
        source=str(path),
        shapes=lambda architecture: expected_params(family, architecture),
        overrides=overrides,
    )
    folder = path if path.is_dir() else path.parent
    architecture = imported.config
    if hasattr(family.weights, "with_tokenizer"):  # it may know ids that the weights' own files do not tell
        architecture = family.weights.with_tokenizer(architecture, tokenizer or folder, config, overrides or {})
    details = (architecture, imported.params, folder, imported.layout, imported.notes)
    return OpenModel(family, *details, extra=imported.extra)


def _fitted(views: Mapping[str, TensorView], family: Family, config: Any, source: str) -> dict[str, TensorView]:
    """Checks parameters that have our names against the architecture; all problems in one error."""
    expected = expected_params(family, config)
    return import_tensors(views, [Rule(name, name) for name in expected], expected, source=source)


def _shardings(opened: OpenModel, mesh: Mesh, rules: Rules) -> dict[str, Any]:
    return flatten(named(place(_abstract(opened.family, opened.config), rules, dict(mesh.shape)), mesh))


def _restore(run: Path, shardings: Mapping[str, Any] | None, dtype: str | None, ema: bool) -> dict[str, Any]:
    from vlm.checkpoint import restore_params

    _, params = restore_params(run, ema=ema, shardings=None if shardings is None else unflatten(shardings))
    return params if dtype is None else jax.tree.map(lambda leaf: leaf.astype(_stored(dtype)), params)


def _put(view: TensorView, sharding: Any) -> jax.Array:
    """Copies a lazy array to its device or devices, each reading its own slice."""

    def read(index: Iterable[slice] | None) -> np.ndarray:
        return np.array(view.read(None if index is None else tuple(index)), order="C")  # never an alias of the file

    if sharding is None:
        return jax.device_put(read(None), jax.local_devices()[0])
    return jax.make_array_from_callback(view.shape, sharding, read, dtype=view.dtype)


def _stored(dtype: Any) -> np.dtype:
    """The type to keep in memory: float64 files become float32, which is what jax computes in."""
    dtype = np.dtype(jax.numpy.dtype(dtype))
    return np.dtype(np.float32) if dtype == np.float64 else dtype


def _from_device(name: str, leaf: Any) -> TensorView:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise UserError(f"save: {name} is spread over several hosts; save a checkpoint and load it on one host")
    if not isinstance(leaf, jax.Array):
        return from_array(np.asarray(leaf))
    return TensorView(leaf.shape, np.dtype(leaf.dtype), lambda index: np.asarray(leaf)[index])
