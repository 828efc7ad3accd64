"""Measurements of parts of Orrery, each with a command, a JSON result and a table in `results/`."""
