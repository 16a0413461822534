"""stages/report.py: what a run's JSON files say, in tables."""

from __future__ import annotations

import json
import shlex

import pytest

from stages.cells import ABSENT, beginning, ending, format_share, format_text
from stages.errors import CheckpointError
from stages.report import run
from stages.results import Silent
from stages.tables import name_sides

SIDE = {"score": 0.25, "score_error": 0.0512, "gold": -1.5, "kl": 3.14159, "length": 41.26, "eos_rate": 0.975}


def manifest(stage, **metrics):
    return {
        "format_version": 1,
        "stage": stage,
        "metrics": metrics,
        "steps": 1200,
        "seconds": 95.44,
        "throughput": {"tokens_per_second": 12345.6, "samples_per_second": 9.5},
        "base": {"name": "tiny/base"},
        "config": {"dataset": "my prompts.jsonl"},
    }


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def whole_run(folder, **evaluation):
    write(folder / "sft/checkpoint.json", manifest("sft", eval_loss_before=2.5, eval_loss=1.25, eval_perplexity=3.4903))
    reward = {"accuracy": 0.7125, "accuracy_low": 0.66, "accuracy_high": 0.76, "longer_wins_accuracy": 0.6}
    write(folder / "reward/checkpoint.json", manifest("reward", **reward, eval_pairs=400))
    write(folder / "ppo/checkpoint.json", manifest("ppo"))
    if evaluation:
        write(folder / "evaluate.json", evaluation)
    return str(folder)


def report(*paths):
    return run([str(path) for path in paths], Silent())


def table(result, title):
    found = [t for t in result.tables if t.title == title]
    assert len(found) == 1, [t.title for t in result.tables]
    return found[0]


def rows(result, title):
    return {row[0]: row[1:] for row in table(result, title).rows}


# --- tables -------------------------------------------------------------------------------------------------------


def test_the_stages_and_how_long_they_took(tmp_path):
    result = report(whole_run(tmp_path))
    assert table(result, "the stages").columns == ("stage", "base", "steps", "seconds", "tokens/s")
    assert rows(result, "the stages") == {
        stage: ("tiny/base", "1,200", "95.4", "12,346") for stage in ("sft", "reward", "ppo")
    }


def test_what_training_did_on_held_out_rows(tmp_path):
    values = {name: cells[0] for name, cells in rows(report(whole_run(tmp_path)), "on held-out rows").items()}
    assert values == {
        "sft: loss per token": "2.500 -> 1.250",
        "sft: perplexity": "3.49",
        "reward model: prefers the chosen response": "71.2 % (66.0 to 76.0) of 400 comparisons",
        "for comparison: always prefer the longer one": "60.0 %",
    }


def test_sft_beside_ppo(tmp_path):
    better = SIDE | {"score": 1.5, "gold": -0.25, "kl": 6.0, "length": 80.0, "eos_rate": 1.0}
    rates = {"reward": {"rate": 0.625, "low": 0.55, "high": 0.7, "n": 200}, "gold": {"rate": 0.5}}
    result = report(whole_run(tmp_path, policy=better, against=SIDE, win_rate=rates))
    assert table(result, "sft against ppo").columns == ("measure", "sft", "ppo")
    assert rows(result, "sft against ppo") == {
        "score": ("0.250 ± 0.051", "1.500 ± 0.051"),
        "gold score (never trained on)": ("-1.500", "-0.250"),
        "KL to the reference, nats per response": ("3.14", "6.00"),
        "response length, tokens": ("41.3", "80.0"),
        "ended with EOS": ("97.5 %", "100.0 %"),
        "wins by score": (ABSENT, "62.5 % (55.0 to 70.0, n 200)"),
        "wins by gold score": (ABSENT, "50.0 %"),
    }


def test_the_same_prompts_side_by_side(tmp_path):
    example = {"prompt": "Why?", "response": "Because.", "against": "No.", "score": 1.234, "against_score": -0.5}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = {"prompt": messages, "response": "", "against": "Hello", "gold": 2, "score": None}
    result = report(whole_run(tmp_path, examples=[example, chat], compared_with="x/sft"))
    found = table(result, "the same prompts, answered by sft and ppo")
    assert found.columns == ("prompt", "sft", "ppo")
    assert found.rows == (
        ("Why?", "No.\n[score -0.50]", "Because.\n[score 1.23]"),
        ("system: Be brief.\nuser: Hi", "Hello", "(empty)\n[gold 2.00]"),
    )


def test_a_policy_compared_with_nothing_stands_alone(tmp_path):
    alone = {"policy": SIDE, "examples": [{"prompt": "Why?", "response": "So.", "score": 1.0}], "model": "x/ppo"}
    result = report(whole_run(tmp_path, **alone))
    assert table(result, "ppo").columns == ("measure", "ppo")
    assert table(result, "the same prompts, answered by ppo").rows == (("Why?", "So.\n[score 1.00]"),)


def test_long_examples_keep_what_was_asked_and_how_the_answer_begins():
    text = "a" * 300 + "b" * 600
    assert beginning(text) == "a" * 300 + "b" * 300 + " ..." and ending(text) == "... " + "b" * 600
    assert beginning("b" * 600) == ending("b" * 600) == "b" * 600


def test_absent_numbers_are_left_out_or_dashes(tmp_path):
    write(tmp_path / "sft/checkpoint.json", {"stage": "sft", "metrics": {"eval_loss": 1.0, "eval_perplexity": "n/a"}})
    write(tmp_path / "evaluate.json", {"policy": {"score": 1.0, "kl": None, "length": True}, "win_rate": None})
    result = report(tmp_path)
    assert [t.title for t in result.tables] == ["the stages", "on held-out rows", "ppo"]
    assert rows(result, "the stages") == {"sft": (ABSENT, ABSENT, ABSENT, ABSENT)}
    assert rows(result, "on held-out rows") == {"sft: loss per token": ("1.000", "lower is better")}
    assert rows(result, "ppo") == {"score": ("1.000",)}


def test_numbers_that_are_not_finite_are_shown_as_they_are(tmp_path):
    write(tmp_path / "sft/checkpoint.json", '{"stage": "sft", "metrics": {"eval_loss": NaN}, "steps": Infinity}')
    result = report(tmp_path)
    assert rows(result, "on held-out rows")["sft: loss per token"][0] == "nan"
    assert rows(result, "the stages")["sft"][1] == "inf"


@pytest.mark.parametrize(
    ("evaluation", "names"),
    [
        ({}, ("ppo",)),
        ({"model": "tiny/base"}, ("base",)),
        ({"against": {"score": 1.0}}, ("sft", "ppo")),
        ({"compared_with": "runs/x/sft", "model": "runs/x/ppo/"}, ("sft", "ppo")),
        ({"compared_with": "tiny/base", "model": "runs/x/ppo"}, ("base", "ppo")),
        ({"compared_with": "runs/a/ppo", "model": "runs/b/ppo"}, ("runs/a/ppo", "runs/b/ppo")),
        ({"compared_with": None, "model": 3}, ("ppo",)),
    ],
)
def test_the_sides_are_named_after_what_was_compared(evaluation, names):
    assert name_sides(evaluation) == names


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((0.5,), "50.0 %"), ((0.5, 0.4, None), "50.0 %"), ((0.123, 0.1, 0.2), "12.3 % (10.0 to 20.0)"), ((None,), "-")],
)
def test_shares(arguments, text):
    assert format_share(*arguments) == text


def test_a_prompt_that_is_neither_text_nor_messages_is_shown_anyway():
    assert (format_text(None), format_text(5), format_text(["x", {"role": "user"}])) == (ABSENT, "5", "user: ")


# --- what is read -------------------------------------------------------------------------------------------------


def test_a_checkpoint_folder_is_a_run_of_one_stage(tmp_path):
    whole_run(tmp_path)
    result = report(tmp_path / "reward")
    assert list(rows(result, "the stages")) == ["reward"] and result.next == ()


def test_the_data_of_json_holds_manifests_and_evaluation(tmp_path):
    path = whole_run(tmp_path, policy=SIDE)
    result = report(path)
    assert (result.command, result.status, result.output) == ("report", "done", None)
    (found,) = result.data["runs"]
    assert found["run"] == path and list(found["stages"]) == ["sft", "reward", "ppo"]
    assert found["stages"]["sft"]["metrics"]["eval_loss"] == 1.25 and found["evaluation"]["policy"] == SIDE


def test_several_runs_are_compared_in_one_table(tmp_path):
    one = whole_run(tmp_path / "one", policy=SIDE | {"score": 2.0}, against=SIDE, win_rate={"reward": {"rate": 0.9}})
    two = whole_run(tmp_path / "two", examples=[{"prompt": "p", "response": "r"}])
    result = report(one, two, one)
    assert result.tables[0].title == "all runs"
    assert result.tables[0].rows == (
        (one, "1.250", "71.2 %", "0.250", "2.000", "3.142", "90.0 %"),
        (two, "1.250", "71.2 %", "-", "-", "-", "-"),
    )
    titles = [t.title for t in result.tables]
    assert f"{one}: the stages" in titles and f"{two}: on held-out rows" in titles
    assert not any("same prompts" in title for title in titles)
    assert len(result.data["runs"]) == 2


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        report(tmp_path / "absent")
    assert caught.value.what == "no such folder" and caught.value.where == str(tmp_path / "absent")


def test_a_folder_with_nothing_to_tell(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to report here"):
        report(tmp_path)
    (tmp_path / "sft").mkdir()
    with pytest.raises(CheckpointError, match="sft did not finish yet"):
        report(tmp_path)


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ('{"stage":\n', ":2", "damaged: Expecting value"),
        ("[1, 2]", "", "damaged: it is not a JSON object"),
        ("null", "", "damaged: it is not a JSON object"),
        ("[" * 100_000, "", "damaged: it is nested too deeply"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, line, why):
    write(tmp_path / "sft/checkpoint.json", text)
    with pytest.raises(CheckpointError) as caught:
        report(tmp_path)
    assert caught.value.where == f"{tmp_path / 'sft/checkpoint.json'}{line}" and why in caught.value.what


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "evaluate.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"evaluate\.json: the file is damaged"):
        report(tmp_path)


@pytest.mark.parametrize(
    "broken", [[], "text", 3, {"examples": [1, {"prompt": ["x"]}], "policy": [], "win_rate": {"reward": 1}}]
)
def test_values_of_unexpected_types_are_no_defect(tmp_path, broken):
    write(tmp_path / "sft/checkpoint.json", {"stage": "sft", "metrics": broken, "base": broken, "throughput": broken})
    write(tmp_path / "evaluate.json", broken if isinstance(broken, dict) else {"policy": broken, "examples": broken})
    assert report(tmp_path).status == "done"


# --- what to do next ----------------------------------------------------------------------------------------------


def test_the_next_command_follows_from_what_is_there(tmp_path):
    folder = tmp_path / "my run"
    sft, reward, ppo = (str(folder / stage) for stage in ("sft", "reward", "ppo"))

    def next_words():
        return [shlex.split(line) for line in report(folder).next]

    write(folder / "sft/checkpoint.json", manifest("sft"))
    assert next_words() == [["rlhf", "reward", "--model", sft, "--dataset", "COMPARISONS", "--output", reward]]
    write(folder / "reward/checkpoint.json", manifest("reward"))
    wanted = ["rlhf", "ppo", "--model", sft, "--reward", reward, "--dataset", "PROMPTS", "--output", ppo]
    assert next_words() == [wanted]
    write(folder / "ppo/checkpoint.json", manifest("ppo"))
    wanted = ["rlhf", "evaluate", "--model", ppo, "--against", sft, "--reward", reward]
    again = next_words()
    config = {"dataset": "my prompts.jsonl", "reward": ["rm=0.5", "f.py:g"]}
    write(folder / "ppo/checkpoint.json", manifest("ppo") | {"config": config})
    assert next_words() == [[*wanted[:-1], "rm=0.5", "--reward", "f.py:g", *again[0][len(wanted) :]]]
    write(folder / "ppo/checkpoint.json", manifest("ppo") | {"config": config | {"reward": [3]}})
    wanted += ["--dataset", "my prompts.jsonl", "--output", str(folder / "evaluate.json")]
    assert next_words() == [wanted] == again
    write(folder / "evaluate.json", {"policy": SIDE})
    assert next_words() == []


# --- DPO, and several policies by KL --------------------------------------------------------------------------------


def test_dpo_stands_beside_ppo(tmp_path):
    path = whole_run(tmp_path)
    learned = {"eval_score_before": 0.5, "eval_score": 1.75, "eval_kl": 3.456}
    write(tmp_path / "ppo/checkpoint.json", manifest("ppo", **learned))
    write(tmp_path / "dpo/checkpoint.json", manifest("dpo", accuracy=0.7, accuracy_low=0.6, accuracy_high=0.79))
    result = report(path)
    assert list(rows(result, "the stages")) == ["sft", "reward", "ppo", "dpo"]
    held = rows(result, "on held-out rows")
    assert held["ppo: score"] == ("0.500 -> 1.750", "at KL 3.46")
    assert held["dpo: prefers the chosen response"] == ("70.0 % (60.0 to 79.0)", "by its implicit reward")
    (line,) = result.next
    assert f"--model {tmp_path / 'ppo'} --also {tmp_path / 'dpo'} --against {tmp_path / 'sft'}" in line
    assert name_sides({"model": "runs/x/dpo", "compared_with": "runs/x/sft"}) == ("sft", "dpo")


def test_dpo_without_ppo_is_evaluated_next(tmp_path):
    for stage in ("sft", "reward", "dpo"):
        write(tmp_path / stage / "checkpoint.json", manifest(stage))
    (line,) = report(tmp_path).next
    assert shlex.split(line)[:4] == ["rlhf", "evaluate", "--model", str(tmp_path / "dpo")] and "--also" not in line


FRONTIER = [
    {"model": "x/ppo", "label": "ppo", "kl": 4.0, "kl_error": 0.5, "score": 2.0, "gold": 0.25, "length": 30.0},
    {"model": "x/sft", "label": "sft", "kl": 0.0, "score": 1.0, "gold": 0.5, "length": 20.0, "eos_rate": 0.975},
]
BEST = [{"n": 4, "kl": 0.63629, "score": 1.5, "score_error": 0.125, "gold": 0.75, "length": 21.0}]


def test_policies_and_the_best_of_n_stand_in_one_table_by_kl(tmp_path):
    result = report(whole_run(tmp_path, model="x/ppo", frontier=FRONTIER, best_of=BEST, over_optimisation="so it is"))
    found = table(result, "by KL to the reference")
    assert found.columns == ("model", "KL", "score", "gold", "length", "EOS")
    assert found.rows == (
        ("sft", "0.00", "1.000", "0.500", "20.0", "97.5 %"),
        ("best of 4", "0.64", "1.500 ± 0.125", "0.750", "21.0", ABSENT),
        ("ppo", "4.00 ± 0.50", "2.000", "0.250", "30.0", ABSENT),
    )
    assert table(result, "best of n by score (KL: upper bound)").rows == (
        ("4", "0.64", "1.500 ± 0.125", "0.750", "21.0"),
    )
    assert any(t.rows == (("so it is",),) for t in result.tables)


@pytest.mark.parametrize("broken", [3, [3], [{"model": "x"}], [{"kl": 1.0}], {"kl": 1.0}, [{"model": "x", "kl": "1"}]])
def test_rows_that_make_no_sense_are_left_out(tmp_path, broken):
    result = report(whole_run(tmp_path, frontier=broken, best_of=broken, over_optimisation=broken))
    assert not any("KL" in t.title or "best of" in t.title for t in result.tables)


@pytest.mark.parametrize(("verdict", "count"), [("go", 1), ("no-go", 0)])
def test_ppo_is_not_suggested_where_it_would_be_refused(tmp_path, verdict, count):
    write(tmp_path / "sft/checkpoint.json", manifest("sft"))
    write(tmp_path / "reward/checkpoint.json", manifest("reward", verdict=verdict))
    assert len(report(tmp_path).next) == count
