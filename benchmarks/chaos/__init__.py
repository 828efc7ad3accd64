"""`make chaos`: faults against a real run, and what each of them cost."""
