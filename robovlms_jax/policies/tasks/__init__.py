"""What a policy learns: one object for each loss, all computed from one forward pass."""
