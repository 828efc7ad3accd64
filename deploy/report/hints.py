"""What to try next: rules over a run's own figures. Pure; each rule is a function that may have one thing to say."""

from __future__ import annotations

import math
from collections.abc import Callable

from deploy.report.story import Story

RISING_SIGMA = 2.0
"""A trend counts when it is at least so many standard errors away from nothing."""


def hints(story: Story) -> list[str]:
    """One sentence each, the most useful first; never empty."""
    found = [hint for rule in RULES if (hint := rule(story)) is not None]
    return found or ["nothing stands out in the figures: a longer run, another seed, or a harder suite would tell more"]


def slope(values: list[float]) -> tuple[float, float]:
    """Least-squares slope per step of evenly spaced values, and its standard error; (0, inf) for fewer than 8."""
    n = len(values)
    if n < 8:
        return 0.0, math.inf
    middle, mean = (n - 1) / 2, math.fsum(values) / n
    spread = math.fsum((x - middle) ** 2 for x in range(n))
    rate = math.fsum((x - middle) * (y - mean) for x, y in enumerate(values)) / spread
    rest = math.fsum((y - mean - rate * (x - middle)) ** 2 for x, y in enumerate(values))
    return rate, math.sqrt(rest / (n - 2) / spread)


def _reward_rises(story: Story) -> str | None:
    stage = story.stage("train")
    if stage is None:
        return None
    values = stage.series("reward")[1]
    rate, error = slope(values[len(values) // 2 :])
    if rate > RISING_SIGMA * error:
        gain = rate * len(values) / 2
        return (
            f"the reward was still rising ({gain:+.3f} over the second half): more batches "
            f"(train.batches, now {stage.batches})"
        )
    if rate < -RISING_SIGMA * error:
        return (
            f"the reward fell over the second half ({rate * len(values) / 2:+.3f}): a lower train.lr "
            f"(now {story.recipe.train.lr:g}), or train.kl_weight above 0"  # type: ignore[union-attr]
        )
    return None


def _no_gain(story: Story) -> str | None:
    train = story.recipe.train
    for suite, pair in story.before_after.items():
        if train is None or len(pair) < 2:
            continue
        first, last = pair
        if last.low <= first.correct / first.n <= last.high and last.n < 500:
            return (
                f"accuracy on {suite} lies within its interval before and after: judge more rows "
                f"([evaluation.suites.{suite}] problems, now {last.n}) to see a difference of this size"
            )
    return None


def _truncated(story: Story) -> str | None:
    stage = story.stage("train")
    share = stage.mean("truncated", 20) if stage is not None else None
    if share is not None and share > 0.05:
        return (
            f"{100 * share:.0f} % of the last answers were cut off: raise rollout.max_new_tokens "
            f"(now {story.recipe.rollout.max_new_tokens}), or add a reward part that likes short answers"
        )
    return None


def _equal_groups(story: Story) -> str | None:
    stage = story.stage("train")
    if stage is None or story.recipe.train is None:
        return None
    last = stage.lines[-1]
    filtered = float(last.get("discarded/equal_rewards", 0))
    trained = stage.done * story.recipe.train.batch_size
    share = filtered / max(filtered + trained, 1)
    if share <= 0.4:
        return None
    reward = stage.mean("reward", 20)
    easy = reward is not None and reward > 0.5
    return (
        f"{100 * share:.0f} % of the prompt groups had equal rewards and taught nothing: "
        f"{'harder' if easy else 'easier'} data, or more train.samples a prompt (now {story.recipe.train.samples})"
    )


def _clipped(story: Story) -> str | None:
    stage = story.stage("train")
    share = stage.mean("clip_share") if stage is not None else None
    if share is not None and share > 0.2:
        return f"{100 * share:.0f} % of the tokens were clipped: a lower train.lr, or fewer passes (train.mu)"
    return None


def _mismatch(story: Story) -> str | None:
    stage = story.stage("train")
    off = stage.mean("mismatch_kl") if stage is not None else None
    if off is not None and off > 0.02:
        return (
            f"engine and trainer disagree about the sampled tokens (KL {off:.3f}): a lower train.max_staleness, "
            "or the same dtype on both sides; the policy's log says what is likely the cause"
        )
    return None


def _entropy(story: Story) -> str | None:
    stage = story.stage("train")
    if stage is None:
        return None
    values = stage.series("entropy")[1]
    if len(values) >= 20 and values[0] > 0 and sum(values[-10:]) / 10 < 0.1 * sum(values[:10]) / 10:
        return "the entropy fell below a tenth of where it began: a higher train.clip_high, or train.kl_weight above 0"
    return None


def _who_waits(story: Story) -> str | None:
    stage = story.stage("train")
    times = stage.times if stage is not None else {}
    policy, rollout = times.get("policy", {}).get("wait", 0.0), times.get("rollout", {}).get("wait", 0.0)
    judging = times.get("rollout", {}).get("reward", 0.0)
    if judging > 0.3:
        workers = story.recipe.rewards.workers
        return f"rollouts spent {100 * judging:.0f} % of their time on rewards: more rewards.workers (now {workers})"
    if policy > 0.4 and policy > rollout:
        return f"the policy waited {100 * policy:.0f} % of its time for samples: more rollout.replicas or rollout.slots"
    if rollout > 0.4 and stage is not None and story.recipe.train is not None:
        bound = story.recipe.train.max_staleness
        return (
            f"rollouts waited {100 * rollout:.0f} % of their time for the policy: train.max_staleness {bound + 1} "
            f"(now {bound}) lets them run further ahead, policy.threads makes it faster"
        )
    return None


def _stopped_early(story: Story) -> str | None:
    stage = story.stages[-1] if story.stages else None
    if stage is not None and stage.done < stage.batches and stage.name == "train":
        return f"the run ended at batch {stage.done} of {stage.batches}: 'orrery resume {story.folder.name}' goes on"
    return None


Rule = Callable[[Story], str | None]
RULES: tuple[Rule, ...] = (
    _stopped_early,
    _reward_rises,
    _truncated,
    _equal_groups,
    _no_gain,
    _clipped,
    _entropy,
    _mismatch,
    _who_waits,
)
