"""What is compiled ahead is what is called later; whatever goes wrong ahead only costs time."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import pytest

from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.runs import ahead


@pytest.fixture
def mesh():
    return meshes.make_mesh((1, 1, 1), jax.devices()[:1])


@pytest.fixture
def compiled():
    """Thread in which each program was compiled, of those made under the fixture."""
    threads = []

    def notice(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            threads.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(notice)
    yield threads
    jax.monitoring.unregister_event_duration_listener(notice)


def test_a_program_that_was_compiled_ahead_is_not_compiled_again(mesh, compiled):
    places = (meshes.replicated(mesh), meshes.batched(mesh))
    step = jax.jit(lambda state, batch: state + batch.sum(), in_shardings=places, donate_argnums=0)
    state, batch = (jax.device_put(jnp.ones(shape), place) for shape, place in zip(((), (4,)), places, strict=True))
    compiled.clear()
    with ahead.beside(mesh) as beside:
        shapes = [ahead.placed(x, place) for x, place in zip((state, batch), places, strict=True)]
        beside.start("a step", lambda: step.lower(*shapes).compile())()
        assert len(compiled) == 1 and compiled[0].startswith("ahead")
        assert int(step(state, batch)) == 5
    assert len(compiled) == 1


def test_an_error_ahead_is_met_where_the_program_is_needed(mesh):
    with ahead.beside(mesh) as beside:
        failed, done = [], []
        beside.start("what fails", lambda: failed.append(1 / 0))()
        beside.start("what follows", lambda: done.append(1))()
    assert done and not failed


def test_what_has_not_begun_when_a_run_ends_is_dropped(mesh):
    begun, go_on, made = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        go_on.wait()
        made.append("first")

    with ahead.beside(mesh) as beside:
        beside.start("first", first)
        wait = beside.start("second", lambda: made.append("second"))
        begun.wait()
        threading.Timer(0.05, go_on.set).start()
    wait()
    assert made == ["first"]


class _Compiler:
    """Begins to compile in a run that ends with an error meanwhile; has ended once it is let `go_on`."""

    def __init__(self) -> None:
        self.begun, self.go_on, self.made, self.wait = threading.Event(), threading.Event(), [], ahead.nothing

    def compile(self) -> None:
        self.begun.set()
        self.made.append(self.go_on.wait(10))

    def run(self, mesh, error: BaseException) -> None:
        with ahead.beside(mesh) as beside:
            self.wait = beside.start("a step", self.compile)
            beside.start("what follows", lambda: self.made.append("more"))
            self.begun.wait(10)
            raise error


def test_an_error_of_the_run_is_told_before_a_compiler_has_ended(mesh):
    compiler = _Compiler()
    with pytest.raises(ValueError, match="no such weights"):
        compiler.run(mesh, ValueError("no such weights"))
    assert not compiler.made
    compiler.go_on.set()
    compiler.wait()
    assert compiler.made == [True]


def test_that_a_stopped_run_waits_for_a_compiler_is_said(mesh, caplog):
    compiler = _Compiler()
    threading.Timer(0.1, compiler.go_on.set).start()
    with pytest.raises(KeyboardInterrupt):
        compiler.run(mesh, KeyboardInterrupt())
    assert compiler.made == [True] and "a compiler is still at work" in caplog.text
    caplog.clear()
    with ahead.beside(mesh) as beside:
        beside.start("a step", lambda: None)()
    assert not caplog.records


@pytest.mark.parametrize("changed", ["a GPU", "two processes"])
def test_nothing_is_compiled_ahead_where_it_may_disturb(monkeypatch, mesh, changed):
    if changed == "a GPU":
        monkeypatch.setattr(meshes, "platform", lambda mesh: "gpu")
    else:
        monkeypatch.setattr(jax, "process_count", lambda: 2)
    made = []
    with ahead.beside(mesh) as beside:
        beside.start("a step", lambda: made.append(1))()
    assert not made
