"""The schema of a recipe: every key that a run understands, with its type, range, default and meaning.

A field marked `Live` may be changed while the run goes on (`SetHyperparameters`); all others are fixed at the start.
Durations end in `_s` and are seconds.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.config import JsonDict

LIVE: JsonDict = {"live": True}
SUITE_NAME = r"[a-z0-9][a-z0-9._-]*"


class Table(BaseModel):
    """A strict table: unknown keys and silent conversions are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class RunTable(Table):
    """[run]: the run as a whole."""

    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9._-]*$", description="prefix of the run's id")
    seed: int = Field(0, ge=0, description="seed of everything random")
    deterministic: bool = Field(
        False, description="equal bits on CPU in two runs; wants max_staleness 0, one replica a role"
    )
    folder: str = Field("runs", description="where run folders are made")


class BuildTable(Table):
    """[model.build]: a small model built from the seed, with a character tokenizer; needs no download."""

    family: Literal["qwen2", "qwen3", "qwen3_moe", "llama"] = "qwen3"
    hidden_size: Positive = 128
    intermediate_size: Positive = 384
    layers: Positive = 4
    heads: Positive = 4
    kv_heads: Positive = 2
    head_dim: Positive = 32
    experts: Positive = 4
    experts_per_token: Positive = 2
    context: Positive = 512
    tie_embeddings: bool = True


class ModelTable(Table):
    """[model]: a Hugging Face folder or name, or a model to build."""

    path: str | None = Field(None, description="local folder or hub name of a Hugging Face causal LM")
    build: BuildTable | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = Field(False, description="run code that comes with the model; off unless you trust it")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.build is None):
            raise ValueError("give exactly one of model.path and [model.build]")
        return self


class DataTable(Table):
    """[data.NAME]: rows to ask. `kind` chooses the source, the other keys belong to it."""

    kind: Literal["reasoning_gym", "jsonl", "parquet", "huggingface"]
    task: str | None = Field(None, description="reasoning_gym: the task's name")
    size: Positive = Field(1000, description="reasoning_gym: number of rows")
    seed: int = Field(0, ge=0, description="reasoning_gym: seed of the rows")
    options: dict[str, bool | int | float | str | list[int] | list[float] | list[str]] = Field(
        default_factory=dict, description="reasoning_gym: the task's own settings"
    )
    path: str | None = Field(None, description="jsonl, parquet: the file; huggingface: the data set's name")
    split: str = Field("train", description="huggingface: the split")
    prompt: str = Field("prompt", description="column with the question (text) or the chat messages (list)")
    answer: str = Field("answer", description="column with the reference answer")
    response: str = Field("response", description="column with the worked answer that SFT learns")
    system: str | None = Field(None, description="system message put before each prompt")
    part: list[float] = Field(
        default_factory=lambda: [0.0, 1.0],
        min_length=2,
        max_length=2,
        description="keep the rows whose question hashes between these; disjoint parts never share a question",
    )

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        if self.kind == "reasoning_gym" and not self.task:
            raise ValueError('kind "reasoning_gym" wants `task`')
        if self.kind != "reasoning_gym" and not self.path:
            raise ValueError(f'kind "{self.kind}" wants `path`')
        if not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError(f"part wants two rising numbers from 0 to 1, such as [0.0, 0.9]; got {self.part}")
        return self


class OptimizerTable(Table):
    """What both kinds of training share: AdamW with a schedule of its rate."""

    dataset: str = Field(description="name of a [data.NAME] table")
    batches: Positive = Field(description="batches to train; each makes one new weight version")
    batch_size: Positive = Field(description="prompt groups in a batch, over all replicas")
    lr: float = Field(gt=0, le=1, json_schema_extra=LIVE, description="AdamW learning rate after warm-up")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="after warm-up: the same rate always, or one that falls to 0 at the stage's last batch"
    )
    weight_decay: float = Field(0.0, ge=0, le=1, json_schema_extra=LIVE)
    beta1: Share = 0.9
    beta2: Share = 0.95
    grad_clip: float = Field(1.0, gt=0, json_schema_extra=LIVE, description="largest global gradient norm")


class StopTable(Table):
    """[sft.stop]: end the stage early, when held-out accuracy first reaches a threshold."""

    accuracy: Share
    every: Positive = Field(10, description="batches between evaluations while the rule is watched")
    suite: str | None = Field(None, description="name of the suite that decides; the first one when left out")


class SftTable(OptimizerTable):
    """[sft]: supervised fine-tuning on the data set's worked answers, before RL."""

    stop: StopTable | None = None


class TrainTable(OptimizerTable):
    """[train]: reinforcement learning with GRPO and its DAPO and AIPO options."""

    samples: int = Field(8, ge=2, json_schema_extra=LIVE, description="samples drawn for each prompt")
    mu: Positive = Field(1, description="passes over each batch")
    minibatches: Positive = Field(1, description="optimizer steps that a pass is split into")
    clip_low: Share = Field(0.2, json_schema_extra=LIVE, description="ratio is clipped below 1 - clip_low")
    clip_high: float = Field(0.28, ge=0, json_schema_extra=LIVE, description="ratio is clipped above 1 + clip_high")
    kl_weight: float = Field(0.0, ge=0, json_schema_extra=LIVE, description="weight of KL to the stage's first weights")
    is_cap: float = Field(2.0, gt=0, json_schema_extra=LIVE, description="cap of the trainer/engine importance weight")
    advantage: Literal["group_norm", "unbiased"] = Field(
        "group_norm", description="(r - mean) / (std + eps), or without the std (Dr.GRPO)"
    )
    reduction: Literal["token_mean", "sequence_sum_mean", "sequence_mean_mean", "constant"] = Field(
        "token_mean", description="how token losses become one number; denominators are global"
    )
    filter_equal_rewards: bool = Field(True, description="replace groups whose rewards are all equal (DAPO)")
    filter_limit: Positive = Field(
        50, description="batches' worth of filtered groups in a row after which the run gives up"
    )
    max_staleness: int = Field(1, ge=0, le=64, description="trained version - sampled version never exceeds this")


class RolloutTable(Table):
    """[rollout]: who generates, and how."""

    replicas: Positive = 1
    engine: Literal["transformers"] = "transformers"
    threads: Positive = Field(1, description="CPU threads of the engine")
    slots: Positive = Field(64, description="sequences decoded side by side")
    temperature: float = Field(1.0, gt=0, le=10, json_schema_extra=LIVE)
    top_p: float = Field(1.0, gt=0, le=1, json_schema_extra=LIVE)
    top_k: int = Field(0, ge=0, json_schema_extra=LIVE)
    max_new_tokens: Positive = Field(64, json_schema_extra=LIVE)


class PolicyTable(Table):
    """[policy]: who learns."""

    replicas: Literal[1] = Field(1, description="policy replicas; more than one is not built yet")
    threads: Positive = Field(1, description="CPU threads of the trainer")
    micro_batch_tokens: Positive = Field(16384, description="padded tokens in one forward pass")


class PartTable(Table):
    """What every kind of [[rewards.parts]] has; the reward is the weighted sum of the parts."""

    name: str = Field(
        "", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", description="its name in the metrics; its kind when left out"
    )
    weight: float = Field(1.0, ge=-100, le=100)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, table: object) -> object:
        return {"name": cls._own_name(table), **table} if isinstance(table, dict) else table

    @classmethod
    def _own_name(cls, table: dict[str, object]) -> object:
        return cls.model_fields["kind"].default


class VerifierPart(PartTable):
    """The data set's own judgement of the text inside `<answer>`."""

    kind: Literal["verifier"] = "verifier"


class ExactPart(PartTable):
    """Whether the text inside `<answer>` is the reference answer."""

    kind: Literal["exact"] = "exact"


class FormatPart(PartTable):
    """Whether the completion is `<think>..</think><answer>..</answer>`."""

    kind: Literal["format"] = "format"


class ChoicePart(PartTable):
    """Whether the completion chooses the option (a letter) that the reference answer names."""

    kind: Literal["choice"] = "choice"
    options: int = Field(10, ge=2, le=10, description="how many options there are, from A on")


class MathPart(PartTable):
    r"""Whether the last `\boxed{..}` equals the reference answer as mathematics; needs math-verify."""

    kind: Literal["math"] = "math"


class NumberPart(PartTable):
    """Whether the number that the completion ends in is the reference answer's."""

    kind: Literal["number"] = "number"
    tolerance: float = Field(0.0, ge=0, description="largest difference that still counts as equal")


class LengthPart(PartTable):
    """DAPO's soft punishment of overlong completions."""

    kind: Literal["length"] = "length"
    max_length: Positive = Field(description="tokens from which on the part is -1")
    cache_length: Positive = Field(description="tokens before max_length over which it falls from 0 to -1")

    @model_validator(mode="after")
    def _cache_fits(self) -> Self:
        if self.cache_length > self.max_length:
            raise ValueError(f"cache_length is {self.cache_length}, more than max_length = {self.max_length}")
        return self


class PythonPart(PartTable):
    """A function of yours."""

    kind: Literal["python"] = "python"
    function: str = Field(description="module:function, such as my_rewards:score")
    path: str | None = Field(None, description="folder of the module; the recipe's own when left out")

    @field_validator("function")
    @classmethod
    def _is_named(cls, function: str) -> str:
        module, _, name = function.partition(":")
        if not name.isidentifier() or not all(word.isidentifier() for word in module.split(".")):
            raise ValueError("expected module:function, such as my_rewards:score")
        return function

    @classmethod
    def _own_name(cls, table: dict[str, object]) -> object:
        return str(table.get("function", "")).rpartition(":")[2] or "python"


RewardPart = VerifierPart | ExactPart | FormatPart | ChoicePart | MathPart | NumberPart | LengthPart | PythonPart
"""One of [[rewards.parts]]: `kind` says which."""


def _verifier_alone() -> list[RewardPart]:
    return [VerifierPart()]


class RewardsTable(Table):
    """[rewards]: what a completion is worth, computed in worker processes with limits."""

    parts: list[Annotated[RewardPart, Field(discriminator="kind")]] = Field(
        default_factory=_verifier_alone, min_length=1
    )
    workers: Positive = 1
    timeout_s: Seconds = Field(10.0, description="longest time for one completion")
    memory_mb: Positive = Field(2048, description="most memory of one worker")
    failure_limit: Positive = Field(
        20, description="prompt groups in a row whose rewards fail in one rollout, after which the run ends"
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [part.name for part in self.parts]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two parts are named {name!r}: give one of them another `name`")
        return self


class SuiteTable(Table):
    """[evaluation.suites.NAME]: held-out problems, how they are answered, and when an answer is correct."""

    dataset: str | None = Field(
        None, description="name of a [data.NAME] table, disjoint from training; the suite's own name when left out"
    )
    problems: Positive = Field(200, description="rows judged in each evaluation")
    samples: Positive = Field(1, description="answers to each problem; accuracy is their mean (pass@1)")
    temperature: float = Field(0.0, ge=0, le=10, description="0 answers greedily")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_new_tokens: Positive = 64
    correct_at: float = Field(1.0, description="a verifier score of at least this counts as correct")
    category: str | None = Field(None, description="column whose values split the verdict")

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples is {self.samples}, but greedy answers are all alike: "
                "set a temperature above 0, or samples = 1"
            )
        return self


class EvaluationTable(Table):
    """[evaluation]: how often held-out accuracy is judged, and on which suites."""

    every: Positive = Field(20, description="batches between evaluations in RL; first and last are always judged")
    suites: dict[str, SuiteTable] = Field(min_length=1, description="one table [evaluation.suites.NAME] a suite")

    @model_validator(mode="after")
    def _names_are_file_names(self) -> Self:
        for name in self.suites:
            if not re.fullmatch(SUITE_NAME, name):
                raise ValueError(
                    f"a suite is named {name!r}: its verdicts are files of that name, so use lower-case letters, "
                    "digits, '.', '_' and '-', beginning with a letter or digit"
                )
        return self

    def dataset(self, suite: str) -> str:
        """The name of a suite's data set."""
        return self.suites[suite].dataset or suite

    @property
    def datasets(self) -> list[str]:
        """The names of all data sets that are judged on, each once."""
        return list(dict.fromkeys(self.dataset(suite) for suite in self.suites))


class EvaluatorTable(Table):
    """[evaluator]: who judges held-out accuracy."""

    engine: Literal["fleet", "own"] = Field(
        "fleet", description='"fleet": the rollouts judge between their samples; "own": replicas that do nothing else'
    )
    replicas: Positive = Field(1, description='replicas of the evaluator service with engine = "own"')
    threads: Positive = Field(1, description="CPU threads of an evaluator")
    slots: Positive = Field(64, description="sequences decoded side by side")


class WandbTable(Table):
    """[metrics.wandb]: figures also go to Weights & Biases."""

    project: str = Field("orrery", description="W&B project")
    entity: str | None = Field(None, description="W&B team or user; your default one when left out")
    mode: Literal["online", "offline"] = Field("online", description='"offline" writes files for `wandb sync`')


class MetricsTable(Table):
    """[metrics]: where figures go besides metrics.jsonl and TensorBoard, which are always written."""

    wandb: WandbTable | None = None
    prometheus_port: int = Field(0, ge=0, le=65535, description="port of a Prometheus endpoint; 0: none")
    prometheus_host: str = Field("127.0.0.1", description="address of that endpoint; whoever reaches it may read")


class CheckpointTable(Table):
    """[checkpoint]: when the state is made durable."""

    every: Positive = Field(10, json_schema_extra=LIVE, description="batches between checkpoints")
    keep: Positive = Field(2, description="newest checkpoints kept")
    export: bool = Field(True, description="write a Hugging Face copy at the end")


class WeightsTable(Table):
    """[weights]: how weights travel to the engines."""

    backend: Literal["gloo"] = "gloo"
    interface: str = Field("lo", description="network interface that process groups use")
    bucket_mb: Positive = Field(64, description="most megabytes in one broadcast")


TOKEN_BYTES = 12
"""A sampled token on its way to the policy: its id, its log-probability, the version that sampled it."""


class BusTable(Table):
    """[bus]: the control plane."""

    bind: str = Field("tcp://127.0.0.1:*", description="controller's address; off loopback is refused without keys")
    heartbeat_s: Seconds = 1.0
    lost_after_s: Seconds = Field(10.0, description="silence after which a replica is lost")
    resend_s: Seconds = Field(1.0, description="an unacknowledged message is sent again after this")
    window: Positive = Field(256, description="unacknowledged messages a sender may have out")
    max_message_mb: Positive = Field(256, description="a larger message is refused")


class TimeoutsTable(Table):
    """[timeouts]: every wait has a name and ends."""

    register_s: Seconds = Field(60.0, description="a service waits for the controller's welcome")
    load_s: Seconds = Field(600.0, description="the controller waits for a model to load")
    lease_s: Seconds = Field(
        120.0,
        description="the controller waits for a leased group, counted anew when its replica answers an earlier one",
    )
    step_s: Seconds = Field(300.0, description="the controller waits for gradients, and for a commit to be applied")
    checkpoint_s: Seconds = Field(300.0, description="the controller waits for a checkpoint")
    mesh_s: Seconds = Field(20.0, description="members wait for a process group to form")
    transfer_s: Seconds = Field(
        60.0, description="members wait for one operation on a mesh; the controller for a transfer"
    )
    rejoin_s: Seconds = Field(30.0, description="a new term waits for the replicas of the old one")
    stall_s: Seconds = Field(900.0, description="the run fails when nothing at all has happened for so long")
    exit_s: Seconds = Field(20.0, description="a stopping service has this long before it is killed")


class JournalTable(Table):
    """[journal]: the controller's memory."""

    snapshot_every: Positive = Field(5000, description="events between snapshots")
    segment_mb: Positive = Field(64, description="size at which journal and spool segments are rolled")


class Recipe(Table):
    """A whole recipe. `[sft]` runs before `[train]`; either may be left out."""

    run: RunTable = Field(default_factory=RunTable)
    model: ModelTable
    data: dict[str, DataTable]
    sft: SftTable | None = None
    train: TrainTable | None = None
    policy: PolicyTable = Field(default_factory=PolicyTable)
    rollout: RolloutTable = Field(default_factory=RolloutTable)
    rewards: RewardsTable = Field(default_factory=RewardsTable)
    evaluation: EvaluationTable | None = None
    evaluator: EvaluatorTable = Field(default_factory=EvaluatorTable)
    metrics: MetricsTable = Field(default_factory=MetricsTable)
    checkpoint: CheckpointTable = Field(default_factory=CheckpointTable)
    weights: WeightsTable = Field(default_factory=WeightsTable)
    bus: BusTable = Field(default_factory=BusTable)
    timeouts: TimeoutsTable = Field(default_factory=TimeoutsTable)
    journal: JournalTable = Field(default_factory=JournalTable)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.sft is None and self.train is None:
            raise ValueError("nothing to do: give [sft], [train] or both")
        named = [(name, t.dataset) for name, t in (("sft", self.sft), ("train", self.train)) if t is not None]
        if self.evaluation is not None:
            named += [(f"evaluation.suites.{name}", self.evaluation.dataset(name)) for name in self.evaluation.suites]
        for name, dataset in named:
            if dataset not in self.data:
                known = ", ".join(sorted(self.data)) or "none"
                raise ValueError(f"{name}.dataset is {dataset!r}, but the [data.NAME] tables are: {known}")
        self._check_evaluation()
        if self.train is not None and self.train.batch_size % self.train.minibatches:
            raise ValueError("train.batch_size must be a multiple of train.minibatches")
        self._check_step_size()
        for part in self.rewards.parts:
            if isinstance(part, LengthPart) and part.max_length - part.cache_length >= self.rollout.max_new_tokens:
                raise ValueError(
                    f"reward part {part.name!r} punishes from {part.max_length - part.cache_length} tokens on, but no "
                    f"completion has more than rollout.max_new_tokens = {self.rollout.max_new_tokens}: lower max_length"
                )
        if self.run.deterministic:
            if self.train is not None and self.train.max_staleness != 0:
                raise ValueError("run.deterministic wants train.max_staleness = 0")
            if self.rollout.replicas != 1:
                raise ValueError("run.deterministic wants rollout.replicas = 1")
            if self.judge == "evaluator" and self.evaluator.replicas != 1:
                raise ValueError("run.deterministic wants evaluator.replicas = 1")
        return self

    def _check_step_size(self) -> None:
        """A step goes to the policy as one message."""
        if self.train is None:
            return
        groups = self.train.batch_size // self.train.minibatches
        needed = groups * self.train.samples * self.rollout.max_new_tokens * TOKEN_BYTES
        if needed > self.bus.max_message_mb << 20:
            raise ValueError(
                f"a step's longest message ({groups} prompts x {self.train.samples} samples x "
                f"{self.rollout.max_new_tokens} tokens x {TOKEN_BYTES} bytes = {math.ceil(needed / (1 << 20))} MB) is "
                f"larger than bus.max_message_mb = {self.bus.max_message_mb}: raise that, raise train.minibatches, or "
                "lower train.batch_size, train.samples or rollout.max_new_tokens"
            )

    def _check_evaluation(self) -> None:
        stop = self.sft.stop if self.sft is not None else None
        if stop is not None and self.evaluation is None:
            raise ValueError("[sft.stop] judges held-out accuracy: give [evaluation] too")
        if stop is not None and self.evaluation is not None and stop.suite not in (None, *self.evaluation.suites):
            known = ", ".join(self.evaluation.suites)
            raise ValueError(f"sft.stop.suite is {stop.suite!r}, but the [evaluation.suites.NAME] tables are: {known}")
        if self.evaluator.engine == "own" and self.evaluation is None:
            raise ValueError('evaluator.engine = "own" wants something to judge: give [evaluation.suites.NAME] too')

    @property
    def judge(self) -> Literal["rollout", "evaluator"]:
        """The role whose replicas judge held-out accuracy."""
        return "evaluator" if self.evaluator.engine == "own" else "rollout"

    @property
    def stop_suite(self) -> str | None:
        """The suite that [sft.stop] looks at; None without such a rule."""
        if self.sft is None or self.sft.stop is None or self.evaluation is None:
            return None
        return self.sft.stop.suite or next(iter(self.evaluation.suites))
