"""Reward model: Bradley-Terry on comparisons, a scalar head on an adapter (Stiennon et al. 2020)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from stages.config import RewardConfig
from stages.files.atomic import write_json
from stages.files.rows import Prompt
from stages.inputs import Inputs
from stages.maths.losses import pair_loss
from stages.models.forward import sequence_scores
from stages.models.heads import ScalarHead
from stages.models.roles import Roles, adapter_of, frozen_copy, head_of, start_adapter
from stages.models.tokens import Text, TokenRow
from stages.results import Reporter, Result, next_commands
from stages.rollout.spread import score_policy_responses
from stages.training.baselines import baselines
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
    score_and_report,
    score_rows,
    step_metrics,
)
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
from stages.training.verdict import reach_verdict

ROLE = "reward"
CENTRING_ROWS = 256  # rows whose mean score becomes 0
REPORT_FILE = "report.json"  # PPO reads the verdict in it before it starts


def run(config: RewardConfig, inputs: Inputs, reporter: Reporter, *, dry_run: bool = False) -> Result:
    """Train a reward model on comparisons and publish it with a report on held-out ones."""
    source, out = inputs.source, inputs.run
    text = open_text(source, config, reporter)
    limit = context_limit(config.max_tokens, source, reporter)
    encode = partial(encode_comparison, text=text, max_tokens=limit)
    rows = encode_all(inputs.train, encode, skip_bad=config.skip_bad_rows, reporter=reporter, what="comparisons")
    held = encode_all(
        inputs.held_out, encode, skip_bad=config.skip_bad_rows, reporter=reporter, what="held-out comparisons"
    )
    demonstrations = encode_demonstrations(inputs, text, rows, limit, config.skip_bad_rows, reporter)
    report_cuts(rows, limit, reporter, "comparisons")
    report_cuts(held, limit, reporter, "held-out comparisons")
    check_coverage(text, inputs.train, reporter, what="comparisons")
    total = steps_in(len(rows), config.batch_size, config.epochs, config.max_steps)
    work = Work("reward", [row.size for row in rows], config.batch_size, read=0.0, computed=computed_share(rows))
    if dry_run:
        return plan_result(config, source, work, total, inputs.rows_left_out)

    base, ranks = open_for_training(source, config, text, work, reporter)
    roles = Roles(base)
    seed = derive(config.seed, "reward", "adapter")
    adapter = start_adapter(base, source, config, seed)
    head = start_head(roles, inputs, config.seed)
    roles.add(ROLE, adapter, head)
    progress = open_progress(config, {ROLE: roles.parameters(ROLE)})

    def update(step: int) -> dict[str, float]:
        numbers = batch_at(step, len(rows), config.batch_size, config.seed, "reward")
        batch = [rows[i] for i in numbers]
        with roles.use(ROLE):
            sums = add_gradients(roles, ranks, partial(backward_reward, roles, ranks.share(batch), len(batch), config))
        sums = ranks.sum_floats(sums, base.device)
        rate = learning_rate_at(step, total, config.learning_rate, config.lr_schedule, config.warmup_ratio)
        stepped = apply_gradients(progress, {ROLE: rate}, config.max_grad_norm, ranks, step + 1)
        return step_metrics(sums, batch, rate, epoch_at(step + 1, len(rows), config.batch_size), base.device) | stepped

    def evaluate(step: int) -> dict[str, float]:
        if not held:
            return {}
        with ranks.together():
            found = score_and_report(roles, ROLE, held, config.micro_batch_size)
        return {f"eval_{name}": found[name] for name in ("accuracy", "log_loss", "margin_mean", "score_length_corr")}

    reporter.note(f"{len(rows)} comparisons, {total} steps, {adapter.size:,} trainable parameters")
    train(out, reporter, ranks, progress, config, title="reward", total=total, update=update, evaluate=evaluate)
    if not ranks.first:
        return Result("reward", "done", config.output, {})
    served = centre(roles, demonstrations, config.micro_batch_size)
    found = final_report(roles, inputs, rows, held, served, config.micro_batch_size)
    if config.sft_samples and held:
        found |= check_policy_scores(roles, text, inputs, config)
    verdict = reach_verdict(found)
    found["verdict"] = verdict.stored()
    write_json(out.folder / REPORT_FILE, found)
    lines = read_metrics(out)
    numbers = {k: v for k, v in found.items() if isinstance(v, (int, float))}
    metrics = {
        "train_loss": lines[-1].get("loss"),
        **before_and_after(lines),
        **numbers,
        "eval_pairs": found.get("pairs"),
        "verdict": verdict.decision,
    }
    publish_checkpoint(
        out, "reward", config, roles, text,
        adapter=adapter, head=head, parents=[("model", source)], datasets={"train": inputs.data},
        metrics=metrics, lines=lines, extra_files=(REPORT_FILE,),
    )  # fmt: skip
    tables = (*(report_tables(found) if held else ()), verdict.table())
    data = {"metrics": metrics, "report": found, "steps": total}
    advice = () if verdict.decision == "no-go" else next_commands("reward", config)
    return Result("reward", "done", config.output, data, tables, advice)


def final_report(
    roles: Roles,
    inputs: Inputs,
    rows: list[TokenComparison],
    held: list[TokenComparison],
    served: Tensor,
    micro_batch_size: int | str,
) -> dict[str, object]:
    """What held-out comparisons, demonstrations (`served`, their scores) and annotators say of the trained model."""
    found: dict[str, object] = {}
    if held:
        scores = score_rows(roles, ROLE, [row for c in held for row in c.responses], micro_batch_size)
        found |= build_comparison_report(scores, held) | {"baselines": baselines(scores, held, rows)}
    found |= {"demonstrations_mean": float(served.mean()), "demonstrations_std": float(served.std(unbiased=False))}
    agreed, both = inputs.data.agreement
    return found | ({"annotator_agreement": agreed / both, "annotator_pairs": both} if both else {})


def check_policy_scores(roles: Roles, text: Text, inputs: Inputs, config: RewardConfig) -> dict[str, object]:
    """How the answers of the policy that training started from score; empty where --model is no policy."""
    source = inputs.source
    if source.manifest is not None and source.manifest.stage == "reward":
        return {}
    roles.add("policy", frozen_copy(adapter_of(roles.base, source, trainable=False)))
    prompts = [Prompt(row.where, row.prompt) for row in inputs.held_out]
    spread = score_policy_responses(roles, text, prompts, config.sft_samples, config.seed, config.micro_batch_size)
    roles.remove("policy")
    return {"samples": spread} if spread else {}


def start_head(roles: Roles, inputs: Inputs, seed: int) -> ScalarHead:
    """The head of the reward checkpoint that training goes on from, else a random one."""
    manifest = inputs.source.manifest
    if manifest is not None and manifest.stage == "reward":
        return head_of(roles.base, manifest.folder).copy(trainable=True)
    return ScalarHead(roles.base.width).randomise(derive(seed, "reward", "head")).to(roles.base.device)


def backward_reward(
    roles: Roles, rows: list[TokenComparison], denominator: int, config: RewardConfig
) -> dict[str, float]:
    """Add the gradient of sum(comparison losses) / denominator under the active role; returns sums over pairs.

    All pairs of a prompt stay in one forward pass, each weighing 1 / (number of its pairs).
    """

    def forward(micro: list[int]) -> tuple[Tensor, dict[str, float]]:
        chosen = [rows[i] for i in micro]
        scores = sequence_scores(roles, ROLE, [row.ids for c in chosen for row in c.responses])
        loss = reward_losses(scores, chosen, config).sum() / denominator
        return loss, pair_sums(loss, scores, pairs_of(chosen))

    on_cuda = roles.base.device.type == "cuda"
    return NO_PAIRS | accumulate([row.size for row in rows], config.micro_batch_size, forward, on_cuda=on_cuda)


def reward_losses(scores: Tensor, comparisons: list[TokenComparison], config: RewardConfig) -> Tensor:
    """Losses (pairs,), each weighted 1 / (pairs of its comparison).

    scores (R,): one per response, comparison by comparison.
    """
    pairs = pairs_of(comparisons)
    winners, losers = scores[pairs.better], scores[pairs.worse]
    as_tensor = partial(torch.tensor, device=scores.device, dtype=torch.float32)
    probability = as_tensor(pairs.probability)
    probability = probability + config.label_smoothing * (1 - 2 * probability)
    margin = as_tensor(pairs.margin) if config.loss_margin else 0.0
    losses = pair_loss(winners, losers, probability, margin, config.centre_coef)
    return losses * as_tensor(pairs.weight)


def encode_demonstrations(
    inputs: Inputs, text: Text, rows: list[TokenComparison], limit: int, skip_bad: bool, reporter: Reporter
) -> list[TokenRow]:
    """The demonstrations whose mean score becomes 0: those given, else the preferred training responses.

    Read as PPO reads responses, at their end token; given ones too long to keep it are left out.
    """
    preferred = [row.best for row in rows[:CENTRING_ROWS]]
    if inputs.demonstrations is None:
        return preferred
    given = inputs.demonstrations.rows[:CENTRING_ROWS]
    encode = partial(text.judged, max_tokens=limit)
    encoded = encode_all(given, encode, skip_bad=skip_bad, reporter=reporter, what="demonstrations")
    whole = [row for row in encoded if int(row.ids[-1]) in text.stop_ids]
    if len(whole) < len(encoded):
        left = "the others are" if whole else "preferred training responses are"
        reporter.warn(
            f"{len(encoded) - len(whole)} of {len(encoded)} demonstrations lose their end within {limit} tokens; "
            f"{left} centred on"
        )
    return whole or preferred


def centre(roles: Roles, demonstrations: list[TokenRow], micro_batch_size: int | str) -> Tensor:
    """Shift the head's bias so that demonstrations score 0 on average (Stiennon 2020; Huang et al. 2024).

    Returns their scores (N,) as they are from now on.
    """
    scores = score_rows(roles, ROLE, demonstrations, micro_batch_size)
    mean = scores.double().mean().float()
    roles.heads[ROLE].bias.data -= mean.to(roles.base.device)
    return scores - mean
