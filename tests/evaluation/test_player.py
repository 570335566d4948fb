"""Pages with episodes to look through: whole, safe to open, and everything under one cursor."""

from __future__ import annotations

import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from robovlms_jax.control import robot as robots
from robovlms_jax.evaluation.report import page, player


def picture(value: int) -> np.ndarray:
    return np.full((8, 6, 3), value, np.uint8)


def episode(**changes) -> player.Episode:
    made = {
        "title": "open </script><b>the drawer",
        "pictures": {"static": [picture(0), None, picture(200)], "wrist": [picture(9)] * 3},
        "at": [0, 2, 4],
        "panels": [player.Panel("action: position (m)", {"x": np.array([0.0, 1.0, np.nan, 2.0, 3.0])}, -1.0, 2.0)],
    }
    return player.Episode(**(made | changes))


class Elements(html.parser.HTMLParser):
    """Names of the elements in order, and that every one which is opened is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.names, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag not in ("img", "input", "meta", "line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_is_well_formed_whatever_the_sentence_and_fetches_nothing():
    text = page.document("t", player.render([episode()]), style=player.STYLE, script=player.SCRIPT)
    elements = Elements(text)
    assert not elements.open
    assert elements.names.count("script") == 2  # the data and the page's own; none from the sentence
    assert "http" not in text


def test_pictures_and_cursor_know_their_steps():
    text = player.render([episode()])
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text)[1])
    assert data["at"] == [0, 2, 4] and data["steps"] == 5
    assert [frame is None for frame in data["frames"]["static"]] == [False, True, False]
    assert 'max="4"' in text and text.count('class="cursor"') == 1


def test_a_curve_has_a_gap_where_there_is_no_number_and_bounds_only_where_they_are_near():
    text = player.render([episode()])
    assert text.count("<polyline") == 2
    assert text.count('class="bound"') == 1  # 2; -1 is far below


def test_what_failed_comes_first():
    text = player.render([episode(title="fine"), episode(title="lost", good=False, outcome="failed")])
    assert text.index("lost") < text.index("fine")


def test_dimensions_of_one_unit_share_a_panel_of_four_at_most():
    joints = tuple(robots.Dimension(f"joint_{i}", "rad", "absolute", "joint") for i in range(5))
    panels = player.panels_of(np.zeros((3, 6)), (*joints, robots.GRIPPER), "action")
    assert [list(panel.lines) for panel in panels] == [[f"joint_{i}" for i in range(4)], ["joint_4"], ["gripper"]]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_episodes_without_curves_or_pictures_are_drawn(steps):
    empty = episode(pictures={}, at=[], panels=[player.Panel("a", {"x": np.full(steps, np.nan)})])
    assert not Elements(player.render([empty])).open


@pytest.mark.parametrize(
    ("length", "most", "found"), [(0, 4, []), (1, 4, [0]), (3, 4, [0, 1, 2]), (101, 3, [0, 50, 100])]
)
def test_thinned_keeps_both_ends(length, most, found):
    assert player.thinned(length, most).tolist() == found


def test_markdown_becomes_cards_with_its_pictures_inside(tmp_path):
    Image.fromarray(picture(5)).save(tmp_path / "loss.png")
    text = "# Twin\n\n| a | b |\n|---|---:|\n| x | 1 |\n\n## Loss\n\n![loss](loss.png)\n\n![gone](gone.png)\n"
    made = page.from_markdown(text, tmp_path)
    assert made.count("<section") == 1 and "<table>" in made
    assert 'src="data:image/png;base64,' in made and 'src="gone.png"' in made


def test_what_is_found_later_stands_first_in_text_and_page_and_once(tmp_path):
    Image.fromarray(picture(3)).save(tmp_path / "strips.png")
    text = "# run\n\n| steps |\n| --- |\n| 3 |\n\n## Loss\n\nsmall\n\n## The real thing\n\nlater\n"
    (tmp_path / "report.md").write_text(text)
    player.write(tmp_path / "report.html", "run", text, "To look through", [episode()])
    for found in ("1 of 3", "2 of 3"):
        made = page.put_section(tmp_path, f"## Drives\n\n{found}\n\n### bare\n\n![strips](strips.png)\n")
    written, shown = (tmp_path / "report.md").read_text(), made.read_text()
    assert re.findall("^## (.*)$", written, re.MULTILINE) == ["Drives", "Loss", "The real thing"]
    assert re.findall(r"<h2>(.*?)</h2>", shown) == ["Drives", "Loss", "The real thing", "To look through"]
    assert "1 of 3" not in written + shown and "2 of 3" in written and "2 of 3" in shown
    assert 'src="data:image/png' in shown and shown.count('class="player"') == 1 and not Elements(shown).open
