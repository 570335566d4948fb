"""Open X-Embodiment: pre-train a VLA on a mixture of robots; fine-tune it elsewhere with --init_from.

python -m experiments.oxe_pretrain                            # a mixture of the bundled episodes, minutes on a laptop
python -m experiments.oxe_pretrain --preset kosmos_lstm --data.root DIR --backbone.weights DIR
python -m experiments.bridge --preset kosmos_lstm --data.root DIR --init_from runs/oxe_kosmos_lstm
"""

from __future__ import annotations

import dataclasses

from experiments import bridge, launch
from robovlms_jax.data.config import DataConfig

KOSMOS = dataclasses.replace(
    bridge.KOSMOS,
    data=dataclasses.replace(
        # The cameras of 23 datasets differ; what the backbone sees is 224 pixels.
        bridge.KOSMOS.data,
        dataset="oxe_magic_soup",
        image_size=224,
    ),
    # A quarter epoch of the soup would be longer than the run.
    optimizer=dataclasses.replace(bridge.KOSMOS.optimizer, warmup_epochs=0.0, warmup_steps=5_000),
    train=dataclasses.replace(bridge.KOSMOS.train, output="runs/oxe_kosmos_lstm"),
)

PRESETS = {
    "sample": bridge.sample(
        "runs/oxe_sample", DataConfig(dataset=str(bridge.SAMPLE / "mixture.yaml"), root=str(bridge.SAMPLE))
    ),
    "kosmos_lstm": KOSMOS,
    "kosmos_lstm_paper": bridge.paper(KOSMOS, "runs/oxe_kosmos_lstm_paper"),
    "kosmos_lstm_plus": dataclasses.replace(
        KOSMOS,
        data=dataclasses.replace(KOSMOS.data, dataset="oxe_magic_soup_plus"),
        train=dataclasses.replace(KOSMOS.train, output="runs/oxe_kosmos_lstm_plus"),
    ),
}

REAL_THING = """\
For the real thing, get the datasets of the mixture, or list those you have in a mixture file (data/README.md):

    python -m experiments.oxe_pretrain --preset kosmos_lstm \\
        --data.root data/oxe --backbone.weights hf://microsoft/kosmos-2-patch14-224

`--help-all` explains every field."""

if __name__ == "__main__":
    launch.main(PRESETS, bridge.default_preset, description=__doc__, title="Open X-Embodiment", closing=REAL_THING)
