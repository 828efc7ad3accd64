"""What a completion is worth: pure reward parts and their weighted sum. Imports neither torch nor an engine."""
