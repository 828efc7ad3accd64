"""The schema of a recipe: every key that a run understands, with its type, range, default and meaning.

A file holds the tables of one subject; `recipe` puts them together and checks them against each other. A field marked
`LIVE` may be changed while the run goes on (`SetHyperparameters`); all others are fixed at the start. Durations end in
`_s` and are seconds.
"""

from shared.config.schema.data import DataTable
from shared.config.schema.evaluation import EvaluationTable, SuiteTable
from shared.config.schema.machinery import BusTable, JournalTable, TimeoutsTable, WeightsTable
from shared.config.schema.model import BuildTable, ModelTable
from shared.config.schema.outputs import CheckpointTable, MetricsTable, WandbTable
from shared.config.schema.recipe import Recipe
from shared.config.schema.rewards import (
    ChoicePart,
    ExactPart,
    FormatPart,
    LengthPart,
    MathPart,
    NumberPart,
    PythonPart,
    RewardPart,
    RewardsTable,
    VerifierPart,
)
from shared.config.schema.run import RunTable
from shared.config.schema.services import (
    EngineName,
    EngineParallelTable,
    EvaluatorTable,
    InFlight,
    PolicyParallelTable,
    PolicyTable,
    Quantization,
    RolloutTable,
)
from shared.config.schema.stages import OptimizerTable, SftTable, StopTable, TrainTable

__all__ = [
    "BuildTable",
    "BusTable",
    "CheckpointTable",
    "ChoicePart",
    "DataTable",
    "EngineName",
    "EngineParallelTable",
    "EvaluationTable",
    "EvaluatorTable",
    "ExactPart",
    "FormatPart",
    "InFlight",
    "JournalTable",
    "LengthPart",
    "MathPart",
    "MetricsTable",
    "ModelTable",
    "NumberPart",
    "OptimizerTable",
    "PolicyParallelTable",
    "PolicyTable",
    "PythonPart",
    "Quantization",
    "Recipe",
    "RewardPart",
    "RewardsTable",
    "RolloutTable",
    "RunTable",
    "SftTable",
    "StopTable",
    "SuiteTable",
    "TimeoutsTable",
    "TrainTable",
    "VerifierPart",
    "WandbTable",
    "WeightsTable",
]
