"""The live view of a run in a terminal: sources (what is known), sparklines, panels (how it looks), display (when)."""
