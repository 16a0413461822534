"""`rlhf reward` ends with a verdict, and `rlhf ppo` minds it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from tests.commands import WORDS, Ended, done, lines_of, manifest, refused, result
from tests.tiny import write_jsonl

LEARN = ("--max-steps", 20, "--batch-size", 16, "--lora-rank", 8, "--learning-rate", "5e-3", "--eval-fraction", 0.3)
SHORT = ("--max-steps", 1, "--batch-size", 4, "--max-response-tokens", 3, "--eval-limit", 4)


def rows(seed: int, *, shuffled: bool = False) -> list[dict]:
    """Thanks among two or three words are preferred to none; no response stands twice."""
    draw, found = random.Random(seed), []
    for a in WORDS:
        for b in WORDS:
            words = [draw.choice(WORDS) for _ in range(6)]
            thanks = " ".join([*words[: draw.randint(1, 3)], "thank you", *words[3:4]])
            curt = " ".join([*words[: draw.randint(1, 3)], words[4], words[5], *words[3:4]])
            pair = [f" {thanks}", f" {curt}"]
            if shuffled and draw.random() < 0.5:
                pair.reverse()
            found.append({"prompt": f"{a} {b}", "chosen": pair[0], "rejected": pair[1]})
    return found


def said(chain, place: Path) -> Path:
    """What the policy says, as demonstrations: it is barely trained, and far from every comparison."""
    line = ("--model", chain().sft, "--dataset", chain().prompts, "--temperature", 1, "--max-response-tokens", 64)
    done("sample", *line, "--output", place / "said.jsonl")
    answers = [row for row in lines_of(place / "said.jsonl") if row["response"].strip()]
    rows = [{"prompt": row["prompt"], "completion": row["response"]} for row in answers]
    return write_jsonl(place / "said.jsonl", rows)


@pytest.fixture(scope="module")
def trained(chain, tmp_path_factory):
    """`trained("good")`: the folder of a reward model, and how its command ended."""
    made: dict[str, tuple[Path, Ended]] = {}

    def get(kind: str) -> tuple[Path, Ended]:
        if kind not in made:
            place = tmp_path_factory.mktemp(kind)
            data = write_jsonl(place / "rows.jsonl", rows(1, shuffled=kind == "shuffled"))
            more = ("--eval-limit", 19) if kind == "few" else ("--demonstrations", said(chain, place))
            line = ("--model", chain().sft, "--dataset", data, "--output", place / "reward", *LEARN, *more)
            made[kind] = place / "reward", done("reward", *line)
        return made[kind]

    return get


def ppo(chain, reward: Path, output: Path) -> tuple:
    line = ("--model", chain().sft, "--reward", reward, "--dataset", chain().prompts, "--output", output)
    return ("ppo", *line, *SHORT)


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.full
def test_a_good_one_may_go(chain, trained, tmp_path):
    folder, ended = trained("good")
    report = report_of(folder)
    assert report["verdict"]["decision"] == "go" == manifest(folder)["metrics"]["verdict"], report["verdict"]
    assert report["pairs"] > 40 and report["baselines"]["majority"]["accuracy"] == pytest.approx(0.5, abs=0.05)
    assert report["samples"]["prompts"] == 32 and report["samples"]["count"] == 64
    tables = ended.stdout.split("\n\n")
    assert any(part.startswith("verdict: go\n") for part in tables) and "next: rlhf ppo" in ended.stdout
    went = done(*ppo(chain, folder, tmp_path / "x"))
    assert f"verdict on {folder}: go; accuracy" in went.stderr and "warning: verdict" not in went.stderr


def test_one_that_learned_nothing_is_refused_without_force(chain, trained, tmp_path):
    folder, ended = trained("shuffled")
    report = report_of(folder)
    assert report["verdict"]["decision"] == "no-go" and report["accuracy_low"] <= 0.5 and report["pairs"] >= 20
    assert "verdict: no-go\n" in ended.stdout and "next:" not in ended.stdout
    again = done("reward", "--config", folder / "config.yaml")
    assert again.stdout == ended.stdout.replace("\nwrote ", "\nalready done: ")
    line = ppo(chain, folder, tmp_path / "x")
    for more in ((), ("--dry-run",)):
        said = refused(*line, *more)
        assert f"error: --reward: the verdict on {folder} is no-go: accuracy 0." in said
        assert "train it on more or better comparisons, or pass --force" in said and not (tmp_path / "x").exists()
    forced = done(*line, "--force")
    assert f"warning: verdict on {folder}: no-go; accuracy 0." in forced.stderr
    assert result(*line)["status"] == "already done"  # force is no part of what was made


@pytest.mark.full
def test_few_held_out_pairs_say_nothing_and_ppo_goes_on(chain, trained, tmp_path):
    folder, ended = trained("few")
    assert "19 held-out pairs are too few, 20 are needed: raise --eval-fraction" in " ".join(ended.stdout.split())
    went = done(*ppo(chain, folder, tmp_path / "x"), "--dry-run")
    assert f"verdict on {folder}: unknown; 19 held-out pairs" in went.stderr and "warning" not in went.stderr


@pytest.mark.full
def test_data_where_the_answer_alone_tells_is_a_caution(chain, tmp_path):
    """Every response was seen in training, and won or lost there: the prompt says nothing."""
    pairs = [{"prompt": f"{a} {b}", "chosen": " thank you", "rejected": " two"} for a in WORDS for b in WORDS]
    data = write_jsonl(tmp_path / "rows.jsonl", pairs)
    line = ("--model", chain().sft, "--dataset", data, "--output", tmp_path / "reward", *LEARN)
    report = result("reward", *line, "--sft-samples", 0)["report"]
    assert report["verdict"]["decision"] == "caution" and "samples" not in report
    assert report["baselines"]["majority"] == {"accuracy": 1.0, "lead": 0.0, "lead_low": 0.0, "lead_high": 0.0}
    assert "is not clearly above that of the rule '" in report["verdict"]["reasons"][0]
    went = done(*ppo(chain, tmp_path / "reward", tmp_path / "x"), "--dry-run")
    assert f"warning: verdict on {tmp_path / 'reward'}: caution; accuracy 1.000" in went.stderr


@pytest.mark.full
def test_annotators_agreement_is_told(chain, tmp_path):
    """Two of three annotators always agree: one of the three pairs does, in each of 30 prompts."""
    ratings = [
        {"prompt": f"{a} {b}", "response": f" {a} {word}", "rating": number, "annotator": who}
        for a in WORDS[:5]
        for b in WORDS[:6]
        for who, numbers in (("x", (1, 2)), ("y", (2, 4)), ("z", (2, 1)))
        for word, number in zip(("two", "thank you"), numbers, strict=True)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", ratings)
    flags = ("--max-steps", 1, "--batch-size", 4, "--eval-fraction", 0.2)
    report = result("reward", "--model", chain().sft, "--dataset", data, "--output", tmp_path / "x", *flags)["report"]
    assert (report["annotator_agreement"], report["annotator_pairs"]) == (pytest.approx(1 / 3), 90)
    assert any(note.startswith("two annotators agree on 0.333 of 90 pairs") for note in report["verdict"]["notes"])


def test_a_reward_model_without_a_verdict_is_noted(chain, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(chain().reward, folder)
    report = report_of(folder)
    del report["verdict"]
    (folder / "report.json").write_text(json.dumps(report))
    about = json.loads((folder / "checkpoint.json").read_text())
    del about["files"]["report.json"]
    (folder / "checkpoint.json").write_text(json.dumps(about))
    went = done(*ppo(chain, folder, tmp_path / "x"), "--dry-run")
    assert f"verdict on {folder}: none; its report.json has no verdict" in went.stderr and "warning" not in went.stderr


@pytest.mark.full
def test_going_on_from_a_reward_model_samples_nothing(chain, trained, tmp_path):
    """Its adapter is no policy."""
    folder, _ = trained("few")
    data = write_jsonl(tmp_path / "rows.jsonl", rows(2))
    line = ("--model", folder, "--dataset", data, "--output", tmp_path / "x", *LEARN, "--max-steps", 1)
    assert "samples" not in result("reward", *line)["report"]
