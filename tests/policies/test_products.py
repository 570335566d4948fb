"""Every policy structure: history x readout x head. What means nothing is refused; the rest trains, learns and acts."""

from __future__ import annotations

import json

import pytest

from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads import base
from robovlms_jax.schema import from_dict, to_dict
from tests import toy

# Between them every history and readout, and every head but two that end as the LSTM does: those two have their steps,
# losses and gradients in test_heads.py. The others differ from these by one part that was met elsewhere.
ORDINARY = {
    ("one_step", "token", "discrete"),
    ("interleaved", "action_query", "flow"),
    ("policy_head", "pool", "lstm"),
    ("video", "action_query", "attention"),
}
SLOW_HEADS = {"gpt", "mlp"}
PRODUCTS = [
    pytest.param(*product, marks=() if product in ORDINARY else pytest.mark.slow, id="-".join(product))
    for product in base.products()
]


@pytest.mark.parametrize(("history", "readout", "head"), PRODUCTS)
def test_every_product_learns_one_batch_and_acts(history, readout, head):
    toy.assert_learns_and_acts(toy.make_product(history, readout, head), steps=40, learning_rate=1e-2, left=0.7)


def test_the_table_covers_the_papers_structures():
    known = set(base.products())
    assert {
        ("one_step", "action_query", "mlp"),
        ("one_step", "token", "discrete"),
        ("interleaved", "action_query", "mlp"),
        ("interleaved", "token", "discrete"),
        ("policy_head", "action_query", "lstm"),
        ("policy_head", "pool", "gpt"),
        ("video", "action_query", "mlp"),
    } <= known
    assert {ordinary[i] for ordinary in ORDINARY for i in range(3)} | SLOW_HEADS == {
        product[i] for product in known for i in range(3)
    }
    # Nothing remembers, nothing is remembered, words for a head that has none, no words for one that needs them.
    assert not known & {
        ("policy_head", "action_query", "mlp"),
        ("one_step", "action_query", "lstm"),
        ("video", "pool", "gpt"),
        ("interleaved", "token", "lstm"),
        ("one_step", "pool", "discrete"),
        ("policy_head", "token", "discrete"),
    }


def test_a_product_that_means_nothing_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match="means nothing") as error:
        PolicyConfig(readout="token")
    for product in base.products():
        assert "history={} readout={} head={}".format(*product) in str(error.value)
    with pytest.raises(ValueError, match="sees one step"):
        PolicyConfig(history="one_step", head=toy.HEADS["mlp"])
    with pytest.raises(ValueError, match=r"policy.pool='words' is not one of"):
        PolicyConfig(readout="pool", pool="words")
    with pytest.raises(ValueError, match="reencode_every=-1"):
        PolicyConfig(reencode_every=-1)


@pytest.mark.parametrize(("history", "readout", "head"), base.products())
def test_a_checkpoint_remembers_every_structure(history, readout, head):
    policy = toy.make_product(history, readout, head).config
    assert from_dict(PolicyConfig, json.loads(json.dumps(to_dict(policy)))) == policy
