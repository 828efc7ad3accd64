"""`python -m deploy.slurm RUN`: the supervisor of a Slurm run, and its controller, in the controller's job.

What ends it, and what becomes of the replicas' jobs:

    the run is over                 they have ended, or are cancelled; slurm/outcome.json tells the exit code
    the job is requeued, or fenced  they go on, and the next supervisor takes them over
    scancel of the job              they are cancelled; what was done is kept, and can be resumed
    SIGUSR2: its time limit nears   a checkpoint is asked for, and the job requeued
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from deploy.local.asking import ask_run
from deploy.local.plan import ReplicaPlan, RunPlan, start_of
from deploy.local.process import ChildProcess
from deploy.local.supervisor import Child, Deadlines, Supervisor
from deploy.metrics import MetricsWriters
from deploy.plan import CONTROLLER, Place, launch_plan
from deploy.slurm import client
from deploy.slurm.client import SlurmError
from deploy.slurm.job import Board, SlurmJob
from deploy.slurm.layout import WARNING_S, job_name, outcome_path, script
from services.controller.launch import claim_launch
from shared.bus import BusError
from shared.bus.address import TELLS
from shared.config import Recipe, load_recipe
from shared.messages import AnyMessage, CheckpointRun
from shared.network import address_of
from shared.service import EXIT_FENCED, PARENT_VARIABLE
from shared.telemetry import configure_logging, get_logger

log = get_logger()
ASK_S = 5.0


def main() -> int:
    """Supervise the run until it is over, or another supervisor takes it over; the exit code."""
    folder = Path(sys.argv[1]).absolute()
    recipe = load_recipe(folder / "config.toml")
    configure_logging(folder, "supervisor", "supervisor", console=False)
    launch = claim_launch(folder)
    log.info("supervisor starts", launch=launch, job=_job(), node=os.uname().nodename)
    code, why = asyncio.run(_supervise(recipe, folder, launch))
    log.info("supervisor ends", launch=launch, code=code, why=why)
    if code != EXIT_FENCED:
        beside = outcome_path(folder).with_suffix(".new")
        beside.write_text(json.dumps({"code": code, "why": why}) + "\n", encoding="utf-8")
        os.replace(beside, outcome_path(folder))
    return code


async def _supervise(recipe: Recipe, folder: Path, launch: int) -> tuple[int, str]:
    times = recipe.timeouts
    board = Board()
    supervisor = Supervisor(
        folder,
        _plan(recipe, folder, launch),
        Deadlines(stop_s=times.step_s + times.checkpoint_s + times.exit_s, exit_s=times.exit_s),
        ask=partial(_ask, folder),
        tell=log.info,
        start=partial(_start, recipe, folder, board),
    )
    looking = asyncio.create_task(board.run())
    with MetricsWriters(folder, recipe, log.warning):
        running = asyncio.create_task(supervisor.run())
        await asyncio.sleep(0)  # it has its own handlers now, which are for a person at a terminal
        tasks: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()

        def begin(act: Callable[[], Coroutine[Any, Any, None]]) -> None:
            tasks.add(loop.create_task(act()))

        loop.add_signal_handler(signal.SIGTERM, begin, partial(_on_term, supervisor))
        loop.add_signal_handler(signal.SIGUSR2, begin, partial(_on_time_limit, supervisor, folder))
        code = await running
    looking.cancel()
    for task in tasks:
        task.cancel()
    return code, supervisor.why


def _plan(recipe: Recipe, folder: Path, launch: int) -> RunPlan:
    """The launch plan: the controller beside this process, replicas wherever Slurm has room."""
    bind = f"tcp://{address_of(recipe.weights.interface)}:*"
    place = Place(str(folder / "config.toml"), str(folder), bind, str(folder / TELLS))
    plan = launch_plan(recipe)
    controller = start_of(plan.controller, place)
    controller = replace(controller, command=(*controller.command, "--launch", str(launch)))
    return RunPlan(place.controller, controller, lambda name: start_of(plan.replica(name), place))


def _ask(folder: Path, _address: str, message: AnyMessage, timeout_s: float) -> AnyMessage:
    """The supervisor's questions go to wherever the newest term listens."""
    return ask_run(folder, message, timeout_s)


def _start(recipe: Recipe, folder: Path, board: Board, plan: ReplicaPlan, output: Path) -> Child:
    if plan.role == CONTROLLER:
        return ChildProcess(plan, output)
    process = launch_plan(recipe).replica(plan.replica)
    name = job_name(folder, plan.replica)
    options = [
        f"--job-name={name}",
        f"--output={output}",
        "--open-mode=append",
        "--no-requeue",  # this supervisor submits another one, which need not wait
        f"--signal=TERM@{WARNING_S}",
        f"--nodes={process.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={process.cpus // process.nodes}",
        *([f"--gpus-per-node={process.gpus // process.nodes}"] if process.gpus else []),
    ]
    variables = {key: value for key, value in plan.environment.items() if key != PARENT_VARIABLE} | {
        "ORRERY_PYTHON": plan.command[0],
        "ORRERY_RUN": str(folder),
        "ORRERY_ROLE": plan.role,
        "ORRERY_REPLICA": plan.replica,
        "ORRERY_ENVIRONMENT": process.environment,
    }
    submit = partial(client.submit, script(folder, plan.role), plan.command[1:], options, variables)
    return SlurmJob(plan, name, board, submit, output)


async def _on_term(supervisor: Supervisor) -> None:
    """Slurm ends the job: for good, or to run it again?"""
    try:
        found = await asyncio.to_thread(client.details, _job())
    except SlurmError:
        found = None  # cut off: whoever can be asked has another supervisor by now, or will
    if found is not None and found.restarts <= int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        log.warning("the job was cancelled: the replicas' jobs are too")
        supervisor.stop()
        supervisor.stop()
        return
    log.info("the job ends, and the replicas go on: another supervisor will take them over")
    supervisor.let_go()


async def _on_time_limit(supervisor: Supervisor, folder: Path) -> None:
    """The job's time is nearly up: have what was trained settled, and go on in another turn of this job."""
    log.info("the job's time limit is near: a checkpoint, then the job is requeued")
    before = _newest_checkpoint(folder)
    with contextlib.suppress(BusError):
        await asyncio.to_thread(ask_run, folder, CheckpointRun(), ASK_S)
        for _ in range(WARNING_S // 2):
            if _newest_checkpoint(folder) != before:
                break
            await asyncio.sleep(1.0)
    try:
        await asyncio.to_thread(client.requeue, _job())
    except SlurmError as error:
        log.error("the job cannot be requeued: the run stands still until 'orrery resume'", why=str(error))
        supervisor.let_go()


def _newest_checkpoint(folder: Path) -> str:
    try:
        return max(
            (path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit()), key=int, default=""
        )
    except FileNotFoundError:
        return ""


def _job() -> int:
    return int(os.environ.get("SLURM_JOB_ID", "0"))


if __name__ == "__main__":
    sys.exit(main())
