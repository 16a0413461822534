"""Writes responses to prompts into a file, one JSON object per response."""

from __future__ import annotations

from functools import partial

from stages.checkpoint.atomic import write_text
from stages.config import SampleConfig
from stages.inputs import Inputs
from stages.inputs.outputs import RESPONSE_KEYS
from stages.models.base import Base
from stages.models.model_ref import ModelRef
from stages.models.roles import Roles, adapter_of
from stages.models.tokens import PromptRow, Text
from stages.places import absolute
from stages.reading import to_json
from stages.results import Reporter, Result, Table
from stages.rollout.generate import Sampling, check_count, check_engine, generate
from stages.rollout.samples import flatten_text
from stages.tables import facts_table
from stages.training.long_rows import prompt_encoder, prompt_limit
from stages.training.opening import check_coverage, encode_all, open_base, open_text
from stages.training.preview import build_preview
from stages.training.row_tokens import RowEncoder

SHOWN_RESPONSES = 3


def run(config: SampleConfig, inputs: Inputs, reporter: Reporter, *, dry_run: bool = False) -> Result:
    """Sample `responses_per_prompt` responses to every prompt and write them."""
    source, output = inputs.source, absolute(config.output, "--output")
    text = open_text(source, config, reporter)
    limit = prompt_limit(config, source, config.max_response_tokens)
    encode = prompt_encoder(text, config, limit)
    encoded = encode_all(inputs.data.rows, encode, config=config, reporter=reporter, what="prompts", limit=limit)
    prompts = encoded.rows
    check_coverage(text, inputs.data.rows, reporter, what="prompts")
    counts = {"prompts": len(prompts), "responses": len(prompts) * config.responses_per_prompt}
    how = f"{config.responses_per_prompt:,} responses to each of {len(prompts):,} prompts are"
    check_count(counts["responses"], how, "--responses-per-prompt", "lower it, or use --limit-rows for fewer prompts")
    left_out = inputs.count_left_out(encoded)
    if dry_run:
        encoder = RowEncoder(config, source, text, config.max_response_tokens)
        preview = build_preview("ppo", encoder, inputs.data.rows, command="sample")
        data = {"plan": counts, "rows": left_out, "preview": preview.data}
        tables = (*preview.tables, facts_table("sample: the plan", counts | left_out))
        return Result("sample", "dry run", None, data, tables, passages=preview.passages)
    base = open_base(source, config, text)
    for line in check_engine(base, config.rollout_engine):
        reporter.note(line)
    rows = sample_rows(config, source, base, text, prompts, reporter)
    write_text(output, "".join(to_json(row) + "\n" for row in rows))
    ended = sum(row["ended"] for row in rows) / len(rows)
    data = {**counts, "rows": left_out, "ended": ended, "mean_tokens": sum(row["tokens"] for row in rows) / len(rows)}
    shown = tuple((flatten_text(row["prompt"]), row["response"]) for row in rows[:SHOWN_RESPONSES])
    return Result("sample", "done", config.output, data, (Table("samples", ("prompt", "response"), shown),))


def sample_rows(
    config: SampleConfig, source: ModelRef, base: Base, text: Text, prompts: list[PromptRow], reporter: Reporter
) -> list[dict[str, object]]:
    """A row of the file per response: its prompt, text, number among the prompt's, and the prompt's other columns."""
    roles = Roles(base)
    roles.add("policy", adapter_of(base, source, trainable=False))
    batch_size, engine = config.rollout_batch_size, config.rollout_engine
    sampling = Sampling(config.temperature, config.max_response_tokens, config.top_p, batch_size, engine)
    numbers = [(i, k) for i in range(len(prompts)) for k in range(config.responses_per_prompt)]
    ids, keys = [prompts[i].ids for i, _ in numbers], [(config.seed, "sample", i, k) for i, k in numbers]
    reporter.begin("sample", len(numbers))
    with roles.use("policy"):
        responses = generate(base, ids, keys, text.stop_ids, sampling, progress=partial(reporter.log, metrics={}))
    reporter.end()
    return [
        {
            "prompt": prompts[i].text,
            "response": text.response_text(prompts[i].ids, response),
            "index": k,
            "ended": int(response[-1]) in text.stop_ids,
            "tokens": len(response),
            **{name: value for name, value in prompts[i].columns.items() if name not in RESPONSE_KEYS},
        }
        for (i, k), response in zip(numbers, responses, strict=True)
    ]
