"""Heads under upstream's tensor names: the rules put every tensor where it belongs, for any number of tokens."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from flax.linen import unbox

from robovlms_jax.policies.heads import attention, base, gpt, lstm, mlp
from robovlms_jax.upstream import weights as rows
from robovlms_jax.weights import convert
from tests.weights.array_source import ArraySource

torch = pytest.importorskip("torch")

B, W, D, HIDDEN, C = 2, 3, 12, 8, 4


def stack(*sizes: int) -> torch.nn.Sequential:
    layers = [torch.nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    return torch.nn.Sequential(*[x for layer in layers for x in (layer, torch.nn.ReLU())][:-1])


class Upstream(torch.nn.Module):
    """Parameters named as upstream names them, and its arithmetic."""

    def __init__(self, kind: str, latent: int):
        super().__init__()
        self.kind, hidden = kind, HIDDEN * latent
        if kind == "mlp":
            self.mlp = stack(D * latent, D * latent // 2, hidden)
        elif kind == "lstm":
            self.rnn = torch.nn.LSTM(D * latent, hidden, 2, batch_first=True)
        else:
            from transformers import GPT2Config, GPT2Model

            self.gpt = GPT2Model(
                GPT2Config(vocab_size=1, n_positions=W, n_embd=hidden, n_layer=8, n_head=8, initializer_range=0.3)
            )
            self.fc = torch.nn.Linear(D, hidden)
        self.actions, self.gripper = torch.nn.Module(), torch.nn.Module()
        self.actions.mlp = stack(hidden, 1024, 512, 256, 6 * C)
        self.gripper.mlp = stack(hidden, 1024, 512, 256, C)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.flatten(2)
        if self.kind == "mlp":
            x = self.mlp(x)
        elif self.kind == "lstm":
            x, _ = self.rnn(x)
        else:
            x = self.gpt(inputs_embeds=self.fc(x)).last_hidden_state
        return torch.tanh(self.actions.mlp(x)).unflatten(-1, (C, 6)), self.gripper.mlp(x)

    def checkpoint(self) -> dict[str, np.ndarray]:
        state = {name: x.detach().numpy() for name, x in self.state_dict().items() if ".wte." not in name}
        if self.kind == "gpt":  # the buffers of upstream's GPT-2, which newer transformers do not store
            state |= {f"gpt.h.{layer}.attn.bias": np.ones((1, 1, 4, 4), bool) for layer in range(8)}
            state |= {f"gpt.h.{layer}.attn.masked_bias": np.array(-1e4) for layer in range(8)}
        return {f"model.act_head.{name}": x for name, x in state.items()}


CONFIGS = {
    "mlp": mlp.MLPHeadConfig(hidden_size=HIDDEN),
    "lstm": lstm.LSTMHeadConfig(hidden_size=HIDDEN, num_layers=2),
    "gpt": gpt.GPTHeadConfig(hidden_size=HIDDEN),
}


@pytest.mark.parametrize(("kind", "latent"), [("mlp", 1), ("mlp", 2), ("lstm", 2), ("gpt", 1)])
def test_a_head_gives_upstreams_numbers(kind, latent, exact_matmul):
    # Fails if a tensor is transposed wrongly, fused queries, keys and values are taken apart in another order, or the
    # tokens of a step are flattened otherwise.
    torch.manual_seed(0)
    theirs, config = Upstream(kind, latent).eval(), CONFIGS[kind]
    head = base.build(config, window=W, chunk=C, action_dim=7, binary=(6,), feature_dim=D, num_queries=latent)
    x, mask = np.random.default_rng(0).normal(size=(B, W, latent, D)).astype(np.float32), np.ones((B, W), bool)
    shapes = {"head": unbox(jax.eval_shape(head.init, jax.random.key(0), x, mask))["params"]}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = convert.load_params(
        rows.HEADS[type(config)]("act_head", "head", config),
        ArraySource(theirs.checkpoint()),
        shapes,
        jax.tree.map(lambda _: device, shapes),
    )
    found = jax.jit(head.apply)({"params": params["head"]}, x, mask)
    with torch.no_grad():
        arm, gripper = theirs(torch.from_numpy(x))
    np.testing.assert_allclose(found.arm, arm, atol=1e-5)
    np.testing.assert_allclose(found.gripper_logit[..., 0], gripper, atol=1e-5)


def test_one_stored_action_token_serves_all_queries():
    stored = {"model.action_token": np.arange(D, dtype=np.float32), "model.other": np.zeros(3, np.float32)}
    source = rows.UpstreamSource(ArraySource(stored), num_queries=3)
    assert source.shapes == {"model.action_token": (3 * D,), "model.other": (3,)}
    np.testing.assert_array_equal(
        source.read("model.action_token", (slice(D - 1, D + 2),)), np.float32([D - 1, 0, 1]), strict=True
    )


def test_a_head_that_upstream_lacks_is_refused():
    from tests.toy import make_model

    model = make_model(head=attention.AttentionHeadConfig(hidden_size=8))
    with pytest.raises(ValueError, match=r"upstream has no head like AttentionHeadConfig.*LSTMHeadConfig"):
        rows.policy_rules(model)


def test_second_names_of_the_same_numbers_appear_once(tmp_path):
    # Upstream's Flamingo registers its language model twice; two tensors that merely share a name are still two.
    shared = torch.ones(2, 2)
    state = {"model.model.a": shared, "model.backbone.a": shared}
    torch.save(state | {"model.model.b": shared.clone(), "model.backbone.b": -shared}, tmp_path / "a.pt")
    assert set(rows.open_checkpoint(tmp_path / "a.pt").shapes) == {"model.model.a", "model.model.b", "model.backbone.b"}
