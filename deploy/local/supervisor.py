"""Keeps the processes of one run alive until the run is over, and leaves none behind.

Called by `orrery up` and `orrery resume`, in the main thread, and in the controller's job of a cluster, where a replica
is a job instead of a process (`Child`). Which replicas run is the controller's to say
(`wanted.py`). Whether a process that ended is started again depends on its exit code (`shared/service.py`): 2 and 3 end
the run, a replica's 0 is a leave that the controller knows of, anything else is restarted under the same name, after a
growing pause, while it is wanted. The run is over when the controller exits with 0. Invariant: when `run` returns,
every process that it started has ended, unless it let go; when the supervisor itself is killed, the kernel kills them.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deploy.local.plan import CONTROLLER, ReplicaPlan, RunPlan
from deploy.local.process import ChildProcess, describe_code, last_words
from deploy.local.wanted import ASK_AGAIN_S, ASK_S, Ask, WantedReplicas
from shared.messages import ReplicaExited, StopRun
from shared.service import EXIT_DONE, EXIT_FATAL, EXIT_FENCED, EXIT_RECIPE

EXIT_INTERRUPTED = 130
EXIT_GAVE_UP = 1
# the controller ends only after its replicas have taken their Shutdown, or are lost: whoever stays longer was still
# starting, and would wait for a controller that is gone
_LEAVE_S = 3.0


@dataclass(frozen=True)
class RestartRules:
    """How restarts are paced: the pause doubles from `first_s` to `most_s` with each restart in a row.

    Restarts count as in a row while the process lives less than `lived_s` and the run makes no progress meanwhile;
    after `attempts` of them the run is given up.
    """

    first_s: float = 0.2
    most_s: float = 15.0
    attempts: int = 5
    lived_s: float = 60.0

    def pause(self, restarts_in_row: int) -> float:
        """Seconds to wait before restart number `restarts_in_row` (from 1) in a row."""
        return float(min(self.first_s * 2 ** (restarts_in_row - 1), self.most_s))


@dataclass(frozen=True)
class Deadlines:
    """How long the supervisor waits: for a stopped run to checkpoint and end, and for a stopping process to exit."""

    stop_s: float
    exit_s: float


class Child(Protocol):
    """Something that runs and ends: a process here (`ChildProcess`), or a job elsewhere."""

    plan: ReplicaPlan

    @property
    def known_as(self) -> int:
        """The process id with which the replica registers; 0 if that is not known here."""

    @property
    def code(self) -> int | None:
        """The exit code (negative: a signal), or None while it runs."""

    @property
    def age_s(self) -> float:
        """Seconds that it has run."""

    async def wait(self) -> int:
        """The exit code, once it has ended."""

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""

    def kill_group(self) -> None:
        """End it at once, with whatever it started."""

    def let_go(self) -> None:
        """Somebody else looks after it from now on."""


Start = Callable[[ReplicaPlan, Path], Child]
"""Starts a process, whose output goes to the file; OSError if that cannot be done."""


@dataclass(frozen=True)
class _Outcome:
    code: int
    grace: bool = True
    """Whether processes may still end by themselves, as after a finished run."""
    why: str = ""
    """What went wrong, for a person."""


class Supervisor:
    """One run's processes. `stop()` asks for a graceful end, a second `stop()` kills; `run()` returns the exit code."""

    def __init__(
        self,
        run_folder: Path,
        plan: RunPlan,
        deadlines: Deadlines,
        *,
        ask: Ask,
        tell: Callable[[str], None],
        start: Start = ChildProcess,
        rules: RestartRules | None = None,
    ) -> None:
        self.why = ""
        """What went wrong, in words for a person; known when `run` has returned, empty if nothing did."""
        self._run_folder = run_folder
        self._metrics = run_folder / "metrics.jsonl"
        self._plan = plan
        self._address = plan.address
        self._deadlines = deadlines
        self._ask = ask
        self._tell = tell
        self._begin = start
        self._rules = rules or RestartRules()
        self._children: dict[str, Child] = {}
        self._replicas = WantedReplicas(plan.address, ask, self._start_keeper, self._dismiss)
        self._outcome: asyncio.Future[_Outcome] | None = None
        self._stopping: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Start everything, keep it alive, and return 0 (run over), 130 (stopped), or the code of what went wrong."""
        loop = asyncio.get_running_loop()
        self._outcome = loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self.stop)
        looking = loop.create_task(self._replicas.run())
        looking.add_done_callback(self._on_keeper_end)
        keepers = [looking, self._keeper(self._plan.controller)]
        try:
            outcome = await self._outcome
            self.why = outcome.why
            # no restart from here on; the processes themselves go on for now
            await _cancel([*keepers, *self._replicas.keepers.values()])
            if outcome.code == EXIT_FENCED:
                self._leave_replicas()
            await self._end_processes(outcome)
        finally:
            for child in self._children.values():
                child.kill_group()
            stopping = [self._stopping] if self._stopping else []
            await _cancel([*keepers, *self._replicas.keepers.values(), *stopping])
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)
        return outcome.code

    @property
    def stopping(self) -> bool:
        """Whether a graceful end was asked for, so that a second `stop` kills."""
        return self._stopping is not None

    def stop(self) -> None:
        """First call: let the controller finish the step, checkpoint and shut everybody down. Second: kill at once."""
        if self._stopping is None and self._outcome is not None and not self._outcome.done():
            self._tell("stopping after the batch in hand, with a checkpoint (Ctrl-C once more to kill at once)")
            self._stopping = asyncio.get_running_loop().create_task(self._stop_run())
        else:
            self._tell("killing all processes")
            for child in self._children.values():
                child.kill_group()
            self._settle(_Outcome(EXIT_INTERRUPTED, grace=False))

    def let_go(self) -> None:
        """End the controller, and leave the replicas running: another supervisor takes, or has taken, the run over."""
        self._settle(_Outcome(EXIT_FENCED, grace=False))

    # --- one process ---------------------------------------------------------------------------------------------

    def _start_keeper(self, name: str) -> asyncio.Task[None]:
        return self._keeper(self._plan.replica(name))

    def _keeper(self, plan: ReplicaPlan) -> asyncio.Task[None]:
        keeper = asyncio.get_running_loop().create_task(self._keep(plan))
        keeper.add_done_callback(self._on_keeper_end)
        return keeper

    def _dismiss(self, name: str) -> None:
        """The controller wants this replica no more, and has no process of it that it could tell so."""
        child = self._children.get(name)
        if child is not None:
            child.signal(signal.SIGTERM)

    async def _keep(self, plan: ReplicaPlan) -> None:
        """Run one process, again and again as its exit codes ask, until one of them is final or nobody wants it."""
        restarts = 0
        while True:
            progress = self._progress()
            child = self._start(plan)
            if child is None:
                return
            code = await child.wait()
            if self._is_final(plan, code):
                return
            if plan.role != CONTROLLER and not self._replicas.wants(plan.replica):
                await self._report_exit(plan, child.known_as, code)
                return
            gone_well = child.age_s >= self._rules.lived_s or self._progress() > progress
            restarts = 1 if gone_well else restarts + 1
            if restarts > self._rules.attempts:
                self._give_up(plan, code)
                return
            pause = 0.0 if code == EXIT_FENCED and restarts == 1 else self._rules.pause(restarts)
            self._tell(f"{plan.replica} ended ({describe_code(code)}): starting it again in {pause:.1f} s")
            await asyncio.gather(asyncio.sleep(pause), self._report_exit(plan, child.known_as, code))

    def _on_keeper_end(self, keeper: asyncio.Task[None]) -> None:
        """A supervisor that loses a keeper to an error must not wait for ever for an outcome."""
        if not keeper.cancelled() and (error := keeper.exception()):
            self._settle(_Outcome(EXIT_GAVE_UP, grace=False, why=f"the supervisor failed: {error!r}"))

    def _start(self, plan: ReplicaPlan) -> Child | None:
        try:
            child = self._begin(plan, self._output(plan))
        except OSError as error:
            why = f"{plan.replica} cannot be started: {error} (command: {' '.join(plan.command)})"
            self._settle(_Outcome(EXIT_GAVE_UP, grace=False, why=why))
            return None
        self._children[plan.replica] = child
        return child

    def _is_final(self, plan: ReplicaPlan, code: int) -> bool:
        """Whether the exit code forbids a restart; settles the run's outcome where it decides it."""
        if code == EXIT_DONE:
            if plan.role == CONTROLLER:
                self._settle(_Outcome(EXIT_INTERRUPTED if self._stopping else EXIT_DONE))
            return True
        if code == EXIT_FENCED and plan.role == CONTROLLER:
            self._tell("a newer launch of this run has begun: this one lets go")
            self.let_go()
            return True
        if code in (EXIT_RECIPE, EXIT_FATAL):
            self._tell(f"{plan.replica} ended ({describe_code(code)}): the run stops")
            self._settle(_Outcome(code, grace=plan.role == CONTROLLER, why=self._last_words(plan)))
            return True
        return False

    def _give_up(self, plan: ReplicaPlan, code: int) -> None:
        self._tell(f"{plan.replica} ended again ({describe_code(code)}): giving up")
        why = (
            f"{plan.replica} ended {self._rules.attempts + 1} times in a row without progress, last with "
            f"{describe_code(code)}; its last words: {self._last_words(plan)}"
        )
        self._settle(_Outcome(EXIT_GAVE_UP, grace=False, why=why))

    async def _report_exit(self, plan: ReplicaPlan, pid: int, code: int) -> None:
        """Tell the controller, so that nobody waits for this process's heartbeats."""
        if plan.role == CONTROLLER:
            return
        # a controller that is itself being restarted learns it from the replica's new registration
        with contextlib.suppress(Exception):
            await asyncio.to_thread(self._ask, self._address, ReplicaExited(plan.replica, pid, code), ASK_S)

    # --- the end -------------------------------------------------------------------------------------------------

    async def _stop_run(self) -> None:
        """Have the controller end the run; fall back to ending the processes if it cannot."""
        try:
            async with asyncio.timeout(self._deadlines.exit_s):
                detail = await self._ask_to_stop()
        except TimeoutError:
            self._tell(f"the controller did not answer within {self._deadlines.exit_s:g} s: ending all processes")
            self._settle(_Outcome(EXIT_INTERRUPTED, grace=False))
            return
        self._tell(f"the controller: {detail}")
        await asyncio.sleep(self._deadlines.stop_s)
        self._tell(f"the run did not end within {self._deadlines.stop_s:g} s: ending all processes")
        self._settle(_Outcome(EXIT_INTERRUPTED, grace=False))

    async def _ask_to_stop(self) -> str:
        while True:
            try:
                answer = await asyncio.to_thread(self._ask, self._address, StopRun("asked by a person"), ASK_S)
            except Exception:  # not up yet, or being restarted: the caller's deadline ends this
                await asyncio.sleep(ASK_AGAIN_S)
                continue
            return str(getattr(answer, "detail", answer))

    async def _end_processes(self, outcome: _Outcome) -> None:
        """Wait for the processes to end by themselves, then SIGTERM, then SIGKILL after `exit_s`.

        The controller last: a replica that leaves in good order has something to tell it.
        """
        if outcome.grace and await self._all_ended(min(_LEAVE_S, self._deadlines.exit_s)):
            return
        for child in self._running():
            if child.plan.role != CONTROLLER:
                child.signal(signal.SIGTERM)
        await self._all_ended(self._deadlines.exit_s, but=CONTROLLER)
        for child in self._running():
            child.signal(signal.SIGTERM)
        if await self._all_ended(self._deadlines.exit_s):
            return
        for child in self._running():
            self._tell(f"{child.plan.replica} is still there after SIGTERM: SIGKILL")
            child.kill_group()
        await self._all_ended(self._deadlines.exit_s)

    def _leave_replicas(self) -> None:
        for name in [name for name, child in self._children.items() if child.plan.role != CONTROLLER]:
            self._children.pop(name).let_go()

    async def _all_ended(self, timeout_s: float, but: str = "") -> bool:
        running = [asyncio.create_task(child.wait()) for child in self._running() if child.plan.role != but]
        if running:
            await asyncio.wait(running, timeout=timeout_s)
            await _cancel(running)
        return not self._running()

    def _running(self) -> list[Child]:
        return [child for child in self._children.values() if child.code is None]

    def _settle(self, outcome: _Outcome) -> None:
        """The first outcome counts."""
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(outcome)

    # --- what a person sees --------------------------------------------------------------------------------------

    def _progress(self) -> int:
        """Grows with every committed step."""
        try:
            return self._metrics.stat().st_size
        except OSError:
            return 0

    def _output(self, plan: ReplicaPlan) -> Path:
        return self._run_folder / "logs" / f"{plan.replica}.out"

    def _last_words(self, plan: ReplicaPlan) -> str:
        return last_words(self._run_folder, plan) or f"nothing in {self._output(plan)}"


async def _cancel(tasks: Sequence[asyncio.Task[None] | asyncio.Task[int]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
