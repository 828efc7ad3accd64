"""The whole state of the core, and the turn in which one event changes it."""

from __future__ import annotations

import msgspec

from services.controller.core.evaluation import Evaluation
from services.controller.core.events import AnyEvent, Spooled
from services.controller.core.fleet import Fleet, Replica
from services.controller.core.hyperparameters import Hyperparameters
from services.controller.core.joining import Joining
from services.controller.core.ledger import Group, Ledger
from services.controller.core.lineages import Lineages
from services.controller.core.meshes import Meshes
from services.controller.core.mustering import Mustering
from services.controller.core.outcome import AnyFact, Effect, Outcome, Send
from services.controller.core.scaling import Scaling
from services.controller.core.stages import StageName, Stages
from services.controller.core.steering import Steering
from services.controller.core.steps import Steps
from services.controller.core.weights import Weights
from shared.config import Recipe, live_values
from shared.config.schema import SftTable, TrainTable
from shared.messages import AnyMessage, Position


class State(msgspec.Struct):
    """Everything the controller knows. Encodes to msgpack as it is: that is a snapshot.

    `sent` remembers which orders each replica was given in its session (its leases remember it themselves, as `told`);
    `progressed` is when the run last moved.
    """

    ledger: Ledger
    lineages: Lineages
    stages: Stages
    hyperparameters: Hyperparameters
    scaling: Scaling
    run: str = ""
    term: int = 0
    now: float = 0.0
    progressed: float = 0.0
    last_commit: float = 0.0
    fleet: Fleet = msgspec.field(default_factory=Fleet)
    steps: Steps = msgspec.field(default_factory=Steps)
    meshes: Meshes = msgspec.field(default_factory=Meshes)
    weights: Weights = msgspec.field(default_factory=Weights)
    joining: Joining = msgspec.field(default_factory=Joining)
    mustering: Mustering = msgspec.field(default_factory=Mustering)
    evaluation: Evaluation = msgspec.field(default_factory=Evaluation)
    steering: Steering = msgspec.field(default_factory=Steering)
    sent: dict[str, list[str]] = {}

    @property
    def lineage(self) -> int:
        """The lineage in force."""
        return self.lineages.committed.lineage

    @property
    def version(self) -> int:
        """The committed version."""
        return self.lineages.committed.version


def initial_state(recipe: Recipe) -> State:
    """The state before the first event."""
    stages: list[StageName] = []
    if recipe.sft is not None:
        stages.append("sft")
    if recipe.train is not None:
        stages.append("train")
    return State(
        ledger=Ledger(seed=recipe.run.seed),
        lineages=Lineages(committed=Position(1, 0, 0), settled=Position(1, 0, 0)),
        stages=Stages(names=[*stages, "closing", "over"]),
        hyperparameters=Hyperparameters(values=live_values(recipe)),
        scaling=Scaling.of(recipe),
    )


class Turn:
    """One event's turn: the state it changes, and the facts and effects it gathers.

    `was_over` is the run's end as the turn found it; `concerned` are replicas that a rule has something new for.
    """

    def __init__(self, state: State, recipe: Recipe, event: AnyEvent) -> None:
        self.state = state
        self.recipe = recipe
        self.event = event
        self.outcome = Outcome()
        self.was_over = bool(state.stages.outcome)
        self.concerned: set[str] = set()

    def fact(self, fact: AnyFact) -> None:
        """Put a decision on record."""
        self.outcome.facts.append(fact)

    def effect(self, effect: Effect) -> None:
        """Ask the shell for something."""
        self.outcome.effects.append(effect)

    def send(self, replica: Replica, message: AnyMessage, payload: list[Spooled] | None = None) -> None:
        """Send to rank 0 of a replica."""
        self.effect(Send(replica.name, 0, message, payload or []))

    def progress(self) -> None:
        """The run moved: the stall clock starts again."""
        self.state.progressed = self.state.now

    @property
    def table(self) -> SftTable | TrainTable:
        """The recipe's table of the training stage in force."""
        table = getattr(self.recipe, self.state.stages.name)
        assert table is not None
        return table

    @property
    def bound(self) -> int:
        """The staleness bound in force; worked answers of SFT have no version and no bound."""
        return self.state.hyperparameters.whole("train.max_staleness") if self.recipe.train is not None else 0

    def trained(self) -> int:
        """Groups' worth of batches committed in this stage."""
        return (self.state.version - self.state.stages.began) * self.table.batch_size

    def group(self, number: int) -> Group:
        """A group of the ledger by id."""
        return self.state.ledger.groups[number]
