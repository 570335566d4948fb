"""The page in headless Chromium, with the trained twin and the real table behind it. Needs a browser, and minutes."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from robovlms_jax.data import calvin
from tests.web.browser import browser, find, program

pytest.importorskip("websockets", reason="the page needs the extra `serve`")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find() is None, reason="no Chromium is installed")]

LIVE = "document.body.dataset.state === 'live' && facts !== null && role.controls"
CENTRE = "(r => [r.x + r.width / 2, r.y + r.height / 2])($('{}').getBoundingClientRect())"


def hold(page, key, condition):
    """Holds a key until the condition is true."""
    page.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=f"Key{key.upper()}")
    page.wait(condition, 30)
    page.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=f"Key{key.upper()}")


def touch(page, pad, condition):
    """Holds a finger on a pad of the page until the condition is true."""
    x, y = page.ask(CENTRE.format(pad))
    page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    page.wait(condition, 30)
    page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])


def test_a_person_takes_over_by_key_and_by_finger_and_a_killed_program_has_all_of_it(tmp_path):
    out = tmp_path / "taught"
    arguments = ("--out", str(out), "--tasks", "open_drawer", "--count", "3", "--spread", "0")
    with browser(tmp_path / "profile") as page:
        page.size(1280, 900)
        with program("experiments.teach", *arguments, end=signal.SIGKILL) as url:
            page.open(url)
            page.wait(LIVE, 300)
            page.key("Enter", "Enter")
            page.wait("facts.phase === 'policy' && facts.steps > 5", 30)
            height = page.ask("facts.steps")
            hold(page, "r", "facts.phase === 'person' && facts.by_person > 5")
            page.wait("$('who').textContent === 'You act' && !$('up').classList.contains('held')", 5)
            page.screenshot(tmp_path / "driven.png")
            colours = "new Set($('static').getContext('2d').getImageData(0, 0, 600, 600).data).size"
            assert page.ask(colours) > 50 and page.ask("facts.steps") > height
            page.key(" ", "Space")
            page.wait("facts.opens === true || facts.by_person > 8", 10)
            page.key("Enter", "Enter")
            page.wait("facts.phase === 'over' && facts.kept.trials === 1", 60)
            assert page.ask("facts.kept.corrections") == 1 and page.ask("facts.said.at(-1).kind") == "done"
            page.key("Enter", "Enter")
            page.wait("facts.phase === 'paused' && facts.trial === 2 && facts.steps === 0", 10)
        page.wait("document.body.dataset.state === 'lost' && $('go').disabled", 20)
    rows = [json.loads(line) for line in (out / "journal/training/recording.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows[1:]] == [0]
    with browser(tmp_path / "second") as page, program("experiments.teach", *arguments) as url:
        page.call("Emulation.setTouchEmulationEnabled", enabled=True)
        page.size(390, 844, phone=True)
        page.open(url)
        page.wait(LIVE, 300)
        assert page.ask("facts.trial") == 2 and page.ask("facts.kept.corrections") == 1
        assert page.ask("document.documentElement.scrollWidth") <= 390
        heights = "[...document.querySelectorAll('#pads button')].map(x => x.getBoundingClientRect().height)"
        assert min(page.ask(heights)) >= 44
        page.ask("$('front').scrollIntoView({block: 'center'})")
        touch(page, "front", "facts.phase === 'person' && facts.by_person > 4")
        page.wait("!$('front').classList.contains('held')", 5)
        page.screenshot(tmp_path / "phone.png")
        page.ask("$('go').click()")
        page.wait("facts.phase === 'over' || facts.phase === 'paused'", 60)
        assert page.complaints == []
    data = calvin.open_npz(out, "training")
    assert {episode.task for episode in data.episodes} == {"open_drawer"}
    first = data.episodes[0]
    climb = data.array("robot_obs", np.array([first.start, first.end]))[:, 2]
    assert climb[1] > climb[0] + 0.005  # what was learned from is the person's way up
