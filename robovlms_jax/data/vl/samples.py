"""Pictures with text about them as training samples, in arrays of fixed shapes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from robovlms_jax import types
from robovlms_jax.data import frame_index
from robovlms_jax.data.vl import base, pictures
from robovlms_jax.inputs import conversations, images
from robovlms_jax.inputs.conversations import Turn

logger = logging.getLogger(__name__)

PADDING = -1
"""Sample number that stands for an empty row."""
_MAX_REPLACEMENTS = 16
_KEPT = 50_000  # conversations whose tokens stay in memory, about a kilobyte each; more are encoded again when read
_MULTIPLE = 8  # of tokens in a sequence: sequences of nearly one length share a compiled program


class _Shape(NamedTuple):
    """Of every row. pictures: N. tokens: S. answers: A. question: U, 0: the connector reads none."""

    pictures: int
    tokens: int
    answers: int
    question: int


class PairSource(Sequence[types.Pairs]):
    """Samples as `loading` reads them: as `data.samples.SegmentSource`, with pictures scaled to the backbone's size.

    Opening encodes every conversation once, so that none is found too long in the middle of a run.

    Args:
      length: tokens of a conversation at most; 0: those of the longest, rounded up to a multiple of 8.
      leave_out_long: leave longer ones out instead of refusing them.
    Raises:
      ValueError: conversations are too long, or nothing is left to learn from; names them.
    """

    def __init__(
        self,
        pairs: base.Pairs,
        encode: conversations.Encoder,
        image: images.ImageSpec,
        *,
        length: int = 0,
        leave_out_long: bool = False,
    ):
        self.pairs, self._encode, self._image = pairs, encode, image
        self._content = hashlib.sha256()
        self._encoded: dict[int, list[conversations.Encoded]] = {}
        self._odd: dict[int, set[str]] = {}  # sample -> special tokens that it writes out
        sizes = [self._sizes(index) for index in range(len(pairs))]
        self._tell_written_out()
        usable = [index for index, size in enumerate(sizes) if not length or size.tokens <= length]
        long = len(sizes) - len(usable)
        if long and not leave_out_long:
            worst = max(range(len(sizes)), key=lambda index: sizes[index].tokens)
            raise ValueError(
                f"{pairs.name}: {long} of {len(sizes)} conversations have more than data.vl.length={length} tokens, "
                f"the longest {sizes[worst].tokens} ({pairs.describe(worst)}). An answer that is cut off teaches to "
                f"stop in the middle: set data.vl.length={sizes[worst].tokens}, or leave them out with "
                "--data.vl.leave_out_long."
            )
        if long:
            logger.warning("%s: %d of %d conversations are left out, too long", pairs.name, long, len(sizes))
        if not usable:
            raise ValueError(f"{pairs.name}: nothing to learn from is left, so this source would run dry.")
        self._usable = np.array(usable)
        pictures, tokens, answers, question = (max(sizes[index][part] for index in usable) for part in range(4))
        tokens = length or -(-tokens // _MULTIPLE) * _MULTIPLE
        self.shape = _Shape(max(pictures, 1), tokens, answers, -(-question // _MULTIPLE) * _MULTIPLE)
        self._reported: set[str] = set()

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> types.Pairs:
        """Sample `index` as a batch of one. Raises OSError or ValueError where it cannot be read."""
        out = self._allocate(1)
        self._fill(out, 0, index, 0)
        return out

    def parts(self) -> tuple[()]:
        """All samples are drawn alike; see `order.Source`."""
        return ()

    def content(self) -> dict[str, Any]:
        """What, with the order, determines its batches, as JSON values."""
        return {
            "samples": f"{len(self)} with sha256 {self._content.hexdigest()[:16]}",
            "tokens": self.shape.tokens,
        }

    def describe(self, index: int) -> str:
        """A sample, by the number that batches have for it."""
        return self.pairs.describe(int(self._usable[index]))

    def training_batch(self, indices: np.ndarray, draws: np.ndarray) -> types.Pairs:
        """Samples int[B] as one batch. One that cannot be read is replaced by another and reported in `corrupt`.

        Args:
          draws: uint32[B], random numbers that choose among a sample's conversations.
        """
        out = self._allocate(len(indices))
        for row, (index, draw) in enumerate(zip(indices.tolist(), draws.tolist(), strict=True)):
            substitutes = np.random.default_rng(index).integers(0, len(self), size=_MAX_REPLACEMENTS).tolist()
            for number, candidate in enumerate([index, *substitutes]):
                try:
                    self._fill(out, row, candidate, draw)
                    break
                except (OSError, ValueError) as error:
                    out.corrupt[row] = index
                    self._report(f"a sample was replaced by another: {self.describe(candidate)}: {error}")
                    if number == _MAX_REPLACEMENTS:
                        raise ValueError(f"{self.pairs.name}: {number + 1} samples in a row cannot be read.") from error
        return out

    def evaluation_batch(self, indices: np.ndarray) -> types.Pairs:
        """Samples int[B] as one batch, the first conversation of each. PADDING, and one that cannot be read, becomes a
        row without an answer."""
        out = self._allocate(len(indices))
        for row, index in enumerate(indices.tolist()):
            if index == PADDING:
                continue
            try:
                self._fill(out, row, index, 0)
            except (OSError, ValueError) as error:
                out.corrupt[row] = index
                out.answer_mask[row] = False
                self._report(f"left out of the evaluation: {self.describe(index)}: {error}")
        return out

    def _sizes(self, index: int) -> _Shape:
        sample = self.pairs.sample(index)
        self._content.update(repr(sample).encode())
        try:
            found = [self._encode(turns, len(sample.pictures)) for turns in sample.choices]
        except ValueError as error:
            raise ValueError(f"{self.pairs.describe(index)}: {error}") from None
        if odd := [token for turns in sample.choices for token in self._encode.written_out(turns)]:
            self._odd[index] = set(odd)
        if len(self.pairs) <= _KEPT:
            self._encoded[index] = found
        tokens, answers = max(len(x.ids) for x in found), max(int(x.answer.sum()) for x in found)
        return _Shape(len(sample.pictures), tokens, answers, max(len(x.question) for x in found))

    def _tell_written_out(self) -> None:
        """Log what is read as text although the tokenizer has a token of its own for it."""
        for token in sorted(set().union(*self._odd.values())):
            at = [index for index, found in self._odd.items() if token in found]
            logger.warning(
                "%s: %d conversations write out %s, a special token of the tokenizer; it is read as text: %s",
                *(self.pairs.name, len(at), token, ", ".join(map(self.pairs.describe, at[:3]))),
            )

    def _allocate(self, size: int) -> types.Pairs:
        pictures, tokens, answers, question = self.shape
        side = self._image.size
        out = types.Pairs(
            images=np.zeros((size, pictures, side, side, 3), np.uint8),
            text_ids=np.zeros((size, tokens), np.int32),
            image_slots=np.full((size, tokens), -1, np.int32),
            text_mask=np.zeros((size, tokens), bool),
            answer_slots=np.ones((size, answers), np.int32),
            answer_mask=np.zeros((size, answers), bool),
            episode=np.zeros(size, np.int32),
            corrupt=np.full(size, -1, np.int32),
            question_ids=np.zeros((size, question), np.int32) if question else None,
            question_mask=np.zeros((size, question), bool) if question else None,
        )
        out.text_mask[:, 0] = True  # no computation meets an empty sequence
        return out

    def _fill(self, out: types.Pairs, row: int, index: int, draw: int) -> None:
        number = int(self._usable[index])
        sample = self.pairs.sample(number)
        choice = draw % len(sample.choices)
        for place, name in enumerate(sample.pictures):
            self._show(name, out.images[row, place])
        known = self._encoded.get(number)
        encoded = known[choice] if known else self._encode(sample.choices[choice], len(sample.pictures))
        count, slots = len(encoded.ids), np.flatnonzero(encoded.answer)
        out.text_ids[row, :count], out.image_slots[row, :count] = encoded.ids, encoded.image
        out.text_mask[row, :count], out.text_mask[row, count:] = True, False
        if out.question_ids is not None:
            real = np.arange(self.shape.question) < len(encoded.question)
            out.question_mask[row] = real
            out.question_ids[row, real] = encoded.question
        out.answer_slots[row, : len(slots)], out.answer_mask[row, : len(slots)] = slots, True
        out.episode[row] = index

    def _show(self, name: str, out: np.ndarray) -> None:
        """Decode a picture into uint8[size, size, 3]. Raises ValueError or OSError that say where it is."""
        try:
            data = self.pairs.picture(name)
            if frame_index.image_size(data) == out.shape[:2]:
                frame_index.decode_image(data, out)
                return
            stored = pictures.decode(data)
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{self.pairs.place(name)} cannot be read: {error}. {pictures.REMEDY}") from error
        out[:] = images.resize_on_host(stored, self._image.size, self._image.interpolation)

    def _report(self, message: str) -> None:
        if message not in self._reported:
            self._reported.add(message)
            logger.warning("%s", message)


def plain_words(turn: Turn) -> str:
    """Question and answer as one text, for tokenizers that are made from sentences."""
    return f"{turn.question.replace(conversations.MARK, '').strip()} {turn.answer.strip()}"


def texts(pairs: base.Pairs, limit: int = 2000) -> list[str]:
    """What is said in the first samples, each once."""
    said = dict.fromkeys(
        plain_words(turn)
        for index in range(min(len(pairs), limit))
        for turns in pairs.sample(index).choices
        for turn in turns
    )
    return list(said)
