"""PlayTable as vla-eval's harness plays it: by hand everywhere, by the harness itself where it is installed."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments import serve
from experiments.vla_eval_playtable import PlayTableBenchmark
from robovlms_jax.control.interface import ActionChunk
from tests.deploy.served import serving, url
from tests.processes import ROOT


class Still:
    """Does nothing, in every slot; the hand stays open."""

    slots = 2

    def reset(self, slots, instructions):
        pass

    def act(self, observations, slots):
        assert all(set(x.images) == {"static", "wrist"} and x.proprio.shape == (15,) for x in observations)
        return [ActionChunk(np.tile(np.float32([0, 0, 0, 0, 0, 0, 1]), (4, 1))) for _ in slots]

    def release(self, slots):
        pass


@pytest.mark.slow
def test_actions_in_metres_and_radians_move_the_arm_as_far():
    table = PlayTableBenchmark(["open_drawer"], image_size=(32, 32), episodes=2, max_steps=3)

    async def run():
        assert table.get_tasks() == [{"name": "open_drawer"}]
        await table.start_episode({"name": "open_drawer", "episode_idx": 3})
        before = (await table.get_observation())["states"]
        for _ in range(3):
            assert not await table.is_done()
            await table.apply_action({"actions": np.float32([[0, 0, 0.01, 0, 0, 0, 0.4], [9] * 7])})
        assert await table.is_done() and not (await table.get_result())["success"]
        with pytest.raises(ValueError, match="7 finite numbers"):
            await table.apply_action({"actions": np.full(7, np.nan)})
        return (await table.get_observation())["states"] - before

    moved = asyncio.run(run())
    np.testing.assert_allclose(moved[:3], [0, 0, 0.03], atol=0.01)  # it follows a little late
    with pytest.raises(ValueError, match=r"unknown \['fly'\]"):
        PlayTableBenchmark(["fly"])


@pytest.mark.slow
def test_the_published_harness_plays_playtable_against_our_server(tmp_path):
    pytest.importorskip("vla_eval", reason="pip install vla-eval")
    with serving(
        Still(), cameras=("static", "wrist"), decode_image=lambda data: serve.decode_image(data, 10_000)
    ) as server:
        config = {
            "server": {"url": url(server, "/vla-eval")},
            "output_dir": str(tmp_path),
            "benchmarks": [
                {
                    "benchmark": "experiments.vla_eval_playtable:PlayTableBenchmark",
                    "episodes_per_task": 2,
                    "params": {"tasks": ["open_drawer", "turn_on_led"], "image_size": [32, 32], "max_steps": 4},
                }
            ],
        }
        (tmp_path / "playtable.yaml").write_text(json.dumps(config))
        tool = shutil.which("vla-eval", path=f"{sys.prefix}/bin")
        command = [tool, "run", "--no-docker", "--yes", "--render", "cpu", "--config", str(tmp_path / "playtable.yaml")]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.metrics.get("requests_total") == 2 * 2 * 4
    text = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert '"open_drawer"' in text and '"success"' in text
