"""`rlhf dpo`: starts at ln 2, learns what comparisons prefer, and fits between the other stages."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

from stages.config import DpoConfig
from stages.data.comparisons import Pair
from stages.dpo import ReferenceLogprobs, preference_losses
from stages.models.tokens import TokenRow
from stages.training.batching import batch_at
from stages.training.comparing import TokenComparison
from tests.commands import (
    assert_same_weights,
    done,
    lines_of,
    manifest,
    refused,
    result,
    rlhf,
    soft_comparisons,
    without_times,
)
from tests.marks import full
from tests.tiny import write_jsonl

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


@pytest.mark.parametrize("loss", ["sigmoid", *full("ipo", "kto")])
def test_it_learns_what_is_preferred(chain, tmp_path, loss):
    found = dpo(chain(), tmp_path / loss, "--loss", loss, "--learning-rate", "3e-3", "--max-steps", 40)
    assert found["report"]["accuracy"] > 0.8 and found["report"]["margin_mean"] > 0
    about = manifest(tmp_path / loss)
    assert about["stage"] == "dpo" and about["parents"][0]["stage"] == "sft" and "report.json" in about["files"]
    assert json.loads((tmp_path / loss / "report.json").read_text())["pairs"] == found["report"]["pairs"]


@pytest.mark.full
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "kto"])
def test_soft_labels_below_a_half_prefer_the_rejected_response(chain, tmp_path, loss):
    data = write_jsonl(tmp_path / "rows.jsonl", soft_comparisons())
    line = ("--model", chain().sft, "--dataset", data, "--output", tmp_path / "x", *SMALL, "--loss", loss)
    found = result("dpo", *line, "--learning-rate", "3e-3", "--max-steps", 40)["report"]
    assert found["accuracy"] > 0.8 and found["margin_mean"] > 0


def test_kto_on_soft_labels_is_the_expectation_over_hard_ones():
    """A label of 0.3 on (a, b): 0.3 times the loss of a over b, 0.7 times that of b over a."""
    config = DpoConfig(model="m", dataset="d", output="o", loss="kto", beta=0.5, undesirable_weight=2.0)
    ratios, z0 = torch.tensor([0.7, -0.4]), torch.tensor(0.1)
    rows = [TokenRow(torch.arange(3), torch.arange(3) > 0, False)] * 2

    def loss(pair: Pair) -> float:
        return preference_losses(ratios, [TokenComparison(rows, (pair,))], config, z0).item()

    hard, turned = loss(Pair(0, 1)), loss(Pair(1, 0))
    assert abs(hard - turned) > 0.1
    assert loss(Pair(0, 1, 0.3)) == pytest.approx(0.3 * hard + 0.7 * turned)
    assert loss(Pair(0, 1, 0.5)) == pytest.approx(loss(Pair(1, 0, 0.5)))


@pytest.mark.full
def test_micro_batches_do_not_change_the_result(chain, tmp_path):
    from tests.commands import weights

    for size in (1, "auto"):
        dpo(chain(), tmp_path / str(size), "--micro-batch-size", size, "--learning-rate", "1e-3", "--loss", "kto")
    one, many = (weights(tmp_path / name) for name in ("1", "auto"))
    assert all(torch.allclose(one[name], many[name], atol=1e-5) for name in one)


@pytest.mark.full
def test_its_policy_goes_on_to_the_other_stages(chain, tmp_path):
    dpo(chain(), tmp_path / "x")
    line = ("--reward", chain().reward, "--dataset", chain().prompts)
    short = ("--max-response-tokens", 4, "--limit-rows", 8)
    found = result("evaluate", "--model", tmp_path / "x", "--against", chain().sft, *line, *short)
    assert 0 <= found["win_rate"]["reward"]["rate"] <= 1 and "kl" in found["policy"]
    done("export", "--model", tmp_path / "x", "--output", tmp_path / "merged")


def test_a_finished_command_again_prints_the_same_tables(chain, tmp_path):
    line = ("--model", chain().sft, "--dataset", chain().comparisons, "--output", tmp_path / "x", *SMALL)
    first, again = done("dpo", *line).stdout, done("dpo", *line).stdout
    assert again == first.replace("\nwrote ", "\nalready done: ") and "dpo on held-out comparisons" in first


def test_smoothing_belongs_to_one_loss(chain, tmp_path):
    line = ("--model", chain().sft, "--dataset", chain().comparisons, "--output", tmp_path / "x")
    said = refused("dpo", *line, "--loss", "ipo", "--label-smoothing", "0.1")
    assert (
        "error: --label-smoothing has no effect because it belongs to the sigmoid loss" in said
        and not (tmp_path / "x").exists()
    )


# --- what the reference says, once per run -------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """How many times each role was asked for whole log-probabilities."""
    from stages.training import implicit

    counted, real = [], implicit.summed_logprobs

    def count(roles, role, *arguments, **more):
        counted.append(role)
        return real(roles, role, *arguments, **more)

    monkeypatch.setattr(implicit, "summed_logprobs", count)  # as the cache asks; the policy is asked by name in dpo.py
    return counted


RESUMED = ("--learning-rate", "5e-3", "--save-every", 1)


def interrupt(chain, output, monkeypatch, at: int = 2):
    """Run until the line of a step stands, then stop as a signal would; the run can go on."""
    import signal

    from stages.checkpoint.run import Run

    log = Run.log

    def log_and_signal(run, step, metrics):
        log(run, step, metrics)
        if step == at:
            signal.raise_signal(signal.SIGTERM)

    line = ("--model", chain.sft, "--dataset", chain.comparisons, "--output", output)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_signal)
        assert rlhf("dpo", *line, *SMALL, *RESUMED).code == 143


@pytest.mark.full
def test_a_resumed_run_asks_the_reference_nothing(chain, tmp_path, monkeypatch, passes):
    """A pass for each of three batches and one for held-out rows; none once it goes on; the same bits at the end."""
    dpo(chain(), tmp_path / "whole", *RESUMED)
    assert passes == ["reference"] * 4
    passes.clear()
    interrupt(chain(), tmp_path / "x", monkeypatch)
    assert passes == ["reference"] * 4
    passes.clear()
    dpo(chain(), tmp_path / "x", *RESUMED)
    assert passes == []
    assert_same_weights(tmp_path / "x", tmp_path / "whole")
    assert without_times(tmp_path / "x" / "metrics.jsonl") == without_times(tmp_path / "whole" / "metrics.jsonl")
    assert (tmp_path / "x" / "report.json").read_bytes() == (tmp_path / "whole" / "report.json").read_bytes()
    assert not (tmp_path / "x" / "state").exists()


def flipped(path):
    """The last bit of a file changed: its tensors, which have no checksum in the format."""
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


@pytest.mark.full
@pytest.mark.parametrize(
    ("harm", "warned"),
    [
        (flipped, True),
        *full((lambda path: path.write_bytes(b"torn"), True)),
        *full((lambda path: path.write_bytes(b""), True)),
        *full((lambda path: path.unlink(), False)),
    ],
)
def test_a_damaged_memory_of_the_reference_is_made_again(chain, tmp_path, monkeypatch, passes, harm, warned):
    dpo(chain(), tmp_path / "whole", *RESUMED)
    interrupt(chain(), tmp_path / "x", monkeypatch)
    harm(tmp_path / "x" / "state" / "reference-train.safetensors")
    passes.clear()
    line = ("--model", chain().sft, "--dataset", chain().comparisons, "--output", tmp_path / "x")
    ended = done("dpo", *line, *SMALL, *RESUMED)
    assert passes == ["reference"] * 3
    assert ("reference-train.safetensors is damaged and is made again" in ended.stderr) == warned
    assert_same_weights(tmp_path / "x", tmp_path / "whole")


@pytest.mark.full
def test_what_was_known_of_other_rows_is_never_used(chain, tmp_path, monkeypatch, passes):
    """A sound file of the held-out rows in the training rows' place: as many or not, it is not theirs."""
    interrupt(chain(), tmp_path / "x", monkeypatch)
    state = tmp_path / "x" / "state"
    (state / "reference-train.safetensors").write_bytes((state / "reference-held_out.safetensors").read_bytes())
    passes.clear()
    dpo(chain(), tmp_path / "x", *RESUMED)
    assert passes == ["reference"] * 3


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_the_reference_is_asked_about_the_rows_that_the_run_comes_by(total):
    config = DpoConfig(model="m", dataset="d", output="o", batch_size=4)
    session = SimpleNamespace(config=config, total=total)
    batches = ReferenceLogprobs(session, [None] * 10, []).batches
    seen = {i for step in range(total) for i in batch_at(step, 10, 4, config.seed, "dpo")}
    visited = [i for batch in batches for i in batch]
    assert sorted(visited) == sorted(seen) and len(visited) == {1: 4, 2: 8, 3: 10, 7: 10}[total]
    session.total = 7  # whatever the end, the same rows are asked about together
    assert batches == ReferenceLogprobs(session, [None] * 10, []).batches[:total]


# --- rows that are cut or dropped


@pytest.mark.parametrize("stage", ["dpo", *full("reward")])
def test_comparisons_that_are_too_long_are_cut_and_told(chain, tmp_path, stage):
    held = write_jsonl(tmp_path / "held.jsonl", lines_of(chain().comparisons)[:4])
    line = (stage, "--model", chain().sft, "--dataset", chain().comparisons, "--output", tmp_path / "x", "--dry-run")
    ended = done(*line, "--eval-dataset", held, "--limit-rows", 16, "--max-tokens", 6)
    said = " ".join(ended.stderr.split())
    assert re.search(r"\d+ of 16 comparisons (was|were) cut to 6 tokens", said), said
    assert re.search(r"\d of 4 held-out comparisons (was|were) cut to 6 tokens", said), said
    assert "were cut" not in done(*line, "--limit-rows", 16).stderr


@pytest.mark.parametrize("stage", ["sft", *full("reward", "dpo")])
def test_a_bad_held_out_row_ends_the_command_unless_bad_rows_are_skipped(chain, tmp_path, stage):
    """A conversation where the tokenizer has no chat template."""
    data = chain().demonstrations if stage == "sft" else chain().comparisons
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "two"}]
    other = [*turns[:1], turns[1] | {"content": "x"}]
    bad = {"prompt": turns[:1], "chosen": turns, "rejected": other, "completion": turns[1:]}
    good = lines_of(data)[0]
    held = write_jsonl(tmp_path / "held.jsonl", [good, bad, good])
    line = (stage, "--model", chain().sft, "--dataset", data, "--eval-dataset", held, "--output", tmp_path / "x")
    said = refused(*line, "--dry-run")
    assert f"{held}:2" in said and "no chat template" in said
    ended = done(*line, "--dry-run", "--skip-bad-rows")
    told = f"1 of 3 held-out {'demonstrations' if stage == 'sft' else 'comparisons'} cannot be used and was dropped"
    assert told in " ".join(ended.stderr.split())


def test_demonstrations_that_are_mixed_into_ppo_or_measured_are_cut_and_told(chain, tmp_path):
    long = [{"prompt": f"red {n}", "completion": " two" * 200} for n in range(3)]
    data = write_jsonl(tmp_path / "long.jsonl", long)
    line = (
        "--model",
        chain().sft,
        "--dataset",
        chain().prompts,
        "--reward",
        chain().reward,
        "--output",
        tmp_path / "x",
    )
    ended = done("ppo", *line, "--ptx-dataset", data, "--max-response-tokens", 4, "--eval-fraction", 0, "--dry-run")
    assert "3 of 3 ptx rows were cut to 128 tokens" in ended.stderr
    ended = done("evaluate", "--model", chain().sft, "--dataset", data, "--dry-run")
    assert "3 of 3 demonstrations were cut to 128 tokens" in ended.stderr
