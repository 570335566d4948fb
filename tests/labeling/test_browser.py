"""The page in headless Chromium, with real rollouts behind it. Needs a browser, and a minute or two."""

from __future__ import annotations

import signal

import pytest

from robovlms_jax.labeling.answers import read
from tests.web.browser import browser, find, program

pytest.importorskip("websockets", reason="the page needs the extra `serve`")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find() is None, reason="no Chromium is installed")]


def test_a_person_answers_by_key_and_button_and_a_killed_program_has_all_of_it(tmp_path):
    out = tmp_path / "labels"
    few = ("--record.count", "4", "--record.tasks", "open_drawer", "--record.max_steps", "60", "--record.tables", "4")
    arguments = ("--out", str(out), *few, "--pairs", "4", "--steps", "20")
    with browser(tmp_path / "profile") as page:
        page.size(1100, 800)
        with program("experiments.label", *arguments, end=signal.SIGKILL) as url:
            page.open(url)
            page.wait("now !== null && !$('left').disabled", 300)
            page.wait("frame > 3", 20)
            colours = "new Set($('left_static').getContext('2d').getImageData(0, 0, 300, 300).data).size"
            assert page.ask(colours) > 50
            assert page.ask("$('task').textContent").strip("“”") != ""
            page.screenshot(tmp_path / "asked.png")
            page.key("ArrowLeft", "ArrowLeft")
            page.wait("now !== null && now.answered === 1 && !$('equal').disabled", 60)
            page.ask("$('equal').click()")
            page.wait("now !== null && now.answered === 2", 60)
        page.wait("$('said').className === 'bad' && $('left').disabled", 20)  # it says that nobody listens
        before = read(out / "answers.jsonl")[1]
        assert [given.answer for given in before] == ["left", "equal"]
    with browser(tmp_path / "second") as page, program("experiments.label", *arguments) as url:
        page.open(url)
        page.wait("now !== null && now.answered === 2 && !$('right').disabled", 300)
        for key, count in (("ArrowRight", 3), ("ArrowUp", 4)):
            page.key(key, key)
            page.wait(f"$('progress').value === {count} && (!now || !$('left').disabled)", 60)
        page.wait("$('task').textContent.startsWith('All questions are answered')", 20)
        assert page.complaints == []
    after = read(out / "answers.jsonl")[1]
    assert [given.answer for given in after] == ["left", "equal", "right", "skip"] and after[:2] == before
    assert len({given.pair.key for given in after}) == 4
