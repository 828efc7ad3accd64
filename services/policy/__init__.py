"""The policy service: learns from prompt groups, writes checkpoints, publishes weights."""
