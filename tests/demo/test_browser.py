"""The page in headless Chromium, with the real table and twin behind it. Needs a browser, and a minute or two."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from robovlms_jax.control.execution import Execution
from robovlms_jax.demo import loop as loops
from robovlms_jax.demo import show
from robovlms_jax.web.access import Access
from tests.demo.fakes import TASKS, make_stage
from tests.web.browser import browser, find, program
from tests.web.visiting import Serving, serving

pytest.importorskip("websockets", reason="the page needs the extra `serve`")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find() is None, reason="no Chromium is installed")]


def demonstration():
    """The page's address; ends with Ctrl-C, which must be the end of it."""
    return program("experiments.demo")


def test_one_looks_types_stops_releases_and_a_second_one_watches(tmp_path):
    with demonstration() as url, browser(tmp_path / "first") as page:
        page.size(1280, 900)
        page.open(url)
        page.wait("document.body.dataset.state === 'live' && facts !== null", 300)
        page.wait("times.length >= 10 && document.querySelectorAll('#chips button').length > 0", 60)
        assert page.ask("document.querySelector('#role').textContent") == "You control"

        page.ask("document.querySelector('#text').focus()")
        typed = 'turn  off "the" <b>green</b> light ä'
        page.type(typed)
        page.key(" ", "Space", " ")  # in a text field, a space
        assert page.ask("document.querySelector('#text').value") == typed + " "
        page.ask("document.querySelector('#text').value = ''")

        page.ask("document.querySelector('#chips button').click()")
        page.wait("facts.phase === 'acting' && facts.steps > 6", 60)
        page.wait("times.length >= 10", 60)
        colours = "new Set($('static').getContext('2d').getImageData(0, 0, 600, 600).data).size"
        assert page.ask(colours) > 50
        assert page.ask("$('wrist').getContext('2d').getImageData(0, 0, 9, 9).data.length") == 324
        assert page.ask("$('overlay').getContext('2d').getImageData(0, 0, 1200, 1200).data.some(x => x)")
        page.screenshot(tmp_path / "acting.png")

        page.key(" ", "Space", " ")
        page.wait("facts.phase === 'stopped' && facts.latch === 'hold' && !$('banner').hidden", 20)
        assert page.ask("$('dice').disabled && !$('release').hidden")
        page.screenshot(tmp_path / "stopped.png")
        page.ask("$('release').click()")
        page.wait("facts.phase === 'waiting' && $('banner').hidden", 20)

        with browser(tmp_path / "second") as other:
            other.size(390, 844, phone=True)
            other.open(url)
            other.wait("facts !== null && role.number === 2", 60)
            assert other.ask("$('send').disabled && !$('stop').disabled && !$('take').hidden")
            assert other.ask("document.documentElement.scrollWidth") <= 390
            other.ask("$('take').click()")
            page.wait("!$('give').hidden", 10)
            page.ask("$('give').click()")
            other.wait("role.controls && !$('send').disabled", 10)
            other.screenshot(tmp_path / "phone.png")
            assert other.complaints == []
        page.wait("!role.controls && role.free || role.visitors === 1", 10)
        assert page.complaints == []


class Shown(Serving):
    """The page of a stage without physics or policy."""

    def __init__(self, stage):
        self.show = show.Show(Access())
        self._stage = stage
        super().__init__(lambda: self.show.server)

    def begun(self):
        sizes = {"static": 100, "wrist": 50}
        self.show.show(self._stage, show.ShowConfig("a test", TASKS, sizes, sizes, Execution(), 60))


def test_a_control_step_that_fails_is_on_the_page_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(loops.Painter, "draw", lambda self, moment, camera: np.zeros((50, 50, 3), np.uint8))
    stage, world, _ = make_stage()
    with serving(Shown(stage)) as shown, browser(tmp_path / "page") as page:
        try:
            page.size(1280, 900)
            page.open(f"http://127.0.0.1:{shown.server.port}/")
            page.wait("document.body.dataset.state === 'live' && facts !== null && role.controls", 60)
            world.bad = ValueError("the arm is nowhere")
            page.ask("say_to_robot('turn on the green light')")
            page.wait("facts.broken && !$('banner').hidden", 20)
            assert "the arm is nowhere" in page.ask("$('banner').textContent")
            assert page.ask("$('release').hidden && $('dice').disabled && $('reset').className === 'main'")
            page.screenshot(tmp_path / "broken.png")
            world.bad = None
            page.ask("$('reset').click()")
            page.wait("!facts.broken && facts.latch === 'hold' && !$('release').disabled", 20)
            page.ask("$('release').click()")
            page.wait("facts.phase === 'waiting' && $('banner').hidden && $('reset').className === ''", 20)
            assert page.complaints == []
        finally:
            shown.show.close()


def test_a_page_that_hears_nothing_says_that_what_it_shows_is_old(tmp_path, monkeypatch):
    monkeypatch.setattr(loops.Painter, "draw", lambda self, moment, camera: np.zeros((50, 50, 3), np.uint8))
    stage, _, _ = make_stage()
    held, tick = threading.Event(), stage.tick
    held.set()
    monkeypatch.setattr(stage, "tick", lambda: held.wait(60) and tick())
    with serving(Shown(stage)) as shown, browser(tmp_path / "page") as page:
        try:
            page.open(f"http://127.0.0.1:{shown.server.port}/")
            page.wait("document.body.dataset.state === 'live' && facts !== null && role.controls", 60)
            page.ask("$('stop').click()")
            page.wait("$('reply').textContent.startsWith('Stopped by you.')")
            held.clear()
            page.wait("document.body.dataset.state === 'silent' && !$('veil').hidden", 10)
            assert page.ask("$('link').textContent") == "Silent" and "is old" in page.ask("$('veil').textContent")
            held.set()
            page.wait("document.body.dataset.state === 'live' && $('veil').hidden", 10)
            held.clear()
            page.wait("document.body.dataset.state === 'lost'", 20)  # a line that stays silent is opened anew
            held.set()
            page.wait("document.body.dataset.state === 'live' && $('veil').hidden && role.number === 2", 20)
            assert page.complaints == []
        finally:
            held.set()
            shown.show.close()


IN_SIGHT = "(x => x.width > 0 && x.top >= 0 && x.bottom <= innerHeight)($('reply').getBoundingClientRect())"


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1366, 768)])
def test_the_answer_stands_beside_the_input_with_choices_and_a_lost_page_controls_nothing(
    tmp_path, monkeypatch, width, height
):
    monkeypatch.setattr(loops.Painter, "draw", lambda self, moment, camera: np.zeros((50, 50, 3), np.uint8))
    stage, _, _ = make_stage()
    with browser(tmp_path / "page") as page:
        page.size(width, height, phone=width < 500)
        with serving(Shown(stage)) as shown:
            try:
                page.open(f"http://127.0.0.1:{shown.server.port}/")
                page.wait("document.body.dataset.state === 'live' && facts !== null && role.controls", 60)
                for typed, answer in (("make me a coffee", "knows nothing like that"), ("the green light", "which of")):
                    page.ask("$('text').scrollIntoView({block: 'center'}); $('text').focus()")
                    page.type(typed)
                    page.key("Enter", "Enter", "\r")
                    page.wait(
                        f"$('reply').textContent.includes('“{typed}”') && $('reply').textContent.includes('{answer}')"
                    )
                    assert page.ask(IN_SIGHT)
                page.screenshot(tmp_path / "asked.png")
                assert page.ask("[...$('meant').children].map(x => x.textContent).join('|')") == (
                    "turn on the green light|turn off the green light"
                )
                page.ask("$('meant').children[0].click()")
                page.wait("facts.score[1] === 1 && $('meant').hidden", 30)
                page.ask("$('text').focus()")
                page.type("halt")
                page.key("Enter", "Enter", "\r")
                page.wait("facts.latch === 'hold' && !$('banner').hidden", 20)
                assert page.ask("document.documentElement.scrollWidth <= innerWidth")
                lines = "[...document.querySelectorAll('.choices label')].every(x => x.getClientRects().length === 1)"
                assert page.ask(lines + " && $('speeds').clientHeight === $('limits').clientHeight")  # one row each
                assert page.complaints == []
            finally:
                shown.show.close()
        page.wait("document.body.dataset.state === 'lost'", 20)
        assert page.ask("$('stop').disabled && $('send').disabled && !$('role').className.includes('live')")
        page.screenshot(tmp_path / "lost.png")


def test_who_watches_is_not_told_to_release_a_stop_that_only_another_one_can_release(tmp_path, monkeypatch):
    monkeypatch.setattr(loops.Painter, "draw", lambda self, moment, camera: np.zeros((50, 50, 3), np.uint8))
    stage, _, _ = make_stage()
    with (
        serving(Shown(stage)) as shown,
        browser(tmp_path / "first") as page,
        browser(tmp_path / "second") as other,
    ):
        try:
            for tab in (page, other):
                tab.open(f"http://127.0.0.1:{shown.server.port}/")
                tab.wait("document.body.dataset.state === 'live' && facts !== null && role.number", 60)
            other.ask("$('stop').click()")
            for tab, way_out in ((page, "Release the stop, then"), (other, "ask for control if that should be you")):
                tab.wait(f"facts.latch === 'hold' && $('banner').textContent.includes({way_out!r})", 20)
            assert page.ask("!$('release').disabled") and other.ask("$('release').disabled")
            page.size(1280, 900)
            page.ask("$('about').textContent = 'a long one '.repeat(9)")
            place = page.ask("$('stop').getBoundingClientRect().top")
            other.ask("$('take').click()")
            page.wait("!$('give').hidden", 10)
            assert page.ask("$('stop').getBoundingClientRect().top") == place  # what asks for control moves no Stop
        finally:
            shown.show.close()
