"""Supervised fine-tuning: an adapter learns to continue prompts as demonstrations do (Ouyang et al. 2022, 3.1)."""

from __future__ import annotations

from functools import partial

from stages.config import SftConfig
from stages.data.prompts import prompt_of
from stages.diagnostics.finished import finished_tables
from stages.inputs import Inputs
from stages.models.tokens import TokenRow
from stages.results import Reporter, Result
from stages.rollout.samples import show_samples
from stages.training.language import count_targets, held_out_loss, learn_rows
from stages.training.plan import Work
from stages.training.publishing import publish_checkpoint
from stages.training.session import Session

AFTER_TRAINING = "training diverged (lower --learning-rate), unless the loss was as high before training"


def run(config: SftConfig, inputs: Inputs, reporter: Reporter, *, dry_run: bool = False) -> Result:
    """Train an adapter on demonstrations and publish it as a checkpoint."""
    session = Session("sft", config, inputs, reporter)
    encode = partial(session.text.demonstration, mask=config.mask, max_tokens=session.max_tokens)
    rows, held_out = session.encode_split(encode, "demonstrations", session.max_tokens)
    sizes = [row.size for row in rows]
    session.plan(Work("sft", sizes, config.batch_size, read=count_targets(rows) / sum(sizes)))
    if dry_run:
        return session.describe_plan()

    session.load_base()
    session.start_role("policy")
    session.optimise_role("policy", "demonstrations")
    session.train(partial(update, session, rows, held_out), partial(evaluate, session, held_out))
    if not session.ranks.first:
        return session.result({})
    metrics = session.summarise_metrics() | {"held_out_rows": len(held_out)}
    publish_checkpoint(session, "policy", metrics)
    return session.result({"metrics": metrics, "steps": session.total}, finished_tables(session.run))


def update(session: Session, rows: list[TokenRow], held_out: list[TokenRow], step: int) -> dict[str, float]:
    """One optimiser step on a batch of demonstrations; returns its metrics."""
    batch = session.batch(rows, step)
    mine = session.ranks.share(batch)
    learned = session.add_gradients(partial(learn_rows, session.roles, "policy", mine, count_targets(batch)))
    if step == 0 and not held_out:
        session.warn_above_uniform(learned["loss"], "the loss of the first batch before training")
    return learned | session.finish_step("policy", batch, step)


def evaluate(session: Session, held_out: list[TokenRow], step: int) -> dict[str, float]:
    """The loss on held-out demonstrations, and responses to a few of their prompts in samples.jsonl."""
    with session.ranks.together():
        metrics = held_out_loss(session.roles, "policy", held_out)
    if held_out and step in (0, session.total):
        when, cause = ("before training", "") if step == 0 else ("after training", AFTER_TRAINING)
        session.warn_above_uniform(metrics["eval_loss"], f"the held-out loss {when}", cause)
    prompts = [prompt for prompt in map(prompt_of, session.inputs.held_out) if prompt is not None]
    with session.ranks.together():
        show_samples(session, "policy", prompts[: session.config.samples], step)
    return metrics
