"""`rlhf dpo`: starts at ln 2, learns what comparisons prefer, and fits between the other stages."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.commands import done, lines_of, manifest, refused, result

SMALL = ("--max-steps", 3, "--batch-size", 8, "--lora-rank", 4, "--eval-fraction", "0.2", "--samples", 0)


def dpo(chain, output, *more):
    line = ("--model", chain.sft, "--dataset", chain.comparisons, "--output", output)
    return result("dpo", *line, *SMALL, *more)


def test_the_first_step_is_at_ln_2_and_margin_0(chain, tmp_path):
    """Check 46, through the command: policy and reference are the same adapter before the first step."""
    dpo(chain(), tmp_path / "x")
    lines = lines_of(tmp_path / "x" / "metrics.jsonl")
    assert lines[0]["eval_log_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[1]["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(lines[1]["margin"]) <= 1e-6
    assert [line["step"] for line in lines] == [0, 1, 2, 3]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "kto"])
def test_it_learns_what_is_preferred(chain, tmp_path, loss):
    found = dpo(chain(), tmp_path / loss, "--loss", loss, "--learning-rate", "3e-3", "--max-steps", 40)
    assert found["report"]["accuracy"] > 0.8 and found["report"]["margin_mean"] > 0
    about = manifest(tmp_path / loss)
    assert about["stage"] == "dpo" and about["parents"][0]["stage"] == "sft" and "report.json" in about["files"]
    assert json.loads((tmp_path / loss / "report.json").read_text())["pairs"] == found["report"]["pairs"]


def test_micro_batches_do_not_change_the_result(chain, tmp_path):
    from tests.commands import weights

    for size in (1, "auto"):
        dpo(chain(), tmp_path / str(size), "--micro-batch-size", size, "--learning-rate", "1e-3", "--loss", "kto")
    one, many = (weights(tmp_path / name) for name in ("1", "auto"))
    assert all(torch.allclose(one[name], many[name], atol=1e-5) for name in one)


def test_its_policy_goes_on_to_the_other_stages(chain, tmp_path):
    dpo(chain(), tmp_path / "x")
    line = ("--reward", chain().reward, "--dataset", chain().prompts)
    short = ("--max-response-tokens", 4, "--limit-rows", 8)
    found = result("evaluate", "--model", tmp_path / "x", "--against", chain().sft, *line, *short)
    assert 0 <= found["win_rate"]["reward"]["rate"] <= 1 and "kl" in found["policy"]
    done("export", "--model", tmp_path / "x", "--output", tmp_path / "merged")


def test_smoothing_belongs_to_one_loss(chain, tmp_path):
    line = ("--model", chain().sft, "--dataset", chain().comparisons, "--output", tmp_path / "x")
    said = refused("dpo", *line, "--loss", "ipo", "--label-smoothing", "0.1")
    assert "label_smoothing belongs to the sigmoid loss" in said and not (tmp_path / "x").exists()
