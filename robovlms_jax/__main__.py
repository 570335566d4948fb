"""`python -m robovlms_jax`: see `commands`."""

from robovlms_jax import commands

if __name__ == "__main__":
    commands.main()
