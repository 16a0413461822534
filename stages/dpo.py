"""Direct preference optimisation (Rafailov et al. 2023) and its relatives: comparisons alone, nothing is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from stages.config import DpoConfig
from stages.errors import DatasetError
from stages.files.atomic import write_json
from stages.inputs import Inputs
from stages.maths.preferences import dpo_loss, implicit_reward, ipo_loss, kto_baseline, kto_loss
from stages.models.roles import Roles, adapter_of, frozen_copy, start_adapter
from stages.models.tokens import TokenRow
from stages.results import Reporter, Result, next_commands
from stages.training.batching import batch_at, epoch_at, steps_in
from stages.training.comparing import (
    NO_PAIRS,
    TokenComparison,
    build_comparison_report,
    computed_share,
    encode_comparison,
    pair_sums,
    pairs_of,
    report_tables,
    step_metrics,
)
from stages.training.implicit import cached_logprobs, flatten, logprob_sums, summed_logprobs
from stages.training.language import count_targets, warn_above_uniform
from stages.training.loop import add_gradients, apply_gradients, before_and_after, read_metrics, train
from stages.training.optimizer import learning_rate_at
from stages.training.passes import accumulate
from stages.training.plan import Work, plan_result
from stages.training.seeds import derive
from stages.training.session import (
    check_coverage,
    context_limit,
    encode_all,
    open_for_training,
    open_progress,
    open_text,
    publish_checkpoint,
    report_cuts,
)

REPORT_FILE = "report.json"


def run(config: DpoConfig, inputs: Inputs, reporter: Reporter, *, dry_run: bool = False) -> Result:
    """Train a policy on comparisons and publish it with the report that a reward model would get."""
    source, out = inputs.source, inputs.run
    text = open_text(source, config, reporter)
    limit = context_limit(config.max_tokens, source, reporter)
    encode = partial(encode_comparison, text=text, max_tokens=limit)
    rows = encode_all(inputs.train, encode, skip_bad=config.skip_bad_rows, reporter=reporter, what="comparisons")
    held = encode_all(
        inputs.held_out, encode, skip_bad=config.skip_bad_rows, reporter=reporter, what="held-out comparisons"
    )
    report_cuts(rows, limit, reporter, "comparisons")
    report_cuts(held, limit, reporter, "held-out comparisons")
    cause = check_coverage(text, inputs.train, reporter, what="comparisons")
    total = steps_in(len(rows), config.batch_size, config.epochs, config.max_steps)
    sizes, read = [row.size for row in rows], count_targets(flatten(rows))
    work = Work("dpo", sizes, config.batch_size, read=read / sum(sizes), computed=computed_share(rows))
    if config.loss == "kto" and len(rows) == 1:
        raise DatasetError(
            "--loss kto compares each response with one to another prompt, and only one row is trained on",
            where=config.dataset,
            fix="give two rows or more, or another --loss",
        )
    if dry_run:
        return plan_result(config, source, work, total, inputs.rows_left_out)

    base, ranks = open_for_training(source, config, text, work, reporter)
    roles = Roles(base)
    seed = derive(config.seed, "dpo", "adapter")
    adapter = start_adapter(base, source, config, seed)
    roles.add("policy", adapter)
    roles.add("reference", frozen_copy(adapter_of(base, source, trainable=False)))
    progress = open_progress(config, {"policy": roles.parameters("policy")})
    reporter.note(f"{len(rows)} comparisons, {total} steps, {adapter.size:,} trainable parameters")

    batches = first_visits(total, len(rows), config)
    visited = [i for batch in batches for i in batch]

    @cache  # once the run has its folder, and what an earlier one knew has been looked for there
    def reference_of(which: str) -> Tensor:
        parts = {"train": [flatten([rows[i] for i in batch]) for batch in batches], "held_out": [flatten(held)]}[which]
        return cached_logprobs(out, which, roles, "reference", source.digest, parts, config.micro_batch_size, reporter)

    @cache
    def known() -> dict[int, Tensor]:
        sums = reference_of("train").split([len(rows[i].responses) for i in visited])
        return dict(zip(visited, sums, strict=True))

    def held_out_report() -> dict[str, object]:
        return (
            build_comparison_report(implicit_scores(roles, held, reference_of("held_out"), config), held)
            if held
            else {}
        )

    def update(step: int) -> dict[str, float]:
        numbers = batch_at(step, len(rows), config.batch_size, config.seed, "dpo")
        with ranks.together():
            batch = [ReferencedComparison(rows[i], known()[i]) for i in numbers]
            crossed = cross_batch(rows, numbers) if config.loss == "kto" else []
            shifts = policy_shifts(roles, ranks.share(crossed), config.micro_batch_size)
        baseline = kto_baseline(shifts.to(base.device), ranks.sum) if crossed else None
        mine = partial(backward_dpo, roles, ranks.share(batch), len(batch), config, baseline)
        sums = ranks.sum_floats(add_gradients(roles, ranks, mine), base.device)
        rate = learning_rate_at(step, total, config.learning_rate, config.lr_schedule, config.warmup_ratio)
        stepped = apply_gradients(progress, {"policy": rate}, config.max_grad_norm, ranks, step + 1)
        epoch = epoch_at(step + 1, len(rows), config.batch_size)
        return step_metrics(sums, [row.comparison for row in batch], rate, epoch, base.device) | stepped

    def evaluate(step: int) -> dict[str, float]:
        with ranks.together():
            if step == 0:
                known()  # before the clock of the first step runs
                asked = count_targets(flatten([rows[i] for i in visited]))
                loss = -float(reference_of("train").double().sum()) / asked
                warn_above_uniform(loss, base.vocabulary, "the reference's loss on the responses", cause, reporter)
            found = held_out_report()
        names = ("accuracy", "log_loss", "margin_mean", "score_length_corr")
        return {f"eval_{name}": found[name] for name in names if name in found}

    train(out, reporter, ranks, progress, config, title="dpo", total=total, update=update, evaluate=evaluate)
    if not ranks.first:
        return Result("dpo", "done", config.output, {})
    found = held_out_report()
    write_json(out.folder / REPORT_FILE, found)
    lines = read_metrics(out)
    numbers = {k: v for k, v in found.items() if isinstance(v, (int, float))}
    metrics = {
        "train_loss": lines[-1].get("loss"),
        **before_and_after(lines),
        **numbers,
        "eval_pairs": found.get("pairs"),
    }
    publish_checkpoint(
        out, "dpo", config, roles, text,
        adapter=adapter, parents=[("model", source)], datasets={"train": inputs.data},
        metrics=metrics, lines=lines, extra_files=(REPORT_FILE,),
    )  # fmt: skip
    data = {"metrics": metrics, "report": found, "steps": total}
    return Result(
        "dpo", "done", config.output, data, report_tables(found) if held else (), next_commands("dpo", config)
    )


@dataclass(frozen=True)
class ReferencedComparison:
    """A comparison and what the reference says of its responses."""

    comparison: TokenComparison
    reference: Tensor  # (K,) summed log-probabilities, on the CPU

    @property
    def size(self) -> int:
        return self.comparison.size


def first_visits(total: int, n: int, config: DpoConfig) -> list[list[int]]:
    """Row numbers of each step of the first epoch that a run of `total` steps makes: where rows are met first."""
    steps = min(total, steps_in(n, config.batch_size, 1.0, None))
    return [batch_at(step, n, config.batch_size, config.seed, "dpo") for step in range(steps)]


def implicit_scores(roles: Roles, rows: list[TokenComparison], reference: Tensor, config: DpoConfig) -> Tensor:
    """The reward (N,) by which the policy would be optimal: beta x log(policy / reference) of each response."""
    policy = summed_logprobs(roles, "policy", flatten(rows), config.micro_batch_size)
    return implicit_reward(policy - reference, config.beta)


def backward_dpo(
    roles: Roles, rows: list[ReferencedComparison], denominator: int, config: DpoConfig, baseline: Tensor | None
) -> dict[str, float]:
    """Add the gradient of sum(comparison losses) / denominator; returns sums over pairs.

    `baseline` is KTO's reference point, None for the other losses.
    """

    def forward(micro: list[int]) -> tuple[Tensor, dict[str, float]]:
        chosen = [rows[i] for i in micro]
        reference = torch.cat([row.reference for row in chosen]).to(roles.base.device)
        ratios = logprob_sums(roles, flatten([row.comparison for row in chosen])) - reference
        comparisons = [row.comparison for row in chosen]
        loss = preference_losses(ratios, comparisons, config, baseline).sum() / denominator
        return loss, pair_sums(loss, implicit_reward(ratios, config.beta), pairs_of(comparisons))

    with roles.use("policy"):
        on_cuda = roles.base.device.type == "cuda"
        return NO_PAIRS | accumulate([row.size for row in rows], config.micro_batch_size, forward, on_cuda=on_cuda)


def preference_losses(
    ratios: Tensor, comparisons: list[TokenComparison], config: DpoConfig, baseline: Tensor | None
) -> Tensor:
    """Losses (pairs,), each weighted 1 / (pairs of its comparison).

    ratios (R,): log(policy / reference) per response, comparison by comparison. Under kto, which judges responses one
    by one, a soft label is the expectation: the better one is desirable with the pair's probability, else the other.
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

    A batch of one row takes the response of the dataset's next row: its own would be no mismatch.
    """
    following = numbers[1:] + numbers[:1] if len(numbers) > 1 else [(numbers[0] + 1) % len(rows)]
    return [cross(rows[i].best, rows[j].best) for i, j in zip(numbers, following, strict=True)]


def policy_shifts(roles: Roles, crossed: list[TokenRow], micro_batch_size: int | str) -> Tensor:
    """log(policy / reference) (N,) of mismatched rows, on the CPU: how far the policy moved whatever the prompt."""
    policy, reference = (summed_logprobs(roles, role, crossed, micro_batch_size) for role in ("policy", "reference"))
    return policy - reference


def cross(prompt_of: TokenRow, response_of: TokenRow) -> TokenRow:
    """One row's prompt with another row's response."""
    ids = torch.cat([prompt_of.ids[~prompt_of.targets], response_of.ids[response_of.targets]])
    return TokenRow(ids, torch.arange(len(ids)) >= int((~prompt_of.targets).sum()), False)
