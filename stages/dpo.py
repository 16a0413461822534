"""Direct preference optimisation (Rafailov et al. 2023) and its relatives: comparisons alone, nothing is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from stages.config import DpoConfig
from stages.files.atomic import write_json
from stages.inputs import Inputs
from stages.maths.preferences import dpo_loss, implicit_reward, ipo_loss, kto_baseline, kto_loss
from stages.models.roles import Roles, adapter_of, frozen_copy, start_adapter
from stages.models.tokens import TokenRow
from stages.results import Report, Result, next_commands
from stages.training.batching import batch_at, epoch_at, steps_in
from stages.training.comparing import (
    TokenComparison,
    computed_share,
    encode_comparison,
    pairs_of,
    report_of,
    report_tables,
    step_metrics,
)
from stages.training.devices import Ranks
from stages.training.implicit import cached_logprobs, flatten, logprob_sums, summed_logprobs
from stages.training.language import count_targets, warn_above_uniform
from stages.training.loop import apply_gradients, before_and_after, read_metrics, train
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
    publish,
)

REPORT_FILE = "report.json"


def run(config: DpoConfig, inputs: Inputs, report: Report, *, dry_run: bool = False) -> Result:
    """Train a policy on comparisons and publish it with the report that a reward model would get."""
    source, out = inputs.source, inputs.run
    text = open_text(source, config, report)
    limit = context_limit(config.max_tokens, source, report)
    encode = partial(encode_comparison, text=text, max_tokens=limit)
    rows = encode_all(inputs.train, encode, skip_bad=config.skip_bad_rows, report=report, what="comparisons")
    held = encode_all(inputs.held_out, encode, skip_bad=True, report=report, what="held-out comparisons")
    cause = check_coverage(text, inputs.train, report, what="comparisons")
    total = steps_in(len(rows), config.batch_size, config.epochs, config.max_steps)
    sizes, read = [row.size for row in rows], count_targets(flatten(rows))
    work = Work("dpo", sizes, config.batch_size, read=read / sum(sizes), computed=computed_share(rows))
    if dry_run:
        return plan_result(config, source, work, total, inputs.rows_left_out)

    base, ranks = open_for_training(source, config, text, work, report)
    roles = Roles(base)
    seed = derive(config.seed, "dpo", "adapter")
    adapter = start_adapter(base, source, config.lora_rank, config.lora_alpha, config.lora_targets, seed)
    roles.add("policy", adapter)
    roles.add("reference", frozen_copy(adapter_of(base, source, trainable=False)))
    progress = open_progress(config, {"policy": roles.parameters("policy")})
    report.note(f"{len(rows)} comparisons, {total} steps, {adapter.size:,} trainable parameters")

    batches = first_visits(total, len(rows), config)
    visited = [i for batch in batches for i in batch]

    @cache  # once the run has its folder, and what an earlier one knew has been looked for there
    def reference_of(which: str) -> Tensor:
        parts = {"train": [flatten([rows[i] for i in batch]) for batch in batches], "held_out": [flatten(held)]}[which]
        return cached_logprobs(out, which, roles, "reference", source.digest, parts, config.micro_batch_size, report)

    @cache
    def known() -> dict[int, Tensor]:
        sums = reference_of("train").split([len(rows[i].responses) for i in visited])
        return dict(zip(visited, sums, strict=True))

    def held_out_report() -> dict[str, object]:
        return report_of(implicit_scores(roles, held, reference_of("held_out"), config), held) if held else {}

    def update(step: int) -> dict[str, float]:
        numbers = batch_at(step, len(rows), config.batch_size, config.seed, "dpo")
        batch = [Known(rows[i], known()[i]) for i in numbers]
        sums = ranks.sum_floats(backward(roles, ranks.share(batch), len(batch), config, ranks), base.device)
        rate = learning_rate_at(step, total, config.learning_rate, config.lr_schedule, config.warmup_ratio)
        stepped = apply_gradients(progress, {"policy": rate}, config.max_grad_norm, ranks, step + 1)
        epoch = epoch_at(step + 1, len(rows), config.batch_size)
        return step_metrics(sums, [row.comparison for row in batch], rate, epoch, base.device) | stepped

    def evaluate(step: int) -> dict[str, float]:
        if step == 0:
            known()  # before the clock of the first step runs
            asked = count_targets(flatten([rows[i] for i in visited]))
            loss = -float(reference_of("train").double().sum()) / asked
            warn_above_uniform(loss, base.vocabulary, "the reference's loss on the responses", cause, report)
        found = held_out_report()
        names = ("accuracy", "log_loss", "margin_mean", "score_length_corr")
        return {f"eval_{name}": found[name] for name in names if name in found}

    train(out, report, ranks, progress, config, title="dpo", total=total, update=update, evaluate=evaluate)
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
    publish(
        out, "dpo", config, roles, text,
        adapter=adapter, parents=[("model", source)], datasets={"train": inputs.data},
        metrics=metrics, lines=lines, extra_files=(REPORT_FILE,),
    )  # fmt: skip
    data = {"metrics": metrics, "report": found, "steps": total}
    return Result(
        "dpo", "done", config.output, data, report_tables(found) if held else (), next_commands("dpo", config)
    )


@dataclass(frozen=True)
class Known:
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


def backward(roles: Roles, rows: list[Known], denominator: int, config: DpoConfig, ranks: Ranks) -> dict[str, float]:
    """Add the gradient of sum(comparison losses) / denominator; returns sums over pairs."""
    baseline = mismatched_baseline(roles, rows, config, ranks) if config.loss == "kto" else None

    def forward(micro: list[int]) -> tuple[Tensor, dict[str, float]]:
        chosen = [rows[i] for i in micro]
        reference = torch.cat([row.reference for row in chosen]).to(roles.base.device)
        ratios = logprob_sums(roles, flatten([row.comparison for row in chosen])) - reference
        losses, better, worse = comparison_losses(ratios, [row.comparison for row in chosen], config, baseline)
        better, worse = implicit_reward(better.detach(), config.beta), implicit_reward(worse.detach(), config.beta)
        right = (better > worse).double() + 0.5 * (better == worse).double()
        loss = losses.sum() / denominator
        counts = {"loss": loss.detach(), "accuracy": right.sum(), "margin": (better - worse).sum(), "pairs": len(right)}
        counts |= {"score_chosen": better.sum(), "score_rejected": worse.sum()}
        return loss, {name: float(value) for name, value in counts.items()}

    zeros = dict.fromkeys(("loss", "accuracy", "margin", "pairs", "score_chosen", "score_rejected"), 0.0)
    with roles.use("policy"):
        how = {"on_cuda": roles.base.device.type == "cuda", "gradients": roles.gradients()}
        return zeros | accumulate([row.size for row in rows], config.micro_batch_size, forward, **how)


def comparison_losses(
    ratios: Tensor, comparisons: list[TokenComparison], config: DpoConfig, baseline: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (pairs,) weighted 1 / (pairs of the comparison), and the log-ratios of each pair's two responses.

    ratios (R,): log(policy / reference) per response, comparison by comparison.
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
        desirable = torch.arange(len(both), device=both.device) < len(winners)
        weights = (config.desirable_weight, config.undesirable_weight)
        each = kto_loss(both, desirable, baseline, config.beta, *weights)
        losses = 0.5 * (each[: len(winners)] + each[len(winners) :])
    return losses * torch.tensor(pairs.weight, device=ratios.device), winners, losers


def mismatched_baseline(roles: Roles, rows: list[Known], config: DpoConfig, ranks: Ranks) -> Tensor:
    """KTO's reference point: how far the policy moved on responses put under another row's prompt."""
    best = [row.comparison.best for row in rows]
    crossed = [cross(mine, other) for mine, other in zip(best, best[1:] + best[:1], strict=True)]
    sums = [summed_logprobs(roles, role, crossed, config.micro_batch_size) for role in ("policy", "reference")]
    return kto_baseline((sums[0] - sums[1]).to(roles.base.device), ranks.sum)


def cross(prompt_of: TokenRow, response_of: TokenRow) -> TokenRow:
    """One row's prompt with another row's response."""
    ids = torch.cat([prompt_of.ids[~prompt_of.targets], response_of.ids[response_of.targets]])
    return TokenRow(ids, torch.arange(len(ids)) >= int((~prompt_of.targets).sum()), False)
