"""What `experiments.compare_policies` compares: variants of a preset, and the comparisons that are there by name."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from robovlms_jax import schema
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("variant")
class Variant:
    """One row of the table."""

    name: str
    """In the table, and for `after`."""
    fixed: tuple[str, ...] = ()
    """Fields set otherwise, "policy.chunk=5"."""
    start: str = ""
    """The preset it begins with; empty: the comparison's."""
    after: str = ""
    """The variant whose policy it begins with, of the same seed, with the scales of actions and state that it has;
    empty: parameters at random, or published weights."""
    asked: bool = False
    """Nothing is trained: the policy of `after` is rolled out once more, with the fields of rollouts set here."""
    demonstrations: int = 0
    """Of each task, drawn by the seed; 0: all there are."""
    compared: bool = True
    """False: only there for others to begin with; it is not rolled out."""

    def __post_init__(self):
        require(bool(self.name), "variant.name is empty; every variant has a name of its own.")
        others = [text for text in self.fixed if not text.startswith("rollouts.")]
        require(
            not self.asked or (bool(self.after) and not others),
            f"variant {self.name!r} is asked and not trained, so it needs `after` ({self.after!r}), and sets nothing "
            f"but rollouts.*; it sets {others}.",
        )
        require(self.demonstrations >= 0, f"variant.demonstrations={self.demonstrations} must be 0 (all) or more.")


@dataclasses.dataclass(frozen=True)
@schema.checked("compare")
class ComparePoliciesConfig:
    """What is compared."""

    variants: tuple[Variant, ...]
    """In the order in which they are trained."""
    experiment: str = "calvin_abcd"
    """Module of `experiments` whose preset is begun with."""
    start: str = "playtable_fixtures"
    """Its preset: model, data and rollouts."""
    fixed: tuple[str, ...] = ()
    """Fields of it set otherwise in every variant, "train.steps=2300"."""
    more: tuple[str, ...] = ()
    """Further ones, which count more than `fixed` and a variant's own."""
    unseen: bool = False
    """Ask as many trials again in wordings that training never uses."""
    seeds: int = 3
    """Of parameters, order of batches and draws of demonstrations."""
    out: str = "searches/compare"
    """Directory of trials and report."""
    report: bool = False
    """Only write the report of what is there."""

    def __post_init__(self):
        require(self.seeds >= 1, f"compare.seeds={self.seeds} must be at least 1.")
        names = [variant.name for variant in self.variants]
        asked = {variant.name for variant in self.variants if variant.asked}
        require(bool(names), "compare.variants is empty; name at least one.")
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"compare.variants has {twice} more than once.")
        for place, variant in enumerate(self.variants):
            require(
                not variant.after or variant.after in names[:place],
                f"compare.variants: {variant.name!r} begins with {variant.after!r}, which is none of those before it: "
                f"{names[:place]}.",
            )
            require(variant.after not in asked, f"compare.variants: {variant.after!r} trains nothing to begin with.")
        require(any(variant.compared for variant in self.variants), "compare.variants has none that is compared.")


def _head(kind: str, **fields: Any) -> str:
    return "policy.head=" + json.dumps({"kind": kind, **fields}, separators=(",", ":"))


def _words(bins: int, *further: str, **fields: Any) -> tuple[str, ...]:
    head = _head("discrete", num_bins=bins, **fields)
    return ("policy.history=one_step", "policy.readout=token", head, *further)


WORDS_RATE = "optimizer.learning_rate=2e-3"
"""Of policies whose actions are words: at the 4e-4 of the heads that regress they learn how frequent each word is, and
nothing from pictures, for thousands of steps."""
BUDGET = (
    *("train.steps=600", "train.batch_size=32", "policy.chunk=5"),
    *("rollouts.trials=40", "rollouts.max_steps=80", "rollouts.films=0", "evaluation.episodes=0"),
    *("data.root=data/playtable_800", "demonstrations.episodes=800", "demonstrations.random_scenes=797"),
)
"""An eighth of the default's steps, of half its windows, half its chunk, and half its demonstrations: a minute for a
run on one core."""
_MLP = _head("mlp", hidden_size=128, trunk=[256, 128])
_HEADS = (
    Variant("mlp", ("policy.history=one_step", _MLP)),
    *(
        Variant(f"lstm, {n} layers", (_head("lstm", hidden_size=128, num_layers=n, trunk=[256, 128]),))
        for n in (2, 3, 4)
    ),
    *(
        Variant(kind, (_head(kind, hidden_size=128, num_layers=2, num_heads=4, trunk=[256, 128], dropout=0.0),))
        for kind in ("gpt", "attention")
    ),
    Variant("flow", (_head("flow", hidden_size=64, num_layers=2, num_heads=4, num_steps=5),)),
    Variant("discrete", _words(64, WORDS_RATE, decoding="parallel")),
)


def _chunk(length: int) -> Variant:
    return Variant(str(length), (f"policy.chunk={length}", f"rollouts.execution.horizon={min(length, 5)}"))


NEW = "open_drawer turn_on_led"
OLD = "close_drawer move_slider_left move_slider_right turn_on_lightbulb turn_off_lightbulb turn_off_led"
_BASE = Variant("six tasks", (f"data.exclude_tasks={NEW}",), compared=False)
"""A policy that `training` and `recipes` go on with: it has not seen the two tasks that they teach."""
_FINE_TUNED = (*BUDGET, f"rollouts.tasks={NEW}")


def _taught(name: str, *fixed: str) -> Variant:
    """Fifty demonstrations of each new task, in half of the base's steps."""
    return Variant(name, (f"data.exclude_tasks={OLD}", "train.steps=300", *fixed), after=_BASE.name, demonstrations=50)


_HEAD = ("^head/", "^readout/")
_UNFROZEN = json.dumps(
    [
        {"steps": 100, "trainable": _HEAD},
        {"steps": 100, "trainable": (*_HEAD, "^backbone/text/")},
        {"steps": 100},
    ],
    separators=(",", ":"),
)
"""The head, then the language model, then everything."""


def _adapters(name: str, *fixed: str, kind: str = "lora") -> Variant:
    size = ("backbone.lora_rank=32", "backbone.lora_alpha=32", f"backbone.lora_kind={kind}")
    parts = f"train.trainable=lora_ {' '.join(_HEAD)}"
    return _taught(name, *size, parts, "optimizer.learning_rate=1e-3", *fixed)


_LAST_LAYER = (f"train.trainable={' '.join(_HEAD)} ^backbone/text/layers/", "optimizer.last_layers=^backbone/text/ 1")
_STRONG = ("data.augment.crop_area=0.9", "data.augment.brightness=0.2", "data.augment.contrast=0.4")
_STRONG += ("data.augment.saturation=0.4", "data.augment.hue=0.2")
_COLOURS = ("data.augment.brightness=0.15", "data.augment.contrast=0.2")
_COLOURS += ("data.augment.saturation=0.3", "data.augment.hue=0.03")
_UNCHANGED = ("data.static_shift=0", "data.wrist_shift=0")


def _augmented(name: str, *fixed: str) -> Variant:
    """Ten demonstrations of each task, which a policy could learn by heart."""
    return Variant(name, (*_UNCHANGED, *fixed), demonstrations=10)


def _beside(name: str, heads: str) -> Variant:
    """As many windows of another arm's demonstrations beside those that the policy without it has in every batch."""
    others = ("data.others.roots=arm data/rlds", "data.others.datasets=arm data/other_arms/same_axes.yaml")
    shares = ("train.sources=robot 1 arm 1", "train.batch_size=32")
    return Variant(name, (*others, *shares, f"policy.other_heads={heads}"), demonstrations=4)


_ROBOTS = (
    Variant("alone", demonstrations=4),
    _beside("own heads", "own"),
    _beside("shared head", "shared"),
)
_ON_D = (
    *("data.root=data/playtable_d", "demonstrations.episodes=200", "demonstrations.scenes=D"),
    *("demonstrations.random_scenes=0", "demonstrations.seed=1000", f"data.exclude_tasks={OLD}"),
)
_FEW = (*BUDGET, *_ON_D, "train.steps=400", "train.batch_size=16", f"rollouts.tasks={NEW}", "rollouts.trials=80")
"""An arm that is at home on table D, of which there are few demonstrations: two tasks."""
_EXECUTION = (
    Variant("5 of 5", ("rollouts.execution.horizon=5",), demonstrations=4),
    Variant("1 of 5", ("rollouts.execution.horizon=1",), after="5 of 5", asked=True),
)
_PARTS = (
    _BASE,
    _taught("all parameters"),
    _taught("head and action queries", f"train.trainable={' '.join(_HEAD)}", "optimizer.learning_rate=1e-3"),
    _taught("language model's last layer, head", *_LAST_LAYER),
    _taught("each layer at half the rate of the one above", "optimizer.layer_decay=0.5"),
    _taught("head first, then the language model, then all", f"train.stages={_UNFROZEN}"),
    _adapters("LoRA"),
    _adapters("rsLoRA", kind="rslora"),
    _adapters("DoRA", kind="dora"),
    _adapters("LoRA+", "optimizer.rates=lora_b$ 16"),
    _adapters("LoRA beside eight bits", "backbone.storage=int8"),
)
_RECIPES = (
    _BASE,
    _taught("AdamW, cosine"),
    _taught("constant rate", "optimizer.schedule=constant"),
    _taught("rate a tenth after half", "optimizer.schedule=step", "optimizer.step_every=150"),
    _taught("inverse square root", "optimizer.schedule=rsqrt", "optimizer.rsqrt_steps=100"),
    _taught("warm-up, stable, decay", "optimizer.schedule=warmup_stable_decay"),
    _taught("Adafactor", "optimizer.name=adafactor"),
    _taught("Lion, a fifth of the rate", "optimizer.name=lion", "optimizer.learning_rate=8e-5"),
    _taught("Muon", "optimizer.name=muon"),
    _taught("average of parameters", "optimizer.ema=0.98"),
    _taught("colours and crops", *_STRONG),
)

_BESIDE = ("train.sources=robot 4 questions 1", "train.batch_size=40")
"""Eight questions beside the 32 windows of demonstrations that the policy without them has in every batch, too."""


def _stages(*steps: int) -> tuple[str, ...]:
    return tuple(f"train.stages.{place}.steps={number}" for place, number in enumerate(steps))


PRESETS = {
    "heads": ComparePoliciesConfig(_HEADS, fixed=(*BUDGET, "rollouts.trials=80"), out="searches/heads"),
    "chunks": ComparePoliciesConfig(tuple(map(_chunk, (1, 5, 10, 20))), fixed=BUDGET, out="searches/chunks"),
    "windows": ComparePoliciesConfig(
        tuple(Variant(str(length), (f"policy.window={length}",)) for length in (1, 4, 8)),
        fixed=(*BUDGET, "data.windows_per_segment=4"),  # windows that share frames: a fraction of the time
        out="searches/windows",
    ),
    "structures": ComparePoliciesConfig(
        (
            Variant("one step, mlp", ("policy.history=one_step", _MLP)),
            Variant("interleaved, mlp", ("policy.history=interleaved", "policy.window=4", _MLP)),
            Variant("policy head, lstm", ("policy.window=4",)),
        ),
        fixed=(*BUDGET, "data.windows_per_segment=4"),
        out="searches/structures",
    ),
    "data": ComparePoliciesConfig(
        (Variant("0.1x", demonstrations=9), Variant("1x", demonstrations=88), Variant("5x", demonstrations=440)),
        fixed=(
            *BUDGET,
            *("data.root=data/playtable_4000", "demonstrations.episodes=4000", "demonstrations.random_scenes=3997"),
        ),
        out="searches/data",
    ),
    "pretraining": ComparePoliciesConfig(
        (
            Variant("questions", ("train.stages.0.steps=600",), start="vl", compared=False),
            Variant("none"),
            Variant("questions first", after="questions"),
        ),
        experiment="cotrain",
        start="robot",
        fixed=BUDGET,
        out="searches/pretraining",
    ),
    "cotraining": ComparePoliciesConfig(
        (
            Variant("questions", ("train.batch_size=64",), start="vl", compared=False),
            Variant("demonstrations alone", after="questions"),
            Variant("together", _BESIDE, after="questions", start="together"),
            Variant("insulated", _BESIDE, after="questions", start="insulated"),
        ),
        experiment="cotrain",
        start="robot",
        fixed=(*BUDGET, "rollouts.trials=80", "evaluation.batches=0"),  # all questions, whatever the batch
        unseen=True,
        out="searches/cotraining",
    ),
    "stages": ComparePoliciesConfig(
        (
            Variant("questions, robot, robots together", _stages(300, 600, 600), start="three_stages"),
            Variant("questions, robots together, robot", _stages(300, 600, 600), start="paper_order"),
        ),
        experiment="cotrain",
        start="robot",
        fixed=BUDGET,
        out="searches/stages",
    ),
    "words": ComparePoliciesConfig(
        (Variant("as recorded"), Variant("varied", ("data.vary_language=true",))),
        fixed=(*BUDGET, "rollouts.trials=80"),
        unseen=True,
        out="searches/words",
    ),
    "augmentations": ComparePoliciesConfig(
        (
            _augmented("none"),
            _augmented("shifts", "data.static_shift=4", "data.wrist_shift=3"),
            _augmented("crops", "data.augment.crop_area=0.85"),
            _augmented("colours", *_COLOURS),
            _augmented("random erasing", "data.augment.erase_area=0.2"),
        ),
        fixed=(*BUDGET, "rollouts.trials=80"),
        out="searches/augmentations",
    ),
    "embodiment": ComparePoliciesConfig(
        (
            Variant("before"),
            Variant("after", after="before", start="among"),
            Variant("longer on the robot alone", after="before"),
        ),
        experiment="cotrain",
        start="robot",
        fixed=BUDGET,
        out="searches/embodiment",
    ),
    "robots": ComparePoliciesConfig(_ROBOTS, fixed=_FEW, out="searches/robots"),
    "execution": ComparePoliciesConfig(_EXECUTION, fixed=_FEW, out="searches/execution"),
    "discrete": ComparePoliciesConfig(
        (
            *(Variant(f"{bins} bins", _words(bins)) for bins in (256, 64, 32)),
            Variant("64 bins, ids of no word", _words(64, vocab_end=512)),
            Variant("64 bins, in parallel", _words(64, decoding="parallel")),
            Variant("64 bins, rate 2e-3", _words(64, WORDS_RATE)),
            *(
                Variant(f"{bins} bins, in parallel, rate 2e-3", _words(bins, WORDS_RATE, decoding="parallel"))
                for bins in (256, 64, 32)
            ),
        ),
        fixed=BUDGET,
        out="searches/discrete",
    ),
    "training": ComparePoliciesConfig(_PARTS, fixed=_FINE_TUNED, out="searches/training"),
    "recipes": ComparePoliciesConfig(_RECIPES, fixed=_FINE_TUNED, out="searches/recipes"),
}
