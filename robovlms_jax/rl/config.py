"""Reinforcement learning on PlayTable."""

from __future__ import annotations

import dataclasses
from typing import Literal

from robovlms_jax import schema
from robovlms_jax.parallel.config import MeshConfig
from robovlms_jax.playtable.scene import random_tables
from robovlms_jax.schema import require
from robovlms_jax.training.config import OptimizerConfig

UNSEEN = 1_000_000
"""Number of the first random table that is kept for measuring."""


@dataclasses.dataclass(frozen=True)
@schema.checked("behaviour")
class BehaviourConfig:
    """How the policy tries things out while it learns. What it serves is without chance, as before."""

    spread: tuple[float, ...] = (0.1,)
    """Regression heads: standard deviation of each number at the beginning, in normalised action units; one for all, or
    one per dimension. It is learned. A policy's error on validation data is a good first value."""
    floor: float = 0.03
    """Smallest standard deviation."""
    correlation: float = 0.8
    """How much the noise of an action resembles that of the one before in its chunk; 0: white noise."""
    temperature: float = 1.0
    """Divides logits, of binary grippers and of discrete heads."""
    flow_noise: float = 0.5
    """Flow heads: size of the noise, a in sigma = a sqrt(r / (1 - r))."""

    def __post_init__(self):
        require(
            len(self.spread) > 0 and all(x > 0 for x in self.spread),
            f"behaviour.spread={self.spread} must be positive numbers.",
        )
        require(self.floor > 0, f"behaviour.floor={self.floor} must be positive.")
        require(
            min(self.spread) >= self.floor,
            f"behaviour.spread={self.spread} begins below behaviour.floor={self.floor}, the smallest there is; lower "
            "the floor, or raise the spread.",
        )
        require(0 <= self.correlation < 1, f"behaviour.correlation={self.correlation} must lie in [0, 1).")
        require(self.temperature > 0, f"behaviour.temperature={self.temperature} must be positive.")
        require(self.flow_noise > 0, f"behaviour.flow_noise={self.flow_noise} must be positive.")


@dataclasses.dataclass(frozen=True)
@schema.checked("update")
class UpdateConfig:
    """What an update makes of what was tried. Defaults as published for VLAs (RL4VLA, arXiv:2505.19789; RLinf-VLA,
    arXiv:2510.06710), but for the number of decisions."""

    method: Literal["ppo", "grpo", "awr", "dpo"] = "ppo"
    """ppo: advantages from a value function. grpo: compared with other trials from the same state, without one. awr: as
    ppo, but what turned out well is cloned, by weight (a cheap baseline; clips nothing). dpo: from answers to "which of
    two is better" alone, about rollouts of the policy that learning began with (a cheap baseline; nothing is tried out
    in between)."""
    discount: float = 0.99
    """Per decision."""
    trace: float = 0.95
    """Lambda of the advantage estimates (not grpo)."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    """Largest loss in units of |advantage| where that is negative; 0: without bound."""
    level: Literal["chunk", "action", "token"] = "action"
    """What has a ratio of its own: all that is executed of a chunk; each action; each number."""
    epochs: int = 1
    """How often each decision is learned from."""
    minibatches: int = 4
    """Parts of all decisions, an optimizer step each."""
    value_weight: float = 0.5
    value_clip: float = 0.2
    """How far a value may move from the old one and still count in full; 0: any."""
    value_delta: float = 10.0
    """Where the value's Huber loss becomes linear."""
    value_widths: tuple[int, ...] = (512, 128)
    """Hidden layers of the value function, on the hidden state of the first action query."""
    reward_scale: float = 0.1
    """A learned reward has a spread of 1 per decision; times this. Doing the task, where nothing is learned, is worth
    1."""
    entropy_weight: float = 0.0
    divergence_weight: float = 0.0
    """Weight of the divergence from the policy that learning began with. Large for learned rewards (0.01 to 0.1)."""
    hold_weight: float = 0.0
    """Weight of the divergence in tasks that are not trained (reinforce.others). Above 0 they are played beside those
    that are, and nothing is paid there: what the policy does in them stays as it was. 0: they are measured alone."""
    divergence_stop: float = 0.05
    """An iteration ends when the policy has moved so far from the one that tried things out; 0: never (not dpo)."""
    beta: float = 0.1
    """Method dpo: how dear it is to move away from the policy that learning began with."""
    label_noise: float = 0.1
    """Method dpo: share of answers that are taken for random, and that the simulated person gives at random."""

    def __post_init__(self):
        require(0 < self.discount <= 1, f"update.discount={self.discount} must lie in (0, 1].")
        require(0 <= self.trace <= 1, f"update.trace={self.trace} must lie in [0, 1].")
        for field in ("epochs", "minibatches"):
            require(getattr(self, field) >= 1, f"update.{field}={getattr(self, field)} must be at least 1.")
        for field in ("clip_low", "clip_high", "value_delta", "reward_scale", "beta"):
            require(getattr(self, field) > 0, f"update.{field}={getattr(self, field)} must be positive.")
        for field in (
            *("dual_clip", "value_weight", "value_clip", "entropy_weight", "divergence_weight", "hold_weight"),
            "divergence_stop",
        ):
            require(getattr(self, field) >= 0, f"update.{field}={getattr(self, field)} must not be negative.")
        require(0 <= self.label_noise < 1, f"update.label_noise={self.label_noise} must lie in [0, 1).")
        weights = ("entropy_weight", "divergence_weight", "hold_weight")
        weighed = [field for field in weights if getattr(self, field)]
        require(
            self.method != "dpo" or not weighed,
            f"update.method=dpo knows no {', '.join(f'update.{field}' for field in weighed)}; leave it at 0. "
            "update.beta holds the policy near the one that learning began with.",
        )
        require(self.clip_low < 1, f"update.clip_low={self.clip_low} must be below 1.")
        require(
            self.dual_clip == 0 or self.dual_clip > 1, f"update.dual_clip={self.dual_clip} must be 0 (off) or above 1."
        )
        require(
            all(width >= 1 for width in self.value_widths),
            f"update.value_widths={self.value_widths} must be at least 1 each.",
        )


@dataclasses.dataclass(frozen=True)
@schema.checked("reinforce")
class ReinforceConfig:
    """What to improve, on what, and how."""

    checkpoint: str = ""
    """The policy to begin with: a run directory, one of its checkpoints/<step> folders, or hf://OWNER/NAME."""
    out: str = "runs/reinforce"
    """Where the improved policy goes, as a checkpoint like any other, with the report and what a stopped run needs."""
    resume: bool = False
    """Go on with the run in `out`."""
    tasks: tuple[str, ...] = ()
    """Tasks to improve; empty: those of the checkpoint's own rollouts or demonstrations."""
    others: tuple[str, ...] = ()
    """Tasks that are not trained and measured all the same: whether they suffer. `update.hold_weight` keeps them as
    they are."""
    scenes: tuple[str, ...] = ()
    """Tables to learn on; empty: those that the checkpoint learned on."""
    random_scenes: int = 0
    """This many more, the first of those that demonstrations.random_scenes draws: what is learned on three tables may
    be of use there alone."""
    unseen_scene: str = ""
    """Table that is measured and not learned on; empty: that of the checkpoint's own rollouts."""
    unseen_random_scenes: int = 0
    """Random tables that nothing was learned on, which are measured as well, one after the other."""
    pool: int = 256
    """Starts that trials are drawn from."""
    start_spread: float = 0.25
    """Metres by which the hand is moved at a trial's beginning, at most (`demonstrations.start_spread`)."""
    max_steps: int = 0
    """Control steps of a trial; 0: as in the checkpoint's own rollouts or demonstrations."""
    horizon: int = 0
    """Actions executed of every predicted chunk; 0: as in the checkpoint's own rollouts."""
    image_size: tuple[int, ...] = ()
    """Pixels of static and wrist camera; empty: what the policy was trained with."""
    iterations: int = 50
    tables: int = 32
    """Side by side while learning and measuring."""
    decisions: int = 32
    """Of every table in one iteration."""
    devices: int = 1
    """That tables and updates are split over; of CPUs, cores. Another number draws other actions."""
    mesh: MeshConfig = MeshConfig()
    """How many of the devices share what. What fsdp and tensor split lies split between updates and in them, and whole
    on each device while tables play. The devices of a tensor group play the same tables; all others have their own."""
    group: int = 8
    """Methods grpo and dpo: trials from the same state."""
    labels: str = ""
    """Method dpo: folder of experiments.label, with a person's answers. Empty: `group` rollouts from each start of the
    pool are made, and a simulated person says which are better, in tasks that move a mechanism by its handle."""
    pairs: int = 2000
    """Method dpo without labels: pairs that the simulated person is asked about, at most."""
    held_out: float = 0.1
    """Method dpo: share of the pairs that teach nothing and are measured in every iteration, beside those that teach:
    what is learned by heart is not given there. Of a simulated person's whole starts are held out; a person's are
    single answers, whose rollouts may have taught in others. 0: all teach."""
    trainable: tuple[str, ...] = ("^head/", "^rl/")
    """As train.trainable, of the policy's parameters and of those under rl/: the behaviour's spread and the critic. The
    head alone is cheap: features are kept, and the backbone is not asked again. "lora_" trains adapters."""
    behaviour: BehaviourConfig = BehaviourConfig()
    update: UpdateConfig = UpdateConfig()
    reward: str = ""
    """A learned reward (experiments.reward) in place of the task checker's, which then only ends trials and measures;
    empty: the checker's. Weigh the divergence with it (--preset preferences)."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, rates={"^rl/value/": 10.0}, clip_norm=1.0)
    trials: int = 200
    """Of each measurement."""
    checkpoint_every: int = 10
    """Iterations between two points that a stopped run goes on from."""
    seed: int = 0

    def __post_init__(self):
        for field in ("pool", "iterations", "tables", "decisions", "devices", "group", "trials", "pairs"):
            require(getattr(self, field) >= 1, f"reinforce.{field}={getattr(self, field)} must be at least 1.")
        for field in ("max_steps", "horizon", "unseen_random_scenes", "start_spread", "seed"):
            require(getattr(self, field) >= 0, f"reinforce.{field}={getattr(self, field)} must not be negative.")
        require(
            0 <= self.random_scenes <= UNSEEN,
            f"reinforce.random_scenes={self.random_scenes} must lie in [0, {UNSEEN}]; later ones are for measuring.",
        )
        require(
            not self.update.hold_weight or len(self.others) > 0,
            f"update.hold_weight={self.update.hold_weight} holds the tasks in reinforce.others, which is empty; name "
            "some, or leave the weight at 0.",
        )
        require(
            len(self.image_size) in (0, 2) and all(size >= 1 for size in self.image_size),
            f"reinforce.image_size={self.image_size}: expected pixels of static and wrist camera, or nothing.",
        )
        require(self.checkpoint_every >= 1, f"reinforce.checkpoint_every={self.checkpoint_every} must be at least 1.")
        self._check_devices()
        require(
            self.update.method != "grpo" or self.group >= 2,
            f"reinforce.group={self.group}: update.method=grpo compares trials from the same state, at least 2.",
        )
        self._check_preferences()
        self._check_effects()
        require(
            not set(self.tasks) & set(self.others),
            f"reinforce.others names {sorted(set(self.tasks) & set(self.others))}, which reinforce.tasks trains.",
        )
        require(
            not self.unseen_scene or self.unseen_scene not in self.tables_to_learn_on,
            f"reinforce.unseen_scene={self.unseen_scene!r} is one of those to learn on ("
            f"reinforce.scenes={self.scenes}, random_scenes={self.random_scenes}); name another.",
        )
        kept = sorted({*random_tables(UNSEEN, self.unseen_random_scenes)} & {*self.scenes})
        require(
            not kept,
            f"reinforce.scenes names {kept}, which reinforce.unseen_random_scenes={self.unseen_random_scenes} measures "
            f"as unseen; learn on random tables below {UNSEEN}.",
        )

    def _check_effects(self) -> None:
        parts = {"reinforce": self, "update": self.update}
        for part, field, why in unread(self.update.method, self.labels, self.reward):
            given = getattr(parts[part], field)
            require(given == getattr(type(parts[part]), field), f"{part}.{field}={given} has no effect {why}")

    def _check_devices(self) -> None:
        try:
            shards = self.shards
        except ValueError as error:
            raise ValueError(
                f"reinforce.devices={self.devices}: {error} Or pass as many --devices as it makes."
            ) from None
        split = f"reinforce.devices={self.devices}"
        split += f" (by {shards}, mesh.tensor apart)" if shards != self.devices else ""
        require(
            self.update.method != "grpo" or self.tables % (self.group * shards) == 0,
            f"reinforce.tables={self.tables} is no multiple of reinforce.group={self.group} times {split}; each group "
            "plays whole, on one device.",
        )
        require(
            self.tables % shards == 0,
            f"reinforce.tables={self.tables} do not divide over {split}; change one of them.",
        )

    def _check_preferences(self) -> None:
        dpo = self.update.method == "dpo"
        require(
            dpo or not self.labels,
            f"reinforce.labels={self.labels!r} are for update.method=dpo (--preset dpo), not for "
            f"{self.update.method}; learn a reward from them for that (experiments.reward, then --reward).",
        )
        require(
            not dpo or not self.reward,
            f"reinforce.reward={self.reward!r} has no effect with update.method=dpo, which learns from answers "
            "themselves; leave it out, or choose --preset preferences.",
        )
        require(0 <= self.held_out < 1, f"reinforce.held_out={self.held_out} must lie in [0, 1).")
        require(
            not dpo or self.labels != "" or self.group >= 2,
            f"reinforce.group={self.group}: update.method=dpo compares rollouts from the same state, at least 2.",
        )
        most = min(self.pairs, (self.pool - self.held_out_of(self.pool)) * self.group * (self.group - 1) // 2)
        require(
            not dpo or self.labels != "" or most >= self.update.minibatches * self.shards,
            f"reinforce.pairs={self.pairs}, pool={self.pool} and group={self.group} give {most} pairs at most to learn "
            f"from ({self.held_out_of(self.pool)} starts are held out), which do not divide into update.minibatches="
            f"{self.update.minibatches} and over {self.shards} device(s).",
        )

    @property
    def shards(self) -> int:
        """Into how many parts tables, trials and pairs are split: devices of a tensor group have the same."""
        data, fsdp, _ = self.mesh.sizes(self.devices)
        return data * fsdp

    def held_out_of(self, count: int) -> int:
        """How many of so many starts, or answers, are held out: at least one where any are."""
        return max(round(self.held_out * count), 1) if self.held_out else 0

    @property
    def tables_to_learn_on(self) -> tuple[str, ...]:
        """All of them, by name."""
        return (*self.scenes, *random_tables(0, self.random_scenes))

    @property
    def played(self) -> tuple[str, ...]:
        """Tasks of the trials that are learned from: those that are trained, and those that are held."""
        return (*self.tasks, *(self.others if self.update.hold_weight else ()))


_READERS = {
    ("reinforce", "held_out", "pairs"): ("dpo",),
    ("reinforce", "group"): ("grpo", "dpo"),
    ("reinforce", "decisions"): ("ppo", "grpo", "awr"),
    ("update", "beta", "label_noise"): ("dpo",),
    ("update", "discount", "trace"): ("ppo", "awr"),
    ("update", "clip_low", "clip_high", "dual_clip"): ("ppo", "grpo"),
    ("update", "value_weight", "value_clip", "value_delta", "value_widths"): ("ppo", "awr"),
    ("update", "level", "divergence_stop", "reward_scale"): ("ppo", "grpo", "awr"),
}
"""(Part, fields of it) -> the methods that read them; with the others, a value of somebody's own changes nothing."""


def unread(method: str, labels: str, reward: str) -> list[tuple[str, str, str]]:
    """("reinforce" or "update", its field, why it has no effect and what to do) of fields that a run by this
    `update.method`, with these `reinforce.labels` and `reinforce.reward`, does not read."""
    out = [
        (
            part,
            field,
            f"with update.method={method}: it is read with {' or '.join(methods)}. Leave it out, or choose another "
            "preset or update.method.",
        )
        for (part, *fields), methods in _READERS.items()
        if method not in methods
        for field in fields
    ]
    if method == "dpo" and labels:
        why = (
            f"beside reinforce.labels={labels!r}: it is about the rollouts that a simulated person is asked about. "
            "Leave one of them out."
        )
        out += [("reinforce", "pairs", why), ("reinforce", "group", why)]
    if not reward:
        out.append(("update", "reward_scale", "without reinforce.reward, whose numbers it multiplies."))
    return out
