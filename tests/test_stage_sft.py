"""`rlhf sft`: it learns, whatever format the rows come in, and exactly the tokens that the mask names."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from stages.checkpoint.digests import base_digest
from tests.commands import (
    AFTER,
    WORDS,
    assert_same_weights,
    contents,
    demonstrations,
    done,
    lines_of,
    manifest,
    result,
    weights,
    without_times,
)
from tests.marks import full
from tests.tiny import CHAT, write_jsonl

ONE_STEP = ("--max-steps", 1, "--batch-size", 4, "--lora-rank", 2, "--samples", 0, "--eval-fraction", 0)
ROWS = [{"prompt": f"{word} then", "completion": f" {AFTER[word]}"} for word in WORDS]


def sft(chain, dataset: Path, output: Path, *more: object, model: Path | None = None) -> dict:
    return result("sft", "--model", model or chain().base, "--dataset", dataset, "--output", output, *more)


def nll(folder: Path, ids: list[int], learned: list[int]) -> float:
    """Sum of -log p over the tokens at these places, by transformers itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logprobs[place - 1, ids[place]]) for place in learned)


def tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# --- learning


@pytest.fixture(scope="module")
def learned(chain, tmp_path_factory):
    """A run long enough to learn which word comes after the last one of the prompt."""
    folder = tmp_path_factory.mktemp("learned") / "sft"
    flags = ("--max-steps", 60, "--batch-size", 16, "--lora-rank", 8, "--learning-rate", "2e-2", "--eval-fraction", 0.2)
    return folder, sft(chain, chain().demonstrations, folder, *flags, "--eval-every", 30)


def test_it_learns_a_rule_and_knows_it_on_held_out_prompts(learned):
    folder, found = learned
    metrics = found["metrics"]
    assert metrics["eval_loss_before"] > 5.5  # near ln 300: the base says anything
    assert metrics["eval_loss"] < 2.6
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-6)
    lines = lines_of(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 30, 60]
    first, last = (sum(line["loss"] for line in part) / 10 for part in (lines[1:11], lines[-10:]))
    assert last < 0.6 * first


def test_the_learning_rate_warms_up_and_falls_to_the_end(learned):
    """Warm-up over 2 of 60 steps (3 %), then linear: step k of 58 gets 1 - k/58 of the peak."""
    rates = [line["lr"] for line in lines_of(learned[0] / "metrics.jsonl")[1:]]
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.02]) and rates[3] == pytest.approx(0.02 * 57 / 58)
    assert rates[-1] == pytest.approx(0.02 / 58)


def test_nothing_but_adapters_is_trained(chain, learned):
    """Check 52: the checkpoint holds LoRA matrices alone, and the base's content is what it was before."""
    assert all(name.split(".")[-2] in ("lora_A", "lora_B") for name in weights(learned[0]))
    assert base_digest(chain().base) == manifest(learned[0])["base"]["digest"]


def test_evaluate_finds_the_same_perplexity_and_transformers_too(chain, learned, tmp_path):
    """Perplexity of held-out rows by `rlhf evaluate`, and from the exported model's logits alone."""
    rows = demonstrations()[:12]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = result("evaluate", "--model", learned[0], "--dataset", data, "--reward", length_reward(tmp_path))[
        "perplexity"
    ]
    done("export", "--model", learned[0], "--output", tmp_path / "exported")
    words = tokenizer(tmp_path / "exported")
    total = count = 0
    for row in rows:
        start = len(words(row["prompt"]).input_ids)
        ids = words(row["prompt"] + row["completion"]).input_ids + [words.eos_token_id]
        total += nll(tmp_path / "exported", ids, list(range(start, len(ids))))
        count += len(ids) - start
    assert found["loss"] == pytest.approx(total / count, abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3) and found["rows"] == 12


def length_reward(place: Path) -> Path:
    (place / "f.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    return place / "f.py"


# --- the same result


@pytest.fixture(scope="module")
def by_ones(chain, tmp_path_factory):
    return run_with(chain, tmp_path_factory.mktemp("ones") / "x", "--micro-batch-size", 1)


def run_with(chain, folder: Path, *more: object) -> Path:
    flags = ("--max-steps", 6, "--batch-size", 8, "--lora-rank", 4, "--learning-rate", "1e-2", "--samples", 1)
    sft(chain, chain().demonstrations, folder, *flags, *more)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("size", ["auto", 4, 5])
def test_the_micro_batch_size_does_not_matter(chain, by_ones, tmp_path, size):
    """Check 24 through the command: rows of uneven length, cut in other ways, give the same adapter."""
    assert_same_weights(run_with(chain, tmp_path / "x", "--micro-batch-size", size), by_ones, within=1e-5)


@pytest.mark.full
def test_the_same_seed_gives_the_same_files_and_another_one_others(chain, by_ones, tmp_path):
    """Check 54."""
    same = run_with(chain, tmp_path / "same", "--micro-batch-size", 1)
    other = run_with(chain, tmp_path / "other", "--micro-batch-size", 1, "--seed", 1)
    unlike = {"checkpoint.json", "config.yaml", "metrics.jsonl"}  # where they lie, and what the clock said
    mine, theirs = contents(same), contents(by_ones)
    assert {k: v for k, v in mine.items() if k not in unlike} == {k: v for k, v in theirs.items() if k not in unlike}
    assert without_times(same / "metrics.jsonl") == without_times(by_ones / "metrics.jsonl")
    assert contents(other)["adapter_model.safetensors"] != mine["adapter_model.safetensors"]
    assert without_times(other / "metrics.jsonl") != without_times(same / "metrics.jsonl")


@pytest.mark.full
def test_gradient_checkpointing_gives_the_same(chain, by_ones, tmp_path):
    assert_same_weights(run_with(chain, tmp_path / "x", "--gradient-checkpointing", "true"), by_ones, within=1e-5)


def test_training_goes_on_from_a_checkpoint(chain, learned, tmp_path):
    flags = ("--max-steps", 2, "--batch-size", 8, "--eval-fraction", 0.2)
    found = result(
        "sft", "--model", learned[0], "--dataset", chain().demonstrations, "--output", tmp_path / "x", *flags
    )
    about = manifest(tmp_path / "x")
    assert found["metrics"]["eval_loss_before"] == pytest.approx(learned[1]["metrics"]["eval_loss"], abs=1e-6)
    assert [(p["role"], p["stage"], p["path"]) for p in about["parents"]] == [("model", "sft", str(learned[0]))]
    assert json.loads((tmp_path / "x" / "adapter_config.json").read_text())["r"] == 8  # the checkpoint's rank


@pytest.mark.full
def test_a_larger_rank_begins_as_the_same_model(chain, learned, tmp_path):
    flags = ("--max-steps", 1, "--batch-size", 8, "--eval-fraction", 0.2, "--lora-rank", 12)
    found = result(
        "sft", "--model", learned[0], "--dataset", chain().demonstrations, "--output", tmp_path / "x", *flags
    )
    assert found["metrics"]["eval_loss_before"] == pytest.approx(learned[1]["metrics"]["eval_loss"], abs=1e-5)
    assert json.loads((tmp_path / "x" / "adapter_config.json").read_text())["r"] == 12


def test_only_the_named_layers_are_adapted(chain, tmp_path):
    sft(
        chain, chain().demonstrations, tmp_path / "x", *ONE_STEP, "--lora-targets", "q_proj", "--lora-targets", "v_proj"
    )
    assert {name.split(".")[-3] for name in weights(tmp_path / "x")} == {"q_proj", "v_proj"}


# --- what a row may look like


def as_json(rows: list[dict], place: Path) -> Path:
    place.with_suffix(".json").write_text(json.dumps(rows))
    return place.with_suffix(".json")


def as_jsonl(rows: list[dict], place: Path) -> Path:
    return write_jsonl(place.with_suffix(".jsonl"), rows)


def as_csv(rows: list[dict], place: Path) -> Path:
    with open(place.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return place.with_suffix(".csv")


def as_parquet(rows: list[dict], place: Path) -> Path:
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(place.with_suffix(".parquet"))
    return place.with_suffix(".parquet")


def as_saved(rows: list[dict], place: Path) -> Path:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(place)
    return place


def as_splits(rows: list[dict], place: Path) -> str:
    from datasets import Dataset, DatasetDict

    DatasetDict({"good": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}).save_to_disk(place)
    return f"{place}:good"


@pytest.mark.full
@pytest.mark.parametrize("write", [as_parquet, as_json, as_csv, as_saved, as_splits])
def test_every_kind_of_file_trains_the_same_adapter(chain, tmp_path, write):
    sft(chain, as_jsonl(ROWS, tmp_path / "lines"), tmp_path / "one", *ONE_STEP)
    found = sft(chain, write(ROWS, tmp_path / "rows"), tmp_path / "other", *ONE_STEP)
    assert_same_weights(tmp_path / "one", tmp_path / "other")
    assert found["metrics"]["held_out_rows"] == 0 and manifest(tmp_path / "other")["datasets"]["train"]["rows"] == 16


TALK = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green"}]
LIKE = {  # rows that say the same as {"prompt": "red", "completion": " green"}, and as the conversation TALK
    "question and answer": (
        {"question": "red", "answer": " green"},
        ("--map", "prompt=question,completion=answer"),
        False,
    ),
    "text": ({"text": "red green"}, (), False),
    "alpaca": ({"instruction": "red", "input": "", "output": "green"}, (), True),
    "messages": ({"messages": TALK}, (), True),
    "sharegpt": ({"conversations": [{"from": "human", "value": "red"}, {"from": "gpt", "value": "green"}]}, (), True),
    "prompt messages": ({"prompt": TALK[:1], "completion": TALK[1:]}, (), True),
    "other columns": ({"prompt": "red", "completion": " green", "source": "x"}, (), False),
}


@pytest.mark.full
@pytest.mark.parametrize("kind", LIKE)
def test_every_kind_of_row_trains_the_same_adapter(chain, model_folder, tmp_path, kind):
    row, flags, chat = LIKE[kind]
    plain = {"messages": TALK} if chat else {"prompt": "red", "completion": " green"}
    more = ("--mask", "all") if kind == "text" else ()
    base = model_folder("llama", chat=chat)
    sft(chain, write_jsonl(tmp_path / "a.jsonl", [plain] * 4), tmp_path / "a", *ONE_STEP, *more, model=base)
    sft(chain, write_jsonl(tmp_path / "b.jsonl", [row] * 4), tmp_path / "b", *ONE_STEP, *flags, *more, model=base)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.full
def test_alpaca_rows_without_a_template_stand_under_headings(chain, tmp_path):
    text = "### Instruction:\nred\n\n### Input:\none\n\n### Response:\n"
    plain, alpaca = {"prompt": text, "completion": "green"}, {"instruction": "red", "input": "one", "output": "green"}
    sft(chain, write_jsonl(tmp_path / "a.jsonl", [plain] * 4), tmp_path / "a", *ONE_STEP)
    sft(chain, write_jsonl(tmp_path / "b.jsonl", [alpaca] * 4), tmp_path / "b", *ONE_STEP)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_bad_rows_are_dropped_and_counted_when_asked(chain, tmp_path):
    rows = [*ROWS, {"prompt": "red", "completion": ""}, {"prompt": "cat " * 200, "completion": " dog"}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    line = ("sft", "--model", chain().base, "--dataset", data, "--output", tmp_path / "x", *ONE_STEP, "--skip-bad-rows")
    ended = done(*line)
    assert f"warning: 1 row of {data} cannot be used and was dropped; {data}:17: completion" in ended.stderr
    told = f"1 of 17 demonstrations is longer than 128 tokens and was dropped (--long-rows); the first is {data}:18"
    assert told in ended.stderr
    assert "16 demonstrations, 1 step, " in ended.stderr


def test_held_out_rows_may_come_from_a_file(chain, tmp_path):
    write_jsonl(tmp_path / "held.jsonl", demonstrations()[:7])
    flags = (
        "--max-steps",
        1,
        "--batch-size",
        4,
        "--lora-rank",
        2,
        "--eval-dataset",
        tmp_path / "held.jsonl",
        "--eval-limit",
        5,
    )
    found = sft(chain, as_jsonl(ROWS, tmp_path / "rows"), tmp_path / "x", *flags)
    assert found["metrics"]["held_out_rows"] == 5
    assert [row["prompt"] for row in lines_of(tmp_path / "x" / "samples.jsonl")][:4] == [
        "red red",
        "red green",
        "red blue",
        "red one",
    ]


# --- masks: the loss of the untrained model on two rows, against one computed here


def before_training(base: Path, rows: list[dict], place: Path, *flags: object) -> float:
    data = write_jsonl(place / "rows.jsonl", rows)
    more = ("--max-steps", 1, "--batch-size", 2, "--eval-dataset", data, "--samples", 0, *flags)
    return sft(None, data, place / "x", *more, model=base)["metrics"]["eval_loss_before"]


@pytest.mark.parametrize("mask", ["completion", *full("assistant", "all")])
def test_the_mask_of_plain_rows(chain, tmp_path, mask):
    """Check 29: the completion and the EOS after it are learned, with `all` the prompt too; never the first token."""
    rows, base = ROWS[:2], chain().base
    words, total, count = tokenizer(base), 0.0, 0
    for row in rows:
        start = len(words(row["prompt"]).input_ids) if mask != "all" else 1
        ids = words(row["prompt"] + row["completion"]).input_ids + [2]
        total += nll(base, ids, list(range(start, len(ids))))
        count += len(ids) - start
    assert before_training(base, rows, tmp_path, "--mask", mask) == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("mask", ["assistant", *full("completion", "all")])
def test_the_mask_of_conversations(model_folder, tmp_path, mask):
    """Check 29: the last assistant turn with its end-of-turn token; with `assistant` every turn; with `all` all."""
    turns = [("user", "red"), ("assistant", "green"), ("user", "one"), ("assistant", "two three")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    base = model_folder("llama", chat=True)
    words, ids, learned = tokenizer(base), [], []
    assert words.chat_template == CHAT
    for number, (role, text) in enumerate(turns):
        part = words(f"<|{role}|>{text}<|end|>", add_special_tokens=False).input_ids
        spoken = range(len(ids) + 1, len(ids) + len(part))  # all but <|assistant|> itself
        if role == "assistant" and (mask == "assistant" or number == 3):
            learned += spoken
        ids += part
    learned = list(range(1, len(ids))) if mask == "all" else learned
    expected = nll(base, ids, learned) / len(learned)
    assert before_training(base, [row] * 2, tmp_path, "--mask", mask) == pytest.approx(expected, abs=1e-5)


def test_rows_that_are_too_long_lose_their_end_without_a_false_eos(chain, tmp_path):
    row = {"prompt": "red", "completion": " green blue one two three four five six cat dog"}
    base, words = chain().base, tokenizer(chain().base)
    ids = words(row["prompt"] + row["completion"]).input_ids[:6]
    start = len(words(row["prompt"]).input_ids)
    expected = nll(base, ids, list(range(start, 6))) / (6 - start)
    data = write_jsonl(tmp_path / "rows.jsonl", [row] * 4)
    flags = ("--max-steps", 1, "--batch-size", 2, "--eval-dataset", data, "--samples", 0, "--max-tokens", 6)
    ended = done("sft", "--model", base, "--dataset", data, "--output", tmp_path / "x", *flags)
    assert "4 of 4 demonstrations were cut to 6 tokens" in ended.stderr
    before = lines_of(tmp_path / "x" / "metrics.jsonl")[0]["eval_loss"]
    assert before == pytest.approx(expected, abs=1e-5)


def test_a_chat_template_given_once_stays_with_the_checkpoint(chain, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TALK}] * 8)
    sft(chain, data, tmp_path / "x", *ONE_STEP, "--chat-template", "plain")
    ask = write_jsonl(tmp_path / "ask.jsonl", [{"prompt": TALK[:1]}])
    flags = ("--max-response-tokens", 4, "--output", tmp_path / "said.jsonl")
    done("sample", "--model", tmp_path / "x", "--dataset", ask, *flags)
    assert lines_of(tmp_path / "said.jsonl")[0]["prompt"] == TALK[:1]
    assert "Human: " in tokenizer(tmp_path / "x").chat_template


@pytest.mark.full
def test_a_model_without_a_padding_token_or_with_eos_as_padding(chain, model_folder, tmp_path):
    """Padding plays no part in what is learned: the same weights come out."""
    for name, pad in (("none", None), ("eos", "<eos>"), ("own", "<pad>")):
        folder = model_folder("llama", pad=pad)
        data = as_jsonl(ROWS, tmp_path / "rows")
        done("sft", "--model", folder, "--dataset", data, "--output", tmp_path / name, *ONE_STEP, "--batch-size", 8)
    assert_same_weights(tmp_path / "none", tmp_path / "own")
    assert_same_weights(tmp_path / "eos", tmp_path / "own")
