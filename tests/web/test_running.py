"""A program that serves a page ends when it has saved what it has to save."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

PROGRAM = """
import asyncio, atexit, pathlib, sys, threading, time
from robovlms_jax.web import running
atexit.register(time.sleep, 60)
threading.Thread(target=time.sleep, args=(60,)).start()

async def page():
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(2, stop.set)
    print("up", flush=True)
    try:
        await stop.wait()
    finally:
        pathlib.Path(sys.argv[1]).write_text("saved")
    print("said at the end")

running.run(page())
"""


def test_ctrl_c_ends_a_program_at_once_after_it_has_saved(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert process.wait(30) == 0 and time.monotonic() - started < 10  # nothing is waited for: 60 s of sleep
        assert process.stdout.read() == "said at the end\n" and (tmp_path / "file").read_text() == "saved"
    finally:
        process.kill()
