from __future__ import annotations

import pickle

import jax
import numpy as np
import pytest

from robovlms_jax.control import interface
from robovlms_jax.envs.calvin import initial_states, task_chains, tasks
from robovlms_jax.playtable import env
from robovlms_jax.playtable.pictures import cameras, tiles
from robovlms_jax.playtable.scene import initial_obs, stack_scenes
from tests.playtable.conftest import action
from tests.processes import run_python

SIZES = {"static": 40, "wrist": 24}


@pytest.fixture(scope="module")
def table():
    return env.PlayTable("D", image_sizes=SIZES)


@pytest.fixture(scope="module")
def tables():
    return env.PlayTables(["A", "D", "D"], image_sizes=SIZES)


def chain_start(index=0):
    return dict(
        zip(("robot_obs", "scene_obs"), initial_states.initial_state(task_chains.official_chains()[index].condition))
    )


def test_a_table_is_an_env(table):
    assert isinstance(table, interface.Env)
    assert table.name == "playtable-D"
    table.reset(**chain_start())
    observation = table.observe()
    assert {name: image.shape for name, image in observation.images.items()} == {
        "static": (40, 40, 3),
        "wrist": (24, 24, 3),
    }
    assert all(image.dtype == np.uint8 for image in observation.images.values())
    np.testing.assert_allclose(observation.proprio, chain_start()["robot_obs"], atol=1e-5)
    np.testing.assert_allclose(table.info["scene_obs"], chain_start()["scene_obs"], atol=1e-5)
    assert set(tasks.SceneInfo.__annotations__) <= set(table.info)


def test_pictures_have_calvins_sizes_by_default(monkeypatch):
    # What is drawn is asked in test_render.py.
    assert cameras.SIZES == {"static": 200, "wrist": 84}
    black = lambda scenes, which, states, camera, size, *_: np.zeros((len(which), size, size, 3), np.uint8)  # noqa: E731
    monkeypatch.setattr(env, "render_batch", black)
    monkeypatch.setattr(env, "backdrops", lambda scenes, size: tiles.Backdrop(*np.zeros((2, 1, 3))))
    observation = env.PlayTable("B").observe()
    assert {name: image.shape[0] for name, image in observation.images.items()} == cameras.SIZES


def test_nothing_is_rendered_before_someone_looks(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("rendered")

    monkeypatch.setattr(env, "render_batch", fail)
    monkeypatch.setattr(env, "backdrops", fail)
    table = env.PlayTable("D")
    table.reset()
    table.step(action())
    assert table.info["contacts"].shape == (4, 13)
    with pytest.raises(AssertionError, match="rendered"):
        table.observe()


def test_a_view_for_people_has_both_lamps_whole_and_stays_of_its_moment(tables, monkeypatch):
    monkeypatch.setattr(env, "VIEW_PX", 60)
    lit = next(c for c in task_chains.initial_conditions() if c["led"] == c["lightbulb"] == 1)
    tables.reset([1], [dict(zip(("robot_obs", "scene_obs"), initial_obs(lit, "D"), strict=True))])
    (view,) = pickle.loads(pickle.dumps(tables.views([1])))
    tables.reset([1], [{}])
    picture = view().astype(int)
    assert picture.shape == (60, 60, 3)
    red, green, blue = np.moveaxis(picture, -1, 0)
    led, bulb = (green > red + 60) & (green > blue + 60), (red > blue + 100) & (green > blue + 100)
    for lamp in (led, bulb):
        rows, columns = np.nonzero(lamp)
        assert len(rows) > 4 and rows.min() > 0 and 0 < columns.min() <= columns.max() < 59
    np.testing.assert_array_equal(view(), picture)


def test_reset_without_a_state_is_neutral(table):
    table.step(action(move=(1.0, 0.0, 0.0)))
    table.reset()
    np.testing.assert_allclose(table.info["robot_obs"], initial_states.INITIAL_ROBOT_OBS, atol=1e-5)
    assert not table.info["scene_obs"][:6].any()
    standing = table.info["contacts"][1:, tasks.BODIES.index("base")]
    assert standing.all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros(6), "7 finite numbers"),
        (np.full(7, np.nan), "7 finite numbers"),
        (np.zeros((1, 7)), "7 finite numbers"),
        (np.zeros(7), "exactly -1 .* or 1 .*binarise"),
    ],
)
def test_wrong_actions_are_refused_and_change_nothing(table, bad, message):
    before = table.info["robot_obs"]
    with pytest.raises(ValueError, match=message):
        table.step(bad)
    np.testing.assert_array_equal(table.info["robot_obs"], before)


@pytest.mark.parametrize("wrong", [{"robot_obs": np.zeros(7)}, {"scene_obs": np.full(24, np.inf)}])
def test_wrong_states_are_refused(table, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} .*finite numbers"):
        table.reset(**wrong)


def test_unknown_scenes_and_cameras_are_refused():
    with pytest.raises(ValueError, match="unknown scene 'E'; known scenes: A, B, C, D"):
        env.PlayTable("E")
    with pytest.raises(ValueError, match=r"image_sizes=.*top"):
        env.PlayTable("D", image_sizes={"top": 64})
    with pytest.raises(ValueError, match="size=3 does not fit 2 scenes"):
        env.PlayTables(["A", "B"], 3)


def test_tables_do_what_single_tables_do(table, tables):
    assert tables.name == "playtable-AD"
    starts = [chain_start(i) for i in range(3)]
    tables.reset([0, 1, 2], starts)
    table.reset(**starts[1])
    for k in range(6):
        command = action(move=(0.6, 0.2, -0.4), gripper=1.0 if k < 3 else -1.0)
        infos = tables.step([0, 1, 2], np.stack([command] * 3))
        table.step(command)
    for key, value in table.info.items():
        np.testing.assert_allclose(infos[1][key], value, atol=1e-4)
    ours, theirs = table.observe(), tables.observe([1, 2])[0]
    for camera in interface.CAMERAS:
        assert np.abs(ours.images[camera].astype(int) - theirs.images[camera]).mean() < 1.0


def test_the_others_stand_still(tables):
    tables.reset([0, 1, 2], [chain_start(i) for i in range(3)])
    before = tables.infos([0, 2])
    tables.step([1], action(move=(0.0, 0.0, 1.0), gripper=1.0)[None])
    assert tables.infos([1])[0]["robot_obs"][2] > before[0]["robot_obs"][2] + 0.005
    for old, new in zip(before, tables.infos([0, 2])):
        np.testing.assert_array_equal(old["robot_obs"], new["robot_obs"])
    tables.restart(1)
    np.testing.assert_allclose(tables.infos([1])[0]["robot_obs"], initial_states.INITIAL_ROBOT_OBS, atol=1e-5)
    assert tables.observe([]) == []


def test_pictures_are_of_the_right_tables():
    """Eleven tables of three scenes: calls with room for sixteen on a CPU, none full; each picture as if alone. Of the
    camera that needs backdrops; the other's pictures are compared in `test_tables_do_what_single_tables_do`."""
    scenes, which = stack_scenes("ABD"), np.array([2, 0, 1, 1, 2, 0, 0, 2, 1, 0, 2])
    robot = np.tile(initial_states.INITIAL_ROBOT_OBS, (11, 1))
    robot[:, 0] += np.linspace(-0.1, 0.1, 11)
    states = env.reset_batch(env.pick(scenes, which), robot, np.tile(chain_start()["scene_obs"], (11, 1)))
    backdrops, sizes = env.backdrops(scenes, 32), {"static": 32}
    found = env.pictures(scenes, which, states, sizes, backdrops)
    for camera, size in sizes.items():
        expected = env.render_batch(scenes, which, states, camera, size, backdrops, "cpu", 11)
        np.testing.assert_array_equal(found[camera], expected)
        assert len({image.tobytes() for image in found[camera]}) == 11
        few = env.render_batch(scenes, which, states, camera, size, backdrops, "cpu", 2)
        np.testing.assert_array_equal(few[:2], expected[:2])
        assert not few[2:].any()  # nothing is drawn for nobody


def test_a_single_table_draws_one_picture_of_each_camera(monkeypatch):
    table, wanted = env.PlayTable("A", image_sizes={"static": 32, "wrist": 24}), []

    def count(scenes, which, states, camera, size, backdrops, platform, count):
        wanted.append((camera, len(which), count))
        return np.zeros((len(which), size, size, 3), np.uint8)

    monkeypatch.setattr(env, "render_batch", count)
    monkeypatch.setattr(env.cpu, "default_platform", lambda: "cpu")
    table.observe()
    assert wanted == [("static", 16, 1), ("wrist", 16, 1)]


@pytest.mark.slow
def test_batches_mix_scenes():
    """The functional form: four variants in one call, each as if alone."""
    scenes = stack_scenes("ABCD")
    robot = np.tile(initial_states.INITIAL_ROBOT_OBS, (8, 1))
    scene_obs = np.tile(chain_start()["scene_obs"], (8, 1))
    which = np.arange(8) % 4
    own = env.pick(scenes, which)
    states = env.reset_batch(own, robot, scene_obs)
    states = env.step_batch(own, states, np.stack([action()] * 8))
    images = env.render_batch(scenes, which, states, "static", 32, env.backdrops(scenes, 32), "cpu")
    assert images.shape == (8, 32, 32, 3)
    np.testing.assert_array_equal(images[:4], images[4:])
    assert np.abs(images[0].astype(int) - images[1]).mean() > 5
    info = jax.device_get(env.info_batch(own, states))
    np.testing.assert_allclose(info["slider"], np.minimum(scene_obs[0, 0], scenes.joint_range[which, 0]), atol=1e-6)


STEPS = """
import jax, numpy as np
from robovlms_jax.envs.calvin import initial_states, task_chains, tasks
from robovlms_jax.playtable import env
from robovlms_jax.playtable.mechanics import physics
from robovlms_jax.playtable.scene import stack_scenes
scenes = stack_scenes(["A", "D"])
condition = task_chains.official_chains()[0].condition
robot, scene = (np.tile(x, (2, 1)) for x in initial_states.initial_state(condition, "D"))
actions = np.array([[0.3, -0.2, -0.5, 0.1, 0.0, 0.4, 1.0], [-0.5, 0.4, -0.7, 0.0, 0.2, 0.0, -1.0]], np.float32)
from robovlms_jax.parallel import cpu
if cpu.options("tiny_kernels", "cpu") == cpu.options("small_kernels", "cpu"):
    print("one code generator")  # of this XLA
    raise SystemExit
ends = []
for kind in (env.STEP_KIND, "small_kernels"):
    step = cpu.jit(physics.step_tables, kind)
    states = env.reset_batch(scenes, robot, scene)
    for _ in range(20):
        states = step(scenes, states, actions)
    ends.append(jax.device_get(states))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *ends)
print("alike")
"""


@pytest.mark.slow
def test_both_code_generators_step_alike():
    # Of their own, because tests compile with the older one throughout.
    said = run_python("-c", STEPS, XLA_FLAGS="", JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    assert said in ("alike\n", "one code generator\n")
