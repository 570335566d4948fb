"""What all pages share."""

from __future__ import annotations

import pytest

from robovlms_jax.demo import show as demo
from robovlms_jax.labeling import server as labeling
from robovlms_jax.teaching import show as teaching
from robovlms_jax.web import pages


@pytest.mark.parametrize("path", [demo.PAGE, labeling.PAGE, teaching.PAGE], ids=lambda path: path.parent.name)
def test_every_page_has_the_shared_script_once_and_no_line_of_its_own(path):
    own, sent = path.read_text(encoding="utf-8"), pages.read(path)
    assert "WebSocket" not in own and "createImageBitmap" not in own
    assert sent.count("new WebSocket") == sent.count("createImageBitmap(") == 1 and "connect({tell" in sent
    assert pages.MARK not in sent and sent.count("<script>") == 2


def test_a_page_without_the_place_for_the_shared_script_is_refused(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<script>connect()</script>")
    with pytest.raises(ValueError, match=r"page\.html has 0 times <script src"):
        pages.read(page)
