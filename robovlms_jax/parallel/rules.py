"""Axis name -> mesh axis: the one table that says how parameters and activations are split."""

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", None),
    ("head_dim", None),
    ("layers", None),
    ("norm", None),
    ("lora", None),
    ("queries", None),
    ("patch", None),
    ("position", None),
    # Policy heads are small; a split recurrence would communicate at every step.
    ("gates", None),
    ("hidden", None),
    ("recurrent", None),
)
