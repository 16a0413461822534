"""Changes to a response's score before it becomes a reward: normalisation, length, missing EOS, clipping."""

from __future__ import annotations

from torch import Tensor

from stages.config import AUTO, PpoConfig
from stages.maths.rewards import RunningMoments, charge_missing_eos, length_penalty
from stages.rollout.experience import Experience
from stages.training.session import Session

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
