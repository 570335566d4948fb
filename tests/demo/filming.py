"""Makes docs/demo.gif anew, from today's page and twin.   python -m tests.demo.filming

Run it when the page, the twin or the pictures of PlayTable have changed. Needs Chromium, and a minute or two.
`--sentence` and `--table` choose what is filmed; time runs ten times slower meanwhile, so that screenshots keep up on
any machine.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import tempfile
import time

from PIL import Image

from tests.web.browser import ROOT, Page, browser, program

SIZE, SHOWN = (1180, 880), 0.644  # pixels of the window, and what of them a picture keeps: 760 x 567
TICKS_PER_FRAME = 2
FRAME_MS, TYPED_MS, LAST_MS = 100, 400, 2200
SLOWEST = "document.querySelectorAll('#speeds input')[document.querySelectorAll('#speeds input').length - 1].click()"


def picture(page: Page, scratch: pathlib.Path) -> Image.Image:
    """The window as it is now, smaller."""
    page.screenshot(scratch)
    whole = Image.open(io.BytesIO(scratch.read_bytes())).convert("RGB")
    return whole.resize(tuple(round(SHOWN * pixels) for pixels in whole.size), Image.Resampling.LANCZOS)


def find(page: Page, table: str, sentence: str) -> None:
    """Goes through the scenes until the sentence can be obeyed on the table. Raises AssertionError after 40 of them."""
    possible = f"facts.possible.some(x => hello.sentences[x].includes({json.dumps(sentence)}))"
    for _ in range(40):
        if page.ask(f"facts.table === {json.dumps(table)} && {possible}"):
            return
        page.ask("document.querySelector('#next').click()")
        time.sleep(1)
    raise AssertionError(f"{sentence!r} is never possible on table {table}")


def obeyed(page: Page, sentence: str, scratch: pathlib.Path) -> tuple[list[Image.Image], list[int]]:
    """The sentence typed and obeyed: frames, and the milliseconds that each is shown."""
    frames = [picture(page, scratch)]
    words, begun = sentence.split(), page.ask("facts.score[0]")
    for number, word in enumerate(words):
        page.type(word + " " * (number < len(words) - 1))
        frames.append(picture(page, scratch))
    shown = [TYPED_MS] * len(frames)
    page.key("Enter", "Enter", "\r")
    last, deadline = -TICKS_PER_FRAME, time.monotonic() + 150
    while page.ask("facts.phase") != "returning":
        assert time.monotonic() < deadline, "the task did not end"
        if (step := page.ask("facts.steps")) >= last + TICKS_PER_FRAME and page.ask("facts.phase") == "acting":
            frames.append(picture(page, scratch))
            shown.append(FRAME_MS)
            last = step
    assert page.ask("facts.score[0]") > begun, "the task failed; choose another table or sentence"
    return [*frames, picture(page, scratch)], [*shown, LAST_MS]


def palette_of(frames: list[Image.Image]) -> Image.Image:
    """One palette for all frames, so that colours do not flicker: 208 by median cut, for wood and shades, and 48 that
    cover the most, for lamps, blocks and paths, which median cut loses."""
    sheet = Image.new("RGB", (frames[0].width, len(frames) * frames[0].height))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (0, number * frame.height))
    colours = []
    for count, method in ((48, Image.Quantize.MAXCOVERAGE), (208, Image.Quantize.MEDIANCUT)):
        colours += sheet.quantize(count, method).getpalette()[: 3 * count]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours)
    return palette


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentence", default="open the drawer")
    parser.add_argument("--table", default="D")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "demo.gif")
    config = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, program("experiments.demo") as url:
        scratch = pathlib.Path(folder) / "window.png"
        with browser(pathlib.Path(folder) / "profile") as page:
            page.size(*SIZE)
            page.open(url)
            page.wait("document.body.dataset.state === 'live' && facts !== null && facts.possible.length > 0", 300)
            find(page, config.table, config.sentence)
            page.ask(SLOWEST)
            page.ask("document.querySelector('#text').focus()")
            frames, shown = obeyed(page, config.sentence, scratch)
            assert page.complaints == [], page.complaints
    palette = palette_of([frames[0], frames[len(frames) // 2], frames[-2]])
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    first.save(config.out, save_all=True, append_images=rest, duration=shown, loop=0, optimize=True)
    print(f"{config.out}: {len(frames)} frames, {config.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
