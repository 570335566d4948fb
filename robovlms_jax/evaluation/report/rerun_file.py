"""Episodes as an .rrd file for the Rerun viewer (rerun.io): pictures and curves under one cursor, a tab an episode.

`pip install rerun-sdk` brings the viewer along: `rerun FILE.rrd`. Imported when a file is written.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from robovlms_jax import extras
from robovlms_jax.evaluation.report import player

_QUALITY = 90
"""JPEG quality of pictures; they are a sixth of their size."""


def require() -> Any:
    """The package rerun. Raises ImportError that says what to install."""
    try:
        import rerun
        import rerun.blueprint
    except ImportError as error:
        raise ImportError(
            f".rrd files need the package rerun-sdk ({error}): {extras.install('rerun')}, or leave the option out."
        ) from error
    return rerun


def write(path: str | os.PathLike[str], name: str, episodes: Sequence[player.Episode]) -> pathlib.Path:
    """Write one recording, what did not go well first, as on the page. Returns its path.

    Everything of an episode lies below /episode_NNNN: camera/NAME, curves/PANEL/LINE, and `about` with its sentence,
    outcome and, where known, `success`. Two timelines, `step` and `time` in seconds, begin anew with every episode.

    Args:
      name: of the recording.
    Raises:
      ImportError: there is no rerun-sdk. ValueError: another suffix than .rrd. OSError: it cannot be written.
    """
    rerun, path = require(), require_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(episodes, key=lambda episode: episode.good)
    with rerun.RecordingStream("robovlms_jax") as recording:
        recording.save(path, rerun.blueprint.Blueprint(_tabs(rerun.blueprint, ordered)))
        recording.send_recording_name(name)
        for number, episode in enumerate(ordered):
            _log(rerun, recording, _root(number), episode)
        recording.flush()
    return path


def check(path: str | os.PathLike[str]) -> None:
    """Whether a file that is asked for ("": none is) can be written in the end, before the work whose end it is.

    Raises ImportError, ValueError as `write` does.
    """
    if path:
        require()
        require_suffix(path)


def require_suffix(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path. Raises ValueError for one that the viewer would not open."""
    path = pathlib.Path(path)
    if path.suffix != ".rrd":
        raise ValueError(f"{path}: the viewer opens files that end in .rrd; name it so.")
    return path


def _root(number: int) -> str:
    return f"episode_{number:04d}"


def _part(text: str) -> str:
    """As a part of an entity's path, which has characters of its own."""
    return "".join(letter if letter.isalnum() else "_" for letter in text).strip("_") or "_"


def _tabs(blueprint: Any, episodes: Sequence[player.Episode]) -> Any:
    tabs = []
    for number, episode in enumerate(episodes):
        root = _root(number)
        cameras = [
            blueprint.Spatial2DView(origin=f"{root}/camera/{_part(camera)}", name=camera) for camera in episode.pictures
        ]
        curves = [
            blueprint.TimeSeriesView(origin=f"{root}/curves/{_part(panel.title)}", name=panel.title)
            for panel in episode.panels
        ]
        about = blueprint.TextDocumentView(origin=f"{root}/about", name="about")
        left = blueprint.Vertical(about, *cameras, row_shares=[1, *([3] * len(cameras))])
        columns = (left, blueprint.Vertical(*curves)) if curves else (left,)
        tabs.append(blueprint.Horizontal(*columns, name=f"{number}: {episode.title or '(blank)'}"))
    return blueprint.Tabs(*tabs)


def _log(rerun: Any, recording: Any, root: str, episode: player.Episode) -> None:
    words = f"{episode.title or '(blank)'}\n\n{episode.outcome}".strip()
    known = {} if episode.success is None else {"success": episode.success}
    about = rerun.AnyValues(instruction=episode.title, outcome=episode.outcome, **known)
    recording.log(f"{root}/about", rerun.TextDocument(words), about, static=True)
    for panel in episode.panels:
        for line, values in panel.lines.items():
            values = np.asarray(values, np.float64)
            steps = np.flatnonzero(np.isfinite(values))  # a gap has no value
            place = f"{root}/curves/{_part(panel.title)}/{_part(line)}"
            recording.log(place, rerun.SeriesLines(names=line), static=True)
            if len(steps):
                times = (
                    rerun.TimeColumn("step", sequence=steps),
                    rerun.TimeColumn("time", duration=steps / episode.rate),
                )
                recording.send_columns(place, times, rerun.Scalars.columns(scalars=values[steps]))
    for camera, pictures in episode.pictures.items():
        for step, picture in zip(episode.at, pictures, strict=True):
            recording.set_time("step", sequence=int(step))
            recording.set_time("time", duration=float(step) / episode.rate)
            place = f"{root}/camera/{_part(camera)}"
            # Without a picture the viewer would go on showing the one before.
            seen = rerun.Clear(recursive=False) if picture is None else rerun.Image(picture).compress(_QUALITY)
            recording.log(place, seen)
