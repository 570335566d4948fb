"""Pictures and text about them as the token ids that a backbone's family was taught on: its chat template, its places
for pictures, its box tokens, and which tokens are answers. Special tokens that questions and answers write out are text
(literal.py), but for `MARK` in questions and those that the family writes places in pictures with."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from robovlms_jax.inputs import boxes, literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "<image>"
"""Where a picture stands in a question, as LLaVA's files write it; a line break after it belongs to it."""
_MARKS = re.compile(r"<image>\n?")


DESCRIBE = "Describe the picture in one sentence."
"""What captions without a question answer; families that were taught words of their own for it have `Chat.caption`."""


class Turn(NamedTuple):
    """A question, with `MARK` for every picture that is shown with it, and its answer."""

    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Chat:
    """How a family writes conversations. {images}: all pictures together; without it each stands where its mark is.

    start: before the first turn. question: with {question} in it, and {language} for the code of the answer's language.
    answer: with {answer} in it. end: what the model says when an answer is over, learned with it; empty: the
    tokenizer's end-of-text token. between: before every turn but the first. image: around a picture, with {image} in
    it. boxes: how boxes are written. caption: in place of `question` where it is `DESCRIBE`; empty: as any question.
    words: regular expression of the special tokens that questions and answers are made of, too.
    """

    question: str
    answer: str = " {answer}"
    end: str = ""
    start: str = ""
    between: str = ""
    image: str = "{image}"
    boxes: boxes.Style = "fractions"
    caption: str = ""
    words: str = ""


_CHATML = Chat(
    start="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    question="<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
    answer="{answer}",
    end="<|im_end|>",
    between="\n",
)
_QWEN_PLACES = r"<\|(object_ref|box|quad)_(start|end)\|>"
PLAIN = Chat(start="{images}", question="Question: {question} Answer:", between="\n")
"""For families without a template of their own."""

_SCRIPTS = (
    ("\uac00-\ud7a3", "ko"),
    ("\u3040-\u30ff", "ja"),
    ("\u4e00-\u9fff", "zh"),
    ("\u0400-\u04ff", "ru"),
    ("\u0370-\u03ff", "el"),
    ("\u0600-\u06ff", "ar"),
    ("\u0900-\u097f", "hi"),
    ("\u0e00-\u0e7f", "th"),
)
"""Letters, as a regular expression's range -> the language that is most often written with them."""
CHATS: dict[str, Chat] = {
    # microsoft/kosmos-2-patch14-224, model card: "<grounding> Question: ... Answer:".
    "kosmos-2": Chat(
        start="<s>{images}<grounding>",
        question=" Question: {question} Answer:",
        end="</s>",
        image="<image>{image}</image>",
        boxes="kosmos-2",
        words=r"</?phrase>|</?object>|<patch_index_\d{4}>|</delimiter_of_multi_objects/>",
    ),
    # google/paligemma-3b: pictures, <bos>, the prefix, a line break, then the suffix. Its prefix names the language of
    # the answer, which data do not: its letters say it, and Latin ones are English.
    "paligemma": Chat(
        start="{images}<bos>",
        question="answer {language} {question}\n",
        answer="{answer}",
        end="<eos>",
        boxes="paligemma",
        caption="caption {language}\n",
        words=r"<loc\d{4}>|<seg\d{3}>",
    ),
    # llava-hf/llava-1.5-7b-hf: Vicuna's template.
    "llava": Chat(
        start="<s>A chat between a curious human and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the human's questions. ",
        question="USER: {question} ASSISTANT:",
        end="</s>",
        image="{image}\n",
    ),
    "llava_mpt": dataclasses.replace(
        _CHATML,
        start="<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. The assistant gives "
        "helpful and honest answers.<|im_end|>\n",
        image="{image}\n",
    ),
    # vikhyatk/moondream2.
    "moondream1": Chat(start="<|endoftext|>{images}", question="\n\nQuestion: {question}\n\nAnswer:"),
    # Qwen/Qwen-VL-Chat; the tokens around a picture are the backbone's own image_start and image_end.
    "qwen": dataclasses.replace(_CHATML, image="Picture: {image}\n", boxes="qwen-vl", words="</?(ref|box|quad)>"),
    "qwen2_5_vl": dataclasses.replace(_CHATML, words=_QWEN_PLACES),
    "qwen3_vl": dataclasses.replace(_CHATML, start="", words=_QWEN_PLACES),
    # HuggingFaceTB/SmolVLM2: one picture, not split into tiles.
    "smolvlm": Chat(
        start="<|im_start|>",
        question="User:{question}<end_of_utterance>\nAssistant:",
        end="<end_of_utterance>",
        between="\n",
        image="<fake_token_around_image><global-img>{image}<fake_token_around_image>",
    ),
    # deepseek-ai/deepseek-vl-1.3b-chat.
    "deepseek_vl": Chat(
        start="<\uff5cbegin▁of▁sentence\uff5c>You are a helpful language and vision assistant. You are able to "
        "understand the visual content that the user provides, and assist the user with a variety of tasks using "
        "natural language.\n\n",
        question="User: {question}\n\nAssistant:",
        end="<\uff5cend▁of▁sentence\uff5c>",
    ),
    # deepseek-community/Janus-Pro: the template that transformers' conversion script writes, with its system prompt.
    "janus": Chat(
        start="<\uff5cbegin▁of▁sentence\uff5c>You are a helpful language and vision assistant. You are able to "
        "understand the visual content that the user provides, and assist the user with a variety of tasks using "
        "natural language.\n\n",
        question="<|User|>: {question}\n\n<|Assistant|>:",
        end="<\uff5cend▁of▁sentence\uff5c>",
        image="{image}\n",
    ),
    # unum-cloud/uform-gen2-qwen-500m.
    "vlm": _CHATML,
}
"""Family, by the name its config.json has -> its template."""


class Encoded(NamedTuple):
    """A conversation of n tokens.

    ids: int32[n]; 0 where a picture's token stands. image: int32[n], number of the token among all pictures' tokens, -1
    for text. answer: bool[n], True = the model has to say it. question: int32[u], the first question in tokens of the
    connector's own tokenizer; empty where it has none.
    """

    ids: np.ndarray
    image: np.ndarray
    answer: np.ndarray
    question: np.ndarray


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Conversations -> tokens of one backbone. Picklable, so that worker processes can read.

    chat: its family's template. image_tokens: P, tokens of a picture, those around it included that are the backbone's.
    connector_tokenizer: of a connector that reads the question, too (InstructBLIP): the first one alone, because what
      it makes of the pictures stands before every answer.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: Chat
    image_tokens: int
    connector_tokenizer: PreTrainedTokenizerBase | None = None

    def __call__(self, turns: Sequence[Turn], pictures: int) -> Encoded:
        """Raises ValueError: marks and pictures are not equally many, an empty answer, or a box that means nothing."""
        place, quote = literal.free("".join(map("".join, turns)), 2)
        found = _text(self.chat, self._end, turns, pictures, place, lambda text: literal.quoted(self._odd, text, quote))
        stretches = _stretches(*found, f"({place}|{quote}[^{quote}]*{quote})")
        ids, image, answer, shown = [], [], [], 0
        for text, spans in stretches:
            if text == place:
                ids += [0] * self.image_tokens
                image += range(shown, shown + self.image_tokens)
                answer += [False] * self.image_tokens
                shown += self.image_tokens
                continue
            tokens, offsets = self._tokens(text, quote)
            ids += tokens
            image += [-1] * len(tokens)
            answer += [
                end > start and any(start < last and end > first for first, last in spans) for start, end in offsets
            ]
        question = []
        if self.connector_tokenizer is not None:
            asked = _MARKS.sub("", turns[0].question).strip()
            question = literal.prompt_ids(self.connector_tokenizer, "{instruction}", asked)
        lists = ((ids, np.int32), (image, np.int32), (answer, bool), (question, np.int32))
        return Encoded(*(np.array(values, dtype) for values, dtype in lists))

    def written_out(self, turns: Sequence[Turn]) -> list[str]:
        """Special tokens that questions and answers write out and that are read as text."""
        return self._odd.findall(" ".join(map(" ".join, turns)))

    @property
    def _odd(self) -> re.Pattern[str]:
        chat = self.chat
        template = f"{chat.start}{chat.question}{chat.answer}{chat.end}{chat.between}{chat.image}"
        return literal.pattern(self.tokenizer, template, "|".join(filter(None, (MARK, chat.words))))

    def _tokens(self, text: str, quote: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a stretch, and where each begins and ends in it."""
        if text.startswith(quote):
            ids, offsets = literal.encode(self.tokenizer, text[1:-1])
            return ids, [(start + 1, end + 1) for start, end in offsets]
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]

    @property
    def _end(self) -> str:
        end = self.chat.end or self.tokenizer.eos_token
        if not end:
            raise ValueError("the tokenizer has no end-of-text token, so an answer would have no end to learn.")
        return end


def _text(
    chat: Chat, end: str, turns: Sequence[Turn], pictures: int, mark: str, plain: Callable[[str], str] = str
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation in the family's words, `mark` for each picture, and where answers begin and end in it.

    plain: marks what is to be read as text in what somebody said.
    """
    marks = sum(len(_MARKS.findall(turn.question)) for turn in turns)
    if marks != pictures:
        raise ValueError(f"{marks} marks {MARK} for {pictures} pictures; each picture needs one, in a question.")
    place = chat.image.replace("{image}", mark)
    together = "{images}" in chat.start
    text, spans = chat.start.replace("{images}", place * pictures), []
    for number, turn in enumerate(turns):
        if not turn.answer.strip():
            raise ValueError(f"the question {turn.question!r} has no answer.")
        if MARK in turn.answer:
            raise ValueError(
                f"the answer {turn.answer!r:.80} has {MARK}, a picture's mark; only questions show pictures."
            )
        question, answer = (plain(boxes.written(part.strip(), chat.boxes)) for part in turn)
        question = _MARKS.sub("" if together else place, question)
        language = _language(turn.answer) if "{language}" in chat.question else ""
        asks_caption = chat.caption and _MARKS.sub("", turn.question).strip() == DESCRIBE
        form = chat.caption if asks_caption else chat.question
        asked = form.replace("{language}", language).replace("{question}", question)
        text += (chat.between if number else "") + asked
        begin = len(text)
        text += chat.answer.replace("{answer}", answer) + end
        spans.append((begin, len(text)))
    return text, spans


def _language(text: str) -> str:
    """By the letters of `_SCRIPTS` that a text has most of, if they are more than a quarter of its letters (a syllable
    is one); else "en". A code of ISO 639. Beside kana Chinese characters are Japanese, which has them, too."""
    found = {code: len(re.findall(f"[{letters}]", text)) for letters, code in _SCRIPTS}
    if found["ja"]:
        found["ja"] += found.pop("zh")
    most = max(found, key=lambda code: found[code])
    return most if 4 * found[most] > sum(map(str.isalpha, text)) else "en"


def _stretches(text: str, spans: list[tuple[int, int]], cut: str) -> list[tuple[str, list[tuple[int, int]]]]:
    """Text, and what the expression `cut` finds, in order; of each the answers' places counted from its beginning."""
    out, at = [], 0
    for part in re.split(cut, text):
        if part:
            inside = [(begin - at, end - at) for begin, end in spans if begin < at + len(part) and end > at]
            out.append((part, inside))
        at += len(part)
    return out


def encoder(
    tokenizer: PreTrainedTokenizerBase,
    model_type: str,
    image_tokens: int,
    connector_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Encoder:
    """The encoder of a family. Raises ValueError: its tokenizer cannot say which characters a token is made of."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {model_type} does not tell which characters a token stands for, so answers cannot be "
            "marked; save it as tokenizer.json (transformers' AutoTokenizer with use_fast=True)."
        )
    return Encoder(tokenizer, CHATS.get(model_type, PLAIN), image_tokens, connector_tokenizer)
