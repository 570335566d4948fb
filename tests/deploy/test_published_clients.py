"""The clients that others published, where they are installed."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from experiments import serve
from tests.deploy.served import Counting, message, picture, serving, url

pytest.importorskip("websockets", reason="the server needs the extra `serve`")


def test_the_published_openpi_client_is_served():
    """openpi's own client, where it is installed."""
    policies = pytest.importorskip(
        "openpi_client.websocket_client_policy", reason="pip install --no-deps openpi-client"
    )
    brokers = pytest.importorskip("openpi_client.action_chunk_broker")
    with serving(Counting()) as server:
        policy = policies.WebsocketClientPolicy("127.0.0.1", server.port)
        assert policy.get_server_metadata()["action_horizon"] == 4
        broker = brokers.ActionChunkBroker(policy, 4)
        assert [broker.infer(message())["actions"].shape for _ in range(12)] == [(7,)] * 12
        with pytest.raises(RuntimeError, match="there is no 'static' picture"):
            policy.infer({"prompt": "x"})
        assert policies.WebsocketClientPolicy("127.0.0.1", server.port).infer(message())["actions"].shape == (4, 7)


def test_the_published_harness_client_is_served():
    """vla-eval's own connection, where it is installed."""
    connections = pytest.importorskip("vla_eval.connection", reason="pip install vla-eval")

    async def run(server):
        async with connections.Connection(url(server, "/vla-eval"), timeout=5) as line:
            await line.start_episode({"task": {"name": "push"}})
            seen = {"images": {"rgb_static": picture()}, "task_description": "push", "states": np.zeros(8, np.float32)}
            found = [(await line.act(seen))["actions"] for _ in range(3)]
            with pytest.raises(RuntimeError, match="there is no 'static' picture"):
                await line.act({"images": {}, "task_description": "push"})
            found.append((await line.act(seen | {"episode_restart": True}))["actions"])
            await line.end_episode({"metrics": {}, "steps": 4, "elapsed_sec": 1.0})
            return found

    with serving(Counting(), decode_image=lambda data: serve.decode_image(data, 10_000)) as server:
        found = asyncio.run(run(server))
    np.testing.assert_allclose([action[1] / 0.02 * 100 for action in found], [1, 2, 3, 1], rtol=1e-5)
