"""The programs of `experiments`, by the commands of the one entry point that start them."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

NAME = "robovlms"
PACKAGE = "experiments"


class Program(NamedTuple):
    """module: of `experiments`. settings: where, in it, its settings are: a class, presets by name, or a function that
    returns these; for shell completion. about: one line. extra: of setup.cfg, which brings all that it needs."""

    module: str
    settings: str
    about: str
    extra: str = "train"


COMMANDS: Mapping[str, Mapping[str, Program]] = {
    "demo": {"": Program("demo", "DemoConfig", "a robot that obeys in the browser", "serve")},
    "record": {
        "": Program(
            "record_playtable", "recording.RecordConfig", "demonstrations by experts in the embedded simulator"
        ),
        "calvin": Program(
            "record_calvin", "recording.RealRecordConfig", "the same experts in the real CALVIN simulator"
        ),
        "corrections": Program("correct", "correcting.CorrectionConfig", "experts take over where a policy has got to"),
        "teaching": Program("teach", "TeachConfig", "a person on a local page takes over from a policy", "serve"),
        "questions": Program("playtable_questions", "questions.Settings", "pictures of it with questions and answers"),
    },
    "inspect": {"": Program("inspect_data", "Args", "one page about a dataset, before training")},
    "convert": {
        "": Program("convert_data", "Args", "a dataset into another format"),
        "calvin": Program("pack_calvin", "Args", "CALVIN, packed for fast reading"),
        "weights": Program("convert_weights", "ConvertConfig", "a checkpoint that RoboVLMs released"),
    },
    "plan": {"": Program("plan", "presets", "memory per device, without the devices")},
    "train": {
        "": Program("calvin_abcd", "PRESETS", "a policy on CALVIN or the embedded simulator; record, train, report"),
        "bridge": Program("bridge", "PRESETS", "on BridgeData V2"),
        "google": Program("google_robot", "PRESETS", "on the Google robot's data"),
        "oxe": Program("oxe_pretrain", "PRESETS", "on a mixture of Open X-Embodiment"),
        "libero": Program("libero", "PRESETS", "on LIBERO's demonstrations, in RLDS, LeRobot or HDF5"),
        "lerobot": Program("lerobot", "PRESETS", "on a LeRobotDataset of any robot"),
        "navigation": Program("navigation", "PRESETS", "a mobile base that understands Korean"),
        "gym": Program("gym", "PRESETS", "a task of any Gymnasium environment; record, train, try"),
        "cotrain": Program("cotrain", "PRESETS", "with questions about pictures, in stages"),
        "reinforce": Program("reinforce", "PRESETS", "a policy improved by trying, PPO or GRPO"),
        "few_shot": Program("few_shot", "PRESETS", "new tasks from few demonstrations"),
        "continual": Program("continual", "PRESETS", "task after task, and what is forgotten"),
        "adapt": Program("adapt", "PRESETS", "to a new table, camera or arm"),
    },
    "label": {"": Program("label", "LabelConfig", "which of two clips is better, asked on a local page", "serve")},
    "reward": {"": Program("reward", "rewarding.RewardRunConfig", "a reward learned from such answers")},
    "search": {"": Program("search", "PRESETS", "settings tried and ranked")},
    "compare": {
        "": Program("compare", "CompareConfig", "checkpoints on the same trials, and what their numbers could hide"),
        "structures": Program("compare_structures", "CompareConfig", "every structure of a policy, one table"),
        "policies": Program("compare_policies", "PRESETS", "heads, chunks, windows, data: success, latency, memory"),
    },
    "evaluate": {
        "": Program("evaluate", "evaluation_settings.EvaluateConfig", "a checkpoint in a simulator, with intervals")
    },
    "calibrate": {"": Program("calibrate", "CalibrateConfig", "intervals around a checkpoint's actions")},
    "serve": {"": Program("serve", "ServeConfig", "a checkpoint to robots on other computers", "serve")},
    "push": {"": Program("push", "PushConfig", "a policy to the Hugging Face hub, with a card")},
    "pull": {"": Program("pull", "PullConfig", "a policy from there")},
    "trial": {"": Program("trial", "TrialConfig", "policies on a real robot, compared blind")},
    "bundle": {"": Program("bundle", "BundleConfig", "a checkpoint made small, to pass on")},
    "export": {
        "": Program("export", "ExportConfig", "a control step as StableHLO, ONNX or LiteRT"),
        "backbone": Program("export_backbone", "ExportBackboneConfig", "a policy's VLM for transformers, or PEFT"),
    },
}
"""Command -> the word after it ("" for none) -> program. Those whose module is not there are left out everywhere."""

COMPLETION = "completion"
SHELLS = ("bash", "zsh", "fish")


def present() -> dict[str, dict[str, Program]]:
    """COMMANDS with the programs that there are. Nothing is imported: without jax, `experiments` refuses to be."""
    package = importlib.util.find_spec(PACKAGE)
    folders = [] if package is None else package.submodule_search_locations or []
    modules = {path.stem for folder in folders for path in pathlib.Path(folder).glob("*.py")}
    found = {
        command: {word: program for word, program in words.items() if program.module in modules}
        for command, words in COMMANDS.items()
    }
    return {command: words for command, words in found.items() if words}
