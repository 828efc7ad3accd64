"""What may begin now. Each rule looks at the state, does at most one kind of thing, and says whether it did.

Rules are level-triggered: they don't ask which event came, only what the state allows, so that nothing hangs on having
seen a particular message at a particular time. `core` runs them after every event until none has anything to do.
"""
