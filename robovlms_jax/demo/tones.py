"""How something is said: as an order, a ban, a question, a description, or a cry to stop? Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_STOP = _set(
    "stop stops stopped stopping stopp stoppe halt halts freeze abort aborts cease pause emergency anhalten "
    "stehenbleiben arrête arrete arrêtez arretez arrêter detente detener deténgase fermati fermare pare parar stanna"
)
"""Anywhere in a sentence: to stop where going on was meant does no harm, the reverse may."""
_STOP_PARTS = _set("멈 정지 중지 그만 스톱 기다려 止ま 止め 待って ストップ 停 стоп стой")
"""Parts of words, of languages that put endings to them or write them without spaces."""
_STOP_ALONE = _set(
    "wait hold enough cancel quit still whoa no nope dont stay end warte warten nein attends basta espera alto para "
    "aspetta"
)
"""Only where nothing else is said than what may stand beside them: "hold the door" is no stop."""
_BESIDE = _set("on up there right moving move off everything second minute moment immediately stand keep")
_MOVE = _set("move moving anything touch act continue proceed")

_NEGATIONS = _set(
    "not never no nor neither none nothing nobody dont doesnt didnt cannot cant couldnt wont wouldnt shouldnt mustnt "
    "neednt isnt arent aint avoid refrain forbid forbidden prohibited alone untouched except unless instead nicht "
    "kein keine nie niemals"
)
_QUESTIONS = _set(
    "what whats why who whos whose when where which how is are was were am does did has have had should shall may "
    "might isnt arent doesnt didnt"
)
_ARTICLES = _set("the a an this that these those it my your")
_CONDITIONS = _set("if unless when whenever after before once while later tomorrow")


def asks_to_stop(typed: str, words: Sequence[str], fillers: Collection[str], known: Collection[str]) -> bool:
    """Is the robot to stand still? words: of `typed`, in lower case. known: words that sentences of tasks have."""
    if _STOP & set(words) or any(part in typed.lower() for part in _STOP_PARTS):
        return True
    said = [word for word in words if word not in fillers]
    if _NEGATIONS & set(said) and set(said) <= _NEGATIONS | _MOVE:
        return True
    if set(said) & _STOP_ALONE and set(said) <= _STOP_ALONE | _BESIDE:
        return True
    # Misspelt, in haste: alone, and nothing else that is known. "What can you do?" is what people ask first, no "wait".
    return (
        len(said) == 1
        and said[0] not in known
        and said[0] not in _QUESTIONS
        and bool(difflib.get_close_matches(said[0], ("stop", "halt", "freeze", "pause", "wait"), n=1, cutoff=0.75))
    )


def no_order(words: Sequence[str], *, begins_with_verb: bool, question: bool) -> str:
    """Why it is not to be obeyed, as the second half of a sentence; "": it may be.

    Args:
      words: in lower case.
      begins_with_verb: of a known sentence, politeness aside.
      question: it ends with a question mark.
    """
    if not words:
        return ""
    if _NEGATIONS & set(words):
        return "that says what not to do, and the robot only knows what to do"
    first, second = words[0], words[1] if len(words) > 1 else ""
    asks = first in _QUESTIONS or (first == "do" and second in ("you", "i", "we"))
    asks |= first in ("can", "could", "will", "would") and second != "you"
    if asks or (question and not begins_with_verb):
        return "that is a question, which the robot cannot answer; say what it should do: the buttons say examples"
    if _CONDITIONS & set(words):
        return "that depends on something, and the robot acts at once; say it when it is to be done"
    describes = {"is", "are", "was", "were"} & set(words) and not {"should", "must", "until", "so"} & set(words)
    if describes and first in _ARTICLES:
        return "that says how something is; say what the robot should do"
    return ""
