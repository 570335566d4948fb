"""The published models by name, and the families that config.json files belong to."""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from robovlms_jax import json_files, schema
from robovlms_jax.backbones.base import VLMConfig
from robovlms_jax.inputs.images import read_image_spec
from robovlms_jax.weights import quantized, rules

logger = logging.getLogger(__name__)

_MODELS: dict[str, Callable[[], VLMConfig]] = {}
_FAMILIES: dict[str, tuple[Callable, Callable, Callable]] = {}


def register(name: str) -> Callable:
    """Decorator: `@register("kosmos-2")` on a function that returns the published configuration."""

    def decorate(function: Callable[[], VLMConfig]) -> Callable[[], VLMConfig]:
        if name in _MODELS:
            raise ValueError(f"backbone {name!r} is registered already, by {_MODELS[name].__module__}.")
        _MODELS[name] = function
        return function

    return decorate


def register_family(
    model_type: str,
    read: Callable[[Mapping[str, Any]], VLMConfig],
    write: Callable[[VLMConfig], dict[str, Any]],
    fit: Callable[[VLMConfig, Mapping[str, tuple[int, ...]]], VLMConfig] = lambda config, tensors: config,
) -> None:
    """Make a `model_type` known: how its config.json becomes a configuration, and back.

    fit: (configuration, tensor name -> shape) -> configuration, for what only the weights of a checkpoint can tell.
    """
    if model_type in _FAMILIES:
        raise ValueError(f"model_type {model_type!r} is registered already, by {_FAMILIES[model_type][0].__module__}.")
    _FAMILIES[model_type] = (read, write, fit)


def names() -> list[str]:
    """Names of all registered backbones."""
    return sorted(_MODELS)


def get(name: str) -> VLMConfig:
    """The published configuration of a registered backbone. Raises ValueError listing the known names."""
    if name not in _MODELS:
        raise ValueError(f"no backbone {name!r}{schema.nearest(name, names())} Registered: {', '.join(names())}.")
    return _with_head(_MODELS[name]())


def _with_head(config: VLMConfig) -> VLMConfig:
    """With rules for a head that is tied to the token table or not, as the decoder has it."""
    return dataclasses.replace(config, rules=rules.with_head(config.rules, tied=config.text.head == "tied"))


def from_hf_config(values: Mapping[str, Any]) -> VLMConfig:
    """Configuration from the contents of a Hugging Face config.json.

    Raises ValueError when its model_type is unknown (lists the known ones), it asks for what the model cannot do, or
    its weights are quantised.
    """
    model_type = values.get("model_type")
    if model_type not in _FAMILIES:
        raise ValueError(f"model_type {model_type!r} is unknown; known: {sorted(_FAMILIES)}.")
    quantized.require_float_config(values)
    for key in ("text_config", "vision_config", "visual"):
        if not isinstance(values.get(key) or {}, Mapping):
            raise ValueError(f"{key}={values[key]!r}; expected an object of settings.")
    return _with_head(_FAMILIES[model_type][0](values))


def to_hf_config(config: VLMConfig) -> dict[str, Any]:
    """Contents of the config.json that `from_hf_config`, and transformers, turn into this architecture."""
    return _FAMILIES[config.model_type][1](config) | {"model_type": config.model_type}


def refine_from_tensors(config: VLMConfig, tensors: Mapping[str, tuple[int, ...]]) -> VLMConfig:
    """The configuration as a checkpoint's weights need it: name -> shape of all tensors. See `register_family`.

    Raises ValueError for a revision that the family does not have.
    """
    return _FAMILIES[config.model_type][2](config, tensors)


def untied(config: VLMConfig) -> VLMConfig:
    """The same model with a head of its own in place of the token table."""
    text = dataclasses.replace(config.text, head="linear")
    return dataclasses.replace(config, text=text, rules=rules.with_head(config.rules, tied=False))


def from_directory(directory: str | pathlib.Path) -> VLMConfig:
    """Configuration of a published model's directory: its config.json, and its image processor's file if there is one.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: a file is not JSON, names an unknown model_type, or asks for something the model cannot do.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; a backbone directory holds config.json, safetensors and tokenizer files."
        )
    values = json_files.read_object(path, "settings")
    try:
        config = from_hf_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        image = read_image_spec(directory, config.image.size)
    except FileNotFoundError as error:
        _say_once(f"{error} Pictures are prepared as the family's published models have it: {config.image}.")
        return config
    if image.size != config.image.size:
        raise ValueError(
            f"{directory}: the image processor makes {image.size} pixels but config.json says the vision tower reads "
            f"{config.image.size}; the files belong to different models."
        )
    return dataclasses.replace(config, image=image)


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)
