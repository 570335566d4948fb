"""`experiments.serve`: a checkpoint is warmed up and answers as the same policy without a server."""

from __future__ import annotations

import io
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from experiments import serve
from robovlms_jax.control.interface import Observation
from robovlms_jax.deploy.client import Client
from robovlms_jax.deploy.config import ServerConfig
from robovlms_jax.load import load_policy

CHECKPOINT = pathlib.Path(__file__).parents[1] / "compatibility" / "release_0_1" / "policy_head_lstm"


def file_of(pixels, kind):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def test_compressed_pictures_are_read_and_bombs_are_not():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    np.testing.assert_array_equal(serve.decode_image(file_of(pixels, "PNG"), 100), pixels)
    assert serve.decode_image(file_of(pixels, "JPEG"), 100).shape == (8, 9, 3)
    for bad in (b"", b"\x89PNG\r\n\x1a\n", file_of(pixels, "PNG")[:60], file_of(pixels, "BMP")):
        with pytest.raises(ValueError, match="no PNG or JPEG"):
            serve.decode_image(bad, 100)
    with pytest.raises(ValueError, match="9 x 8 pixels; at most 50"):
        serve.decode_image(file_of(pixels, "PNG"), 50)


@pytest.mark.parametrize("change", [{"slots": 0}, {"image_size": (3,)}, {"image_size": (0, 5)}])
def test_settings_that_are_none_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        serve.ServeConfig("x", **change)


@pytest.mark.slow
def test_a_checkpoint_is_served_until_sigterm_and_answers_as_without_a_server():
    pytest.importorskip("websockets", reason="the server needs the extra `serve`")
    command = [sys.executable, "-m", "experiments.serve", "--checkpoint", str(CHECKPOINT), "--server.port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    try:
        address = next(line.split("ready: ")[1].strip() for line in process.stderr if "ready: " in line)
        rng = np.random.default_rng(0)
        sizes = {"static": 200, "wrist": 84}
        images = {camera: rng.integers(0, 256, (size, size, 3), np.uint8) for camera, size in sizes.items()}
        seen = Observation(images, rng.normal(size=7).astype(np.float32))
        bare = load_policy(CHECKPOINT)
        bare.reset("open the drawer")
        with Client(address) as remote:
            remote.reset("open the drawer")
            started = time.monotonic()
            answers = [remote.act(seen).actions for _ in range(3)]
            assert time.monotonic() - started < 1.0  # it was compiled before
        for answer in answers:
            np.testing.assert_allclose(answer, bare.act(seen).actions, atol=1e-5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stderr.close()


def test_what_is_wrong_with_the_address_is_found_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServerConfig(port=taken.getsockname()[1])
        with pytest.raises(OSError, match=r"nobody can listen at 127.0.0.1:\d+ .*--server.port"):
            serve.build(serve.ServeConfig(checkpoint="nowhere", server=config))
    (tmp_path / "token").touch()
    with pytest.raises(ValueError, match="is empty; expected one line with the token"):
        serve.build(serve.ServeConfig("nowhere", server=ServerConfig(port=0, token_file=str(tmp_path / "token"))))
    for name in ("certificate", "key"):
        files = {"certificate": str(tmp_path / "token"), name: str(tmp_path / "nowhere.pem")}
        with pytest.raises(ValueError, match=f"{name} '.*nowhere.pem' is no file"):
            serve.build(serve.ServeConfig("nowhere", server=ServerConfig(port=0, **files)))
    (tmp_path / "bad.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    (tmp_path / "key.pem").write_text("no key")
    bad = {"certificate": str(tmp_path / "bad.pem"), "key": str(tmp_path / "key.pem")}
    with pytest.raises(ValueError, match=r"certificate '.*bad.pem' with key '.*key.pem' cannot be used for TLS"):
        serve.build(serve.ServeConfig("nowhere", server=ServerConfig(port=0, **bad)))


def test_prompts_longer_than_any_that_is_served_are_not_prepared_for():
    with pytest.raises(ValueError, match=r"prompt_lengths=\[8, 512\]: no prompt of more than 256 tokens is served"):
        serve.build(serve.ServeConfig(str(CHECKPOINT), prompt_lengths=(8, 512), server=ServerConfig(port=0)))
