"""Looking before a run: at a recipe with its data and model, at the schema, at this machine."""
