"""Direct preference optimisation (Rafailov et al. 2023) and its relatives: comparisons alone, nothing is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from stages.checkpoint.atomic import write_json
from stages.checkpoint.output_folder import REPORT
from stages.config import DpoConfig
from stages.diagnostics.finished import finished_tables
from stages.errors import DatasetError
from stages.inputs import Inputs
from stages.maths.preferences import dpo_loss, implicit_reward, ipo_loss, kto_baseline, kto_loss
from stages.models.roles import Roles
from stages.models.tokens import TokenRow
from stages.results import Reporter, Result
from stages.training.batching import batch_at, steps_in
from stages.training.comparing import (
    NO_PAIRS,
    TokenComparison,
    build_comparison_report,
    computed_share,
    encode_comparison,
    held_out_measures,
    numbers_of,
    pair_means,
    pair_sums,
    pairs_of,
)
from stages.training.implicit import cached_logprobs, flatten, logprob_sums, summed_logprobs
from stages.training.language import count_targets
from stages.training.plan import Work
from stages.training.publishing import publish_checkpoint
from stages.training.session import Session


def run(config: DpoConfig, inputs: Inputs, reporter: Reporter, *, dry_run: bool = False) -> Result:
    """Train a policy on comparisons and publish it with the report that a reward model would get."""
    session = Session("dpo", config, inputs, reporter)
    encode = partial(encode_comparison, text=session.text, max_tokens=session.max_tokens)
    rows, held_out = session.encode_split(encode, "comparisons", session.max_tokens)
    sizes, read = [row.size for row in rows], count_targets(flatten(rows))
    session.plan(Work("dpo", sizes, config.batch_size, read=read / sum(sizes), computed=computed_share(rows)))
    check_rows_of_kto(config, rows)
    if dry_run:
        return session.describe_plan()

    session.load_base()
    session.start_role("policy")
    session.add_reference()
    session.optimise_role("policy", "comparisons")
    reference = ReferenceLogprobs(session, rows, held_out)
    session.train(partial(update, session, reference), partial(evaluate, session, reference))
    if not session.ranks.first:
        return session.result({})
    report = report_on_held_out(session, reference)
    write_json(session.run.folder / REPORT, report)
    metrics = session.summarise_metrics() | numbers_of(report)
    publish_checkpoint(session, "policy", metrics, extra_files=(REPORT,))
    data = {"metrics": metrics, "report": report, "steps": session.total}
    return session.result(data, finished_tables(session.run))


def check_rows_of_kto(config: DpoConfig, rows: list[TokenComparison]) -> None:
    """Raise DatasetError for a single row under kto, which compares responses to different prompts."""
    if config.loss == "kto" and len(rows) == 1:
        raise DatasetError(
            "--loss kto compares each response with one to another prompt, and only one row is trained on",
            where=config.dataset,
            fix="give two rows or more, or another --loss",
        )


@dataclass(frozen=True)
class ReferencedComparison:
    """A comparison with the reference's log-probabilities of its responses."""

    comparison: TokenComparison
    reference: Tensor  # (K,) summed log-probabilities, on the CPU

    @property
    def size(self) -> int:
        return self.comparison.size


class ReferenceLogprobs:
    """Log-probabilities of every response under the reference: computed once and cached in the run's folder."""

    def __init__(self, session: Session, rows: list[TokenComparison], held_out: list[TokenComparison]):
        self.session, self.rows, self.held_out_rows = session, rows, held_out
        config, n = session.config, len(rows)
        # Row numbers of each step of the first epoch: rows are computed in the order of their first step.
        steps = min(session.total, steps_in(n, config.batch_size, 1.0, None))
        self.batches = [batch_at(step, n, config.batch_size, config.seed, "dpo") for step in range(steps)]
        self.visited = [i for batch in self.batches for i in batch]

    @cached_property
    def train(self) -> Tensor:
        """Summed log-probabilities of the responses of the visited rows, in the order of the visits."""
        parts = [flatten([self.rows[i] for i in batch]) for batch in self.batches]
        return cached_logprobs(self.session, "train", "reference", parts)

    @cached_property
    def held_out(self) -> Tensor:
        """Summed log-probabilities of the held-out responses."""
        return cached_logprobs(self.session, "held_out", "reference", [flatten(self.held_out_rows)])

    @cached_property
    def by_row(self) -> dict[int, Tensor]:
        """Summed log-probabilities of a row's responses, by the row's number."""
        sums = self.train.split([len(self.rows[i].responses) for i in self.visited])
        return dict(zip(self.visited, sums, strict=True))


def update(session: Session, reference: ReferenceLogprobs, step: int) -> dict[str, float]:
    """One optimiser step on a batch of comparisons; returns its metrics."""
    config, roles, ranks, rows = session.config, session.roles, session.ranks, reference.rows
    numbers = session.batch(range(len(rows)), step)
    with ranks.together():
        batch = [ReferencedComparison(rows[i], reference.by_row[i]) for i in numbers]
        crossed = cross_batch(rows, numbers) if config.loss == "kto" else []
        shifts = policy_shifts(roles, ranks.share(crossed))
    baseline = kto_baseline(shifts.to(session.base.device), ranks.sum) if crossed else None
    mine = ranks.share(batch)
    sums = session.add_gradients(partial(backward_dpo, roles, mine, len(batch), config, baseline))
    return pair_means(sums) | session.finish_step("policy", batch, step)


def evaluate(session: Session, reference: ReferenceLogprobs, step: int) -> dict[str, float]:
    """How well implicit rewards predict the held-out preferences."""
    with session.ranks.together():
        if step == 0:  # before the clock of the first step runs
            targets = count_targets(flatten([reference.rows[i] for i in reference.visited]))
            loss = -float(reference.train.double().sum()) / targets
            session.warn_above_uniform(loss, "the reference's loss on the responses")
        return held_out_measures(report_on_held_out(session, reference))


def report_on_held_out(session: Session, reference: ReferenceLogprobs) -> dict[str, object]:
    """The report on held-out comparisons by the implicit reward beta x log(policy / reference); empty without rows."""
    rows = reference.held_out_rows
    if not rows:
        return {}
    policy = summed_logprobs(session.roles, "policy", flatten(rows))
    return build_comparison_report(implicit_reward(policy - reference.held_out, session.config.beta), rows)


def backward_dpo(
    roles: Roles, rows: list[ReferencedComparison], denominator: int, config: DpoConfig, baseline: Tensor | None
) -> dict[str, float]:
    """Add the gradient of sum(comparison losses) / denominator; returns sums over pairs.

    `baseline` is KTO's reference point, None for the other losses.
    """

    def forward(rows: list[ReferencedComparison]) -> tuple[Tensor, dict[str, float]]:
        comparisons = [row.comparison for row in rows]
        reference = torch.cat([row.reference for row in rows]).to(roles.base.device)
        ratios = logprob_sums(roles, flatten(comparisons)) - reference
        loss = preference_losses(ratios, comparisons, config, baseline).sum() / denominator
        return loss, pair_sums(loss, implicit_reward(ratios, config.beta), pairs_of(comparisons))

    return NO_PAIRS | roles.accumulate("policy", rows, forward)


def preference_losses(
    ratios: Tensor, comparisons: list[TokenComparison], config: DpoConfig, baseline: Tensor | None
) -> Tensor:
    """Losses (pairs,), each weighted 1 / (pairs of its comparison).

    ratios (R,): log(policy / reference) per response, comparison by comparison. kto has a loss per response; for a soft
    label it is the expectation: the chosen one is desirable with the pair's probability, otherwise the rejected one.
    """
    pairs = pairs_of(comparisons)
    winners, losers = ratios[pairs.better], ratios[pairs.worse]
    chance = torch.tensor(pairs.probability, device=ratios.device)
    if config.loss == "sigmoid":
        losses = dpo_loss(winners, losers, config.beta, chance, config.label_smoothing)
    elif config.loss == "ipo":
        losses = ipo_loss(winners, losers, config.beta, chance)
    else:
        both = torch.cat([winners, losers])
        wins = torch.arange(len(both), device=both.device) < len(winners)
        weights = (config.desirable_weight, config.undesirable_weight)
        right, wrong = (kto_loss(both, desirable, baseline, config.beta, *weights) for desirable in (wins, ~wins))
        each = torch.cat([chance, chance]) * right + (1 - torch.cat([chance, chance])) * wrong
        losses = 0.5 * (each[: len(winners)] + each[len(winners) :])
    return losses * torch.tensor(pairs.weight, device=ratios.device)


def cross_batch(rows: list[TokenComparison], numbers: list[int]) -> list[TokenRow]:
    """The prompt of each row of a batch with the chosen response of the row after it, the last with that of the first.

    A batch of one row takes the response of the dataset's next row, since its own response matches its prompt.
    """
    following = numbers[1:] + numbers[:1] if len(numbers) > 1 else [(numbers[0] + 1) % len(rows)]
    return [cross(rows[i].best, rows[j].best) for i, j in zip(numbers, following, strict=True)]


def policy_shifts(roles: Roles, crossed: list[TokenRow]) -> Tensor:
    """log(policy / reference) (N,) of mismatched rows, on the CPU, for KTO's reference point."""
    policy, reference = (summed_logprobs(roles, role, crossed) for role in ("policy", "reference"))
    return policy - reference


def cross(prompt_of: TokenRow, response_of: TokenRow) -> TokenRow:
    """One row's prompt with another row's response."""
    ids = torch.cat([prompt_of.ids[~prompt_of.targets], response_of.ids[response_of.targets]])
    return TokenRow(ids, torch.arange(len(ids)) >= int((~prompt_of.targets).sum()), False)
