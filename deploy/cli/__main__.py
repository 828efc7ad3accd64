"""`python -m deploy.cli`: the `orrery` command without installing it."""

from deploy.cli import main

main()
