"""Built-in reward functions by name: their arguments, the columns that they need, and what is refused."""

from __future__ import annotations

import importlib.util
import json

import pytest

from stages.builtin.catalogue import SYNTAX, open_builtin, short_name
from stages.errors import DatasetError, RewardError
from stages.places import is_function, split_paths
from stages.rollout.reward_specs import open_rewards, parse_reward, source_names
from tests.commands import refused, rlhf
from tests.tiny import write_jsonl


def scores(name: str, rows: list[dict], responses: list[str], tokens: list[int] | None = None) -> list[float]:
    return open_builtin(name, "--reward")(rows, responses, tokens or [0] * len(rows))


def test_each_function_scores_a_response_by_its_row():
    assert scores("builtin:exact", [{"answer": 72}, {"reference": ["a", "B"]}], ["72", " b "]) == [1, 1]
    assert scores("builtin:maths", [{"answer": "1,000"}, {"completion": "so\n#### 5"}], ["$1000", "6"]) == [1, 0]
    assert scores("builtin:regex", [{"pattern": "^a"}, {"pattern": "^b"}], ["ab", "ab"]) == [1, 0]
    assert scores("builtin:regex:^a{1,2}$", [{}, {}], ["aa", "aaa"]) == [1, 0]
    assert scores("builtin:format", [{}], ["<think>a</think>b"]) == [1]
    assert scores("builtin:format:A...", [{}, {}], ["A b", "B"]) == [1, 0]
    assert scores("builtin:length:10", [{}, {}], ["", ""], [5, 10]) == [0.5, 1]
    assert scores("builtin:length:4:words", [{}], ["one two three"], [99]) == [0.75]
    assert scores("builtin:length", [{"target_length": "20"}], [""], [10]) == [0.5]


@pytest.mark.parametrize(
    "name",
    ["builtin:math", "builtin:", "builtin:regex:(", "builtin:length:0", "builtin:length:ten", "builtin:length:5:lines",
     "builtin:format:...", "builtin:exact:5", "builtin:rouge:rouge7"],
)  # fmt: skip
def test_a_wrong_name_or_argument_is_refused_with_the_right_form(name):
    with pytest.raises(RewardError) as caught:
        open_builtin(name, "--gold")
    assert caught.value.where == "--gold" and "builtin:" in caught.value.fix


@pytest.mark.parametrize(("name", "package"), [("builtin:rouge", "rouge-score"), ("builtin:bleu", "sacrebleu")])
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, name, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module != "sys" else object())
    with pytest.raises(RewardError, match=f"needs {package}") as caught:
        open_builtin(name, "--reward")
    assert caught.value.fix == "run pip install 'rlhf[text]'"


@pytest.mark.parametrize(
    ("name", "row", "field"),
    [
        ("builtin:exact", {"other": 1}, "answer"),
        ("builtin:maths", {"answer": None}, "answer"),
        ("builtin:maths", {"answer": None, "reference": "  "}, "reference"),
        ("builtin:exact", {"answer": [1, True]}, "answer"),
        ("builtin:exact", {"answer": {}}, "answer"),
        ("builtin:regex", {"pattern": "("}, "pattern"),
        ("builtin:regex", {"pattern": 5}, "pattern"),
        ("builtin:length", {"target_length": "many"}, "target_length"),
    ],
)
def test_a_row_without_what_a_function_needs_is_named_with_its_field(name, row, field):
    with pytest.raises(DatasetError) as caught:
        open_builtin(name, "--reward").check(row, "p.jsonl:7", "--reward")
    assert caught.value.where == f"p.jsonl:7: {field}" and "--map" in caught.value.fix


def test_names_in_flags_with_weights_and_commas():
    assert split_paths("builtin:maths=2, builtin:regex:a{1,2}=0.5") == ["builtin:maths=2", "builtin:regex:a{1,2}=0.5"]
    assert parse_reward("builtin:regex:a{1,2}=0.5") == ("builtin:regex:a{1,2}", 0.5)
    assert parse_reward("builtin:regex:x=5=1") == ("builtin:regex:x=5", 1.0)
    assert not is_function("builtin:regex:.py:")
    specs = open_rewards(["builtin:regex:a", "builtin:regex:b=2", "builtin:maths"], None)
    assert source_names(specs) == ["regex", "regex_2", "maths"]
    assert len({spec.digest for spec in specs}) == 3
    assert list(map(short_name, ("runs/x/reward/", "a/b.py", "b.py:score", "…"))) == [
        "reward",
        "b",
        "score",
        "source",
    ]
    assert set(SYNTAX) == {"exact", "regex", "maths", "format", "length", "rouge", "bleu", "chrf"}


def test_rows_are_checked_before_a_model_loads_or_left_out(model_folder, tmp_path):
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "red", "answer": "1"}, {"prompt": "blue"}])
    line = ("ppo", "--model", model_folder(), "--dataset", data, "--output", tmp_path / "x", "--dry-run")
    line += ("--max-response-tokens", 8)
    told = refused(*line, "--reward", "builtin:maths")
    assert "p.jsonl:2: answer: `answer` is missing; --reward builtin:maths needs the column" in told
    assert "p.jsonl:1: pattern" in refused(*line, "--reward", "builtin:regex")
    ended = rlhf(*line, "--reward", "builtin:maths", "--skip-bad-rows", "--eval-fraction", 0, "--json")
    assert ended.code == 0 and ended.json["plan"]["skipped_rows"] == 1, ended.stderr


def test_a_judge_is_never_a_training_reward(model_folder, tmp_path):
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "red"}])
    line = ("ppo", "--model", model_folder(), "--dataset", data, "--output", tmp_path / "x")
    assert "never a training reward" in refused(*line, "--reward", "http://localhost:1/v1")
    assert "never a training reward" in refused(*line, "--reward", "builtin:format", "--judge", "http://localhost:1/v1")
    (tmp_path / "r.yaml").write_text(json.dumps({"judge": "http://localhost:1/v1"}))
    assert "never a training reward" in refused(*line, "--config", tmp_path / "r.yaml")
