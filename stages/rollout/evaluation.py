"""Measures of policies on prompts: score, KL and repetition of responses, sampled with the same noise for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.maths.best_of import best_of_kl, best_of_weights
from stages.maths.statistics import distinct_ngrams, mean_with_error
from stages.measuring_config import EvaluateConfig
from stages.models.model_ref import ModelRef
from stages.models.roles import Roles
from stages.models.tokens import PromptRow, Text
from stages.rollout.experience import Rollout, rollout_kl, sample_rollout
from stages.rollout.generate import Sampling
from stages.rollout.reward_sources import RewardSources

DEFAULT_RESPONSE_TOKENS = 256


@dataclass(frozen=True)
class EvaluationSetup:
    """Models, prompts and sampling that all policies are measured with."""

    roles: Roles  # with the role "reference" if KL is measured
    text: Text
    prompts: list[PromptRow]
    sampling: Sampling
    judges: dict[str, RewardSources]  # by "score" and "gold", if given
    seed: int


@dataclass(frozen=True)
class ScoredRollout:
    """Responses with their scores and KL."""

    rollout: Rollout
    scores: dict[str, Tensor]  # by judge, (B,) fp32 on the CPU
    by_source: dict[str, Tensor]  # (B,) of each source of the judge "score", if it has several
    kl: Tensor | None  # (B,) log-ratio of policy and reference, estimator k1, float64 on the CPU

    def by_prompt(self, prompts: int) -> dict[str, Tensor]:
        """Named measures as (prompts, responses to each) float64."""
        measures = self.scores | ({} if self.kl is None else {"kl": self.kl})
        measures |= {"length": torch.tensor(self.rollout.lengths), "eos_rate": self.rollout.ended}
        return {name: values.double().view(prompts, -1) for name, values in measures.items()}


def sampling_of(source: ModelRef, config: EvaluateConfig) -> Sampling:
    """Sampling as configured, else as in the policy's training, else temperature 1 and 256 tokens."""
    trained = source.manifest.config if source.manifest is not None else {}
    default = min(DEFAULT_RESPONSE_TOKENS, source.context // 2)
    tokens = config.max_response_tokens or trained.get("max_response_tokens") or default
    temperature = config.temperature or trained.get("temperature") or 1.0
    return Sampling(temperature, tokens, rollout_batch_size=config.rollout_batch_size, engine=config.rollout_engine)


def measure(setup: EvaluationSetup, draws: list[int]) -> ScoredRollout:
    """Responses of the role "policy": number `k` to every prompt, for each k of `draws`, prompt by prompt.

    The noise depends on prompt and k alone, so it is the same for every policy.
    """
    rows = [(i, k) for i in range(len(setup.prompts)) for k in draws]
    keys = [(setup.seed, "evaluate", i, k) if k else (setup.seed, "evaluate", i) for i, k in rows]
    prompts = [setup.prompts[i] for i, _ in rows]
    rollout = sample_rollout(setup.roles, "policy", setup.text, prompts, keys, setup.sampling)
    responses = rollout.prompts, rollout.responses, rollout.texts, rollout.ended
    judged = {name: judge.score_by_source(*responses) for name, judge in setup.judges.items()}
    by_source = judged["score"].by_source if "score" in judged else {}
    scores = {name: found.total for name, found in judged.items()}
    kl = None
    if "reference" in setup.roles.adapters:
        kl = rollout_kl(setup.roles, rollout, setup.sampling.temperature).double().cpu()
    return ScoredRollout(rollout, scores, by_source, kl)


def summarise_responses(measured: ScoredRollout) -> dict[str, float]:
    """Means over one response to each prompt, with standard errors, and repetition within and across responses."""
    rollout = measured.rollout
    out: dict[str, float] = {}
    for name, values in measured.scores.items():
        out[name], out[f"{name}_error"] = mean_with_error(values)
    for name, values in measured.by_source.items():
        out[f"source_{name}"], out[f"source_{name}_error"] = mean_with_error(values)
    if measured.kl is not None:
        out["kl"], out["kl_error"] = mean_with_error(measured.kl)
    out["length"] = sum(rollout.lengths) / len(rollout.lengths)
    out["eos_rate"] = float(rollout.ended.double().mean())
    return out | repetition(split_texts_and_tokens(rollout))


def split_texts_and_tokens(rollout: Rollout) -> list[tuple[str, list[int]]]:
    """Text and tokens of every response, without its stop token."""
    ends = rollout.ended.tolist()
    tokens = [response.tolist()[: -1 if end else None] for response, end in zip(rollout.responses, ends, strict=True)]
    return list(zip(rollout.texts, tokens, strict=True))


def repetition(responses: list[tuple[str, list[int]]]) -> dict[str, float]:
    """Share of responses that repeat another, and shares of distinct tokens and of distinct pairs of tokens."""
    tokens = [ids for _, ids in responses]
    return {
        "duplicate_rate": 1 - len({text for text, _ in responses}) / len(responses),
        "distinct_1": distinct_ngrams(tokens, 1),
        "distinct_2": distinct_ngrams(tokens, 2),
    }


# --- the best of several


def best_of_rows(setup: EvaluationSetup, first: ScoredRollout, counts: list[int]) -> list[dict[str, float]]:
    """Measures of the best of n responses by score, for every n of `counts`, from max(counts) responses per prompt.

    `first` holds response number 0 to every prompt. Means count every response (`best_of_weights`).
    """
    size, prompts = max(counts), len(setup.prompts)
    groups = [first] if size == 1 else [first, measure(setup, list(range(1, size)))]
    columns = [group.by_prompt(prompts) for group in groups]
    measures = {name: torch.cat([column[name] for column in columns], dim=1) for name in columns[0]}
    return [best_of_row(n, measures) | _repetition_of_best(n, groups, measures["score"]) for n in sorted(set(counts))]


def best_of_row(n: int, measures: dict[str, Tensor]) -> dict[str, float]:
    """One row from measures (P, N) of N responses to each of P prompts; "score" decides which is best.

    `kl` is an upper bound: ln n - (n - 1) / n for the choice, plus the log-ratio of policy and reference on the chosen
    responses, since KL(best || reference) = KL(best || policy) + E_best[log policy / reference].
    """
    weights = best_of_weights(measures["score"], n)
    row: dict[str, float] = {"n": n, "kl": best_of_kl(n), "kl_choice": best_of_kl(n)}
    for name, values in measures.items():
        mean, error = mean_with_error((weights * values).sum(1))
        if name == "kl":
            row |= {"kl": row["kl_choice"] + mean, "kl_error": error, "kl_policy": mean}
        elif name in ("score", "gold"):
            row |= {name: mean, f"{name}_error": error}
        else:
            row[name] = mean
    return row


def _repetition_of_best(n: int, groups: list[ScoredRollout], scores: Tensor) -> dict[str, float]:
    """`repetition` of the best of n, averaged over as many disjoint sets of n responses as there are."""
    prompts, size = scores.shape
    per_prompt: list[list[tuple[str, list[int]]]] = [[] for _ in range(prompts)]
    for group in groups:
        texts = split_texts_and_tokens(group.rollout)
        each = len(texts) // prompts
        for i, responses in enumerate(per_prompt):
            responses += texts[i * each : (i + 1) * each]
    sets = []
    for start in range(0, size - n + 1, n):
        best = (start + scores[:, start : start + n].argmax(dim=1)).tolist()
        sets.append(repetition([responses[k] for responses, k in zip(per_prompt, best, strict=True)]))
    return {name: sum(one[name] for one in sets) / len(sets) for name in sets[0]}
