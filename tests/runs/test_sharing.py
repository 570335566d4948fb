"""Policies on the hub: what is uploaded, what the card says, and that what comes down acts as what went up."""

from __future__ import annotations

import json
import pathlib
import shutil

import huggingface_hub
import numpy as np
import pytest
import yaml

from experiments import calibrate
from robovlms_jax import hub
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.control.interface import Observation
from robovlms_jax.load import load_config, load_policy
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads.mlp import MLPHeadConfig
from robovlms_jax.runs import build, model_card, sharing
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import to_dict
from robovlms_jax.training import checkpoints, seals
from tests.fake_hub import FakeHub
from tests.toy import make_batch, random_params

WORDS = model_card.Words("apache-2.0", data="Recorded in our kitchen.", limits="Never tried with gloves.")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with a small policy, a rollout's report of it and one of another checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    backbone = build.open_backbone(BackboneConfig(name="kosmos-2-twin"), ["open the drawer"])
    policy = PolicyConfig(window=1, history="one_step", chunk=2, head=MLPHeadConfig())
    experiment = ExperimentConfig(backbone=BackboneConfig(name="kosmos-2-twin"), policy=policy)
    model = build.make_model(experiment, backbone.vlm)
    params = random_params(model, make_batch(np.random.default_rng(0), window=1, windows=1, chunk=2))
    step = checkpoints.write_policy(folder, params, {"config": to_dict(experiment), "assets": dict(backbone.assets)})
    (step / "train").mkdir()
    (step / "train" / "moments").write_text("what only training needs")
    seals.seal(step)
    rate = {"successes": 28, "attempts": 40, "interval": [0.5457, 0.8193]}
    for label, chosen in ((seals.identity(step).label, rate), ("step_1-other", rate | {"successes": 39})):
        row = {
            "setup": {"env": "playtable-D", "execution": "receding 5", "checkpoint": label},
            "labels": {"scene": "D"},
            "summary": {"trials": 40, "in_a_row": [chosen], "per_task": {"open_drawer": chosen}},
        }
        (folder / "rollouts" / label).mkdir(parents=True)
        (folder / "rollouts" / label / "rollouts.json").write_text(json.dumps({"rows": [row]}))
    return folder


@pytest.fixture
def fake(tmp_path, monkeypatch):
    made = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def act(policy):
    policy.reset("open the drawer")
    images = {"static": np.full((40, 40, 3), 90, np.uint8), "wrist": np.full((20, 20, 3), 30, np.uint8)}
    return policy.act(Observation(images)).actions


def test_what_comes_down_acts_as_what_went_up_and_training_state_stays_at_home(run, fake, tmp_path):
    address = sharing.push(str(run), "me/kitchen", WORDS, api=fake)
    assert address == "https://huggingface.co/me/kitchen" and fake.private["me/kitchen"] is True
    there = fake.list_repo_files("me/kitchen")
    assert "README.md" in there and "checkpoints/0/seal.json" in there
    assert not any("/train/" in name or "rollouts" in name for name in there)
    before = act(load_policy(run))
    np.testing.assert_array_equal(act(load_policy("hf://me/kitchen")), before)
    pulled = sharing.pull("me/kitchen", str(tmp_path / "pulled"))
    assert load_config("hf://me/kitchen") == load_config(run)
    same = [seals.identity(checkpoints.locate(path)) for path in (run, pulled)]
    assert same[0] == same[1]  # results of the one are results of the other
    with pytest.raises(FileExistsError, match="not an empty folder; choose another"):
        sharing.pull("me/kitchen", str(tmp_path / "pulled"))


def test_a_pull_that_is_cut_off_leaves_nothing_that_looks_like_a_policy(run, fake, tmp_path, monkeypatch):
    sharing.push(str(run), "me/kitchen", WORDS, api=fake)

    def cut_off(*args, **options):
        fake.snapshot_download(*args, **options)
        assert not (tmp_path / "pulled").exists()  # whole or not at all
        raise OSError("the line went dead")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cut_off)
    with pytest.raises(FileNotFoundError, match="the line went dead"):
        sharing.pull("me/kitchen", str(tmp_path / "pulled"))
    assert not [path for path in tmp_path.iterdir() if "pulled" in path.name]


def test_a_second_push_replaces_the_checkpoint_in_one_commit(run, fake, tmp_path):
    sharing.push(str(run), "me/kitchen", WORDS, api=fake)
    later = shutil.copytree(run, tmp_path / "later")
    (later / "checkpoints" / "0").rename(later / "checkpoints" / "7")
    sharing.push(str(later), "me/kitchen", WORDS, api=fake)
    names = fake.list_repo_files("me/kitchen")
    assert any(name.startswith("checkpoints/7/") for name in names)
    assert not any(name.startswith("checkpoints/0/") for name in names)
    assert [message.split("-")[0] for message in fake.commits] == ["step_0", "step_7"]


def test_the_card_says_whose_robot_what_data_which_numbers_and_what_limits(run):
    _, text = sharing.prepare(str(run), "me/kitchen", WORDS)
    head, body = text.removeprefix("---\n").split("\n---", 1)
    facts = yaml.safe_load(head)
    assert facts["license"] == "apache-2.0" and facts["pipeline_tag"] == "robotics"
    assert "28 of 40" in body and "55 to 82 %" in body and "39 of 40" not in body  # of this checkpoint alone
    assert "sees one frame at a time (W = 1) and predicts 2 actions (C = 2)." in body
    assert "open_drawer" in body and 'load_policy("hf://me/kitchen")' in body
    assert "Recorded in our kitchen." in body and "Never tried with gloves." in body and "emergency stop" in body
    code = body.split("```python\n")[1].split("```")[0].replace("hf://me/kitchen", str(run))
    exec(code, names := {})  # the example of the card runs as it stands
    assert names["actions"].shape == (2, 7)
    for name in load_config(run).policy.robot.action_names:
        assert f"| {name} |" in body


def test_a_card_without_results_says_that_success_is_not_known(run, tmp_path):
    alone = shutil.copytree(run / "checkpoints", tmp_path / "alone" / "checkpoints")
    _, text = sharing.prepare(str(alone.parent), "me/kitchen", WORDS)
    assert "how often it succeeds is not known" in text
    found = {"count": 6068, "gripper_accuracy": 0.684, "gripper_majority": 0.62}
    (alone.parent / "report.json").write_text(json.dumps({"overall": found}))
    _, text = sharing.prepare(str(alone.parent), "me/kitchen", WORDS)
    assert "68.4 % right, where always answering the commoner state is 62.0 %." in text


def test_names_licences_and_damaged_checkpoints_are_refused_before_anything_is_uploaded(run, fake, tmp_path):
    for repository, words, message in (
        ("kitchen", WORDS, "is no OWNER/NAME"),
        ("me/kitchen", model_card.Words(""), "is no identifier of the hub such as apache-2.0"),
        ("me/kitchen", model_card.Words("nonsense"), "is no identifier of the hub"),
        ("me/kitchen", model_card.Words("Apache 2.0"), "did you mean apache-2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            sharing.push(str(run), repository, words, api=fake)
    broken = shutil.copytree(run, tmp_path / "broken")
    largest = max((broken / "checkpoints/0/params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 255
    largest.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its checksum"):
        sharing.push(str(broken), "me/kitchen", WORDS, api=fake)
    assert not fake.commits


def test_a_repository_that_is_not_there_is_named_with_what_to_do(fake):
    with pytest.raises(FileNotFoundError, match=r"cannot download hf://me/nothing: .*\nWithout network, copy it"):
        load_policy("hf://me/nothing")
    assert hub.parse("hf://a/b@main") == ("a/b", "main")
    with pytest.raises(ValueError, match="is no repository; expected hf://OWNER/NAME"):
        load_policy("hf://a/b/c")


def test_a_name_that_went_through_pathlib_is_the_same_name(run, fake):
    sharing.push(str(run), "me/kitchen", WORDS, api=fake)
    name = pathlib.Path("hf://me/kitchen")  # hf:/me/kitchen
    assert hub.is_name(name) and hub.parse(name) == ("me/kitchen", None)
    assert load_config(name) == load_config(run)
    assert not hub.is_name("hf:/me/kitchen") and not hub.is_name(pathlib.Path("hf:me"))
    with pytest.raises(FileNotFoundError, match="cannot download hf://me/nothing: "):
        load_config(pathlib.Path("hf://me/nothing"))


def test_a_calibration_is_not_written_into_the_hubs_cache(run, fake):
    sharing.push(str(run), "me/kitchen", WORDS, api=fake)
    with pytest.raises(ValueError, match=r"Fetch the policy first: python -m experiments.pull --name me/kitchen --out"):
        calibrate.calibrate(calibrate.CalibrateConfig("hf://me/kitchen"))


def test_an_upload_without_network_says_so_in_one_sentence(run, fake, monkeypatch):
    def refuse(*_, **__):
        raise huggingface_hub.errors.HTTPError("name resolution failed")

    monkeypatch.setattr(fake, "create_repo", refuse, raising=False)
    with pytest.raises(FileNotFoundError, match="cannot upload to me/kitchen: name resolution failed\nTry again with"):
        sharing.push(str(run), "me/kitchen", WORDS, api=fake)


def test_a_name_of_the_hub_without_its_prefix_is_answered_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="Then write hf://me/kitchen@v1"):
        load_policy("me/kitchen@v1")
    with pytest.raises(FileNotFoundError) as error:
        load_policy(tmp_path / "nothing")
    assert "hf://" not in str(error.value)
