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
