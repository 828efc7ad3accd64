"""What is left of a run for a person: figures, hints, samples, curves, and the page that holds them all."""
