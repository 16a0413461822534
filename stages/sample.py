"""Writes responses to prompts into a file, one JSON object per response."""

from __future__ import annotations

from functools import partial

from stages.checkpoint.atomic import write_text
from stages.config import SampleConfig
from stages.errors import ConfigError
from stages.inputs import Inputs
from stages.inputs.outputs import RESPONSE_KEYS
from stages.models.roles import Roles, adapter_of
from stages.places import absolute
from stages.reading import to_json
from stages.results import Reporter, Result, Table
from stages.rollout.generate import Sampling, check_engine, generate
from stages.rollout.samples import flatten_text
from stages.tables import facts_table
from stages.training.opening import check_coverage, encode_all, open_base, open_text

SHOWN_RESPONSES = 3
MOST_SAMPLED_RESPONSES = 10**7  # held in memory until the file is written


def run(config: SampleConfig, inputs: Inputs, reporter: Reporter, *, dry_run: bool = False) -> Result:
    """Sample `responses_per_prompt` responses to every prompt and write them."""
    source, output = inputs.source, absolute(config.output, "--output")
    text = open_text(source, config, reporter)
    longest = min(config.max_prompt_tokens or 2**30, source.context - config.max_response_tokens)
    encode = partial(text.prompt, max_tokens=longest)
    prompts = encode_all(inputs.data.rows, encode, skip_bad=config.skip_bad_rows, reporter=reporter, what="prompts")
    check_coverage(text, inputs.data.rows, reporter, what="prompts")
    counts = {"prompts": len(prompts), "responses": count_responses(len(prompts), config)}
    if dry_run:
        return Result("sample", "dry run", None, {"plan": counts}, (facts_table("sample: the plan", counts),))
    base = open_base(source, config, text)
    for line in check_engine(base, config.rollout_engine):
        reporter.note(line)
    roles = Roles(base)
    roles.add("policy", adapter_of(base, source, trainable=False))
    rows, engine = config.rollout_batch_size, config.rollout_engine
    sampling = Sampling(config.temperature, config.max_response_tokens, config.top_p, rows, engine)
    repeated = [(i, k) for i in range(len(prompts)) for k in range(config.responses_per_prompt)]
    keys = [(config.seed, "sample", i, k) for i, k in repeated]
    reporter.begin("sample", len(repeated))
    with roles.use("policy"):
        responses = generate(
            base, [prompts[i].ids for i, _ in repeated], keys, text.stop_ids, sampling,
            progress=lambda done: reporter.log(done, {}),
        )  # fmt: skip
    reporter.end()
    rows = [
        {
            "prompt": prompts[i].text,
            "response": text.response_text(prompts[i].ids, response),
            "index": k,
            "ended": int(response[-1]) in text.stop_ids,
            "tokens": len(response),
            **{name: value for name, value in prompts[i].columns.items() if name not in RESPONSE_KEYS},
        }
        for (i, k), response in zip(repeated, responses, strict=True)
    ]
    write_text(output, "".join(to_json(row) + "\n" for row in rows))
    ended = sum(row["ended"] for row in rows) / len(rows)
    data = {**counts, "ended": ended, "mean_tokens": sum(row["tokens"] for row in rows) / len(rows)}
    shown = tuple((flatten_text(row["prompt"]), row["response"]) for row in rows[:SHOWN_RESPONSES])
    return Result("sample", "done", config.output, data, (Table("samples", ("prompt", "response"), shown),))


def count_responses(prompts: int, config: SampleConfig) -> int:
    """How many responses are asked for. Raises ConfigError for more than memory holds until the file is written."""
    wanted = prompts * config.responses_per_prompt
    if wanted > MOST_SAMPLED_RESPONSES:
        raise ConfigError(
            f"{config.responses_per_prompt:,} responses to each of {prompts:,} prompts are {wanted:,}; "
            f"the most in one file is {MOST_SAMPLED_RESPONSES:,}",
            where="--responses-per-prompt",
            fix="lower it, or take fewer prompts at a time with --limit-rows",
        )
    return wanted
