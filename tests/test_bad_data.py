"""More of what users get wrong: spoiled files and rows, knobs at odds with each other, models that are none; and what
looks wrong but is taken."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest

from tests.commands import SHORT, Chain, contents, demonstrations, done, lines_of, refused, rlhf
from tests.marks import full
from tests.test_bad_input import (
    EARLY,
    LATE,
    LONG,
    STEPS,
    TURNS,
    check_refusal,
    evaluate,
    export,
    function,
    newer,
    ppo,
    recipe,
    reward,
    rows,
    sample,
    sft,
    spoiled,
    written,
)
from tests.tiny import build_config, build_tokenizer, write_jsonl

HUGE = "cat " * 20_000
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}


def dpo(c: Chain, p: Path, *more: object, model: object = None, dataset: object = None) -> list:
    named = ["--model", model or c.sft, "--dataset", dataset or c.comparisons, "--output", p / "out"]
    return ["dpo", *named, *more]


def said(p: Path, messages: object) -> Path:
    """A dataset of one conversation."""
    return rows(p, {"messages": messages})


def csv(p: Path, text: str | bytes) -> Path:
    return written(p / "r.csv", text)


def jsonl(p: Path, text: str | bytes) -> Path:
    return written(p / "r.jsonl", text)


def t5(c: Chain, p: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    build_tokenizer(p / "t5")
    shape = {"vocab_size": 300, "d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8}
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(p / "t5")
    return p / "t5"


def bert(c: Chain, p: Path) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    build_tokenizer(p / "bert")
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    BertForMaskedLM(BertConfig(**shape, num_attention_heads=4)).save_pretrained(p / "bert")
    return p / "bert"


def small_vocabulary(c: Chain, p: Path) -> Path:
    from transformers import AutoModelForCausalLM

    tokenizer = build_tokenizer(p / "small")
    AutoModelForCausalLM.from_config(build_config("llama", len(tokenizer) - 1)).save_pretrained(p / "small")
    return p / "small"


def bare_body(c: Chain, p: Path) -> Path:
    from transformers import AutoModel

    build_tokenizer(p / "body")
    AutoModel.from_config(build_config("llama", 300)).save_pretrained(p / "body")
    return p / "body"


def exits(p: Path, *, at_once: bool) -> Path:
    body = "import sys\n" + ("sys.exit(3)\n" if at_once else "def score(prompts, responses):\n    sys.exit(3)\n")
    return written(p / "f.py", body)


# id: (whether it is found early, the command line, what the message says)
ROWS = {
    # --- knobs: types and bounds
    "a number that is none": (EARLY, lambda c, p: sft(c, p, "--learning-rate", "nan"), ["'nan' is not a number"]),
    "a number that is endless": (EARLY, lambda c, p: sft(c, p, "--learning-rate", "1e999"), ["is not a number"]),
    "half a row": (EARLY, lambda c, p: sft(c, p, "--batch-size", 2.5), ["'2.5' is not a whole number"]),
    "a negative seed": (EARLY, lambda c, p: sft(c, p, "--seed", -1), ["--seed: -1 is too small"]),
    "a list for a number": (
        EARLY, lambda c, p: sft(c, p, *recipe(p, "seed: [1]\n")), ["recipe.yaml:1: seed: [1] is not a whole number"],
    ),
    "nothing for a number": (
        EARLY, lambda c, p: sft(c, p, *recipe(p, "batch_size:\n")), ["recipe.yaml:1: batch_size: a value is missing"],
    ),
    "a number for a switch": (
        EARLY, lambda c, p: sft(c, p, *recipe(p, "skip_bad_rows: 1\n")), ["1 is not true or false"],
    ),
    "a NUL in a text": (
        EARLY, lambda c, p: sft(c, p, *recipe(p, 'chat_template: "a\\0b"\n')),
        ["recipe.yaml:1: chat_template", "contains a NUL or is not"],
    ),
    "half a character in a text": (
        EARLY, lambda c, p: sft(c, p, *recipe(p, 'chat_template: "\\ud800"\n')), ["contains a NUL or is not"],
    ),
    "a name that is not UTF-8": (
        EARLY, lambda c, p: [*sft(c, p), "--output", os.fsdecode(b"\xff")], ["--output", "must be UTF-8"],
    ),
    "an empty output": (EARLY, lambda c, p: [*sft(c, p), "--output", ""], ["--output: '' is not a text"]),
    "a flag without its value": (EARLY, lambda c, p: [*sft(c, p), "--seed"], ["'--seed' requires an argument"]),
    "a value for a switch": (EARLY, lambda c, p: sft(c, p, "--skip-bad-rows=no"), ["does not take a value"]),
    "a stray word": (EARLY, lambda c, p: sft(c, p, "stray"), ["unexpected extra argument", "stray"]),
    "a folder as recipe": (EARLY, lambda c, p: sft(c, p, "--config", p), ["cannot read the recipe: Is a directory"]),
    "a recipe in UTF-16": (
        EARLY, lambda c, p: sft(c, p, "--config", written(p / "r.yaml", "seed: 1\n".encode("utf-16"))),
        ["r.yaml: the recipe is not UTF-8"],
    ),
    "two recipes in a file": (
        EARLY, lambda c, p: sft(c, p, *recipe(p, "seed: 1\n---\nseed: 2\n")), ["recipe.yaml:2: not valid YAML"],
    ),
    "a value that does not fit its tag": (
        EARLY, lambda c, p: sft(c, p, *recipe(p, "seed: !!bool x\n")), ["recipe.yaml: not valid YAML"],
    ),
    "an unknown knob of dpo": (
        EARLY, lambda c, p: dpo(c, p, *recipe(p, "betta: 1\n")), ["unknown knob `betta`", "did you mean `beta`?"],
    ),
    "no weight for dpo's KL": (EARLY, lambda c, p: dpo(c, p, "--beta", 0), ["--beta: 0.0 is too small"]),
    "no such loss": (EARLY, lambda c, p: dpo(c, p, "--loss", "ktoo"), ["`ktoo` is not a choice", "`kto`?"]),
    "an unknown precision": (EARLY, lambda c, p: export(c, p, "--dtype", "int8"), ["`int8` is not a choice"]),
    "report without a run": (EARLY, lambda c, p: ["report"], ["missing argument 'RUN'", "rlhf report --help"]),
    # --- knobs at odds with each other
    "smoothing without a sigmoid": (
        EARLY, lambda c, p: dpo(c, p, "--loss", "ipo", "--label-smoothing", 0.1), ["--label-smoothing", "sigmoid"],
    ),
    "KTO's weight without KTO": (
        EARLY, lambda c, p: dpo(c, p, "--desirable-weight", 2), ["--desirable-weight", "--loss kto"],
    ),
    "KTO's other weight without KTO": (
        EARLY, lambda c, p: dpo(c, p, "--loss", "ipo", "--undesirable-weight", 2), ["--undesirable-weight", "ipo"],
    ),
    "a group of one": (
        EARLY, lambda c, p: ppo(c, p, "--advantage", "grpo"), ["--advantage", "responses_per_prompt is 1"],
    ),
    "warming up a critic that is not there": (
        EARLY, lambda c, p: ppo(c, p, "--advantage", "reinforce++", "--critic-warmup", 2), ["has no critic"],
    ),
    "sharing a critic that is not there": (
        EARLY, lambda c, p: ppo(c, p, "--advantage", "rloo", "--responses-per-prompt", 2, "--critic", "shared"),
        ["rloo has no critic", "use gae"],
    ),
    "teaching a critic that is not there": (
        EARLY, lambda c, p: ppo(c, p, "--advantage", "reinforce++", "--critic-learning-rate", 1e-4),
        ["--critic-learning-rate", "has no critic"],
    ),
    "an estimator that is biased": (
        EARLY, lambda c, p: ppo(c, p, "--kl-estimator", "k2"), ["--kl-estimator", "or pass --force"],
    ),
    "a KL target for no KL": (
        EARLY, lambda c, p: ppo(c, p, "--kl-target", 1, "--kl-coef", 0), ["--kl-target", "stays 0"],
    ),
    "a length limit without a penalty": (
        EARLY, lambda c, p: ppo(c, p, "--length-limit", 9), ["--length-limit", "length_penalty is 0"],
    ),
    "demonstrations of no weight": (
        EARLY, lambda c, p: ppo(c, p, "--ptx-dataset", c.demonstrations, "--ptx-coef", 0), ["--ptx-coef"],
    ),
    "a contradiction in a recipe": (
        EARLY, lambda c, p: ppo(c, p, *recipe(p, "kl_coef: 0\nkl_target: 6\n")), ["recipe.yaml:2: kl_target"],
    ),
    # --- files of rows
    "UTF-16 with its mark": (
        EARLY, lambda c, p: sft(c, p, dataset=jsonl(p, '{"text": "a"}\n'.encode("utf-16"))), ["r.jsonl:1", "UTF-16"],
    ),
    "UTF-16 without its mark": (
        EARLY, lambda c, p: sft(c, p, dataset=csv(p, "prompt,completion\na,b\n".encode("utf-16-le"))),
        ["r.csv:1: the file is UTF-16"],
    ),
    "UTF-32": (EARLY, lambda c, p: dpo(c, p, dataset=jsonl(p, '{"a": 1}'.encode("utf-32"))), ["the file is UTF-32"]),
    "Latin-1": (
        EARLY, lambda c, p: reward(c, p, dataset=csv(p, "prompt,chosen,rejected\na,b,c\nd,\xe9,f\n".encode("latin-1"))),
        ["r.csv:3: byte 0xe9 is not UTF-8"],
    ),
    "a NUL byte in CSV": (
        EARLY, lambda c, p: sft(c, p, dataset=csv(p, b"prompt,completion\na,b\0\n")),
        ["r.csv:2: the text contains a NUL byte"],
    ),
    "semicolons in CSV": (
        EARLY, lambda c, p: sft(c, p, dataset=csv(p, "prompt;completion\na;b\n")), ["by commas", "`prompt;completion`"],
    ),
    "tabs in CSV": (EARLY, lambda c, p: sft(c, p, dataset=csv(p, "prompt\tcompletion\na\tb\n")), ["by commas"]),
    "a column twice in CSV": (
        EARLY, lambda c, p: sft(c, p, dataset=csv(p, "prompt,completion,prompt\na,b,c\n")),
        ["r.csv:1: the header has `prompt` twice"],
    ),
    "too many cells": (
        EARLY, lambda c, p: sft(c, p, dataset=csv(p, "prompt,completion\na,b,c\n")), ["r.csv:2: the row has 3 cells"],
    ),
    "an open quote": (
        EARLY, lambda c, p: sft(c, p, dataset=csv(p, 'prompt,completion\n"a\nb",c\n"d,e\n')), ["r.csv:4: not valid"],
    ),
    "messages in CSV": (
        EARLY, lambda c, p: sft(c, p, dataset=csv(p, 'messages\n"[{""role"": ""user""}]"\n')),
        ["r.csv:2: messages: expected a list of messages, found the text"],
    ),
    "a name twice in JSON": (
        EARLY, lambda c, p: sft(c, p, dataset=jsonl(p, '{"text": "a"}\n{"text": "b", "text": "c"}\n')),
        ["r.jsonl:2", "`text` is given twice"],
    ),
    "a name twice in a message": (
        EARLY, lambda c, p: sft(c, p, dataset=jsonl(p, '{"messages": [{"role": "a", "role": "b", "content": ""}]}')),
        ["r.jsonl:1", "`role` is given twice"],
    ),
    "one comma too many": (
        EARLY, lambda c, p: sft(c, p, dataset=written(p / "r.json", '[\n{"text": "a"},\n]')), ["not valid JSON"],
    ),
    "JSON lines in .json": (
        EARLY, lambda c, p: sft(c, p, dataset=written(p / "r.json", '{"text": "a"}\n{"text": "b"}\n')),
        ["r.json:2", "rename it to .jsonl"],
    ),
    "a number as dataset": (EARLY, lambda c, p: ppo(c, p, dataset=written(p / "r.json", "5")), ["an array of objects"]),
    "a split of a file": (EARLY, lambda c, p: sft(c, p, dataset=f"{c.demonstrations}:train"), ["has no splits"]),
    "half a character in a row": (
        EARLY, lambda c, p: sft(c, p, dataset=jsonl(p, '{"text": "\\ud800"}')), ["r.jsonl:1", "half a character"],
    ),
    # --- rows
    "an empty prompt": (EARLY, lambda c, p: ppo(c, p, dataset=rows(p, {"prompt": ""})), ["prompt: the text is empty"]),
    "an empty prompt to sample": (EARLY, lambda c, p: sample(c, p, dataset=rows(p, {"prompt": " \n"})), ["is empty"]),
    "a prompt of no messages": (EARLY, lambda c, p: ppo(c, p, dataset=rows(p, {"prompt": []})), ["is empty"]),
    "a prompt that is answered": (
        EARLY, lambda c, p: ppo(c, p, dataset=rows(p, {"prompt": TURNS})), ["ends with an assistant turn"],
    ),
    "a number for a prompt": (EARLY, lambda c, p: ppo(c, p, dataset=rows(p, {"prompt": 5})), ["found the number 5"]),
    "nothing for a completion": (
        EARLY, lambda c, p: sft(c, p, dataset=rows(p, {"prompt": "a", "completion": None})),
        ["completion: expected text, found null"],
    ),
    "chosen is rejected, for dpo": (
        EARLY, lambda c, p: dpo(c, p, dataset=rows(p, {"prompt": "a", "chosen": "b", "rejected": "b"})),
        ["rows.jsonl:1: rejected", "are the same"],
    ),
    "nothing was chosen": (
        EARLY, lambda c, p: dpo(c, p, dataset=rows(p, {"prompt": "a", "chosen": "", "rejected": "b"})),
        ["rows.jsonl:1: chosen: the text is empty"],
    ),
    "no prompt in common": (
        EARLY, lambda c, p: dpo(c, p, dataset=rows(p, {"chosen": "abc", "rejected": "xyz"})), ["share no beginning"],
    ),
    "text against messages": (
        EARLY, lambda c, p: reward(c, p, dataset=rows(p, {"prompt": "a", "chosen": TURNS[1:], "rejected": "b"})),
        ["rows.jsonl:1: chosen", "one form"],
    ),
    "a margin below nothing": (
        EARLY, lambda c, p: dpo(c, p, dataset=rows(p, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1})),
        ["margin over `rejected` is negative"],
    ),
    "ranks that all tie": (
        EARLY, lambda c, p: dpo(c, p, dataset=rows(p, {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]})),
        ["at least two different ranks"],
    ),
    "a lone rating": (
        EARLY, lambda c, p: dpo(c, p, dataset=rows(p, {"prompt": "a", "response": "b", "rating": 1})),
        ["no two responses to the same prompt differ"],
    ),
    "raters that are not named": (
        EARLY,
        lambda c, p: dpo(c, p, "--normalise-raters", dataset=rows(p, {"prompt": "a", "response": "b", "rating": 1})),
        ["annotator: normalise_raters needs the annotator of each row"],
    ),
    "demonstrations for dpo": (
        EARLY, lambda c, p: dpo(c, p, dataset=c.demonstrations), ["a demonstration row", "prompt+chosen+rejected"],
    ),
    "another kind held out": (
        EARLY, lambda c, p: sft(c, p, "--eval-dataset", c.comparisons), ["comparisons.jsonl:1", "a comparison row"],
    ),
    "another kind mixed in": (
        EARLY, lambda c, p: ppo(c, p, "--ptx-dataset", c.comparisons), ["comparisons.jsonl:1", "a comparison row"],
    ),
    "all rows are bad, and skipped": (
        EARLY, lambda c, p: dpo(c, p, "--skip-bad-rows", dataset=rows(p, {"prompt": 1, "chosen": 1, "rejected": 1})),
        ["none of the 1 row can be used"],
    ),
    # --- conversations
    "messages in a list too many": (
        EARLY, lambda c, p: sft(c, p, dataset=said(p, [TURNS])), ["messages[0]: expected a message", "found a list"],
    ),
    "messages as text": (EARLY, lambda c, p: sft(c, p, dataset=said(p, "hello")), ["expected a list of messages"]),
    "a message alone": (EARLY, lambda c, p: sft(c, p, dataset=said(p, TURNS[0])), ["messages", "found an object"]),
    "a message without content": (
        EARLY, lambda c, p: sft(c, p, dataset=said(p, [{"role": "user"}])), ["messages[0]", "`content`", "found null"],
    ),
    "contents in parts": (
        EARLY, lambda c, p: sft(c, p, dataset=said(p, [{"role": "user", "content": [{"type": "text", "text": "x"}]}])),
        ["messages[0]: expected text in `content`, found a list"],
    ),
    "a tool that is called": (
        EARLY, lambda c, p: sft(c, p, dataset=said(p, [TURNS[0], CALL])), ["messages[1]: tool calls are not supported"],
    ),
    "a function's role": (
        EARLY, lambda c, p: ppo(c, p, dataset=said(p, [{"role": "function", "content": "x"}])),
        ["unknown role `function`", "assistant, tool"],
    ),
    "a template that is broken": (
        LATE, lambda c, p: sft(c, p, "--chat-template", written(p / "t.jinja", "{{ x "), dataset=said(p, TURNS)),
        ["--chat-template", "t.jinja", "unexpected end of template"],
    ),
    # --- what does not fit
    "thousands of tokens": (
        LATE, lambda c, p: sft(c, p, dataset=rows(p, *[{"prompt": HUGE, "completion": "x"}] * 3)),
        ["rows.jsonl:", "nothing is left to learn within 128 tokens"],
    ),
    "thousands of tokens to answer": (
        LATE, lambda c, p: ppo(c, p, dataset=rows(p, *[{"prompt": HUGE}] * 3)), ["rows.jsonl:", "the prompt has 40"],
    ),
    "nothing left once the long ones are gone": (
        LATE, lambda c, p: sft(c, p, "--skip-bad-rows", dataset=rows(p, *[{"prompt": LONG, "completion": "x"}] * 3)),
        ["demonstrations can be used", "the prompt fills them"],
    ),
    "no prompt left once the long ones are gone": (
        LATE, lambda c, p: sample(c, p, "--skip-bad-rows", dataset=rows(p, {"prompt": LONG})),
        ["none of the 1 prompt can be used"],
    ),
    # --- models
    "T5": (EARLY, lambda c, p: sft(c, p, model=t5(c, p)), ["is an encoder-decoder (t5)", "decoder-only"]),
    "BERT": (LATE, lambda c, p: sft(c, p, model=bert(c, p)), ["--model", "bert"]),
    "a classifier": (
        LATE, lambda c, p: sft(c, p, model=c.folder / "exported_reward"), ["lack lm_head.weight", "not a classifier"],
    ),
    "a body without its head": (LATE, lambda c, p: sft(c, p, model=bare_body(c, p)), ["lack lm_head.weight"]),
    "a vocabulary smaller than the tokenizer's": (
        LATE, lambda c, p: sft(c, p, model=small_vocabulary(c, p)), ["300 tokens", "embeddings for 299"],
    ),
    "a device that is none": (LATE, lambda c, p: dpo(c, p, "--device", "cuda:x"), ["`cuda:x` is no device"]),
    "a device of another make": (LATE, lambda c, p: export(c, p, "--device", "mps"), ["`mps` is not supported"]),
    # --- checkpoints
    "a reward model for dpo": (EARLY, lambda c, p: dpo(c, p, model=c.reward), ["is a `reward` checkpoint", "sft"]),
    "a policy as gold": (EARLY, lambda c, p: evaluate(c, p, "--gold", c.sft), ["--gold", "is a `sft` checkpoint"]),
    "a reward model to measure from": (
        EARLY, lambda c, p: evaluate(c, p, "--reference", c.reward), ["--reference", "is a `reward` checkpoint"],
    ),
    "a reference that is gone": (EARLY, lambda c, p: evaluate(c, p, "--reference", "./no"), ["./no does not exist"]),
    "an export of a newer version": (
        EARLY, lambda c, p: export(c, p, model=spoiled(c.sft, p, "checkpoint.json", newer)), ["newer rlhf", "upgrade"],
    ),
    "other layers than the checkpoint's": (
        LATE, lambda c, p: dpo(c, p, "--lora-targets", "q_proj"), ["lora_targets", "adapts other layers"],
    ),
    # --- reward functions
    "a function file that exits": (EARLY, lambda c, p: ppo(c, p, rm=exits(p, at_once=True)), ["SystemExit: 3"]),
    "a function that exits": (LATE, lambda c, p: ppo(c, p, rm=exits(p, at_once=False)), ["it raised SystemExit"]),
    "a function that takes no texts": (
        LATE, lambda c, p: ppo(c, p, rm=written(p / "f.py", "def score():\n    return 1\n")), ["it raised TypeError"],
    ),
    "a function that returns one number": (LATE, lambda c, p: ppo(c, p, rm=function(p, "return 1")), ["returned int"]),
    # --- reports
    "a report of a file": (EARLY, lambda c, p: ["report", c.prompts], ["prompts.jsonl: no such folder"]),
    "a report of a torn evaluation": (
        EARLY, lambda c, p: ["report", written(p / "run" / "evaluate.json", "{").parent],
        ["evaluate.json:1: the file is damaged"],
    ),
    "a report of something else's manifest": (
        EARLY, lambda c, p: ["report", written(p / "run" / "sft" / "checkpoint.json", "[]").parent.parent],
        ["checkpoint.json: the file is damaged", "not a JSON object"],
    ),
    "a report of an unfinished run": (
        EARLY, lambda c, p: ["report", written(p / "run" / "sft" / "run.json", "{}").parent.parent],
        ["sft did not finish yet"],
    ),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("row", ROWS)
def test_a_mistake_is_one_message_and_nothing_is_written(chain, tmp_path, monkeypatch, row):
    check_refusal(chain(), tmp_path, monkeypatch, *ROWS[row])


# --- what is taken as it is ---------------------------------------------------------------------------------------

TAKEN = {
    "a byte order mark": ("r.jsonl", b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\n'),
    "a byte order mark before a header": ("r.csv", b"\xef\xbb\xbfprompt,completion\na,b\n"),
    "Windows' line ends": ("r.jsonl", b'{"prompt": "a", "completion": "b"}\r\n'),
    "Windows' line ends in CSV": ("r.csv", b"prompt,completion\r\na,b\r\n"),
    "blank lines at the end": ("r.jsonl", b'{"prompt": "a", "completion": "b"}\n\n \n\n'),
    "blank lines in CSV": ("r.csv", b"prompt,completion\n\na,b\n\n\n"),
    "no line end at the end": ("r.jsonl", b'{"prompt": "a", "completion": "b"}'),
    "quotes in CSV": ("r.csv", b'"prompt","completion"\n"a","b"\n'),
    "fields in excess": ("r.jsonl", b'{"id": 7, "prompt": "a", "meta": {"x": [1, null]}, "completion": "b"}\n'),
    "a suffix in capitals": ("R.JSONL", b'{"prompt": "a", "completion": "b"}\n'),
    "rows under `data`": ("r.json", b'{"data": [{"prompt": "a", "completion": "b"}], "version": 2}'),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_looks_odd_but_is_clear_is_read(tmp_path, name):
    from stages.data.rows import read_demonstrations

    file, content = TAKEN[name]
    found = read_demonstrations(str(written(tmp_path / file, content)))
    assert [(row.prompt, row.completion) for row in found.rows] == [("a", "b")] and found.skipped == 0


def test_cells_of_several_lines_quotes_and_commas_are_kept_to_the_letter(tmp_path):
    from stages.data.rows import read_demonstrations

    path = csv(tmp_path, 'prompt,completion\n"a, ""b""\nc\r\nd","e\n\nf"\ng,h\n')
    found = read_demonstrations(str(path))
    assert [(row.prompt, row.completion) for row in found.rows] == [('a, "b"\nc\r\nd', "e\n\nf"), ("g", "h")]
    assert [row.where for row in found.rows] == [f"{path}:2", f"{path}:7"]


@pytest.mark.full
def test_the_same_rows_in_other_clothes_train_the_same_model(chain, tmp_path):
    """A mark, line ends, blank lines, excess fields and the kind of file change nothing that is learned."""
    plain = write_jsonl(tmp_path / "plain.jsonl", demonstrations()[:12])
    odd = "\ufeff" + "".join(json.dumps({"id": i} | row) + "\r\n\r\n" for i, row in enumerate(lines_of(plain)))
    other = written(tmp_path / "odd.jsonl", odd)
    whole = written(tmp_path / "whole.json", json.dumps({"data": lines_of(plain)}))
    made = []
    for i, data in enumerate((plain, other, whole)):
        done(*sft(chain(), tmp_path, *STEPS, dataset=data), "--output", tmp_path / f"out{i}")
        made.append(contents(tmp_path / f"out{i}")["adapter_model.safetensors"])
    assert made[0] == made[1] == made[2]


def test_excess_fields_reach_reward_functions_and_samples(chain, tmp_path):
    data = rows(tmp_path, *[{"prompt": f"red {i}", "id": i, "meta": {"x": [1, None]}} for i in range(3)])
    done(*sample(chain(), tmp_path, dataset=data))
    assert [(row["id"], row["meta"]) for row in lines_of(tmp_path / "out.jsonl")] == [
        (i, {"x": [1, None]}) for i in range(3)
    ]
    body = "assert all(i is not None for i in id); return [float(i) for i in id]"
    judge = written(tmp_path / "f.py", f"def score(prompts, responses, id):\n    {body}\n")
    report = done(*evaluate(chain(), tmp_path, *SHORT, "--reward", judge, "--json", dataset=data)).json
    assert report["policy"]["score"] == 1.0  # the mean of 0, 1 and 2


@pytest.mark.full
def test_what_a_tool_says_is_read_and_not_learned(chain, tmp_path):
    from stages.data.rows import read_demonstrations
    from stages.models.tokens import load_text

    talk = [TURNS[0], {"role": "tool", "content": "noon"}, TURNS[1]]
    data = rows(tmp_path, *[{"messages": talk}] * 6)
    text = load_text(chain().base, chat_template="chatml", stop_ids=(), trust_remote_code=False)
    for mask in ("completion", "assistant"):
        row = text.demonstration(read_demonstrations(str(data)).rows[0], mask, 128)
        assert "noon" in text.tokenizer.decode(row.ids)
        assert text.tokenizer.decode(row.ids[row.targets]).startswith("blue")
    done(*sft(chain(), tmp_path, *STEPS, "--chat-template", "chatml", dataset=data))
    done(*sample(chain(), tmp_path, model=tmp_path / "out", dataset=data))
    asked = lines_of(tmp_path / "out.jsonl")[0]["prompt"]
    assert [message["role"] for message in asked] == ["user", "tool"]


@pytest.mark.parametrize("command", ["sft", *full("ppo")])
@pytest.mark.parametrize("pad", [None, *full("<eos>")])
def test_a_base_needs_no_pad_token_of_its_own(chain, model_folder, tmp_path, pad, command):
    base, found = model_folder("llama", pad=pad), chain()
    line = sft(found, tmp_path, model=base)
    if command == "ppo":
        line = ppo(found, tmp_path, model=base, rm=function(tmp_path, "return [len(r) for r in responses]"))
    done(*line, *STEPS)


# --- the environment ----------------------------------------------------------------------------------------------


def every_command(c: Chain, p: Path) -> dict[str, list]:
    return {
        "sft": sft(c, p, *STEPS),
        "reward": reward(c, p, *STEPS),
        "ppo": ppo(c, p, *STEPS),
        "dpo": dpo(c, p, *STEPS),
        "sample": sample(c, p),
        "evaluate": evaluate(c, p, *SHORT, "--reward", c.reward, "--output", p / "out.json", "--limit-rows", 4),
        "export": export(c, p),
    }


@pytest.mark.parametrize("command", ["sft", "export", *full("reward", "ppo", "dpo", "sample", "evaluate")])
@pytest.mark.parametrize("number", [errno.ENOSPC, *full(errno.EDQUOT, errno.EROFS)])
def test_a_disk_that_takes_nothing_is_one_message_and_leaves_nothing(chain, tmp_path, monkeypatch, command, number):
    """Full, over quota, or mounted for reading: the system refuses to make the first file."""
    line, whole = every_command(chain(), tmp_path)[command], os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(number, os.strerror(number), str(path))
        return whole(path, flags, *rest, **more)

    def make(path, *rest, **more):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "mkdir", make)
    message = refused(*line)
    monkeypatch.undo()
    assert f"cannot write: {os.strerror(number)}" in message and str(tmp_path / "out") in message, message
    assert "\n  -> " in message and list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.parametrize("command", ["sft", "ppo", "export"])
def test_a_disk_that_fills_up_is_one_message_and_no_checkpoint(chain, tmp_path, command):
    """The system's own limit on a file's size: small files are written, tensors are not."""
    line = every_command(chain(), tmp_path)[command]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        ended = rlhf(*line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended.code == 2 and ended.stdout == "", ended.stderr
    assert ended.stderr.count("error: ") == 1 and "cannot write: File too large" in ended.stderr
    left = {path.name for path in tmp_path.rglob("*")}
    assert not any(name.startswith(".rlhf-") for name in left) and "checkpoint.json" not in left
    assert command != "export" or left == set()
    done(*line)  # with room again the same command goes on, or begins again, and ends well
