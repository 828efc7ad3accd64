"""How much memory each process of a recipe takes, from the recipe and the shape of its model alone."""
