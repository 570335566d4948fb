"""What programs say of themselves when they are asked for help."""

from __future__ import annotations

import dataclasses
import importlib
import operator
import re
from typing import Literal

import pytest

from robovlms_jax import cli, cli_help, programs
from robovlms_jax.runs.config import ExperimentConfig


@pytest.mark.parametrize("columns", [40, 72, 80, 119])
def test_a_narrow_terminal_gets_a_line_for_each_field_and_no_field_less(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = cli_help.short_help("x", "What.", ("one", ["one"]), ExperimentConfig(), ExperimentConfig.USUAL)
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  --")] == [
        f"--{path}".replace("--train.output", "--out") for path in ExperimentConfig.USUAL
    ]
    assert max(len(line) for line in text.splitlines()) <= max(columns, 80)
    assert len(text.splitlines()) < len(ExperimentConfig.USUAL) + 12
    assert text.endswith(" ...).") and text.splitlines()[-3] == ""  # the last sentence is whole, in two lines


@pytest.mark.parametrize("columns", ["80", "120"])
def test_an_example_is_broken_where_a_shell_allows_it_and_no_flag_loses_its_value(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    command = 'python -m x --checkpoints runs/a runs/b --instructions "open the drawer" --reworded "pull it out"'
    text = f"What.\n\n    {command} \\\n        --config a_configuration_that_is_long.json\n    python -m y"
    shown = cli_help.short_help("x", text, ("", ()), ExperimentConfig(), ExperimentConfig.USUAL)
    first, *more, last = shown.partition("Fields:")[0].split("\n\n")[2].splitlines()
    assert first.startswith("  python -m x ") and last == "  python -m y" and more
    assert all(line.startswith("      --") for line in more)  # also what stood on a line of its own
    assert all(line.endswith(" \\") for line in [first, *more][:-1]) and not more[-1].endswith("\\")
    joined = " ".join(line.removesuffix("\\").strip() for line in [first, *more])
    assert joined == f"{command} --config a_configuration_that_is_long.json"


def test_a_choice_that_is_empty_is_shown_as_such():
    config = dataclasses.make_dataclass("Own", [("dtype", Literal["", "float32"], "")])()
    assert cli_help.document(config, "dtype") == 'one of "", float32'


def test_a_field_that_leaves_no_room_for_words_is_shown_without_any(monkeypatch):
    name = "a_name_that_takes_all_of_a_line_of_a_narrow_terminal_for_itself"
    config = dataclasses.make_dataclass("Own", [(name, str, "and so does its value")])()
    monkeypatch.setenv("COLUMNS", "72")
    monkeypatch.setattr(cli_help, "document", lambda config, path: "What it is for")
    assert f"  --{name} " in cli_help.short_help("x", "What.", ("", ()), config)


@pytest.mark.parametrize(
    ("value", "shown"),
    [("runs/a_name_that_is_too_long", "runs/..."), ("wrist static_and_another_one", "wrist ..."), ("a" * 25, "...")],
)
def test_of_a_value_that_is_too_long_the_words_and_folders_that_fit_are_shown(value, shown, monkeypatch):
    monkeypatch.setattr(cli_help, "document", lambda config, path: "")
    text = cli_help.short_help("x", "What.", ("", ()), dataclasses.make_dataclass("Own", [("path", str, value)])())
    (line,) = [line for line in text.splitlines() if line.startswith("  --path")]
    assert line.removeprefix("  --path").strip() == shown


def test_names_of_presets_that_do_not_fit_are_said_to_go_on(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"a_preset_with_a_long_name_{number}" for number in range(40)]
    text = cli_help.short_help("x", "What.", (names[0], names), ExperimentConfig(), ExperimentConfig.USUAL)
    (block,) = [part for part in text.split("\n\n") if part.startswith("presets:")]
    assert block.endswith(", ...") and len(block.splitlines()) == 8
    assert not cli_help.short_help("x", "What.", ("one", ["one"]), ExperimentConfig(), ()).count("one, ...")


def test_help_fits_one_screen_and_help_all_has_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    presets = {"one": ExperimentConfig(), "two": ExperimentConfig()}
    with pytest.raises(SystemExit) as end:
        cli.parse(presets, "one", description="What it does.\n\nMore of it.", argv=["--help", "--preset", "two"])
    short = capsys.readouterr().out
    assert end.value.code == 0 and "What it does." in short and "More of it" not in short and "preset two" in short
    lines = short.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 120
    for path in ExperimentConfig.USUAL:  # each says what it is, not its name alone
        (line,) = [line for line in lines if line.split()[:1] == [f"--{path}".replace("--train.output", "--out")]]
        assert len(line.split()) > 3, line
    with pytest.raises(SystemExit):
        cli.parse(presets, "one", description="What it does.", argv=["--help-all"])
    assert "--mesh.tensor" in capsys.readouterr().out and "--mesh.tensor" not in short


@pytest.mark.parametrize("name", sorted(f"{x.module}" for words in programs.present().values() for x in words.values()))
def test_help_of_every_program_is_one_screen(name, monkeypatch):
    (program,) = [x for words in programs.present().values() for x in words.values() if x.module == name]
    module = importlib.import_module(f"experiments.{name}")
    settings = operator.attrgetter(program.settings)(module)
    settings = settings() if callable(settings) and not isinstance(settings, type) else settings
    presets = settings if isinstance(settings, dict) else {"": settings}
    started = f"python -m experiments.{name}"
    for preset, config in presets.items():
        start, shown = (preset, list(presets)) if preset else ("", ()), []
        for columns, most in ((200, 45), (80, 50)):
            monkeypatch.setenv("COLUMNS", str(columns))
            text = cli_help.short_help(started, module.__doc__, start, config, getattr(config, "USUAL", ()))
            lines = text.splitlines()
            assert len(lines) <= most and max(map(len, lines)) <= min(columns, 120), text
            assert not re.search(r"[a-z]\.\.\.", text), text  # no word is cut
            shown.append([line.split()[0] for line in lines if line.startswith("  --")])
        assert shown[0] == shown[1] and len(shown[0]) >= min(5, len(dict(cli_help.fields(config))))


def test_one_spelling_of_flags_is_shown_and_both_are_understood(capsys):
    @dataclasses.dataclass(frozen=True)
    class Args:
        max_steps: int
        """How long."""

    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            cli.read(Args, argv=[flag])
        shown = capsys.readouterr().out
        assert "--max_steps" in shown and "--max-steps" not in shown
    assert cli.read(Args, argv=["--max-steps", "3"]) == cli.read(Args, argv=["--max_steps", "3"]) == Args(3)
