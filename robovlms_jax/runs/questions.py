"""Questions about pictures beside a robot's demonstrations: opened, checked against the policy, asked in validation."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from robovlms_jax.backbones import base as backbones
from robovlms_jax.data import loading
from robovlms_jax.data.vl import base, opening, samples
from robovlms_jax.inputs import conversations
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies import answers, objective
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import build
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import stages, step, trainable
from robovlms_jax.training.state import TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Collections:
    """What data.vl names, opened. Empty where it names nothing."""

    training: Mapping[str, base.Pairs]
    validation: Mapping[str, base.Pairs]

    @property
    def texts(self) -> list[str]:
        """What is said in them, for tokenizers that are made from sentences."""
        return [text for pairs in self.training.values() for text in samples.texts(pairs)]


@dataclasses.dataclass(frozen=True)
class Sources:
    """The collections as samples of one backbone, by name."""

    training: Mapping[str, samples.PairSource]
    validation: Mapping[str, samples.PairSource]


def open_collections(config: ExperimentConfig, *, known: bool = False) -> Collections:
    """Raises what `opening.open_all` does, and ValueError where the policy has no use for them.

    known: they were opened before in this process, so that their pictures need not be looked at again.
    """
    vl = config.data.vl
    if vl.paths and not config.policy.auxiliary.vl_weight:
        raise ValueError(
            f"data.vl.paths has {sorted(vl.paths)}, and policy.auxiliary.vl_weight=0 learns no answers: set it "
            "(StarVLA has 0.1), or leave the sources out."
        )
    if config.policy.auxiliary.vl_weight and not vl.paths:
        raise ValueError(
            f"policy.auxiliary.vl_weight={config.policy.auxiliary.vl_weight} learns answers to questions about "
            "pictures, and data.vl.paths names none."
        )
    share = None if known else config.data.max_corrupt_share
    return Collections(opening.open_all(vl, vl.paths, share), opening.open_all(vl, vl.validation, share))


def sources_of(config: ExperimentConfig, collections: Collections, backbone: build.Backbone) -> Sources:
    """The collections encoded for the backbone. Raises ValueError: one is too long, or means nothing."""
    if not collections.training:
        return Sources({}, {})
    vlm = backbone.vlm
    if vlm.beside or vlm.encoder is not None:
        raise ValueError(
            f"data.vl.paths has {sorted(config.data.vl.paths)}, whose pictures stand among their words; those of a "
            f"{vlm.model_type} stand beside them. Choose another backbone, or leave data.vl.paths empty."
        )
    encode = conversations.encoder(backbone.tokenizer, vlm.model_type, image_tokens(vlm), backbone.connector_tokenizer)
    if vlm.model_type not in conversations.CHATS:
        logger.warning("no chat template of %s is known: questions are asked as Question: ... Answer:", vlm.model_type)

    def encoded(pairs: Mapping[str, base.Pairs]) -> dict[str, samples.PairSource]:
        length = {"length": config.data.vl.length, "leave_out_long": config.data.vl.leave_out_long}
        found = {name: samples.PairSource(each, encode, vlm.image, **length) for name, each in pairs.items()}
        for name, source in found.items():
            require_positions(name, source.shape.tokens, vlm)
        return found

    return Sources(encoded(collections.training), encoded(collections.validation))


def require_positions(name: str, tokens: int, vlm: backbones.VLMConfig) -> None:
    """Raise ValueError where conversations of `tokens` tokens have more than the model has learned positions for."""
    room = vlm.text.max_positions if vlm.text.positions == "learned" else 0
    if room and tokens > room:
        raise ValueError(
            f"source {name!r} has conversations of {tokens} tokens, and {vlm.model_type} has learned {room} positions. "
            f"Set data.vl.length to at most {room}, with data.vl.leave_out_long."
        )


def image_tokens(vlm: backbones.VLMConfig) -> int:
    """Tokens of one picture, those around it that the backbone adds included."""
    model, size = backbones.build(vlm), vlm.image.size
    shape = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    ids = jnp.zeros((1, *vlm.text_shape(1)), jnp.int32)

    def tokens(image: jax.Array) -> Any:
        variables = model.init(jax.random.key(0), {"camera": image}, ids, ids > -1)
        question = (ids[..., 1], ids[..., 1] > -1) if vlm.connector_tokenizer else None
        return model.apply(variables, {"camera": image}, question, method="encode_images")

    encoded = jax.tree.leaves(jax.eval_shape(tokens, shape))[0]  # with DeepStack there is more, of as many tokens
    return encoded.shape[1] + len(vlm.image_start) + len(vlm.image_end)


def check(planned: Sequence[stages.Stage], config: ExperimentConfig, paths: Collection[str]) -> None:
    """Refuse stages in which answers are asked for and no parameter can learn them, and insulated ones in which nothing
    would teach a trainable backbone (weight decay alone would move it).

    Args:
      paths: of all parameters.
    Raises:
      ValueError: names the stage.
    """
    for stage in planned:
        taught, _ = trainable.split(dict.fromkeys(paths), stage.trainable)
        learns = any(path.startswith("backbone/") for path in taught)
        asked = [name for name in config.data.vl.paths if stage.sources.get(name)]
        if asked and not learns:
            raise ValueError(
                f"stage {stage.name!r}: answers of {asked} are learned by the backbone, and {list(stage.trainable)} "
                "leaves none of its parameters trainable. Add some, such as ^backbone/text/, or leave the source out."
            )
        auxiliary = config.policy.auxiliary
        weights = {"caption": auxiliary.caption_weight, "scene": auxiliary.scene.loss_weight} | stage.weights
        teaches = asked or any(weights[name] for name in objective.NOT_INSULATED)
        if config.policy.insulate and learns and not teaches:
            raise ValueError(
                f"stage {stage.name!r}: with policy.insulate actions teach the backbone nothing, and this stage has no "
                "questions, captions or scene that would. Give it a share of questions (data.vl), a "
                "policy.auxiliary.caption_weight or .scene.loss_weight, or freeze the backbone: trainable "
                "'^(?!backbone/)'."
            )


class Examiner:
    """Asks the held-out questions; holds what does not change between examinations."""

    def __init__(self, model: VLA, mesh: Mesh, config: ExperimentConfig, sources: Mapping[str, samples.PairSource]):
        self._mesh, self._config, self._sources = mesh, config, sources
        self._step = step.make_eval_step(answers.AnswerLoss(model).predict, mesh)

    def numbers(self, state: TrainState) -> dict[str, float]:
        """Of every source NAME, over evaluation.batches batches: `accuracy_NAME`, the share of answers that are right
        to the last token, and `loss_NAME`, cross-entropy per token."""
        found = {}
        for name, source in self._sources.items():
            sums: dict[str, float] = {}
            batches = loading.evaluation_batches(
                source,
                segments_per_batch=self._config.segments_per_batch,
                num_batches=self._config.evaluation.batches,
                process=meshes.batch_share(self._mesh),
                num_threads=self._config.data.num_threads,
                prefetch=2,
            )
            try:
                for batch in batches:
                    values = jax.device_get(self._step(state, meshes.put_batch(batch, self._mesh)))
                    sums = {key: sums.get(key, 0.0) + float(value) for key, value in values.items()}
            finally:
                batches.close()
            found[f"accuracy_{name}"] = sums["right"] / max(sums["answers"], 1.0)
            found[f"loss_{name}"] = sums["loss"] / max(sums["tokens"], 1.0)
        return found


def losses(config: ExperimentConfig, model: VLA, stage: stages.Stage) -> dict[str, objective.SourceLoss]:
    """Name -> the loss on its batches, of the collections that have a share in the stage. Raises ValueError: they have
    one, and their weight is 0."""
    weight = stage.weights.get(answers.NAME, config.policy.auxiliary.vl_weight)
    asked = [name for name in config.data.vl.paths if stage.sources.get(name)]
    if asked and not weight:
        raise ValueError(
            f"stage {stage.name!r}: {answers.NAME!r} has weight 0, so that the answers of {asked} would teach nothing. "
            "Give it a weight, or leave these sources out of the stage."
        )
    return {name: answers.AnswerLoss(model, weight) for name in asked}
