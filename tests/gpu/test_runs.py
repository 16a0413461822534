"""Whole commands on the device: the chain in bfloat16, and a run that was interrupted."""

from __future__ import annotations

import importlib.util
import math

import pytest

from tests.commands import SHORT, SMALL, done, lines_of, manifest, result, weights, without_times, write_data

RUN = ("--batch-size", 8, "--lora-rank", 4, "--samples", 0, "--limit-rows", 64, "--eval-fraction", 0.2)
RUN += ("--lr-schedule", "constant", "--warmup-ratio", 0, "--learning-rate", "1e-3")


@pytest.fixture
def data(tmp_path):
    write_data(tmp_path)
    return tmp_path


@pytest.mark.full
@pytest.mark.parametrize("more", [(), ("--gradient-checkpointing", "true"), ("--load-in-4bit",)], ids=str)
def test_every_stage_runs_in_half_precision(data, device, model_folder, more):
    if "--load-in-4bit" in more and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    sft, reward, ppo = (data / name for name in ("sft", "reward", "ppo"))
    of = {name: ("--dataset", data / f"{name}.jsonl") for name in ("demonstrations", "comparisons", "prompts")}
    here = ("--device", str(device), "--dtype", "bfloat16")
    training = (*SMALL, *here, *more, "--limit-rows", 80)
    done("sft", "--model", model_folder("llama-wide"), *of["demonstrations"], "--output", sft, *training)
    done("reward", "--model", sft, *of["comparisons"], "--output", reward, *training, "--eval-limit", 16)
    done("ppo", "--model", sft, "--reward", reward, *of["prompts"], "--output", ppo, *training, *SHORT)
    found = manifest(ppo)
    assert found["dtype"] == "bfloat16" and (found["device"] == "cpu") == (device.type == "cpu")
    steps = lines_of(ppo / "metrics.jsonl")[1:]
    assert len(steps) == 3 and all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)
    assert all(line["ratio_first_error"] < 0.2 for line in steps)  # the policy that learns is the one that sampled
    at = (*here, *(m for m in more if m == "--load-in-4bit"), "--limit-rows", 8)
    assert "policy" in result("evaluate", "--model", ppo, "--reward", reward, *of["prompts"], *at)


def sft(data, base, device, output, steps, *more):
    line = ("sft", "--model", base, "--dataset", data / "demonstrations.jsonl", "--output", output, *RUN)
    done(*line, "--device", str(device), "--max-steps", steps, *more)


def distance(one, other):
    """How far two checkpoints' weights are apart, all together."""
    mine, theirs = weights(one), weights(other)
    return math.sqrt(sum(float((mine[name] - theirs[name]).square().sum()) for name in mine))


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_was_interrupted_ends_where_a_straight_one_does(data, device, model_folder, dtype):
    """To the bit where two straight runs agree to the bit, as on a CPU; else within 5 % of the way they went."""
    base, how = model_folder("llama-wide"), ("--dtype", dtype)
    sft(data, base, device, data / "straight", 6, *how)
    sft(data, base, device, data / "again", 6, *how)
    sft(data, base, device, data / "start", 1, *how)
    sft(data, base, device, data / "resumed", 3, *how, "--keep-state")
    sft(data, base, device, data / "resumed", 6, *how, "--keep-state")
    names = ("straight", "again", "resumed")
    lines = {name: without_times(data / name / "metrics.jsonl") for name in names}
    assert [line["step"] for line in lines["resumed"]] == list(range(7))
    deterministic = distance(data / "straight", data / "again") == 0
    assert deterministic or device.type == "cuda"
    way = distance(data / "straight", data / "start")
    assert distance(data / "straight", data / "resumed") <= (0 if deterministic else 0.05 * way)
    losses = [[line["loss"] for line in lines[name][1:]] for name in ("straight", "resumed")]
    assert losses[1] == pytest.approx(losses[0], rel=0 if deterministic else 0.01)
