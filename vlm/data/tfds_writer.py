"""Writes examples as a TFDS dataset (array_record files) without TensorFlow; any TFDS installation can read it."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vlm.errors import UserError, did_you_mean

_KINDS = ("image", "text", "int", "float")


def write_tfds(
    path: str | os.PathLike,
    name: str,
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    features: Mapping[str, Any],
    *,
    version: str = "1.0.0",
    num_shards: int | None = None,
) -> str:
    """Prepares a dataset; returns the folder, which `tfds.TfdsSource` opens. The order of examples is kept.

    Args:
        path: the data folder; the dataset lands in `path/name/version`, written under another name first.
        name: lower case letters, digits, `_`.
        splits: for each split its examples; images are encoded bytes (JPEG, PNG).
        features: name -> "image", "text", "int", "float", a tuple of class names, a list of one of these (a
            sequence), or a TFDS feature.
        version: dataset version.
        num_shards: files per split; None lets TFDS choose.

    Raises:
        UserError: a bad name or feature, an example that does not fit, an empty split, or a dataset already there.
    """
    import tensorflow_datasets as tfds

    folder = os.path.join(os.path.expanduser(path), name, version)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"dataset name {name!r}: use lower case letters, digits and _")
    if os.path.exists(folder):
        raise UserError(f"{folder}: already there")
    spec = tfds.features.FeaturesDict({key: _feature(key, kind) for key, kind in features.items()})
    builder = _builder_class(name, version, spec, splits)
    config = tfds.download.DownloadConfig(num_shards=num_shards, try_download_gcs=False)
    with _quiet():
        try:
            written = builder(data_dir=os.path.expanduser(path), file_format="array_record")
            written.download_and_prepare(download_config=config)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
            raise UserError(f"{folder}: cannot write ({' '.join(str(error).split())[:300]})") from error
    return folder


def _feature(key: str, kind: Any) -> Any:
    import numpy as np
    import tensorflow_datasets as tfds

    f = tfds.features
    if isinstance(kind, f.FeatureConnector):
        return kind
    if isinstance(kind, list) and len(kind) == 1:
        return f.Sequence(_feature(key, kind[0]))
    if isinstance(kind, tuple) and kind and all(isinstance(label, str) for label in kind):
        return f.ClassLabel(names=list(kind))
    if kind not in _KINDS:
        raise UserError(f"feature {key!r}: unknown kind {kind!r}{did_you_mean(str(kind), _KINDS)}")
    simple = {
        "image": f.Image,
        "text": f.Text,
        "int": lambda: f.Scalar(np.int64),
        "float": lambda: f.Scalar(np.float32),
    }
    return simple[kind]()


def _encoded(feature: Any, value: Any) -> Any:
    """Bytes of images are handed over as files: TFDS stores those as they are (arrays would need TensorFlow)."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict) and isinstance(value, Mapping):
        return {key: _encoded(feature[key], item) if key in feature else item for key, item in value.items()}
    if isinstance(feature, tfds.features.Sequence) and isinstance(value, (list, tuple)):
        return [_encoded(feature.feature, item) for item in value]
    if isinstance(feature, tfds.features.Image):
        if not isinstance(value, bytes) or not value:
            raise UserError(f"an image must be its encoded bytes, found {type(value).__name__}")
        return io.BytesIO(value)
    return value


def _builder_class(name: str, version: str, spec: Any, splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> type:
    import tensorflow_datasets as tfds

    def generate(split: str) -> Iterator[tuple[int, Any]]:
        count = 0
        for example in splits[split]:
            if set(example) != set(spec):
                raise UserError(
                    f"split {split!r} example {count}: has {sorted(example)}, the features are {sorted(spec)}"
                )
            yield count, _encoded(spec, example)
            count += 1
        if not count:
            raise UserError(f"split {split!r} is empty")

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Hands the examples over; keys are positions, so the order stays."""

        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=spec, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: generate(split) for split in splits}

        def _generate_examples(self):
            raise NotImplementedError  # all examples come from _split_generators

    Builder.name = name
    return Builder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS's own banners and bars, and puts its switches back."""
    from absl import logging
    from tensorflow_datasets.core.utils import tqdm_utils

    verbosity, active = logging.get_verbosity(), tqdm_utils._active
    logging.set_verbosity(logging.ERROR)
    tqdm_utils.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if active:
            tqdm_utils.enable_progress_bar()
