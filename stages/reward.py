"""Reward model: Bradley-Terry on comparisons, a scalar head on an adapter (Stiennon et al. 2020)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from stages.checkpoint.atomic import write_json
from stages.checkpoint.output_folder import REPORT
from stages.config import RewardConfig
from stages.data.rows import Prompt
from stages.diagnostics.baselines import baselines
from stages.diagnostics.finished import finished_tables
from stages.diagnostics.verdict import reach_verdict
from stages.errors import counted, verb_for
from stages.inputs import Inputs
from stages.maths.losses import pair_loss
from stages.models.heads import ScalarHead
from stages.models.outputs import sequence_scores
from stages.models.roles import Roles, adapter_of, head_of
from stages.models.tokens import TokenRow
from stages.results import Reporter, Result
from stages.rollout.policy_scores import score_policy_responses
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
    score_rows,
)
from stages.training.implicit import flatten
from stages.training.plan import Work
from stages.training.publishing import publish_checkpoint
from stages.training.seeds import derive
from stages.training.session import Session

ROLE = "reward"
CENTRING_ROWS = 256  # rows whose mean score becomes 0


def run(config: RewardConfig, inputs: Inputs, reporter: Reporter, *, dry_run: bool = False) -> Result:
    """Train a reward model on comparisons and publish it with a report on held-out ones."""
    session = Session("reward", config, inputs, reporter)
    encode = partial(encode_comparison, text=session.text, max_tokens=session.max_tokens)
    rows, held_out = session.encode_split(encode, "comparisons", session.max_tokens)
    demonstrations = encode_demonstrations(session, rows)
    sizes, computed = [row.size for row in rows], computed_share(rows)
    session.plan(Work("reward", sizes, config.batch_size, read=0.0, computed=computed))
    if dry_run:
        return session.describe_plan()

    session.load_base()
    session.start_role(ROLE, start_head(session))
    session.optimise_role(ROLE, "comparisons")
    session.train(partial(update, session, rows), partial(evaluate, session, held_out))
    if not session.ranks.first:
        return session.result({})
    centred = centre(session.roles, demonstrations)
    report = build_report(session, rows, held_out, centred)
    verdict = reach_verdict(report)
    report["verdict"] = verdict.stored()
    write_json(session.run.folder / REPORT, report)
    metrics = session.summarise_metrics() | numbers_of(report) | {"verdict": verdict.decision}
    publish_checkpoint(session, ROLE, metrics, extra_files=(REPORT,))
    data = {"metrics": metrics, "report": report, "steps": session.total}
    return session.result(data, finished_tables(session.run))


def update(session: Session, rows: list[TokenComparison], step: int) -> dict[str, float]:
    """One optimiser step on a batch of comparisons; returns its metrics."""
    batch = session.batch(rows, step)
    mine = session.ranks.share(batch)
    sums = session.add_gradients(partial(backward_reward, session.roles, mine, len(batch), session.config))
    return pair_means(sums) | session.finish_step(ROLE, batch, step)


def evaluate(session: Session, held_out: list[TokenComparison], step: int) -> dict[str, float]:
    """How well scores predict the held-out preferences."""
    if not held_out:
        return {}
    with session.ranks.together():
        scores = score_rows(session.roles, ROLE, flatten(held_out))
        return held_out_measures(build_comparison_report(scores, held_out))


def backward_reward(
    roles: Roles, rows: list[TokenComparison], denominator: int, config: RewardConfig
) -> dict[str, float]:
    """Add the gradient of sum(comparison losses) / denominator; returns sums over pairs.

    All pairs of a prompt stay in one forward pass, each weighing 1 / (number of its pairs).
    """

    def forward(rows: list[TokenComparison]) -> tuple[Tensor, dict[str, float]]:
        scores = sequence_scores(roles, ROLE, [row.ids for row in flatten(rows)])
        loss = reward_losses(scores, rows, config).sum() / denominator
        return loss, pair_sums(loss, scores, pairs_of(rows))

    return NO_PAIRS | roles.accumulate(ROLE, rows, forward)


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


# --- the head, and what the report is made of


def start_head(session: Session) -> ScalarHead:
    """The head of the reward checkpoint that --model names, else a random one."""
    base, manifest = session.base, session.model.manifest
    if manifest is not None and manifest.stage == "reward":
        return head_of(base, manifest.folder).copy(trainable=True)
    return ScalarHead(base.width).randomise(derive(session.config.seed, "reward", "head")).to(base.device)


def encode_demonstrations(session: Session, rows: list[TokenComparison]) -> list[TokenRow]:
    """The demonstrations whose mean score becomes 0: those given, else the chosen training responses.

    Their score is read at the end token, as in PPO; given ones that are too long to keep it are left out.
    """
    chosen = [row.best for row in rows[:CENTRING_ROWS]]
    if session.inputs.demonstrations is None:
        return chosen
    given, limit = session.inputs.demonstrations.rows[:CENTRING_ROWS], session.max_tokens
    encoded = session.encode(given, partial(session.text.judged, max_tokens=limit), "demonstrations", limit).rows
    whole = [row for row in encoded if int(row.ids[-1]) in session.text.stop_ids]
    cut = len(encoded) - len(whole)
    if cut:
        others = "the other demonstrations" if whole else "chosen training responses"
        session.reporter.warn(
            f"{cut} of {counted(len(encoded), 'demonstrations')} {verb_for(cut, 'are')} longer than max_tokens {limit} "
            f"and {verb_for(cut, 'lose')} the end token; scores are centred on {others}"
        )
    return whole or chosen


def centre(roles: Roles, demonstrations: list[TokenRow]) -> Tensor:
    """Shift the head's bias so that demonstrations score 0 on average (Stiennon 2020; Huang et al. 2024).

    Returns their scores (N,) under the shifted head.
    """
    scores = score_rows(roles, ROLE, demonstrations)
    mean = scores.double().mean().float()
    roles.heads[ROLE].bias.data -= mean.to(roles.base.device)
    return scores - mean


def build_report(
    session: Session, rows: list[TokenComparison], held_out: list[TokenComparison], centred: Tensor
) -> dict[str, object]:
    """Measures of the trained model on held-out comparisons, demonstrations (`centred`, their scores) and samples."""
    report: dict[str, object] = {}
    if held_out:
        scores = score_rows(session.roles, ROLE, flatten(held_out))
        report |= build_comparison_report(scores, held_out) | {"baselines": baselines(scores, held_out, rows)}
    report |= {"demonstrations_mean": float(centred.mean()), "demonstrations_std": float(centred.std(unbiased=False))}
    agreed, both = session.inputs.data.agreement
    report |= {"annotator_agreement": agreed / both, "annotator_pairs": both} if both else {}
    return report | (check_policy_scores(session) if session.config.sft_samples and held_out else {})


def check_policy_scores(session: Session) -> dict[str, object]:
    """Scores of the responses of the policy that training started from; empty if --model is a reward model."""
    roles, model = session.roles, session.model
    if model.manifest is not None and model.manifest.stage == "reward":
        return {}
    roles.add("policy", adapter_of(roles.base, model, trainable=False))
    prompts = [Prompt(row.where, row.prompt) for row in session.inputs.held_out]
    samples = score_policy_responses(roles, session.text, prompts, session.config.sft_samples, session.config.seed)
    roles.remove("policy")
    return {"samples": samples} if samples else {}
