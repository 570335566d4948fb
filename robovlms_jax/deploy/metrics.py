"""Counters in Prometheus' text format, without its library."""

from __future__ import annotations

import threading

BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

_HELP = {
    "connections_total": ("counter", "Connections that were let in."),
    "connections_refused_total": ("counter", "Connections that were refused, by reason."),
    "requests_total": ("counter", "Observations that were answered with actions."),
    "errors_total": ("counter", "Observations that were answered with an error, by kind."),
    "clipped_actions_total": ("counter", "Answers in which actions were outside the robot's bounds."),
    "batched_steps_total": ("counter", "Steps in all calls of the policy."),
    "compilations_total": ("counter", "Programs that were compiled; more after the start: robots wait meanwhile."),
    "compilation_seconds_total": ("counter", "Seconds of those compilations."),
    "connections": ("gauge", "Connections now."),
    "ready": ("gauge", "1 while requests are served, 0 while the server stops."),
    "inference_seconds": ("histogram", "Seconds of a call of the policy."),
    "request_seconds": ("histogram", "Seconds from an observation's arrival to its answer."),
}


class Metrics:
    """Thread-safe; every name is one of `_HELP`."""

    def __init__(self):
        self._lock = threading.Lock()
        self._values: dict[tuple[str, str], float] = {}
        self._histograms = {
            name: [0] * (len(BUCKETS_S) + 1) for name, (kind, _) in _HELP.items() if kind == "histogram"
        }
        self._sums = dict.fromkeys(self._histograms, 0.0)

    def add(self, name: str, amount: float = 1, label: str = "") -> None:
        with self._lock:
            self._values[name, label] = self._values.get((name, label), 0) + amount

    def set(self, name: str, value: float) -> None:
        with self._lock:
            self._values[name, ""] = value

    def observe(self, name: str, seconds: float) -> None:
        with self._lock:
            self._histograms[name][sum(seconds > bound for bound in BUCKETS_S)] += 1
            self._sums[name] += seconds

    def get(self, name: str, label: str = "") -> float:
        with self._lock:
            return self._values.get((name, label), 0)

    def text(self) -> str:
        lines = []
        with self._lock:
            for name, (kind, description) in _HELP.items():
                full = f"robovlms_{name}"
                lines += [f"# HELP {full} {description}", f"# TYPE {full} {kind}"]
                if kind == "histogram":
                    total = 0
                    for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), self._histograms[name]):
                        total += count
                        lines.append(f'{full}_bucket{{le="{bound}"}} {total}')
                    lines += [f"{full}_sum {self._sums[name]:.9g}", f"{full}_count {total}"]
                    continue
                found = {label: value for (key, label), value in self._values.items() if key == name} or {"": 0}
                for label, value in sorted(found.items()):
                    suffix = f'{{kind="{label}"}}' if label else ""
                    lines.append(f"{full}{suffix} {value:.9g}")
        return "\n".join(lines) + "\n"
