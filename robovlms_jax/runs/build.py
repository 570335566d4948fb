"""From a configuration to the things it names: backbone files, tokenizer, model, parameters in their shardings."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from robovlms_jax import atomic, json_files
from robovlms_jax.actions import discretize
from robovlms_jax.backbones import base as backbones
from robovlms_jax.backbones import clip_text, registry
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.inputs import images, prompts, tokenizers
from robovlms_jax.nn import perceiver
from robovlms_jax.parallel import cpu
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies import embodiments
from robovlms_jax.policies.heads.discrete import DiscreteHeadConfig
from robovlms_jax.policies.sensors import base as sensors
from robovlms_jax.policies.serving import EncodeText
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import drawing
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import trainable
from robovlms_jax.types import Inputs
from robovlms_jax.weights import convert, peft, quantize, rules, sources, tying

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SENTENCES = 64  # embedded at a time

FEW = 50_000_000
"""Below this many numbers, random parameters are made by what is compiled soonest."""

RESAMPLER = rules.Initialised(r"^resampler/", "resamplers are initialised by the run, not loaded")


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A backbone's architecture, its tokenizer, and the small files both came from (they travel inside checkpoints).

    directories: where its weights are; none = random parameters. adapter: where its adapters are; None = new ones.
    connector_tokenizer: makes of the instruction what the connector reads; None: it reads nothing.
    """

    vlm: backbones.VLMConfig
    tokenizer: PreTrainedTokenizerBase
    assets: Mapping[str, str]
    directories: tuple[pathlib.Path, ...] = ()
    adapter: pathlib.Path | None = None
    connector_tokenizer: PreTrainedTokenizerBase | None = None

    def encoder(self, length: int) -> EncodeText:
        """Instruction -> (int32[T], bool[T]) with T = `length`, or more as a longer prompt needs it; one that is far
        longer raises ValueError. See `inputs.prompts.served_length`."""

        def encode(instruction: str) -> tuple[np.ndarray, np.ndarray]:
            tokens = self.longest([instruction], multiple=1)
            return self.encode(instruction, prompts.served_length(tokens, length, instruction))

        return encode

    def encode(self, instruction: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The instruction in this backbone's prompt; see `inputs.prompts.encode`. With a `connector_tokenizer`
        int32[T, 2] and bool[T, 2]: beside it the instruction as the connector reads it."""
        vlm = self.vlm
        text = prompts.encode(self.tokenizer, vlm.prompt, instruction, length, special_tokens=vlm.special_tokens)
        if self.connector_tokenizer is None:
            return text
        own = prompts.encode(self.connector_tokenizer, prompts.BARE, instruction, length)
        ids, mask = (np.stack(parts, axis=-1) for parts in zip(text, own, strict=True))
        return ids, mask

    def longest(self, instructions: Iterable[str], multiple: int = 4) -> int:
        """The `length` that fits all instructions; see `inputs.prompts.longest`."""
        vlm, instructions = self.vlm, list(instructions)
        found = prompts.longest(self.tokenizer, vlm.prompt, instructions, multiple, special_tokens=vlm.special_tokens)
        if self.connector_tokenizer is None:
            return found
        return max(found, prompts.longest(self.connector_tokenizer, prompts.BARE, instructions, multiple))


def open_backbone(config: BackboneConfig, sentences: Iterable[str]) -> Backbone:
    """The configured backbone: from its weight directory, or of its published size with random parameters.

    Args:
      sentences: what a tokenizer is made from when there is no weight directory that brings one.
    Raises:
      ValueError, FileNotFoundError: unknown name, or a directory without what is needed; names it.
    """
    adapter = tokenizers.resolve_weights(config.adapter) if config.adapter else None
    if config.weights:
        directories = tuple(map(tokenizers.resolve_weights, tokenizers.split_weights(config.weights)))
        backbone = dataclasses.replace(_open(config, directories[0]), directories=directories, adapter=adapter)
        return fit_weights(backbone, sources.open_sources(directories))
    vlm = registry.get(config.name)
    logger.info(
        "backbone %s: random parameters, tokenizer made from the training sentences (no backbone.weights)", config.name
    )
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory)
        write_files(vlm, [prompts.format_prompt(vlm.prompt, sentence) for sentence in sentences], path)
        return dataclasses.replace(_open(config, path), adapter=adapter)


def write_files(vlm: backbones.VLMConfig, texts: Iterable[str], directory: pathlib.Path) -> None:
    """What a published directory holds beside weights: config.json, image preprocessing, and a tokenizer, here one made
    from `texts`."""
    atomic.write_text(directory / "config.json", json.dumps(registry.to_hf_config(vlm), indent=2))
    images.write_image_spec(vlm.image, directory)
    texts = list(texts)
    tokenizers.make_twin_tokenizer(texts, vlm.text.vocab_size, directory)
    if vlm.connector_tokenizer:
        tokenizers.make_twin_tokenizer(texts, vlm.connector.vocab_size, directory / vlm.connector_tokenizer)


def backbone_from_assets(
    config: BackboneConfig, assets: Mapping[str, str], origin: str = "the checkpoint's assets"
) -> Backbone:
    """The backbone a checkpoint was trained with, from the files inside it.

    Raises ValueError: they cannot be read; calls them `origin`.
    """
    with tempfile.TemporaryDirectory() as directory:
        try:
            tokenizers.write_assets(assets, directory)
            return _open(config, pathlib.Path(directory))
        except (ValueError, KeyError, TypeError, OSError) as error:  # they name a directory that is about to go
            reason = f"it has no {error}." if isinstance(error, KeyError) else str(error)
            named = reason.replace(directory, origin) if directory in reason else f"{origin}: {reason}"
            raise ValueError(named) from None


def _open(config: BackboneConfig, directory: pathlib.Path) -> Backbone:
    vlm = with_settings(config, registry.from_directory(directory))
    tokenizer, own = _tokenizer(directory, vlm.text.vocab_size), None
    if vlm.connector_tokenizer:
        second = directory / vlm.connector_tokenizer
        if not second.is_dir():
            raise FileNotFoundError(
                f"{second} is missing: the connector of a {vlm.model_type} reads the instruction with a tokenizer of "
                f"its own. Copy the folder {vlm.connector_tokenizer} of the published model beside config.json."
            )
        own = _tokenizer(second, vlm.connector.vocab_size)
    return Backbone(vlm, tokenizer, tokenizers.read_assets(directory), connector_tokenizer=own)


def _tokenizer(directory: pathlib.Path, vocab_size: int) -> PreTrainedTokenizerBase:
    tokenizer = tokenizers.load_tokenizer(directory)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens but the model's vocabulary is {vocab_size}; "
            "tokenizer and config.json belong to different models."
        )
    return tokenizer


def with_settings(config: BackboneConfig, published: backbones.VLMConfig) -> backbones.VLMConfig:
    """A published architecture as the configuration wants it computed, with the parts that it adds."""
    return dataclasses.replace(
        published,
        resampler=_resampler(config),
        rules=published.rules if config.resampler_latents == 0 else (*published.rules, RESAMPLER),
        dtype=config.dtype,
        remat=config.remat,
        attention_kernel=config.attention_kernel,
        storage=config.storage,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_kind=config.lora_kind,
        lora_dropout=config.lora_dropout,
        attention=config.attention,
        states=config.states,
    )


def fit_weights(backbone: Backbone, source: sources.Source) -> Backbone:
    """With what only the weights tell about the architecture, noted in the config.json that checkpoints carry.

    That is the form of a connector, and a head that config.json ties to the token table although the weights hold
    another one: it stays a matrix of its own, as transformers has it, and the log says so.
    """
    try:
        vlm = registry.refine_from_tensors(backbone.vlm, source.shapes)
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from error
    untied = tying.difference(vlm.rules, source)
    if untied is not None:
        logger.warning("%s: %s. Both are kept, as transformers does.", source.name, untied)
        vlm = registry.untied(vlm)
    if vlm == backbone.vlm:
        return backbone
    return dataclasses.replace(
        backbone, vlm=vlm, assets={**backbone.assets, "config.json": json.dumps(registry.to_hf_config(vlm), indent=2)}
    )


def _resampler(config: BackboneConfig) -> perceiver.PerceiverConfig | None:
    if config.resampler_latents == 0:
        return None
    return perceiver.PerceiverConfig(
        num_latents=config.resampler_latents, depth=config.resampler_depth, num_heads=config.resampler_heads
    )


def embed_sentences(weights: str | pathlib.Path, sentences: Iterable[str]) -> dict[str, np.ndarray]:
    """CLIP's view of sentences: each distinct one -> float32[E] of length 1.

    The tower is frozen, so each sentence is embedded once and the tower forgotten again.

    Args:
      weights: CLIP directory as published (config.json, tokenizer, safetensors), or hf://OWNER/NAME.
    Raises:
      FileNotFoundError, ValueError: no CLIP there, or a sentence longer than it reads.
    """
    directory = tokenizers.resolve_weights(weights)
    config = clip_text.read(json_files.read_object(directory / "config.json", "CLIP's settings"))
    tokenizer = tokenizers.load_tokenizer(directory)
    unique = list(dict.fromkeys(sentences))
    ids = [prompts.ids_of(tokenizer, prompts.BARE, sentence) for sentence in unique]
    length = max(len(row) for row in ids)
    if length > config.num_positions:
        raise ValueError(
            f"{unique[np.argmax([len(row) for row in ids])]!r} has {length} tokens; CLIP reads {config.num_positions}."
        )
    model = clip_text.ClipText(config)
    padded = np.array([row + [tokenizer.pad_token_id or 0] * (length - len(row)) for row in ids], np.int32)
    shapes = meshes.unbox(jax.eval_shape(model.init, jax.random.key(0), padded[:1]))["params"]
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = convert.load_params(
        clip_text.RULES, sources.open_source(directory), shapes, jax.tree.map(lambda _: place, shapes)
    )
    apply = jax.jit(lambda params, ids: model.apply({"params": params}, ids))
    blocks = range(0, len(unique), _SENTENCES)
    filled = np.concatenate([padded, np.repeat(padded[:1], -len(unique) % _SENTENCES, axis=0)])
    embedded = np.concatenate([np.asarray(apply(params, filled[at : at + _SENTENCES])) for at in blocks])
    return dict(zip(unique, embedded, strict=False))


def with_action_ids(config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase) -> ExperimentConfig:
    """Where actions are words: which ids they are, once the tokenizer is known. Other policies stay as they are.

    Raises ValueError where the vocabulary is too small for the bins.
    """
    head = config.policy.head
    if not isinstance(head, DiscreteHeadConfig) or head.vocab_end:
        return config
    head = dataclasses.replace(head, vocab_end=discretize.vocabulary_end(tokenizer))
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, head=head))


def make_model(config: ExperimentConfig, vlm: backbones.VLMConfig) -> VLA:
    """The policy module; holds no parameters."""
    return VLA(config.policy, vlm)


def abstract_params(model: VLA, mesh: Mesh) -> tuple[Any, Any]:
    """Shapes and shardings of the model's parameters, without making them."""
    return meshes.placed(_traced(model).shapes, mesh)


@functools.lru_cache(maxsize=8)
def _traced(model: VLA) -> drawing.Traced:
    """Kept: a run asks for shapes four times and draws once, and `_init` is slow to trace."""
    return drawing.trace(lambda key: _init(model, key))


def spare_params(model: VLA, shapes: Any) -> dict[str, tuple[int, ...]]:
    """What the whole backbone has and this policy has not, such as the head for words of a policy that says none.
    Published checkpoints contain it anyway.

    Args:
      shapes: of the policy's parameters, from `abstract_params`.
    Returns:
      path below "backbone/" -> shape.
    """
    size, ids = model.vlm.image.size, np.zeros((1, *model.vlm.text_shape(8)), np.int32)
    images = {camera: np.zeros((1, size, size, 3), np.float32) for camera in model.config.cameras}
    vlm = backbones.build(dataclasses.replace(model.vlm, states="decoder"))
    whole = meshes.unbox(jax.eval_shape(vlm.init, jax.random.key(0), images, ids, np.ones_like(ids, bool)))["params"]
    used = flatten_dict(shapes["backbone"], sep="/")
    return {path: x.shape for path, x in flatten_dict(whole, sep="/").items() if path not in used}


def init_params(model: VLA, mesh: Mesh, seed: int, backbone: Backbone | None = None) -> Any:
    """Parameters in their shardings. The backbone's come from `backbone.directories` if it has any, tensor by tensor,
    and its adapters from `backbone.adapter`; the rest is random.

    Random values of the loaded parameters are never made: the compiler drops what is not asked for. Matrices that are
    kept in int8 are in floating point here, with room for both once; see `rounded`.
    """
    model = in_float(model)
    shapes, shardings = abstract_params(model, mesh)
    loaded: dict[str, jax.Array] = {}
    if backbone is not None and backbone.directories:
        source = sources.open_sources(backbone.directories)
        wanted, places, spare = shapes["backbone"], shardings["backbone"], spare_params(model, shapes)
        params = convert.load_params(model.vlm.rules, source, wanted, places, spare=spare)
        loaded = {f"backbone/{path}": x for path, x in flatten_dict(params, sep="/").items()}
    params = fill_params(model, mesh, seed, loaded)
    if backbone is None or backbone.adapter is None:
        return params
    vlm, flat = model.vlm, flatten_dict(params, sep="/")
    adapters = peft.load(backbone.adapter, params["backbone"], vlm.rules, vlm.lora)
    for path, x in adapters.items():
        flat[f"backbone/{path}"] = jax.device_put(x, flat[f"backbone/{path}"].sharding)
    matrices, biases = (sum(path.endswith(end) for path in adapters) for end in ("lora_a", "bias"))
    logger.info("adapters of %d matrices and %d biases from %s", matrices, biases, backbone.adapter)
    return unflatten_dict(flat, sep="/")


def in_float(model: VLA) -> VLA:
    """The same policy with its backbone's matrices in floating point."""
    return dataclasses.replace(model, vlm=dataclasses.replace(model.vlm, storage="float"))


def rounded(model: VLA, mesh: Mesh, params: Any) -> Any:
    """Parameters of `in_float(model)` as the model keeps them."""
    if model.vlm.storage == "float":
        return params
    shapes, shardings = abstract_params(model, mesh)
    places = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)
    return quantize.quantize(params, places)


def require_floats(shapes: Any, patterns: Sequence[str], stage: str) -> None:
    """Raise ValueError where a stage of training shall train what is kept in int8."""
    flat = flatten_dict(shapes, sep="/")
    kept = {path for path, x in flat.items() if x.dtype == np.int8}
    wrong = sorted((kept | {quantize.scale_of(path) for path in kept}) & set(trainable.split(flat, patterns)[0]))
    if wrong:
        raise ValueError(
            f"stage {stage!r} trains {wrong[0]} and {len(wrong) - 1} others that backbone.storage=int8 keeps as they "
            "are. Set trainable to lora_ ^head/ ^readout/, or the storage to float."
        )


def fill_params(model: VLA, mesh: Mesh, seed: int, loaded: Mapping[str, jax.Array]) -> Any:
    """`loaded` (flat, "/"-joined) and random values from `seed` for every parameter it lacks."""
    shapes, shardings = abstract_params(model, mesh)
    places = {path: x for path, x in flatten_dict(shardings, sep="/").items() if path not in loaded}
    if not places:
        return unflatten_dict(dict(loaded), sep="/")

    platform, sizes = meshes.platform(mesh), flatten_dict(shapes, sep="/")
    few = sum(np.prod(sizes[path].shape) for path in places) < FEW
    drawn = {}
    if few and platform == "cpu":
        values = drawing.draw(_traced(model), seed, places)
        drawn = drawing.put(values, {path: places.pop(path) for path in values})
    if not places:
        return unflatten_dict({**loaded, **drawn}, sep="/")

    def rest(key: jax.Array) -> dict[str, jax.Array]:
        flat = flatten_dict(meshes.unbox(_init(model, key)), sep="/")
        return {path: flat[path] for path in places}

    # Runs once, and on a CPU a program that was not optimised is compiled 5 to 7 s sooner, but runs about 0.08 s longer
    # for a million parameters (0.5 and 4 million; two threads of one x86 core).
    quickly = cpu.options("run_once", platform) if few else None
    made = jax.jit(rest, out_shardings=places, compiler_options=quickly)(jax.random.key(seed))
    return unflatten_dict({**loaded, **drawn, **made}, sep="/")


def count(params: Any) -> int:
    """Number of scalars in a parameter tree (arrays or shapes)."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))


def _init(model: VLA, key: jax.Array) -> Any:
    window, size = model.config.window, model.vlm.image.size
    inputs = Inputs(
        images={camera: np.zeros((1, window, size, size, 3), np.float32) for camera in model.config.cameras},
        text_ids=np.zeros((1, *model.vlm.text_shape(8)), np.int32),
        text_mask=np.ones((1, *model.vlm.text_shape(8)), bool),
        step_mask=np.ones((1, window), bool),
        **sensors.blank(model.config.all_sensors, 1, window),
    )
    params = model.init(key, inputs)["params"]
    for other in model.config.others:
        view = VLA(embodiments.view(model.config, other.name), model.vlm)
        made = _init(view, jax.random.fold_in(key, zlib.crc32(other.name.encode())))
        own = embodiments.own_parameters(model.config, made)
        params = {**params, embodiments.scope(other.name): own} if own else params
    return params
