"""Other looks of the real simulator's table (`envs.looks`), by PyBullet's own calls; physics stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from robovlms_jax.envs import looks

_WOODEN = ("base_link", "drawer_link", "plank_link", "slide_link")


class Dressing:
    """What was changed about a simulator, so that the next look begins from the usual one.

    Args:
      env: calvin_env's PlayTableSimEnv. cameras: its cameras, the static one first.
    """

    def __init__(self, env: Any, cameras: Sequence[Any]):
        self._env, self._camera = env, cameras[0]
        self._usual_view = cameras[0].viewMatrix
        self._things: list[int] = []
        self._usual_colors: dict[tuple[int, int], tuple[float, ...]] = {}

    def wear(self, look: looks.Look) -> None:
        """Change the look. Raises ValueError: a part that this simulator does not offer."""
        usual = looks.Look()
        if (look.light, look.brightness, look.tint) != (usual.light, usual.brightness, usual.tint):
            raise ValueError(f"the real CALVIN cannot be lit otherwise: {looks.WHY_NOT['lighting']}.")
        self._undo()
        p, client = self._env.p, self._env.cid
        if (look.eye_shift_m, look.target_shift_m) != (usual.eye_shift_m, usual.target_shift_m):
            self._camera.viewMatrix = p.computeViewMatrix(
                cameraEyePosition=[float(x) for x in np.add(self._camera.look_from, look.eye_shift_m)],
                cameraTargetPosition=[float(x) for x in np.add(self._camera.look_at, look.target_shift_m)],
                cameraUpVector=self._camera.up_vector,
            )
        if look.wood is not None:
            self._paint(look.wood)
        for thing in look.things:
            shape = p.createVisualShape(
                p.GEOM_BOX, halfExtents=thing.half, rgbaColor=[*thing.color, 1.0], physicsClientId=client
            )
            body = p.createMultiBody(
                baseMass=0.0, baseVisualShapeIndex=shape, basePosition=thing.center, physicsClientId=client
            )
            self._things.append(body)

    def _paint(self, wood: looks.Triple) -> None:
        """Colour table and cabinet; the texture stays and is multiplied by it."""
        p, client = self._env.p, self._env.cid
        table = self._env.get_info()["scene_info"]["fixed_objects"]["table"]
        wooden = {table["links"][name] for name in _WOODEN if name in table["links"]}
        for shape in p.getVisualShapeData(table["uid"], physicsClientId=client):
            body, link, color = shape[0], shape[1], shape[7]
            if link in wooden:
                self._usual_colors.setdefault((body, link), color)
                p.changeVisualShape(body, link, rgbaColor=[*wood, 1.0], physicsClientId=client)

    def _undo(self) -> None:
        p, client = self._env.p, self._env.cid
        self._camera.viewMatrix = self._usual_view
        for body in self._things:
            p.removeBody(body, physicsClientId=client)
        for (body, link), color in self._usual_colors.items():
            p.changeVisualShape(body, link, rgbaColor=color, physicsClientId=client)
        self._things, self._usual_colors = [], {}
