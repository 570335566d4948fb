"""Random parameters without a program of their own.

A program that draws every parameter of a policy has random bits and an inverse error function for each, and compiling
it takes as long as compiling a training step. Here each parameter is followed back through what `init` was traced to:
to a key, and to one of JAX's distributions. Drawing from them takes a few programs that all policies share; NumPy cuts
and scales what comes out. The numbers are the same, bit for bit, as those of the one program.

JAX promises nobody what a trace looks like. A parameter whose trace reads otherwise is left to the caller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import unbox
from flax.traverse_util import flatten_dict
from jax.extend import core
from jax.sharding import Sharding

from robovlms_jax.parallel import cpu

SIZES = (2**13, 2**16, 2**19)
"""How many numbers are drawn at a time: the first of them that is enough. Larger parameters are not drawn here."""


class Traced(NamedTuple):
    """What a function from a key to parameters does. shapes: of its parameters, with logical axis names."""

    program: core.ClosedJaxpr
    shapes: Any


def trace(init: Callable[[jax.Array], Any]) -> Traced:
    """`init`: key -> parameters whose leaves carry logical axis names. Runs nothing of it."""
    return Traced(*jax.make_jaxpr(init, return_shape=True)(jax.random.key(0)))


def draw(traced: Traced, seed: int, paths: Collection[str]) -> dict[str, np.ndarray]:
    """What `init(jax.random.key(seed))` gives for `paths` ("/"-joined), but for those that cannot be drawn here.

    On the CPU, whatever else there is: other devices might round otherwise.
    """
    if not (jax.config.jax_threefry_partitionable and jax.config.jax_default_prng_impl == "threefry2x32"):
        return {}  # elsewhere the first numbers of many are not those of few
    jaxpr = traced.program.jaxpr
    names = flatten_dict(unbox(traced.shapes), sep="/")
    leaves, tree = jax.tree.flatten(unbox(traced.shapes))
    places = flatten_dict(jax.tree.unflatten(tree, range(len(leaves))), sep="/")
    drawn = {}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        values = _Values(jaxpr, traced.program.consts, [jax.random.key(seed)])
        for path in sorted(paths):
            try:
                value = values.of(jaxpr.outvars[places[path]])
            except _Unreadable:
                continue
            shape = names[path]
            if isinstance(value, np.ndarray) and (value.shape, value.dtype) == (shape.shape, shape.dtype):
                drawn[path] = value
    return drawn


def put(values: Mapping[str, np.ndarray], shardings: Mapping[str, Sharding]) -> dict[str, jax.Array]:
    """Arrays of these values, each device with its own part; every process has all values."""
    return {
        path: jax.make_array_from_callback(x.shape, shardings[path], lambda index, x=x: np.array(x[index]))
        for path, x in values.items()
    }


class _Unreadable(Exception):
    """A trace that says something else than is known here."""


class _Values:
    """Values of a traced function's variables: those that are asked for, and what they need."""

    def __init__(self, jaxpr: core.Jaxpr, consts: Collection[Any], arguments: Collection[Any]) -> None:
        """arguments: None where one is not known."""
        self._known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
        self._made = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}

    def of(self, variable: Any) -> Any:
        """A variable's value: keys as JAX's, numbers as NumPy's. Raises _Unreadable."""
        if isinstance(variable, core.Literal):
            return np.asarray(variable.val, variable.aval.dtype)
        if variable not in self._known:
            equation = self._made[variable]
            if equation.primitive.name == "scan":
                self._known[variable] = self._scanned(equation, equation.outvars.index(variable))
            else:
                self._known[variable] = self._computed(equation)
        value = self._known[variable]
        if value is None:
            raise _Unreadable
        return value

    def _computed(self, equation: core.JaxprEqn) -> Any:
        name, inputs, out = equation.primitive.name, equation.invars, equation.outvars[0].aval
        if (drawing := _distribution(equation)) is not None:
            return self._drawn(equation, drawing)
        if name == "mul" and _distribution(made := self._equation(inputs[0])) == "_normal":
            # It ends with a product, too, and the compiler makes one factor of both.
            return self._drawn(made, "_normal", self.of(inputs[1]))
        if name == "broadcast_in_dim":
            value = self.of(inputs[0])
            if value.ndim:
                raise _Unreadable
            return np.full(out.shape, value)
        if name in _ON_KEYS:
            return _ON_KEYS[name](equation.params, *map(self.of, inputs))
        if name in _ON_NUMBERS and out.dtype == np.float32:
            return _ON_NUMBERS[name](*map(self.of, inputs))
        raise _Unreadable

    def _equation(self, variable: Any) -> core.JaxprEqn | None:
        return None if isinstance(variable, core.Literal) else self._made.get(variable)

    def _drawn(self, equation: core.JaxprEqn, distribution: str, *scale: np.ndarray) -> np.ndarray:
        key, *numbers = [*map(self.of, equation.invars), *scale]
        out = equation.outvars[0].aval
        if key.ndim or any(number.ndim for number in numbers) or out.dtype != np.float32 or out.size > SIZES[-1]:
            raise _Unreadable
        size = next(size for size in SIZES if size >= out.size)
        program = _program(distribution, size, tuple(number.item() for number in numbers))
        return np.asarray(program(key))[: out.size].reshape(out.shape)

    def _scanned(self, equation: core.JaxprEqn, place: int) -> np.ndarray:
        """What a loop collects, where each turn begins with its own key and nothing goes from one to the next."""
        num_consts, num_carry, body, consts = _loop(equation.params)
        if place < num_carry:
            raise _Unreadable
        before = num_consts + num_carry
        rows = [self._rows(variable) for variable in equation.invars[before:]]
        turns = []
        for turn in range(equation.params["length"]):
            arguments = [*[None] * before, *[row and row[turn] for row in rows]]
            turns.append(_Values(body, consts, arguments).of(body.outvars[place]))
        return np.stack(turns)

    def _rows(self, variable: Any) -> list[jax.Array] | None:
        if not jax.dtypes.issubdtype(variable.aval.dtype, jax.dtypes.prng_key):
            return None
        return list(jax.random.wrap_key_data(np.asarray(jax.random.key_data(self.of(variable)))))


def _loop(settings: Mapping[str, Any]) -> tuple[int, int, core.Jaxpr, Collection[Any]]:
    """A loop's numbers of constants and of carried values, what a turn computes, and its constants."""
    try:
        body = settings["jaxpr"]
        if "num_consts" in settings:
            return settings["num_consts"], settings["num_carry"], body.jaxpr, body.consts
        constants, carried, _ = settings["ft_in"].unpack()  # since jax 0.11.2
        return len(constants), len(carried), getattr(body, "jaxpr", body), body.consts
    except (KeyError, AttributeError, TypeError, ValueError):
        raise _Unreadable from None


def _distribution(equation: core.JaxprEqn | None) -> str | None:
    """The name of the distribution that an equation draws from."""
    if equation is None or equation.primitive.name not in ("jit", "pjit"):
        return None
    name = equation.params["name"]
    return name if name in _DISTRIBUTIONS else None


_DISTRIBUTIONS = {
    "_normal": lambda key, size, scale=1.0: jax.random.normal(key, size) * np.float32(scale),
    "_truncated_normal": lambda key, size, low, high: jax.random.truncated_normal(key, low, high, size),
    "_uniform": lambda key, size, low, high: jax.random.uniform(key, size, jnp.float32, low, high),
}
"""What JAX's functions are called in traces -> the same as they are called."""

_ON_KEYS = {
    "random_clone": lambda _, key: key,
    "random_fold_in": lambda _, key, number: jax.random.fold_in(key, number),
    "random_split": lambda settings, key: jax.random.split(key, settings["shape"]),
}

_ON_NUMBERS = {"div": np.divide, "mul": np.multiply, "sqrt": np.sqrt}


@functools.cache
def _program(distribution: str, size: int, numbers: tuple[float, ...]) -> Callable:
    def drawn(key: jax.Array) -> jax.Array:
        return _DISTRIBUTIONS[distribution](key, (size,), *numbers)

    return jax.jit(drawn, compiler_options=cpu.options("tiny_run_once", "cpu"))
