"""[policy], [rollout] and [evaluator]: the services of a run, their number and what each may use."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from shared.config.schema.base import LIVE, Positive, Table

EngineName = Literal["transformers", "vllm", "sglang"]
"""What can generate."""
InFlight = Literal["keep", "recompute", "abort"]
"""What becomes of sequences that are being generated when new weights come."""
Quantization = Literal["fp8", "fp8_block", "mxfp8", "mxfp4", "nvfp4"]
"""Formats that a rollout may keep its weights in."""


class PolicyParallelTable(Table):
    """[policy.parallel]: how many ranks (processes) hold one policy replica, and what each of them has of it."""

    pp: Positive = Field(1, description="ranks that share the layers among them (pipeline parallelism)")
    replicate: Positive = Field(1, description="copies of all weights that share the samples (data parallelism)")
    fsdp: Positive = Field(1, description="ranks that share the samples and keep a part of each weight (FSDP2)")
    ep: Positive = Field(1, description="ranks that share the samples and the experts (expert parallelism)")
    cp: Positive = Field(1, description="ranks that share each sequence (context parallelism)")
    tp: Positive = Field(1, description="ranks that share each layer (tensor parallelism)")
    sequence: bool = Field(False, description="between layers each tp rank keeps its part of the sequence")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.sequence and self.tp == 1:
            raise ValueError("sequence = true shares activations among tp ranks: give tp of 2 or more, or leave it out")
        return self

    @property
    def ranks(self) -> int:
        """Processes of one replica."""
        return self.pp * self.replicate * self.fsdp * self.ep * self.cp * self.tp


class PolicyTable(Table):
    """[policy]: who learns."""

    replicas: Positive = Field(1, description="policies that share every step; the first step waits for them")
    threads: Positive = Field(1, description="CPU threads of the trainer")
    micro_batch_tokens: Positive = Field(16384, description="tokens in one forward pass")
    gradient_checkpointing: bool = Field(
        False, description="keep a layer's input alone and compute the layer again in backward: less memory, more time"
    )
    compile: bool = Field(
        False,
        description="compute decoder layers by torch.compile: faster steps, a slow first one; wants a C++ compiler",
    )
    optimizer_offload: bool = Field(
        False, description="keep the optimizer's state in the host's memory: a GPU has room for more, steps take longer"
    )
    parallel: PolicyParallelTable = PolicyParallelTable()
    nodes: Positive = Field(1, description="nodes of a cluster that the ranks of a replica are on, as many on each")

    @model_validator(mode="after")
    def _nodes_are_even(self) -> Self:
        if self.parallel.ranks % self.nodes:
            raise ValueError(
                f"nodes = {self.nodes} cannot have as many ranks each: the product of policy.parallel is "
                f"{self.parallel.ranks}"
            )
        return self


class EngineParallelTable(Table):
    """[rollout.parallel]: how many processes hold one replica's model (vLLM and SGLang)."""

    tp: Positive = Field(1, description="ranks that share each layer (tensor parallelism)")
    pp: Positive = Field(1, description="ranks that share the layers among them (pipeline parallelism)")
    ep: Positive = Field(1, description="ranks that share the experts: 1, or all of tp (expert parallelism)")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.ep not in (1, self.tp):
            raise ValueError(f"expected ep of 1 or of tp = {self.tp}, got {self.ep}")
        return self

    @property
    def ranks(self) -> int:
        """Processes of one replica's engine."""
        return self.tp * self.pp


class RolloutTable(Table):
    """[rollout]: who generates, and how."""

    replicas: int = Field(
        1, ge=0, description="replicas that generate; the first lease waits for them. 0 for SFT that nobody judges"
    )
    engine: EngineName | list[EngineName] = Field(
        "transformers", description="what generates; of several names, replica 0 takes the first, and so on in turn"
    )
    in_flight: InFlight = Field(
        "keep",
        description='when new weights come, sequences in flight go on with their keys and values ("keep"), have them '
        'computed again ("recompute"), or begin again ("abort")',
    )
    quantization: Quantization | None = Field(
        None, description="format of the weights that generate; evaluators of their own keep full precision"
    )
    serve: int | None = Field(
        None,
        ge=1024,
        le=65000,
        description="port of loopback at which replica 0 answers OpenAI-compatible requests with the model in "
        "training, replica 1 at the next, and so on (vLLM and SGLang)",
    )
    memory: float = Field(
        0.85, gt=0, lt=1, description="share of a GPU's memory that vLLM or SGLang may take for weights and cache"
    )
    threads: Positive = Field(1, description="CPU threads of the engine")
    parallel: EngineParallelTable = EngineParallelTable()
    slots: Positive = Field(64, description="sequences decoded side by side")
    temperature: float = Field(1.0, gt=0, le=10, json_schema_extra=LIVE)
    top_p: float = Field(1.0, gt=0, le=1, json_schema_extra=LIVE)
    top_k: int = Field(0, ge=0, json_schema_extra=LIVE)
    max_new_tokens: Positive = Field(64, json_schema_extra=LIVE)

    @field_validator("engine", mode="before")
    @classmethod
    def _known_engines(cls, engine: object) -> object:
        names = engine if isinstance(engine, list) else [engine]
        known = get_args(EngineName)
        if not names or any(name not in known for name in names):
            raise ValueError(f"expected one of {', '.join(known)}, or a list of them")
        return engine

    @property
    def engines(self) -> list[EngineName]:
        """The engines in the order in which replicas take them."""
        return self.engine if isinstance(self.engine, list) else [self.engine]

    def engine_of(self, replica: str) -> EngineName:
        """What a replica of this name ("rollout-2") generates with."""
        return self.engines[_number(replica) % len(self.engines)]

    def world_of(self, replica: str) -> int:
        """Ranks of a replica of this name: its own process, and those of its engine that hold the model."""
        return 1 if self.engine_of(replica) == "transformers" else 1 + self.parallel.ranks

    def port_of(self, replica: str) -> int | None:
        """Where a replica of this name answers people, if it does."""
        return self.serve + _number(replica) if self.serve is not None else None


def _number(replica: str) -> int:
    number = replica.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


class EvaluatorTable(Table):
    """[evaluator]: who judges held-out accuracy."""

    engine: Literal["fleet", "own"] = Field(
        "fleet", description='"fleet": the rollouts judge between their samples; "own": replicas that do nothing else'
    )
    replicas: Positive = Field(1, description='replicas of the evaluator service with engine = "own"')
    threads: Positive = Field(1, description="CPU threads of an evaluator")
    slots: Positive = Field(64, description="sequences decoded side by side")
