"""Changes to a response's score before it becomes a reward: normalisation, length, missing EOS, clipping."""

from __future__ import annotations

import math

from torch import Tensor

from stages.config import AUTO, PpoConfig
from stages.maths.rewards import RunningMoments, charge_missing_eos, length_penalty
from stages.rollout.experience import Experience
from stages.rollout.reward_sources import RewardSources
from stages.training.session import Session

# Of scores in the first rollout; below 0.02 lies no reward of 0 or 1 that any of 2,000 responses got.
SMALLEST_STD, LARGEST_STD = 0.02, 10.0
ROUNDING = 1e-6  # standard deviation of equal scores, at most
MOMENTS = ("scores_count", "scores_mean", "scores_m2")  # of all scores so far, in the facts of a run's progress


def charge_scores(session: Session, experience: Experience) -> Tensor:
    """Scores (B,) that enter the rewards: normalised, minus penalties for length and missing EOS, then clipped."""
    config: PpoConfig = session.config
    score = normalise(session, experience.score) if config.normalise_scores else experience.score
    if config.length_penalty:
        lengths = experience.mask.sum(dim=1)
        score = score - length_penalty(lengths, config.length_limit, config.length_penalty)
    ended = experience.rollout.ended.to(score.device)
    rule = decide_missing_eos(session, ended) if config.missing_eos == AUTO else config.missing_eos
    score = charge_missing_eos(score, ended, config.missing_eos_penalty, rule)
    return score if config.score_clip is None else score.clamp(-config.score_clip, config.score_clip)


def normalise(session: Session, score: Tensor) -> Tensor:
    """Scores (B,) normalised by the mean and standard deviation of all scores so far, these included."""
    facts = session.progress.facts
    moments = RunningMoments(*(facts.get(name, 0.0) for name in MOMENTS)).updated(score, session.ranks.sum)
    facts |= dict(zip(MOMENTS, (moments.count, moments.mean, moments.m2), strict=True))
    return moments.normalise(score)


def warn_of_spreads(session: Session, rewards: RewardSources, metrics: dict[str, float], step: int) -> None:
    """Warn of sources whose scores, times their weights, have a standard deviation far from 1 in the first rollout.

    Equal scores are left to the conditions that are watched.
    """
    if step or session.config.normalise_scores:
        return
    named = zip(rewards.specs, rewards.names, strict=True)
    stds = [abs(spec.weight) * metrics.get(f"source_{name}_std", 0.0) for spec, name in named]
    for spec, std in zip(rewards.specs, stds if len(stds) > 1 else [metrics["reward_score_std"]], strict=True):
        if std > ROUNDING and not SMALLEST_STD <= std <= LARGEST_STD:
            weight = spec.weight * 10.0 ** -round(math.log10(std))
            session.reporter.warn(
                f"scores of {spec.flag} {spec.name} have a standard deviation of {std:.3g} in the first rollout; "
                "learning rates, kl_coef and the critic suit about 1: give it another weight, "
                f"{spec.flag} {spec.name}={weight:g}, or --normalise-scores"
            )


def decide_missing_eos(session: Session, ended: Tensor) -> str:
    """The rule that `missing_eos` auto stands for in this run, decided by its first rollout.

    If most of its responses end, a floor keeps the policy from trading EOS for a higher score. If they do not, because
    the text is longer than max_response_tokens, a floor would remove the score as a learning signal.
    """
    facts = session.progress.facts
    if "responses_end" not in facts:
        counts = {"ended": float(ended.sum()), "all": float(len(ended))}
        counts = session.ranks.sum_floats(counts, session.base.device)
        facts["responses_end"] = float(counts["ended"] >= 0.5 * counts["all"])
    return "floor" if facts["responses_end"] else "subtract"
