"""Writes responses to prompts into a file, one JSON object per response."""

from __future__ import annotations

from functools import partial

from stages.config import SampleConfig
from stages.files.atomic import to_json, write_text
from stages.inputs import RESPONSE_KEYS, Inputs
from stages.models.roles import Roles, adapter_of
from stages.places import absolute
from stages.results import Report, Result, Table, facts_table
from stages.rollout.generate import Sampling, check_engine, generate
from stages.rollout.samples import readable
from stages.training.session import encode_all, open_base, open_text

SHOWN = 3


def run(config: SampleConfig, inputs: Inputs, report: Report, *, dry_run: bool = False) -> Result:
    """Sample `responses_per_prompt` responses to every prompt and write them."""
    source, output = inputs.source, absolute(config.output, "--output")
    text = open_text(source, config)
    longest = min(config.max_prompt_tokens or 2**30, source.context - config.max_response_tokens)
    encode = partial(text.prompt, max_tokens=longest)
    prompts = encode_all(inputs.data.rows, encode, skip_bad=config.skip_bad_rows, report=report, what="prompts")
    repeated = [(i, k) for i in range(len(prompts)) for k in range(config.responses_per_prompt)]
    counts = {"prompts": len(prompts), "responses": len(repeated)}
    if dry_run:
        return Result("sample", "dry run", None, {"plan": counts}, (facts_table("sample: the plan", counts),))
    base, _ = open_base(source, config, text)
    for line in check_engine(base, config.rollout_engine):
        report.note(line)
    roles = Roles(base)
    roles.add("policy", adapter_of(base, source, trainable=False))
    rows, engine = config.rollout_batch_size, config.rollout_engine
    sampling = Sampling(config.temperature, config.max_response_tokens, config.top_p, rows, engine)
    keys = [(config.seed, "sample", i, k) for i, k in repeated]
    report.begin("sample", len(repeated))
    with roles.use("policy"):
        responses = generate(
            base, [prompts[i].ids for i, _ in repeated], keys, text.stop_ids, sampling,
            progress=lambda done: report.log(done, {}),
        )  # fmt: skip
    report.end()
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
    shown = tuple((readable(row["prompt"]), row["response"]) for row in rows[:SHOWN])
    return Result("sample", "done", config.output, data, (Table("samples", ("prompt", "response"), shown),))
