"""The trained twin of the demonstration: an ordinary checkpoint, stored in 16 bits. README.md says how it was made.

load_policy(twin.DIRECTORY)
"""

from __future__ import annotations

import pathlib

DIRECTORY = pathlib.Path(__file__).resolve().parent
