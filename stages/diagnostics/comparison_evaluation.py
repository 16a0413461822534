"""Evaluation of reward models and implicit rewards on the same comparisons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.maths.preferences import implicit_reward
from stages.models.candidates import SCORERS, Candidate, labels_of
from stages.models.classifier import Classifier
from stages.models.roles import Roles, adapter_of, candidate_adapter, head_of
from stages.results import Reporter, Table
from stages.tables import comparison_tables, scorers_table
from stages.training.comparing import (
    TokenComparison,
    build_comparison_report,
    pairs_of,
    score_rows,
)
from stages.training.implicit import flatten, summed_logprobs

SIDE_BY_SIDE = ("model", "label", "kind", "agreement")  # keys of a report that only matter beside other reports


@dataclass(frozen=True)
class ReadByClassifier:
    """Comparisons in the tokens of a classifier, which scores them without the base."""

    rows: list[TokenComparison]
    load: Callable[[], Classifier]

    def scores(self) -> Tensor:
        """Scores (R,) of every response."""
        return self.load().scores(flatten(self.rows))


def candidate_scores(roles: Roles, candidate: Candidate, rows: list[TokenComparison]) -> Tensor:
    """Scores (R,) of every response: a reward model's, or beta x log(policy / reference) of a DPO or PPO policy.

    A PPO policy's log-probabilities are at its training temperature, as in its KL.
    Source of the implicit reward: Rafailov et al. 2023, eq. 5.
    """
    base, responses = roles.base, flatten(rows)
    if candidate.stage == "reward":
        adapter = adapter_of(base, candidate.ref, trainable=False)
        roles.add("reward", adapter, head_of(base, candidate.ref.folder))
        return score_rows(roles, "reward", responses)
    temperature = float(candidate.knobs.get("temperature") or 1.0)
    roles.add("policy", candidate_adapter(base, candidate))
    roles.add("reference", adapter_of(base, candidate.reference, trainable=False))
    sums = [summed_logprobs(roles, role, responses, temperature) for role in ("policy", "reference")]
    return implicit_reward(sums[0] - sums[1], candidate.beta)


def evaluate_on_comparisons(
    roles: Roles | None,
    candidates: list[Candidate],
    rows: list[TokenComparison],
    reporter: Reporter,
    classifiers: dict[str, ReadByClassifier] | None = None,
) -> list[dict[str, object]]:
    """Each candidate's report on the comparisons, with its agreement with the first candidate (1 for the first).

    `classifiers` are those among the candidates, by name; for the others there are `roles`, and `rows` in their tokens.
    """
    reporter.begin("evaluate", len(candidates))
    first = None
    reports = []
    for done, (candidate, label) in enumerate(zip(candidates, labels_of(candidates), strict=True), 1):
        if candidate.stage == "ppo" and candidate.knobs.get("kl_target"):
            reporter.note(f"{candidate.name}: kl_coef changed in training; its margins are scaled by the first value")
        read = (classifiers or {}).get(candidate.name)
        theirs = rows if read is None else read.rows
        scores = candidate_scores(roles, candidate, rows) if read is None else read.scores()
        pairs = pairs_of(theirs)
        delta = scores[pairs.better] - scores[pairs.worse]
        first = delta if first is None else first
        kind = "reward_model" if candidate.stage in SCORERS else "implicit_reward"  # its key in the whole report
        identity = {"model": candidate.name, "label": label, "kind": kind}
        reports.append(identity | build_comparison_report(scores, theirs) | {"agreement": agreement(first, delta)})
        reporter.log(done, {name: reports[-1][name] for name in ("accuracy", "log_loss")})
    reporter.end()
    return reports


def agreement(one: Tensor, other: Tensor) -> float:
    """Share of pairs on which two scores prefer the same response; a tie in one of them counts half."""
    return float((0.5 + 0.5 * torch.sign(one) * torch.sign(other)).double().mean())


def comparison_evaluation_tables(reports: list[dict[str, object]]) -> tuple[Table, ...]:
    """The first report in full, after a table with a row for each report if there are several."""
    title = {"reward_model": "reward model", "implicit_reward": "implicit reward, beta x log(policy / reference)"}
    tables = comparison_tables(reports[0], title[reports[0]["kind"]])
    return tables if len(reports) == 1 else (scorers_table(reports), *tables)
