"""A camera that a frame lacks: black pixels that nothing attends to."""

from __future__ import annotations

import jax
import numpy as np

from tests import toy


def test_a_missing_image_is_not_attended():
    # Whatever pixels stand in for a missing wrist image, features are those of the frame without it; a frame that has
    # its image notices every pixel.
    model, rng = toy.make_model(), np.random.default_rng(4)
    batch = toy.make_batch(rng)
    frames = batch.inputs.step_mask.shape
    mask = {"static": np.ones(frames, bool), "wrist": np.arange(frames[1])[None].repeat(frames[0], 0) != 1}
    batch = batch.replace(inputs=batch.inputs.replace(image_mask=mask))
    params = toy.random_params(model, batch)
    features = jax.jit(lambda inputs: model.apply({"params": params}, inputs, method="embed"))
    decode = jax.jit(lambda inputs: model.apply({"params": params}, inputs, method="train_outputs").features)
    wrist = batch.inputs.images["wrist"].copy()
    wrist[:, 1] = 255 - wrist[:, 1]
    changed = batch.replace(inputs=batch.inputs.replace(images={**batch.inputs.images, "wrist": wrist}))
    before, after = (toy.example(model, x) for x in (batch, changed))
    slot = features(before).slot("image")
    hidden = features(before).mask[:, slot].reshape(*frames, 2, -1)
    cameras = list(model.config.cameras)
    np.testing.assert_array_equal(hidden[:, :, cameras.index("wrist")].all(-1), mask["wrist"])
    assert hidden[:, :, cameras.index("static")].all()
    np.testing.assert_array_equal(decode(before), decode(after))
    seen = before.replace(image_mask=None), after.replace(image_mask=None)
    assert np.abs(decode(seen[0]) - decode(seen[1])).max() > 0
