"""Command-line programs: presets plus a main each."""
