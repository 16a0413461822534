"""What a response's score is charged with before it becomes a reward: length, a missing end, outliers."""

from __future__ import annotations

from torch import Tensor

from stages.config import AUTO, PpoConfig
from stages.maths.rewards import RunningMoments, charge_missing_eos, clip_score, length_penalty
from stages.rollout.experience import Experience
from stages.training.session import Session

MOMENTS = ("scores_count", "scores_mean", "scores_m2")  # of all scores so far, among the facts of a run's progress


def charge_scores(session: Session, experience: Experience) -> Tensor:
    """Scores (B,) as they enter the rewards: normalised, charged for length and for a missing end, then clipped."""
    config: PpoConfig = session.config
    score = normalise(session, experience.score) if config.normalise_scores else experience.score
    if config.length_penalty:
        lengths = experience.mask.sum(dim=1)
        score = score - length_penalty(lengths, config.length_limit, config.length_penalty)
    ended = experience.rollout.ended.to(score.device)
    how = decide_missing_eos(session, ended) if config.missing_eos == AUTO else config.missing_eos
    score = charge_missing_eos(score, ended, config.missing_eos_penalty, how)
    return score if config.score_clip is None else clip_score(score, config.score_clip)


def normalise(session: Session, score: Tensor) -> Tensor:
    """Scores (B,) by the running mean and standard deviation of all that were seen, these included."""
    facts = session.progress.facts
    moments = RunningMoments(*(facts.get(name, 0.0) for name in MOMENTS)).updated(score, session.ranks.sum)
    facts |= dict(zip(MOMENTS, (moments.count, moments.mean, moments.m2), strict=True))
    return moments.normalise(score)


def decide_missing_eos(session: Session, ended: Tensor) -> str:
    """What `missing_eos` auto means for this run, decided by its first rollout.

    A floor keeps a policy that ends its responses from giving that up for a higher score. If responses do not end
    anyway, because the text goes on beyond max_response_tokens, a floor would leave nothing of the score to learn from.
    """
    facts = session.progress.facts
    if "responses_end" not in facts:
        own = {"ended": float(ended.sum()), "all": float(len(ended))}
        counts = session.ranks.sum_floats(own, session.base.device)
        facts["responses_end"] = float(counts["ended"] >= 0.5 * counts["all"])
    return "floor" if facts["responses_end"] else "subtract"
