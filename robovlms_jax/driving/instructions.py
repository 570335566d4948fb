"""What people say to the mobile base in Korean: a sentence per scenario from the design documents, and other wordings.

A wording is who (the boxes), which way, what to do and where to, put together; training and held-out wordings share
the words for left and right, boxes and cup: held-out ones have other verbs, endings and particles, another order, and
spaces in other places. People leave spaces out and put them in (`mistyped`). They also use words that no list has:
`noisy` puts meaningless ones in and leaves others out, so that a small language model learns which words to go by.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata

import numpy as np

from robovlms_jax.driving import scenarios

CANONICAL = {
    "1box_vert_left": "박스를 왼쪽으로 돌아서 컵까지 가세요",
    "1box_vert_right": "박스를 오른쪽으로 돌아서 컵까지 가세요",
    "1box_hori_left": "박스를 왼쪽으로 피해서 컵까지 가세요",
    "1box_hori_right": "박스를 오른쪽으로 피해서 컵까지 가세요",
    "2box_vert_left": "두 박스 사이 왼쪽 경로로 컵까지 가세요",
    "2box_vert_right": "두 박스 사이 오른쪽 경로로 컵까지 가세요",
    "2box_hori_left": "두 박스를 왼쪽으로 우회해서 컵까지 가세요",
    "2box_hori_right": "두 박스를 오른쪽으로 우회해서 컵까지 가세요",
}
"""Scenario -> the documents' sentence."""

_HANGUL = (0xAC00, 0xD7A3)
"""First and last syllable."""

_SIDES = {"left": ("왼쪽", "왼편", "좌측"), "right": ("오른쪽", "오른편", "우측")}

_GOALS = (
    *(
        "컵까지 가세요",
        "컵으로 가세요",
        "컵까지 이동하세요",
        "컵까지 가 주세요",
        "컵 앞까지 가",
        "컵으로 이동해 주세요",
    ),
    *("컵을 향해 가세요", "컵까지 부탁해요", "컵 앞에서 멈추세요", "컵으로 와"),
)
_NEW_GOALS = ("컵까지 가줄래요", "컵 쪽으로 가십시오", "컵까지 이동해", "컵 있는 데까지 가 주세요")

# Parts of a wording by kind of scenario: boxes, which way ({} is the side), what to do.
_ONE = ("박스를", "상자를", "저 박스를", "앞에 있는 상자를", "로봇아 박스를", "천천히 상자를")
_WAYS = ("{}으로", "{} 길로", "{}으로 크게", "{} 옆으로", "{}을 따라")
_PARTS = {
    "1box_vert": (_ONE, _WAYS, ("돌아서", "돌아", "빙 돌아서")),
    "1box_hori": (_ONE, _WAYS, ("피해서", "피해", "비켜서")),
    "2box_vert": (
        ("두 박스 사이", "두 상자 사이", "박스 두 개 사이", "로봇아 두 박스 사이", "천천히 두 상자 사이"),
        ("{} 경로로", "{} 길로", "{}으로", "{}을 따라"),
        ("", "지나서", "통과해서"),
    ),
    "2box_hori": (
        ("두 박스를", "두 상자를", "박스 두 개를", "로봇아 두 박스를", "천천히 두 상자를"),
        _WAYS,
        ("우회해서", "우회하여", "모두 우회해서"),
    ),
}
_NEW_PARTS = {
    "1box_vert": (("이 상자를", "박스는"), ("{} 방향으로",), ("돌고 나서", "빙 돌아")),
    "1box_hori": (("이 상자를", "박스는"), ("{} 방향으로",), ("피하고 나서", "피해 가지고")),
    "2box_vert": (("박스 둘 사이", "두 개의 상자 사이"), ("{} 통로로", "{} 방향으로"), ("지나가서",)),
    "2box_hori": (("박스 둘을", "두 개의 상자를"), ("{} 방향으로",), ("우회한 다음", "다 우회해")),
}


@functools.cache
def wordings(scenario: str, *, held_out: bool = False) -> tuple[str, ...]:
    """Sentences for a scenario, the documents' own first among those of training; training has none of the held-out
    ones. All in Unicode's composed form (NFC). Raises ValueError for an unknown scenario."""
    scenarios.find(scenario)
    kind, _, side = scenario.rpartition("_")
    boxes, ways, verbs = (_NEW_PARTS if held_out else _PARTS)[kind]
    goals = _NEW_GOALS if held_out else _GOALS
    made = [
        " ".join(part for part in (box, way.format(word), verb, goal) if part)
        for box, way, verb, goal, word in itertools.product(boxes, ways, verbs, goals, _SIDES[side])
    ]
    if held_out:  # the cup first
        made += [
            f"컵까지 가는데 {box} {way.format(word)} {verb} 가 주세요"
            for box, way, verb, word in itertools.product(boxes, ways, verbs, _SIDES[side])
        ]
    else:
        made.insert(0, CANONICAL[scenario])
    return tuple(dict.fromkeys(unicodedata.normalize("NFC", sentence) for sentence in made))


def mistyped(sentence: str, rng: np.random.Generator) -> str:
    """The sentence with a space left out, or one put before a particle or into a word, as people type."""
    letters = list(sentence)
    spaces = [i for i, letter in enumerate(letters) if letter == " "]
    within = [i for i in range(1, len(letters)) if " " not in letters[i - 1 : i + 1]]
    if spaces and (not within or rng.random() < 0.6):
        letters.pop(int(rng.choice(spaces)))
    elif within:
        letters.insert(int(rng.choice(within)), " ")
    return "".join(letters)


def noisy(sentence: str, rng: np.random.Generator) -> str:
    """The sentence with a word of one to three random syllables put in, or with one left out that names no side."""
    words = sentence.split(" ")
    spare = [i for i, word in enumerate(words) if not any(side in word for side in (*_SIDES["left"], *_SIDES["right"]))]
    if spare and rng.random() < 0.4:
        words.pop(int(rng.choice(spare)))
    else:
        letters = rng.integers(_HANGUL[0], _HANGUL[1] + 1, int(rng.integers(1, 4)))
        words.insert(int(rng.integers(len(words) + 1)), "".join(map(chr, letters)))
    return " ".join(words)


def ask(
    scenario: str, seed: int, *, held_out: bool = False, mistyped_share: float = 0.25, noisy_share: float = 0.0
) -> str:
    """One way to ask for a scenario, drawn from `seed`: `mistyped_share` of them with a space too few or too many,
    `noisy_share` (for training) with a word too few or too many."""
    rng = np.random.default_rng([seed, held_out])
    listed = wordings(scenario, held_out=held_out)
    sentence = listed[int(rng.integers(len(listed)))]
    if rng.random() < noisy_share:
        sentence = noisy(sentence, rng)
    return mistyped(sentence, rng) if rng.random() < mistyped_share else sentence
