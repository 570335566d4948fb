import json
import os
import pathlib
import subprocess
import sys
import types

import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.inputs import prompts, tokenizers

TEMPLATE = "<grounding>An image of a robot {instruction}"
SENTENCES = [
    prompts.format_prompt(TEMPLATE, s) for s in ("open the drawer", "push the red block right", "turn on the led")
]


def test_transformers_is_asked_not_to_warn_of_missing_models_before_it_is_imported(monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    tokenizers._transformers()
    assert os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("twin")
    tokenizers.make_twin_tokenizer(SENTENCES, 320, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return tokenizers.load_tokenizer(directory)


def test_twin_follows_kosmos_conventions(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    ids = tokenizer(SENTENCES[0])["input_ids"]
    assert ids[:2] == [0, tokenizer.convert_tokens_to_ids("<grounding>")]
    assert ids[-1] == 2
    assert len(ids) < len(SENTENCES[0]) / 3  # merges were learned
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == SENTENCES[0].removeprefix("<grounding>")


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_twin_reads_any_text_without_unknown_tokens(tokenizer, text):
    ids = tokenizer("x" + text + "x")["input_ids"][1:-1]
    assert all(4 <= i < 320 for i in ids if i not in tokenizer.all_special_ids)
    if not any(special in text for special in tokenizer.all_special_tokens):
        assert tokenizer.decode(ids) == " x" + text + "x"


def test_twin_is_deterministic_and_within_its_vocabulary(directory, tmp_path):
    tokenizers.make_twin_tokenizer(iter(SENTENCES), 320, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()
    for vocab_size in (267, 300, 5000):
        tokenizers.make_twin_tokenizer(SENTENCES, vocab_size, tmp_path)
        assert len(tokenizers.load_tokenizer(tmp_path)) <= vocab_size
    with pytest.raises(ValueError, match="vocab_size=266 is below 267"):
        tokenizers.make_twin_tokenizer(SENTENCES, 266, tmp_path)


LOAD = """
import importlib.machinery, socket, sys
from robovlms_jax.inputs import tokenizers
assert "transformers" not in sys.modules and "tokenizers" not in sys.modules
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
if sys.argv[2] == "torch hidden":
    finder = importlib.machinery.PathFinder
    find = finder.find_spec
    finder.find_spec = lambda name, *rest: None if name.startswith("torch") else find(name, *rest)
print(tokenizers.load_tokenizer(sys.argv[1])("open")["input_ids"], "torch" in sys.modules)
"""


@pytest.mark.parametrize("torch", ["torch as installed", "torch hidden"])
def test_loading_needs_neither_torch_nor_network(directory, tokenizer, torch):
    run = subprocess.run([sys.executable, "-c", LOAD, str(directory), torch], capture_output=True, text=True)
    assert run.stdout.strip() == f"{tokenizer('open')['input_ids']} False", run.stderr


def test_autotokenizer_opens_the_twin(directory, tokenizer):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert other(SENTENCES)["input_ids"] == tokenizer(SENTENCES)["input_ids"]


def test_directory_without_tokenizer_json_opens_too(directory, tmp_path):
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>"})
    )
    assert (
        tokenizers.load_tokenizer(tmp_path).decode(tokenizers.load_tokenizer(tmp_path)("open")["input_ids"]) == "open"
    )


def test_missing_and_broken_tokenizers_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tokenizers.load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer; expected one of \['tokenizer.json'"):
        tokenizers.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(ValueError, match=r"tokenizer files \['tokenizer.json'\] that cannot be read"):
        tokenizers.load_tokenizer(tmp_path)


def test_hub_paths_are_downloaded_once_asked(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kwargs: asked.append((name, kwargs)) or tmp_path
    )
    assert tokenizers.resolve_weights(tmp_path) == tmp_path
    assert asked == []
    assert tokenizers.resolve_weights("hf://google/paligemma-3b-pt-224@bfloat16") == tmp_path
    name, kwargs = asked[0]
    assert name == "google/paligemma-3b-pt-224"
    assert kwargs["revision"] == "bfloat16"
    assert not any(pattern.endswith(".bin") for pattern in kwargs["allow_patterns"])


def test_hub_without_network_says_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"cannot download hf://owner/name: no connection\nWithout network"):
        tokenizers.resolve_weights("hf://owner/name")


def test_assets_survive_json_byte_for_byte(directory, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in directory.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "tokenizer.model").write_bytes(bytes(range(256)))
    (source / "merges.txt").write_bytes("Ġa b\r\n".encode())
    (source / "model.safetensors").write_bytes(b"weights")
    tokenizers.write_assets(json.loads(json.dumps(tokenizers.read_assets(source))), tmp_path / "deep/copy")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "deep/copy").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in source.iterdir() if path.name != "model.safetensors"}


def test_assets_cannot_write_elsewhere(tmp_path):
    with pytest.raises(ValueError, match=r"escape.json"):
        tokenizers.write_assets({"../escape.json": "{}"}, tmp_path / "copy")
    assert list(pathlib.Path(tmp_path).iterdir()) == []
    with pytest.raises(FileNotFoundError, match="none of"):
        tokenizers.read_assets(tmp_path)


def test_qwens_rank_file_gives_the_tokens_that_lowest_rank_first_makes(tmp_path):
    # A toy of the published form: 256 bytes, then merges, one token per rank. Oracle: the plain algorithm on bytes.
    import base64

    merges = [b"th", b"he", b"the", b" the", b"in", b"ing", b" d", b"dr", "é".encode(), b"er", b" dr", b"aw", b"awer"]
    ranks = {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(merges)}
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    (tmp_path / tokenizers.RANKS).write_bytes(b"\n".join(lines) + b"\n")
    tokenizer = tokenizers.load_tokenizer(tmp_path)
    for words in (["open", " the", " drawer"], ["Th", "é"], [" thing", "!"]):
        expected = [ranks[part] for word in words for part in tokenizers._merge(word.encode(), ranks, 10**6)]
        assert tokenizer("".join(words))["input_ids"] == expected
    assert tokenizer.decode(tokenizer("Thé thing!")["input_ids"]) == "Thé thing!"
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|extra_0|>",
        "<|extra_204|>",
        "<ref>",
        "<img>",
        "</img>",
    ]
    base = len(ranks)  # 151643 in the published file, where <img> is 151857
    assert tokenizer.convert_tokens_to_ids(special) == [base + i for i in (0, 1, 2, 3, 207, 208, 214, 215)]
    assert 151_643 + 214 == 151_857 and len(tokenizer) == base + 217
    assert tokenizer.pad_token_id == base and tokenizer.bos_token is None
    copy = tmp_path / "copy"
    tokenizers.write_assets(tokenizers.read_assets(tmp_path), copy)
    assert tokenizers.load_tokenizer(copy)("the")["input_ids"] == [ranks[b"the"]]


def test_a_rank_file_with_a_gap_is_refused(tmp_path):
    (tmp_path / tokenizers.RANKS).write_text("YQ== 0\nYg== 2\n")
    with pytest.raises(ValueError, match="ranks are not 0 to 1"):
        tokenizers.load_tokenizer(tmp_path)


def copy(directory, target, **changes):
    """A copy of a tokenizer's directory with other entries in tokenizer_config.json."""
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<image>", "<phrase>"]},
        {"extra_special_tokens": {"image_token": "<image>"}},
        {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["mine.MyTokenizer", None]}},
        {"pad_token": None},
    ],
)
def test_tokenizer_json_is_read_whatever_else_the_files_say(directory, tokenizer, tmp_path, changes):
    other = tokenizers.load_tokenizer(copy(directory, tmp_path, **changes))
    assert other(SENTENCES)["input_ids"] == tokenizer(SENTENCES)["input_ids"]


@pytest.mark.parametrize("names", [["tokenizer.json"], ["tokenizer_config.json"], ["tokenizer.json", "config.json"]])
def test_byte_order_marks_change_nothing(directory, tokenizer, tmp_path, names):
    copy(directory, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for name in names:
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes().replace(b"\n", b"\r\n"))
    other = tokenizers.load_tokenizer(tmp_path)
    assert other(SENTENCES)["input_ids"] == tokenizer(SENTENCES)["input_ids"]
    assert other.pad_token_id == 1 and other.name_or_path == str(tmp_path)
    (tmp_path / names[0]).write_bytes(b"\xef\xbb\xbf{")
    with pytest.raises(ValueError, match=rf"{tmp_path}/{names[0]} is not JSON"):
        tokenizers.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\n\x0e\n\x05<unk>",
            r"is a SentencePiece model .*pip install sentencepiece protobuf\. Or",
        ),
        (b"IQ== 0\nIg== 1\n", r"is a tiktoken model .*pip install tiktoken\."),
        (b"version https://git-lfs.github.com/spec/v1\n", r"is a pointer of Git LFS"),
    ],
)
def test_a_tokenizer_that_needs_a_missing_package_names_it(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(tokenizers, "_is_installed", lambda package: False)
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(ValueError, match=rf"{tmp_path}/tokenizer.model {message}"):
        tokenizers.load_tokenizer(tmp_path)


def test_what_a_tokenizer_lacks_is_named(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.Own", None]}}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"asks for code of its own \(\['mine.Own', None\]\), which is not run here"):
        tokenizers.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "vocab.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=rf"{tmp_path}/vocab.json is not JSON"):
        tokenizers.load_tokenizer(tmp_path)
