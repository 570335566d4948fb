"""The how-to pages do what they say: their statements are run, on small data and small models."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from experiments import lerobot
from robovlms_jax.data.lerobot import synthetic
from tests import pages

WEIGHTS = "--backbone.weights hf://microsoft/kosmos-2-patch14-224"
TINY = (
    "--backbone.name kosmos-2-twin --backbone.dtype float32 --train.steps 2 "
    "--evaluation.batches 1 --evaluation.episodes 1"
)
"""In place of published weights: the same architecture with half a million parameters, for two steps."""


def _arm(folder: pathlib.Path) -> None:
    synthetic.write(folder / "DIR", lerobot.ROBOTS["so100"], episodes=6)


def _libero(folder: pathlib.Path) -> None:
    h5py = pytest.importorskip("h5py")
    rng, steps = np.random.default_rng(0), 24
    for task in ("turn_on_the_stove", "push_the_plate"):
        path = folder / "data/libero_goal" / f"{task}_demo.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = json.dumps({"language_instruction": task.replace("_", " ")})
            for number in range(4):
                demo = data.create_group(f"demo_{number}")
                demo["actions"] = np.c_[rng.uniform(0.1, 0.9, (steps, 6)), np.where(np.arange(steps) < 12, -1.0, 1.0)]
                demo["obs/ee_states"] = rng.uniform(-1, 1, (steps, 6))
                demo["obs/gripper_states"] = np.where(np.arange(steps)[:, None] > 12, 0.01, 0.04) * [1, -1]
                for key in ("agentview_rgb", "eye_in_hand_rgb"):
                    demo[f"obs/{key}"] = rng.integers(0, 255, (steps, 64, 64, 3), np.uint8)


SHORT = f"{TINY} --train.batch_size 8 --policy.window 2 --policy.chunk 3 --data.windows_per_segment 2"
"""With windows that fit the bundled episodes of Bridge, the longest of which has nine steps."""
ONE_DEVICE = {WEIGHTS: SHORT, "--mesh.fsdp 8": "--mesh.fsdp 1"}
PAGES = {
    "docs/tutorial.md": pages.Page(
        made=_arm,
        instead={
            "--train.steps 60": "--train.steps 2 --evaluation.batches 1 --evaluation.episodes 1",
            "--root data/calvin_sample": f"--root {pages.ROOT / 'data/calvin_sample'}",
            f"--data.root DIR --backbone.name kosmos-2 {WEIGHTS}": f"--data.root DIR --out runs/mine {TINY}",
        },
        left_out={
            "export ROBOVLMS_REPOSITORY": "the repository is here",
            "git clone": "the repository is here",
            "python3 -m venv": "so is what it needs",
            "pip install": "so is what it needs",
            "python -m experiments.demo": "a page has no end; tests/demo/test_browser.py opens it",
            "python -m experiments.serve": "a server has no end; tests/experiments/test_serve.py starts it",
        },
    ),
    "docs/how_to/calvin.md": pages.Page(
        made=pages.calvin("task_ABCD_D"),
        instead=ONE_DEVICE,
        left_out={"python -m experiments.evaluate": "CALVIN's own simulator is installed by hand (docs/calvin.md)"},
    ),
    "docs/how_to/bridge_oxe.md": pages.Page(
        made=pages.bridge("data/oxe", "data/bridge_dataset"),
        instead={
            "--dataset fractal20220817_data": "--dataset bridge",
            "--data.root data/oxe": "--data.root data/oxe --data.dataset data/oxe/mixture.yaml",
            "--data.root data/bridge_dataset": f"--data.root data/bridge_dataset {SHORT}",
            WEIGHTS: SHORT,
        },
    ),
    "docs/how_to/libero.md": pages.Page(
        made=_libero,
        instead={WEIGHTS: f"{TINY} --train.batch_size 8"},
        left_out={
            "python -m experiments.inspect_data --root data/modified_libero_rlds": "no such files are made here",
            "python -m experiments.libero --preset libero_lstm": "its data are those files",
            "python -m experiments.serve": "a server has no end; tests/experiments/test_serve.py starts it",
        },
    ),
    "docs/how_to/simpler.md": pages.Page(
        left_out={
            "git clone": "SimplerEnv is fetched from the network",
            "python3.11 -m venv": "as is what it needs",
            "simpler/bin/pip": "as is what it needs",
            "python -m experiments.evaluate": "it drives that simulator",
        }
    ),
    "docs/how_to/lerobot_arm.md": pages.Page(
        made=_arm,
        instead={
            f"--backbone.name kosmos-2 {WEIGHTS}": "--backbone.name kosmos-2-twin --train.batch_size 8",
            "--train.steps 20000": "--train.steps 2",
        },
    ),
    "docs/how_to/tpu_pod.md": pages.Page(),
    "docs/how_to/gpu_cluster.md": pages.Page(
        made=pages.calvin("data/task_ABCD_D"),
        instead=ONE_DEVICE,
        left_out={"sbatch": "it needs a cluster; tests/launch/test_search.py runs the script under a false SLURM"},
    ),
    "docs/how_to/edge.md": pages.Page(instead={"runs/sample": str(pages.ROOT / "robovlms_jax/demo/twin")}),
    "docs/how_to/korean_base.md": pages.Page(
        instead={
            "experiments.navigation": "experiments.navigation --recording.episodes 8 --train.steps 2 --drives.trials 1"
        }
    ),
}


def test_every_row_about_a_page_is_about_a_statement_that_it_has():
    assert sum(len(pages.planned(name, page)) for name, page in PAGES.items()) >= 14


def test_every_how_to_page_with_statements_is_run_or_shown_to_need_what_is_not_here():
    elsewhere = {"gymnasium.md": "tests/envs/test_gym.py", "share.md": "tests/runs/test_sharing.py, with a false hub"}
    found = {path.name for path in (pages.ROOT / "docs/how_to").glob("*.md") if "```bash" in path.read_text()}
    run = {pathlib.Path(name).name for name in PAGES if name.startswith("docs/how_to/")}
    assert found == run | set(elsewhere)


def test_statements_are_read_as_a_shell_reads_them():
    first = "```bash\nx --a 1 \\\n    --b 2   # why\n# nothing\n\ny a#b\n```\n"
    in_a_list = "1. in a list\n    ```bash\n    z\n    ```\n"
    assert pages.statements(f"a\n{first}{in_a_list}") == ["x --a 1 --b 2", "y a#b", "z"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_the_statements_of_a_page_run_in_their_order(name, tmp_path):
    if not pages.planned(name, PAGES[name]):
        pytest.skip("; ".join(f"{words} ...: {why}" for words, why in PAGES[name].left_out.items()))
    said = pages.run(name, PAGES[name], tmp_path)  # raises where one fails
    assert [line[2:] for line in said.splitlines() if line.startswith("$ ")] == pages.planned(name, PAGES[name])
