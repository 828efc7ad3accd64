"""Prompt groups in flight: from a granted lease to n finished samples.

Owned by the loop of an `EngineService`; stands between the leases that the controller grants and the engine that
answers prompts. Invariant: a known attempt is one group here, which leaves exactly once - finished, revoked, or
interrupted with the tokens that it has.

In a deterministic run the grants of one `Lease` message are one unit: submitted together, in order, once the unit
before has left the engine, so that the engine's batches are composed alike in every run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shared.data.chat import PromptTooLong, encode_prompt
from shared.data.dataset import DataError, Dataset
from shared.engines.base import Begun, Engine, Finished, Request
from shared.messages import Grant, LeaseRef

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Cause = Literal["handed_back", "row_invalid", "prompt_too_long", "reward_failed"]


class GrantRejected(Exception):
    """A grant that cannot be worked on, with the cause that goes back to the controller."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause


@dataclass(slots=True, eq=False)
class Group:
    """A granted prompt group: its encoded prompt, and its samples as they finish, by sample index.

    `begun` is what others have sampled of it (empty, or an entry a sample); `question` and `answer` are the row's,
    for a person who reads the samples.
    """

    grant: Grant
    prompt: list[int]
    started: float
    samples: list[Finished | None]
    begun: Sequence[Begun | None] = ()
    seconds: float = 0.0
    question: str = ""
    answer: str = ""

    @property
    def ref(self) -> LeaseRef:
        """The attempt that it answers."""
        return LeaseRef(self.grant.group, self.grant.attempt)

    def finished(self) -> list[Finished]:
        """All samples, in order; only for a group that has left the engine."""
        return [sample for sample in self.samples if sample is not None]

    def so_far(self) -> list[Begun | None]:
        """What has come out of the engine, as tokens that another one can go on from."""
        return [Begun(s.tokens, s.logprobs, s.versions) if s is not None else None for s in self.samples]

    def newest(self) -> int:
        """The newest version that sampled a token under this lease; the lease's own if none was needed any more."""
        counts = [len(begun.tokens) if begun is not None else 0 for begun in self.begun] or [0] * len(self.samples)
        added = [s.versions[count:] for s, count in zip(self.finished(), counts, strict=True)]
        return max((int(versions.max()) for versions in added if len(versions)), default=self.grant.version)


class Generation:
    """Runs groups through `engine`, whose version must be set; `datasets` are those that grants may name."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        datasets: Mapping[str, Dataset],
        *,
        deterministic: bool,
    ) -> None:
        self.engine = engine
        self._tokenizer = tokenizer
        self._datasets = datasets
        self._deterministic = deterministic
        self._groups: dict[LeaseRef, Group] = {}
        self._waiting: deque[Sequence[Group]] = deque()
        self._inside: set[LeaseRef] = set()

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def groups(self) -> list[Group]:
        """The groups in hand, oldest first."""
        return list(self._groups.values())

    def prepare(self, grant: Grant, begun: Sequence[Begun | None] = ()) -> Group:
        """Open the grant's row and encode its prompt; its samples go on from `begun`. Raises `GrantRejected`."""
        dataset = self._datasets.get(grant.dataset)
        if dataset is None or dataset.identity.fingerprint != grant.fingerprint:
            seen = "none of that name" if dataset is None else f"fingerprint {dataset.identity.fingerprint}"
            raise GrantRejected(
                "row_invalid", f"expected data set {grant.dataset!r} with fingerprint {grant.fingerprint}, found {seen}"
            )
        room = self.engine.context - grant.sampling.max_new_tokens
        try:
            row = dataset.row(grant.row)
            prompt = encode_prompt(self._tokenizer, row, max(1, room))
        except PromptTooLong as error:
            kept = f"{grant.sampling.max_new_tokens} of {self.engine.context} tokens are kept for the response"
            raise GrantRejected("prompt_too_long", f"{error} ({kept})") from error
        except DataError as error:
            raise GrantRejected("row_invalid", str(error)) from error
        except Exception as error:  # rows come from foreign generators and files
            raise GrantRejected("row_invalid", f"{type(error).__name__}: {error}") from error
        samples: list[Finished | None] = [None] * grant.samples
        asked = row.messages[-1]["content"]
        return Group(grant, prompt, time.monotonic(), samples, begun, question=asked, answer=row.answer)

    def start(self, groups: Sequence[Group]) -> None:
        """Take the prepared groups of one `Lease` message."""
        self._groups.update((group.ref, group) for group in groups)
        self._waiting.append(groups)
        self._submit()

    def advance(self) -> list[Group]:
        """Let the engine do one step; returns the groups whose last sample finished in it."""
        done: list[Group] = []
        for sample in self.engine.advance():
            group = self._groups[LeaseRef(*sample.key)]
            group.samples[sample.sample] = sample
            if None not in group.samples:
                group.seconds = time.monotonic() - group.started
                done.append(group)
        for group in done:
            self._forget(group.ref)
        if done:
            self._submit()
        return done

    def revoke(self, refs: Iterable[LeaseRef]) -> None:
        """Drop these attempts; unknown ones are ignored."""
        for ref in refs:
            if ref in self._groups:
                self.engine.abort((ref.group, ref.attempt))
                self._forget(ref)
        self._submit()

    def interrupt(self, group: Group) -> list[Begun | None]:
        """Drop a group in hand; what each of its samples has so far."""
        so_far = dict(enumerate(group.begun)) | self.engine.abort((group.ref.group, group.ref.attempt))
        self._forget(group.ref)
        self._submit()
        return [mine or so_far.get(index) for index, mine in enumerate(group.so_far())]

    def _forget(self, ref: LeaseRef) -> None:
        del self._groups[ref]
        self._inside.discard(ref)

    def _submit(self) -> None:
        """Hand to the engine what may enter it now."""
        while self._waiting and not (self._deterministic and self._inside):
            for group in self._waiting.popleft():
                if group.ref not in self._groups:  # revoked while it waited
                    continue
                grant = group.grant
                key = (grant.group, grant.attempt)
                request = Request(key, group.prompt, grant.samples, grant.sampling, grant.seed, begun=group.begun)
                self.engine.submit(request)
                self._inside.add(group.ref)
