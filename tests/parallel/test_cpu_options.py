"""Compiler options that an XLA may or may not have."""

from robovlms_jax.parallel import cpu_options

NEVER_HEARD_OF = {"xla_cpu_no_such_option": True}


def test_what_xla_does_not_know_is_left_out():
    # jit itself refuses a program for the sake of one unknown option. Fails if one is passed on, or takes others along.
    assert cpu_options.known(NEVER_HEARD_OF, cpu_options.UNOPTIMIZED) == dict(cpu_options.UNOPTIMIZED)
    assert cpu_options.known(NEVER_HEARD_OF) is None


def test_a_kernel_library_by_another_name_is_no_error():
    # The name of the value may change, too. Fails if only names of options are tried.
    (name,) = cpu_options.PRODUCTS_ALONE
    assert cpu_options.known({name: "LIBRARY_FUSION_TYPE_NO_SUCH"}) is None


def test_only_cpus_have_them(monkeypatch):
    # GPUs' and TPUs' compilers must not be told about CPUs. Fails if the platform is not asked.
    monkeypatch.setattr(cpu_options.jax, "default_backend", lambda: "gpu")
    assert cpu_options.known(cpu_options.PRODUCTS_ALONE, cpu_options.UNOPTIMIZED) is None
