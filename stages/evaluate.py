"""Measures checkpoints: policies on prompts or demonstrations, reward models and implicit rewards on comparisons."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from stages.cells import format_text
from stages.checkpoint.atomic import write_json
from stages.data.prompts import prompt_of
from stages.data.rows import Prompt
from stages.diagnostics.comparison_evaluation import (
    SIDE_BY_SIDE,
    comparison_evaluation_tables,
    evaluate_on_comparisons,
)
from stages.diagnostics.judge import judge_pairs, open_judge
from stages.diagnostics.kl_curve import describe_over_optimisation, plot_kl_curve, turning_point
from stages.diagnostics.plot import write_plot
from stages.diagnostics.scorers import Scorers
from stages.errors import DatasetError, JudgeError, NotFiniteError, counted
from stages.inputs import Inputs
from stages.maths.statistics import clustered_interval, mean_with_error
from stages.maths.win_rates import length_adjusted_win_rate
from stages.measuring_config import EvaluateConfig
from stages.models.candidates import Candidate, candidate_of, labels_of
from stages.models.roles import Roles, adapter_of, candidate_adapter
from stages.models.tokens import PromptRow, Text
from stages.places import absolute
from stages.results import Reporter, Result, Table
from stages.rollout.evaluation import (
    EvaluationSetup,
    ScoredRollout,
    best_of_rows,
    measure,
    sampling_of,
    summarise_responses,
)
from stages.rollout.generate import Sampling, check_count, check_engine
from stages.rollout.reward_sources import RewardSources, check_templates
from stages.tables import evaluation_tables, facts_table, metrics_table
from stages.training.comparing import MIN_PROMPT_CLUSTERS
from stages.training.language import held_out_loss, warn_above_uniform
from stages.training.long_rows import context_limit, prompt_encoder, prompt_limit
from stages.training.opening import Encoded, check_coverage, encode_all, open_base
from stages.training.preview import build_preview
from stages.training.row_tokens import RowEncoder


def run(config: EvaluateConfig, inputs: Inputs, reporter: Reporter, *, dry_run: bool = False) -> Result:
    """Measure what the model and the dataset allow; --output gets the report as JSON."""
    source = inputs.source
    model = replace(candidate_of(config.model, source), reference=inputs.reference)
    scorers = Scorers([model, *inputs.also], config, reporter)
    text = scorers.text
    encoded = tokenise(config, inputs, scorers, reporter)
    rows = {name: part.rows for name, part in encoded.items()}
    counts = inputs.count_left_out(*encoded.values())
    cause = check_coverage(text or scorers.readers[model.name], inputs.data.rows, reporter, what="rows")
    if dry_run:
        return describe_plan(config, inputs, scorers, rows, counts)
    base = open_base(scorers.on_base, config, text) if text else None
    roles = Roles(base) if base else None
    report: dict[str, object] = {"model": config.model, "dataset": config.dataset, "rows": counts}
    tables: tuple[Table, ...] = ()
    if "comparisons" in rows:
        reports = evaluate_on_comparisons(roles, scorers.candidates, rows["comparisons"], reporter, scorers.classifiers)
        alone = {name: value for name, value in reports[0].items() if name not in SIDE_BY_SIDE}
        report |= {reports[0]["kind"]: alone} | ({"compared": reports} if inputs.also else {})
        tables = comparison_evaluation_tables(reports)
    if "demonstrations" in rows:
        roles.add("policy", adapter_of(base, source, trainable=False))
        found, count = held_out_loss(roles, "policy", rows["demonstrations"]), len(rows["demonstrations"])
        report["perplexity"] = {"loss": found["eval_loss"], "perplexity": found["eval_perplexity"], "rows": count}
        warn_above_uniform(found["eval_loss"], base.vocabulary, "the loss", cause, reporter)
        tables = (metrics_table("perplexity", report["perplexity"]),)
    if "prompts" in rows:
        for line in check_engine(base, config.rollout_engine):
            reporter.note(line)
        report |= measure_policies(config, inputs, roles, text, rows["prompts"], reporter)
        tables += evaluation_tables(report)
    write_report(config, report, reporter)
    is_policy = source.manifest is not None and source.manifest.stage != "reward"
    further = (f"rlhf export --model {shlex.quote(config.model)} --output DIR",) if is_policy else ()
    return Result("evaluate", "done", config.output, report, tables, further)


def write_report(config: EvaluateConfig, report: dict, reporter: Reporter) -> None:
    """Write the report to --output, and the plot of it to --plot, if they are given."""
    if config.output:
        write_json(absolute(config.output, "--output"), report)
    if config.plot:
        curve = report.get("frontier") or [{"model": report["model"]} | report["policy"]]
        picture = plot_kl_curve(curve, report.get("best_of", []), counted(report["prompts"], "prompts"))
        write_plot(absolute(config.plot, "--plot"), picture)
        reporter.note(f"drew {config.plot}")


def describe_plan(
    config: EvaluateConfig, inputs: Inputs, scorers: Scorers, rows: dict[str, list], counts: dict[str, int]
) -> Result:
    """The result of --dry-run: numbers of rows, and a preview of them unless classifiers alone read them."""
    plan = {name: len(part) for name, part in rows.items()}
    data, tables = {"plan": plan, "rows": counts}, (facts_table("evaluate: the plan", plan | counts),)
    if scorers.text is None:
        return Result("evaluate", "dry run", None, data, tables)
    encoder = RowEncoder(config, scorers.on_base, scorers.text, sampling_of(scorers.on_base, config).max_tokens)
    stage = next({"comparisons": "reward", "demonstrations": "sft", "prompts": "ppo"}[name] for name in rows)
    preview = build_preview(stage, encoder, inputs.data.rows, command="evaluate")
    data |= {"preview": preview.data}
    return Result("evaluate", "dry run", None, data, preview.tables + tables, passages=preview.passages)


def tokenise(config: EvaluateConfig, inputs: Inputs, scorers: Scorers, reporter: Reporter) -> dict[str, Encoded]:
    """The rows to measure on, tokenised, by kind: comparisons; or demonstrations, or prompts to answer, or both.

    Raises DatasetError for rows that do not fit.
    """
    source, data, text = inputs.source, inputs.data, scorers.text
    encode = partial(encode_all, config=config, reporter=reporter)
    if data.kind in ("comparison", "rating"):
        return {"comparisons": scorers.read(data.rows, reporter)}
    rows: dict[str, Encoded] = {}
    if data.kind == "demonstration":
        limit = context_limit(config.max_tokens, source, reporter)
        read = partial(text.demonstration, mask=config.mask, max_tokens=limit)
        rows["demonstrations"] = encode(data.rows, read, what="demonstrations", limit=limit)
    if data.kind == "prompt" or inputs.rewards or inputs.gold or config.judge:
        limit = prompt_limit(config, source, sampling_of(source, config).max_tokens)
        prompts = [row if isinstance(row, Prompt) else prompt_of(row) for row in data.rows]
        prompts = [prompt for prompt in prompts if prompt is not None]
        if not prompts:
            raise DatasetError("no row has a prompt to answer", where=data.source, fix="give prompts")
        rows["prompts"] = encode(prompts, prompt_encoder(text, config, limit), what="prompts", limit=limit)
        check_templates([*inputs.rewards, *inputs.gold], text, rows["prompts"].rows, reporter)
        most, count = max(config.best_of, default=1), len(rows["prompts"].rows)
        how = f"the best of {most:,} responses to {count:,} prompts takes"
        check_count(most * count, how, "--best-of", "lower it, or use --limit-rows for fewer prompts")
    return rows


# --- policies on prompts


def measure_policies(
    config: EvaluateConfig, inputs: Inputs, roles: Roles, text: Text, prompts: list[PromptRow], reporter: Reporter
) -> dict[str, object]:
    """Score, KL and length of the responses of --model, --against and --also, and of the best of several responses."""
    source = inputs.source
    judges = {"score": inputs.rewards, "gold": inputs.gold}
    combine = {"score": config.combination, "gold": ("sum", 1.0)}
    rewards = {
        name: RewardSources(
            specs, roles, f"{name} ", config.reward_timeout, combine=combine[name], text=text, reporter=reporter
        )
        for name, specs in judges.items()
        if specs
    }
    if inputs.reference is not None:
        roles.add("reference", adapter_of(roles.base, inputs.reference, trainable=False))
    sampling = sampling_of(source, config)
    setup = EvaluationSetup(roles, text, prompts, sampling, rewards, config.seed)
    model = candidate_of(config.model, source)
    sides = {"policy": model} | ({"against": candidate_of(config.against, inputs.against)} if inputs.against else {})
    warn_of_other_sampling([*sides.values(), *inputs.also], sampling, reporter)
    reporter.begin("evaluate", len(sides) + bool(config.best_of) + len(inputs.also))
    report: dict[str, object] = {"prompts": len(prompts), "temperature": sampling.temperature}
    measured: dict[str, ScoredRollout] = {}
    done = 0
    for name, candidate in sides.items():
        measured[name] = measure_candidate(setup, candidate)
        report[name] = summarise_responses(measured[name])
        if name == "policy" and config.best_of:
            report["best_of"] = best_of_rows(setup, measured[name], config.best_of)
            reporter.log(done := done + 1, {})
        reporter.log(done := done + 1, report[name])
    if inputs.also:
        report |= measure_kl_curve(setup, [model, *inputs.also], measured["policy"], reporter, done)
    reporter.end()
    for sources in rewards.values():
        sources.report_cut()
    if inputs.against is not None:
        report["compared_with"] = config.against
        report["win_rate"] = compare_sides(config, measured, prompts, reporter)
    report["examples"] = examples(prompts, measured, config.examples)
    return report


def warn_of_other_sampling(candidates: list[Candidate], sampling: Sampling, reporter: Reporter) -> None:
    """Note every policy that is sampled with other settings than it was trained with: its KL and scores differ."""
    used = {"temperature": sampling.temperature, "max_response_tokens": sampling.max_tokens}
    for candidate in candidates:
        trained = {name: candidate.knobs.get(name) for name in used}
        other = [f"{name} {trained[name]:g}" for name in used if trained[name] not in (None, used[name])]
        if candidate.stage == "ppo" and other:
            settings = ", ".join(f"{name} {value:g}" for name, value in used.items())
            reporter.note(f"{candidate.name} was trained at {' and '.join(other)}; all are measured at {settings}")


def measure_candidate(setup: EvaluationSetup, candidate: Candidate) -> ScoredRollout:
    """A candidate's response to every prompt. Raises NotFiniteError, with its name, for numbers that are not finite."""
    setup.roles.add("policy", candidate_adapter(setup.roles.base, candidate))
    try:
        return measure(setup, [0])
    except NotFiniteError as error:
        raise NotFiniteError(error.what, where=candidate.name, fix=error.fix) from None


def measure_kl_curve(
    setup: EvaluationSetup, candidates: list[Candidate], first: ScoredRollout, reporter: Reporter, done: int
) -> dict[str, object]:
    """A row per candidate by rising KL, and the KL beyond which gold falls; `first` is the first one's rollout."""
    rows, gold = [], {}
    for number, (candidate, label) in enumerate(zip(candidates, labels_of(candidates), strict=True)):
        measured = first if not rows else measure_candidate(setup, candidate)
        summary = summarise_responses(measured)
        rows.append({"model": candidate.name, "label": label} | summary)
        gold[candidate.name] = measured.scores.get("gold")
        reporter.log(done + number, summary)
    rows.sort(key=lambda row: row["kl"])
    report: dict[str, object] = {"frontier": rows}
    if setup.judges.keys() >= {"score", "gold"}:
        turn = turning_point(rows)
        _, error = mean_with_error(gold[turn[0]["model"]] - gold[turn[1]["model"]]) if turn else (0.0, None)
        report["over_optimisation"] = describe_over_optimisation(rows, error)
    return report


def compare_sides(
    config: EvaluateConfig, measured: dict[str, ScoredRollout], prompts: list[PromptRow], reporter: Reporter
) -> dict[str, dict[str, object]]:
    """Win rates of the policy over --against: by the reward sources, by gold, and by the judge, as far as given."""
    mine, other = measured["policy"], measured["against"]
    longer = torch.tensor(mine.rollout.lengths) - torch.tensor(other.rollout.lengths)
    rates: dict[str, dict[str, object]] = {
        {"score": "reward"}.get(name, name): win_rate(scores, other.scores[name], prompts, longer)
        for name, scores in mine.scores.items()
    }
    if config.judge:
        texts = zip(prompts, mine.rollout.texts, other.rollout.texts, strict=True)
        rows = [(format_text(prompt.text), *responses) for prompt, *responses in texts]
        reporter.begin("judge", len(rows))
        verdicts = judge_pairs(open_judge(config), rows, partial(reporter.log, metrics={}))
        reporter.end()
        rates["judge"] = judged_rate(config, verdicts, prompts, longer, reporter)
    return rates


def judged_rate(
    config: EvaluateConfig,
    verdicts: list[tuple[float | None, float | None]],
    prompts: list[PromptRow],
    longer: Tensor,
    reporter: Reporter,
) -> dict[str, object]:
    """The win rate by a judge's verdicts in both orders, and how they agree; rows without both verdicts are left out.

    Raises JudgeError if there is no such row.
    """
    kept = [i for i, both in enumerate(verdicts) if None not in both]
    if not kept:
        what = f"none of its replies to {len(verdicts)} comparisons has a verdict"
        raise JudgeError(what, where=f"--judge {config.judge}", fix="use a model that follows instructions")
    if len(kept) < len(verdicts):
        reporter.warn(f"the judge gave no verdict on {len(verdicts) - len(kept)} of {len(verdicts)} comparisons")
    both = torch.tensor([verdicts[i] for i in kept], dtype=torch.float64)
    wins = both.mean(dim=1)
    return mean_of_wins(wins, [prompts[i] for i in kept], longer[kept]) | {
        "model": config.judge_model,
        "wins": int((wins > 0.5).sum()),
        "ties": int((wins == 0.5).sum()),
        "losses": int((wins < 0.5).sum()),
        "orders_differ": float((both[:, 0] != both[:, 1]).double().mean()),
        "unreadable": len(verdicts) - len(kept),
    }


def win_rate(mine: Tensor, other: Tensor, prompts: list[PromptRow], longer: Tensor | None = None) -> dict[str, object]:
    """`mean_of_wins` for how often one score beats the other."""
    return mean_of_wins((mine > other).double() + 0.5 * (mine == other).double(), prompts, longer)


def mean_of_wins(wins: Tensor, prompts: list[PromptRow], longer: Tensor | None = None) -> dict[str, object]:
    """The mean of `wins` (N,), a tie a half, with its 95 % interval; rows of one prompt are one cluster.

    With fewer than MIN_PROMPT_CLUSTERS prompts, the interval is that of these prompts alone. With `longer` (N,), the
    length of my responses minus that of the others, also the rate at equal lengths, None if it cannot be estimated.
    """
    places: dict[tuple[int, ...], int] = {}
    clusters = [places.setdefault(tuple(prompt.ids.tolist()), len(places)) for prompt in prompts]
    clusters = clusters if len(places) >= MIN_PROMPT_CLUSTERS else list(range(len(wins)))
    low, high, _ = clustered_interval(wins, clusters)
    rate: dict[str, object] = {"rate": float(wins.mean()), "low": low, "high": high, "n": len(wins)}
    if longer is None:
        return rate
    adjusted = length_adjusted_win_rate(wins, longer, clusters) or (None, None, None)
    return rate | dict(zip(("adjusted", "adjusted_low", "adjusted_high"), adjusted, strict=True))


def examples(prompts: list[PromptRow], measured: dict[str, ScoredRollout], count: int) -> list[dict[str, object]]:
    """The first prompts with each side's response and scores."""
    rows = []
    for i, prompt in enumerate(prompts[:count]):
        row: dict[str, object] = {"prompt": prompt.text, "response": measured["policy"].rollout.texts[i]}
        row |= {name: float(values[i]) for name, values in measured["policy"].scores.items()}
        if "against" in measured:
            row["against"] = measured["against"].rollout.texts[i]
            row |= {f"against_{name}": float(values[i]) for name, values in measured["against"].scores.items()}
        rows.append(row)
    return rows
