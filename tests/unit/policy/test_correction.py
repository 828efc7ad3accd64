"""Importance weights against what they are for: expectations under the trainer from the engine's samples."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from services.policy.correction import Correction, CorrectionSettings, Level, importance_weights, outside_band

WIDE = (0.0, 1e9)


def settings(correction: Correction, level: Level, band: tuple[float, float] = (0.5, 2.0)) -> CorrectionSettings:
    return CorrectionSettings(correction, level, *band)


class Chains:
    """All sequences of two tokens out of three, with the log-probabilities that two distributions give their tokens."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        first = torch.log_softmax(torch.randn(2, 3, generator=generator, dtype=torch.float64), -1)
        second = torch.log_softmax(torch.randn(2, 3, 3, generator=generator, dtype=torch.float64), -1)
        pairs = list(product(range(3), repeat=2))
        self.trainer, self.engine = (
            torch.stack([torch.stack([first[m, a], second[m, a, b]]) for a, b in pairs]) for m in (0, 1)
        )
        self.values = torch.randn(len(pairs), generator=generator, dtype=torch.float64)

    def expected(self, level: Level) -> tuple[float, float]:
        """The mean of `values` under the trainer, and what the engine's samples with unbounded weights tell of it."""
        lengths = torch.full((len(self.values),), 2)
        weights = importance_weights(
            (self.trainer - self.engine).flatten(), lengths, settings("truncate", level, WIDE)
        ).weights
        true = (self.trainer.sum(-1).exp() * self.values).sum()
        told = (self.engine.sum(-1).exp() * self.values * weights.view(-1, 2)[:, 1]).sum()
        return float(true), float(told)


@pytest.mark.parametrize("seed", range(5))
def test_weights_of_sequences_leave_no_bias_and_weights_of_tokens_forget_the_prefix(seed: int) -> None:
    chains = Chains(seed)
    true, told = chains.expected("sequence")
    assert told == pytest.approx(true, abs=1e-12)
    true, told = chains.expected("token")
    assert abs(told - true) > 1e-3


def test_truncation_bounds_the_weights_from_above_alone() -> None:
    log_ratio = torch.tensor([0.1, 3.0, 1.0]).log()
    found = importance_weights(log_ratio, torch.tensor([3]), settings("truncate", "token"))
    torch.testing.assert_close(found.weights, torch.tensor([0.1, 2.0, 1.0]))
    assert found.cut.tolist() == [False, True, False]


def test_masking_leaves_out_what_is_outside_the_band_on_either_side() -> None:
    log_ratio = torch.tensor([0.1, 3.0, 1.5]).log()
    found = importance_weights(log_ratio, torch.tensor([3]), settings("mask", "token"))
    torch.testing.assert_close(found.weights, torch.tensor([0.0, 0.0, 1.5]))
    assert found.cut.tolist() == [True, True, False]


def test_a_sequence_is_masked_as_a_whole_and_leaves_its_neighbours_alone() -> None:
    log_ratio = torch.tensor([1.5, 1.5, 0.9, 0.8, 1.1]).log()  # products 2.25, none, 0.72, 1.1
    found = importance_weights(log_ratio, torch.tensor([2, 0, 2, 1]), settings("mask", "sequence"))
    torch.testing.assert_close(found.weights, torch.tensor([0.0, 0.0, 0.72, 0.72, 1.1]))
    assert found.cut.tolist() == [True, True, False, False, False]


def test_without_correction_the_mismatch_is_still_counted() -> None:
    log_ratio = torch.tensor([0.1, 3.0, 1.5]).log()
    off = settings("none", "token")
    found = importance_weights(log_ratio, torch.tensor([3]), off)
    assert found.weights.tolist() == [1.0, 1.0, 1.0] and not found.cut.any()
    assert outside_band(log_ratio, off).tolist() == [True, True, False]


@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_a_token_that_one_of_both_thinks_impossible_gives_a_finite_weight(correction: Correction) -> None:
    log_ratio = torch.tensor([float("inf"), float("-inf"), 500.0])
    found = importance_weights(log_ratio, torch.tensor([3]), settings(correction, "token", WIDE))
    assert torch.isfinite(found.weights).all()
