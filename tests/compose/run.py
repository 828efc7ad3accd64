"""A run in containers, for tests: started by `make up LAUNCHER=compose`, watched by its folder as any other run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from deploy.compose.project import project_name
from deploy.container.names import CONTROLLER, container_of
from deploy.local.folder import holder
from shared.config import load_recipe
from tests.compose.engine import MAKE, ROOT, Engine, run
from tests.integration.run import Run


class ComposeRun(Run):
    """Containers are named as people name them: `rollout-1` is the replica, not Compose's number."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        super().__init__(folder)
        self._engine = engine
        self.project = project_name(folder)

    def up(self, recipe: Path, *sets: str, engine: str = "") -> ComposeRun:
        options = " ".join(f"--set {each}" for each in sets)
        arguments = f"--run-folder {self.folder} {options}"
        self.begin(*MAKE, "up", "LAUNCHER=compose", f"ENGINE={engine}", f"RECIPE={recipe}", f"ARGS={arguments}")
        return self

    def begin(self, *command: str) -> subprocess.Popen[bytes]:
        os.environ.update(self._engine.environment)  # of this process and what it starts
        return super().begin(*self._engine.inside, *command)

    def orrery(self, *arguments: str) -> str:
        """What `orrery ARGUMENTS` says, asked beside the run."""
        environment = {"PYTHONPATH": str(ROOT), **self._engine.environment}
        command = [*self._engine.inside, sys.executable, "-m", "deploy.cli", *arguments]
        return run(command, environment, timeout_s=150)

    def container(self, replica: str) -> str:
        """The container of a replica, or of the controller."""
        if replica == CONTROLLER:
            return f"{self.project}-{CONTROLLER}-1"
        service, number = container_of(load_recipe(self.folder / "config.toml"), replica)
        return f"{self.project}-{service}-{number}"

    def docker_kill(self, replica: str) -> None:
        """`docker kill`: SIGKILL to all of the container, which Docker itself does not start again."""
        self._engine.docker("kill", self.container(replica))

    def stranger(self, replica: str, recipe: Path, keys: Path | None) -> str:
        """A container beside the run's, on their network, which would be that rollout with these keys; its name."""
        described = json.loads((self.folder / "compose.json").read_text())["services"]["rollout"]
        command = [*described["command"][3:], "--replica", replica]  # what deploy.container.entry becomes
        command[command.index("--recipe") + 1] = str(recipe)  # which has no word about keys, as the run's own has
        seen = [self.folder, recipe, *(volume["source"] for volume in described["volumes"])]
        options = ["--network", f"{self.project}_default", "--user", "10001:10001", "--tmpfs", "/tmp:exec,mode=1777"]
        options += [part for path in seen for part in ("--volume", f"{path}:{path}")]
        if keys is not None:
            options += ["--volume", f"{keys}:/keys:ro", "--env", "ORRERY_KEYS=/keys"]
        name = f"stranger-{replica}"
        self._engine.docker("run", "--detach", "--name", name, *options, "orrery/policy", "python", *command)
        return name

    def refused(self, kind: str) -> int:
        """How many connections or messages the controller has refused by that name."""
        found = re.search(rf"^ +{kind} (\d+)$", self.orrery("status", str(self.folder)), re.MULTILINE)
        return int(found[1]) if found else 0

    def left(self) -> list[str]:
        """Replicas that left of themselves, in order."""
        return [fact["replica"] for fact in self.facts("gone") if fact["state"] == "left"]

    def kill_launcher(self) -> None:
        """SIGKILL to `orrery up` or `resume` alone."""
        launcher = holder(self.folder)
        assert launcher is not None, self.story()
        self.signal(launcher, signal.SIGKILL)
        self.wait_for(lambda: holder(self.folder) is None, "the launcher's end")

    def containers(self) -> dict[str, str]:
        """Docker's word on the state of each container, by name: "Up 3 seconds (healthy)"."""
        shown = self._engine.docker(
            "ps", "--all", "--filter", f"label=com.docker.compose.project={self.project}",
            "--format", "{{.Names}}={{.Status}}",
        )  # fmt: skip
        return dict(line.split("=", 1) for line in shown.splitlines())

    def healthy(self, *replicas: str) -> bool:
        """Whether Docker finds the containers of these healthy."""
        states = self.containers()
        return all("(healthy)" in states.get(self.container(replica), "") for replica in replicas)

    def inside(self, replica: str, *command: str) -> str:
        """What a command prints in the container of a replica."""
        return self._engine.docker("exec", self.container(replica), *command).strip()

    def incarnations(self) -> dict[str, int]:
        """The last incarnation of every replica."""
        return {fact["replica"]: fact["incarnation"] for fact in self.facts("joined")}

    def close(self) -> None:
        super().close()
        for container in self.containers():
            self._engine.docker("rm", "--force", container)

    def story(self) -> str:
        logs = []
        for name, state in self.containers().items():
            with contextlib.suppress(AssertionError):
                said = self._engine.docker("inspect", "--format", "{{json .State}}", name)
                logs.append(f"--- {name}: {state}\n{said}")
        return "\n".join([super().story(), *logs])
