"""Writes responses to prompts into a file, one JSON object per response, or per prompt the best of several."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from stages.checkpoint.atomic import write_text
from stages.errors import DatasetError
from stages.inputs import Inputs
from stages.inputs.outputs import BEST_KEYS, RESPONSE_KEYS
from stages.maths.best_of import best_of_kl
from stages.measuring_config import SampleConfig
from stages.models.roles import Roles, adapter_of
from stages.models.tokens import PromptRow, Text
from stages.places import absolute
from stages.reading import to_json
from stages.results import Reporter, Result, Table
from stages.rollout.best_responses import choose_best, score_responses
from stages.rollout.generate import Sampling, check_count, check_engine, generate
from stages.rollout.reward_sources import RewardSources, Scores, check_templates
from stages.rollout.samples import flatten_text
from stages.tables import facts_table, metrics_table
from stages.training.long_rows import prompt_encoder, prompt_limit
from stages.training.opening import check_coverage, encode_all, open_base, open_text
from stages.training.preview import build_preview
from stages.training.row_tokens import RowEncoder

SHOWN_RESPONSES = 3


def run(config: SampleConfig, inputs: Inputs, reporter: Reporter, *, dry_run: bool = False) -> Result:
    """Sample several responses to every prompt; write all of them, or with `best_of` the best as a demonstration."""
    source, output = inputs.source, absolute(config.output, "--output")
    text = open_text(source, config, reporter)
    limit = prompt_limit(config, source, config.max_response_tokens)
    encode = prompt_encoder(text, config, limit)
    encoded = encode_all(inputs.data.rows, encode, config=config, reporter=reporter, what="prompts", limit=limit)
    prompts = encoded.rows
    check_coverage(text, inputs.data.rows, reporter, what="prompts")
    check_templates(inputs.rewards, text, prompts, reporter)
    number = config.responses_sampled
    counts = {"prompts": len(prompts), "responses": len(prompts) * number}
    how = f"{number:,} responses to each of {len(prompts):,} prompts are"
    flag = "--best-of" if config.best_of else "--responses-per-prompt"
    check_count(counts["responses"], how, flag, "lower it, or use --limit-rows for fewer prompts")
    left_out = inputs.count_left_out(encoded)
    if dry_run:
        encoder = RowEncoder(config, source, text, config.max_response_tokens)
        preview = build_preview("ppo", encoder, inputs.data.rows, command="sample")
        data = {"plan": counts, "rows": left_out, "preview": preview.data}
        tables = (*preview.tables, facts_table("sample: the plan", counts | left_out))
        return Result("sample", "dry run", None, data, tables, passages=preview.passages)
    base = open_base(source, config, text)
    roles = Roles(base)
    roles.add("policy", adapter_of(base, source, trainable=False))
    about = {"timeout": config.reward_timeout, "combine": config.combination, "text": text, "reporter": reporter}
    rewards = RewardSources(inputs.rewards, roles, **about)
    for line in check_engine(base, config.rollout_engine):
        reporter.note(line)
    responses = sample_responses(config, roles, text, prompts, reporter)
    texts = [text.response_text(prompts[i // number].ids, response) for i, response in enumerate(responses)]
    rows = response_rows(prompts, responses, texts, text.stop_ids, number)
    data: dict[str, object] = {}
    if config.best_of:
        scores = score_responses(rewards, prompts, responses, texts, set(text.stop_ids))
        rewards.report_cut()
        rows, data = best_rows(rows, scores, config, reporter)
    write_text(output, "".join(to_json(row) + "\n" for row in rows))
    return describe_rows(config, rows, {**counts, "rows": left_out}, data)


def describe_rows(
    config: SampleConfig, rows: list[dict], counts: dict[str, object], scored: dict[str, object]
) -> Result:
    """The result of the command: counts, how responses end, how the best of several score, and the first rows."""
    ended = sum(row["ended"] for row in rows) / len(rows)
    data = {**counts, "ended": ended, "mean_tokens": sum(row["tokens"] for row in rows) / len(rows)} | scored
    answer = "completion" if config.best_of else "response"
    shown = tuple((flatten_text(row["prompt"]), row[answer]) for row in rows[:SHOWN_RESPONSES])
    samples = Table("samples", ("prompt", answer), shown)
    if not config.best_of:
        return Result("sample", "done", config.output, data, (samples,))
    model, dataset = shlex.quote(config.model), shlex.quote(config.output)
    following = f"rlhf sft --model {model} --dataset {dataset} --output DIR"
    tables = (metrics_table(f"the best of {config.best_of}", data), samples)
    return Result("sample", "done", config.output, data, tables, (following,))


def sample_responses(
    config: SampleConfig, roles: Roles, text: Text, prompts: list[PromptRow], reporter: Reporter
) -> list[Tensor]:
    """Tokens of the same number of responses to every prompt, prompt by prompt."""
    batch_size, engine = config.rollout_batch_size, config.rollout_engine
    sampling = Sampling(config.temperature, config.max_response_tokens, config.top_p, batch_size, engine)
    numbers = [(i, k) for i in range(len(prompts)) for k in range(config.responses_sampled)]
    ids, keys = [prompts[i].ids for i, _ in numbers], [(config.seed, "sample", i, k) for i, k in numbers]
    reporter.begin("sample", len(numbers))
    with roles.use("policy"):
        log = partial(reporter.log, metrics={})
        responses = generate(roles.base, ids, keys, text.stop_ids, sampling, progress=log)
    reporter.end()
    return responses


def response_rows(
    prompts: list[PromptRow], responses: list[Tensor], texts: list[str], stop_ids: Sequence[int], number: int
) -> list[dict[str, object]]:
    """A row of the file per response: its prompt, text, number among the prompt's, and the prompt's other columns."""
    return [
        {
            "prompt": prompts[i // number].text,
            "response": texts[i],
            "index": i % number,
            "ended": int(response[-1]) in stop_ids,
            "tokens": len(response),
            **{name: value for name, value in prompts[i // number].columns.items() if name not in RESPONSE_KEYS},
        }
        for i, response in enumerate(responses)
    ]


def best_rows(
    rows: list[dict[str, object]], scores: Scores, config: SampleConfig, reporter: Reporter
) -> tuple[list[dict[str, object]], dict[str, object]]:
    """Each prompt's best response as a demonstration, and how the best score compares with the mean.

    Raises DatasetError if no response has any text.
    """
    number = config.best_of
    by_prompt = scores.total.view(-1, number)
    best = choose_best(by_prompt, [row["response"] for row in rows])
    chosen = [i * number + k for i, k in enumerate(best) if k is not None]
    if not chosen:
        raise DatasetError("every response is blank", where=config.dataset, fix="use another model, or other prompts")
    parts = scores.parts
    demonstrations = [_demonstration(rows[i], float(scores.total[i]), parts[i]) for i in chosen]
    blank, cut = len(best) - len(chosen), sum(not row["ended"] for row in demonstrations)
    if blank:
        reporter.warn(f"{blank} of {len(best)} prompts have only blank responses and were left out")
    if cut:
        reporter.warn(
            f"{cut} of {len(chosen)} best responses were cut off by max_response_tokens; SFT would learn to end there: "
            "raise --max-response-tokens, or drop the rows whose `ended` is false"
        )
    return demonstrations, {
        "demonstrations": len(demonstrations),
        "score": float(scores.total[chosen].mean()),
        "score_of_all": float(scores.total.mean()),
        "kl_bound": best_of_kl(number),
    }


def _demonstration(row: dict[str, object], score: float, parts: dict[str, float]) -> dict[str, object]:
    """A row of `rlhf sample` under the names that `rlhf sft` reads, with its score."""
    scored = {"score": score} | ({"scores": parts} if parts else {})
    others = {name: value for name, value in row.items() if name not in ("prompt", "response", *BEST_KEYS, *scored)}
    about = {name: row[name] for name in ("index", "ended", "tokens")}
    return {"prompt": row["prompt"], "completion": row["response"]} | scored | about | others
