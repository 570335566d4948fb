"""Images on the device: uint8 as stored -> what a vision tower reads. Training and serving call the same functions.

The array functions are pure and traceable; call them inside `jit`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from robovlms_jax import atomic, json_files
from robovlms_jax.inputs.config import AugmentConfig

logger = logging.getLogger(__name__)

Interpolation = Literal["bilinear", "bicubic", "lanczos"]

_PIL_CODES = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling, as Hugging Face stores `resample`
_RESAMPLE = {  # what transformers' classes do where a file does not say
    "clip": 3,
    "siglip": 3,
    "llava": 3,
    "qwen2vl": 3,
    "qwen2_5_vl": 3,
    "deepseekvl": 3,
    "janus": 3,
    "gemma3": 2,
    "gotocr2": 3,
    "smolvlm": 1,
    "idefics3": 1,
}
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_WEIGHT_BITS = 22  # Pillow's fixed point for uint8: 255 * sum |weight| * 2**22 still fits int32


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _bicubic(x: np.ndarray) -> np.ndarray:  # Keys 1981, a = -0.5
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


# Kernel, half-width in pixels.
_FILTERS = {"bilinear": (_bilinear, 1), "bicubic": (_bicubic, 2), "lanczos": (_lanczos, 3)}


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What a vision tower expects of its images."""

    size: int
    """Height and width in pixels."""
    mean: tuple[float, float, float]
    """Subtracted from RGB in [0, 1]."""
    std: tuple[float, float, float]
    """Divided by afterwards."""
    interpolation: Interpolation = "bicubic"

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"ImageSpec.size={self.size} must be a positive number of pixels.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"ImageSpec needs three means and three stds > 0 (RGB); got {self.mean}, {self.std}.")
        if self.interpolation not in _FILTERS:
            raise ValueError(f"ImageSpec.interpolation={self.interpolation!r} is none of {list(_FILTERS)}.")


def resize(images: jax.Array, size: int, interpolation: Interpolation = "bicubic") -> jax.Array:
    """Scale to size x size, whatever the aspect ratio, antialiased; bit for bit what Pillow's `Image.resize`
    gives for columns, then for rows (its own order, but for pictures that are much higher than wide).

    Args:
      images: uint8[..., height, width, 3].
    Returns:
      uint8[..., size, size, 3]; `images` itself when the size already matches.
    Raises:
      ValueError: `images` is not uint8 (scaled or normalised before?) or not [..., height, width, 3].
    """
    if images.dtype != jnp.uint8 or images.ndim < 3 or images.shape[-1] != 3:
        raise ValueError(f"expected uint8[..., height, width, 3] as stored; got {images.dtype}{list(images.shape)}.")
    if images.shape[-3:-1] == (size, size):
        return images
    # Like Pillow: columns first, and rounded in between. One joint float pass (jax.image.resize) is up to 12 levels off
    # on robot frames, because overshoot at edges is then clipped once instead of twice.
    columns = functools.partial(_resize_axis, axis=-2, size=size, interpolation=interpolation)
    # On CPUs XLA would merge the passes into one loop that computes the first anew for every tap of the second.
    images = jax.lax.platform_dependent(images, cpu=functools.partial(columns, loop=True), default=columns)
    return _resize_axis(images, -3, size, interpolation)


def resize_on_host(image: np.ndarray, size: int, interpolation: Interpolation) -> np.ndarray:
    """The same pixels as `resize`, by Pillow: uint8[height, width, 3] -> uint8[size, size, 3]; nothing is compiled."""
    code = next(code for code, name in _PIL_CODES.items() if name == interpolation)
    # Columns first, as above. Asked for both at once, Pillow begins with the rows of pictures much higher than wide.
    columns = Image.fromarray(np.ascontiguousarray(image)).resize((size, image.shape[0]), code)
    return np.asarray(columns.resize((size, size), code))


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """(images / 255 - mean) / std per channel: [..., 3] in 0..255 -> float32[..., 3]."""
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return images.astype(jnp.float32) * (1 / (255 * std)) - mean / std


def random_shift(key: jax.Array, images: jax.Array, max_shift: int) -> jax.Array:
    """Shift each segment by a random whole number of pixels, repeating the border (DrQ, Kostrikov et al. 2020).

    One offset, uniform in [-max_shift, max_shift] per axis, for all frames of a segment: what moves between frames is
    then still only what moved in the world. Upstream draws one per frame, which makes the camera jitter inside a
    window, and from [1, 2 * max_shift] of the padded image, which leaves out one side's largest shift.

    Args:
      images: [B, G, height, width, 3], any dtype. Give every camera its own key.
      max_shift: pixels; 0 returns `images`.
    Returns:
      Same shape and dtype as `images`.
    """
    if max_shift == 0:
        return images
    batch, _, height, width, _ = images.shape
    offset = jax.random.randint(key, (2, batch, 1), -max_shift, max_shift + 1)
    # Clipped indices are the replicate-padding: a third less time than padding and slicing.
    rows = jnp.clip(jnp.arange(height) + offset[0], 0, height - 1)  # [B, height]
    columns = jnp.clip(jnp.arange(width) + offset[1], 0, width - 1)  # [B, width]
    return jax.vmap(lambda frames, row, column: frames[:, row[:, None], column])(images, rows, columns)


def augment(key: jax.Array, images: jax.Array, amount: AugmentConfig) -> jax.Array:
    """Crop and colour changes, drawn once per segment: what differs between its frames still only moved in the world.

    In this order, as upstream's RLDS loader has it: random resized crop (square, bilinear), brightness, contrast (about
    the segment's mean colour), saturation (about each pixel's grey), hue (a turn about the grey axis), and at last an
    erased rectangle. Mirroring is not among them: it concerns actions and words, too (`data.mirror`).

    Args:
      images: [B, G, height, width, 3] in 0 ... 255, any dtype. Give every camera its own key.
    Returns:
      float32 of the same shape in 0 ... 255; `images` itself when nothing is turned on.
    """
    if amount.of_pictures == AugmentConfig():
        return images
    batch, _, height, width, _ = images.shape
    keys = jax.random.split(key, 6)

    def draw(key: jax.Array, low: float, high: float) -> jax.Array:
        return jax.random.uniform(key, (batch, 1, 1, 1, 1), minval=low, maxval=high)

    x = images.astype(jnp.float32)
    if amount.crop_area:
        side = jnp.sqrt(draw(keys[0], amount.crop_area, 1.0).reshape(batch, 1))
        size = jnp.array([height, width], jnp.float32)
        corner = jax.random.uniform(keys[1], (batch, 2)) * (1 - side) * size
        crop = functools.partial(jax.image.scale_and_translate, method="linear", antialias=False)
        x = jax.vmap(lambda frames, scale, shift: crop(frames, frames.shape, (1, 2), scale, shift))(
            x, jnp.broadcast_to(1 / side, (batch, 2)), -corner / side
        )
    if amount.brightness:
        x += 255 * draw(keys[2], -amount.brightness, amount.brightness)
    if amount.contrast:
        mean = x.mean(axis=(1, 2, 3), keepdims=True)
        x = mean + (x - mean) * draw(keys[3], 1 - amount.contrast, 1 + amount.contrast)
    if amount.saturation:
        grey = x @ jnp.array(_LUMA)[:, None]
        x = grey + (x - grey) * draw(keys[4], 1 - amount.saturation, 1 + amount.saturation)
    if amount.hue:
        x = _turn_hue(x, draw(keys[5], -amount.hue, amount.hue))
    if amount.erase_area:
        x = _erase(jax.random.fold_in(key, len(keys)), x, amount.erase_area)
    return jnp.clip(x, 0, 255)


def _erase(key: jax.Array, images: jax.Array, area: float) -> jax.Array:
    """One rectangle per segment, of up to `area` of the image, in the segment's mean colour."""
    batch, _, height, width, _ = images.shape
    size_key, ratio_key, corner_key = jax.random.split(key, 3)
    share = jax.random.uniform(size_key, (batch, 1), maxval=area)
    ratio = jnp.exp(jax.random.uniform(ratio_key, (batch, 1), minval=-1, maxval=1) * math.log(1.5))
    sides = jnp.minimum(jnp.concatenate([jnp.sqrt(share * ratio), jnp.sqrt(share / ratio)], axis=1), 1.0)
    first = jax.random.uniform(corner_key, (batch, 2)) * (1 - sides)

    def inside(axis: int, count: int) -> jax.Array:
        at = (jnp.arange(count) + 0.5) / count
        return (at >= first[:, axis, None]) & (at < first[:, axis, None] + sides[:, axis, None])

    covered = inside(0, height)[:, None, :, None, None] & inside(1, width)[:, None, None, :, None]
    return jnp.where(covered, images.mean(axis=(1, 2, 3), keepdims=True), images)


_LUMA = (0.299, 0.587, 0.114)  # grey of RGB, ITU-R BT.601


def _turn_hue(images: jax.Array, share: jax.Array) -> jax.Array:
    """Rotate colours about the grey axis by `share` of a full turn; grey stays as it is (Rodrigues' formula)."""
    angle = 2 * jnp.pi * share
    axis = jnp.full(3, 3**-0.5, jnp.float32)
    along = (images @ axis)[..., None] * axis
    return along + (images - along) * jnp.cos(angle) + jnp.cross(axis, images) * jnp.sin(angle)


def read_image_spec(directory: str | pathlib.Path, flexible_size: int | None = None) -> ImageSpec:
    """Image size, mean, std and interpolation of a Hugging Face model directory.

    Reads preprocessor_config.json, or the `image_processor` part of processor_config.json (transformers 5 saves that).
    An entry that is null counts as missing, `resample` apart: transformers takes null as bilinear, whatever the model
    was trained with.

    Args:
      flexible_size: edge for processors that leave the size to the picture (Qwen2-VL's min_pixels, max_pixels).
    Raises:
      FileNotFoundError: neither file is there, or neither says anything of images.
      ValueError: a field is missing, or asks for something other than resize, 1/255 and normalise to a fixed square;
        or the two files disagree.
    """
    directory = pathlib.Path(directory)
    found = {path: _spec(fields, path, flexible_size) for path, fields in _read_processors(directory)}
    if not found:
        empty = [name for name in _PROCESSOR_FILES if (directory / name).is_file()]
        silent = f" Without size, image_mean, image_std and resample: {' and '.join(empty)}." if empty else ""
        raise FileNotFoundError(
            f"{directory} has no preprocessor_config.json and no processor_config.json with an image_processor; "
            f"expected a model directory as published on the Hugging Face hub.{silent}"
        )
    if len(set(found.values())) > 1:
        listed = "; ".join(f"{path.name}: {spec}" for path, spec in found.items())
        raise ValueError(f"{directory} describes its images twice, and differently. {listed}. Delete the wrong file.")
    return next(iter(found.values()))


def _spec(fields: dict[str, Any], path: pathlib.Path, flexible_size: int | None) -> ImageSpec:
    kind = str(fields.get("image_processor_type") or "")
    is_flexible = "Qwen2VL" in kind or (fields.get("image_mean") is not None and "min_pixels" in fields)
    resample = _resample(fields, "Qwen2VL" if is_flexible else kind, path)
    fields = {name: value for name, value in fields.items() if value is not None}
    if is_flexible and "image_mean" in fields:
        fields = {**fields, "size": flexible_size, "do_center_crop": False}
    for field in ("image_mean", "image_std"):
        if field not in fields:
            raise ValueError(f"{path} has no {field!r}; expected size, image_mean, image_std and resample.")
    factor = fields.get("rescale_factor", 1 / 255)
    rescaled = fields.get("do_rescale", True) and isinstance(factor, (int, float)) and np.isclose(factor, 1 / 255)
    if not rescaled or not fields.get("do_normalize", True):
        settings = {name: fields.get(name) for name in ("do_rescale", "rescale_factor", "do_normalize")}
        raise ValueError(f"{path} has {settings}; only a rescale by 1/255 followed by normalisation is supported.")
    if not fields.get("do_resize", True):
        _say_once(f"{path} has do_resize=false; cameras differ in size, so pictures are scaled all the same.")
    # A centre crop decides the final size. We scale to it directly and keep the whole picture, as upstream does.
    crop = fields.get("crop_size") if fields.get("do_center_crop", True) else None
    try:
        return ImageSpec(
            size=_square(crop or fields.get("max_image_size") or fields.get("size"), path),
            mean=_channels("image_mean", fields["image_mean"]),
            std=_channels("image_std", fields["image_std"]),
            interpolation=resample,
        )
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _resample(fields: dict[str, Any], kind: str, path: pathlib.Path) -> Interpolation:
    """The filter a file names by Pillow's code or name; of known processors that leave it out, their own."""
    if "resample" in fields:
        value = fields["resample"]
        known = dict(_PIL_CODES) | {name: name for name in _PIL_CODES.values()}
        value = value.lower() if isinstance(value, str) else value
        found = known.get(value) if isinstance(value, (int, str)) else None
        if found is None:
            raise ValueError(
                f"{path} has resample={value}, a Pillow filter code; supported are {_PIL_CODES}. Write the one that "
                "the model was trained with (null is bilinear to transformers, which few models were trained with)."
            )
        return found
    code = next((code for name, code in _RESAMPLE.items() if kind.lower().startswith(name)), None)
    if code is None:
        raise ValueError(f"{path} has no 'resample'; expected size, image_mean, image_std and resample.")
    return _PIL_CODES[code]


def _channels(name: str, value: Any) -> tuple[float, float, float]:
    """Three numbers, or one for all channels. Raises ValueError naming the field otherwise."""
    values = [value] * 3 if isinstance(value, (int, float)) else value
    if not isinstance(values, list) or not all(isinstance(x, (int, float)) for x in values):
        raise ValueError(f"{name}={value!r}; expected three numbers, or one.")
    return tuple(values)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def write_image_spec(spec: ImageSpec, directory: str | pathlib.Path) -> None:
    """Write preprocessor_config.json so that `read_image_spec` and transformers' CLIPImageProcessor both read it."""
    edge = {"height": spec.size, "width": spec.size}
    fields = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": edge,
        "resample": next(code for code, name in _PIL_CODES.items() if name == spec.interpolation),
        "do_center_crop": False,
        "crop_size": edge,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "do_convert_rgb": True,
    }
    atomic.write_text(pathlib.Path(directory) / "preprocessor_config.json", json.dumps(fields, indent=2) + "\n")


def _resize_axis(
    images: jax.Array, axis: int, size: int, interpolation: Interpolation, *, loop: bool = False
) -> jax.Array:
    """One pass of a separable filter, in Pillow's integer arithmetic: the same pixels on every backend.

    loop: go from tap to tap in a loop that the compiler sees, so that nothing after it can be merged with it."""
    if images.shape[axis] == size:
        return images
    index, weight = _taps(images.shape[axis], size, interpolation)
    column = (size,) + (1,) * (-axis - 1)

    def add(total: jax.Array, tap: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        index, weight = tap
        return total + jnp.take(images, index, axis, mode="clip").astype(jnp.int32) * weight.reshape(column), None

    shape = list(images.shape)
    shape[axis] = size
    total = jnp.full(shape, 1 << (_WEIGHT_BITS - 1), jnp.int32)
    # 5 taps at 200 -> 224: far less work than a [size, length] matrix
    total, _ = jax.lax.scan(add, total, (index.T, weight.T), unroll=1 if loop else index.shape[1])
    return jnp.clip(total >> _WEIGHT_BITS, 0, 255).astype(jnp.uint8)


@functools.lru_cache
def _taps(length: int, size: int, interpolation: Interpolation) -> tuple[np.ndarray, np.ndarray]:
    """Input indices and fixed-point weights of every output pixel, both int32[size, taps]."""
    kernel, support = _FILTERS[interpolation]
    stretch = max(length / size, 1)  # > 1 when shrinking: the filter widens, which is the antialiasing
    centre = (np.arange(size)[:, None] + 0.5) * length / size
    first = np.maximum((centre - support * stretch + 0.5).astype(np.int32), 0)
    last = np.minimum((centre + support * stretch + 0.5).astype(np.int32), length)
    index = first + np.arange((last - first).max(), dtype=np.int32)
    weight = kernel((index - centre + 0.5) / stretch) * (index < last)
    weight /= weight.sum(axis=1, keepdims=True)
    return np.minimum(index, length - 1), np.round(weight * 2**_WEIGHT_BITS).astype(np.int32)


def _read_processors(directory: pathlib.Path) -> list[tuple[pathlib.Path, dict[str, Any]]]:
    """The files that say how images are prepared, each with its entries."""
    found = []
    for name in _PROCESSOR_FILES:
        path = directory / name
        if not path.is_file():
            continue
        fields = json_files.read_object(path, "settings")
        fields = fields.get("image_processor", fields)
        if not isinstance(fields, dict | None):
            raise ValueError(f"{path} has image_processor={fields!r}; expected an object of settings.")
        # A file of a model with its own code may hold no more than that code's name.
        if fields and {"image_mean", "image_std", "size", "resample"} & set(fields):
            found.append((path, fields))
    return found


def _square(size: Any, path: pathlib.Path) -> int:
    """The edge of `size`: 224, {"shortest_edge": 224}, {"longest_edge": 512} or {"height": 224, "width": 224}; several
    entries must be equal."""
    known = ({"shortest_edge"}, {"longest_edge"}, {"shortest_edge", "longest_edge"}, {"height", "width"})
    edges = [size]
    if isinstance(size, dict):
        size = {name: edge for name, edge in size.items() if edge is not None}
        edges = list(size.values()) if set(size) in known else []
    if edges and len(set(map(str, edges))) == 1 and isinstance(edges[0], int) and not isinstance(edges[0], bool):
        return edges[0]
    raise ValueError(
        f"{path} has image size {size}; expected a number, shortest_edge alone, or equal height and width."
    )
