"""The learning benchmark's own arithmetic: the gold reward, the noisy judge, and what is read off the paths."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def learning(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import learning

    return learning


@pytest.fixture
def outcomes(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import outcomes

    return outcomes


def test_gold_counts_words_once_per_sentence_and_holds_a_sentence_at_two(outcomes):
    assert outcomes.cheerfulness("She was happy. He was sad.") == 0
    assert outcomes.cheerfulness("Happy happy happy!") == 1
    assert outcomes.cheerfulness("A happy, kind, brave friend. The end.") == 1  # (2 + 0) / 2
    assert outcomes.cheerfulness("Sad and lost and cold! He cried") == -1.5  # (-2 - 1) / 2
    assert outcomes.cheerfulness(" ... ") == 0


def test_the_judge_prefers_the_better_response_as_often_as_bradley_and_terry_say(learning, tmp_path):
    drawn, pairs = tmp_path / "drawn.jsonl", tmp_path / "pairs.jsonl"
    rows = [{"prompt": str(i), "response": text} for i in range(2000) for text in ("Happy. No.", "No.", "x", "")]
    learning.write_rows(drawn, rows)
    ceiling = learning.judge_pairs(drawn, 0, pairs)
    judged = learning.read_rows(pairs)
    better = sum(row["chosen"] == "Happy. No." for row in judged) / len(judged)
    chance = 1 / (1 + math.exp(-4 * 0.5))
    assert len(judged) == 2000  # an empty response is compared with nothing
    assert abs(better - chance) < 4 * math.sqrt(chance * (1 - chance) / 2000)
    assert ceiling == pytest.approx((chance + 0.5) / 2)


def path(outcomes, method, seed, *triples):
    rest = {"proxy": 0.0, "length": 1.0, "distinct_1": 1.0, "distinct_2": 1.0, "duplicates": 0.0}
    return [
        outcomes.Point(method, seed, i, seconds, kl, gold=gold, **rest) for i, (seconds, kl, gold) in enumerate(triples)
    ]


def test_gold_is_read_where_a_path_first_reaches_a_kl(outcomes):
    points = path(outcomes, "ppo", 0, (0, 0, 0.0), (10, 2, 1.0), (20, 6, 2.0), (30, 3, 5.0), (40, 7, 9.0))
    assert outcomes.interpolate(points, "kl", 4, "gold") == 1.5
    assert outcomes.interpolate(points, "seconds", 25, "gold") == 3.5
    assert outcomes.interpolate(points, "kl", 8, "gold") is None


def test_methods_are_compared_over_the_seeds_that_got_there(outcomes):
    points = path(outcomes, "ppo", 0, (0, 0, 0.0), (10, 4, 1.0)) + path(outcomes, "ppo", 1, (0, 0, 0.0), (10, 4, 3.0))
    points += path(outcomes, "ppo", 2, (0, 0, 0.0), (10, 1, 9.0))
    (row,) = outcomes.at_equal(points, "kl", (2.0, 9.0))
    # golds 0.5 and 1.5: mean 1, sample deviation sqrt(0.5), standard error 0.5, times Student's 12.706
    assert row["2"] == {"gold": 1.0, "width": pytest.approx(12.706 * 0.5), "seeds": 2}
    assert row["9"]["seeds"] == 0


def test_what_is_kept_is_the_proxys_favourite_within_the_limit(outcomes):
    points = [
        outcomes.Point("dpo", 0, 1, 1.0, kl, proxy, gold, 1.0, 1.0, 1.0, 0.0)
        for kl, proxy, gold in ((12.0, 9.0, 3.0), (2.0, 1.0, 2.0), (8.0, 5.0, 1.0))
    ]
    assert [point.gold for point in outcomes.best_within(points, 10)["dpo"]] == [1.0]


@pytest.mark.full
def test_tables_and_pictures_hold_every_method(outcomes):
    points = path(outcomes, "ppo", 0, (0, 0, 0.0), (10, 4, 1.25)) + path(outcomes, "ppo", 1, (0, 0, 0.0), (10, 4, 1.75))
    best_of = {s: [{"n": n, "kl": 0.5, "score": 2.0, "gold": 0.75, "length": 9.0} for n in (1, 2)] for s in (0, 1)}
    names = ("accuracy", "accuracy_low", "accuracy_high", "longer_wins_accuracy", "pairs", "ceiling", "seconds")
    found = outcomes.summarise(points, best_of, dict.fromkeys((0, 1), dict.fromkeys(names, 0.5)), [0, 1])
    text = outcomes.tables(json.loads(json.dumps(found)))
    assert "| best of 2 | 0.750 ± 0.000 |" in text
    # At 4 nats, 1.25 and 1.75: standard error 0.25, times 12.706, of two seeds.
    (row,) = [line for line in text.partition("4 nats")[2].splitlines() if line.startswith("| ppo |")][:1]
    assert row.split(" | ")[2] == "1.500 ± 3.176 (2)"
    (axes,) = outcomes.draw(points, best_of, "gold", "x").axes
    names = [f"{kind}, seed {seed}" for kind in ("ppo", "best of n") for seed in (0, 1)]
    assert [one.get_label() for one in axes.containers] == names
    assert axes.containers[1][0].get_xydata().tolist() == [[0, 0], [4, 1.75]]


# --- the alarms benchmark


@pytest.fixture
def signals(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import signals

    return signals


def outcome(signals, name, good, kls, length=32.0):
    lines = [{"reward_kl": float(kl), "response_length": length} for kl in kls]
    return signals.Outcome(name, good, lines, {}, False, {})


def test_a_signal_begins_once_it_was_above_a_threshold_often_enough(signals):
    values = [0, 3, 3, 1, 3, 3, 3, 0]
    assert signals.begins(values, 2, 1) == 2 and signals.begins(values, 2, 3) == 7
    assert signals.begins(values, 3, 1) is None and signals.begins([math.nan, 3], 2, 1) == 2


def test_a_threshold_is_judged_by_what_it_finds_and_what_it_alarms_for_nothing(signals):
    runs = [outcome(signals, "a", True, [0, 12]), outcome(signals, "b", True, [0, 5])]
    runs += [outcome(signals, "x", False, [0, 11, 60, 70]), outcome(signals, "y", False, [0, 1, 2, 30])]
    rows = {(row[0], row[1]): row[2:] for row in signals.sweep(runs)}
    assert rows["KL, nats", "10"] == ("1 of 2: a", "2 of 2", "100%", "")  # at 2 of 4 updates, and at 4 of 4
    assert rows["KL, nats", "50"] == ("0 of 2", "1 of 2", "75%", "y")
    assert rows["KL per token, nats", "0.5"] == ("0 of 2", "2 of 2", "100%", "")  # 16 nats
    assert rows["KL / kl_limit of 1 nat per token, 30 at least", "1"] == ("0 of 2", "1 of 2", "75%", "y")  # 32 nats


def test_the_runs_of_the_alarms_benchmark_are_named_apart(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import alarms

    assert len({run.name.replace(",", "") for run in alarms.RUNS}) == len(alarms.RUNS)
    assert min(sum(run.good for run in alarms.RUNS), sum(not run.good for run in alarms.RUNS)) >= 5


# --- the GPU benchmark


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


def shapes_on_paper(name):
    """A model's shapes, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.shapes import SHAPES
    from stages.training.memory import shapes_of

    config = AutoConfig.for_model(**SHAPES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return shapes_of(config.to_dict(), {name: tuple(p.shape) for name, p in model.named_parameters()})


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3.1-8b", 8.030), ("qwen2.5-7b", 7.616), ("qwen2.5-1.5b", 1.544), ("qwen2.5-0.5b", 0.494)],
)
def test_shapes_are_those_of_the_published_models(name, billions):
    from benchmarks.shapes import SHAPES, bare_bytes

    shapes = shapes_on_paper(name)
    assert shapes.weights / 1e9 == pytest.approx(billions, abs=0.0005)
    assert bare_bytes(SHAPES[name], 2) == pytest.approx(2 * shapes.weights, rel=1e-3)


def test_the_least_time_of_an_iteration_by_hand():
    """8B, 512 x (512 + 512), 256 at once, at 798 TFLOP/s and 3.0 TB/s, in bf16.

    6.98e9 weights in layers, 0.525e9 in the output layer. Prefill: 262,144 tokens x (2 x 6.98e9 + 4 x 32 x 4096 x 256)
    is 3.69e15 operations. A decoding step reads 15.0 GB of weights and 256 x 768 x 128 KiB = 25.8 GB of keys and
    values; there are 2 x 512 of them. A pass over 524,288 tokens: 7.32e15 in layers and 0.14e15 in attention.
    """
    from benchmarks.roofline import Ceilings, Iteration, iteration_seconds

    least = iteration_seconds(shapes_on_paper("llama-3.1-8b"), Iteration(512, 512, 512, 256), Ceilings(798e12, 3e12), 2)
    expected = {"prefill": 4.63, "decode": 13.9, "reference": 9.69, "reward": 9.35, "value": 9.35}
    expected |= {"train policy": 19.6, "train critic": 18.9}
    assert {name: pytest.approx(seconds, rel=0.005) for name, seconds in expected.items()} == least
    twice = iteration_seconds(
        shapes_on_paper("llama-3.1-8b"), Iteration(512, 512, 512, 256, 2), Ceilings(798e12, 3e12), 2
    )
    assert twice["train policy"] == 2 * least["train policy"] and twice["value"] == least["value"]


@pytest.mark.full
def test_the_gpu_benchmark_runs_where_there_is_only_a_cpu(gpu, monkeypatch, tmp_path, capsys):
    words = ["--device", "cpu", "--shapes", "tiny,qwen2.5-0.5b", "--prompts", "4", "--tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--output", str(tmp_path)])
    monkeypatch.setattr(gpu, "fits", lambda name, device: name == "tiny")
    gpu.main()
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    (row,) = found["shapes"].values()
    assert found["left_out"] == ["qwen2.5-0.5b: everything, for want of memory"]
    assert row["decode 2"]["tokens_per_s"] > 0 and row["training"]["tokens_per_s"] > 0
    assert set(row["iteration"]["seconds"]) == {"rollout", "policy", "reference", "value", "reward", "update"}
    assert row["iteration"]["times_roofline"] > 1 and row["iteration"]["planned_peak"] > 0
    text = (tmp_path / "gpu-cpu.md").read_text()
    assert "| tiny: 4 x (4 + 4) | s | least, s | ratio |" in text and text.strip() == capsys.readouterr().out.strip()


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "free"), [("float32", None), ("bfloat16", 12e6)])
def test_the_plan_of_a_whole_iteration_is_what_it_takes(gpu, monkeypatch, dtype, free):
    """Also where memory is short: then passes are smaller and activations are computed again."""
    import measures
    import torch

    from benchmarks.roofline import Ceilings, Iteration
    from benchmarks.shapes import SHAPES, build
    from tests.memory import LiveBytes

    monkeypatch.setattr(measures, "free_memory", lambda device: free)
    sizes = SHAPES["tiny"] | {"num_hidden_layers": 4}
    model = measures.open_model(*build(sizes, torch.device("cpu"), getattr(torch, dtype)), 32)
    live = LiveBytes()
    with live:
        found = measures.iterate(model, Iteration(16, 32, 32, 16), Ceilings(1e11, 1e10))
    held = ("frozen base", "adapters (weights)", "gradients and Adam moments")
    assert found["recomputed"] is (free is not None)
    planned = found["planned_peak"] - sum(found["planned_parts"][name] for name in held)
    assert planned == pytest.approx(live.peak, rel=0.15)


def test_targets_are_passed_or_missed(gpu):
    row = {"decode 64": {"share_of_bandwidth": 0.5}, "iteration": {"times_roofline": 2.6, "measured_over_planned": 0.8}}
    ends = {target[0]: gpu.verdict(row, *target)[-1] for target in gpu.TARGETS}
    assert list(ends.values()) == ["pass", "not measured", "not measured", "miss", "miss"]
    assert gpu.verdict({"iteration": {"measured_over_planned": 0.86}}, *gpu.TARGETS[-1])[-1] == "pass"


def test_less_is_measured_where_time_is_short(gpu):
    assert gpu.halves(512) == [512, 256, 128, 64, 32, 16] and gpu.halves(4) == [4]
    assert gpu.places("results", "NVIDIA H100 80GB HBM3")[1].name == "gpu-nvidia-h100-80gb-hbm3.md"


@pytest.mark.full
def test_without_cuda_one_line_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    words = [sys.executable, str(BENCHMARKS / "gpu.py"), "--look"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: torch sees no CUDA device; these checks need one\n"


def test_arms_of_the_ensemble_benchmark_are_means_over_their_runs(monkeypatch, outcomes):
    """Gold rises to 1 at 4 nats and falls to 0 at 8 in one run, half of that in the other."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import ensembles

    def path(scale: float) -> list:
        rest = {"length": 1.0, "distinct_1": 1.0, "distinct_2": 1.0, "duplicates": 0.0}
        return [
            outcomes.Point("one", 0, step, 0.0, kl, kl, scale * gold, **rest)
            for step, (kl, gold) in enumerate([(0.0, 0.0), (4.0, 1.0), (8.0, 0.0)])
        ]

    (row,) = ensembles.summarise({"one": [path(1.0), path(0.5)]})
    assert row["gold at 2"] == pytest.approx(0.375) and row["gold at 5"] == pytest.approx(0.5625)
    assert row["gold at 10"] is None and row["peak gold"] == 0.75 and (row["last gold"], row["last kl"]) == (0.0, 8.0)
    assert ensembles.table([row]).count("\n") == 2
    assert ensembles.mean_gold([[{"n": 1, "gold": 0.0}], [{"n": 1, "gold": 1.0}]]) == [(1, 0.5)]
