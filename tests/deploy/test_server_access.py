"""Who gets into the server and how it ends: tokens, certificates, limits, the health check, stopping."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest

from robovlms_jax.control.robot import CALVIN
from robovlms_jax.deploy import codec
from robovlms_jax.deploy.client import Client, ClientConfig, ServerError
from robovlms_jax.deploy.config import ServerConfig
from robovlms_jax.deploy.messages import Reader
from robovlms_jax.deploy.server import PolicyServer
from tests.deploy.served import (
    Counting,
    Lines,
    envelope,
    get,
    message,
    observation,
    read,
    serving,
    steps,
    url,
    wait_until,
)

pytest.importorskip("websockets", reason="the server needs the extra `serve`")

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect


def test_health_and_metrics_answer_while_the_model_runs():
    with serving(Counting(delay_s=1.0)) as server, connect(url(server)) as line:
        read(line)
        line.send(codec.pack(message()))
        time.sleep(0.1)
        started = time.monotonic()
        assert get(server, "/healthz") == (200, "OK\n")
        assert get(server, "/health") == (200, '{"status": "ok"}')
        assert "robovlms_connections 1\n" in get(server, "/metrics")[1]
        assert time.monotonic() - started < 0.8
        read(line)
        wait_until(lambda: 'request_seconds_bucket{le="+Inf"} 1\n' in get(server, "/metrics")[1])


def test_a_token_is_needed_where_one_is_set_but_for_the_health_check():
    with serving(Counting(), token="right") as server:
        for headers in (None, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}):
            with pytest.raises(InvalidStatus, match="401"):
                connect(url(server), additional_headers=headers)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(server, "/metrics")
        assert get(server, "/healthz")[0] == 200 and get(server, "/metrics", "right")[0] == 200
        with connect(url(server), additional_headers={"Authorization": "Api-Key right"}) as line:
            read(line)
        with pytest.raises(ServerError, match="401"), Client(url(server)):
            pass
        with Client(url(server), ClientConfig(token="right")) as robot:
            assert robot.metadata["action_dim"] == 7


def test_the_token_may_stand_in_a_file_and_an_empty_one_is_refused(tmp_path):
    file = tmp_path / "token"
    file.write_text("right\n")
    with serving(Counting(), token_file=str(file)) as server:
        assert get(server, "/health", "right")[0] == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(server, "/health")
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"token_file .* is empty"):
        ServerConfig(token_file=str(file)).secret()


@pytest.mark.parametrize("token", ["SECRET\n", "SE CRET", "비밀", None])
def test_a_token_that_no_header_can_carry_is_refused_and_not_repeated(token):
    for made in (lambda: ServerConfig(token=token or "é").secret(), lambda: ClientConfig(token=token)):
        with pytest.raises(ValueError, match="token: expected printable ASCII") as raised:
            made()
        assert "CRET" not in str(raised.value)


def test_web_pages_do_not_get_in():
    with serving(Counting()) as server, pytest.raises(InvalidStatus, match="403"):
        connect(url(server), origin="http://example.com")


def test_messages_that_are_too_large_close_the_connection():
    with serving(Counting(), max_message_bytes=1000) as server, connect(url(server)) as line:
        read(line)
        line.send(b"\0" * 1001)
        with pytest.raises(ConnectionClosed, match="1009"):
            line.recv(5)


def test_clients_that_send_nothing_give_their_slot_back():
    with serving(Counting(slots=1), idle_timeout_s=0.1) as server, connect(url(server)) as line:
        read(line)
        with pytest.raises(ConnectionClosed, match=r"nothing was sent for 0\.1 s"):
            line.recv(5)


def test_stopping_answers_what_runs_and_closes_with_1001():
    policy = Counting(delay_s=0.3)
    with Lines() as hold:
        with serving(policy) as server:
            busy, idle = hold(url(server)), hold(url(server))
            read(busy), read(idle)
            busy.send(codec.pack(message()))
            time.sleep(0.1)
        assert steps(read(busy)) == 1
        for line in (busy, idle):
            with pytest.raises(ConnectionClosed, match="1001"):
                line.recv(5)


def test_while_the_server_stops_health_is_answered_with_503_and_nobody_is_let_in():
    found = []

    def ask(server):
        time.sleep(0.2)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(url(server, "/healthz", "http"), timeout=5)
        with pytest.raises(InvalidStatus) as refused:
            connect(url(server)).__enter__()
        found.extend((error.value.code, refused.value.response.status_code))

    with Lines() as hold:
        with serving(Counting(delay_s=0.8)) as server:
            busy = hold(url(server, "/vla-eval"))
            seen = {"images": {"static": message()["observation/image"]}, "task_description": "push"}
            busy.send(envelope("observation", seen, 3))
            time.sleep(0.1)
            thread = threading.Thread(target=ask, args=(server,))
            thread.start()
        thread.join()
        assert found == [503, 503] and read(busy)["type"] == "action"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls_and_a_client_that_trusts_the_certificate(tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    with serving(Counting(), certificate=str(certificate), key=str(key)) as server:
        trusted = ssl.create_default_context(cafile=certificate)
        with Client(url(server, scheme="wss"), ClientConfig(ssl=trusted)) as robot:
            robot.reset("open")
            assert steps({"actions": robot.act(observation()).actions}) == 1
        stranger = Client(url(server, scheme="wss"), ClientConfig(ssl=ssl.create_default_context()))
        with pytest.raises(ServerError, match="certificate is not trusted"):
            stranger.connect()
    broken = PolicyServer(Counting(), CALVIN, Reader(("static",)), 4, ServerConfig(port=0, certificate=str(key)))
    with pytest.raises(ValueError, match="cannot be used for TLS"):
        asyncio.run(broken.start())


@pytest.mark.parametrize(
    "change",
    [
        {"token_file": "x", "token": "x"},
        {"port": -1},
        {"max_wait_s": -1.0},
        {"send_timeout_s": 0.0},
        {"key": "x"},
        {"reading_threads": 0},
    ],
)
def test_settings_that_are_none_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ServerConfig(**change)
