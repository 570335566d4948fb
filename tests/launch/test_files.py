"""The files of launch/ themselves: shell that parses, images and workloads that agree with the package."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess

import pytest
import yaml

from tests import environments

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("tests/launch/bin/*")])
IMAGES = sorted(ROOT.glob("launch/docker/*.Dockerfile"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_are_executable_and_stop_at_the_first_error(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)
    if "bin" not in path.parts:
        assert "\nset -euo pipefail\n" in path.read_text()


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_images_install_extras_that_exist_and_copy_what_is_there(path):
    text = path.read_text()
    (extras,) = re.findall(r'-e "\.\[([\w,-]+)\]"', text)
    assert set(extras.split(",")) <= environments.read().keys()
    (files,) = re.findall(r"^COPY (.*) \./$", text, flags=re.MULTILINE)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(files.split()) <= allowed
    assert all((ROOT / name).exists() for name in allowed)
    assert "WORKDIR /opt/robovlms_jax\n" in text  # where every launcher looks for launch/train.sh


def test_the_jobset_asks_for_all_hosts_of_its_slices():
    (job,) = yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    hosts = math.prod(map(int, topology.split("x"))) // container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == hosts
    # What is no mistake of the user's starts again.
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"] and 75 not in rule["onExitCodes"]["values"]
    mounts, volumes = ({x["name"] for x in where} for where in (container["volumeMounts"], pod["volumes"]))
    assert mounts == volumes


def test_gcloud_is_asked_for_as_many_slices_as_are_used():
    known = {**os.environ, "DRY": "1", "NAME": "n", "ZONE": "z", "TYPE": "v5litepod-64", "VERSION": "v", "SLICES": "2"}

    def says(*words: str) -> list[str]:
        done = subprocess.run(
            ["bash", "launch/tpu_vm.sh", *words], cwd=ROOT, env=known, capture_output=True, text=True, check=True
        )
        return sorted(done.stdout.splitlines())

    (create,) = says("create")
    assert create.endswith("--accelerator-type v5litepod-64 --runtime-version v --node-count 2 --node-prefix n")
    lines = says("train", "/mnt/run", "experiments.calvin_abcd", "--data.root", "a b")
    assert len(lines) == 2
    for slice_number, line in enumerate(lines):
        begin, _, command = line.partition(" --command ")
        assert begin == f"gcloud compute tpus tpu-vm ssh n-{slice_number} --zone z --worker all"
        unquoted = subprocess.run(["bash", "-c", f"printf %s {command}"], capture_output=True, text=True, check=True)
        assert unquoted.stdout.endswith(r"exec launch/detached.sh /mnt/run experiments.calvin_abcd --data.root a\ b")


def test_a_run_outlives_the_connection_it_was_started_over_and_the_same_words_follow_it(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    train = "#!/usr/bin/env bash\ntrap 'echo saved; exit 75' TERM\necho begun >&2\nwhile :; do sleep 0.05; done\n"
    (tmp_path / "launch/train.sh").write_text(train)
    words = ["bash", "launch/detached.sh", "/mnt/run", "experiments.calvin_abcd", "--data.root", "a b"]

    def follow(command: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout.readline() == "begun\n"
        return process

    first = follow(words)
    os.killpg(first.pid, signal.SIGKILL)  # the connection is lost; SIGHUP would be ignored under nohup
    first.wait()
    second = follow(words)
    other = subprocess.run([*words, "--train.steps", "5"], cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode == 69 and r"another run works here: /mnt/run experiments.calvin_abcd" in other.stderr
    for process in pathlib.Path("/proc").glob("[0-9]*"):  # as `launch/tpu_vm.sh stop` finds them
        with contextlib.suppress(OSError):
            called = b"launch/train.sh" in (process / "cmdline").read_bytes()
            if called and os.readlink(process / "cwd") == str(tmp_path):
                os.kill(int(process.name), signal.SIGTERM)
    assert second.stdout.read() == "saved\n" and second.wait() == 75


def test_who_calls_a_launcher_wrongly_is_shown_all_its_commands():
    done = subprocess.run(["bash", "launch/tpu_vm.sh", "crate"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 64
    commands = ("create", "state", "setup", "train", "stop", "delete")
    assert all(f"launch/tpu_vm.sh {command} " in f"{done.stderr} ".replace("\n", " \n") for command in commands)
