"""History x readout x head, and what a policy sees besides images and text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from robovlms_jax import schema
from robovlms_jax.actions import normalize, representations, statistics
from robovlms_jax.control import robot as robots
from robovlms_jax.policies import embodiments
from robovlms_jax.policies.auxiliary_config import AuxiliaryConfig
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.policies.heads import continuous, discrete, lstm
from robovlms_jax.policies.sensors.base import Sensor, SensorConfig
from robovlms_jax.policies.sensors.robot_state import ActionHistoryConfig, PastActions, ProprioConfig, RobotState
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("policy")
class PolicyConfig:
    """History x readout x head: what makes a VLM a robot policy."""

    history: Literal["one_step", "interleaved", "policy_head", "video"] = "policy_head"
    """one_step: the newest frame alone (window 1). interleaved: the language model reads frame after frame in one
    sequence. policy_head: every frame is encoded alone, the head remembers. video: all frames in one prompt."""
    readout: Literal["action_query", "pool", "token"] = "action_query"
    """action_query: learned tokens appended to the prompt; their hidden states are the head's features. pool: maxima
    over bins of the prompt's own hidden states. token: logits of vocabulary tokens that stand for actions."""
    head: heads.HeadConfig = lstm.LSTMHeadConfig()
    """Which head goes with which history and readout: `products()`."""
    num_queries: int = 1
    """Learned action tokens per frame; with readout pool, bins."""
    pool: Literal["all", "text", "vision"] = "all"
    """Readout pool: which tokens; text leaves out the first and the last one."""
    window: int = 8
    """W: observed steps looked back over, the current one included."""
    reencode_every: int = 1
    """History interleaved, control only: once the window slides, decode all of it again every this many steps. 1 is
    exact; 0 never does and costs one frame per step (what is approximate then: `policies/histories/interleaved.py`)."""
    chunk: int = 10
    """C: future actions predicted at every step, beginning with the current one."""
    robot: robots.RobotSpec = robots.CALVIN
    """What observations and actions are made of: dimensions by name, unit and kind, cameras, rate. The default stands
    for "as the dataset says": a run takes the dataset's, saves it, and compares it wherever the policy goes. Anything
    else must be what the dataset says. On the command line a JSON file (docs/guide.md, "Other robots")."""
    representation: representations.Name = "robot"
    """What is predicted, made of the robot's actions when data are read and turned back into them in control (see
    `actions.representations`): robot (as recorded), relative, absolute, absolute_6d, absolute_quaternion,
    absolute_axis_angle, velocity, tcp, tcp_upstream.
    Bounds and action_scaling are about it. Needs the arm's pose in the robot's state."""
    cameras: tuple[str, ...] = ("wrist", "static")
    """Cameras in the order their tokens follow the prompt's first token (released RoboVLMs checkpoints: wrist, then
    static)."""
    compat_count_padding: bool = False
    """Training only, as upstream's batches: positions count the padding of prompts (see `sequence.Order`)."""
    compat_queries_last: bool = False
    """Training only, as upstream's batches: action queries come before the last slot of the padded prompt, so after the
    end and the padding of every prompt but the longest."""
    proprio: ProprioConfig = ProprioConfig()
    action_history: ActionHistoryConfig = ActionHistoryConfig()
    sensors: tuple[SensorConfig, ...] = ()
    """Further sensors, as tokens between the prompt and the action queries, in this order."""
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    insulate: bool = False
    """Knowledge insulation (Driess et al. 2025, arXiv:2505.23705): losses on a robot's data leave the backbone's
    parameters alone, which answers to questions (auxiliary.vl_weight), captions or the scene (auxiliary.scene) then
    teach. Action queries, sensors and heads learn as before, and what is predicted is the same."""
    other_heads: Literal["own", "shared"] = "own"
    """Heads of other robots (data.others). own: one each. shared: one for all, whose outputs are the dimensions of all
    robots by name; each robot is taught by those it has."""
    others: tuple[embodiments.OtherRobotConfig, ...] = ()
    """The other robots; filled in when a run starts, and saved with its checkpoints."""
    shared: embodiments.SharedActions = embodiments.SharedActions()
    """What a shared head's outputs are; filled in when a run starts."""
    lora_rank: int = 0
    """> 0 adds low-rank adapters to every matrix of the head and of the sensors, robot state and past actions included,
    for what train.init_from brings; those of the backbone are backbone.lora_rank."""
    lora_alpha: float = 16.0
    """Scale of adapters, as lora_kind says."""
    lora_kind: Literal["lora", "rslora", "dora"] = "lora"
    """lora: adapters are scaled by lora_alpha / lora_rank. rslora: by lora_alpha / sqrt(lora_rank), for ranks of 64 and
    more. dora: as lora, and the length of each output channel is learned apart."""
    lora_dropout: float = 0.0
    """Share of the adapters' inputs that is dropped in training."""
    action_scaling: Literal["bounds", "quantile", "mean_std"] = "bounds"
    """Where action_low and action_high come from. bounds: as given below. quantile: the 1 % and 99 % quantiles of the
    training split's actions. mean_std: their mean, minus and plus action_num_std standard deviations. The latter two
    are filled in when a run starts, and saved with its checkpoints."""
    action_num_std: float = 3.0
    """Standard deviations that mean_std maps to 1 (heads reach no further)."""
    action_low: tuple[float, ...] = (-0.65,) * 6
    """Lower end of each action dimension that is no binary gripper, in dataset units; clipped, then mapped to -1."""
    action_high: tuple[float, ...] = (0.65,) * 6
    """Upper end of each of them; clipped, then mapped to +1."""
    action_mean: float = 0.0
    """With action_std: upstream's `regular_action`, (arm - action_mean) / action_std after the bounds."""
    action_std: float = 0.0
    """0: off. Below 1, some actions lie beyond the [-1, 1] that heads reach, as they do upstream."""
    action_mu: float = 0.0
    """> 0: mu-law at the end, finer where actions are small. Upstream's mu is 255."""

    def __post_init__(self):
        for field in ("num_queries", "window", "chunk"):
            require(getattr(self, field) >= 1, f"policy.{field}={getattr(self, field)} must be at least 1.")
        require(self.lora_rank >= 0, f"policy.lora_rank={self.lora_rank} must be 0 (off) or positive.")
        require(
            not self.lora_rank or 0 < self.lora_alpha < math.inf,
            f"policy.lora_alpha={self.lora_alpha} must be positive and finite; at 0 adapters would add nothing.",
        )
        require(0 <= self.lora_dropout < 1, f"policy.lora_dropout={self.lora_dropout} must lie in [0, 1).")
        require(
            self.lora_rank == 0 or not isinstance(self.head, discrete.DiscreteHeadConfig),
            f"policy.lora_rank={self.lora_rank}: a discrete head has no matrices; its logits are the language model's, "
            "so set backbone.lora_rank.",
        )
        require(
            self.other_heads == "own" or isinstance(self.head, continuous.ContinuousHeadConfig),
            f"policy.other_heads='shared' needs a head that regresses actions; {heads.kind_of(type(self.head))!r} does "
            "not. Use policy.other_heads='own'.",
        )
        require(
            not self.insulate or self.readout != "token",
            "policy.insulate keeps the actions' loss from the backbone; with policy.readout='token' the language model "
            "itself predicts them. Use another readout.",
        )
        require(self.reencode_every >= 0, f"policy.reencode_every={self.reencode_every} must be 0 (never) or positive.")
        self._require_product()
        require(
            self.readout != "token" or not self.auxiliary.reads_features,
            "policy.auxiliary.forward, .clip and .ahead learn from a head's hidden features; with policy.readout="
            "'token' there are none. Switch them off, or use another readout.",
        )
        require(
            not (self.compat_count_padding or self.compat_queries_last) or self.history in ("one_step", "policy_head"),
            f"policy.compat_count_padding and policy.compat_queries_last are of histories that decode every frame by "
            f"itself, one_step and policy_head; this one is {self.history!r}.",
        )
        given, known = self.robot != robots.CALVIN, self.robot.camera_names
        unknown = sorted(set(self.cameras) - set(known))
        require(
            not (given and known and unknown),
            f"policy.cameras has {unknown}, which robot {self.robot.name!r} has not; it has {list(known)}.",
        )
        require(
            len(self.cameras) > 0 and len(set(self.cameras)) == len(self.cameras),
            f"policy.cameras={self.cameras} must name each camera once and at least one.",
        )
        names = [sensor.name for sensor in self.sensors]
        require(len(set(names)) == len(names), f"policy.sensors has names that are not unique: {names}.")
        self._require_bounds()
        self._require_state()
        require(self.action_num_std > 0, f"policy.action_num_std={self.action_num_std} must be positive.")
        for field in ("action_std", "action_mu"):
            require(getattr(self, field) >= 0, f"policy.{field}={getattr(self, field)} must be 0 (off) or positive.")

    def _require_bounds(self) -> None:
        require(
            self.representation == "robot" or not self.action_history.length,
            f"policy.action_history looks back at the robot's own actions; with policy.representation="
            f"{self.representation!r} the policy does not speak them. Set one of them to its default.",
        )
        robot = self.predicted
        require(
            len(robot.action) > 0, f"policy.robot {robot.name!r} has no action dimension; nothing can be predicted."
        )
        count = len(robot.scaled)
        names = [robot.action[column].name for column in robot.scaled]
        require(
            self._waits_for_data
            or (
                len(self.action_low) == len(self.action_high) == count
                and all(low < high for low, high in zip(self.action_low, self.action_high))
            ),
            f"policy.action_low and policy.action_high need {count} numbers each, one per dimension {names} of robot "
            f"{robot.name!r}, low < high everywhere; got {self.action_low} and {self.action_high}. With "
            "policy.action_scaling=quantile they come from the training data.",
        )
        default = (self.action_low, self.action_high) == (PolicyConfig.action_low, PolicyConfig.action_high)
        require(
            self.representation not in ("absolute", "absolute_axis_angle", "velocity")
            or self._waits_for_data
            or not default,
            f"policy.representation={self.representation!r} is in metres and radians (per second), for which the "
            "default of policy.action_low and policy.action_high means nothing; give them, or set "
            "policy.action_scaling=quantile.",
        )

    def _require_state(self) -> None:
        names = [dimension.name for dimension in self.robot.state if dimension.kind != "binary"]
        require(
            not self.proprio.enabled or len(self.robot.state) > 0,
            f"policy.proprio.enabled asks for the robot's state, and {self.robot.name!r} describes none.",
        )
        require(
            not self.auxiliary.ahead.loss_weight or len(self.moving) > 0,
            f"policy.auxiliary.ahead predicts positions and joints of the robot's state; that of {self.robot.name!r} "
            "has none.",
        )
        require(
            not self.proprio.enabled or self.proprio.is_default or len(names) == len(self.proprio.center),
            f"policy.proprio.center and policy.proprio.scale need {len(names)} numbers each, one per number {names} of "
            f"the state of {self.robot.name!r}; got {self.proprio.center} and {self.proprio.scale}.",
        )

    @property
    def moving(self) -> tuple[int, ...]:
        """Numbers of the robot's state whose movements `auxiliary.ahead` predicts: places and joints."""
        kinds = ("position", "joint")
        return tuple(number for number, d in enumerate(self.robot.state) if d.quantity in kinds)

    def with_state(self, states: np.ndarray) -> PolicyConfig:
        """With the centre and scale of the state that the data say, float[N, P], where the configuration leaves them to
        the data: the default with another robot than CALVIN's."""
        if not (self.proprio.enabled and self.proprio.is_default) or self.robot == robots.CALVIN:
            return self
        chosen = [i for i, dimension in enumerate(self.robot.state) if dimension.kind != "binary"]
        values = np.asarray(states, np.float64)[:, chosen]
        std = values.std(axis=0)
        center, scale = values.mean(axis=0), np.where(std < 1e-6, 1.0, std)
        proprio = dataclasses.replace(self.proprio, center=tuple(center.tolist()), scale=tuple(scale.tolist()))
        return dataclasses.replace(self, proprio=proprio)

    @property
    def _waits_for_data(self) -> bool:
        """Whether the bounds are still to be taken from training data."""
        default = (PolicyConfig.action_low, PolicyConfig.action_high)
        return self.action_scaling != "bounds" and (self.action_low, self.action_high) == default

    @property
    def predicted(self) -> robots.RobotSpec:
        """The robot with the actions that heads predict. Raises ValueError where it has no such representation."""
        if self.representation == "robot":
            return self.robot
        return representations.make(self.representation, self.robot).robot

    @property
    def action_dim(self) -> int:
        """A: numbers of one action."""
        return len(self.predicted.action)

    @property
    def all_sensors(self) -> tuple[Sensor, ...]:
        """Everything that makes tokens beside images and text, in the order of their tokens."""
        state = (RobotState(self.proprio, self.robot.state),) if self.proprio.enabled else ()
        past = (PastActions(self.action_history, self.robot.action),) if self.action_history.length else ()
        return (*state, *past, *self.sensors)

    @property
    def normalizer(self) -> normalize.Normalizer:
        """Dataset units <-> what the head predicts. Raises ValueError where bounds still have to come from the data."""
        if self._waits_for_data:
            raise ValueError(
                f"policy.action_scaling={self.action_scaling!r} takes its bounds from training data; call "
                "policy.with_statistics (training does) before the policy is used."
            )
        std = self.action_std or None
        bounds = (self.action_low, self.action_high, self.predicted.binary)
        return normalize.Normalizer(*bounds, mean=self.action_mean, std=std, mu=self.action_mu)

    def with_bins(self, actions: np.ndarray) -> PolicyConfig:
        """With the bins that the head takes from training data, where it does: actions float[N, A], dataset units."""
        if not isinstance(self.head, discrete.DiscreteHeadConfig):
            return self
        return dataclasses.replace(
            self, head=self.head.with_actions(self.normalizer.normalize(actions), self.predicted.binary)
        )

    def with_statistics(self, action: Mapping[str, Any]) -> PolicyConfig:
        """With the bounds that `action_scaling` asks for; a dimension that never changes gets bounds one unit apart.

        Args:
          action: "q01", "q99", "mean", "std" -> float[A], of the training split in dataset units.
        Raises:
          ValueError: outliers decide the bounds (mean_std); see `statistics.require_bounds`.
        """
        scaled = list(self.predicted.scaled)
        if self.action_scaling == "bounds":
            return self
        if self.action_scaling == "quantile":
            low, high = (np.array(action[name], np.float64)[scaled] for name in ("q01", "q99"))
        else:
            mean, std = (np.array(action[name], np.float64)[scaled] for name in ("mean", "std"))
            low, high = mean - self.action_num_std * std, mean + self.action_num_std * std
            statistics.require_bounds(action, low, high, self.predicted)
        still = high - low < 1e-6
        low, high = np.where(still, low - 0.5, low), np.where(still, high + 0.5, high)
        return dataclasses.replace(self, action_low=tuple(low.tolist()), action_high=tuple(high.tolist()))

    @property
    def head_window(self) -> int:
        """Steps that the head predicts at and looks back over: one where the history leaves one."""
        return 1 if self.history == "video" else self.window

    @property
    def is_autoregressive(self) -> bool:
        """Whether action tokens are decoded one after the other."""
        return isinstance(self.head, discrete.DiscreteHeadConfig) and self.head.decoding == "autoregressive"

    def _require_product(self) -> None:
        kind, known = heads.kind_of(type(self.head)), heads.products()
        if (self.history, self.readout, kind) not in known:
            listed = "\n".join(f"  history={h} readout={r} head={k}" for h, r, k in known)
            raise ValueError(
                f"policy.history={self.history!r} with policy.readout={self.readout!r} and a {kind!r} head means "
                f"nothing. These do:\n{listed}"
            )
        require(
            self.history != "one_step" or self.window == 1,
            f"policy.history='one_step' sees one step, but policy.window={self.window}; set policy.window=1.",
        )
