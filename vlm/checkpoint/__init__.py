"""Training checkpoints: orbax for the bytes, a manifest and fingerprints for the proof.

`workdir/checkpoints/<step>/` holds orbax's files and `vlm_manifest.json`: checksums of the files, shape, dtype and
fingerprint of every leaf, step, configuration, data position, the step before. See `steps` for the folder,
`fingerprint` for what is compared, `saving.Checkpoints` for a run, `reading.restore_params` for evaluation.

    python -m vlm.checkpoint verify PATH
"""

from vlm.checkpoint.lazy import lazy_params
from vlm.checkpoint.reading import abstract_params, restore_params, verify_step
from vlm.checkpoint.saving import Checkpoints

__all__ = ["Checkpoints", "abstract_params", "lazy_params", "restore_params", "verify_step"]
