"""Time is shared out completely, and compilation is taken out of whatever it happens in."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import pytest

from robovlms_jax.training import goodput


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_every_second_belongs_to_one_phase():
    # Fails if nested phases count twice, or if time before and after the context counts.
    clock = Clock()
    spent = goodput.Goodput(clock)
    clock.now += 50
    with spent:
        clock.now += 6  # step
        with spent.spent_on("data"):
            clock.now += 1
        with spent.spent_on("evaluation"):
            clock.now += 1
            with spent.spent_on("checkpoint"):
                clock.now += 2
    clock.now += 50
    assert spent.seconds() == {"step": 6, "data": 1, "compile": 0, "checkpoint": 2, "evaluation": 1}
    assert spent.shares()["step"] == pytest.approx(0.6) and sum(spent.shares().values()) == pytest.approx(1)
    assert str(spent) == "step 60.0 %, data 10.0 %, compile 0.0 %, checkpoint 20.0 %, evaluation 10.0 %"


def test_compiling_is_no_step():
    # Tracing (2 s, 1 s of it a function inside) and compiling (4 s) during an evaluation of 10 s.
    clock = Clock()
    spent = goodput.Goodput(clock)
    with spent, spent.spent_on("evaluation"):
        clock.now += 1.5
        spent._heard("/jax/core/compile/jaxpr_trace_duration", 1.0)
        clock.now += 0.5
        spent._heard("/jax/core/compile/jaxpr_trace_duration", 2.0)
        clock.now += 4
        spent._heard("/jax/core/compile/backend_compile_duration", 4.0)
        spent._heard("/jax/something/else", 4.0)
        clock.now += 4
    assert spent.seconds() == {"step": 0, "data": 0, "compile": 6, "checkpoint": 0, "evaluation": 4}
    assert spent.compilations == 1


def test_jax_reports_what_it_compiles():
    # Fails if the events JAX sends have other names than the ones listened for.
    spent, x = goodput.Goodput(), jnp.arange(3.0)
    with spent:
        jax.jit(lambda x: x * 3 + 1)(x)
        once = spent.compilations
        assert once >= 1 and spent.seconds()["compile"] > 0
        y = jax.jit(lambda x: x * 5 + 2)
        y(x), y(x)
        twice = spent.compilations
        assert twice == once + 1
        other = threading.Thread(target=lambda: jax.jit(lambda x: x * 11 + 5).lower(x).compile())
        other.start()
        other.join()
        assert spent.compilations == twice  # another thread's holds up nobody
    jax.jit(lambda x: x * 7 + 3)(x)
    assert spent.compilations == twice  # deaf again
