"""`robovlms COMMAND`: every command starts its program, and shells complete what the configurations say."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys

import pytest

from experiments import demo, label, serve
from robovlms_jax import cli_help, commands, completion, programs
from robovlms_jax.runs import logs
from tests.processes import run_python
from tests.test_imports import ROOT


def test_help_lists_every_command_and_imports_neither_jax_nor_numpy():
    code = (
        "import sys; from robovlms_jax import commands; commands.main(['--help']); "
        "loaded = {'jax', 'numpy', 'tyro'} & set(sys.modules); assert not loaded, loaded"
    )
    shown = run_python("-c", code)
    for command in (
        "record",
        "inspect",
        "convert",
        "plan",
        "train",
        "search",
        "compare",
        "evaluate",
        "serve",
        "export",
    ):
        assert f"\n  {command} " in shown


def test_without_jax_help_is_there_and_a_command_says_what_to_install():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from robovlms_jax import commands; commands.main(sys.argv[1:])"
    )

    def start(*arguments):  # -S: no installed packages at all
        command = [sys.executable, "-S", "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "evaluate" in start("--help").stdout
    done = start("evaluate", "--checkpoint", "run")
    assert done.returncode == 1 and "error: robovlms evaluate needs JAX" in done.stderr and "[train]" in done.stderr
    assert "[serve]" in start("demo").stderr and "[serve]" in start("record", "teaching").stderr


def test_help_of_training_imports_nothing_that_only_trains():
    """One process for all: only what the first one imports takes long."""
    many = "few_shot", "adapt", "continual", "compare_policies", "compare_structures"
    code = (
        "import runpy, sys\n"
        "for name in sys.argv[1:]:\n"
        "    sys.argv = ['x', '--help']\n"
        "    try: runpy.run_module(f'experiments.{name}', run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as end: assert not end.code\n"
        "    loaded = {'grain', 'orbax', 'matplotlib', 'transformers', 'robovlms_jax.runs.run'} & set(sys.modules)\n"
        "    assert not loaded, (name, loaded)\n"
    )
    shown = run_python("-c", code, "calvin_abcd", *many)
    assert shown.count("--train.steps") == 1 and shown.count("--help-all") >= 1 + len(many)


def test_help_of_programs_that_read_checkpoints_imports_nothing_that_reads_them():
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(f'experiments.{name}')\n"
        "loaded = {'grain', 'orbax', 'matplotlib', 'transformers'} & set(sys.modules); assert not loaded, loaded"
    )
    run_python("-c", code, "evaluate", "compare", "plan", "calibrate", "demo", "serve", "reinforce", "teach", "export")


def test_a_command_runs_its_program_as_if_it_had_been_started_itself(monkeypatch):
    begun = []
    monkeypatch.setattr(cli_help, "started_as", "")
    monkeypatch.setattr(sys, "argv", ["robovlms"])
    monkeypatch.setattr(runpy, "run_module", lambda name, **options: begun.append((name, options, sys.argv[1:])))
    commands.main(["train", "bridge", "--preset", "sample"])
    commands.main(["evaluate", "--checkpoint", "run"])
    as_main = {"run_name": "__main__", "alter_sys": True}
    assert begun[0] == ("experiments.bridge", as_main, ["--preset", "sample"])
    assert begun[1] == ("experiments.evaluate", as_main, ["--checkpoint", "run"])
    assert cli_help.program_name("whatever") == "robovlms evaluate"
    commands.main(["help", "train", "bridge"])
    assert begun[2] == ("experiments.bridge", as_main, ["--help"])


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["trian"], "What each does: robovlms --help."),
        (["train", "brigde"], "unknown word after train 'brigde'; did you mean 'bridge'?"),
        (["train", "sampel"], "A preset goes with --preset: robovlms train --preset sampel."),
        (["completion", "bsah"], "unknown shell 'bsah'; did you mean 'bash'?"),
        (["completion"], "name a shell: bash, zsh, fish."),
        (["serve", "runs/sample"], "after serve 'runs/sample'; it takes --FIELD VALUE, and robovlms serve --help"),
    ],
)
def test_what_is_misspelt_is_answered_with_the_nearest(typed, message, capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(typed)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_every_program_is_there_and_completes_its_own_flags():
    for words in programs.present().values():
        for program in words.values():
            flags = completion.flags_of(program)
            assert "--help" in flags and len(flags) > 2, program
    flags = completion.flags_of(programs.COMMANDS["train"][""])
    assert "kosmos-2" in flags["--backbone.name"]
    assert "sample" in flags["--preset"] and "lstm" in flags["--policy.head"] and "float32" in flags["--backbone.dtype"]


def test_every_program_of_experiments_has_a_command():
    modules = {program.module for words in programs.COMMANDS.values() for program in words.values()}
    started = {path.stem for path in (ROOT / "experiments").glob("*.py") if "__main__" in path.read_text()}
    assert started <= modules


PART = {
    "train": {"": programs.COMMANDS["train"][""], "bridge": programs.COMMANDS["train"]["bridge"]},
    "plan": programs.COMMANDS["plan"],
}


def completed(shell, script, words):
    last = len(words) - 1
    line = f"COMP_WORDS=({' '.join(words)}); [ -n \"{words[-1]}\" ] || COMP_WORDS[{last}]=''; COMP_CWORD={last}"
    done = subprocess.run(
        [shell, "-c", f'{script}\n{line}\n_robovlms\nprintf "%s\\n" "${{COMPREPLY[@]}}"'],
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_commands_words_flags_presets_and_choices():
    script = completion.script("bash", PART)
    assert completed("bash", script, ["robovlms", "tr"]) == ["train"]
    assert completed("bash", script, ["robovlms", "train", "bri"]) == ["bridge"]
    assert completed("bash", script, ["robovlms", "train", "--train.st"]) == ["--train.steps", "--train.stages"]
    assert completed("bash", script, ["robovlms", "train", "--preset", "kosmos_lstm_l"]) == ["kosmos_lstm_lora"]
    assert completed("bash", script, ["robovlms", "train", "bridge", "--preset", "sa"]) == ["sample"]
    assert completed("bash", script, ["robovlms", "train", "--train.batch-s"]) == ["--train.batch_size"]
    assert "kosmos-2-twin" in completed("bash", script, ["robovlms", "train", "--backbone.name", "kosmos"])
    assert completed("bash", script, ["robovlms", "train", "bridge", "--policy.history", "in"]) == ["interleaved"]


def test_zsh_and_fish_have_the_same_words():
    assert "autoload -U +X bashcompinit" in completion.script("zsh", PART)
    fish = completion.script("fish", PART)
    assert "complete -c robovlms -n __fish_use_subcommand -f -a 'train plan completion'" in fish
    assert "-l policy.history -x -a 'one_step interleaved" in fish
    for shell, script in (("zsh", completion.script("zsh", PART)), ("fish", fish)):
        if shutil.which(shell):
            assert subprocess.run([shell, "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_sources_its_script_whether_or_not_its_completion_was_started(tmp_path):
    (tmp_path / "script").write_text(completion.script("zsh", PART))
    for before in ("", "autoload -Uz compinit; compinit -u -D; "):
        # bashcompinit calls functions with the options of sh: arrays begin at 0. zsh compares by itself.
        line = 'COMP_WORDS=(robovlms train --policy.history in); COMP_CWORD=3; _robovlms; print -- "${COMPREPLY[@]}"'
        command = f"{before}source {tmp_path / 'script'} || exit 1; print $_comps[robovlms]; emulate sh -c '{line}'"
        done = subprocess.run(
            ["zsh", "-f", "-c", command], capture_output=True, text=True, env={**os.environ, "ZDOTDIR": str(tmp_path)}
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        registered, words = done.stdout.splitlines()
        assert registered == "_bash_complete -o default -F _robovlms" and "interleaved" in words.split()


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_sources_its_script_and_completes_commands_flags_and_choices(tmp_path):
    (tmp_path / "script").write_text(completion.script("fish", PART))
    typed = ("robovlms tr", "robovlms train --train.batch", "robovlms train --backbone.name kosmos-2-t")
    asked = "; ".join(f"complete -C '{line}'" for line in typed)
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source {tmp_path / 'script'}; or exit 1; {asked}"],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert {"train", "--train.batch_size", "kosmos-2-twin"} <= set(found) and "plan" not in found


@pytest.mark.parametrize("program", [demo, label, serve], ids=lambda program: program.__name__)
def test_a_program_without_its_packages_names_them_before_it_loads_anything(program, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "websockets" else found(name))
    monkeypatch.setattr(sys, "argv", ["x", "--checkpoint", str(tmp_path)])  # an empty directory, refused later
    monkeypatch.setattr(logs, "to_stderr", lambda **_: None)
    with pytest.raises(SystemExit, match=r"error: this program needs websockets: pip install -e '\.\[serve\]'"):
        program.main()
