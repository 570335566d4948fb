"""The 1000 chains."""

from __future__ import annotations

import json

import pytest

from robovlms_jax.envs.calvin import task_chains, tasks


def test_the_chains_are_the_published_ones():
    chains = task_chains.official_chains()
    assert len(chains) == 1000
    assert chains[0].condition == {
        **{"led": 1, "lightbulb": 1, "slider": "left", "drawer": "open"},
        **{"red_block": "slider_left", "blue_block": "table", "pink_block": "slider_right", "grasped": 0},
    }
    assert chains[0].tasks == (
        "rotate_blue_block_right",
        "move_slider_right",
        "lift_red_block_slider",
        "place_in_slider",
        "turn_off_lightbulb",
    )
    counts = {name: sum(name in chain.tasks for chain in chains) for name in tasks.TASKS}
    assert counts["place_in_slider"] == 398
    assert counts["open_drawer"] == 379
    assert counts["unstack_block"] == 81
    assert min(counts.values()) == 17


def test_the_chains_equal_upstreams_file(shared_data):
    upstream = json.loads((shared_data / "upstream" / "eval_sequences.json").read_text())
    assert [[dict(chain.condition), list(chain.tasks)] for chain in task_chains.official_chains()] == upstream


@pytest.mark.parametrize("condition_index", [0, 45, 191])
def test_stored_chains_are_what_the_rules_draw(condition_index):
    condition = task_chains.initial_conditions()[condition_index]
    stored = [list(chain.tasks) for chain in task_chains.official_chains() if chain.condition == condition]
    assert sorted(task_chains.draw_chains(condition_index, len(stored))) == sorted(stored)
    assert len(stored) == (6 if condition_index < 40 else 5)


@pytest.mark.slow
def test_generating_all_chains_gives_the_published_hash():
    assert task_chains.chains_hash(task_chains.generate_chains()) == task_chains.CHAINS_SHA256


@pytest.mark.parametrize(
    "edit",
    [
        lambda rows: rows[7].__setitem__(1, (rows[7][1] + 1) % 34),
        lambda rows: rows.insert(0, rows.pop()),
        lambda rows: rows.pop(),
        lambda rows: rows[0].__setitem__(1, 34),
        lambda rows: rows[0].__setitem__(1, "open_drawer"),
    ],
)
def test_an_edited_chains_file_is_refused(edit, tmp_path, monkeypatch):
    rows = json.loads(task_chains._CHAINS_FILE.read_text())
    edit(rows)
    edited = tmp_path / "chains.json"
    edited.write_text(json.dumps(rows))
    monkeypatch.setattr(task_chains, "_CHAINS_FILE", edited)
    with pytest.raises(ValueError, match=r"chains\.json (was edited|is missing or not a list of chains).*rewrite it"):
        task_chains.official_chains.__wrapped__()


def test_an_ambiguous_stacking_makes_a_chain_invalid():
    # after lifting red there are two blocks to stack on
    condition = dict.fromkeys(("red_block", "blue_block", "pink_block"), "table") | {
        **{"led": 0, "lightbulb": 0, "slider": "left", "drawer": "open", "grasped": 0}
    }
    assert not task_chains.is_valid_chain(condition, ["lift_red_block_table", "stack_block"])
    assert task_chains.is_valid_chain(
        condition | {"pink_block": "slider_left"}, ["lift_red_block_table", "stack_block"]
    )
    assert not task_chains.is_valid_chain(condition, ["turn_on_led", "turn_on_lightbulb"])  # one category
