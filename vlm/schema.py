"""What a configuration holds: every section of `config` as a frozen dataclass, with its defaults.

A configuration file is a Python module with `get_config(size="…") -> ml_collections.ConfigDict`, or a `.json` file (for
example the `config.json` of an earlier run). It names what differs from the defaults below; everything here can be set
on the command line as `--config.section.key=value`. Sequences are tuples, never lists.

    family         "altclip", …: which entry of `vlm.models.FAMILIES` is trained
    model          architecture, the fields of the family's config type. `dtype` and `remat` of a tower follow
                   `precision.compute` and `remat` unless the section sets them itself
    loss           the fields of the family's loss settings
    data           sources ({kind, path, split, weight, …} each), streams of them, global batch size → DataConfig
    processor      tokenizer, image settings, augmentation: the fields of the family's processor settings
    init           starting weights: a tuple of {path, into, include}; empty: from random           → InitConfig
    optimizer      rule, learning rate and schedule, groups of parameters, clipping, EMA            → OptimizerConfig
    sharding       mesh sizes and which mesh axis each logical axis is split over                   → ShardingConfig
    precision      dtype of the computation and of frozen weights                                   → PrecisionConfig
    remat          what the backward pass computes again: "none", "dots" (all but matrix products) or "full"
    train          steps, seed, intervals                                                           → TrainConfig
    eval           {name: {evaluator settings}}, run every `train.eval_every` steps and by eval.py

This module imports no jax: commands check their arguments before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vlm.errors import UserError, did_you_mean
from vlm.strict import at_least, fraction, unused

Section = dict[str, Any]


def check_streams(members: Sequence[str | None], shares: Mapping[str, float]) -> None:
    """Compares the streams that sources name with the shares of streams; both empty is fine.

    Raises:
        UserError: one has what the other lacks, or a share is not positive.
    """
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < float("inf"):
            raise UserError(f"streams: the share of {name!r} must be a positive number, found {share!r}")
    for number, name in enumerate(members):
        if name is None and shares:
            raise UserError(f"streams: source {number} names no stream; choose from {', '.join(sorted(shares))}")
        if name is not None and name not in shares:
            raise UserError(
                f"streams: source {number} is of stream {name!r}, which has no share{did_you_mean(str(name), shares)}"
            )
    if empty := sorted(set(shares) - set(members)):
        raise UserError(f"streams: no source is of stream {empty[0]!r}")


@dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how they become batches.

    Attributes:
      sources: one mapping per source, with a relative `weight`; the mixture draws by weight.
      streams: {name: share of the steps}. Every source then names its `stream`, whose weights compare sources of that
        stream only, and every batch comes whole from one stream: for sources whose examples have different fields.
      batch_size: examples per step over all devices and hosts.
      seed: orders the examples and draws their augmentation, independently of `train.seed`.
      num_workers: threads per host that decode examples; 0: in the calling thread.
      prefetch: batches prepared ahead.
      teacher_cache: folder of precomputed teacher embeddings (`python -m vlm.precompute`), joined to every example by
        its `source_text` as `target`.
      codebook_cache: folder of precomputed visual words (`python -m vlm.precompute`), joined to every picture by its
        bytes as `patch_labels`.
      max_skip_fraction: the run stops when more than this share of the records had to be replaced.
      timeout_seconds: the run stops when there was no batch for so long.
    """

    sources: tuple[Section, ...] = ()
    streams: Section = field(default_factory=dict)
    batch_size: int = 1024
    seed: int = 0
    num_workers: int = 2
    prefetch: int = 2
    teacher_cache: str | None = None
    codebook_cache: str | None = None
    max_skip_fraction: float = 0.001
    timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size", "prefetch")
        at_least(0, self, "num_workers")
        fraction(self, "max_skip_fraction")
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds: expected a positive number, found {self.timeout_seconds}")
        check_streams([source.get("stream") for source in self.sources], self.streams)

    @property
    def members(self) -> list[str]:
        """The stream of each source; empty without streams."""
        return [source["stream"] for source in self.sources] if self.streams else []


@dataclass(frozen=True)
class InitConfig:
    """Weights to start from. Paths that no entry fills start random and are listed; a later entry wins.

    Attributes:
      path: any checkpoint that `vlm.load` reads.
      into: where they go in the train state: "params", a subtree such as "params/vision", or "extra/teacher". "extra"
        takes what the checkpoint keeps beside its parameters (a momentum teacher, queues) in their place.
      include: regular expression of the checkpoint's parameter paths to take; each must exist in the target.
    """

    path: str
    into: str = "params"
    include: str = ".*"


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps: linear over `warmup_steps`, then `name` until the last step.

    Attributes:
      name: "constant"; "linear" or "cosine" decay to `end_factor` × peak at the last step; "rsqrt" falls with the
        inverse square root of the step; "exponential" is peak × decay_rate ^ epoch, never below `end_factor` × peak,
        with epochs counted from the first step of the run. With `warmup_steps == train.steps` the rate only ever rises.
      start_factor: the warm-up begins at start_factor × peak.
      epoch_steps: length of an epoch. "linear" and "cosine" with it change at the start of every epoch only (of
        those after the warm-up), "exponential" always.
      cooldown_steps: the last steps fall linearly to 0 ("constant" and "rsqrt" only).
    """

    name: Literal["constant", "linear", "cosine", "rsqrt", "exponential"] = "cosine"
    warmup_steps: int = 0
    start_factor: float = 0.0
    end_factor: float = 0.0
    epoch_steps: int | None = None
    decay_rate: float = 1.0
    cooldown_steps: int = 0

    def __post_init__(self) -> None:
        at_least(0, self, "warmup_steps", "end_factor", "cooldown_steps")
        at_least(1, self, "epoch_steps")
        fraction(self, "start_factor", "decay_rate")
        if self.cooldown_steps and self.name not in ("constant", "rsqrt"):
            raise ValueError(f"cooldown_steps: a {self.name} schedule has none, found {self.cooldown_steps}")
        if self.epoch_steps and self.name not in ("linear", "cosine", "exponential"):
            raise ValueError(f"epoch_steps: a {self.name} schedule has none, found {self.epoch_steps}")
        exponential = self.name == "exponential"
        if exponential != (self.decay_rate != 1.0) or (exponential and not self.epoch_steps):
            raise ValueError("name: expected 'exponential' together with decay_rate and epoch_steps")
        if self.name in ("constant", "rsqrt"):
            unused(self, f"a {self.name} schedule", "end_factor")


@dataclass(frozen=True)
class GroupConfig:
    """How one group of parameters is trained; `weight_decay=None` takes the optimizer's."""

    freeze: bool = False
    lr_multiplier: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        at_least(0, self, "lr_multiplier", "weight_decay")


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule.

    Attributes:
      betas: moment decays of adamw and lion; sgd uses the first as momentum.
      weight_decay: decoupled (multiplied with the learning rate); not applied to paths in `decay_exclude`.
      grad_clip_norm: bound on the global norm over all trainable gradients.
      bounds: (path regex, lowest, highest): such parameters are kept in that range after every update. The default is
        CLIP's for its log temperature, [0, ln 100] (Radford et al. 2021, section 2.5).
      groups: (path regex, settings); the first full match wins. Every parameter must match one and every regex at
        least one parameter. Frozen parameters have no gradient and no optimizer state.
      accumulation_steps: micro-batches per step. Each is a batch of its own to the loss: a contrastive loss then sees
        `data.batch_size / accumulation_steps` candidates.
      ema_decay: keeps an exponential moving average of the trainable parameters.
    """

    name: Literal["adamw", "adafactor", "lion", "sgd"] = "adamw"
    lr: float = 1e-4
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_exclude: tuple[str, ...] = (
        r"(.*/)?(bias|scale|logit_scale)",
        r".*(class|mask)_embedding",
        r".*position_embedding(/.*)?",
    )
    grad_clip_norm: float | None = None
    bounds: tuple[tuple[str, float, float], ...] = ((r"(.*/)?logit_scale", 0.0, 4.605170185988092),)
    groups: tuple[tuple[str, GroupConfig], ...] = ((".*", GroupConfig()),)
    accumulation_steps: int = 1
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        at_least(0, self, "lr", "weight_decay", "eps", "grad_clip_norm")
        at_least(1, self, "accumulation_steps")
        fraction(self, "ema_decay")
        if self.grad_clip_norm == 0:
            raise ValueError("grad_clip_norm: expected a positive norm (None: no clipping), found 0")
        if self.name == "adamw" and self.eps == 0:
            raise ValueError("eps: adamw needs a positive one, found 0")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas: expected values from 0 to below 1, found {self.betas}")
        if self.name != "adamw":
            unused(self, self.name, "eps", *(("betas",) if self.name == "adafactor" else ()))
        for pattern, low, high in self.bounds:
            if low > high:
                raise ValueError(f"bounds: {pattern!r}: expected the lowest value first, found {low} and {high}")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (one of them at most) takes all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"{axis}: expected a number of devices or -1, found {size}")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"expected -1 for one axis at most, found {sizes}")


@dataclass(frozen=True)
class ShardingConfig:
    """The mesh, and for every logical axis of a weight or activation the mesh axes it is split over (None: whole)."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    rules: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
        ("batch", ("data", "fsdp")),
        ("embed", "fsdp"),
        ("mlp", "tensor"),
        ("heads", "tensor"),
        ("kv_heads", "tensor"),
        ("vocab", "tensor"),
        ("patch", None),
        ("position", None),
        ("norm", None),
        ("projection", None),
        ("layers", None),
        ("length", None),
        ("embed_activation", None),
        ("heads_activation", "tensor"),
        ("mlp_activation", "tensor"),
    )


@dataclass(frozen=True)
class PrecisionConfig:
    """Dtypes. Trainable parameters, their gradients and the optimizer are always float32.

    Attributes:
      compute: activations, and weights where they are used. bfloat16 is slow on CPUs.
      frozen: how frozen parameters are stored.
    """

    compute: Literal["float32", "bfloat16"] = "float32"
    frozen: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      seed: parameters, dropout.
      log_every, eval_every, checkpoint_every: in steps; 0: never (the last step is always saved).
      keep: newest checkpoints kept. keep_every: also those of steps that are multiples of this.
      verify: before a checkpoint is restored, "full" hashes its files, "fast" compares their sizes; values are compared
        in any case. "auto": "full" up to 8 GiB.
      text_lengths: lengths of text that the step is compiled for besides the whole row: every step runs on the shortest
        that holds all real tokens of its global batch, the same on all devices and for every number of hosts. The
        result is that of whole rows, unless there is dropout, whose masks are drawn for the length that is run.
      pack_texts: so many rows lay their texts end to end; the lengths above are then those of the mean text of such
        rows, not of the longest. A divisor of the rows that a device has of a micro-batch. 1: rows are cut. For the
        text towers of AltCLIP and CLIP; the teacher of stage 1, if run live, is not packed.
      max_bad_steps: the run stops after this many consecutive steps with a non-finite loss or gradient.
      sample_images: images of the first batch written to workdir/samples.
      tensorboard: also write TensorBoard event files.
      wandb: project to log to with Weights & Biases (extra "wandb").
    """

    steps: int = 1000
    seed: int = 0
    log_every: int = 50
    eval_every: int = 0
    checkpoint_every: int = 1000
    keep: int = 3
    keep_every: int | None = None
    verify: Literal["auto", "full", "fast"] = "auto"
    text_lengths: tuple[int, ...] = ()
    pack_texts: int = 1
    max_bad_steps: int = 8
    sample_images: int = 16
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "steps", "keep", "keep_every", "max_bad_steps", "pack_texts")
        at_least(0, self, "log_every", "eval_every", "checkpoint_every", "sample_images")
        if any(length < 1 for length in self.text_lengths):
            raise ValueError(f"text_lengths: expected lengths of at least 1, found {self.text_lengths}")
        if self.pack_texts > 1 and not self.text_lengths:
            raise ValueError(f"pack_texts: expected 1, or lengths in text_lengths, found {self.pack_texts}")


@dataclass(frozen=True)
class Config:
    """A whole configuration; see the module's docstring."""

    family: str
    model: Section = field(default_factory=dict)
    loss: Section = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    processor: Section = field(default_factory=dict)
    init: tuple[InitConfig, ...] = ()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    remat: Literal["none", "dots", "full"] = "none"
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: Section = field(default_factory=dict)
