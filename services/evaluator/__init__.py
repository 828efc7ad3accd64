"""The evaluator: answers held-out problems with weights that it is sent, and judges the answers."""
