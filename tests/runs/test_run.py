"""What a run needs is asked for before it does anything that takes long."""

from __future__ import annotations

import sys

import pytest

from experiments import calvin_abcd
from robovlms_jax import cli
from robovlms_jax.runs import closed_loop, run


@pytest.mark.parametrize(("field", "value", "package"), [("wandb_project", "p", "wandb"), ("rrd", True, "rerun-sdk")])
def test_packages_that_are_missing_are_named_before_demonstrations_are_recorded(
    monkeypatch, tmp_path, field, value, package
):
    for name in ("wandb", "rerun"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(closed_loop, "ensure_demonstrations", lambda *_: pytest.fail("recorded already"))
    group = "train" if field == "wandb_project" else "rollouts"
    changes = {"train.output": str(tmp_path / "run"), "train.compilation_cache": "", f"{group}.{field}": value}
    config = cli.override(calvin_abcd.PRESETS["playtable_fixtures"], **changes)
    with pytest.raises(ImportError, match=package):
        run.train("playtable_fixtures", config)
