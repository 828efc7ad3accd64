"""What persons and the launcher ask of a run: stop it, steer it, change a value, say who shall run, tell of an exit.

Owned by the shell. They have no session: a question is put again until it is answered, so what holds already is
answered like what is new. Invariant: whatever is said to have become of a request is durable by then.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import asdict

from services.controller.core.core import Core
from services.controller.core.events import (
    AnyEvent,
    HyperparametersRequested,
    ReplicaLost,
    Steered,
    SteeringOrder,
    StopRequested,
)
from services.controller.core.rules.steering import became
from shared.bus import Incoming
from shared.config import RecipeError, check_changes, check_scale
from shared.messages import (
    Accepted,
    AnyMessage,
    Refused,
    ReplicaExited,
    ScaleFleet,
    SetHyperparameters,
    StopRun,
    Wanted,
    WantedRequest,
)
from shared.telemetry import get_logger

log = get_logger()

Request = StopRun | SetHyperparameters | SteeringOrder | WantedRequest | ReplicaExited

Reply = Callable[[Incoming, AnyMessage], None]


class Requests:
    """Takes them: `step` decides and journals an event, `answer` replies once that is durable, `refuse` at once."""

    def __init__(
        self, core: Core, now: Callable[[], float], step: Callable[[AnyEvent], None], answer: Reply, refuse: Reply
    ) -> None:
        self._core = core
        self._now = now
        self._step = step
        self._answer = answer
        self._refuse = refuse

    def take(self, incoming: Incoming, request: Request) -> None:
        """Answer one, after doing what it asks for."""
        answer: AnyMessage
        match request:
            case StopRun():
                answer = self._stop(request)
            case SetHyperparameters():
                answer = self._change(request)
            case WantedRequest():
                answer = self._wanted()
            case ReplicaExited():
                answer = self._note_exit(request)
            case _:
                answer = self._steer(request)
        reply = self._refuse if isinstance(answer, Refused) else self._answer
        reply(incoming, answer)

    def _stop(self, request: StopRun) -> Accepted:
        if not self._core.state.stages.stopping:
            self._step(StopRequested(at=self._now(), cause=request.cause))
        return Accepted("the batch in hand is finished, a checkpoint written, then the run ends")

    def _change(self, request: SetHyperparameters) -> Accepted | Refused:
        hyperparameters, step = self._core.state.hyperparameters, self._next_step(request.at_step)
        try:
            changes = check_changes(self._core.recipe, hyperparameters.at(step), request.changes)
        except RecipeError as error:
            advice = "change only live fields, within their range"
            return Refused("hyperparameter", str(error), str(request.changes), advice)
        if not hyperparameters.holds(changes, step):
            self._step(HyperparametersRequested(at=self._now(), changes=changes, at_step=request.at_step))
        at = max((change.at_step for change in hyperparameters.pending if change.changes == changes), default=None)
        return Accepted("in force already" if at is None else f"in force from step {at} on")

    def _next_step(self, wanted: int | None) -> int:
        """The first step, from `wanted` on, that a change could still come into force with."""
        state = self._core.state
        return max(wanted or 0, state.lineages.committed.step + (state.steps.step is not None))

    def _wanted(self) -> Wanted:
        state = self._core.state
        draining = [replica.name for replica in state.fleet.live() if state.fleet.goes(replica)]
        return Wanted([] if state.stages.outcome else list(state.scaling.wanted), draining)

    def _steer(self, order: SteeringOrder) -> Accepted | Refused:
        """Refuse what cannot be, take what is new, and say what became of it."""
        verdict = self._core.judge_order(order)
        if isinstance(verdict, Refused):
            return verdict
        if verdict == "fresh":
            if isinstance(order, ScaleFleet):
                try:
                    check_scale(self._core.recipe, order.replicas)
                except RecipeError as error:
                    advice = "ask for numbers that the recipe allows"
                    return Refused("replica", str(error), str(order.replicas), advice)
            self._step(Steered(at=self._now(), order=order))
            log.info("steered", order=type(order).__name__, **asdict(order))
        return Accepted(became(self._core.state, order))

    def _note_exit(self, request: ReplicaExited) -> Accepted:
        replica = self._core.state.fleet.replicas.get(request.replica)
        if replica is not None and replica.live and request.pid in replica.pids.values():
            cause = f"process {request.pid} ended with code {request.code}"
            self._step(ReplicaLost(at=self._now(), replica=replica.name, incarnation=replica.incarnation, cause=cause))
        return Accepted("noted")
