"""Metrics of a PPO update's rollout, over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.maths.advantages import dead_groups
from stages.maths.kl import k3, sequence_kl
from stages.maths.statistics import correlation, explained_variance, repeated_ngrams, shared_response_rate
from stages.rollout.clipped import ExperienceWithAdvantages
from stages.rollout.experience import Experience, Rollout
from stages.training.devices import Ranks
from stages.training.session import Session

REPEATED_RUN, REPEATED_WITHIN = 3, 64  # tokens: length of a repeated n-gram, and the distance within which it counts


def summarise_rollout(
    session: Session, judged: ExperienceWithAdvantages, score: Tensor, groups: Tensor
) -> dict[str, float]:
    """A rollout's metrics; `score` (B,) after `charge_scores`, `groups` (B,) the number of each response's prompt."""
    experience, ranks, config = judged.experience, session.ranks, session.config
    rollout, kl_coef = experience.rollout, session.progress.facts["kl_coef"]
    texts, prompts, columns = gather_columns(ranks, rollout, numbers_by_response(experience, score))
    mean = {name: float(values.mean()) for name, values in columns.items()}
    metrics = {
        "reward_score": mean["score"],
        "reward_score_std": float(columns["score"].std(unbiased=False)),
        "reward_kl": mean["kl"],
        "reward_kl_std": float(columns["kl"].std(unbiased=False)),
        "reward_total": mean["charged"] - kl_coef * mean["kl"],
        "kl_k3": mean["k3"],
        "kl_coef": kl_coef,
        "entropy": float(columns["entropy"].sum() / columns["length"].sum()),
        "response_length": mean["length"],
        "eos_rate": mean["ended"],
        "truncated_rate": 1 - mean["ended"],
        "duplicate_rate": 1 - len(set(texts)) / len(texts),
        "shared_response_rate": shared_response_rate(texts, prompts),
        "repetition_rate": float(columns["repeated"].sum() / columns["runs"].sum().clamp(min=1)),
        "score_length_corr": correlation(columns["score"], columns["length"]),
    }
    if config.advantage == "gae":
        metrics["explained_variance"] = measure_explained_variance(ranks, experience, judged.returns)
    if config.responses_per_prompt > 1:
        metrics["dead_group_rate"] = dead_groups(score, groups, ranks.sum)
    for name in (name for name in columns if name.startswith("source_")):
        metrics |= {name: mean[name], f"{name}_std": float(columns[name].std(unbiased=False))}
    return metrics | {
        "sampling_mismatch": ranks.max(experience.mismatch, session.base.device),
        "tokens": float(columns["tokens"].sum()),
        "samples": float(len(texts)),
    }


def numbers_by_response(experience: Experience, score: Tensor) -> dict[str, list[float]]:
    """Named columns with a number for each of this rank's responses."""
    rollout, mask = experience.rollout, experience.mask
    repeats = [repeated_ngrams(r.tolist(), REPEATED_RUN, REPEATED_WITHIN) for r in rollout.responses]
    return {
        **{f"source_{name}": scores.tolist() for name, scores in experience.by_source.items()},
        "score": experience.score.tolist(),
        "charged": score.tolist(),
        "kl": sequence_kl(experience.logprobs, experience.reference_logprobs, mask).tolist(),
        "k3": k3(experience.logprobs, experience.reference_logprobs).masked_fill(~mask, 0).sum(-1).tolist(),
        "entropy": experience.entropy.masked_fill(~mask, 0).sum(-1).tolist(),
        "length": [float(n) for n in rollout.lengths],
        "ended": rollout.ended.double().tolist(),
        "tokens": [float(n) for n in rollout.sizes],
        "repeated": [float(repeated) for repeated, _ in repeats],
        "runs": [float(runs) for _, runs in repeats],
    }


def gather_columns(
    ranks: Ranks, rollout: Rollout, columns: dict[str, list[float]]
) -> tuple[tuple[str, ...], tuple[int, ...], dict[str, Tensor]]:
    """Texts, a hash of each prompt, and the columns (N,) float64, of all ranks' responses."""
    prompts = [hash(tuple(p.ids.tolist())) for p in rollout.prompts]  # hashes of integers are the same on every rank
    rows = [list(row) for row in zip(rollout.texts, prompts, *columns.values(), strict=True)]
    texts, prompts, *values = zip(*ranks.gather(rows), strict=True)
    return texts, prompts, {n: torch.tensor(v, dtype=torch.float64) for n, v in zip(columns, values, strict=True)}


def measure_explained_variance(ranks: Ranks, experience: Experience, returns: Tensor) -> float:
    """Share of the returns' variance that the critic's values explain, over the tokens of all ranks."""
    columns = (x[experience.mask].tolist() for x in (experience.values, returns))
    values, goals = (torch.tensor(ranks.gather(numbers), dtype=torch.float64) for numbers in columns)
    return explained_variance(values, goals)
