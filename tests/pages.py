"""Pages whose shell statements are run in the order in which they stand, in a folder of their own.

What cannot be had here (a terabyte of data, published weights, a simulator) is replaced by a part of itself or left
out, each time by a row of a table. A row that nothing on the page needs is an error, so no table outlives its page.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping

import numpy as np

from robovlms_jax.data import packed

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Page:
    """made: puts what a reader is told to have into the folder. instead: words of statements -> what stands there here.
    left_out: beginnings of statements -> why they cannot be run."""

    made: Callable[[pathlib.Path], None] = lambda folder: None
    instead: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)


def statements(text: str) -> list[str]:
    """The shell statements of a page, without comments; lines that end with a backslash are one with the next."""
    found = []
    for match in re.finditer(r"^( *)```bash\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL):
        joined = re.sub(r"\\\n\s*", "", match[2])
        lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
        found += [line for line in lines if line]
    return found


def planned(name: str, page: Page) -> list[str]:
    """What is run of a page. Raises AssertionError: a row of its tables fits no statement."""
    found = statements((ROOT / name).read_text(encoding="utf-8"))
    for beginning in page.left_out:
        assert any(each.startswith(beginning) for each in found), f"{name} has no statement {beginning!r} any more"
    kept = [each for each in found if not each.startswith(tuple(page.left_out))]
    for words, instead in page.instead.items():
        assert any(words in each for each in kept), f"{name} has no {words!r} any more"
        kept = [each.replace(words, instead) for each in kept]
    return kept


def run(name: str, page: Page, folder: pathlib.Path) -> str:
    """Run a page in an empty folder; all that its statements said. Raises AssertionError: one failed."""
    commands, said = planned(name, page), ""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    page.made(folder)
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        said += f"$ {command}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0, said[-6000:]
    return said


def calvin(*names: str) -> Callable[[pathlib.Path], None]:
    """A part of CALVIN under these names: npz files as they are published for names without a slash, packed ones below
    data/."""

    def made(folder: pathlib.Path) -> None:
        for name in names:
            if name.startswith("data/"):
                shutil.copytree(ROOT / "data/calvin_sample", folder / name)
            else:
                for split in ("training", "validation"):
                    _unpacked(packed.PackedDataset(ROOT / "data/calvin_sample" / split), folder / name / split)

    return made


def _unpacked(dataset: packed.PackedDataset, folder: pathlib.Path, episodes: int = 4) -> None:
    chosen = dataset.episodes[:episodes]
    (folder / "lang_annotations").mkdir(parents=True)
    spans = [(episode.start, episode.end) for episode in chosen]
    ids = sorted({frame for start, end in spans for frame in range(start, end + 1)})
    names = {"static": "rgb_static", "wrist": "rgb_gripper"}
    for frame in ids:
        images = dataset.images([frame], tuple(names))
        arrays = {name: dataset.array(name, [frame])[0] for name in dataset.meta["arrays"]}
        pictures = {names[camera]: each[0] for camera, each in images.items()}
        np.savez(folder / f"episode_{frame:07d}.npz", **pictures, **arrays)
    language = {
        "ann": [episode.instruction for episode in chosen],
        "task": [episode.task for episode in chosen],
        "emb": np.zeros((len(chosen), 1, 384), np.float32),
    }
    annotations = {"language": language, "info": {"episodes": [], "indx": spans}}
    np.save(folder / "lang_annotations" / "auto_lang_ann.npy", np.array(annotations))
    np.save(folder / "ep_start_end_ids.npy", np.array(spans))


def bridge(*names: str) -> Callable[[pathlib.Path], None]:
    """The bundled episodes of Bridge under these names."""

    def made(folder: pathlib.Path) -> None:
        for name in names:
            shutil.copytree(ROOT / "data/bridge_sample", folder / name, ignore=shutil.ignore_patterns(".frame_index"))

    return made
