"""What a simulated group's payload says: which attempt it is, and which weights sampled it; and the chain of states.

A *chain* names a model state by everything that went into it: the initial one, then a hash for each applied step of the
chain before, the assignment and the samples in it. Equal chains are equal weights.
"""

from __future__ import annotations

import json
from hashlib import blake2b

import msgspec

from shared.messages import ArrayHeader, Grant, TrainStep

INITIAL = "initial"


class Stretch(msgspec.Struct, frozen=True):
    """Tokens that one attempt at a group sampled with the weights `chain`, of `version`."""

    attempt: int
    version: int
    chain: str


class Sampled(msgspec.Struct, frozen=True):
    """The payload of one group, or of what was handed over of it: the weights that sampled it, stretch by stretch."""

    group: int
    attempt: int
    stretches: list[Stretch]
    content: str

    @property
    def oldest(self) -> int:
        """The oldest version of its tokens."""
        return min(stretch.version for stretch in self.stretches)


def digest(*parts: object) -> str:
    """A short hash."""
    return blake2b(repr(parts).encode(), digest_size=6).hexdigest()


def sample(grant: Grant, stretches: list[Stretch], composition: tuple[tuple[int, int], ...]) -> Sampled:
    """What these weights answer to this row; `composition` is what was decoded beside it, where that matters."""
    chains = [stretch.chain for stretch in stretches]
    content = digest(chains, grant.dataset, grant.row, grant.seed, grant.sampling, composition)
    return Sampled(grant.group, grant.attempt, stretches, content)


def encode(sampled: Sampled) -> tuple[list[ArrayHeader], list[bytes]]:
    """Headers and frames of a report."""
    frame = msgspec.msgpack.encode(sampled)
    return [ArrayHeader("tokens", "uint8", [len(frame)])], [frame]


def decode(frame: bytes | memoryview) -> Sampled:
    """The payload behind a frame."""
    return msgspec.msgpack.decode(frame, type=Sampled)


def rewards(content: str, samples: int) -> list[float]:
    """Rewards that differ in most groups."""
    return [float(int(content[i], 16) % 3 == 0) for i in range(samples)]


def gradient(chain: str, step: TrainStep, sampled: list[Sampled], *, finite: bool) -> str:
    """What a member learns from its share, beginning from its state; a joiner has no share, and brings no state."""
    parts = [
        (g.group, s.content, g.advantages, g.temperature, g.lengths) for s, g in zip(sampled, step.groups, strict=True)
    ]
    return json.dumps([parts, [chain] if parts else [], finite])


def combine(gradients: list[str]) -> str:
    """The sum over members: it is the same whoever computed which share."""
    told = [json.loads(each) for each in gradients]
    parts = sorted(part for parts, _, _ in told for part in parts)
    return json.dumps([parts, sorted({chain for _, chains, _ in told for chain in chains}), all(t[2] for t in told)])


def finite(total: str) -> bool:
    """Whether a sum is of finite numbers."""
    return bool(json.loads(total)[2])


def apply(chain: str, step: TrainStep, total: str) -> str:
    """The state after a step: what was learnt, from which state, with which hyper-parameters."""
    parts, chains, _ = json.loads(total)
    if chains != [chain]:
        chain = f"{chain}, moved by gradients of {chains}"
    rest = (step.stage, step.index, step.steps_in_batch, step.tokens, step.sequences)
    return digest(chain, [part[1:] for part in parts], rest, sorted(step.hyperparameters.items()))
