"""Hand, mechanisms and blocks push each other apart, and the hand takes hold of blocks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.actions import rotations
from robovlms_jax.playtable.mechanics import bodies, contacts
from robovlms_jax.playtable.scene import Scene
from robovlms_jax.types import Array

_SWEEPS = 6  # rounds of pushing apart per substep; in the last `_YIELDING` ones the hand gives way to blocks too
_YIELDING = 3
_FRICTION = 0.5  # between hand and blocks
_STEEP = 0.35  # a joint follows a push unless it is nearly at right angles to it


def push_apart(scene: Scene, old: bodies.State, wish: bodies.State) -> tuple[bodies.State, Array]:
    """Resolve the overlaps that moving the hand from `old` to `wish` makes; `old` again where that fails.

    Returns the state and the depths of its contacts (`touching`).
    """
    way = (wish.position - old.position)[:2]
    way = way / jnp.maximum(jnp.linalg.norm(way), 1e-6)
    least, most = jnp.minimum(old.width, wish.width), jnp.maximum(old.width, wish.width)

    # One loop, so that XLA compiles the contacts once: round 0 looks at `old`, the last one only at the result.
    def sweep(i, carry):
        state, ridden, before, _ = carry
        state, ridden = _ride(scene, _with_held(state), ridden)
        found = touching(scene, state)
        depth = found.depth
        opening = _push_fingers(state, found)
        found = found._replace(depth=jnp.maximum(depth, 0.0))
        mechanisms, left = _push_mechanisms(scene, state, found)
        position, rotation = _push_blocks(scene, state, found, way)
        shift = _push_hand(state, found._replace(depth=left), i > _SWEEPS - _YIELDING)
        pushed = dataclasses.replace(
            state,
            position=state.position + shift,
            width=jnp.clip(state.width + opening, least, most),
            mechanisms=mechanisms,
            block_position=position,
            block_rotation=rotation,
        )
        following = jax.tree.map(
            lambda first, middle, last: jnp.where(i == 0, first, jnp.where(i <= _SWEEPS, middle, last)),
            wish,
            pushed,
            state,
        )
        return following, ridden, jnp.where(i == 0, depth, before), depth

    nothing = jnp.full((bodies.HAND + 3, bodies.TABLE + 3), -1.0)
    carry = (old, bodies.columns(scene, old).center, nothing, nothing)
    new, _, before, depth = jax.lax.fori_loop(0, _SWEEPS + 2, sweep, carry)
    fits = jnp.all(depth <= jnp.maximum(before, contacts.TOLERANCE_M))
    return jax.tree.map(lambda a, b: jnp.where(fits, a, b), (new, depth), (old, before))


def touching(scene: Scene, state: bodies.State) -> contacts.Contacts:
    """Contacts [7, N + 3] of fingers, palm, wrist and blocks (rows) with table boxes and blocks (columns).

    Pairs that may overlap (the hand and what it holds, a block and itself) are 1 m apart.
    """
    found = contacts.between(bodies.rows(scene, state), bodies.columns(scene, state))
    return found._replace(depth=_masked(state, found.depth))


def _masked(state: bodies.State, depth: Array) -> Array:
    """`depth` [7, N + 3] with -1 for pairs that may overlap: a block and itself, the hand and the block it holds."""
    same = np.zeros((bodies.HAND + 3, bodies.TABLE + 3), bool)
    same[bodies.HAND :, bodies.TABLE :] = np.eye(3, dtype=bool)
    held = jnp.arange(3) == state.held
    in_hand = jnp.zeros_like(jnp.asarray(same)).at[: bodies.HAND, bodies.TABLE :].set(held[None])
    return jnp.where(jnp.asarray(same) | in_hand, -1.0, depth)


def _with_held(state: bodies.State) -> bodies.State:
    """Moves the held block along with the hand."""
    held = (jnp.arange(3) == state.held)[:, None]
    position = state.position + contacts.apply(state.rotation, state.hold_position)
    rotation = state.rotation @ state.hold_rotation
    return dataclasses.replace(
        state,
        block_position=jnp.where(held, position, state.block_position),
        block_rotation=jnp.where(held[..., None], rotation, state.block_rotation),
    )


def _ride(scene: Scene, state: bodies.State, ridden: Array) -> tuple[bodies.State, Array]:
    """Blocks follow what they stand on. ridden: float[N + 3, 3], where everything was when they last did."""
    free = state.held != jnp.arange(3)
    rides = (state.support != bodies.FREE) & free
    now = bodies.columns(scene, state).center
    shift = jnp.where(rides[:, None], (now - ridden)[state.support], 0.0)
    # a block on a block on the moving thing: pass the shift on once more
    below = state.support - bodies.TABLE
    shift = shift + jnp.where((rides & (below >= 0))[:, None], shift[jnp.maximum(below, 0)], 0.0)
    state = dataclasses.replace(state, block_position=state.block_position + shift)
    return state, bodies.columns(scene, state).center


def _driven(state: bodies.State) -> Array:
    """bool[7]: rows that move as the hand commands: the hand and what it holds."""
    return jnp.concatenate([jnp.ones(bodies.HAND, bool), jnp.arange(3) == state.held])


def _push_mechanisms(scene: Scene, state: bodies.State, found: contacts.Contacts) -> tuple[Array, Array]:
    """New joint values float[4], and the depth [7, N + 3] that is left for the hand to resolve (0 in other rows)."""
    pushing = jnp.where(_driven(state)[:, None], found.depth, 0.0)
    axis = (jnp.asarray(bodies.ON_JOINT)[:, :, None] * scene.joint_axis).sum(1)  # [N, 3]
    along = -sum(found.normal[k][:, : bodies.TABLE] * axis[:, k] for k in range(3))
    follows = jnp.abs(along) > _STEEP
    wanted = jnp.where(follows, pushing[:, : bodies.TABLE] / jnp.where(follows, along, 1.0), 0.0)
    change = (wanted.max(0)[:, None] * bodies.ON_JOINT).max(0) + (wanted.min(0)[:, None] * bodies.ON_JOINT).min(0)
    mechanisms = jnp.clip(state.mechanisms + change, 0.0, scene.joint_range)
    gained = along * (jnp.asarray(bodies.ON_JOINT) * (mechanisms - state.mechanisms)).sum(-1)
    left = pushing[:, : bodies.TABLE] - jnp.where(follows & (pushing[:, : bodies.TABLE] > 0), gained, 0.0)
    return mechanisms, jnp.concatenate([jnp.maximum(left, 0.0), pushing[:, bodies.TABLE :]], axis=1)


def _push_blocks(scene: Scene, state: bodies.State, found: contacts.Contacts, way: Array) -> tuple[Array, Array]:
    """New block positions [3, 3] and rotations [3, 3, 3]: the average push, weighted by depth.

    way: float[2], horizontal direction in which the hand moves; friction lets a block follow it along the contact.
    """
    free = state.held != jnp.arange(3)
    share = jnp.concatenate([jnp.ones(bodies.TABLE), jnp.where(free, 0.5, 1.0)])

    # by walls and other blocks (row = the block), then by the hand (column = the block)
    def merge(own, hand):
        return jnp.concatenate([own[bodies.HAND :], hand[: bodies.HAND, bodies.TABLE :].T], axis=1)

    depth = merge(found.depth * share, found.depth)
    x, y, z = (merge(n, -n) for n in found.normal)
    point = [merge(p, p) for p in found.point]
    # walls stop a block, but do not turn it
    turns = np.concatenate([np.zeros(bodies.TABLE), np.ones(3 + bodies.HAND)]).astype(np.float32)
    by_hand = np.concatenate([np.zeros(bodies.TABLE + 3), np.ones(bodies.HAND)]).astype(np.float32)

    flat = jnp.sqrt(x**2 + y**2)
    sideways = flat >= 0.5
    up = ~sideways & (z > 0)  # nothing pushes a block down: it already lies on something
    steep = jnp.maximum(flat, 0.5)
    x, y, distance = x / steep, y / steep, jnp.where(sideways, depth / steep, 0.0)
    forward, aside = x * way[0] + y * way[1], x * way[1] - y * way[0]
    slip = by_hand * jnp.clip(aside / jnp.maximum(forward, 0.1), -_FRICTION, _FRICTION)
    x, y = x - slip * y, y + slip * x
    # Quasi-static sliding: force and moment limits form an ellipsoid (Goyal et al. 1991), here with the moment arm
    # `radius` of a uniformly loaded face, so a push beside the centre turns the block as it shifts it.
    arm_x, arm_y = point[0] - state.block_position[:, 0, None], point[1] - state.block_position[:, 1, None]
    lever = turns * (arm_x * y - arm_y * x)
    vertical = contacts.apply(jnp.abs(state.block_rotation), scene.block_half)[:, 2]
    radius_sq = ((scene.block_half**2).sum(-1) - vertical**2)[:, None] / 3
    give = distance * radius_sq / (radius_sq + lever**2)
    weight = jnp.where(sideways | up, depth, 0.0)
    weight = weight / jnp.maximum(weight.sum(1, keepdims=True), 1e-9)
    push = (x * give, y * give, jnp.where(up, depth, 0.0), give * lever / radius_sq)
    *shift, yaw = ((weight * amount).sum(1) for amount in push)
    shift = jnp.stack(shift, axis=-1)
    shift, yaw = jnp.where(free[:, None], shift, 0.0), jnp.where(free, yaw, 0.0)
    turn = rotations.from_axis_angle(jnp.stack([jnp.zeros(3), jnp.zeros(3), yaw], axis=-1))
    return state.block_position + shift, turn @ state.block_rotation


def _push_hand(state: bodies.State, found: contacts.Contacts, yields: Array) -> Array:
    """How far the hand has to move [3]. yields: True = blocks that did not move away stop the hand."""
    free = state.held != jnp.arange(3)
    pressed = found.normal[2][:, bodies.TABLE :] > 0.866  # the block is below and cannot sink
    blocks = jnp.where((yields | pressed) & free, found.depth[:, bodies.TABLE :], 0.0)
    depth = jnp.concatenate([found.depth[:, : bodies.TABLE], blocks], axis=1)
    return jnp.stack([(depth**2 * n).sum() for n in found.normal]) / jnp.maximum(depth.sum(), 1e-9)


def _push_fingers(state: bodies.State, found: contacts.Contacts) -> Array:
    """How far the fingers have to open (+) because both press on one thing between them, or close (-) because both
    press on things outside. A single finger does not give way: the hand shifts, or the thing. Depths are signed here.
    """
    outwards = sum(found.normal[k][:2] * state.rotation[k, 1] for k in range(3)) * bodies.FINGER_SIDE[:2, None]
    inside = jnp.where(outwards > 0.5, found.depth[:2], -1.0).sum(0).max()
    outside = jnp.where(outwards < -0.5, found.depth[:2], -1.0).max(1).sum()
    return jnp.maximum(inside, 0.0) - jnp.maximum(outside, 0.0)


def grasp(state: bodies.State, depth: Array) -> bodies.State:
    """Take hold of a block that both fingers touch while they close."""
    # in the tool's frame
    between = contacts.apply(jnp.swapaxes(state.rotation, 0, 1), state.block_position - state.position)  # [3, 3]
    touch = jnp.all(depth[:2, bodies.TABLE :] > -contacts.TOUCH_M, axis=0) & (jnp.abs(between[:, 1]) < state.width / 2)
    candidate = jnp.argmax(touch)
    takes = touch.any() & (state.held == bodies.FREE) & (state.command < 0)
    return dataclasses.replace(
        state,
        held=jnp.where(takes, candidate.astype(jnp.int32), state.held),
        hold_position=jnp.where(takes, between[candidate], state.hold_position),
        hold_rotation=jnp.where(takes, state.rotation.T @ state.block_rotation[candidate], state.hold_rotation),
        support=jnp.where(takes & (jnp.arange(3) == candidate), bodies.FREE, state.support),
    )
