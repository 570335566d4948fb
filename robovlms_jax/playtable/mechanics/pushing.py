"""Hand, mechanisms and blocks push each other apart, and the hand takes hold of blocks."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.playtable.mechanics import bodies, contacts, gravity, vectors
from robovlms_jax.playtable.mechanics.vectors import fold
from robovlms_jax.playtable.scene import JOINTS, Boxes, Scene
from robovlms_jax.types import Array

_SWEEPS = 6  # rounds of pushing apart per substep; in the last `_YIELDING` ones the hand gives way to blocks too
_YIELDING = 3
_FRICTION = 0.5  # between hand and blocks
_STEEP = 0.35  # a joint follows a push unless it is nearly at right angles to it
_NOTHING_M = 1e-6  # what overlaps by less is not pushed: rounds end where there is nothing left to push


class _Moving(NamedTuple):
    """What pushing apart changes of a state."""

    position: Array
    rotation: Array
    width: Array
    mechanisms: Array
    block_position: Array
    block_rotation: Array

    @classmethod
    def of(cls, state: bodies.State) -> _Moving:
        """Its part of a state."""
        return cls(*(getattr(state, name) for name in cls._fields))

    def put(self, state: bodies.State) -> bodies.State:
        """A state with it."""
        return dataclasses.replace(state, **self._asdict())


class _Substep(NamedTuple):
    """What pushing apart does not change.

    way: float[2], horizontal direction in which the hand moves. least, most: float[], widths between which the fingers
    stay. free: bool[3], blocks that are not held. on_joint: float[3, 4], 1 where a block stands on what moves with a
    mechanism. on_block: float[3, 3], 1 where it stands on a block. axis: float[N, 3], along which the boxes of the
    table move.
    """

    way: Array
    least: Array
    most: Array
    free: Array
    on_joint: Array
    on_block: Array
    axis: Array


def push_apart(scene: Scene, old: bodies.State, wish: bodies.State) -> tuple[bodies.State, contacts.Contacts]:
    """Resolve the overlaps that moving the hand from `old` to `wish` makes; `old` again where that fails.

    Returns the state and its contacts (`touching`). Rounds end once no table has an overlap left; a table that has none
    is not changed by further ones, so that the other tables do not matter to it.
    """
    fixed = _substep(scene, old, wish)

    # One loop, so that XLA compiles the contacts once: in round 0 nothing is known to touch, and nothing is pushed.
    def sweep(carry: tuple) -> tuple:
        i, moving, found, _ = carry
        before = moving.put(old)
        pushed = _pushed(scene, before, found, fixed, i > _SWEEPS - _YIELDING)
        following = _ride(scene, _with_held(pushed), before, fixed)
        found = touching(scene, following)
        return i + 1, _Moving.of(following), found, _deepest(found) > _NOTHING_M

    def goes_on(carry: tuple) -> Array:
        i, _, _, overlaps = carry
        return (i <= _SWEEPS) & jnp.any(overlaps)

    begin = _Moving.of(_ride(scene, wish, old, fixed)), _none(scene, old), jnp.ones_like(old.width, bool)
    _, new, found, _ = jax.lax.while_loop(goes_on, sweep, (jnp.int32(0), *begin))
    new, found = jax.lax.cond(
        jnp.any(_deepest(found) > contacts.TOLERANCE_M),
        lambda: _unless_deeper(scene, old, new, found),
        lambda: (new, found),
    )
    return new.put(old), found


def _substep(scene: Scene, old: bodies.State, wish: bodies.State) -> _Substep:
    way = (wish.position - old.position)[:2]
    way = way / jnp.maximum(vectors.length(way), 1e-6)
    free = _free(old)
    rides = (old.support != bodies.FREE) & free
    on_joint = jnp.moveaxis(jnp.asarray(bodies.ON_JOINT)[old.support], -1, 1) * rides[:, None]
    carried_by = vectors.constant(bodies.TABLE + np.arange(3), old.width)
    on_block = ((old.support[:, None] == carried_by[None]) & rides[:, None]).astype(jnp.float32)
    on = vectors.constant(bodies.ON_JOINT[:, :, None], old.width)
    axis = sum(on[:, j] * scene.joint_axis[j] for j in range(len(JOINTS)))
    least, most = jnp.minimum(old.width, wish.width), jnp.maximum(old.width, wish.width)
    return _Substep(way, least, most, free, on_joint, on_block, axis)


def _free(state: bodies.State) -> Array:
    """bool[3]: blocks that are not held."""
    return state.held != vectors.constant(np.arange(3), state.held)


def _none(scene: Scene, state: bodies.State) -> contacts.Contacts:
    """No contact at all."""
    depth = jnp.full((bodies.HAND + 3, bodies.TABLE + 3, *state.width.shape), -1.0)
    return contacts.Contacts(depth, [jnp.zeros_like(depth)] * 3)


def _deepest(found: contacts.Contacts) -> Array:
    """float[], m."""
    return fold(jnp.maximum, fold(jnp.maximum, found.depth))


def _unless_deeper(
    scene: Scene, old: bodies.State, new: _Moving, found: contacts.Contacts
) -> tuple[_Moving, contacts.Contacts]:
    """`new` with its contacts where nothing overlaps by more than tolerance and than before, elsewhere `old`."""
    before = touching(scene, old)
    deeper = found.depth - jnp.maximum(before.depth, contacts.TOLERANCE_M)
    fits = fold(jnp.maximum, fold(jnp.maximum, deeper)) <= 0
    return jax.tree.map(lambda a, b: jnp.where(fits, a, b), (new, found), (_Moving.of(old), before))


def _pushed(
    scene: Scene, state: bodies.State, found: contacts.Contacts, fixed: _Substep, yields: Array
) -> bodies.State:
    """One round. yields: True = blocks that did not move away stop the hand."""
    signed = jnp.where(found.depth > _NOTHING_M, found.depth, jnp.minimum(found.depth, 0.0))
    opening = _push_fingers(state, found._replace(depth=signed))
    found = found._replace(depth=jnp.maximum(signed, 0.0))
    mechanisms, left = _push_mechanisms(scene, state, found, fixed)
    position, rotation = _push_blocks(scene, state, found, fixed)
    return dataclasses.replace(
        state,
        position=state.position + _push_hand(found._replace(depth=left), fixed, yields),
        width=jnp.clip(state.width + opening, fixed.least, fixed.most),
        mechanisms=mechanisms,
        block_position=position,
        block_rotation=rotation,
    )


def touching(scene: Scene, state: bodies.State) -> contacts.Contacts:
    """Contacts [7, N + 3] of fingers, palm, wrist and blocks (rows) with table boxes and blocks (columns).

    Pairs that may overlap (the hand and what it holds, a block and itself) are 1 m apart.
    """
    hand, blocks, columns = bodies.hand_boxes(state), bodies.block_boxes(scene, state), bodies.columns(scene, state)
    by_hand, by_blocks = contacts.between(_turning_together(hand), columns), contacts.between(blocks, columns)
    of_held = jnp.where(_free(state), by_hand.depth[:, bodies.TABLE :], -1.0)
    same = vectors.constant(np.eye(3, bodies.TABLE + 3, bodies.TABLE, dtype=bool), state.width)
    depth = jnp.concatenate([by_hand.depth[:, : bodies.TABLE], of_held], axis=1)
    depth = jnp.concatenate([depth, jnp.where(same, -1.0, by_blocks.depth)])
    normal = [jnp.concatenate(parts) for parts in zip(by_hand.normal, by_blocks.normal, strict=True)]
    return contacts.Contacts(*jax.lax.optimization_barrier((depth, normal)))


def _turning_together(hand: Boxes) -> Boxes:
    """The boxes of the hand with one rotation [1, 3, 3]."""
    return dataclasses.replace(hand, rotation=hand.rotation[:1])


def _with_held(state: bodies.State) -> bodies.State:
    """Moves the held block along with the hand."""
    free = _free(state)[:, None]
    position = state.position + vectors.apply(state.rotation, state.hold_position)
    rotation = vectors.multiply(state.rotation, state.hold_rotation)
    return dataclasses.replace(
        state,
        block_position=jnp.where(free, state.block_position, position),
        block_rotation=jnp.where(free[:, None], state.block_rotation, rotation),
    )


def _ride(scene: Scene, state: bodies.State, before: bodies.State, fixed: _Substep) -> bodies.State:
    """Blocks follow what they stand on, which is elsewhere than `before`."""
    slid, moved = state.mechanisms - before.mechanisms, state.block_position - before.block_position
    shift = sum(fixed.on_joint[:, j, None] * slid[j] * scene.joint_axis[j] for j in range(len(JOINTS)))
    shift = shift + sum(fixed.on_block[:, i, None] * moved[i] for i in range(3))
    # a block on a block on the moving thing: pass the shift on once more
    shift = shift + sum(fixed.on_block[:, i, None] * shift[i] for i in range(3))
    return dataclasses.replace(state, block_position=state.block_position + shift)


def _push_mechanisms(
    scene: Scene, state: bodies.State, found: contacts.Contacts, fixed: _Substep
) -> tuple[Array, Array]:
    """New joint values float[4], and the depth [7, N + 3] that is left for the hand to resolve: that of what moves as
    the hand commands, the hand and what it holds (0 in other rows)."""
    driven = jnp.concatenate([jnp.ones_like(found.depth[: bodies.HAND, 0]), jnp.where(fixed.free, 0.0, 1.0)])
    depth = found.depth * driven[:, None]
    table, on = depth[:, : bodies.TABLE], vectors.constant(bodies.ON_JOINT, state.width)
    along = -sum(found.normal[k][:, : bodies.TABLE] * fixed.axis[:, k] for k in range(3))
    follows = jnp.abs(along) > _STEEP
    wanted = jax.lax.optimization_barrier(jnp.where(follows, table / jnp.where(follows, along, 1.0), 0.0))
    highest, lowest = (fold(operation, wanted)[:, None] * on for operation in (jnp.maximum, jnp.minimum))
    change = fold(jnp.maximum, highest) + fold(jnp.minimum, lowest)
    mechanisms = jnp.clip(state.mechanisms + change, 0.0, scene.joint_range)
    slid = mechanisms - state.mechanisms
    gained = jnp.where(follows & (table > 0), along, 0.0) * sum(on[:, j] * slid[j] for j in range(len(JOINTS)))
    return mechanisms, jnp.concatenate([jnp.maximum(table - gained, 0.0), depth[:, bodies.TABLE :]], axis=1)


def _push_blocks(scene: Scene, state: bodies.State, found: contacts.Contacts, fixed: _Substep) -> tuple[Array, Array]:
    """New block positions [3, 3] and rotations [3, 3, 3]: the average push, weighted by depth."""
    bodily = fold(jnp.add, _by_bodies(scene, state, found, fixed), 2)
    weight, x, y, up = fold(jnp.add, _by_walls(found), 2) + bodily[:4]
    yaw = bodily[4]
    scale = jnp.where(fixed.free, 1 / jnp.maximum(weight, 1e-9), 0.0)
    shift = jnp.stack([x * scale, y * scale, up * scale], axis=1)
    cosine, sine = jnp.cos(yaw * scale)[:, None], jnp.sin(yaw * scale)[:, None]
    first, second, third = (state.block_rotation[:, k] for k in range(3))
    rotation = jnp.stack([cosine * first - sine * second, sine * first + cosine * second, third], axis=1)
    return state.block_position + shift, rotation


def _sideways(touch: contacts.Contacts) -> tuple[Array, Array, Array, Array, Array]:
    """x, y, distance of the way out along the table, whether it leads up instead, and how much it counts."""
    (x, y, z), depth = touch.normal, touch.depth
    flat = jnp.sqrt(x**2 + y**2)
    sideways = flat >= 0.5
    up = ~sideways & (z > 0)  # nothing pushes a block down: it already lies on something
    steep = jnp.maximum(flat, 0.5)
    return x / steep, y / steep, jnp.where(sideways, depth / steep, 0.0), up, jnp.where(sideways | up, depth, 0.0)


def _weighed(weight: Array, *pushes: Array) -> Array:
    """float[4 or 5, 3, K]: the weight, and its products with x, y, up (m) and yaw (rad)."""
    return jax.lax.optimization_barrier(jnp.stack([weight, *(weight * push for push in pushes)]))


def _by_walls(found: contacts.Contacts) -> Array:
    """How walls push the blocks, `_weighed`: they stop them, but do not turn them."""
    touch = jax.tree.map(lambda x: x[bodies.HAND :, : bodies.TABLE], found)
    x, y, distance, up, weight = _sideways(touch)
    return _weighed(weight, x * distance, y * distance, jnp.where(up, touch.depth, 0.0))


def _by_bodies(scene: Scene, state: bodies.State, found: contacts.Contacts, fixed: _Substep) -> Array:
    """How the other blocks and the hand push the blocks, `_weighed`, K = 7; friction lets a block follow the hand along
    the contact."""
    touch, (point_x, point_y) = _of_bodies(scene, state, found, fixed)
    x, y, distance, up, weight = _sideways(touch)
    by_hand = vectors.constant(np.array([*[1] * bodies.HAND, 0, 0, 0], np.float32), state.width)
    forward, aside = x * fixed.way[0] + y * fixed.way[1], x * fixed.way[1] - y * fixed.way[0]
    slip = by_hand * jnp.clip(aside / jnp.maximum(forward, 0.1), -_FRICTION, _FRICTION)
    x, y = x - slip * y, y + slip * x
    # Quasi-static sliding: force and moment limits form an ellipsoid (Goyal et al. 1991), here with the moment arm
    # `radius` of a uniformly loaded face, so a push beside the centre turns the block as it shifts it.
    arm_x, arm_y = point_x - state.block_position[:, 0, None], point_y - state.block_position[:, 1, None]
    lever = arm_x * y - arm_y * x
    vertical = gravity.height_of(state.block_rotation, scene.block_half)
    radius_sq = (sum(scene.block_half[:, k] ** 2 for k in range(3)) - vertical**2)[:, None] / 3
    give = distance * radius_sq / (radius_sq + lever**2)
    return _weighed(weight, x * give, y * give, jnp.where(up, touch.depth, 0.0), give * lever / radius_sq)


def _of_bodies(
    scene: Scene, state: bodies.State, found: contacts.Contacts, fixed: _Substep
) -> tuple[contacts.Contacts, list[Array]]:
    """Contacts [3, 7] of the blocks with the hand and with each other, and where: x, y."""
    depth, normal = jax.tree.map(lambda x: x[:, bodies.TABLE :], found)
    points = contacts.points(bodies.rows(scene, state), bodies.block_boxes(scene, state), normal)
    share = jnp.where(fixed.free, 0.5, 1.0)

    # the hand's contacts the other way round
    def turned(x: Array, sign: float = 1.0, share: Array | float = 1.0) -> Array:
        hand, blocks = x[: bodies.HAND], x[bodies.HAND :]
        return jnp.concatenate([sign * jnp.swapaxes(hand, 0, 1), blocks * share], axis=1)

    return contacts.Contacts(turned(depth, share=share), [turned(n, -1.0) for n in normal]), [turned(p) for p in points]


def _push_hand(left: contacts.Contacts, fixed: _Substep, yields: Array) -> Array:
    """How far the hand has to move [3]. yields: True = blocks that did not move away stop the hand."""
    pressed = left.normal[2][:, bodies.TABLE :] > 0.866  # the block is below and cannot sink
    blocks = jnp.where((yields | pressed) & fixed.free, left.depth[:, bodies.TABLE :], 0.0)
    depth = jnp.concatenate([left.depth[:, : bodies.TABLE], blocks], axis=1)
    terms = jax.lax.optimization_barrier(jnp.stack([depth, *(depth**2 * n for n in left.normal)]))
    weight, *shift = fold(jnp.add, fold(jnp.add, terms, 1), 1)
    return jnp.stack(shift) / jnp.maximum(weight, 1e-9)


def _push_fingers(state: bodies.State, found: contacts.Contacts) -> Array:
    """How far the fingers have to open (+) because both press on one thing between them, or close (-) because both
    press on things outside. A single finger does not give way: the hand shifts, or the thing. Depths are signed here.
    """
    outwards = sum(found.normal[k][:2] * state.rotation[k, 1] for k in range(3))
    outwards = outwards * vectors.constant(bodies.FINGER_SIDE[:2, None], state.width)
    depth = found.depth[:2]
    inside = fold(jnp.maximum, fold(jnp.add, jnp.where(outwards > 0.5, depth, -1.0)))
    outside = fold(jnp.add, fold(jnp.maximum, jnp.where(outwards < -0.5, depth, -1.0), 1))
    return jnp.maximum(inside, 0.0) - jnp.maximum(outside, 0.0)


def grasp(state: bodies.State, found: contacts.Contacts) -> bodies.State:
    """Take hold of a block that both fingers touch while they close."""
    inverse = vectors.transposed(state.rotation)
    between = vectors.apply(inverse[None], state.block_position - state.position, 1)  # in the tool's frame
    first, second = (found.depth[i, bodies.TABLE :] > -contacts.TOUCH_M for i in range(2))
    touch = first & second & (jnp.abs(between[:, 1]) < state.width / 2)
    candidate = jnp.where(touch[0], 0, jnp.where(touch[1], 1, 2)).astype(jnp.int32)
    takes = (touch[0] | touch[1] | touch[2]) & (state.held == bodies.FREE) & (state.command < 0)
    taken = takes & (candidate == vectors.constant(np.arange(3), state.held))

    def of_taken(new: Array, old: Array) -> Array:
        for i in range(3):
            old = jnp.where(taken[i], new[i], old)
        return old

    return dataclasses.replace(
        state,
        held=jnp.where(takes, candidate, state.held),
        hold_position=of_taken(between, state.hold_position),
        hold_rotation=of_taken(vectors.multiply(inverse[None], state.block_rotation, 1), state.hold_rotation),
        support=jnp.where(taken, bodies.FREE, state.support),
    )
