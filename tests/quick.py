"""What tests of modules share: one compiled program instead of an operation at a time, weights made by NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm.tree import flatten, unflatten


@functools.cache
def _compiled(module, method, constants):
    def run(params, inputs, arrays):
        return module.apply({"params": params}, *inputs, **arrays, **dict(constants), method=method)

    return jax.jit(run)


def apply(module, params, *inputs, method=None, **named):
    """`module.apply`, compiled: flags and names are constants, arrays are arguments."""
    constants = {name: value for name, value in named.items() if value is None or isinstance(value, bool | str)}
    arrays = {name: value for name, value in named.items() if name not in constants}
    return _compiled(module, method, tuple(constants.items()))(params, inputs, arrays)


def random_params(module, *inputs, seed=0, scale=0.2, **named):
    """Random values for every parameter that the module has for such inputs; scales of norms are about 1."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **named))
    flat = flatten(nn.unbox(shapes)["params"])
    draw = lambda path, leaf: path.endswith("scale") + scale * rng.normal(size=leaf.shape)  # noqa: E731
    return unflatten({path: jnp.asarray(draw(path, leaf), jnp.float32) for path, leaf in flat.items()})


def equations(jaxpr):
    """All equations of a program, those of its sub-programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def products(jaxpr):
    """(exact, of float32) for every matrix product and convolution of a program."""
    highest = jax.lax.Precision.HIGHEST
    for equation in equations(jaxpr):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            exact = equation.params["precision"] in (highest, (highest, highest))
            yield exact, all(operand.aval.dtype == jnp.float32 for operand in equation.invars)


def no_array_is_gathered_for_want_of_a_layout(capfd):
    """The compiler's partitioner says on stderr where it gave every device a whole array, as a last resort."""
    err = capfd.readouterr().err
    assert "Involuntary full rematerialization" not in err, err
