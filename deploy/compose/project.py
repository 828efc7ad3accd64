"""A run as a project of Compose: what its launch plan, its folder and its keys add to deploy/compose/compose.yaml.

In the run folder: `compose.env` (the variables of compose.yaml, and which files make up the project) and `compose.json`
(commands, variables and numbers from the launch plan; what the recipe reads from this machine's disk). With them,
`docker compose --env-file RUN/compose.env ...` works by hand. Invariants: inside a container the run folder and what
the recipe reads have the paths that they have outside, so that one recipe and one log are true on both sides; Compose
alone creates containers, the supervisor alone starts them; no container is given the keys of another role.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from deploy.compose.container import ContainerProcess
from deploy.compose.docker import docker
from deploy.container.names import CONTROLLER, Container, container_of
from deploy.keys import make_keys
from deploy.local.folder import KEYS, RunFolderError, keep_keys
from deploy.local.plan import ReplicaPlan, RunPlan, free_port
from deploy.local.supervisor import Start
from deploy.plan import LaunchPlan, Place, Process, launch_plan
from shared.bus import keys_place
from shared.config import Recipe, RecipeError

HERE = Path(__file__).resolve().parent
ENVIRONMENT, ADDITIONS = "compose.env", "compose.json"
ORDINARY_USER = 10001
"""Whoever a run of root's is inside its containers; the images' own user."""
CACHE = "orrery-huggingface"
"""The volume of models from the hub, which all runs share."""
INTERFACE = "eth0"
"""Of a container's one network: what process groups use there, whatever the recipe uses on its own machine."""
IMAGES = {
    "controller": "controller", "transformers": "policy", "vllm": "rollout-vllm", "sglang": "rollout-sglang",
}  # fmt: skip
"""The image of each environment of the launch plan."""


def check_images(recipe: Recipe) -> None:
    """DockerError without Docker and Compose, RecipeError unless every image that the recipe needs is there."""
    docker("compose", "version")
    needed = {IMAGES[process.environment] for process in launch_plan(recipe).processes}
    there = set(docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split())
    missing = sorted(name for name in map(_image, needed) if name not in there)
    if missing:
        targets = " ".join(sorted(name.rpartition("/")[2].partition(":")[0] for name in missing))
        raise RecipeError(
            f"expected the images {', '.join(missing)}, found none; 'make images IMAGES=\"{targets}\"' builds them"
        )


@contextlib.contextmanager
def containers(recipe: Recipe, folder: Path) -> Iterator[tuple[RunPlan, Start]]:
    """The containers of a run, created when this begins and removed when it ends, whatever happens in between.

    Where a launcher was killed, its containers go on: the next one finds them here, and attaches to them.
    """
    project = Project(recipe, folder)
    project.prepare()
    try:
        project.create({container_of(recipe, process.name) for process in project.plan.replicas})
        yield project.run_plan(), project.start
    finally:
        project.down()


class Project:
    """See the module. `folder` is absolute."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.plan: LaunchPlan = launch_plan(recipe)
        self.name = project_name(folder)
        self._recipe = recipe
        self._folder = folder
        self._pids = folder / "pids"
        self._keys = _key_folder(recipe, folder)
        self._port = 0

    # --- what Compose reads ------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Write the files and the keys, and hand the run folder to whoever runs the containers."""
        make_keys(self._keys)
        self._port = self._chosen_port()
        try:
            for made in (self._pids, self._folder / "logs"):
                made.mkdir(exist_ok=True)
            shown = json.dumps(additions(self.plan, self._folder, self._keys, self._port, Path.cwd()), indent=1)
            (self._folder / ADDITIONS).write_text(shown + "\n", encoding="utf-8")
            lines = (f"{name}='{value}'\n" for name, value in self._variables().items())
            (self._folder / ENVIRONMENT).write_text("".join(lines), encoding="utf-8")
            if keys_place(self._recipe.bus.keys) is None:  # for whoever asks the controller from this machine
                keep_keys(self._recipe, self._folder, self._keys)
            if os.geteuid() == 0:
                _give(self._folder, but=self._keys)
        except OSError as error:
            raise RunFolderError(self._folder, error) from error

    def _variables(self) -> dict[str, str]:
        root = os.geteuid() == 0
        files = [HERE / "compose.yaml", *([HERE / "gpu.yaml"] if any(p.gpus for p in self.plan.processes) else [])]
        profiles = {"evaluator"} | {e for e in self._recipe.rollout.engines if e != "transformers"}
        timeouts = self._recipe.timeouts
        given = {name: os.environ[name] for name in ("ORRERY_IMAGES", "ORRERY_TAG", "ORRERY_SHM") if name in os.environ}
        return given | {
            "COMPOSE_PROJECT_NAME": self.name,
            "COMPOSE_FILE": os.pathsep.join(map(str, [*files, self._folder / ADDITIONS])),
            "COMPOSE_PROFILES": ",".join(sorted(profiles)),
            "ORRERY_RUN": str(self._folder),
            "ORRERY_USER": f"{ORDINARY_USER}:{ORDINARY_USER}" if root else f"{os.getuid()}:{os.getgid()}",
            "ORRERY_KEY_FOLDER": str(_for_ordinary_user(self._keys) if root else self._keys),
            "ORRERY_PORT": str(self._port),
            "ORRERY_RESTART": "no",
            "ORRERY_GRACE": f"{round(timeouts.exit_s) + 1}s",
            "ORRERY_LOST_AFTER": str(max(1, round(self._recipe.bus.lost_after_s))),
        }

    def _chosen_port(self) -> int:
        """That of the containers which a killed launcher left, that of the recipe, or one that is free now."""
        with contextlib.suppress(FileNotFoundError, AttributeError):
            text = (self._folder / ENVIRONMENT).read_text(encoding="utf-8")
            if self._created():
                return int(re.search(r"ORRERY_PORT='(\d+)'", text)[1])  # type: ignore[index]
        port = self._recipe.bus.bind.rpartition(":")[2]
        return int(port) if port.isdigit() else free_port("127.0.0.1")

    # --- containers --------------------------------------------------------------------------------------------------

    def create(self, wanted: set[Container]) -> None:
        """Have these containers, and the controller's; those that are there already stay as they are."""
        there = self._created()
        missing = wanted - there
        if not missing and Container(CONTROLLER, 1) in there:
            return
        numbers: Counter[str] = Counter()
        for service, number in there | wanted:  # a smaller number than there are would remove some
            numbers[service] = max(numbers[service], number)
        docker("volume", "create", CACHE)  # stays as it is if it is there
        scales = [part for service, count in sorted(numbers.items()) for part in ("--scale", f"{service}={count}")]
        self._compose("create", "--no-recreate", "--no-build", "--pull", "never", *scales)

    def start(self, plan: ReplicaPlan, output: Path) -> ContainerProcess:
        """Start a container, which is created first where a run has been scaled up."""
        if plan.role != CONTROLLER:
            self.create({container_of(self._recipe, plan.replica)})
        return ContainerProcess(plan, output, self._pids)

    def down(self) -> None:
        """Remove the containers and their network; volumes stay."""
        self._compose("down", "--timeout", "0")

    def run_plan(self) -> RunPlan:
        """The containers as the supervisor's processes."""

        def process(name: str) -> ReplicaPlan:
            service, number = Container(CONTROLLER, 1) if name == CONTROLLER else container_of(self._recipe, name)
            role = service.partition("-")[0]
            return ReplicaPlan(name, role, ("docker", "start", "--attach", f"{self.name}-{service}-{number}"))

        return RunPlan(f"tcp://127.0.0.1:{self._port}", process(CONTROLLER), process)

    def _created(self) -> set[Container]:
        told = docker(
            "ps", "--all", "--filter", f"label=com.docker.compose.project={self.name}",
            "--format", '{{.Label "com.docker.compose.service"}} {{.Label "com.docker.compose.container-number"}}',
        )  # fmt: skip
        return {Container(service, int(number)) for service, number in map(str.split, told.splitlines())}

    def _compose(self, *arguments: str) -> str:
        return docker("compose", "--env-file", str(self._folder / ENVIRONMENT), *arguments)


def project_name(folder: Path) -> str:
    """The project of a run folder: its name, and enough of its path to tell two of that name apart."""
    told = re.sub(r"[^a-z0-9_-]", "-", folder.name.lower())
    return f"orrery-{told}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}"


def additions(plan: LaunchPlan, folder: Path, keys: Path, port: int, here: Path) -> dict[str, object]:
    """What a run adds to compose.yaml: the launch plan's commands and variables by service, and what the recipe reads.

    `here` is where the recipe's relative paths begin. Keys that lie in the run folder are covered: every container has
    that folder, and sees the keys of its own role elsewhere.
    """
    bind, reached = f"tcp://0.0.0.0:{port}", f"tcp://{CONTROLLER}:{port}"
    place = Place(str(folder / "config.toml"), str(folder), bind, reached)
    recipe = plan.recipe
    volumes = [
        {"type": "bind", "source": str(path), "target": str(path), "read_only": True} for path in reads(recipe, here)
    ]

    covered = [str(keys)] if keys.is_relative_to(folder) else []

    def service(process: Process, command: list[str]) -> dict[str, object]:
        return {
            "command": ["python", *command],
            "environment": dict(process.variables),
            "working_dir": str(here),
            "volumes": volumes,
            "tmpfs": covered,
        }

    services = {CONTROLLER: service(plan.controller, list(plan.controller.arguments(place)))}
    planned = Counter(container_of(recipe, process.name).service for process in plan.replicas)
    for role in sorted({process.role for process in plan.replicas}):
        for number in range(len(recipe.rollout.engines)):  # engines that only a scaled run comes to are in it too
            process = plan.replica(f"{role}-{number}")
            name = container_of(recipe, process.name).service
            arguments = [*process.arguments(place)[:-2], "--set", f"weights.interface={INTERFACE}"]  # less --replica
            services[name] = service(process, ["-m", "deploy.container.entry", *arguments]) | {"scale": planned[name]}
    for engine in {"transformers", *recipe.rollout.engines}:  # the profiles that are on, or are none
        for role in ("rollout", "evaluator"):
            services.setdefault(role if engine == "transformers" else f"{role}-{engine}", {"scale": 0})
    return {"services": services}


def reads(recipe: Recipe, here: Path) -> list[Path]:
    """The files and folders of this machine that the recipe names: models, data, modules of rewards."""
    named = [recipe.model.path, *(table.path for table in recipe.data.values())]
    named += [getattr(part, "path", None) for part in recipe.rewards.parts]
    paths = sorted({(here / Path(each).expanduser()).resolve() for each in named if each is not None})
    return [path for path in paths if path.exists()]


def _image(name: str) -> str:
    return f"{os.environ.get('ORRERY_IMAGES', 'orrery')}/{name}:{os.environ.get('ORRERY_TAG', 'latest')}"


def _key_folder(recipe: Recipe, folder: Path) -> Path:
    place = keys_place(recipe.bus.keys) or folder / KEYS
    if place.is_file():
        raise RecipeError(
            f"ORRERY_KEYS={place}: expected a folder of all roles' keys, got one key; 'orrery keys make' makes one"
        )
    return place


def _for_ordinary_user(keys: Path) -> Path:
    """Copies of root's keys that the containers' user can read, and nobody else."""
    copies = keys / "containers"
    copies.mkdir(mode=0o700, exist_ok=True)
    for path in sorted(keys.glob("*.key*")):
        copy = copies / path.name
        copy.unlink(missing_ok=True)
        descriptor = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(path.read_bytes())
        os.chown(copy, ORDINARY_USER, ORDINARY_USER)
    return copies


def _give(folder: Path, but: Path) -> None:
    """Make the containers' user the owner of all that is in the run folder but root's keys; root needs no rights."""
    give = partial(shutil.chown, user=ORDINARY_USER, group=ORDINARY_USER)
    give(folder)
    for path in folder.rglob("*"):
        if not path.is_symlink() and not path.is_relative_to(but):
            give(path)
