"""The readings that a served policy keeps between control steps."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from robovlms_jax.policies.sensors import base

log = logging.getLogger(__name__)


class Readings:
    """Of every slot the newest readings of every sensor, in the arrays that a control step takes.

    fields: `types.Inputs.sensors` and `.sensor_mask` for one frame of each slot.
    """

    def __init__(self, sensors: Sequence[base.Sensor], slots: int):
        self._sensors = tuple(sensors)
        self.fields = base.blank(self._sensors, slots, 1)
        self._starting = np.ones(slots, bool)
        self._reported: set[tuple[int, str]] = set()
        self._unknown: set[str] = set()

    def reset(self, slot: int) -> None:
        """A new episode: what was read before is forgotten with its first step."""
        self._starting[slot] = True
        self._reported -= {reported for reported in self._reported if reported[0] == slot}

    def notice(self, slot: int, names: Iterable[str]) -> None:
        """Say once of every name in an observation's sensors that the policy does not read it."""
        known = sorted({sensor.name for sensor in self._sensors} | {"proprio"})  # the state may stand here, too
        for name in sorted(set(map(str, names)) - set(known) - self._unknown):
            self._unknown.add(name)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            log.warning(
                "slot %d: observation.sensors has %r, which this policy does not read; it reads %s%s",
                *(slot, name, known, hint),
            )

    def put(self, slot: int, seen: Mapping[str, np.ndarray | None]) -> None:
        """Let one observation's readings in, as `Sensor.observe` returns them; missing ones are said once."""
        for sensor in self._sensors:
            values, mask = (self.fields[part].get(sensor.name) for part in ("sensors", "sensor_mask"))
            mask = np.ones((len(values), values.shape[1]), bool) if mask is None else mask
            reading = seen[sensor.name]
            sensor.remember(values[slot], mask[slot], reading, bool(self._starting[slot]))
            if reading is None and sensor.can_miss and (slot, sensor.name) not in self._reported:
                self._reported.add((slot, sensor.name))
                trained = "" if sensor.dropout else "; in training it was never dropped (dropout=0)"
                log.warning(
                    "slot %d: no reading of sensor %r; the policy goes on without%s", slot, sensor.name, trained
                )
        self._starting[slot] = False
