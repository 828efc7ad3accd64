"""SFT leases: from a leased row to the tokens of its prompt and worked answer. Called by the service.

Invariant: every grant is answered at once, by a report with its arrays or by the cause why there will be none.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
from transformers import PreTrainedTokenizerBase

from shared.arrays import Frame, pack
from shared.data.chat import PromptTooLong, encode_prompt, encode_response
from shared.data.dataset import DataError, Dataset
from shared.messages import Grant, GroupReport, LeaseReturned


class SftRows:
    """Answers grants of purpose "sft" from open data sets; `context` is the most tokens that the model takes."""

    def __init__(self, datasets: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        self._datasets = datasets
        self._tokenizer = tokenizer
        self._context = context

    def answer(self, grant: Grant) -> tuple[GroupReport | LeaseReturned, list[Frame]]:
        """The report of the row as one sample, with payload frames, or the lease returned with its cause."""
        started = time.perf_counter()
        try:
            prompt, response = self._encode(grant)
        except PromptTooLong as error:
            return LeaseReturned(grant.group, grant.attempt, grant.lineage, "prompt_too_long", str(error)), []
        except DataError as error:
            return LeaseReturned(grant.group, grant.attempt, grant.lineage, "row_invalid", str(error)), []
        arrays, frames = pack(
            {
                "prompt": np.array(prompt, dtype=np.int32),
                "tokens": np.array(response, dtype=np.int32),
                # nobody sampled a worked answer: there is no engine to compare with
                "logprobs": np.zeros(len(response), dtype=np.float32),
                "versions": np.full(len(response), grant.version, dtype=np.int32),
            }
        )
        report = GroupReport(
            group=grant.group,
            attempt=grant.attempt,
            lineage=grant.lineage,
            rewards=[0.0],
            parts={},
            prompt_length=len(prompt),
            lengths=[len(response)],
            truncated=[False],
            oldest=grant.version,
            newest=grant.version,
            seconds=time.perf_counter() - started,
            arrays=arrays,
        )
        return report, frames

    def _encode(self, grant: Grant) -> tuple[list[int], list[int]]:
        dataset = self._datasets.get(grant.dataset)
        if dataset is None:
            known = ", ".join(sorted(self._datasets)) or "none"
            raise DataError(f"expected one of the data sets opened here ({known}), got a lease on {grant.dataset!r}")
        if dataset.identity.fingerprint != grant.fingerprint:
            raise DataError(
                f"data set {grant.dataset!r}: the lease is on fingerprint {grant.fingerprint}, "
                f"but here it is {dataset.identity.fingerprint}; give all services the same data"
            )
        row = dataset.row(grant.row)
        response = encode_response(self._tokenizer, row)
        prompt = encode_prompt(self._tokenizer, row, self._context)
        if len(prompt) + len(response) > self._context:
            raise PromptTooLong(
                f"row {row.index}: expected prompt and worked answer within {self._context} tokens, "
                f"got {len(prompt)} + {len(response)}; leave such rows out, or use a model with a longer context"
            )
        return prompt, response
