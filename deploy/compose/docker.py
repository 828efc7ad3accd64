"""The docker command: one call, its time limit, and its errors in words."""

from __future__ import annotations

import os
import subprocess

CALL_S = 120.0
"""Longest time for one call, which creates, starts or removes containers; images are built elsewhere."""


class DockerError(OSError):
    """Docker is not there, or refused; the text says what was expected, what came, what to do."""


def docker(*arguments: str, timeout_s: float = CALL_S) -> str:
    """What `docker ARGUMENTS` prints; DockerError if it fails."""
    command = " ".join(("docker", *arguments))
    # what a shell has set for Compose would go before what a run's own file says
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COMPOSE_", "ORRERY_"))}
    try:
        done = subprocess.run(
            ("docker", *arguments),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=environment,
            process_group=0,
        )
    except FileNotFoundError:
        raise DockerError(
            "expected the command 'docker', found none; install Docker with its Compose plugin, or use --launcher local"
        ) from None
    except subprocess.TimeoutExpired:
        raise DockerError(f"'{command}' did not end within {timeout_s:g} s: is the Docker daemon well?") from None
    if done.returncode:
        said = "\n".join(line for line in done.stderr.splitlines() if line.strip())[-1500:]
        raise DockerError(f"'{command}' failed: {said or f'exit code {done.returncode}'}")
    return done.stdout
