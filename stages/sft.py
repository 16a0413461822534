"""Supervised fine-tuning: cross-entropy on the targets of demonstrations (Ouyang et al. 2022, step 1)."""

from __future__ import annotations

from functools import partial

from stages.config import SftConfig
from stages.inputs import Inputs
from stages.models.roles import Roles, start_adapter
from stages.results import Reporter, Result, metrics_table, next_commands
from stages.rollout.samples import show_samples
from stages.training.batching import batch_at, epoch_at, steps_in
from stages.training.devices import peak_memory_gb
from stages.training.language import count_targets, held_out_loss, learn_rows, prompt_of, warn_above_uniform
from stages.training.loop import add_gradients, apply_gradients, before_and_after, read_metrics, train
from stages.training.optimizer import learning_rate_at
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

AFTER_TRAINING = "training diverged (lower --learning-rate), unless the loss was as high before training"


def run(config: SftConfig, inputs: Inputs, reporter: Reporter, *, dry_run: bool = False) -> Result:
    """Train an adapter on demonstrations and publish it as a checkpoint."""
    source, out = inputs.source, inputs.run
    text = open_text(source, config, reporter)
    limit = context_limit(config.max_tokens, source, reporter)
    encode = partial(text.demonstration, mask=config.mask, max_tokens=limit)
    rows = encode_all(inputs.train, encode, skip_bad=config.skip_bad_rows, reporter=reporter, what="demonstrations")
    held = encode_all(
        inputs.held_out, encode, skip_bad=config.skip_bad_rows, reporter=reporter, what="held-out demonstrations"
    )
    report_cuts(rows, limit, reporter, "rows")
    report_cuts(held, limit, reporter, "held-out rows")
    cause = check_coverage(text, inputs.train, reporter, what="demonstrations")
    total = steps_in(len(rows), config.batch_size, config.epochs, config.max_steps)
    sizes = [len(row.ids) for row in rows]
    work = Work("sft", sizes, config.batch_size, read=count_targets(rows) / sum(sizes))
    if dry_run:
        return plan_result(config, source, work, total, inputs.rows_left_out)

    base, ranks = open_for_training(source, config, text, work, reporter)
    roles = Roles(base)
    seed = derive(config.seed, "sft", "adapter")
    adapter = start_adapter(base, source, config, seed)
    roles.add("policy", adapter)
    progress = open_progress(config, {"policy": roles.parameters("policy")})

    def update(step: int) -> dict[str, float]:
        numbers = batch_at(step, len(rows), config.batch_size, config.seed, "sft")
        batch = [rows[i] for i in numbers]
        mine = partial(learn_rows, roles, ranks.share(batch), count_targets(batch), config.micro_batch_size)
        with roles.use("policy"):
            loss = add_gradients(roles, ranks, mine)
        loss = ranks.sum_floats({"loss": loss}, base.device)["loss"]
        if step == 0 and not held:
            warn_above_uniform(loss, base.vocabulary, "the loss of the first batch before training", cause, reporter)
        rate = learning_rate_at(step, total, config.learning_rate, config.lr_schedule, config.warmup_ratio)
        stepped = apply_gradients(progress, {"policy": rate}, config.max_grad_norm, ranks, step + 1)
        return {
            "loss": loss,
            "lr": rate,
            "epoch": epoch_at(step + 1, len(rows), config.batch_size),
            "tokens": sum(len(row.ids) for row in batch),
            "samples": len(batch),
            "memory_gb": peak_memory_gb(base.device),
            **stepped,
        }

    def evaluate(step: int) -> dict[str, float]:
        with ranks.together():
            found = held_out_loss(roles, "policy", held, config.micro_batch_size)
        if held and step in (0, total):
            when = "before training" if step == 0 else "after training"
            why = cause or (AFTER_TRAINING if step else "")
            warn_above_uniform(found["eval_loss"], base.vocabulary, f"the held-out loss {when}", why, reporter)
        prompts = [prompt for prompt in map(prompt_of, inputs.held_out) if prompt is not None][: config.samples]
        with ranks.together():
            show_samples(out, roles, "policy", text, prompts, step, config.seed, ranks)
        return found

    reporter.note(f"{len(rows)} demonstrations, {total} steps, {adapter.size:,} trainable parameters")
    train(out, reporter, ranks, progress, config, title="sft", total=total, update=update, evaluate=evaluate)
    if not ranks.first:
        return Result("sft", "done", config.output, {})
    lines = read_metrics(out)
    metrics = {"train_loss": lines[-1].get("loss"), **before_and_after(lines), "held_out_rows": len(held)}
    publish_checkpoint(
        out, "sft", config, roles, text,
        adapter=adapter, parents=[("model", source)], datasets={"train": inputs.data}, metrics=metrics, lines=lines,
    )  # fmt: skip
    found = {"metrics": metrics, "steps": total}
    return Result("sft", "done", config.output, found, (metrics_table("sft", metrics),), next_commands("sft", config))
