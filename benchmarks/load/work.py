"""The work that load processes hand in: prompt groups of one shape, made beforehand."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from shared.messages import ArrayHeader, DatasetIdentity, Grant, GroupReport

DATASET = DatasetIdentity(name="load", length=1_000_000, fingerprint="0" * 16)
DIGEST = "0" * 16
SAMPLES = 64
TOKENS = 512
"""Response tokens of every sample of a group at full size."""


@dataclass(frozen=True)
class Work:
    """Groups of `samples` x `tokens`: a report, and the same raw frames each time (four bytes an element)."""

    samples: int = SAMPLES
    tokens: int = TOKENS
    prompt: int = 64
    payload: list[bytes] = field(init=False)
    _headers: list[ArrayHeader] = field(init=False)

    def __post_init__(self) -> None:
        """Make the frames: prompt, tokens, log-probs, versions."""
        tokens = self.samples * self.tokens
        lengths = {"prompt": self.prompt, "tokens": tokens, "logprobs": tokens, "versions": tokens}
        headers = [ArrayHeader(name, "float32" if name == "logprobs" else "int32", [n]) for name, n in lengths.items()]
        object.__setattr__(self, "_headers", headers)
        object.__setattr__(self, "payload", [os.urandom(4 * length) for length in lengths.values()])

    @property
    def size(self) -> int:
        """Bytes of one group's frames."""
        return sum(map(len, self.payload))

    def report(self, grant: Grant) -> GroupReport:
        """The report that answers a grant; every sample has another reward."""
        rewards = [index / self.samples for index in range(self.samples)]
        return GroupReport(
            group=grant.group,
            attempt=grant.attempt,
            lineage=grant.lineage,
            rewards=rewards,
            parts={"verifier": rewards},
            prompt_length=self.prompt,
            lengths=[self.tokens] * self.samples,
            truncated=[False] * self.samples,
            oldest=grant.version,
            newest=grant.version,
            seconds=1.0,
            arrays=self._headers,
        )
