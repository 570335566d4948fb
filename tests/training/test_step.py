"""One training step: accumulation, freezing, meshes, schedules."""

from __future__ import annotations

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel import rules
from robovlms_jax.policies import objective
from robovlms_jax.runs import build, drawing
from robovlms_jax.training import optimizer as optimizers
from robovlms_jax.training import state as states
from robovlms_jax.training import step, trainable
from robovlms_jax.training.config import OptimizerConfig
from tests.processes import run_python
from tests.toy import make_batch, make_model, make_product, random_params

STRUCTURES = {
    "policy_head": ("policy_head", "action_query", "lstm"),
    "one_step": ("one_step", "action_query", "mlp"),
    "one_step_discrete": ("one_step", "token", "discrete"),
    "interleaved": ("interleaved", "action_query", "mlp"),
    "interleaved_discrete": ("interleaved", "token", "discrete"),
    "video": ("video", "action_query", "mlp"),
}
"""Every structure of the paper."""


def make_steady(structure="policy_head", lora_rank=0):
    """A policy without dropout, whose masks depend on how a batch is split."""
    model = make_model() if structure == "policy_head" else make_product(*STRUCTURES[structure])
    text = dataclasses.replace(model.vlm.text, dropout=0.0, attention_dropout=0.0)
    return dataclasses.replace(model, vlm=dataclasses.replace(model.vlm, lora_rank=lora_rank, text=text))


def make_mesh(sizes):
    return meshes.make_mesh(sizes, jax.devices()[: int(np.prod(sizes))])


def make_data(model, batch=8):
    shape = {"window": model.config.window, "chunk": model.config.chunk}
    shape = {} if model.config.history == "policy_head" else shape | {"windows": 2}
    return make_batch(np.random.default_rng(0), batch=batch, mask_tail=min(3, model.config.chunk), **shape)


DRAWN = ("/embed/table", "text/layers/mlp/up/kernel")
"""Parameters (the ends of their paths) that stand for all: the mesh splits them by rows, columns and layers."""


def drawn(sizes, **changes):
    """Those parameters as a run on that mesh makes them, one of them by a program of its own (`runs.drawing`). The
    others are given, so that nothing else is compiled."""
    model = make_steady(**changes)
    flat = flatten_dict(random_params(model, make_data(model)), sep="/")
    given = {path: x for path, x in flat.items() if not path.endswith(DRAWN)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "SIZES", (2048,))
        made = flatten_dict(build.fill_params(model, make_mesh(sizes), 0, given), sep="/")
    return {path: np.asarray(x) for path, x in made.items() if path.endswith(DRAWN)}


def run_steps(sizes=(1, 1, 1), *, steps=2, accumulation=1, patterns=(".*",), batch=8, **changes):
    """Losses, final state and compiled program of a few steps on a fixed batch."""
    model, mesh = make_steady(**changes), make_mesh(sizes)
    data = make_data(model, batch)
    params = jax.device_put(random_params(model, data), build.abstract_params(model, mesh)[1])
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    tx = optimizers.make_optimizer(config, 10)
    state = states.create(params, patterns, tx, 0, mesh)
    rate, loss_fn = optimizers.learning_rate(config, 10), objective.RobotLoss(model)
    run = step.make_train_step(loss_fn, tx, rate, state, mesh, accumulation=accumulation)
    data = meshes.put_batch(data, mesh)
    losses, program = [], run.lower(state, data).compile()
    for _ in range(steps):
        state, metrics = program(state, data)
        losses.append({name: float(x) for name, x in metrics.items()})
    return losses, state, program


@pytest.mark.slow
def test_accumulated_step_equals_whole_step(exact_matmul):
    # Masks differ between micro-batches, so a mean of micro-batch means would fail here.
    whole, state, _ = run_steps(accumulation=1)
    parts, accumulated, _ = run_steps(accumulation=4)
    for a, b in zip(whole, parts):
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, err_msg=name)
    for path, x in state.trainable.items():
        np.testing.assert_allclose(accumulated.trainable[path], x, atol=2e-4, err_msg=path)


class Line:
    """What a step needs of a model, which knows nothing else of it: a backbone, a head, and a loss of both."""

    def count(self, batch):
        return jnp.float32(batch.size)

    def __call__(self, params, batch, key, count):
        batch = nn.with_logical_constraint(batch, ("batch", None))  # as layers have it
        loss = ((batch @ params["backbone"]["kernel"] @ params["head"]["kernel"]) ** 2).sum() / count
        return loss, {"loss": loss}


def run_line(sizes):
    """Parameters after a step of two micro-batches, and the compiled program."""
    mesh, rng = make_mesh(sizes), np.random.default_rng(0)
    params = {part: {"kernel": 0.1 * rng.normal(size=(64, 64)).astype(np.float32)} for part in ("backbone", "head")}
    data = meshes.put_batch(rng.normal(size=(8, 64)).astype(np.float32), mesh)
    config = OptimizerConfig(learning_rate=1e-2)
    tx = optimizers.make_optimizer(config, 10)
    state = states.create(jax.device_put(params, meshes.replicated(mesh)), (".*",), tx, 0, mesh)
    run = step.make_train_step(Line(), tx, optimizers.learning_rate(config, 10), state, mesh, accumulation=2)
    program = run.lower(state, data).compile()
    return program(state, data)[0].trainable, program


@pytest.fixture(scope="module", params=[False, True], ids=["halt", "skip"])
def after_a_bad_batch(request):
    """(skip, parameters at first, what three updates leave: the second one's batch is not finite).

    The backbone is frozen."""
    mesh, rng = make_mesh((1, 1, 1)), np.random.default_rng(0)
    begin = {part: {"kernel": rng.normal(size=(4, 4)).astype(np.float32)} for part in ("backbone", "head")}
    tx, good = optimizers.make_optimizer(OptimizerConfig(), 10), rng.normal(size=(2, 4)).astype(np.float32)
    state = states.create(
        jax.device_put(jax.tree.map(np.copy, begin), meshes.replicated(mesh)), ("^head/",), tx, 0, mesh
    )
    run = step.make_train_step(Line(), tx, lambda step: 10.0 * step, state, mesh, skip_nonfinite=request.param)
    seen = []
    for batch in (good, np.where(good > 0, np.nan, good), good):
        state, metrics = run(state, batch)
        seen.append(jax.device_get((state, metrics)))
    return request.param, begin, seen


def test_frozen_parameters_stay_and_have_no_optimizer_state(after_a_bad_batch):
    _, begin, seen = after_a_bad_batch
    after = seen[-1][0]
    assert set(after.frozen) == {"backbone/kernel"}
    np.testing.assert_array_equal(after.frozen["backbone/kernel"], begin["backbone"]["kernel"])
    assert (after.trainable["head/kernel"] != begin["head"]["kernel"]).any()
    moments = [x for x in jax.tree.leaves(after.opt_state) if x.ndim > 0]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in after.trainable.values())


def test_a_batch_that_is_not_finite_changes_nothing(after_a_bad_batch):
    # Fails if a NaN reaches parameters or moments, if the optimizer counts the batch, or if an aborted state goes on.
    skip, _, ((first, a), (second, b), (third, c)) = after_a_bad_batch
    assert [x["nonfinite"] for x in (a, b, c)] == [0, 1, 0] and np.isnan(b["loss"])
    jax.tree.map(np.testing.assert_array_equal, second.trainable, first.trainable)
    jax.tree.map(np.testing.assert_array_equal, second.opt_state, first.opt_state)
    changed = any((third.trainable[path] != x).any() for path, x in second.trainable.items())
    if skip:
        assert (int(second.step), int(second.skipped), int(third.step), changed) == (2, 1, 3, True)
        assert c["learning_rate"] == 10.0  # the schedule counts updates, as the optimizer does
    else:
        assert (int(second.step), bool(second.halted), int(third.step), changed) == (1, True, 1, False)


def test_pattern_without_a_match_is_an_error():
    with pytest.raises(ValueError, match=r"'\^heads/'.*near.*head"):
        trainable.split({"head/arm/kernel": 0, "backbone/text/embed": 1}, ["^heads/", "backbone"])


def test_clipping_is_on_only_when_asked():
    grads, params = {"x": np.full(4, 100.0, np.float32)}, {"x": np.zeros(4, np.float32)}
    norms = []
    for clip in (0.0, 1.0):
        tx = optimizers.make_optimizer(OptimizerConfig(clip_norm=clip), 10)
        _, opt_state = tx.update(grads, tx.init(params), params)
        norms.append(float(optax.tree.norm(optax.tree.get(opt_state, "mu"))))
    np.testing.assert_allclose(norms, [20.0, 0.1], rtol=1e-4)  # (1 - beta1) * norm


def test_every_parameter_names_axes_that_the_rules_know():
    # abstract_params raises on an unknown axis; ranks are compared here.
    shapes, shardings = build.abstract_params(make_model(), meshes.make_mesh((1, 1, 1), jax.devices()[:1]))
    shapes, shardings = flatten_dict(shapes), flatten_dict(shardings)
    assert shapes.keys() == shardings.keys()
    for path, x in shapes.items():
        assert len(shardings[path].spec) == x.ndim, path
    assert len({name for name, _ in rules.RULES}) == len(rules.RULES)


FAKE_DEVICES = r"""
import json, re, sys, jax, numpy as np
jax.config.update("jax_default_matmul_precision", "highest")
from tests.training.test_step import drawn, run_line, run_steps

def reduced(program):
    # Numbers that devices add up, within loops of the program and after them.
    text, sums = program.as_text(), {"loops": 0, "after": 0}
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    for name, body in re.findall(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*{\n(.*?)^}", text, re.M | re.S):
        shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(re.findall(r"= (.*?) all-reduce(?:-start)?\(", body)))
        sums["loops" if name in bodies else "after"] += sum(
            int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes)
    return sums

out = {}
cases, settings = json.loads(sys.argv[1])
changes = {key: settings[key] for key in ("structure", "lora_rank") if key in settings}
whole = drawn((1, 1, 1), **changes)
for sizes in cases:
    losses, state, program = run_steps(tuple(sizes), accumulation=sizes[0] if sizes[0] == 2 else 1, **settings)
    arrays = state.trainable | state.frozen
    out[str(sizes)] = {"losses": [x["loss"] for x in losses],
                       "sums": {p: float(np.abs(np.asarray(x)).sum()) for p, x in arrays.items()},
                       "drawn": [path for path, x in drawn(tuple(sizes), **changes).items()
                                 if len(whole) != 2 or not np.array_equal(x, whole[path])]
                                if sizes[1:] != [1, 1] else [],  # copies are those of one device
                       "split": sum(not x.is_fully_replicated for x in arrays.values()),
                       "parameters": sum(x.size for x in state.trainable.values()),
                       "reduced": reduced(program)}
lines = {}
for sizes in ((1, 1, 1), (2, 1, 1)):
    trained, program = run_line(sizes)
    lines[str(list(sizes))] = {"trained": {path: np.asarray(x).tolist() for path, x in trained.items()},
                               "parameters": sum(x.size for x in trained.values()), "reduced": reduced(program)}
print(json.dumps([out, lines]))
"""
MESHES = ([8, 1, 1], [2, 1, 1], [1, 8, 1], [2, 2, 2], [1, 2, 4])


def on_meshes(*cases, **settings):
    """Mesh -> what the same two steps are on it, of one device and of eight (fake) ones; and what a step of `Line` is
    on one and on two."""
    given = json.dumps([[[1, 1, 1], *cases], settings])
    return json.loads(run_python("-c", FAKE_DEVICES, given, JAX_NUM_CPU_DEVICES="8").splitlines()[-1])


@pytest.fixture(scope="module")
def split_in_all_ways():
    return on_meshes([2, 2, 2])


def assert_equal_on_meshes(out, *cases):
    """Parameters are made alike, and the same two steps give one device's losses and parameters, on eight (fake)
    devices."""
    out = dict(out[0])
    reference = out.pop(str([1, 1, 1]))
    assert reference["split"] == 0 and len(out) == len(cases)
    for sizes, result in out.items():
        assert result["drawn"] == [], f"{sizes} makes other parameters"
        np.testing.assert_allclose(result["losses"], reference["losses"], rtol=1e-4, err_msg=sizes)
        assert result["sums"].keys() == reference["sums"].keys()
        for path, value in reference["sums"].items():
            # A bias of all keys shifts all scores alike, which softmax does not see: its gradient is rounding, and Adam
            # makes steps of full size of that.
            if path.endswith("/k/bias"):
                continue
            np.testing.assert_allclose(result["sums"][path], value, rtol=2e-3, atol=1e-3, err_msg=f"{sizes} {path}")
        if json.loads(sizes)[1:] != [1, 1]:
            assert result["split"] > 10, f"{sizes} splits hardly any parameter"


def test_sharded_step_equals_one_device(split_in_all_ways):
    # One program for any mesh: losses and updated parameters of the same two steps, with two micro-batches each.
    assert_equal_on_meshes(split_in_all_ways, [2, 2, 2])


def assert_added_up_once(out):
    # Left to itself the compiler adds them up in every micro-batch: all parameters, within the loop.
    assert out["reduced"]["loops"] == 0
    assert out["parameters"] <= out["reduced"]["after"] < 1.01 * out["parameters"]


def test_copies_add_their_gradients_up_once_per_update(split_in_all_ways):
    # Of a model of two matrices: a step knows nothing else of it. Fails where whole copies do not add their gradients
    # up, or add them once too often.
    one, two = (split_in_all_ways[1][str(sizes)] for sizes in ([1, 1, 1], [2, 1, 1]))
    for path, x in one["trained"].items():
        np.testing.assert_allclose(two["trained"][path], x, atol=1e-5, err_msg=path)
    assert_added_up_once(two)


@pytest.mark.slow  # every day: one mesh that splits in all ways, and two copies of a smaller model
@pytest.mark.parametrize("sizes", [x for x in MESHES if x != [2, 2, 2]])
def test_sharded_step_equals_one_device_on_other_meshes(sizes):
    out = on_meshes(sizes)
    assert_equal_on_meshes(out, sizes)
    if sizes == [2, 1, 1]:
        assert_added_up_once(out[0][str(sizes)])


@pytest.mark.slow
@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name != "policy_head"])
def test_every_structure_is_the_same_on_any_mesh(structure):
    # Fails where a history's reshapes mix samples of different devices, or a masked mean is taken per device.
    assert_equal_on_meshes(on_meshes(*MESHES, structure=structure), *MESHES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"patterns": ["^head/", "^readout/"]},
        {"patterns": ["lora_", "^head/", "^readout/"], "lora_rank": 2},
    ],
    ids=["frozen", "lora"],
)
def test_partly_frozen_models_are_the_same_on_any_mesh(settings):
    # Fails if a frozen parameter changes or an adapter's gradient misses a device's samples.
    assert_equal_on_meshes(on_meshes(*MESHES, **settings), *MESHES)


BOTH_SPLITS = """
import jax, json, numpy as np
from robovlms_jax.runs import build, drawing
from robovlms_jax.training.config import OptimizerConfig
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies import objective
from robovlms_jax.training import memory, optimizer, state, step
from tests.toy import make_batch, make_model
model, batch, temporaries = make_model(), make_batch(np.random.default_rng(0), batch=8), []
for sizes in ((8, 1, 1), (1, 8, 1)):
    mesh, tx = meshes.make_mesh(sizes), optimizer.make_optimizer(OptimizerConfig(), 10)
    abstract = state.abstract(*build.abstract_params(model, mesh), (".*",), tx, mesh)
    split = meshes.batched(mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), batch)
    run = step.make_train_step(objective.RobotLoss(model), tx, lambda step: 0.1, abstract, mesh)
    temporaries.append(memory.of_program(run.lower(abstract, shapes).compile())["temporaries"])
print(json.dumps(temporaries))
"""


@pytest.mark.slow
def test_fsdp_splits_activations_as_data_does():
    # Without the constraint in nn/stack.py the compiler split the width instead of the batch: 3.8 times the memory.
    out = run_python("-c", BOTH_SPLITS, JAX_NUM_CPU_DEVICES="8", JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    data, fsdp = json.loads(out.splitlines()[-1])
    assert fsdp < 1.5 * data
