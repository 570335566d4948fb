"""Everything a training step reads and writes, created in its final sharding."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.training import trainable
from robovlms_jax.training.optimizer import AveragedState


@flax.struct.dataclass
class TrainState:
    """step: int32[], batches learned from or skipped; skipped: int32[], those whose loss or gradient was not finite;
    begun: int32[], updates made before this optimizer state was initialised (in earlier stages); halted: bool[],
    True = after a batch that was not finite, where none may be skipped, nothing changes any more (never saved);
    trainable, frozen: flat dicts path -> array; rng: uint32[2], never advanced, folded with step."""

    step: jax.Array
    skipped: jax.Array
    begun: jax.Array
    halted: jax.Array
    trainable: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    opt_state: Any
    rng: jax.Array

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as the nested dict that models apply in training."""
        return unflatten_dict({**self.frozen, **self.trainable}, sep="/")

    @property
    def averages(self) -> bool:
        """Whether a moving average of the parameters is kept (optimizer.ema)."""
        return isinstance(self.opt_state, AveragedState)

    @property
    def served(self) -> dict[str, Any]:
        """What is evaluated and served: the parameters, or their moving average where one is kept."""
        chosen = self.opt_state.ema if self.averages else self.trainable
        return unflatten_dict({**self.frozen, **chosen}, sep="/")

    def serving(self, params: dict[str, Any]) -> TrainState:
        """The same with other parameters (nested) to evaluate and serve."""
        flat = flatten_dict(params, sep="/")
        chosen = {path: flat[path] for path in self.trainable}
        state = self.replace(trainable=chosen, frozen={path: flat[path] for path in self.frozen})
        return state.replace(opt_state=self.opt_state._replace(ema=chosen)) if self.averages else state


def create(
    params: Any, patterns: tuple[str, ...], optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> TrainState:
    """State before the first step. `params` (nested, already sharded) are taken over, not copied."""
    train, frozen = trainable.split(flatten_dict(params, sep="/"), patterns)
    shardings = opt_shardings(optimizer, train, jax.tree.map(lambda x: x.sharding, train), mesh)
    whole = meshes.replicated(mesh)
    return TrainState(
        step=jax.device_put(jnp.int32(0), whole),
        skipped=jax.device_put(jnp.int32(0), whole),
        begun=jax.device_put(jnp.int32(0), whole),
        halted=jax.device_put(jnp.bool_(False), whole),
        trainable=train,
        frozen=frozen,
        opt_state=jax.jit(optimizer.init, out_shardings=shardings)(train),
        rng=jax.device_put(jax.random.PRNGKey(seed), whole),
    )


def resplit(
    state: TrainState, patterns: tuple[str, ...], optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The same step and PRNG with other parameters trainable, and an optimizer that begins: the next stage's. It starts
    with what was served (moving averages, where they were kept), as a run of its own would with `train.init_from`.
    Arrays are taken over, not copied."""
    train, frozen = trainable.split(flatten_dict(state.served, sep="/"), patterns)
    shardings = opt_shardings(optimizer, train, jax.tree.map(lambda x: x.sharding, train), mesh)
    return state.replace(
        begun=jax.device_put(state.step - state.skipped, meshes.replicated(mesh)),
        trainable=train,
        frozen=frozen,
        opt_state=jax.jit(optimizer.init, out_shardings=shardings)(train),
    )


def abstract(
    shapes: Any, shardings: Any, patterns: tuple[str, ...], optimizer: optax.GradientTransformation, mesh: Any
) -> TrainState:
    """What `create` would make, as jax.ShapeDtypeStruct leaves with shardings; nothing is allocated.

    Args:
      shapes, shardings: of the parameters, nested, as `parallel.mesh.abstract_params` gives them.
      mesh: theirs; an AbstractMesh will do.
    """

    def place(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    train, frozen = trainable.split(flatten_dict(jax.tree.map(place, shapes, shardings), sep="/"), patterns)
    moments = opt_shardings(optimizer, train, jax.tree.map(lambda x: x.sharding, train), mesh)
    whole, key = meshes.replicated(mesh), jax.eval_shape(lambda: jax.random.PRNGKey(0))
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        skipped=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        begun=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        halted=jax.ShapeDtypeStruct((), jnp.bool_, sharding=whole),
        trainable=train,
        frozen=frozen,
        opt_state=jax.tree.map(place, jax.eval_shape(optimizer.init, train), moments),
        rng=place(key, whole),
    )


def opt_shardings(
    optimizer: optax.GradientTransformation, params: dict[str, Any], shardings: dict[str, Any], mesh: Mesh
) -> Any:
    """Shardings of the optimizer's state: what is kept per parameter lies where it lies; counters, and sums over some
    of its axes, everywhere."""

    def place(keys: tuple[Any, ...], leaf: Any) -> Any:
        path = next((key.key for key in reversed(keys) if isinstance(key, jax.tree_util.DictKey)), None)
        same = path in params and params[path].shape == leaf.shape
        return shardings[path] if same else meshes.replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
