"""RT-1's Google robot (fractal20220817_data): train a VLA, evaluate it on the held-out episodes, write a report.

python -m experiments.google_robot                      # the bundled Bridge episodes stand in; minutes on a laptop
python -m experiments.google_robot --preset kosmos_lstm --data.root DIR --backbone.weights DIR
python -m experiments.google_robot --preset kosmos_lstm --data.root DIR --init_from runs/oxe_kosmos_lstm
"""

from __future__ import annotations

import dataclasses

from experiments import bridge, launch

# As on Bridge but for the warm-up, by upstream's released configuration.
KOSMOS = dataclasses.replace(
    bridge.KOSMOS,
    data=dataclasses.replace(bridge.KOSMOS.data, dataset="rt_1"),
    optimizer=dataclasses.replace(bridge.KOSMOS.optimizer, warmup_epochs=0.0, warmup_steps=5_000),
    train=dataclasses.replace(bridge.KOSMOS.train, output="runs/google_kosmos_lstm"),
)

PRESETS = {
    "sample": bridge.sample("runs/google_sample"),
    "kosmos_lstm": KOSMOS,
    "kosmos_lstm_paper": bridge.paper(KOSMOS, "runs/google_kosmos_lstm_paper"),
    "kosmos_lstm_compat": dataclasses.replace(
        KOSMOS,
        data=dataclasses.replace(
            KOSMOS.data, windows_per_segment=1, compat_goal_relabelling=True, compat_second_norm=True
        ),
        train=dataclasses.replace(KOSMOS.train, output="runs/google_kosmos_lstm_compat"),
    ),
}

REAL_THING = """\
The sample preset shows Bridge episodes: no episode of the Google robot may be bundled. For the real thing:

    python -m experiments.google_robot --preset kosmos_lstm \\
        --data.root data/oxe --backbone.weights hf://microsoft/kosmos-2-patch14-224

How to get fractal20220817_data: data/README.md. `--help-all` explains every field."""

if __name__ == "__main__":
    launch.main(PRESETS, bridge.default_preset, description=__doc__, title="Google robot", closing=REAL_THING)
