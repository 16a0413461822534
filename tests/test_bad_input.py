"""What users get wrong, over all commands: each is one message with what, where and what to do; nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_cli import main
from tests.commands import SHORT, Chain, contents, rlhf
from tests.marks import full, full_but
from tests.tiny import build_model, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
EARLY, LATE = True, False  # found before anything heavy is imported, or only with a tokenizer, model or device at hand
STEPS = ("--max-steps", 2, "--batch-size", 4)


def sft(c: Chain, p: Path, *more: object, model: object = None, dataset: object = None) -> list:
    return ["sft", "--model", model or c.base, "--dataset", dataset or c.demonstrations, "--output", p / "out", *more]


def reward(c: Chain, p: Path, *more: object, model: object = None, dataset: object = None) -> list:
    return ["reward", "--model", model or c.sft, "--dataset", dataset or c.comparisons, "--output", p / "out", *more]


def ppo(c: Chain, p: Path, *more: object, model: object = None, rm: object = None, dataset: object = None) -> list:
    named = ["--model", model or c.sft, "--reward", rm or c.reward, "--dataset", dataset or c.prompts]
    return ["ppo", *named, "--output", p / "out", *SHORT, *more]


def sample(c: Chain, p: Path, *more: object, model: object = None, dataset: object = None) -> list:
    named = ["--model", model or c.sft, "--dataset", dataset or c.prompts, "--output", p / "out.jsonl"]
    return ["sample", *named, *SHORT, *more]


def evaluate(c: Chain, p: Path, *more: object, model: object = None, dataset: object = None) -> list:
    return ["evaluate", "--model", model or c.sft, "--dataset", dataset or c.prompts, *more]


def export(c: Chain, p: Path, *more: object, model: object = None) -> list:
    return ["export", "--model", model or c.sft, "--output", p / "out", *more]


# --- making things to trip over


def written(place: Path, text: str | bytes) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(text if isinstance(text, bytes) else text.encode())
    return place


def rows(p: Path, *found: dict) -> Path:
    return write_jsonl(p / "rows.jsonl", list(found))


def recipe(p: Path, text: str) -> tuple:
    return "--config", written(p / "recipe.yaml", text)


def function(p: Path, body: str) -> str:
    return f"{written(p / 'f.py', f'def score(prompts, responses):{chr(10)}    {body}{chr(10)}')}:score"


def spoiled(folder: Path, p: Path, name: str, change) -> Path:
    """A copy of a model or checkpoint with one file changed (None: gone)."""
    shutil.copytree(folder, p / "spoiled")
    file = p / "spoiled" / name
    new = change(file.read_bytes())
    file.unlink() if new is None else file.write_bytes(new)
    return p / "spoiled"


def with_config(folder: Path, p: Path, **keys: object) -> Path:
    return spoiled(folder, p, "config.json", lambda old: json.dumps(json.loads(old) | keys).encode())


def gone(old: bytes) -> None:
    return None


def flip(old: bytes) -> bytes:
    return old[:-3] + bytes([old[-3] ^ 1]) + old[-2:]


def pickled(c: Chain, p: Path) -> Path:
    folder = spoiled(c.base, p, "model.safetensors", gone)
    written(folder / "pytorch_model.bin", b"pickle")
    return folder


def other_base(c: Chain, p: Path) -> Path:
    return build_model(p / "base", seed=1)


def trained_on(base: Path, p: Path, c: Chain) -> Path:
    """A reward checkpoint on a base."""
    line = ["reward", "--model", base, "--dataset", c.comparisons, "--output", p / "rm", *STEPS, "--lora-rank", 2]
    assert rlhf(*line).code == 0
    return p / "rm"


def no_tokenizer(c: Chain, p: Path) -> Path:
    folder = spoiled(c.base, p, "tokenizer.json", gone)
    (folder / "tokenizer_config.json").unlink()
    return folder


def other_tokenizer(c: Chain, p: Path) -> Path:
    def swap(old: bytes) -> bytes:
        content = json.loads(old)
        content["model"]["merges"] = content["model"]["merges"][:-1]
        return json.dumps(content).encode()

    return spoiled(c.base, p, "tokenizer.json", swap)


def without_eos(c: Chain, p: Path) -> Path:
    def drop(old: bytes) -> bytes:
        return json.dumps({k: v for k, v in json.loads(old).items() if k != "eos_token"}).encode()

    return spoiled(c.base, p, "tokenizer_config.json", drop)


def unfinished(c: Chain, p: Path) -> Path:
    return spoiled(c.sft, p, "checkpoint.json", gone)


def with_run(folder: Path) -> Path:
    written(folder / "run.json", '{"format_version": 1, "stage": "sft"}')
    return folder


def moved_base(c: Chain, p: Path) -> Path:
    def elsewhere(old: bytes) -> bytes:
        content = json.loads(old)
        content["base"] |= {"path": str(p / "gone"), "relative": "../gone"}
        return json.dumps(content).encode()

    return spoiled(c.sft, p, "checkpoint.json", elsewhere)


def newer(old: bytes) -> bytes:
    return json.dumps(json.loads(old) | {"format_version": 2}).encode()


LONG = " ".join(["cat"] * 200)
TURNS = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]

# id: (whether it is found early, the command line, what the message says)
ROWS = {
    # --- knobs
    "unknown flag": (
        EARLY, lambda c, p: sft(c, p, "--bacth-size", 8), ["no such option: --bacth-size", "--batch-size?"],
    ),
    "flag of another stage": (
        EARLY, lambda c, p: sft(c, p, "--kl-coef", 1), ["no such option: --kl-coef", "sft --help"],
    ),
    "unknown command": (EARLY, lambda c, p: ["stf"], ["no such command 'stf'", "rlhf --help"]),
    "missing flag": (EARLY, lambda c, p: ["sft", "--model", c.base], ["error: --dataset is required"]),
    "unknown knob in a recipe": (
        EARLY, lambda c, p: sft(c, p, *recipe(p, "seed: 1\nlearning_rat: 1\n")),
        ["recipe.yaml:2: unknown knob `learning_rat`", "did you mean `learning_rate`?"],
    ),
    "another stage's knob in a recipe": (
        EARLY, lambda c, p: sft(c, p, *recipe(p, "kl_coef: 1\n")), ["recipe.yaml:1: unknown knob `kl_coef`"],
    ),
    "a knob twice": (
        EARLY, lambda c, p: sft(c, p, *recipe(p, "seed: 1\nseed: 2\n")), ["recipe.yaml:2: `seed` is given twice"],
    ),
    "missing recipe": (EARLY, lambda c, p: sft(c, p, "--config", p / "no.yaml"), ["no.yaml: cannot read the recipe"]),
    "broken recipe": (EARLY, lambda c, p: sft(c, p, *recipe(p, "seed: [1\n")), ["recipe.yaml:", "not valid YAML"]),
    "a recipe that is a list": (EARLY, lambda c, p: sft(c, p, *recipe(p, "- seed\n")), ["a recipe is a mapping"]),
    "wrong type of a flag": (
        EARLY, lambda c, p: sft(c, p, "--batch-size", "many"), ["--batch-size: 'many' is not a whole number"],
    ),
    "wrong type in a recipe": (
        EARLY, lambda c, p: ppo(c, p, *recipe(p, "gamma: high\n")), ["recipe.yaml:1: gamma: 'high' is not a number"],
    ),
    "out of bounds": (
        EARLY, lambda c, p: sft(c, p, "--eval-fraction", 0.9), ["--eval-fraction: 0.9 is too large", "0.5"],
    ),
    "below a bound": (
        EARLY, lambda c, p: ppo(c, p, "--temperature", 0), ["--temperature: 0.0 is too small", "above 0"],
    ),
    "out of bounds in a recipe": (
        EARLY, lambda c, p: reward(c, p, *recipe(p, "label_smoothing: 0.7\n")),
        ["recipe.yaml:1: label_smoothing: 0.7 is too"],
    ),
    "no such choice": (
        EARLY, lambda c, p: sft(c, p, "--mask", "complete"), ["--mask: `complete` is not a choice", "completion"],
    ),
    "map without a column": (EARLY, lambda c, p: sft(c, p, "--map", "prompt"), ["--map", "name=column"]),
    "minibatches that do not divide": (
        EARLY, lambda c, p: ppo(c, p, "--batch-size", 8, "--minibatches", 3),
        ["--minibatches", "8 responses", "3 equal"],
    ),
    "evaluation without rows": (
        EARLY, lambda c, p: sft(c, p, "--eval-every", 2, "--eval-fraction", 0), ["--eval-every", "--eval-dataset"],
    ),
    "a win rate without a judge": (
        EARLY, lambda c, p: evaluate(c, p, "--against", c.base), ["--against", "--reward"],
    ),
    # --- models
    "missing model": (EARLY, lambda c, p: sft(c, p, model="./nowhere"), ["--model: ./nowhere does not exist"]),
    "hub model that cannot be had": (
        EARLY, lambda c, p: sft(c, p, model="org/name"), ["--model: org/name is no local folder"],
    ),
    "a name that is too long": (
        EARLY, lambda c, p: sft(c, p, model=f"./{'x' * 300}"), ["File name too long", "check the path"],
    ),
    "model is a file": (EARLY, lambda c, p: sft(c, p, model=c.prompts), ["--model", "is a file"]),
    "model is an empty folder": (EARLY, lambda c, p: sft(c, p, model=p), ["--model", "holds no config.json"]),
    "broken config.json": (
        EARLY, lambda c, p: sft(c, p, model=spoiled(c.base, p, "config.json", lambda old: b"{")),
        ["config.json cannot be read"],
    ),
    "no weights": (
        EARLY, lambda c, p: sft(c, p, model=spoiled(c.base, p, "model.safetensors", gone)), ["holds no weights"],
    ),
    "torn weights": (
        EARLY, lambda c, p: sft(c, p, model=spoiled(c.base, p, "model.safetensors", lambda old: old[:-9])),
        ["model.safetensors", "download or copy the model again"],
    ),
    "weights left in Git LFS": (
        EARLY,
        lambda c, p: sft(c, p, model=spoiled(
            c.base, p, "model.safetensors", lambda old: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        )),
        ["model.safetensors", "LFS"],
    ),
    "pickled weights": (
        EARLY, lambda c, p: sft(c, p, model=pickled(c, p)), ["pickled weights (pytorch_model.bin)", "safetensors"],
    ),
    "no tokenizer": (
        EARLY, lambda c, p: sft(c, p, model=no_tokenizer(c, p)), ["has no tokenizer", "save the tokenizer"],
    ),
    "tokenizer without EOS": (
        LATE, lambda c, p: sft(c, p, model=without_eos(c, p)), ["no end-of-sequence token", "eos_token"],
    ),
    "encoder-decoder": (
        EARLY, lambda c, p: sft(c, p, model=with_config(c.base, p, is_encoder_decoder=True)),
        ["encoder-decoder (llama)"],
    ),
    "code that ships with the model": (
        EARLY, lambda c, p: sft(c, p, model=with_config(c.base, p, auto_map={"AutoModelForCausalLM": "x.Y"})),
        ["auto_map", "--trust-remote-code"],
    ),
    "unknown architecture": (
        LATE, lambda c, p: sft(c, p, model=with_config(c.base, p, model_type="nothing")),
        ["its config.json describes no causal language model", "nothing"],
    ),
    "no such layer": (
        LATE, lambda c, p: sft(c, p, "--lora-targets", "query"), ["no linear layer is called `query`", "q_proj"],
    ),
    "CUDA on a machine without": (
        LATE, lambda c, p: sft(c, p, "--device", "cuda"), ["device: the device is cuda, but", "--device cpu"],
    ),
    "no such device": (LATE, lambda c, p: sft(c, p, "--device", "abacus"), ["`abacus`", "auto, cpu, cuda"]),
    "missing chat template file": (
        LATE, lambda c, p: sft(c, p, "--chat-template", p / "no.jinja"), ["--chat-template: cannot read", "chatml"],
    ),
    # --- checkpoints
    "a reward model to start from": (
        EARLY, lambda c, p: ppo(c, p, model=c.reward), ["--model", "is a `reward` checkpoint", "sft"],
    ),
    "a reward model for sft": (EARLY, lambda c, p: sft(c, p, model=c.reward), ["--model", "is a `reward` checkpoint"]),
    "a policy as reward": (EARLY, lambda c, p: ppo(c, p, rm=c.sft), ["--reward", "is a `sft` checkpoint", "reward"]),
    "a plain base as reward": (
        EARLY, lambda c, p: ppo(c, p, rm=c.base), ["--reward", "is a base model, not a reward source"],
    ),
    "a reward model to compare with": (
        EARLY, lambda c, p: evaluate(c, p, "--against", c.reward, "--reward", c.reward),
        ["--against", "is a `reward` checkpoint"],
    ),
    "a reward model to sample from": (
        EARLY, lambda c, p: sample(c, p, model=c.reward), ["--model", "is a `reward` checkpoint"],
    ),
    "an unfinished run": (
        EARLY, lambda c, p: sft(c, p, model=with_run(unfinished(c, p))),
        ["is an unfinished run", "run its command again"],
    ),
    "a bare reward adapter": (
        EARLY, lambda c, p: sft(c, p, model=spoiled(c.reward, p, "checkpoint.json", gone)),
        ["is a reward checkpoint without its checkpoint.json", "copy the whole folder again"],
    ),
    "a flipped bit": (
        EARLY, lambda c, p: reward(c, p, model=spoiled(c.sft, p, "adapter_model.safetensors", flip)),
        ["`adapter_model.safetensors` is damaged"],
    ),
    "a missing file": (
        EARLY, lambda c, p: ppo(c, p, rm=spoiled(c.reward, p, "head.safetensors", gone)),
        ["`head.safetensors` is missing"],
    ),
    "a torn manifest": (
        EARLY, lambda c, p: reward(c, p, model=spoiled(c.sft, p, "checkpoint.json", lambda old: old[:99])),
        ["is not JSON"],
    ),
    "a checkpoint of a newer version": (
        EARLY, lambda c, p: reward(c, p, model=spoiled(c.sft, p, "checkpoint.json", newer)), ["newer rlhf", "upgrade"],
    ),
    "a base that is gone": (
        EARLY, lambda c, p: reward(c, p, model=moved_base(c, p)), ["its base model is not at", "put it back"],
    ),
    "two bases": (
        EARLY, lambda c, p: ppo(c, p, rm=trained_on(other_base(c, p), p, c)),
        ["--model, --reward", "they cannot share one frozen base", "rlhf reward --model"],
    ),
    "two bases compared": (
        EARLY, lambda c, p: evaluate(c, p, "--against", other_base(c, p), "--reward", c.reward),
        ["--model, --against", "share"],
    ),
    "two tokenizers": (
        EARLY, lambda c, p: ppo(c, p, rm=trained_on(other_tokenizer(c, p), p, c)),
        ["--model, --reward", "different tokenizers"],
    ),
    "a smaller rank": (
        EARLY, lambda c, p: reward(c, p, "--lora-rank", 2), ["error: lora_rank 2 is smaller than 4", "at least 4"],
    ),
    # --- datasets
    "missing dataset": (
        EARLY, lambda c, p: sft(c, p, dataset=c.folder / "demonstration.jsonl"),
        ["there is no such file or folder", "did you mean", "demonstrations.jsonl"],
    ),
    "missing held-out dataset": (
        EARLY, lambda c, p: sft(c, p, "--eval-dataset", "no.jsonl"), ["no.jsonl: there is no such file"],
    ),
    "missing demonstrations": (
        EARLY, lambda c, p: reward(c, p, "--demonstrations", "no.jsonl"), ["no.jsonl: there is no such file"],
    ),
    "hub dataset that cannot be had": (
        EARLY, lambda c, p: sft(c, p, dataset="org/name"), ["org/name: there is no such local path"],
    ),
    "empty dataset": (
        EARLY, lambda c, p: sft(c, p, dataset=written(p / "rows.jsonl", "")), ["rows.jsonl: the file is empty"],
    ),
    "a dataset of blank lines": (
        EARLY, lambda c, p: ppo(c, p, dataset=written(p / "r.jsonl", "\n\n")), ["r.jsonl: the file is empty"],
    ),
    "an empty list": (
        EARLY, lambda c, p: sample(c, p, dataset=written(p / "r.json", "[]")), ["r.json: it holds no rows"],
    ),
    "a header without rows": (
        EARLY, lambda c, p: sft(c, p, dataset=written(p / "r.csv", "prompt,completion\n")), ["r.csv: it holds no rows"],
    ),
    "a folder without a dataset": (EARLY, lambda c, p: sft(c, p, dataset=p), ["no dataset files"]),
    "an unknown kind of file": (
        EARLY, lambda c, p: sft(c, p, dataset=written(p / "r.xlsx", "x")), ["`.xlsx` is not a known kind", ".jsonl"],
    ),
    "malformed JSON": (
        EARLY, lambda c, p: sft(c, p, dataset=written(p / "r.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": \n')),
        ["r.jsonl:3: not a JSON object on one line", "--skip-bad-rows"],
    ),
    "a row that is no object": (
        EARLY, lambda c, p: sft(c, p, dataset=written(p / "r.jsonl", "[1]\n")), ["r.jsonl:1: expected a JSON object"],
    ),
    "a row with too few cells": (
        EARLY, lambda c, p: sft(c, p, dataset=written(p / "r.csv", "prompt,completion\na,b\nc\n")),
        ["r.csv:3: the row has 1 cells"],
    ),
    "not UTF-8": (
        EARLY, lambda c, p: sft(c, p, dataset=written(p / "r.jsonl", b'{"text": "\xff"}\n')),
        ["r.jsonl:1", "not UTF-8"],
    ),
    "not parquet": (
        EARLY, lambda c, p: sft(c, p, dataset=written(p / "r.parquet", "x")), ["not a readable parquet file"],
    ),
    "prompts for sft": (
        EARLY, lambda c, p: sft(c, p, dataset=c.prompts),
        ["prompts.jsonl:1: the row has `prompt`, `answer`", "--map completion=answer"],
    ),
    "demonstrations for reward": (
        EARLY, lambda c, p: reward(c, p, dataset=c.demonstrations),
        ["demonstrations.jsonl:1", "which is a demonstration row", "chosen+rejected"],
    ),
    "texts for ppo": (
        EARLY, lambda c, p: ppo(c, p, dataset=rows(p, {"text": "red"})), ["rows.jsonl:1: the row has `text`"],
    ),
    "a row without its key": (
        EARLY, lambda c, p: sft(c, p, dataset=rows(p, {"prompt": "a", "completion": "b"}, {"prompt": "a"})),
        ["rows.jsonl:2: completion: `completion` is missing"],
    ),
    "an empty completion": (
        EARLY, lambda c, p: sft(c, p, dataset=rows(p, {"prompt": "a", "completion": " "})),
        ["rows.jsonl:1: completion: the text is empty"],
    ),
    "an unknown role": (
        EARLY, lambda c, p: sft(c, p, dataset=rows(p, {"messages": [{"role": "cat", "content": "x"}]})),
        ["unknown role `cat`"],
    ),
    "nobody answers": (
        EARLY, lambda c, p: sft(c, p, dataset=rows(p, {"messages": TURNS[:1]})),
        ["every assistant turn is empty or missing"],
    ),
    "chosen is rejected": (
        EARLY, lambda c, p: reward(c, p, dataset=rows(p, {"prompt": "a", "chosen": "b", "rejected": "b"})),
        ["are the same"],
    ),
    "ranks that do not count up": (
        EARLY, lambda c, p: reward(c, p, dataset=rows(p, {"prompt": "a", "responses": ["b", "c"], "ranks": [1]})),
        ["rows.jsonl:1: ranks: the row has 2 responses but 1 rank"],
    ),
    "ratings that never differ": (
        EARLY, lambda c, p: reward(c, p, dataset=rows(p, *({"prompt": "a", "response": r, "rating": 3} for r in "bc"))),
        ["no two responses to the same prompt differ"],
    ),
    "no such column": (
        EARLY, lambda c, p: sft(c, p, "--map", "prompt=question"), ["there is no column `question`", "`completion`"],
    ),
    "no row that can be used": (
        EARLY, lambda c, p: sft(c, p, "--skip-bad-rows", dataset=rows(p, {"prompt": "a", "completion": ""})),
        ["none of the 1 row can be used"],
    ),
    "a conversation without a template": (
        LATE, lambda c, p: sft(c, p, dataset=rows(p, *[{"messages": TURNS}] * 3)),
        ["rows.jsonl:", "no chat template", "--chat-template"],
    ),
    "an asked conversation without a template": (
        LATE, lambda c, p: sample(c, p, dataset=rows(p, {"prompt": TURNS[:1]})),
        ["rows.jsonl:1", "no chat template", "--chat-template"],
    ),
    "a conversation that the template refuses": (
        LATE,
        lambda c, p: sft(
            c, p, "--chat-template", written(p / "t.jinja", "{{ raise_exception('no tools') }}"),
            dataset=rows(p, *[{"messages": TURNS}] * 3),
        ),
        ["template", "no tools"],
    ),
    "evaluating a policy on comparisons": (
        EARLY, lambda c, p: evaluate(c, p, dataset=c.comparisons),
        ["holds comparisons", "is neither a reward model nor", "prompts"],
    ),
    "evaluating a reward model on prompts": (
        EARLY, lambda c, p: evaluate(c, p, model=c.reward),
        ["holds prompts; a reward model is measured on comparisons", "chosen"],
    ),
    # --- what does not fit
    "a prompt that fills max_tokens": (
        LATE, lambda c, p: sft(c, p, "--max-tokens", 32, dataset=rows(p, *[{"prompt": LONG, "completion": "x"}] * 3)),
        ["rows.jsonl:", "nothing is left to learn within 32 tokens", "--max-tokens"],
    ),
    "a prompt that fills the context": (
        LATE, lambda c, p: sft(c, p, dataset=rows(p, *[{"prompt": LONG, "completion": "x"}] * 3)),
        ["within 128 tokens", "rows.jsonl:"],
    ),
    "a prompt too long for ppo": (
        LATE, lambda c, p: ppo(c, p, dataset=rows(p, *[{"prompt": LONG}] * 3)),
        ["rows.jsonl:", "tokens, 122 fit beside the response"],
    ),
    "a prompt too long for sample": (
        LATE, lambda c, p: sample(c, p, dataset=rows(p, {"prompt": LONG})),
        ["rows.jsonl:1: prompt", "122 fit beside the response"],
    ),
    "a prompt too long for evaluate": (
        LATE, lambda c, p: evaluate(c, p, *SHORT, "--reward", c.reward, dataset=rows(p, {"prompt": LONG})),
        ["rows.jsonl:1: prompt", "122 fit"],
    ),
    "a prompt above max_prompt_tokens": (
        LATE, lambda c, p: sample(c, p, "--max-prompt-tokens", 2),
        ["prompts.jsonl:1: prompt", "2 fit", "--max-prompt-tokens"],
    ),
    "a response as long as the context": (
        EARLY, lambda c, p: ppo(c, p, "--max-response-tokens", 128),
        ["--max-response-tokens", "a context of 128", "fewer than 128"],
    ),
    "a sample as long as the context": (
        EARLY, lambda c, p: sample(c, p, "--max-response-tokens", 200), ["--max-response-tokens", "128"],
    ),
    "an evaluation as long as the context": (
        EARLY, lambda c, p: evaluate(c, p, "--max-response-tokens", 128, "--reward", c.reward),
        ["--max-response-tokens", "128"],
    ),
    # --- reward functions
    "missing function file": (
        EARLY, lambda c, p: ppo(c, p, rm=f"{p}/no.py:score"), ["--reward", "no.py does not exist"],
    ),
    "missing function": (
        EARLY, lambda c, p: ppo(c, p, rm=function(p, "return 1").replace(":score", ":scores")),
        ["has no function `scores`", "that it has: score"],
    ),
    "a function file that cannot be imported": (
        EARLY, lambda c, p: ppo(c, p, rm=written(p / "f.py", "import re\n1 / 0\n")),
        ["importing it failed: ZeroDivisionError", "f.py:2"],
    ),
    "a function that raises": (
        LATE, lambda c, p: ppo(c, p, rm=function(p, "return [1 / 0 for r in responses]")),
        ["it raised ZeroDivisionError", "f.py:2"],
    ),
    "a function that returns NaN": (
        LATE, lambda c, p: ppo(c, p, rm=function(p, "return [float('nan')] * len(responses)")),
        ["it returned nan", "prompts.jsonl:"],
    ),
    "a function that returns too few": (
        LATE, lambda c, p: ppo(c, p, rm=function(p, "return [1.0]")), ["it returned 1 number for 2 responses"],
    ),
    "a function that returns texts": (
        LATE, lambda c, p: evaluate(c, p, *SHORT, "--reward", function(p, "return responses")),
        ["it returned '", "finite number"],
    ),
    "a weight that is no number": (
        EARLY, lambda c, p: ppo(c, p, rm=f"{c.reward}=nan"), ["--reward", "no finite weight", "source=0.5"],
    ),
    # --- outputs
    "somebody else's folder": (
        EARLY, lambda c, p: sft(c, p, *owned(p / "out")),
        ["does not hold an rlhf run", "nothing in this folder will be changed"],
    ),
    "somebody else's folder, to be overwritten": (
        EARLY, lambda c, p: sft(c, p, "--overwrite", *owned(p / "out")), ["does not hold an rlhf run"],
    ),
    "the output is a file": (EARLY, lambda c, p: sft(c, p, *file_at(p / "out")), ["cannot be used as a folder"]),
    "the output lies in a file": (
        EARLY, lambda c, p: [*sft(c, p), "--output", file_at(p / "f", "x")[0]],
        ["f is not a folder", "a path component is a file"],
    ),
    "an output of too long a name": (
        EARLY, lambda c, p: [*sft(c, p), "--output", p / ("x" * 300)], ["File name too long", "choose a shorter name"],
    ),
    "an output below a name that is too long": (
        EARLY, lambda c, p: [*reward(c, p), "--output", p / "new" / ("x" * 300) / "out"], ["File name too long"],
    ),
    "an output of too long a path": (
        EARLY, lambda c, p: [*ppo(c, p), "--output", p.joinpath(*["x" * 200] * 21)], ["File name too long"],
    ),
    "a file whose temporary name is too long": (
        EARLY, lambda c, p: [*sample(c, p), "--output", p / f"{'x' * 245}.jsonl"], ["File name too long"],
    ),
    "an export of too long a name": (
        EARLY, lambda c, p: [*export(c, p), "--output", p / ("x" * 245)], ["File name too long"],
    ),
    "an export below a file": (
        EARLY, lambda c, p: [*export(c, p), "--output", c.prompts / "x"], ["prompts.jsonl is not a folder"],
    ),
    **{
        f"a place that nobody can write to: {name}": (
            EARLY, lambda c, p, build=build, place=place: build(c, p, place),
            [place, "cannot write: nothing can be written into /proc", "choose a place that you may write to"],
        )
        for name, place, build in (
            ("sft", "/proc/new/out", lambda c, p, place: [*sft(c, p), "--output", place]),
            ("export", "/proc/out", lambda c, p, place: [*export(c, p), "--output", place]),
            ("sample", "/proc/x.jsonl", lambda c, p, place: [*sample(c, p), "--output", place]),
            ("report", "/proc/x.json", lambda c, p, place: evaluate(c, p, "--output", place)),
            ("plot", "/proc/x.svg", lambda c, p, place: evaluate(
                c, p, "--plot", place, "--reward", c.reward, "--best-of", "1,2")),
        )
        if Path("/proc").is_dir()
    },
    "another stage's run": (
        EARLY, lambda c, p: [*reward(c, p), "--output", c.sft],
        ["holds a run of `sft`, not of `reward`", "--overwrite"],
    ),
    "a run with other knobs": (
        EARLY, lambda c, p: [*sft(c, p), "--output", c.sft],
        ["holds a run with different knobs or inputs", "batch_size: 8 -> 16"],
    ),
    "a sample into a folder": (
        EARLY, lambda c, p: [*sample(c, p), "--output", p], ["--output", "is a folder", ".jsonl"],
    ),
    "a sample into another kind of file": (
        EARLY, lambda c, p: [*sample(c, p), "--output", p / "x.txt"], ["does not end in .jsonl"],
    ),
    "a sample over somebody else's file": (
        EARLY, lambda c, p: [*sample(c, p), "--output", rows(p, {"text": "mine"})],
        ["will not be overwritten", "--output"],
    ),
    "a sample over its own dataset": (
        EARLY, lambda c, p: [*sample(c, p, dataset=responses(p)), "--output", p / "rows.jsonl"],
        ["is the dataset that is read"],
    ),
    "an evaluation over somebody else's file": (
        EARLY, lambda c, p: evaluate(c, p, "--reward", c.reward, "--output", written(p / "x.json", '{"mine": 1}')),
        ["will not be overwritten"],
    ),
    "an evaluation into a table": (
        EARLY, lambda c, p: evaluate(c, p, "--output", p / "x.csv"), ["does not end in .json"],
    ),
    "a sample below a file": (
        EARLY, lambda c, p: [*sample(c, p), "--output", c.prompts / "x.jsonl"], ["prompts.jsonl is not a folder"],
    ),
    "an export over something": (EARLY, lambda c, p: export(c, p, *owned(p / "out")), ["is not empty", "new folder"]),
    "an export over a file": (EARLY, lambda c, p: export(c, p, *file_at(p / "out")), ["--output"]),
    "an export of a base": (
        EARLY, lambda c, p: export(c, p, model=c.base), ["is a base model; there is no adapter to merge"],
    ),
    "a report of nothing": (EARLY, lambda c, p: ["report", p], ["nothing to report here", "checkpoint.json"]),
    "a report of a missing folder": (EARLY, lambda c, p: ["report", p / "no"], ["no such folder"]),
}  # fmt: skip


def owned(folder: Path) -> tuple:
    written(folder / "notes.txt", "mine")
    return ()


def file_at(place: Path, inside: str | None = None) -> tuple:
    written(place, "mine")
    return () if inside is None else (place / inside,)


def responses(p: Path) -> Path:
    return rows(p, {"prompt": "red", "response": "blue", "index": 0, "ended": True, "tokens": 1})


def heavy(name: str):
    """Stands in for `load`: what opens inputs may be loaded, a stage may not."""
    assert name in ("inputs", "report"), f"stages.{name} was loaded before the mistake was found"
    from rlhf_cli.program import load

    return load(name)


def files_in(place: Path) -> dict[str, str]:
    return contents(place) | {
        str(path): "folder" for path in place.rglob("*") if path.is_dir() and path.name != "__pycache__"
    }


# What the fast tests of the configuration (test_config, test_cli_main) and of data (test_data_*) check as well.
REPEATED = {
    "another stage's knob in a recipe", "a knob twice", "missing recipe", "broken recipe", "a recipe that is a list",
    "wrong type of a flag", "wrong type in a recipe", "below a bound", "out of bounds in a recipe", "no such choice",
    "map without a column", "a dataset of blank lines", "an empty list", "a header without rows",
    "a folder without a dataset", "an unknown kind of file", "a row that is no object", "a row with too few cells",
    "not UTF-8", "not parquet", "an empty completion", "an unknown role", "nobody answers", "chosen is rejected",
    "ranks that do not count up", "ratings that never differ", "no such column", "no row that can be used",
}  # fmt: skip


@pytest.mark.parametrize("row", full_but(ROWS.keys() - REPEATED, ROWS))
def test_a_mistake_is_one_message_and_nothing_is_written(chain, tmp_path, monkeypatch, row):
    if row == "CUDA on a machine without":
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_refusal(chain(), tmp_path, monkeypatch, *ROWS[row])


def check_refusal(found: Chain, tmp_path: Path, monkeypatch, early: bool, build, says: list[str]) -> None:
    """A command line is refused with one message that says all of `says`, and no file anywhere changes."""
    arguments = build(found, tmp_path)
    if early:
        monkeypatch.setattr(main, "load", heavy)
    monkeypatch.chdir(tmp_path)
    before = files_in(tmp_path), files_in(found.folder)
    ended = rlhf(*arguments)
    assert (ended.code, ended.stdout) == (2, ""), ended.stderr
    lines = ended.stderr.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    message = "\n".join(lines[at:])
    assert message.count("error: ") == 1 and "\n  -> " in message and "Traceback" not in message, message
    for part in says:
        assert part in message, message
    assert (files_in(tmp_path), files_in(found.folder)) == before


@pytest.mark.parametrize("command", ["sft", "reward", "ppo", "evaluate", "sample", "export"])
def test_every_command_checks_its_model_first(chain, tmp_path, command):
    """A damaged checkpoint is refused by every command that could load it."""
    found = chain()
    damaged = spoiled(found.reward if command == "evaluate" else found.sft, tmp_path, "adapter_model.safetensors", flip)
    flags = {
        "sft": ("--dataset", found.demonstrations, "--output", tmp_path / "x"),
        "reward": ("--dataset", found.comparisons, "--output", tmp_path / "x"),
        "ppo": ("--dataset", found.prompts, "--reward", found.reward, "--output", tmp_path / "x"),
        "evaluate": ("--dataset", found.comparisons),
        "sample": ("--dataset", found.prompts, "--output", tmp_path / "x.jsonl"),
        "export": ("--output", tmp_path / "x"),
    }
    line = [command, "--model", damaged, *flags[command]]
    ended = rlhf(*line)
    assert ended.code == 2 and "`adapter_model.safetensors` is damaged" in ended.stderr
    assert os.listdir(tmp_path) == ["spoiled"]


NO_TORCH = """
import runpy, sys
code = 0
sys.argv = ["rlhf", *sys.argv[1:]]
from rlhf_cli.main import app
from rlhf_cli import program
program.leave = lambda code: sys.exit(code)
try:
    app()
except SystemExit as end:
    code = end.code
heavy = sorted({"torch", "transformers", "datasets", "peft", "pyarrow", "pandas"} & set(sys.modules))
print("loaded:", *heavy)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        *full((2, lambda c: ["sft", "--model", c.base, "--dataset", c.prompts, "--output", "x"])),
        (2, lambda c: ["ppo", "--model", c.sft, "--reward", c.sft, "--dataset", c.prompts, "--output", "x"]),
        *full((0, lambda c: ["report", c.folder])),
        *full((0, lambda c: ["sft", "--config", c.sft / "config.yaml"])),  # already done
    ],
    ids=["dataset", "checkpoint", "report", "already done"],
)
def test_these_answer_without_torch(chain, tmp_path, code, arguments):
    words = [str(word) for word in arguments(chain())]
    ended = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *words],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode == code, ended.stderr
    assert ended.stdout.splitlines()[-1] == "loaded:", ended.stdout
