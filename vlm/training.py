"""The train state and the train step: pure functions, compiled once, the same on one CPU and on a pod.

`init_state` creates the state shard by shard on the mesh; `make_train_step` gives (state, batch) -> (state, metrics);
`trace_step` fixes its layout, and the compiled step reuses the memory of the state it is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vlm.convert.views import TensorView
from vlm.errors import UserError, did_you_mean
from vlm.layers.linear import constrain
from vlm.optimizer import Optimizer, merge, update_ema
from vlm.padding import TextLengths
from vlm.sharding import Placement, unbox, without_constraints
from vlm.tree import flatten, unflatten

Params = dict[str, Any]
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
# (params, extra, batch, rng) -> (loss, (terms, extra)): a family's loss with its model and settings filled in.
LossFn = Callable[[Params, Any, Batch, jax.Array], tuple[jax.Array, tuple[Metrics, Any]]]


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on; one pytree, all of it checkpointed.

    Attributes:
      step: int32[], finished steps, skipped ones included; also the position in the data.
      params: float32; frozen ones may be bfloat16.
      opt_state: of the trainable parameters only.
      ema: averages of the trainable parameters; {} without EMA.
      extra: the family's other state (teacher, queue); {} where there is none.
      bad_steps: int32[] `total` and `consecutive` steps that were skipped because something was not finite.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params
    extra: Any
    bad_steps: dict[str, jax.Array]


# ---------------------------------------------------------------------------------------------------------- state


@dataclasses.dataclass(frozen=True)
class StateInit:
    """How a state starts, as traceable functions of keys. Parameters come boxed with their logical axes."""

    init_params: Callable[[jax.Array], Params]
    init_extra: Callable[[Params, jax.Array], Any]
    optimizer: Optimizer
    frozen_dtype: str = "float32"

    def params(self, seed: int) -> Params:
        """Random parameters."""
        with without_constraints():  # out_shardings place the result; a constraint could only disagree
            params = self.init_params(jax.random.fold_in(jax.random.key(seed), 0))
        dtype = jnp.dtype(self.frozen_dtype)
        trainable, frozen = self.optimizer.split(params)
        frozen = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, frozen)
        return merge(trainable, frozen)

    def beside(self, params: Params, seed: int) -> Any:
        """The extra state of a run that starts from `params`."""
        with without_constraints():
            return self.init_extra(params, jax.random.fold_in(jax.random.key(seed), 1))

    def finish(self, params: Params, extra: Any) -> TrainState:
        """The state at step 0 around given parameters, which are brought into their bounds."""
        trainable, frozen = self.optimizer.split(params)
        trainable = self.optimizer.bounded(trainable)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=merge(trainable, frozen),
            opt_state=self.optimizer.rule.init(trainable),
            ema=jax.tree.map(jnp.copy, trainable) if self.optimizer.ema_decay is not None else {},
            extra=extra,
            bad_steps={"total": jnp.zeros((), jnp.int32), "consecutive": jnp.zeros((), jnp.int32)},
        )

    def abstract(self) -> TrainState:
        """Shapes, dtypes and logical axes of the whole state; nothing is allocated."""

        def state() -> TrainState:
            params = self.params(0)
            return self.finish(params, self.beside(params, 0))

        return jax.eval_shape(state)


def init_state(
    init: StateInit,
    placements: Any,
    mesh: jax.sharding.Mesh,
    seed: int,
    start: Mapping[str, TensorView | jax.Array] | None = None,
) -> TrainState:
    """Creates the state on the mesh; no device ever holds more than its own shards.

    Args:
      placements: `sharding.place(init.abstract(), …)`.
      start: starting values by path ("params/vision/…", "extra/teacher/…"): lazy arrays, of which every device reads
        only its slices, or arrays on the mesh. Parameters that are missing here start random; random values that are
        replaced are never computed. Extra state that is missing here is made from the parameters as they then are.

    Raises:
      UserError: a starting value with an unknown path or another shape.
    """
    shardings = jax.tree.map(lambda placement: NamedSharding(mesh, placement.spec), placements)
    targets = flatten({"params": placements.params, "extra": placements.extra})
    given = {path: put_weight(path, leaf, targets, mesh) for path, leaf in (start or {}).items()}
    missing = {path: NamedSharding(mesh, target.spec) for path, target in targets.items() if path not in given}

    def complete(part: str, make: Callable[..., Any], *arguments: Any) -> Any:
        """The given leaves of one part of the state with those that are missing, which `make` computes."""
        absent = {path: sharding for path, sharding in missing.items() if path.startswith(f"{part}/")}

        def rest(*arguments: Any) -> dict[str, jax.Array]:
            flat = flatten({part: unbox(make(*arguments, seed))})
            return {path: jnp.copy(flat[path]) for path in absent}  # never an argument's own buffer

        present = {path: leaf for path, leaf in given.items() if path.startswith(f"{part}/")}
        return unflatten(present | jax.jit(rest, out_shardings=absent)(*arguments)).get(part, {})

    params = complete("params", init.params)
    extra = complete("extra", init.beside, params)
    return jax.jit(init.finish, out_shardings=shardings, donate_argnums=(0, 1))(params, extra)


def put_weight(
    path: str, leaf: TensorView | jax.Array, targets: Mapping[str, Placement], mesh: jax.sharding.Mesh
) -> jax.Array:
    """Places a starting weight as `targets[path]` says; of a lazy one, every device reads only its slices.

    Raises:
      UserError: no such path, or another shape.
    """
    if path not in targets:
        raise UserError(f"starting weights: the model has no {path!r}{did_you_mean(path, targets)}")
    target = targets[path]
    if tuple(leaf.shape) != target.shape:
        raise UserError(f"starting weights: {path} has shape {tuple(leaf.shape)}, the model needs {target.shape}")
    sharding = NamedSharding(mesh, target.spec)
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf.astype(target.dtype), sharding)
    return jax.make_array_from_callback(
        target.shape, sharding, lambda index: np.array(leaf.read(index or ()), target.dtype, order="C")
    )


# ----------------------------------------------------------------------------------------------------------- step


def make_train_step(
    loss: LossFn, optimizer: Optimizer, seed: int, accumulation_steps: int = 1, texts: TextLengths | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds one training step, a pure function.

    Randomness is a function of (seed, step, micro-batch). If the loss or the gradient is not finite, the
    step changes nothing but `step` and `bad_steps`: parameters, optimizer state, EMA and extra stay bit for bit.

    With `accumulation_steps` > 1 the batch is cut into that many micro-batches (rows i, i + A, i + 2A, …, so that no
    row leaves its device) whose gradients are averaged in float32. Each micro-batch is a batch of its own to the loss:
    equal to the whole batch for losses that are means over examples, but a contrastive loss then sees only its
    micro-batch's candidates.

    With `texts`, padding that the global batch does not need is left out before anything is computed: the step holds a
    program for each length, and all devices run the shortest that will do. That is for several hosts, none of which
    knows all rows; one host shortens its batches itself, to the same length (`TextLengths.fit`).
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, frozen = optimizer.split(state.params)
        frozen = jax.lax.stop_gradient(frozen)

        def objective(trainable: Params, extra: Any, batch: Batch, rng: jax.Array) -> Any:
            return loss(merge(trainable, frozen), extra, batch, rng)

        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        gradient = _accumulate(jax.value_and_grad(objective, has_aux=True), accumulation_steps)
        (value, (terms, extra)), grads = _by_length(gradient, texts or TextLengths())(
            trainable, state.extra, batch, rng
        )

        grad_norm = optax.tree.norm(grads)
        learning_rate = jnp.asarray(optimizer.schedule(state.step), jnp.float32)
        good = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        new, opt_state, good = optimizer.rule.apply(
            grads, grad_norm, state.opt_state, trainable, optimizer.step_sizes(learning_rate), good
        )
        new = optimizer.bounded(new, good)
        ema = update_ema(state.ema, new, optimizer.ema_decay) if optimizer.ema_decay is not None else state.ema
        ema, extra = jax.tree.map(
            lambda after, before: jnp.where(good, after, before), (ema, extra), (state.ema, state.extra)
        )
        bad = 1 - good.astype(jnp.int32)
        bad_steps = {
            "total": state.bad_steps["total"] + bad,
            "consecutive": (state.bad_steps["consecutive"] + 1) * bad,
        }
        metrics = terms | {
            "loss": value,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(new),
            "bad_steps": bad_steps["total"],
            "bad_steps_in_a_row": bad_steps["consecutive"],
        }
        params = merge(new, frozen)
        return TrainState(state.step + 1, params, opt_state, ema, extra, bad_steps), metrics

    return step


def _by_length(gradient: Callable[..., Any], texts: TextLengths) -> Callable[..., Any]:
    """`gradient` of the batch without the padding that `texts` leaves out; the length is added to its terms.

    The choice is made around the gradient, not inside: the backward pass of a conditional would keep the activations
    of every branch.
    """

    def run(trainable: Params, extra: Any, batch: Batch, rng: jax.Array) -> Any:
        sizes = texts.sizes(batch)
        if not sizes:
            return gradient(trainable, extra, batch, rng)

        def branch(length: int) -> Callable[[Batch], Any]:
            return lambda batch: gradient(trainable, extra, texts.shorten(batch, length), rng)

        chosen = jnp.searchsorted(jnp.asarray(sizes), texts.needed(batch["mask"]))
        (value, (terms, following)), grads = jax.lax.switch(chosen, [branch(size) for size in sizes], dict(batch))
        return (value, ({**terms, "text_length": jnp.asarray(sizes, jnp.float32)[chosen]}, following)), grads

    return run


def _accumulate(gradient: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`gradient` over `count` micro-batches: mean loss, terms and gradients, extra threaded through in order."""
    if count == 1:
        return gradient

    def micro_batches(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    def run(trainable: Params, extra: Any, batch: Batch, rng: jax.Array) -> Any:
        def body(carry: Any, item: Any) -> Any:
            (total, extra), (index, batch) = carry, item
            (value, (terms, extra)), grads = gradient(trainable, extra, batch, jax.random.fold_in(rng, index))
            total = jax.tree.map(lambda a, g: a + g.astype(jnp.float32) / count, total, grads)
            return (total, extra), (value, terms)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
        items = (jnp.arange(count), jax.tree.map(micro_batches, dict(batch)))
        (grads, extra), (values, terms) = jax.lax.scan(body, (zeros, extra), items)
        mean = lambda x: jnp.mean(x, axis=0)  # noqa: E731
        return (mean(values), (jax.tree.map(mean, terms), extra)), grads

    return run


def trace_step(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    batch: Mapping[str, Any],
    batch_sharding: NamedSharding,
) -> Any:
    """Traces a step for this state and batch (arrays or abstract); `.jaxpr` is the program, `.lower().compile()` runs.

    The state's layout is kept and its buffers are donated; metrics are replicated.
    """
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    whole = NamedSharding(batch_sharding.mesh, PartitionSpec())
    jitted = jax.jit(
        step,
        in_shardings=(state_shardings, {name: batch_sharding for name in batch}),
        out_shardings=(state_shardings, whole),
        donate_argnums=0,
    )
    return jitted.trace(state, batch)
