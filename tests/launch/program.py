"""What a training experiment is to its launcher, and no more: flags, processes that join each other, a checkpoint, a
report at the end of the second part, signals.

    python -m tests.launch.program --train.output RUN [--train.resume] [--wait] [--count] [--status N]
"""

from __future__ import annotations

import pathlib
import signal
import sys
import time


def main(arguments: list[str]) -> int:
    run = pathlib.Path(arguments[arguments.index("--train.output") + 1])
    if "--status" in arguments:
        (run / "flags").write_text(" ".join(arguments))
        return int(arguments[arguments.index("--status") + 1])
    if "--train.resume" in arguments:
        (run / "report.md").write_text("finished\n")
        return 0
    if "--wait" in arguments:  # for a signal, after which the state would be saved
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        (run / "waiting").touch()
        time.sleep(60)
        return 1
    if "--count" in arguments:  # how often Ctrl-C comes
        came: list[int] = []
        signal.signal(signal.SIGINT, lambda number, _: came.append(number))
        (run / "waiting").touch()
        deadline = time.monotonic() + 60
        while not came and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        (run / "interrupts").write_text(str(len(came)))
        return 130
    import jax  # not before it is needed: it takes longer than everything else here

    from robovlms_jax.parallel import distributed

    with distributed.joined(start_timeout_s=120):
        index, sum_of_indices = jax.process_index(), int(distributed.of_all(jax.process_index()).sum())
        (run / f"joined_{index}").write_text(f"{index} of {jax.process_count()}, sum {sum_of_indices}\n")
        if index == 0:
            (run / "checkpoints" / "2").mkdir(parents=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
