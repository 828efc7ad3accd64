"""How services are started and steered: the `orrery` command and the launchers."""
