"""Tokenizers and the small files around a model: open them, carry them inside a checkpoint, make a small one.

transformers is imported inside the functions that need it, so importing this module costs nothing.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import tempfile
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from robovlms_jax import hub, json_files
from robovlms_jax.weights import locate, quantized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


RANKS = "qwen.tiktoken"
"""Qwen-VL's tokenizer: a line per token, base64 and its rank."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    RANKS,
)
"""Any one of these makes a directory a tokenizer directory."""

CONNECTOR_TOKENIZER = "qformer_tokenizer"
"""Directory of a second tokenizer beside the first: what InstructBLIP's Q-Former reads the instruction with."""

_TOKENIZER_ASSETS = (
    *TOKENIZER_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
ASSET_FILES = (
    *_TOKENIZER_ASSETS,
    "preprocessor_config.json",
    "processor_config.json",
    "config.json",
    *(f"{CONNECTOR_TOKENIZER}/{name}" for name in _TOKENIZER_ASSETS),
)
"""Everything but weights that rebuilding tokenizers, preprocessing and architecture needs."""

_MARK = b"\xef\xbb\xbf"  # a byte-order mark, which editors on Windows put in front of UTF-8

# KOSMOS-2's ids 0 to 3 and its tags (Peng et al. 2023, arXiv:2306.14824), so the twin reads the same prompts.
_TWIN_TAGS = ("<image>", "</image>", "<grounding>", "<phrase>", "</phrase>", "<object>", "</object>")
_TWIN_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", *_TWIN_TAGS)


def load_tokenizer(path: str | pathlib.Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a Hugging Face model directory, from local files (or hf://, see `resolve_weights`).

    Raises:
      FileNotFoundError: no such directory, or no tokenizer files in it.
      ValueError: the files are there but cannot be read.
    """
    directory = resolve_weights(path)
    found = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{directory} has no tokenizer; expected one of {list(TOKENIZER_FILES)}. Copy the files beside the weights."
        )
    _require_packages(directory, found)
    if "tokenizer.json" in found:
        # It holds the whole tokenizer, and this class reads it without importing torch, unlike AutoTokenizer (6 s).
        read = _transformers().PreTrainedTokenizerFast.from_pretrained
    else:
        # False: code that comes with the files is neither run nor asked about on a terminal that may not be there.
        read = functools.partial(_transformers().AutoTokenizer.from_pretrained, trust_remote_code=False)
    with _without_marks(directory) as clean:
        try:
            if found == [RANKS]:
                return read_ranks(clean / RANKS)
            tokenizer = read(clean, local_files_only=True)
        except Exception as error:  # whatever each tokenizer library raises on a broken file
            reason = _reason(directory, found) or str(error).replace(str(clean), str(directory))
            raise ValueError(f"{directory} has tokenizer files {found} that cannot be read: {reason}") from error
    tokenizer.name_or_path = str(directory)
    return tokenizer


def _transformers() -> types.ModuleType:
    # Only tokenizers are used, and without PyTorch it says at its import that models are missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


@contextlib.contextmanager
def _without_marks(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """The directory, or while the context lasts a copy of its small files without byte-order marks, if any has one."""
    files = [directory / name for name in ASSET_FILES if "/" not in name and (directory / name).is_file()]
    contents = {path.name: path.read_bytes() for path in files if not _is_binary(path.name)}
    if not any(content.startswith(_MARK) for content in contents.values()):
        yield directory
        return
    with tempfile.TemporaryDirectory() as copy:
        for path in files:
            content = contents.get(path.name, b"") if path.name in contents else path.read_bytes()
            (pathlib.Path(copy) / path.name).write_bytes(content.removeprefix(_MARK))
        yield pathlib.Path(copy)


def _require_packages(directory: pathlib.Path, found: list[str]) -> None:
    """Raise ValueError where the only file is one that an optional package reads, and that is not installed."""
    if not all(_is_binary(name) for name in found):
        return
    path = directory / found[0]
    if json_files.is_pointer(path):
        raise ValueError(f"{path} is a pointer of Git LFS, not the tokenizer; run `git lfs pull` where it lies.")
    # SentencePiece models are protocol buffers whose first field is a list; tiktoken's ranks are lines of base64.
    kind, packages = ("SentencePiece", ("sentencepiece", "protobuf"))
    with path.open("rb") as file:
        start = file.read(1)
    if start != b"\n":
        kind, packages = "tiktoken", ("tiktoken",)
    missing = [name for name in packages if not _is_installed(name)]
    if missing:
        raise ValueError(
            f"{path} is a {kind} model without a tokenizer.json beside it. Reading it needs what is not installed: "
            f"pip install {' '.join(missing)}. Or write tokenizer.json once where it is installed, with "
            "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
        )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec({"protobuf": "google.protobuf"}.get(package, package)) is not None
    except ModuleNotFoundError:  # of google
        return False


def _reason(directory: pathlib.Path, found: list[str]) -> str:
    """Why a tokenizer's files cannot be read, where that can be told from them; else empty."""
    config = {}
    for name in ASSET_FILES:
        if name.endswith(".json") and (directory / name).is_file():
            try:
                values = json_files.read(directory / name)
            except ValueError as error:
                return str(error)
            config = values if name == "tokenizer_config.json" else config
    if found == ["vocab.json"] and not (directory / "merges.txt").is_file():
        return "merges.txt, which belongs to vocab.json, is missing."
    if "tokenizer.json" not in found and isinstance(config, dict) and "AutoTokenizer" in (config.get("auto_map") or {}):
        return (
            f"tokenizer_config.json asks for code of its own ({config['auto_map']['AutoTokenizer']}), which is not run "
            "here. Where you trust it, write a tokenizer.json with transformers and trust_remote_code=True."
        )
    return ""


def read_ranks(path: pathlib.Path) -> PreTrainedTokenizerBase:
    """Qwen-VL's tokenizer from its rank file; published as code for tiktoken, here as a byte-level BPE with merges.

    A rank is a token's id and the order in which it is merged. Which two tokens it is merged from is not in the file:
    it is what the ranks below its own make of its bytes. After the ranks come the special tokens (Qwen/Qwen-VL's
    tokenization_qwen.py): end of text, two of ChatML, 205 extras, then those around references, boxes and images.

    Raises ValueError when the ranks are not a run from 0.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            f"{path} has {len(ranks)} tokens whose ranks are not 0 to {len(ranks) - 1}; download it again."
        )
    letters = _byte_letters()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        parts = _merge(token, ranks, ranks[token])
        if len(parts) == 2:  # else no merge makes it, and it can only be asked for by its id
            merges.append((spell[parts[0]], spell[parts[1]]))
    tokenizer = Tokenizer(models.BPE(vocab={spell[token]: rank for token, rank in ranks.items()}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    names += ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    end = "<|endoftext|>"
    return _transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _merge(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """A token's bytes after all merges of ranks below `limit`, lowest first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pairs = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        best = min(pairs, default=limit)
        if best >= limit:
            return parts
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE (Radford et al. 2019) writes for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def split_weights(text: str) -> list[str]:
    """Places of a model's weights, joined by commas: "A,B" -> ["A", "B"].

    A comma may also belong to a directory's name: of all ways to part the text, the one is taken in which every part is
    a directory or begins with hf://.

    Raises:
      ValueError: a part is empty, or the text can be read in several ways; names them.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(
            f"weights {text!r} hold an empty part; expected directories or {hub.PREFIX}OWNER/NAME, with commas."
        )
    ways = [way for way in _joined(text.split(",")) if all(_is_place(part) for part in way)]
    if len(ways) > 1:
        raise ValueError(
            f"weights {text!r} can be read as {' or as '.join(map(str, ways))}; rename the directory with the comma."
        )
    return ways[0] if ways else parts


def _joined(parts: list[str]) -> Iterator[list[str]]:
    """Every way to join neighbouring parts with the commas between them."""
    for stop in range(1, len(parts) + 1):
        first = ",".join(parts[:stop]).strip()
        if stop == len(parts):
            yield [first]
        elif _is_place(first):
            yield from ([first, *rest] for rest in _joined(parts[stop:]))


def _is_place(path: str) -> bool:
    if path.startswith(hub.PREFIX):
        return "," not in path
    return pathlib.Path(path).expanduser().is_dir()


def resolve_weights(path: str | pathlib.Path, *, tensors: bool = True) -> pathlib.Path:
    """A local model directory for `path`; hf://OWNER/NAME[@REVISION] is downloaded once, to Hugging Face's own cache.

    Without `tensors`, only the small files are downloaded: config.json, tokenizer, image processor.

    Raises:
      FileNotFoundError: there is no such directory, or it can neither be downloaded nor found in the cache.
      ValueError: a name that is none of a repository, or its weights are quantised.
    """
    if not hub.is_name(path):
        directory = pathlib.Path(path).expanduser()
        if not directory.is_dir():
            hint = "; a file's directory is expected, with config.json and tokenizer" if directory.is_file() else ""
            raise FileNotFoundError(
                f"no directory {directory}; expected one, or {hub.PREFIX}OWNER/NAME to download it{hint}."
            )
        return directory

    hub.parse(path)
    return _download(hub.as_written(path), tensors=tensors)


def _download(name: str, *, tensors: bool) -> pathlib.Path:
    """The small files of a repository, then the first of its sets of weights that is there: many repositories hold the
    same weights again in other formats."""
    directory = hub.snapshot(name, ["*.json", "*.txt", "*.model", RANKS])
    if not tensors:
        return directory
    config = directory / "config.json"
    if config.is_file():
        try:
            quantized.require_float_config(json_files.read_object(config, "settings"))
        except ValueError as error:  # said before gigabytes are downloaded
            raise ValueError(f"{name}: {error}") from error
    for index, single in ((locate.INDEX, locate.SINGLE), (locate.TORCH_INDEX, locate.TORCH_SINGLE)):
        hub.snapshot(name, [single])
        if not (directory / single).is_file() and (directory / index).is_file():
            hub.snapshot(name, sorted(set(locate.weight_map(directory / index).values())))
        if (directory / single).is_file() or (directory / index).is_file():
            break
    return directory


def read_assets(directory: str | pathlib.Path) -> dict[str, str]:
    """The `ASSET_FILES` of a model directory as name -> content, ready for JSON. Binary files (*.model) are base64.

    Raises FileNotFoundError when none of them is there.
    """
    directory = pathlib.Path(directory)
    contents = {name: (directory / name).read_bytes() for name in ASSET_FILES if (directory / name).is_file()}
    if not contents:
        raise FileNotFoundError(f"{directory} has none of {list(ASSET_FILES)}; expected a model directory.")
    return {
        name: base64.b64encode(content).decode("ascii") if _is_binary(name) else content.decode("utf-8")
        for name, content in contents.items()
    }


def write_assets(assets: Mapping[str, str], directory: str | pathlib.Path) -> None:
    """Inverse of `read_assets`, byte for byte; makes `directory`.

    Raises ValueError on a name that is not one of `ASSET_FILES`: a hostile checkpoint must not write elsewhere.
    """
    unknown = sorted(set(assets) - set(ASSET_FILES))
    if unknown:
        raise ValueError(f"assets hold {unknown}; known files are {list(ASSET_FILES)}.")
    directory = pathlib.Path(directory)
    for name, content in assets.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(base64.b64decode(content) if _is_binary(name) else content.encode("utf-8"))


def make_twin_tokenizer(sentences: Iterable[str], vocab_size: int, directory: str | pathlib.Path) -> None:
    """Train a small tokenizer with KOSMOS-2's conventions and save it for `load_tokenizer`.

    Byte-level BPE: any text is made of known tokens, so <unk> never comes out. Ids: <s> 0, <pad> 1, </s> 2, <unk> 3,
    then <grounding> and the other tags; a prompt becomes <s> ... </s>. The same sentences give the same files.

    Args:
      sentences: what merges are learned from.
      vocab_size: upper limit of ids; few sentences give fewer.
    Raises:
      ValueError: `vocab_size` leaves no room for the special tokens and the 256 bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(_TWIN_SPECIALS) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is below {smallest}: {len(_TWIN_SPECIALS)} special tokens and 256 bytes."
        )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(_TWIN_SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": list(_TWIN_TAGS),
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _is_binary(name: str) -> bool:
    return name.endswith(".model")
