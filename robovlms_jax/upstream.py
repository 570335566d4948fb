"""RoboVLMs' own checkpoints: which tensor of a trained upstream policy becomes which parameter of ours."""

from __future__ import annotations

from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.policies.vla import VLA
from robovlms_jax.weights import rules


def policy_rules(model: VLA) -> rules.Rules:
    """Rules for a whole upstream policy (`action_space: continuous`, LSTMDecoder); wrapper prefixes are stripped
    before matching.

    Upstream repeats one action token for all queries, so only a policy with one query has a counterpart there.

    Raises:
      ValueError: a head, or a number of queries, that upstream's checkpoints do not hold.
    """
    head = model.config.head
    if not isinstance(head, LSTMHeadConfig) or model.config.num_queries != 1:
        raise ValueError(
            f"upstream checkpoints are read for an LSTM head with policy.num_queries=1; this policy has "
            f"{type(head).__name__} "
            f"with {model.config.num_queries}."
        )
    return (
        *rules.prefixed(model.vlm.rules, target="backbone/"),
        rules.Rule("action_token", "readout/queries", "(q d) -> q d"),
        *lstm_head("act_head", "head", head),
    )


def lstm_head(source: str, target: str, config: LSTMHeadConfig) -> rules.Rules:
    """torch.nn.LSTM plus two MLPs whose Linear layers are every second entry (ReLU between) -> LSTMHead."""
    rows: rules.Rules = ()
    for layer in range(config.num_layers):
        for ours, theirs in (("input", "ih"), ("hidden", "hh")):
            here = f"{target}/lstm_{layer}/{ours}"
            rows += (rules.Rule(f"{source}.rnn.weight_{theirs}_l{layer}", f"{here}_kernel", "(g h) d -> d g h"),)
            rows += (rules.Rule(f"{source}.rnn.bias_{theirs}_l{layer}", f"{here}_bias", "(g h) -> g h"),)
    for ours, theirs in (("arm", "actions"), ("gripper", "gripper")):
        for layer in range(len(config.trunk) + 1):
            rows += rules.linear(f"{source}.{theirs}.mlp.{2 * layer}", f"{target}/{ours}/layer_{layer}")
    return rows
