"""Every decoder-only backbone against torch: padding on either side, queries, attention modes, gradients, bfloat16."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from robovlms_jax.backbones import base, sequence
from tests.backbones import families
from tests.backbones.oracle import IMAGE, TEXT, Twin, as_read, example, from_torch, randomize, relative_error

pytestmark = pytest.mark.usefixtures("exact_matmul")
TOLERANCE = 1e-5  # relative to the largest value; 1e-4 is promised
QUERIES = np.asarray([41, 7])
"""Token ids whose embeddings are the queries, so that a torch model can be given them as text."""
CAMERAS = ("wrist", "static")


@dataclasses.dataclass
class Pair:
    """A family's torch model and ours, and one compiled function for all its tests."""

    twin: Twin
    differentiated: bool = False
    """Whether that function has gradients, which take longer to compile than the values."""

    def run(self, ids, mask, weight=None, config=None):
        """(tokens, hidden, logits), gradients of sum(logits * weight); None in place of these where there are none."""
        config = config or self.twin.config
        images, *_ = example(config, CAMERAS)
        if weight is None and not self.differentiated:
            return _forward(config, self.twin.params, images, *as_read(config, ids, mask)), None
        if weight is None:
            weight = np.zeros((len(ids), self.slots(config), config.text.vocab_size), np.float32)
        return _run(config, self.twin.params, images, *as_read(config, ids, mask), weight)

    def slots(self, config) -> int:
        images, ids, mask = example(config, CAMERAS)
        ids, mask = as_read(config, ids, mask)
        tokens = jax.eval_shape(lambda p: embed(config, p, images, ids, mask), self.twin.params)
        return tokens.mask.shape[1]


def embed(config, params, images, ids, mask):
    queries = [sequence.query(params["text"]["embed"]["table"][QUERIES], len(ids))]
    images = {camera: images[camera] for camera in CAMERAS}
    return base.build(config).apply({"params": params}, images, ids, mask, queries, method="embed")


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, images, ids, mask):
    model, tokens = base.build(config), embed(config, params, images, ids, mask)
    hidden, _ = model.apply({"params": params}, tokens, method="decode")
    return tokens, hidden, model.apply({"params": params}, hidden, method="logits")


@functools.partial(jax.jit, static_argnums=0)
def _run(config, params, images, ids, mask, weight):
    def total(params):
        tokens, hidden, logits = _forward(config, params, images, ids, mask)
        return (logits * weight).sum(), (tokens, hidden, logits)

    (_, out), grads = jax.value_and_grad(total, has_aux=True)(params)
    return out, grads


ORDINARY = [
    pytest.param(name, marks=pytest.mark.slow if name in families.SAME_ARITHMETIC else ()) for name in families.COMPARED
]


DIFFERENTIATED = ("paligemma2-3b-224", "qwen2.5-vl-3b", "flamingo-mpt-1b")
"""Their gradients and bfloat16 are compared in ordinary tests, those of the others in slow ones: their values are
compared every day (`test_padded_prompts`), and what has a gradient of its own in tests/nn/test_attended.py. Those of
KOSMOS-2 are compared in test_kosmos2_parity.py, within narrower bounds."""
SOME = [pytest.param(name, marks=() if name in DIFFERENTIATED else pytest.mark.slow) for name in families.COMPARED]


@pytest.fixture(scope="module", params=ORDINARY)
def pair(request) -> Pair:
    pair = make_pair(families.tiny(request.param))
    return dataclasses.replace(pair, differentiated=request.param in DIFFERENTIATED)


def make_pair(config) -> Pair:
    model = randomize(families.torch_model(config))
    params = from_torch(config, families.published(model, dict(model.state_dict())))
    return Pair(Twin(config, model, params))


def torch_sequence(config, ids, mask, tokens, queries=()) -> np.ndarray:
    """One prompt as the torch model reads it: placeholders for image tokens, queries before the prompt's tail."""
    text = [int(i) for i in ids[mask]]
    around = len(config.image_start) + len(config.image_end)
    run = tokens.slot("image")
    patches = (run.stop - run.start) // len(CAMERAS) - around
    image = [*config.image_start, *[IMAGE] * patches, *config.image_end]
    split = len(text) - (config.tail if config.attention == "causal" else 0)
    return np.asarray(
        text[: config.lead] + image * len(CAMERAS) + text[config.lead : split] + [*queries] + text[split:]
    )


def in_order(x, tokens, row) -> np.ndarray:
    """Our slots of one sample as a sequence without padding."""
    places = tokens.positions  # where they are shared, the encodings' are not
    if tokens.offsets is not None and tokens.offsets.shape[-1] == 1:
        places = places + tokens.offsets[..., 0]
    order = np.argsort(np.where(tokens.mask[row], places[row], 10**6), kind="stable")
    return np.asarray(x[row])[order[: int(tokens.mask[row].sum())]]


def prompts(config, side: str):
    images, ids, mask = example(config, CAMERAS)
    if side == "left":
        ids, mask = (np.stack([np.roll(row, TEXT - n) for row, n in zip(x, mask.sum(1))]) for x in (ids, mask))
    return np.stack(list(images.values()), 1), ids, mask


def pad(config, rows, side: str) -> tuple[np.ndarray, np.ndarray]:
    length, empty = max(len(row) for row in rows), config.pad_id % config.text.vocab_size
    widths = [(length - len(row), 0) if side == "left" else (0, length - len(row)) for row in rows]
    ids = [np.pad(row, width, constant_values=empty) for row, width in zip(rows, widths)]
    real = [np.pad(np.ones(len(row), int), width) for row, width in zip(rows, widths)]
    return np.stack(ids), np.stack(real)


def logits_error(pair: Pair, side: str) -> float:
    """Of logits and hidden states of prompts padded on one side; all but the tail, which in ours has seen queries."""
    config = pair.twin.config
    images, ids, mask = prompts(config, side)
    (tokens, hidden, logits), _ = pair.run(ids, mask)
    rows, real = pad(config, [torch_sequence(config, i, m, tokens) for i, m in zip(ids, mask)], side)
    with torch.no_grad():
        theirs = families.forward(config, pair.twin.torch_model, rows, images, real)
    errors = []
    for row in range(len(ids)):
        count = int(real[row].sum()) - config.tail
        for found, expected in zip((logits, hidden), theirs):
            expected = expected[row][real[row] == 1][:count]
            errors.append(relative_error(in_order(found, tokens, row)[:count], expected))
    return max(errors)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_prompts(pair, side):
    assert logits_error(pair, side) < TOLERANCE


def test_queries_before_the_tail(pair):
    config = pair.twin.config
    images, ids, mask = prompts(config, "right")
    (tokens, hidden, logits), _ = pair.run(ids, mask)
    # One batch, so that there is padding: a prompt alone is a prefix that PaliGemma's class attends both ways.
    lines, real = pad(config, [torch_sequence(config, i, m, tokens, QUERIES) for i, m in zip(ids, mask)], "right")
    with torch.no_grad():
        out = families.forward(config, pair.twin.torch_model, lines, images, real)
    for row in range(len(ids)):
        expected = [x[row][real[row] == 1] for x in out]
        for found, theirs in zip((logits, hidden), expected):
            assert relative_error(in_order(found, tokens, row), theirs) < TOLERANCE
        first = int(real[row].sum()) - config.tail - len(QUERIES)
        assert relative_error(hidden[row, tokens.slot("query")], expected[1][first : first + len(QUERIES)]) < TOLERANCE


def gradient_error(pair: Pair) -> float:
    """Largest error of any parameter's gradient, as a share of its largest entry."""
    config, model = pair.twin.config, pair.twin.torch_model
    images, ids, mask = prompts(config, "right")
    (tokens, *_), _ = pair.run(ids, mask)
    rows, real = pad(config, [torch_sequence(config, i, m, tokens) for i, m in zip(ids, mask)], "right")
    rng = np.random.default_rng(2)
    theirs = rng.normal(size=(*rows.shape, config.text.vocab_size)).astype(np.float32)
    ours = np.zeros((*tokens.mask.shape, config.text.vocab_size), np.float32)
    for row in range(len(ids)):
        count = int(real[row].sum()) - config.tail
        theirs[row, count:] = 0
        slots = in_order(np.broadcast_to(np.arange(ours.shape[1]), ours.shape[:2]), tokens, row)
        ours[row, slots[:count]] = theirs[row, :count]
    model.zero_grad()
    (families.forward(config, model, rows, images, real)[0] * torch.from_numpy(theirs)).sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    expected, found = from_torch(config, families.published(model, grads)), pair.run(ids, mask, ours)[1]
    expected, found = (flatten_dict(jax.device_get(x), sep="/") for x in (expected, found))
    scale = max(float(np.abs(x).max()) for x in expected.values())
    errors = {}
    for path, value in expected.items():
        error = float(np.abs(found[path] - value).max())
        # Key biases shift all scores of a row alike, and some parameters are not used: their true gradient is zero, so
        # only noise could be compared, and it is against the largest of all.
        errors[path] = error / max(float(np.abs(value).max()), 0.1 * scale if path.endswith("k/bias") else 1e-3 * scale)
    return max(errors.values())


@pytest.mark.parametrize("pair", SOME, indirect=True)
def test_gradients_of_every_parameter(pair):
    assert gradient_error(pair) < 3e-5


@pytest.mark.parametrize("pair", SOME, indirect=True)
def test_bfloat16_stays_close(pair):
    _, ids, mask = prompts(pair.twin.config, "right")
    (tokens, expected, _), _ = pair.run(ids, mask)
    config = dataclasses.replace(pair.twin.config, dtype="bfloat16")
    images, *_ = example(config, CAMERAS)
    # The values alone: gradients have their parameters' types.
    _, found, _ = _forward(config, pair.twin.params, images, *as_read(config, ids, mask))
    assert found.dtype == jnp.bfloat16
    query = tokens.slot("query")
    assert relative_error(found[:, query], expected[:, query]) < 0.05


@pytest.mark.parametrize("name", [pytest.param("paligemma-3b-224", marks=pytest.mark.slow), "paligemma2-3b-224"])
def test_prefix_attention_is_paligemmas_own(name):
    # Prompt and images in both directions, what follows causally; with a sliding window of 8 in PaliGemma 2's twin.
    config = dataclasses.replace(families.tiny(name), attention="prefix")
    pair = make_pair(config)
    model = pair.twin.torch_model
    images, ids, mask = prompts(config, "right")
    (tokens, hidden, _), _ = pair.run(ids, mask)
    for row in range(len(ids)):
        line = torch_sequence(config, ids[row], mask[row], tokens, QUERIES)[None]
        kinds = torch.from_numpy((np.arange(line.shape[1]) >= line.shape[1] - len(QUERIES)).astype(int))[None]
        arguments = images[row : row + 1], np.ones_like(line)
        with torch.no_grad():
            expected = families.forward(config, model, line, *arguments, token_type_ids=kinds)[1][0]
            causal = families.forward(config, model, line, *arguments)[1][0]
        assert relative_error(in_order(hidden, tokens, row), expected) < TOLERANCE
        assert relative_error(causal, expected) > 1e-3


def test_pictures_in_a_conversation_are_blocks_as_gemmas_own():
    config = families.tiny("gemma-3-4b")
    pair, around = make_pair(config), len(config.image_start) + len(config.image_end)
    images, *_ = prompts(config, "right")
    images, patches = images[:1], config.connector.tokens
    seen = [*config.image_start, *[IMAGE] * patches, *config.image_end]
    line = np.asarray([2, 5, *seen, 6, 7, 8, *seen, 9, 4])[None]
    slots = np.full(line.shape, -1)
    slots[0, 2:][: len(seen)], slots[0, 5 + len(seen) :][: len(seen)] = np.split(np.arange(2 * (patches + around)), 2)
    padded = [np.pad(x, ((0, 0), (0, 3)), constant_values=value) for x, value in ((line, 0), (slots, -1))]
    mask = np.arange(padded[0].shape[1])[None] < line.shape[1]

    @jax.jit
    def ours(params):
        model = base.build(config)
        ids = jnp.where(padded[1] >= 0, 0, padded[0])  # as `types.Pairs` has them
        tokens = model.apply({"params": params}, images, ids, padded[1], mask, mask, method="embed_conversation")
        return model.apply({"params": params}, tokens, method="decode")[0]

    with torch.no_grad():
        expected = families.forward(config, pair.twin.torch_model, line, images, np.ones_like(line))[1][0]
    assert relative_error(ours(pair.twin.params)[0, : line.shape[1]], expected) < TOLERANCE
