"""Rows that are too long: cut, dropped or an error, by --long-rows; counted apart from bad rows."""

from __future__ import annotations

import json

import pytest

from stages.data.rows import Demonstration, Prompt
from stages.errors import LongRow
from stages.inputs import open_inputs
from stages.training.long_rows import encode_within
from stages.training.opening import encode_all
from tests.commands import done, refused, result
from tests.parts import open_tiny_text, ppo_config, sft_config
from tests.test_training_session import Notes
from tests.tiny import write_jsonl

SHORT = ("--max-steps", 1, "--batch-size", 4, "--samples", 0, "--lora-rank", 2, "--eval-fraction", 0)


def rows_of(*sizes: int) -> list[dict]:
    """Rows with responses of so many words, each a token; prompt, beginning and end make three more."""
    return [{"prompt": "red", "completion": " the" * size} for size in sizes]


def demonstrations(*sizes: int) -> list[Demonstration]:
    return [Demonstration(f"d:{n}", row["prompt"], row["completion"]) for n, row in enumerate(rows_of(*sizes), 1)]


@pytest.fixture(scope="module")
def text(model_folder):
    return open_tiny_text(model_folder("llama"))


def encode(text, limit, policy, *sizes, **knobs):
    report = Notes()
    how = {"config": sft_config(long_rows=policy, **knobs), "reporter": report, "what": "rows", "limit": limit}
    return encode_all(demonstrations(*sizes), lambda row: text.demonstration(row, "completion", limit), **how), report


def test_a_long_row_is_cut_dropped_or_an_error(text):
    size = text.demonstration(demonstrations(4)[0], "completion", 99).size
    limit = size + 2
    kept, report = encode(text, limit, None, 4, 9)
    assert [row.size for row in kept.rows] == [size, limit] and (kept.bad, kept.long, kept.cut) == (0, 0, 1)
    assert report.said == [("note", f"1 of 2 rows was cut to {limit} tokens")]
    kept, report = encode(text, limit, "drop", 4, 9)
    assert [row.size for row in kept.rows] == [size] and (kept.bad, kept.long, kept.cut) == (0, 1, 0)
    told = f"1 of 2 rows is longer than {limit} tokens and was dropped (--long-rows); the first is d:2"
    assert report.said == [("warn", told)]
    for skip in (False, True):  # it is not a bad row
        with pytest.raises(LongRow, match=f"the row has {size + 5} tokens; the longest may have {limit}") as caught:
            encode(text, limit, "stop", 4, 9, skip_bad_rows=skip)
        assert caught.value.where == "d:2"


def test_a_row_without_anything_left_to_learn_is_dropped_unless_rows_are_to_stop(text):
    row = Demonstration("d:1", "red " * 20, "blue")
    for policy in (None, "cut", "drop"):
        assert encode_within(row, lambda r: text.demonstration(r, "completion", 8), policy, 8) is None
    with pytest.raises(LongRow, match="nothing is left to learn within 8 tokens"):
        encode_within(row, lambda r: text.demonstration(r, "completion", 8), "stop", 8)


def test_a_prompt_is_dropped_or_loses_its_beginning(text):
    row = Prompt("p:1", "red blue one two three")
    whole = text.prompt(row, 99).ids.tolist()
    assert encode_within(row, lambda r: text.prompt(r, 4), None, 4) is None
    cut = text.prompt(row, 4, cut=True)
    assert (
        cut.ids.tolist() == [whole[0], *whole[-3:]] and cut.cut and cut.whole == len(whole)
    )  # it still begins with BOS


def test_when_every_row_is_too_long_the_first_is_named(text):
    with pytest.raises(LongRow, match="none of the 2 rows can be used; the row has") as caught:
        encode(text, 6, "drop", 9, 9)
    assert caught.value.where == "d:1" and "--long-rows" in caught.value.fix


# --- what the commands count


def sft(base, data, *flags):
    return ("sft", "--model", base, "--dataset", data, "--max-tokens", 8, *SHORT, *flags)


@pytest.mark.full
def test_counts_are_in_the_result_and_in_the_manifest(model_folder, tmp_path):
    base = model_folder("llama")
    data = write_jsonl(tmp_path / "d.jsonl", [*rows_of(1, 2, 3, 30, 40), {"prompt": "red", "completion": ""}])
    counted = {"used": 5, "held_out_rows": 0, "skipped_rows": 1, "dropped_long_rows": 0, "cut_rows": 2}
    flags = ("--output", tmp_path / "cut", "--skip-bad-rows")
    plan = result(*sft(base, data, *flags), "--dry-run")["plan"]
    assert {name: plan[name] for name in counted if name != "used"} == {n: c for n, c in counted.items() if n != "used"}
    assert result(*sft(base, data, *flags))["rows"] == counted
    train = json.loads((tmp_path / "cut" / "checkpoint.json").read_text(encoding="utf-8"))["datasets"]["train"]
    assert {name: train[name] for name in counted} == counted and train["form"] == "text"
    dropped = done(*sft(base, data, "--output", tmp_path / "drop", "--skip-bad-rows", "--long-rows", "drop", "--json"))
    assert dropped.json["rows"] == counted | {"used": 3, "dropped_long_rows": 2, "cut_rows": 0}
    assert "2 of 5 demonstrations are longer than 8 tokens and were dropped" in dropped.stderr
    assert f"{data}:4" in refused(
        *sft(base, data, "--output", tmp_path / "x", "--skip-bad-rows", "--long-rows", "stop")
    )


def test_limit_rows_counts_rows_that_are_used(model_folder, tmp_path):
    base = model_folder("llama")
    bad = {"prompt": "red", "completion": ""}
    data = write_jsonl(tmp_path / "d.jsonl", [*rows_of(30), bad, *rows_of(1, 40, 2, 3, 4), {"prompt": 7}])
    flags = ("--limit-rows", 3, "--skip-bad-rows", "--long-rows", "drop", "--output", tmp_path / "x", "--dry-run")
    plan = result(*sft(base, data, *flags))["plan"]
    assert (plan["rows"], plan["skipped_rows"], plan["dropped_long_rows"]) == (3, 1, 2)
    flags = ("--limit-rows", 3, "--skip-bad-rows", "--output", tmp_path / "x", "--dry-run")
    plan = result(*sft(base, data, *flags))["plan"]
    assert (plan["rows"], plan["cut_rows"], plan["dropped_long_rows"]) == (3, 2, 0)
    few = {"--limit-rows": 2, "--long-rows": "drop", "--output": tmp_path / "x"}
    with_bad_after = write_jsonl(
        tmp_path / "e.jsonl", [*rows_of(1, 40, 2), bad]
    )  # a bad row behind the limit is not read
    plan = result(*sft(base, with_bad_after, *(part for pair in few.items() for part in pair), "--dry-run"))["plan"]
    assert (plan["rows"], plan["skipped_rows"], plan["dropped_long_rows"]) == (2, 0, 1)


def test_prompts_too_long_are_dropped_and_counted_by_ppo_and_sample(model_folder, tmp_path):
    base = model_folder("llama")
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "red"}, {"prompt": "red blue " * 200}, {"prompt": "two"}])
    line = ("sample", "--model", base, "--dataset", data, "--output", tmp_path / "s.jsonl", "--max-response-tokens", 2)
    ended = done(*line, "--json")
    assert ended.json["prompts"] == 2
    assert ended.json["rows"] == {"skipped_rows": 0, "dropped_long_rows": 1, "cut_rows": 0}
    assert "1 of 3 prompts is longer than 126 tokens and was dropped (--long-rows)" in ended.stderr
    cut = result(*line, "--long-rows", "cut", "--dry-run")
    assert cut["plan"]["prompts"] == 3 and cut["rows"]["cut_rows"] == 1
    assert "126 fit beside the response" in refused(*line, "--long-rows", "stop")
    assert result(*line, "--limit-rows", 2, "--dry-run")["rows"]["dropped_long_rows"] == 1


@pytest.mark.full
def test_an_old_run_without_these_knobs_is_the_same_run(model_folder, tmp_path):
    """A stored config of an earlier version has neither `text_as` nor `long_rows`."""
    data, out = write_jsonl(tmp_path / "d.jsonl", rows_of(1, 2, 3, 4)), tmp_path / "x"
    done(*sft(model_folder("llama"), data, "--output", out))
    manifest = json.loads((out / "checkpoint.json").read_text(encoding="utf-8"))
    manifest["config"].pop("text_as"), manifest["config"].pop("long_rows")
    manifest["datasets"] = {
        "train": {name: manifest["datasets"]["train"][name] for name in ("source", "digest", "rows")}
    }
    (out / "checkpoint.json").write_text(json.dumps(manifest), encoding="utf-8")
    knobs = {"model": str(model_folder("llama")), "dataset": str(data), "output": str(out), "max_tokens": 8}
    config = sft_config(**knobs, max_steps=1, batch_size=4, samples=0, lora_rank=2, eval_fraction=0.0)
    assert open_inputs("sft", config).done
    assert ppo_config().long_rows is None and ppo_config().text_as is None
