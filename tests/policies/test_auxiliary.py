"""Losses beside the actions', each against its definition."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.backbones import registry as backbones
from robovlms_jax.control import robot
from robovlms_jax.policies import auxiliary
from robovlms_jax.policies.auxiliary_config import AheadConfig, AuxiliaryConfig, ClipConfig, ForwardConfig, SceneConfig
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads.mlp import MLPHeadConfig
from robovlms_jax.policies.tasks import base, registry
from robovlms_jax.types import Tokens
from tests import toy

FORWARD = ForwardConfig(loss_weight=0.1, offsets=(1, 3), patch_size=4, width=8, depth=1, head_dim=4)


def test_patches_run_row_by_row_and_are_scaled_alone():
    image = np.random.default_rng(0).normal(3, 5, (2, 8, 12, 3)).astype(np.float32)
    found = auxiliary.patches(jnp.asarray(image), 4)
    assert found.shape == (2, 2 * 3, 48)
    patch = image[1, 4:8, 0:4].reshape(-1)  # the fourth: second row, first column
    np.testing.assert_allclose(found[1, 3], (patch - patch.mean()) / patch.std(), atol=1e-4)


def test_caption_errors_are_the_cross_entropy_of_each_word_given_what_precedes_it():
    torch = pytest.importorskip("torch")
    # bos, 3 image tokens, 5 text tokens (two of them padding in row 0), 1 query
    rng = np.random.default_rng(1)
    hidden, head = rng.normal(size=(2, 10, 6)).astype(np.float32), rng.normal(size=(6, 11)).astype(np.float32)
    ids = rng.integers(0, 11, (2, 6)).astype(np.int32)
    mask = np.arange(6) < np.array([[4], [6]])
    layout = (("bos", 1), ("image", 3), ("text", 5), ("query", 1))
    tokens = Tokens(jnp.asarray(hidden), jnp.ones((2, 10), bool), jnp.zeros((2, 10), jnp.int32), layout)
    found = auxiliary.caption_errors(jnp.asarray(hidden), tokens, ids, mask, lambda x: x @ head)
    for row, length in enumerate((4, 6)):
        # word w (bos is word 0) is predicted from the slot before it: the last image token for word 1
        slots = [3 + word - 1 for word in range(1, length - 1)]
        expected = torch.nn.functional.cross_entropy(
            torch.tensor(hidden[row, slots] @ head), torch.tensor(ids[row, 1 : length - 1]).long()
        )
        np.testing.assert_allclose(found[row], expected.item(), rtol=1e-5)


def test_clip_loss_is_upstreams():
    torch = pytest.importorskip("torch")
    # torch.nn.SmoothL1Loss of Linear(max over tokens) and the sentence, one mean per step
    rng = np.random.default_rng(2)
    features, sentence = rng.normal(size=(2, 3, 4, 6)).astype(np.float32), rng.normal(size=(2, 5)).astype(np.float32)
    module = auxiliary.Auxiliary(AuxiliaryConfig(clip=ClipConfig(weights="somewhere", dim=5)), ("static",), 8)
    params = toy.random_init(module, features[:, 0], features[:, 0])["params"]
    found = module.apply({"params": params}, features, sentence, method="clip_alignment_loss")
    kernel, bias = (np.asarray(params["clip"][name]) for name in ("kernel", "bias"))
    for row in range(2):
        for step in range(3):
            projected = torch.tensor(features[row, step].max(0) @ kernel + bias)
            expected = torch.nn.functional.smooth_l1_loss(projected, torch.tensor(sentence[row]))
            np.testing.assert_allclose(found[row, step], expected.item(), rtol=1e-5)


def test_foresight_compares_each_camera_and_offset_and_skips_what_was_not_recorded():
    rng = np.random.default_rng(3)
    module = auxiliary.Auxiliary(AuxiliaryConfig(forward=FORWARD), ("wrist", "static"), 8)
    features = rng.normal(size=(2, 1, 6)).astype(np.float32)
    future = {camera: jnp.asarray(rng.normal(size=(2, 2, 8, 8, 3)), jnp.float32) for camera in ("static", "wrist")}
    params = toy.random_init(module, features, features)["params"]
    predicted = module.apply({"params": params}, features, method=lambda m, x: m.forward(x))
    assert predicted.shape == (2, 2, 2, 4, 48)  # offsets, cameras, patches
    real = jnp.asarray([[[True, False], [False, False]], [[False, False], [False, False]]])
    found = module.apply({"params": params}, features, future, real, method="forward_prediction_loss")
    wrist = auxiliary.patches(future["wrist"][0, 0], 4)
    np.testing.assert_allclose(found[0], np.square(predicted[0, 0, 0] - wrist).mean(), rtol=1e-5)
    assert found[1] == 0


def test_movements_are_compared_in_units_of_the_scale():
    torch = pytest.importorskip("torch")
    # torch's Huber loss of Linear(mean over queries) and the movement in units of the scale, one mean per window
    rng = np.random.default_rng(4)
    features, moved = rng.normal(size=(3, 2, 6)).astype(np.float32), rng.normal(size=(3, 2, 3)).astype(np.float32)
    config = AuxiliaryConfig(ahead=AheadConfig(loss_weight=1.0, offsets=(5, 9), scale=0.5))
    module = auxiliary.Auxiliary(config, ("static",), 8, moving=3)
    params = toy.random_init(module, features, features)["params"]
    loss, off = module.apply({"params": params}, features, moved, method="movement_errors")
    kernel, bias = (np.asarray(params["ahead"][name]) for name in ("kernel", "bias"))
    predicted = (features.mean(1) @ kernel + bias).reshape(3, 2, 3)
    for row in range(3):
        expected = torch.nn.functional.huber_loss(torch.tensor(predicted[row]), torch.tensor(moved[row] / 0.5))
        np.testing.assert_allclose(loss[row], expected.item(), rtol=1e-5)
        distance = np.linalg.norm(0.5 * predicted[row] - moved[row], axis=-1).mean()
        np.testing.assert_allclose(off[row], distance, rtol=1e-5)


def test_the_scene_is_told_from_the_pictures_tokens_of_each_windows_newest_frame():
    torch = pytest.importorskip("torch")
    # torch's Huber loss of Linear(all tokens of the pictures one after the other) and the numbers in units of the scale
    rng = np.random.default_rng(5)
    hidden, numbers = rng.normal(size=(3, 4, 6)).astype(np.float32), rng.normal(size=(3, 2)).astype(np.float32)
    config = AuxiliaryConfig(scene=SceneConfig(loss_weight=1.0, columns=(6, 8), scale=0.5))
    module = auxiliary.Auxiliary(config, ("static",), 8)
    params = toy.random_init(module, hidden, hidden)["params"]
    loss, off = module.apply({"params": params}, hidden, numbers, method="scene_errors")
    kernel, bias = (np.asarray(params["scene"][name]) for name in ("kernel", "bias"))
    predicted = hidden.reshape(3, -1) @ kernel + bias
    for row in range(3):
        expected = torch.nn.functional.huber_loss(torch.tensor(predicted[row]), torch.tensor(numbers[row] / 0.5))
        np.testing.assert_allclose(loss[row], expected.item(), rtol=1e-5)
        np.testing.assert_allclose(off[row], np.abs(0.5 * predicted[row] - numbers[row]).mean(), rtol=1e-5)


@pytest.mark.parametrize("history", ["policy_head", "interleaved", "video"])
@pytest.mark.parametrize("task", ["scene", "ahead"])
def test_what_is_told_is_told_of_the_newest_frame_of_each_window(history, task):
    """Fails if a window's numbers are told from another frame, or compared with another window's. The newest frame of
    the third window is changed, then its numbers: losses are each window's own."""
    head = {"head": MLPHeadConfig(hidden_size=8)} if history == "video" else {}
    on = {"scene": SceneConfig(loss_weight=1.0, columns=(0,)), "ahead": AheadConfig(loss_weight=1.0, offsets=(2,))}
    model = toy.make_model(history=history, auxiliary=AuxiliaryConfig(**{task: on[task]}), **head)
    rng = np.random.default_rng(0)
    numbers = rng.normal(size={"scene": (toy.B, 4, 1), "ahead": (toy.B, 4, 1, 3)}[task]).astype(np.float32)
    batch = toy.make_batch(rng, windows=4).replace(**{task: numbers})
    params = toy.random_params(model, batch)
    (found,) = (each for each in registry.make(model.config) if each.name == task)

    def losses(batch):
        bound = model.bind({"params": params})
        outputs = bound.train_outputs(toy.example(model, batch))
        shape = (toy.B, 4, 1, 1)
        masks = [np.broadcast_to((np.arange(4) == k)[:, None, None], shape).reshape(-1, 1, 1) for k in range(4)]
        examples = [base.Example(batch, None, jnp.asarray(mask), jnp.float32(toy.B)) for mask in masks]
        return np.array([found(bound, outputs, example)[0] for example in examples])

    before, newest = losses(batch), toy.W - 1 + 2
    images = {camera: x.copy() for camera, x in batch.inputs.images.items()}
    for x in images.values():
        x[:, newest] = 255 - x[:, newest]
    seen = losses(batch.replace(inputs=batch.inputs.replace(images=images))) != before
    assert seen.tolist() == {"policy_head": [False, False, True, False]}.get(history, [False, False, True, True])
    moved = numbers.copy()
    moved[:, 2] += 1.0
    assert (losses(batch.replace(**{task: moved})) != before).tolist() == [False, False, True, False]


def test_backbones_whose_pictures_have_no_hidden_states_cannot_tell_the_scene():
    model = toy.make_model(auxiliary=AuxiliaryConfig(scene=SceneConfig(loss_weight=1.0)))
    gated = dataclasses.replace(model, vlm=backbones.get("flamingo-mpt-1b"))
    with pytest.raises(ValueError, match=r"policy\.auxiliary\.scene reads the pictures' own hidden states"):
        gated.bind({"params": {}}).backbone  # noqa: B018, `setup` runs
    for changes, message in (
        ({"columns": ()}, "each once"),
        ({"columns": (1, 1)}, "each once"),
        ({"columns": (-1,)}, "each once"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            SceneConfig(**changes)


def test_movements_need_a_state_with_places_and_features():
    for changes, message in (
        ({"offsets": ()}, "each at least 1"),
        ({"offsets": (3, 0)}, "each at least 1"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
        ({"loss_weight": -1.0}, "loss_weight=-1.0 must be 0"),
    ):
        with pytest.raises(ValueError, match=message):
            AheadConfig(**changes)
    on = AuxiliaryConfig(ahead=AheadConfig(loss_weight=0.1))
    assert PolicyConfig(auxiliary=on).moving == (0, 1, 2)
    stateless = dataclasses.replace(robot.CALVIN, state=())
    with pytest.raises(
        ValueError, match="predicts positions and joints of the robot's state; that of 'calvin' has none"
    ):
        PolicyConfig(auxiliary=on, robot=stateless)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"offsets": (0,)}, "each at least 1"), ({"offsets": ()}, "each at least 1"), ({"width": 10}, "must divide")],
)
def test_settings_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ForwardConfig(**values)
