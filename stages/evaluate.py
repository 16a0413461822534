"""Measures a checkpoint: a reward model on comparisons, a policy on demonstrations or prompts."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from stages.config import EvaluateConfig
from stages.errors import DatasetError
from stages.files.atomic import write_json
from stages.files.rows import Demonstration, Prompt
from stages.inputs import Inputs
from stages.maths.statistics import mean_with_error, wilson_interval
from stages.models.roles import Roles, adapter_of, head_of
from stages.models.source import Source
from stages.models.tokens import PromptRow, Text, TokenRow
from stages.results import Report, Result, Table, facts_table, metrics_table
from stages.rollout.experience import Rollout, roll_out, rollout_kl
from stages.rollout.generate import Sampling
from stages.rollout.samples import readable
from stages.rollout.sources import Rewards
from stages.training.comparing import encode_comparison, report_on, report_tables
from stages.training.language import held_out_loss, prompt_of
from stages.training.session import context_limit, encode_all, open_base, open_text

DEFAULT_RESPONSE_TOKENS = 128


def run(config: EvaluateConfig, inputs: Inputs, report: Report, *, dry_run: bool = False) -> Result:
    """Measure whatever the model and the dataset allow; writes the report where --output says."""
    source = inputs.source
    text = open_text(source, config)
    rows = tokenise(config, inputs, text, report)
    if dry_run:
        plan = {name: len(encoded) for name, encoded in rows.items()}
        return Result("evaluate", "dry run", None, {"plan": plan}, (facts_table("evaluate: the plan", plan),))
    base, _ = open_base(source, config, text)
    roles = Roles(base)
    found: dict[str, object] = {"model": config.model, "dataset": config.dataset}
    tables: tuple[Table, ...] = ()
    if "comparisons" in rows:
        roles.add("reward", adapter_of(base, source, trainable=False), head_of(base, source.folder))
        found["reward_model"] = report_on(roles, "reward", rows["comparisons"], "auto")
        tables = report_tables(found["reward_model"])
    if "demonstrations" in rows:
        roles.add("policy", adapter_of(base, source, trainable=False))
        found["perplexity"] = measure_perplexity(roles, rows["demonstrations"])
        tables = (metrics_table("perplexity", found["perplexity"]),)
    if "prompts" in rows:
        found |= measure_policy(config, inputs, roles, text, rows["prompts"], report)
        tables += policy_tables(found)
    if config.output:
        write_json(Path(config.output).expanduser(), found)
    is_policy = source.manifest is not None and "comparisons" not in rows
    further = (f"rlhf export --model {shlex.quote(config.model)} --output DIR",) if is_policy else ()
    return Result("evaluate", "done", config.output, found, tables, further)


def tokenise(config: EvaluateConfig, inputs: Inputs, text: Text, report: Report) -> dict[str, list]:
    """What will be measured, encoded, by its kind: comparisons; demonstrations, and prompts where they are answered.

    Raises DatasetError for rows that do not fit.
    """
    source, data = inputs.source, inputs.data
    encode = partial(encode_all, skip_bad=config.skip_bad_rows, report=report)
    if source.manifest is not None and source.manifest.stage == "reward":
        read = partial(encode_comparison, text=text, max_tokens=context_limit(config.max_tokens, source, report))
        return {"comparisons": encode(data.rows, read, what="comparisons")}
    rows: dict[str, list] = {}
    if data.kind == "demonstration":
        limit = context_limit(config.max_tokens, source, report)
        read = partial(text.demonstration, mask=config.mask, max_tokens=limit)
        rows["demonstrations"] = encode(data.rows, read, what="demonstrations")
    if data.kind == "prompt" or inputs.rewards or inputs.gold:
        longest = min(config.max_prompt_tokens or 2**30, source.context - sampling_of(config, source).max_tokens)
        asked = [row if isinstance(row, Prompt) else prompt_of(row) for row in data.rows if is_prompt(row)]
        if not asked:
            raise DatasetError("no row has a prompt to answer", where=data.source, fix="give prompts")
        rows["prompts"] = encode(asked, partial(text.prompt, max_tokens=longest), what="prompts")
    return rows


def measure_perplexity(roles: Roles, rows: list[TokenRow]) -> dict[str, float]:
    """Loss per target token and perplexity on demonstrations."""
    found = held_out_loss(roles, "policy", rows, "auto")
    return {"loss": found["eval_loss"], "perplexity": found["eval_perplexity"], "rows": len(rows)}


def measure_policy(
    config: EvaluateConfig, inputs: Inputs, roles: Roles, text: Text, prompts: list[PromptRow], report: Report
) -> dict[str, object]:
    """Score, KL, length of responses to prompts; against another checkpoint, both and the win rate."""
    sampling = sampling_of(config, inputs.source)
    sources = {"score": inputs.rewards, "gold": inputs.gold}
    judges = {n: Rewards(specs, roles, "auto", prefix=f"{n} ") for n, specs in sources.items() if specs}
    if inputs.reference is not None:
        roles.add("reference", adapter_of(roles.base, inputs.reference, trainable=False))
    contenders = {"policy": adapter_of(roles.base, inputs.source, trainable=False)}
    if inputs.against is not None:
        contenders["against"] = adapter_of(roles.base, inputs.against, trainable=False)
    report.begin("evaluate", len(contenders))
    rollouts, scores, measures = {}, {}, {}
    for done, (name, adapter) in enumerate(contenders.items(), 1):
        roles.add("policy", adapter)
        keys = [(config.seed, "evaluate", i) for i in range(len(prompts))]  # both answer with the same noise
        rollouts[name] = roll_out(roles, "policy", text, prompts, keys, sampling)
        scores[name] = {n: judge_rollout(judge, rollouts[name]) for n, judge in judges.items()}
        kl = rollout_kl(roles, rollouts[name], sampling.temperature, "auto") if inputs.reference else None
        measures[name] = summarise(rollouts[name], scores[name], kl)
        report.log(done, measures[name])
    report.end()
    found: dict[str, object] = {"prompts": len(prompts), "temperature": sampling.temperature, **measures}
    if inputs.against is not None:
        found["compared_with"] = config.against
        found["win_rate"] = {
            {"score": "reward"}.get(n, n): win_rate(scores["policy"][n], scores["against"][n]) for n in judges
        }
    found["examples"] = examples(prompts, rollouts, scores, config.examples)
    return found


def is_prompt(row: object) -> bool:
    """True where a row can be asked."""
    return isinstance(row, Prompt) or (isinstance(row, Demonstration) and prompt_of(row) is not None)


def sampling_of(config: EvaluateConfig, source: Source) -> Sampling:
    """How to sample: as asked, else as the policy was trained, else temperature 1 and 128 tokens."""
    trained = source.manifest.config if source.manifest is not None else {}
    temperature = config.temperature or trained.get("temperature") or 1.0
    default = min(DEFAULT_RESPONSE_TOKENS, source.context // 2)
    tokens = config.max_response_tokens or trained.get("max_response_tokens") or default
    return Sampling(temperature, tokens, rows_at_once=config.rollout_batch_size)


def judge_rollout(judge: Rewards, rollout: Rollout) -> Tensor:
    """Scores (B,) of a rollout's responses."""
    return judge.score(rollout.prompts, rollout.responses, rollout.texts, rollout.ended)


def summarise(rollout: Rollout, scores: dict[str, Tensor], kl: Tensor | None) -> dict[str, float]:
    """Means and standard errors over prompts."""
    out: dict[str, float] = {}
    for name, values in scores.items():
        out[name], out[f"{name}_error"] = mean_with_error(values.double())
    if kl is not None:
        out["kl"], out["kl_error"] = mean_with_error(kl.double().cpu())
    lengths = torch.tensor(rollout.lengths, dtype=torch.float64)
    out["length"] = float(lengths.mean())
    out["eos_rate"] = float(rollout.ended.double().mean())
    return out | {"duplicate_rate": 1 - len(set(rollout.texts)) / len(rollout.texts)}


def win_rate(mine: Tensor, other: Tensor) -> dict[str, float]:
    """How often one score beats the other, ties half, with its 95 % Wilson interval."""
    wins = float((mine > other).double().sum() + 0.5 * (mine == other).double().sum())
    low, high = wilson_interval(wins, len(mine))
    return {"rate": wins / len(mine), "low": low, "high": high, "n": len(mine)}


def examples(
    prompts: list[PromptRow], rollouts: dict[str, Rollout], scores: dict[str, dict[str, Tensor]], count: int
) -> list[dict[str, object]]:
    """The first prompts with each contender's response and scores."""
    rows = []
    for i, prompt in enumerate(prompts[:count]):
        row: dict[str, object] = {"prompt": prompt.text, "response": rollouts["policy"].texts[i]}
        row |= {name: float(values[i]) for name, values in scores["policy"].items()}
        if "against" in rollouts:
            row["against"] = rollouts["against"].texts[i]
            row |= {f"against_{name}": float(values[i]) for name, values in scores["against"].items()}
        rows.append(row)
    return rows


def policy_tables(found: dict) -> tuple[Table, ...]:
    """The measurements as tables for a person."""
    contenders = [name for name in ("against", "policy") if name in found]
    labels = {"score": "score", "gold": "gold score", "kl": "KL to the reference", "length": "response length",
              "eos_rate": "ended by itself", "duplicate_rate": "duplicates"}  # fmt: skip
    rows = [
        (label, *(_cell(found[name], key) for name in contenders))
        for key, label in labels.items()
        if any(key in found[name] for name in contenders)
    ]
    for name, rate in found.get("win_rate", {}).items():
        rows.append((f"win rate by {name}", "", f"{rate['rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"))
    heads = side_names(str(found.get("compared_with")), str(found["model"])) if len(contenders) > 1 else {}
    main = Table(f"{found['prompts']} prompts", ("measure", *(heads.get(n, "value") for n in contenders)), tuple(rows))
    shown = tuple(
        (readable(row["prompt"]), *((str(row["against"]),) if "against" in row else ()), str(row["response"]))
        for row in found["examples"]
    )
    if not shown:
        return (main,)
    return main, Table("examples", ("prompt", *(heads.get(n, "response") for n in contenders)), shown)


def side_names(against: str, policy: str) -> dict[str, str]:
    """Headings for what is compared: the folders' names where they tell them apart, else what was given."""
    short = {"against": Path(against).name, "policy": Path(policy).name}
    return short if short["against"] != short["policy"] else {"against": against, "policy": policy}


def _cell(measures: dict[str, float], key: str) -> str:
    if key not in measures:
        return ""
    error = f" ± {measures[f'{key}_error']:.3f}" if f"{key}_error" in measures else ""
    return f"{measures[key]:.3f}{error}"
