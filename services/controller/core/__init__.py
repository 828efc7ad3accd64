"""The pure core: `outcome = core.step(event)`. No sockets, no clock, no randomness, no files.

One state machine a file: fleet (a replica's life), ledger (a prompt group's life), steps (batches, votes, commits),
meshes, weights (who has which), evaluation, stages, hyper-parameters, lineages. `rules` says what may begin now,
`orders` derives from the state what each replica should be doing, `core` ties them together.
"""
