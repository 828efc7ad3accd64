"""Whether a model in a layout of several ranks has the loss and the gradients that it has in one process."""
