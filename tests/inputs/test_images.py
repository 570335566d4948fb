import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from robovlms_jax.inputs import images
from robovlms_jax.inputs.config import AugmentConfig

PIL_FILTERS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC, "lanczos": Image.LANCZOS}


def preprocess(pixels, spec, dtype=jnp.float32):
    """As `objective.prepare` does it in a program: resized, then normalised."""
    return images.normalize(images.resize(pixels, spec.size, spec.interpolation), spec.mean, spec.std).astype(dtype)


CLIP = images.ImageSpec(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def make_frames(height, width):
    """Noise, black-and-white noise (the worst case for overshoot) and a picture with straight edges."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    noise[1] = noise[1] // 128 * 255
    edges = np.zeros((1, height, width, 3), np.uint8)
    edges[:, height // 3 :, width // 4 :] = (255, 40, 200)
    return np.concatenate([noise, edges])


RESIZES = [(200, 200, 224), (84, 84, 224), (256, 256, 224), (200, 200, 56), (84, 84, 56), (224, 224, 224), (53, 97, 31)]


@pytest.mark.parametrize(("height", "width", "size"), RESIZES)
def test_resize_equals_pillow(height, width, size):
    frames = make_frames(height, width)
    resized = jax.jit(images.resize, static_argnums=1)(frames, size)
    expected = [Image.fromarray(frame).resize((size, size), Image.BICUBIC) for frame in frames]
    np.testing.assert_array_equal(resized, np.stack(expected))


@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos"])
@pytest.mark.parametrize("size", [29, 64])
def test_other_filters_equal_pillow(interpolation, size):
    frame = make_frames(48, 48)[0]
    expected = Image.fromarray(frame).resize((size, size), PIL_FILTERS[interpolation])
    np.testing.assert_array_equal(images.resize(frame, size, interpolation), expected)


def test_resize_equals_pillow_on_robot_frames(shared_data):
    with np.load(shared_data / "calvin_sample/training/episode_0000010.npz") as episode:
        for camera in ("rgb_static", "rgb_gripper"):
            expected = Image.fromarray(episode[camera]).resize((224, 224), Image.BICUBIC)
            np.testing.assert_array_equal(jax.jit(images.resize, static_argnums=1)(episode[camera], 224), expected)


def test_matching_size_is_no_work():
    frame = make_frames(56, 56)
    assert images.resize(frame, 56) is frame


def test_resize_refuses_what_is_not_stored_uint8():
    with pytest.raises(ValueError, match=r"uint8.*float32"):
        images.resize(np.zeros((8, 8, 3), np.float32), 4)
    with pytest.raises(ValueError, match=r"got uint8\[8, 8, 4\]"):
        images.resize(np.zeros((8, 8, 4), np.uint8), 4)


def test_preprocess_is_upstreams_formula_in_any_leading_shape():
    frames = make_frames(84, 84).reshape(1, 3, 84, 84, 3)
    out = preprocess(frames, CLIP)
    assert out.shape == (1, 3, 224, 224, 3)
    assert out.dtype == jnp.float32
    resized = np.asarray(Image.fromarray(frames[0, 1]).resize((224, 224), Image.BICUBIC))
    np.testing.assert_allclose(out[0, 1], (resized / 255.0 - CLIP.mean) / CLIP.std, atol=2e-6)
    half = preprocess(frames, CLIP, jnp.bfloat16)
    np.testing.assert_array_equal(half, out.astype(jnp.bfloat16))


def test_preprocess_equals_upstreams_own_images(golden, shared_data):
    spec = dataclasses.replace(CLIP, size=28)
    batch = golden("calvin/w8c10.npz")
    for window in (0, 5, 29):
        start = batch["episode_lookup"][window]
        for camera, name in (("rgb_static", "rgb"), ("rgb_gripper", "hand_rgb")):
            files = [shared_data / f"golden/calvin_tiny/training/episode_{start + i:07d}.npz" for i in range(8)]
            ours = preprocess(np.stack([np.load(file)[camera] for file in files]), spec)
            np.testing.assert_allclose(ours, batch[f"{name}_{window}"].transpose(0, 2, 3, 1), atol=2e-6)


def test_shift_is_a_crop_of_the_padded_image_shared_by_the_frames_of_a_segment():
    shift = 3
    frames = np.random.default_rng(0).normal(size=(16, 2, 9, 7, 3)).astype(np.float32)
    shifted = jax.jit(images.random_shift, static_argnums=2)(jax.random.key(1), frames, shift)
    padded = np.pad(frames, ((0, 0), (0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
    for segment, out in zip(padded, shifted):
        crops = [(y, x) for y in range(7) for x in range(7) if np.array_equal(segment[:, y : y + 9, x : x + 7], out)]
        assert len(crops) == 1


def test_every_offset_is_equally_likely_and_axes_are_independent():
    y, x = np.mgrid[:11, :11].astype(np.float32)
    frames = jnp.broadcast_to(jnp.stack([y, x, x], -1), (5000, 1, 11, 11, 3))
    centre = np.asarray(images.random_shift(jax.random.key(0), frames, 2))[:, 0, 5, 5, :2].astype(int) - 5
    counts = np.zeros((5, 5), int)
    np.add.at(counts, tuple((centre + 2).T), 1)
    assert counts.sum() == 5000
    assert np.abs(counts - 200).max() < 60  # four standard deviations


def test_shift_keeps_dtype_depends_on_the_key_and_can_be_off():
    frames = jnp.asarray(np.random.default_rng(0).normal(size=(4, 1, 8, 8, 3)), jnp.bfloat16)
    one, other = (images.random_shift(jax.random.key(seed), frames, 4) for seed in (0, 1))
    assert one.dtype == jnp.bfloat16
    assert not np.array_equal(one, other)
    assert images.random_shift(jax.random.key(0), frames, 0) is frames


def test_image_spec_round_trip(tmp_path):
    spec = images.ImageSpec(56, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "lanczos")
    images.write_image_spec(spec, tmp_path)
    assert images.read_image_spec(tmp_path) == spec


PUBLISHED = {
    "kosmos-2, llava": {
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
    },
    "paligemma": {"size": {"height": 224, "width": 224}, "do_center_crop": None, "crop_size": None},
    "older files": {"size": 224, "crop_size": 224},
    "crop decides": {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
}


@pytest.mark.parametrize("fields", PUBLISHED.values(), ids=PUBLISHED.keys())
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_published_spellings_are_read(tmp_path, fields, name):
    fields = fields | {
        "image_mean": list(CLIP.mean),
        "image_std": list(CLIP.std),
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    (tmp_path / name).write_text(json.dumps(fields if name[:3] == "pre" else {"image_processor": fields}))
    assert images.read_image_spec(tmp_path) == CLIP


FOUND = {
    "both edges": {"size": {"shortest_edge": 224, "longest_edge": 224}},
    "crop size as a number": {"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True},
    "an edge that is null": {"size": {"shortest_edge": 224, "longest_edge": None}},
    "one mean for all": {"image_mean": 0.5, "image_std": 0.5},
    "filter by name": {"resample": "bicubic"},
    "filter by name in capitals": {"resample": "BICUBIC"},
    "factor null": {"rescale_factor": None, "do_rescale": None, "do_normalize": None},
    "crop null": {"do_center_crop": None, "crop_size": None},
    "no resize": {"do_resize": False},
}
HALF = {"size": {"height": 224, "width": 224}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}


@pytest.mark.parametrize("fields", FOUND.values(), ids=FOUND.keys())
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_spellings_as_found_are_read(tmp_path, fields, mark):
    (tmp_path / "preprocessor_config.json").write_bytes(mark + json.dumps(HALF | fields).encode())
    assert images.read_image_spec(tmp_path) == images.ImageSpec(224, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "SiglipImageProcessorFast", "SmolVLMImageProcessorFast"])
def test_a_filter_left_out_is_the_one_of_its_class(tmp_path, kind):
    import transformers

    fields = {key: value for key, value in HALF.items() if key != "resample"} | {"image_processor_type": kind}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    theirs = getattr(transformers, kind.removesuffix("Fast") + "Pil", None) or getattr(transformers, kind)
    try:
        resample = int(theirs.resample)
    except ImportError as error:  # the newest and the oldest packages are tried without torch
        pytest.skip(f"transformers' own class cannot be asked: {error}")
    assert images.read_image_spec(tmp_path).interpolation == images._PIL_CODES[resample]


def test_a_stub_gives_way_to_the_other_file_and_two_that_differ_are_refused(tmp_path):
    first, second = tmp_path / "preprocessor_config.json", tmp_path / "processor_config.json"
    first.write_text(json.dumps({"auto_map": {}, "processor_class": "X"}))
    second.write_text(json.dumps({"image_processor": HALF}))
    assert images.read_image_spec(tmp_path).size == 224
    first.write_text(json.dumps(HALF | {"size": 384}))
    with pytest.raises(ValueError, match=r"twice, and differently. preproc.*size=384.*processor_config.*size=224"):
        images.read_image_spec(tmp_path)
    first.write_text(json.dumps({"processor_class": "X"}))
    second.write_text(json.dumps({"image_processor": None, "image_seq_length": 256}))
    with pytest.raises(FileNotFoundError, match=r"Without size, .*: preprocessor_config.json and processor"):
        images.read_image_spec(tmp_path)


def test_unusable_image_settings_are_named(tmp_path):
    good = {"size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    cases = [
        ({"size": {"shortest_edge": 3136, "longest_edge": 12845056}}, "longest_edge"),
        ({"size": {"height": 224, "width": 336}}, "equal height and width"),
        ({"resample": 0}, "resample=0"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"do_normalize": False}, "do_normalize"),
        ({"image_std": [0.5, 0.5, 0.0]}, r"preprocessor_config.json: .*stds > 0"),
        ({"image_mean": [0.5, None, 0.5]}, r"preprocessor_config.json: image_mean=\[0.5, None, 0.5\]; expected three"),
        ({"image_mean": "0.5"}, "image_mean='0.5'"),
        ({"resample": None}, "resample=None"),
        ({"resample": "nearest"}, "resample=nearest"),
        ({"resample": [3]}, r"resample=\[3\]"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"size": {"max_height": 224, "max_width": 224}}, "max_height"),
        ({"size": "224"}, "image size 224; expected a number"),
        ({"size": None}, "image size None"),
    ]
    path = tmp_path / "preprocessor_config.json"
    for change, message in cases:
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            images.read_image_spec(tmp_path)
    path.write_text(json.dumps({key: good[key] for key in ("size", "resample", "image_std")}))
    with pytest.raises(ValueError, match="image_mean"):
        images.read_image_spec(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config.json is not JSON"):
        images.read_image_spec(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config.json"):
        images.read_image_spec(tmp_path)


def frames_of_two_segments() -> np.ndarray:
    """Each segment's frames are alike, so that a difference after augmentation would be one between frames."""
    rng = np.random.default_rng(0)
    return np.repeat(rng.integers(30, 220, (2, 1, 16, 16, 3), np.uint8), 3, axis=1)


@pytest.mark.parametrize("name", ["crop_area", "brightness", "contrast", "saturation", "hue", "erase_area"])
def test_augmentation_is_constant_within_a_segment_and_differs_between_them(name):
    x = frames_of_two_segments()
    out = jax.jit(lambda key: images.augment(key, x, AugmentConfig(**{name: 0.3})))(jax.random.key(0))
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 255
    for segment in out:
        np.testing.assert_array_equal(segment[0], segment[1])
        np.testing.assert_array_equal(segment[0], segment[2])
    assert np.abs(out[0] - x[0]).max() > 1 and np.abs(out[1] - x[1]).max() > 1
    same = np.broadcast_to(x[:1], x.shape)
    out = np.asarray(images.augment(jax.random.key(0), same, AugmentConfig(**{name: 0.3})))
    assert np.abs(out[0] - out[1]).max() > 1


def test_no_augmentation_changes_nothing():
    x = frames_of_two_segments()
    assert images.augment(jax.random.key(0), x, AugmentConfig()) is x


def test_erasing_covers_one_rectangle_of_at_most_the_area_with_the_mean_colour():
    x = np.random.default_rng(0).integers(0, 256, (40, 2, 20, 30, 3)).astype(np.float32)
    out = np.asarray(images.augment(jax.random.key(0), x, AugmentConfig(erase_area=0.25)))
    areas = []
    for before, after in zip(x, out):
        changed = (before != after).any(axis=(0, 3))
        rows, columns = (np.flatnonzero(changed.any(axis=axis)) for axis in (1, 0))
        areas.append(changed.mean())
        if changed.any():
            assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            mean = np.broadcast_to(before.mean(axis=(0, 1, 2)), (2, changed.sum(), 3))
            np.testing.assert_allclose(after[:, changed], mean, rtol=1e-4)
    assert max(areas) < 0.3 and max(areas) > 0.15 and np.mean(areas) > 0.06  # pixels are rounded to


def test_colour_changes_are_what_they_say():
    x = jnp.asarray(frames_of_two_segments(), jnp.float32) / 4 + 96  # far from the limits, so that nothing is clipped
    grey = jnp.array([0.299, 0.587, 0.114])
    bright = images.augment(jax.random.key(1), x, AugmentConfig(brightness=0.1)) - x
    np.testing.assert_allclose(bright, np.broadcast_to(bright[:, :1, :1, :1, :1], x.shape), atol=1e-3)
    assert np.abs(bright).max() <= 25.5
    contrast = images.augment(jax.random.key(1), x, AugmentConfig(contrast=0.3))
    np.testing.assert_allclose(contrast.mean(axis=(1, 2, 3)), x.mean(axis=(1, 2, 3)), rtol=1e-5)
    pale = images.augment(jax.random.key(1), x, AugmentConfig(saturation=0.3))
    np.testing.assert_allclose(pale @ grey, x @ grey, rtol=1e-4)
    turned = images.augment(jax.random.key(1), x, AugmentConfig(hue=0.1))
    np.testing.assert_allclose(turned.sum(-1), x.sum(-1), rtol=1e-4)  # along the grey axis nothing moves
    np.testing.assert_allclose(jnp.square(turned).sum(-1), jnp.square(x).sum(-1), rtol=1e-4)


def test_a_crop_shows_a_part_of_the_image_at_full_size():
    # On a ramp every crop is a ramp again, less steep by the crop's side.
    ramp = np.broadcast_to(np.arange(32, dtype=np.float32)[None, None, None, :, None] * 4, (8, 1, 32, 32, 3))
    out = np.asarray(images.augment(jax.random.key(3), ramp, AugmentConfig(crop_area=0.5)))[:, 0, 16, 4:28, 0]
    steps = np.diff(out, axis=1)
    np.testing.assert_allclose(steps, np.broadcast_to(steps[:, :1], steps.shape), atol=1e-2)
    sides = steps[:, 0] / 4
    assert (sides >= 0.5**0.5 - 1e-3).all() and (sides <= 1.001).all() and np.ptp(sides) > 0.05


PROCESSORS = {
    "CLIPImageProcessor": {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},  # LLaVA
    "SiglipImageProcessor": {"size": {"height": 56, "width": 56}},  # PaliGemma
    "Qwen2VLImageProcessor": {"min_pixels": 56 * 56, "max_pixels": 56 * 56, "patch_size": 14, "merge_size": 2},
    "GotOcr2ImageProcessor": {"size": {"height": 56, "width": 56}},  # InternVL
    "JanusImageProcessor": {"size": {"height": 56, "width": 56}},
    "Gemma3ImageProcessor": {"size": {"height": 56, "width": 56}, "resample": 2},
    "Qwen2VLImageProcessorFast": {  # Qwen3-VL
        "size": {"shortest_edge": 64 * 64, "longest_edge": 64 * 64},
        "patch_size": 16,
        "merge_size": 2,
    },
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_square_frames_are_prepared_as_transformers_processors_do(tmp_path, kind):
    torch = pytest.importorskip("torch")
    import transformers

    from tests.backbones.families import flat_patches

    statistics = {"image_mean": list(CLIP.mean), "image_std": list(CLIP.std), "resample": 3}
    fields = {"image_processor_type": kind, **statistics, **PROCESSORS[kind]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    frames = make_frames(84, 84)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(images=list(frames), return_tensors="pt")["pixel_values"]
    spec = images.read_image_spec(tmp_path, 4 * fields.get("patch_size", 14))
    ours = np.asarray(preprocess(jnp.asarray(frames), spec)).transpose(0, 3, 1, 2)
    if kind.startswith("Qwen"):
        ours = flat_patches(torch.tensor(ours), fields["patch_size"])["pixel_values"].numpy()
    level = 1 / (255 * max(CLIP.std))
    assert np.abs(ours - theirs.numpy()).max() < 1.01 * level


def test_one_picture_of_processors_that_split_and_files_of_models_with_their_own_code(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 1}
    path.write_text(json.dumps(half | {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}))
    assert images.read_image_spec(tmp_path) == images.ImageSpec(512, (0.5,) * 3, (0.5,) * 3, "lanczos")
    path.write_text(json.dumps({"auto_map": {"AutoProcessor": "processing.Processor"}}))
    with pytest.raises(FileNotFoundError, match="expected a model directory"):
        images.read_image_spec(tmp_path)


@pytest.mark.parametrize("interpolation", PIL_FILTERS)
@pytest.mark.parametrize("shape", [(20, 20), (71, 12), (12, 71), (28, 28), (28, 40)])
def test_a_picture_resized_on_the_host_is_the_one_resized_on_the_device(interpolation, shape):
    # High ones, too, whose rows Pillow would shrink first.
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    expected = jax.jit(lambda x: images.resize(x, 28, interpolation))(image)
    np.testing.assert_array_equal(images.resize_on_host(image, 28, interpolation), expected)
