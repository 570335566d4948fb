"""Films of rollouts: GIF or MP4, single frames, and strips of several rollouts under each other.

Pillow is imported when something is drawn.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from robovlms_jax.control import robot as robots
from robovlms_jax.evaluation.report import fonts, tables
from robovlms_jax.evaluation.rollout import Recording

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

_PANEL = 240
_MARGIN = 12


def write_film(recording: Recording, path: str | pathlib.Path, *, max_frames: int = 160, fps: int = 12) -> pathlib.Path:
    """A film of a trial: cameras, instruction, and the action as bars.

    Args:
      path: file without suffix; a GIF is written, or an MP4 where imageio-ffmpeg is installed.
      max_frames: longer films skip frames evenly.
    Returns:
      The file written.
    """
    if not recording.frames:
        raise ValueError(f"the recording of trial {recording.trial.index} has no frames.")
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    keep = np.unique(np.linspace(0, len(recording.frames) - 1, max_frames).round().astype(int))
    if importlib.util.find_spec("imageio_ffmpeg"):
        return _write_mp4(recording, keep, path.with_suffix(".mp4"), fps)
    return _write_gif(recording, keep, path.with_suffix(".gif"), fps)


def _write_gif(recording: Recording, keep: np.ndarray, path: pathlib.Path, fps: int) -> pathlib.Path:
    from PIL import Image

    # One palette for the whole film, so that colours do not flicker; from frames all over it, since lights come on
    # under way; and not by median cut, which loses small saturated things like blocks.
    drawn = [draw_frame(recording, int(index)) for index in keep]
    samples = np.vstack(drawn[:: max(len(keep) // 6, 1)])
    palette = Image.fromarray(samples).quantize(255, Image.Quantize.MAXCOVERAGE)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in drawn)
    durations = [1000 // fps] * len(rest) + [1500]
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)
    return path


def _write_mp4(recording: Recording, keep: np.ndarray, path: pathlib.Path, fps: int) -> pathlib.Path:
    import imageio_ffmpeg

    size = draw_frame(recording, 0).size
    with contextlib.closing(imageio_ffmpeg.write_frames(str(path), size, fps=fps, macro_block_size=2)) as writer:
        writer.send(None)
        for index in keep:
            writer.send(draw_frame(recording, int(index)).tobytes())
    return path


def draw_frame(recording: Recording, index: int) -> Image:
    """One frame of a film: cameras side by side, below them the instruction, progress and the action. In place of the
    first camera, what people are shown (`Frame.shown`)."""
    from PIL import Image, ImageDraw, ImageFont

    frame = recording.frames[index]
    cameras = [frame.shown, *list(frame.observation.images.values())[1:]]
    width = _MARGIN + (_PANEL + _MARGIN) * max(len(cameras), 2)
    canvas = Image.new("RGB", (width, _PANEL + 2 * _MARGIN + 112), "white")
    draw = ImageDraw.Draw(canvas)
    for number, pixels in enumerate(cameras):
        image = Image.fromarray(np.asarray(pixels))
        scale = _PANEL / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        canvas.paste(image, (_MARGIN + number * (_PANEL + _MARGIN), _MARGIN))

    top = _PANEL + 2 * _MARGIN
    total = len(recording.trial.tasks)
    draw.text((_MARGIN, top), *_fit(frame.instruction, width - 2 * _MARGIN, 17))
    status, color = f"task {frame.task + 1} of {total}, step {frame.step}", "#555555"
    if index == len(recording.frames) - 1:
        success = recording.result.success[-1]
        status, color = f"{status}: {'solved' if success else 'failed'}", tables.BLUE if success else tables.RED
    small = ImageFont.load_default(12)
    draw.text((_MARGIN, top + 24), status, color, small)
    about = f"{recording.env}, trial {recording.trial.index}"
    draw.text((width - _MARGIN, top + 24), about, "#555555", small, anchor="ra")
    _draw_action(draw, frame.action, (_MARGIN, top + 46, width - _MARGIN, top + 94), small, recording.robot)
    return canvas


def draw_strips(recordings: Sequence[Recording], *, frames: int = 5) -> Image:
    """One row per rollout: what people are shown (`Frame.shown`) from its first frame to its last, under instruction
    and outcome."""
    from PIL import Image, ImageDraw, ImageFont

    panel, head = 168, 26
    width = _MARGIN + frames * (panel + 4)
    canvas = Image.new("RGB", (width + _MARGIN, len(recordings) * (panel + head + 6) + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    small = ImageFont.load_default(12)
    for row, recording in enumerate(recordings):
        top = 6 + row * (panel + head + 6)
        success = recording.result.success[-1]
        outcome = f"{'solved' if success else 'failed'} after {recording.result.steps[-1]} steps, {recording.env}"
        draw.text((_MARGIN, top), *_fit(recording.frames[-1].instruction, width - 220, 15))
        draw.text((width, top + 3), outcome, tables.BLUE if success else tables.RED, small, anchor="ra")
        for column, index in enumerate(np.linspace(0, len(recording.frames) - 1, frames).round().astype(int)):
            image = Image.fromarray(recording.frames[index].shown).resize((panel, panel), Image.Resampling.BICUBIC)
            canvas.paste(image, (_MARGIN + column * (panel + 4), top + head))
    return canvas


def draw_pairs(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], said: Sequence[tuple[str, str]] = ()) -> Image:
    """Pictures as stored (above) and as training sees them (below), a row of pairs per camera; then a line per column
    with its sentence, as stored and, where it is another, as training has it.

    Args:
      pairs: camera -> (uint8[n, height, width, 3], uint8[n, size, size, 3]).
      said: the n sentences, as stored and in training.
    """
    from PIL import Image, ImageDraw, ImageFont

    panel, head = 168, 26
    columns = max(len(stored) for stored, _ in pairs.values())
    below = len(pairs) * (2 * (panel + 4) + head)
    width = columns * (panel + 4)
    canvas = Image.new("RGB", (2 * _MARGIN + width, below + 20 * len(said) + _MARGIN), "white")
    for row, (camera, both) in enumerate(pairs.items()):
        top = 6 + row * (2 * (panel + 4) + head)
        text = f"{camera}: as stored, and as training sees it"
        ImageDraw.Draw(canvas).text((_MARGIN, top), text, "black", ImageFont.load_default(14))
        for line, pictures in enumerate(both):
            for column, pixels in enumerate(pictures):
                image = Image.fromarray(np.asarray(pixels)).resize((panel, panel), Image.Resampling.BICUBIC)
                canvas.paste(image, (_MARGIN + column * (panel + 4), top + head + line * (panel + 4)))
    for number, (stored, told) in enumerate(said):
        text = f"{number + 1}: {stored}" + ("" if told == stored else f"   in training: {told}")
        text, color, font = _fit(text, width, 14)
        ImageDraw.Draw(canvas).text((_MARGIN, below + 6 + 20 * number), text, color, font)
    return canvas


def _draw_action(
    draw: Any, action: np.ndarray, box: tuple[int, int, int, int], font: Any, robot: robots.RobotSpec
) -> None:
    """A bar per dimension around a zero line; full height is the larger bound (1.0 where there is none), beyond it they
    are cut."""
    left, top, right, bottom = box
    middle, step = (top + bottom) // 2, (right - left) / len(robot.action)
    draw.line((left, middle, right, middle), "#bbbbbb")
    for index, (dimension, value) in enumerate(zip(robot.action, action, strict=True)):
        bounds = [abs(bound) for bound in (dimension.low, dimension.high) if math.isfinite(bound)]
        value = float(np.clip(value / max(bounds, default=1.0), -1, 1))
        name = dimension.name[: max(int(step / 7), 3)]
        centre = left + step * (index + 0.5)
        end = middle - value * (bottom - top) / 2
        color = tables.RED if dimension.quantity == "gripper" else tables.BLUE
        draw.rectangle((centre - 10, min(middle, end), centre + 10, max(middle, end)), color)
        draw.text((centre, bottom + 2), name, "#555555", font, anchor="ma")


def _fit(text: str, width: int, size: int) -> tuple[str, str, FreeTypeFont]:
    """The text, cut with an ellipsis if it is longer than `width` pixels, its colour and the font to draw it with."""
    text, font = fonts.with_font(text, size)
    if font.getlength(text) <= width:
        return text, "black", font
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "...", "black", font


def link(path: pathlib.Path) -> str:
    """Markdown that shows a film; `path` is relative to the report."""
    name = path.stem.replace("_", " ")
    return f"[{name}]({path.as_posix()})" if path.suffix == ".mp4" else f"![{name}]({path.as_posix()})"
