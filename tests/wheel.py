"""The release as strangers get it: a wheel, built from the sources and installed into empty environments.

python tests/wheel.py FOLDER       # `make wheel-test`; takes minutes, most of it pip's

In the first environment, with the extra `client`: the robot's side imports, the entry point answers, jax is not there.
In the second, with the extra `train`: a checkpoint's way is opened, a program runs outside the repository.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*command: object, cwd: pathlib.Path) -> str:
    """Standard output. Raises SystemExit with what it said where it fails."""
    print("+", *command, flush=True)
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def environment(folder: pathlib.Path, wheel: pathlib.Path, extra: str) -> pathlib.Path:
    """A fresh environment with the wheel; its folder of programs."""
    venv.create(folder, with_pip=True, clear=True)
    programs = folder / "bin"
    pins = ROOT / "requirements.txt"
    run(programs / "python", "-m", "pip", "install", "--quiet", "-c", pins, f"{wheel}[{extra}]", cwd=folder)
    return programs


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # what was removed since would be packed
    for old in folder.glob("*.whl"):
        old.unlink()
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("robovlms_jax-*.whl")

    client = environment(folder / "client", wheel, "client")
    robots_side = (
        "import importlib.util\n"
        "import robovlms_jax.deploy.client, robovlms_jax.deploy.safety, robovlms_jax.control.robot\n"
        "assert importlib.util.find_spec('jax') is None and 'site-packages' in robovlms_jax.__file__"
    )
    run(client / "python", "-c", robots_side, cwd=folder)
    assert "evaluate" in run(client / "robovlms", "--help", cwd=folder)

    train = environment(folder / "train", wheel, "train")
    data_files = (
        "from robovlms_jax.data.registry import mixtures\n"
        "from robovlms_jax.envs.calvin import task_chains\n"
        "from robovlms_jax.load import load_policy\n"
        "from robovlms_jax.demo import twin\n"
        "from robovlms_jax.training import checkpoints\n"
        "assert len(task_chains.official_chains()) == 1000\n"
        "assert checkpoints.locate(twin.DIRECTORY), 'every file of the trained twin is there'"
    )
    run(train / "python", "-c", data_files, cwd=folder)
    assert "--train.steps" in run(train / "robovlms", "train", "--help", cwd=folder)
    assert "GiB" in run(train / "robovlms", "plan", "--preset", "kosmos_lstm", "--mesh.fsdp", "8", cwd=folder)
    assert "kosmos_lstm_lora" in run(train / "robovlms", "completion", "bash", cwd=folder)
    print(f"{wheel.name}: installs and runs in empty environments")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve())
