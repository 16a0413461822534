"""`rlhf ppo`: it raises what it is paid for, stays near the reference, and every knob does what it says."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import (
    Chain,
    assert_same_weights,
    contents,
    done,
    lines_of,
    manifest,
    refused,
    result,
    weights,
    without_times,
)
from tests.marks import full
from tests.tiny import write_jsonl

SMALL = ("--max-steps", 2, "--batch-size", 8, "--max-response-tokens", 5, "--eval-limit", 6, "--lora-rank", 4)
FAST = ("--learning-rate", "3e-3", "--target-approx-kl", "null")
VOWELS = """
def score(prompts, responses):
    return [sum(letter in "aeiou" for letter in response) for response in responses]
"""


def ppo(chain: Chain, output: Path, *more: object, model: object = None, rm: object = None) -> dict:
    line = ("--model", model or chain.sft, "--reward", rm or chain.reward, "--dataset", chain.prompts)
    return result("ppo", *line, "--output", output, *SMALL, *more)


def metrics_of(folder: Path) -> list[dict]:
    return lines_of(folder / "metrics.jsonl")


@pytest.fixture
def vowels(tmp_path) -> Path:
    (tmp_path / "vowels.py").write_text(VOWELS)
    return tmp_path / "vowels.py"


# --- learning


@pytest.fixture(scope="module")
def learned(chain, tmp_path_factory):
    """A base that was paid for vowels, starting from no SFT at all."""
    place = tmp_path_factory.mktemp("learned")
    (place / "vowels.py").write_text(VOWELS)
    flags = (
        "--max-steps", 40, "--batch-size", 16, "--max-response-tokens", 8, "--temperature", 1, "--lora-rank", 8,
        "--learning-rate", "1e-2", "--critic-learning-rate", "1e-2", "--missing-eos-penalty", 0, "--kl-coef", 0.05,
        "--eval-fraction", 0.25, "--eval-limit", 16, "--samples", 2, "--score-clip", 10,
    )  # fmt: skip
    line = ("--model", chain().base, "--reward", f"{place}/vowels.py:score", "--dataset", chain().prompts)
    return place / "ppo", result("ppo", *line, "--output", place / "ppo", *flags)


@pytest.mark.full
def test_the_score_rises_on_held_out_prompts_and_kl_stays_bounded(learned):
    metrics = learned[1]["metrics"]
    assert metrics["eval_kl_before"] == 0.0
    assert metrics["eval_score"] > metrics["eval_score_before"] + 1.0
    assert 0 < metrics["eval_kl"] < 40
    lines = metrics_of(learned[0])[1:]
    first, last = (sum(line["reward_score"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last > first + 0.8
    assert all(line["approx_kl"] < 1.5 and line["ratio_max"] < 1000 for line in lines)


@pytest.mark.full
def test_a_base_without_sft_is_its_own_reference(chain, learned):
    """Check 2: fresh adapters change nothing, so nothing is charged before the first update."""
    assert metrics_of(learned[0])[1]["reward_kl"] == 0.0
    about = manifest(learned[0])
    assert about["parents"] == [] and list(about["inputs"]) == [
        "dataset",
        "model",
        f"reward {vowels_of(learned)}:score",
    ]
    assert about["config"]["critic"] == "adapter" and (learned[0] / "critic" / "head.safetensors").exists()


def vowels_of(learned) -> str:
    return str(learned[0].parent / "vowels.py")


@pytest.mark.full
def test_evaluate_and_sample_see_what_was_learned(chain, learned, tmp_path):
    line = ("--model", learned[0], "--against", chain().base, "--reward", f"{vowels_of(learned)}:score")
    found = result("evaluate", *line, "--dataset", chain().prompts, "--temperature", 1)
    assert found["policy"]["score"] > found["against"]["score"] + 0.8
    assert found["win_rate"]["reward"]["rate"] > 0.6 and found["win_rate"]["reward"]["low"] > 0.5
    assert found["against"]["kl"] == 0.0 and found["policy"]["kl"] > 0


@pytest.mark.full
def test_the_learning_rate_falls_linearly_per_update(learned):
    lines = metrics_of(learned[0])[1:]
    assert [line["lr"] for line in lines] == pytest.approx([0.01 * (1 - k / 40) for k in range(40)])


# --- rewards


@pytest.mark.full
def test_without_held_out_prompts_the_table_shows_the_last_update(chain, tmp_path):
    found = chain()
    line = ("ppo", "--model", found.sft, "--reward", found.reward, "--dataset", found.prompts, *SMALL)
    ended = done(*line, "--output", tmp_path / "x", "--eval-fraction", 0)
    assert "held-out" not in ended.stdout and ended.stdout.startswith("ppo\nmeasure")
    assert "reward_score" in ended.stdout and [len(metrics_of(tmp_path / "x")[0])] == [1]


@pytest.mark.full
def test_the_score_is_the_weighted_sum_of_its_sources(chain, vowels, tmp_path):
    """0.7 x the reward model + 0.3 x a function, on the same rollout (same seed, same policy)."""
    (tmp_path / "const.py").write_text("def f(prompts, responses):\n    return [2.0] * len(responses)\n")
    found = chain()
    shutil.copytree(found.reward, tmp_path / "again")
    runs = {
        "model": (found.reward,),
        "function": (vowels,),
        "both": (f"{found.reward}=0.7", "--reward", f"{vowels}:score=0.3"),
        "halves": (f"{found.reward}=0.5", "--reward", f"{tmp_path}/again=0.5"),
        "negative": (f"{found.reward}=-1", "--reward", f"{tmp_path}/const.py:f"),
    }
    score = {}
    for name, (first, *rest) in runs.items():
        ppo(found, tmp_path / name, "--max-steps", 1, *rest, rm=first)
        score[name] = metrics_of(tmp_path / name)[1]["reward_score"]
    assert score["both"] == pytest.approx(0.7 * score["model"] + 0.3 * score["function"], abs=1e-5)
    assert score["halves"] == pytest.approx(score["model"], abs=1e-5)
    assert score["negative"] == pytest.approx(2 - score["model"], abs=1e-5)
    assert [p["role"] for p in manifest(tmp_path / "both")["parents"]] == ["model", "reward"]


def test_a_function_gets_texts_and_the_rows_columns(chain, tmp_path):
    (tmp_path / "f.py").write_text(
        "import json, pathlib\n"
        "def score(prompts, responses, **columns):\n"
        "    seen = {'prompts': prompts, 'responses': responses, **columns}\n"
        "    pathlib.Path(__file__).with_name('seen.json').write_text(json.dumps(seen))\n"
        "    print('a function may print')\n"
        "    return [0] * len(prompts)\n"
    )
    ppo(chain(), tmp_path / "x", rm=tmp_path / "f.py")
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen.keys() == {"prompts", "responses", "answer"} and len(seen["prompts"]) == len(seen["answer"]) <= 6
    rows = {row["prompt"]: row["answer"] for row in lines_of(chain().prompts)}
    assert [rows[prompt] for prompt in seen["prompts"]] == seen["answer"]
    assert all(isinstance(r, str) and "<eos>" not in r and "<pad>" not in r for r in seen["responses"])


@pytest.mark.full
def test_a_function_gets_messages_where_the_rows_have_them(chain, tmp_path):
    (tmp_path / "f.py").write_text(
        "def score(prompts, responses, answer):\n"
        "    assert all(p[-1]['role'] == 'user' for p in prompts) and '<|end|>' not in ''.join(responses)\n"
        "    return [len(r) for r in responses]\n"
    )
    found = chain(chat=True)
    assert ppo(found, tmp_path / "x", rm=tmp_path / "f.py")["updates"] == 2


def charged(chain, place: Path, way: str, penalty: float) -> tuple[list[float], float]:
    """The scores that a function gave in the first update, and what they were on average when charged."""
    place.mkdir()
    (place / "f.py").write_text(
        "import pathlib\n"
        "def score(prompts, responses):\n"
        "    scores = [float(len(r)) - 8 for r in responses]\n"
        "    open(pathlib.Path(__file__).with_name('scores'), 'a').write(repr(scores) + '\\n')\n"
        "    return scores\n"
    )
    flags = ("--max-steps", 1, "--eval-fraction", 0, "--missing-eos", way, "--missing-eos-penalty", penalty)
    ppo(chain(), place / "x", "--learning-rate", 1e-5, *flags, rm=place / "f.py")
    line = metrics_of(place / "x")[1]
    assert line["eos_rate"] == 0.0 and line["reward_kl"] == 0.0
    return json.loads((place / "scores").read_text().splitlines()[1]), line["reward_total"]


@pytest.mark.parametrize(
    ("way", "penalty", "charge"),
    [
        ("floor", 2.0, lambda s: min(s - 2, -2)),
        *full(
            ("subtract", 2.0, lambda s: s - 2),
            ("replace", 2.0, lambda s: -2.0),
            ("floor", 0, lambda s: s),
            ("replace", 0, lambda s: s),
        ),
    ],
)
def test_a_missing_end_is_charged(chain, tmp_path, way, penalty, charge):
    """Check 20: nothing ends within five tokens; a penalty of 0 turns every way off."""
    scores, total = charged(chain, tmp_path / "p", way, penalty)
    assert len(set(scores)) > 1
    assert total == pytest.approx(sum(map(charge, scores)) / len(scores), abs=1e-5)


@pytest.mark.full
def test_scores_are_clipped_after_the_charge(chain, vowels, tmp_path):
    ppo(chain(), tmp_path / "x", "--score-clip", 0.5, "--missing-eos-penalty", 3, "--max-steps", 1, rm=vowels)
    assert metrics_of(tmp_path / "x")[1]["reward_total"] == pytest.approx(-0.5)


# --- knobs


@pytest.mark.full
def test_an_adaptive_coefficient_follows_the_kl(chain, vowels, tmp_path):
    """Check 33: coefficient x (1 + clip(KL / target - 1, +-0.2) x n / horizon), n = 8 responses, from the logged KL."""
    flags = ("--kl-target", 0.5, "--kl-horizon", 40, "--kl-coef", 0.1, "--max-steps", 4, *FAST)
    ppo(chain(), tmp_path / "x", *flags, rm=vowels)
    lines = metrics_of(tmp_path / "x")[1:]
    expected = 0.1
    for line in lines:
        assert line["kl_coef"] == pytest.approx(expected, rel=1e-6)
        expected *= 1 + max(-0.2, min(0.2, line["reward_kl"] / 0.5 - 1)) * 8 / 40
    assert lines[1]["kl_coef"] == pytest.approx(0.1 * 0.96)  # no KL at first: the most it can fall
    assert all(line["kl_coef"] == 0.05 for line in metrics_of(chain().ppo)[1:])


def test_total_is_score_minus_kl(chain, vowels, tmp_path):
    """Check 19 on average: reward_total = mean charged score - coefficient x mean sequence KL."""
    ppo(chain(), tmp_path / "x", "--missing-eos-penalty", 0, "--kl-coef", 0.3, *FAST, "--max-steps", 3, rm=vowels)
    for line in metrics_of(tmp_path / "x")[1:]:
        assert line["reward_total"] == pytest.approx(line["reward_score"] - 0.3 * line["reward_kl"], abs=1e-5)
        assert line["loss"] == pytest.approx(line["policy_loss"] + 0.1 * line["value_loss"], abs=1e-5)
        assert line["truncated_rate"] == pytest.approx(1 - line["eos_rate"])


@pytest.mark.parametrize(
    "flags",
    [
        ("--critic", "shared"),
        pytest.param(("--whiten-rewards",), marks=pytest.mark.full),
        pytest.param(("--no-whiten-advantages",), marks=pytest.mark.full),
        pytest.param(("--minibatches", 2), marks=pytest.mark.full),
        pytest.param(("--gamma", 0.5), marks=pytest.mark.full),
        pytest.param(("--gae-lambda", 0.5), marks=pytest.mark.full),
        pytest.param(("--clip-range", 0.01), marks=pytest.mark.full),
        pytest.param(("--ppo-epochs", 1), marks=pytest.mark.full),
        pytest.param(("--temperature", 1.3), marks=pytest.mark.full),
        pytest.param(("--kl-coef", 1.0), marks=pytest.mark.full),
        pytest.param(("--max-grad-norm", 0.01), marks=pytest.mark.full),
        pytest.param(("--weight-decay", 0.5), marks=pytest.mark.full),
        pytest.param(("--adam-beta2", 0.5), marks=pytest.mark.full),
        pytest.param(("--lr-schedule", "constant"), marks=pytest.mark.full),
        pytest.param(("--value-clip-range", 0.001), marks=pytest.mark.full),
        pytest.param(
            ("--whiten-rewards", "--minibatches", 4, "--ppo-epochs", 3, "--responses-per-prompt", 2),
            marks=pytest.mark.full,
        ),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_every_knob_changes_something(chain, plain, tmp_path, flags):
    """No flag is read and never used: the same run with it ends in other weights."""
    ppo(chain(), tmp_path / "x", *FAST, "--max-steps", 2, *flags)
    mine, usual = contents(tmp_path / "x"), contents(plain)
    assert any(mine[name] != usual[name] for name in ("adapter_model.safetensors", "critic/head.safetensors"))
    last = metrics_of(tmp_path / "x")[-1]
    assert all(math.isfinite(value) for value in last.values() if isinstance(value, float))


@pytest.fixture(scope="module")
def plain(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "x"
    ppo(chain(), folder, *FAST, "--max-steps", 2)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("size", ["auto", 1, 3])
def test_the_micro_batch_size_does_not_matter(chain, plain, tmp_path, size):
    """Check 24: rows of uneven length, cut in other ways, with two minibatches a pass."""
    slow = ("--critic-learning-rate", "3e-3")
    for name, cut in (("four", 4), ("other", size)):
        ppo(
            chain(),
            tmp_path / name,
            *FAST,
            *slow,
            "--minibatches",
            2,
            "--micro-batch-size",
            cut,
            "--max-response-tokens",
            7,
        )
    assert_same_weights(tmp_path / "four", tmp_path / "other", within=1e-5)


@pytest.mark.full
def test_how_many_are_sampled_side_by_side_does_not_matter(chain, tmp_path):
    """With a wide clip: at its edge a difference in the last bit decides whether a token is learned from."""
    wide = (*FAST, "--max-steps", 2, "--clip-range", 9)
    ppo(chain(), tmp_path / "usual", *wide)
    ppo(chain(), tmp_path / "x", *wide, "--rollout-batch-size", 3)
    assert_same_weights(tmp_path / "x", tmp_path / "usual", within=1e-5)


@pytest.mark.full
def test_the_same_seed_gives_the_same_run_and_another_one_another(chain, plain, tmp_path):
    """Check 54."""
    ppo(chain(), tmp_path / "same", *FAST, "--max-steps", 2)
    ppo(chain(), tmp_path / "other", *FAST, "--max-steps", 2, "--seed", 1)
    assert_same_weights(tmp_path / "same", plain)
    assert without_times(tmp_path / "same" / "metrics.jsonl") == without_times(plain / "metrics.jsonl")
    assert (tmp_path / "same" / "samples.jsonl").read_bytes() == (plain / "samples.jsonl").read_bytes()
    assert metrics_of(tmp_path / "other")[1]["reward_score"] != metrics_of(plain)[1]["reward_score"]


@pytest.mark.full
def test_an_update_ends_early_once_the_policy_moved_too_far(chain, vowels, tmp_path):
    flags = ("--target-approx-kl", "1e-4", "--learning-rate", "3e-2", "--ppo-epochs", 6)
    ppo(chain(), tmp_path / "x", *flags, rm=vowels)
    assert [line["early_stop"] for line in metrics_of(tmp_path / "x")[1:]] == [1.0, 1.0]
    ppo(chain(), tmp_path / "y", "--target-approx-kl", "null", "--learning-rate", "3e-2", "--ppo-epochs", 6, rm=vowels)
    assert [line["early_stop"] for line in metrics_of(tmp_path / "y")[1:]] == [0.0, 0.0]


@pytest.mark.full
def test_several_responses_to_a_prompt_differ(chain, tmp_path):
    (tmp_path / "f.py").write_text(
        "import json, pathlib\n"
        "def score(prompts, responses):\n"
        "    with open(pathlib.Path(__file__).with_name('seen'), 'a') as file:\n"
        "        file.write(json.dumps(list(zip(prompts, responses))) + '\\n')\n"
        "    return [0.0] * len(prompts)\n"
    )
    flags = ("--responses-per-prompt", 3, "--batch-size", 4, "--max-steps", 1, "--eval-fraction", 0)
    ppo(chain(), tmp_path / "x", *flags, rm=tmp_path / "f.py")
    pairs = json.loads((tmp_path / "seen").read_text().splitlines()[1])
    assert len(pairs) == 12 and len({prompt for prompt, _ in pairs}) == 4
    assert len({(prompt, response) for prompt, response in pairs}) > 9
    assert metrics_of(tmp_path / "x")[1]["samples"] == 12


# --- batches


@pytest.mark.full
def test_an_update_always_has_a_whole_batch(chain, vowels, tmp_path):
    """5 prompts in batches of 4 over 2 epochs are 10 prompts, so 3 updates; the last goes on into a third epoch."""
    data = write_jsonl(tmp_path / "five.jsonl", lines_of(chain().prompts)[:5])
    line = ("--model", chain().sft, "--reward", vowels, "--dataset", data, "--output", tmp_path / "x")
    flags = ("--batch-size", 4, "--epochs", 2, "--eval-fraction", 0, "--minibatches", 2, "--max-response-tokens", 3)
    assert result("ppo", *line, *flags)["updates"] == 3
    lines = metrics_of(tmp_path / "x")[1:]
    assert [line["samples"] for line in lines] == [4, 4, 4]
    assert [line["epoch"] for line in lines] == pytest.approx([0.8, 1.6, 2.4])


def test_prompts_are_asked_once_in_every_epoch():
    from stages.training.batching import prompts_at

    asked = [i for step in range(15) for i in prompts_at(step, 10, 4, seed=0)]
    for epoch in range(6):
        assert sorted(asked[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    assert asked[:10] != asked[10:20]
    assert len(prompts_at(0, 3, 8, seed=0)) == 8  # fewer prompts than a batch are asked several times


# --- critics and going on


@pytest.mark.full
def test_a_shared_critic_is_a_head_alone(chain, vowels, tmp_path):
    found = chain()
    ppo(found, tmp_path / "x", "--critic", "shared", *FAST, rm=vowels)
    assert sorted(contents(tmp_path / "x" / "critic")) == ["head.safetensors"]
    head = weights(tmp_path / "x" / "critic")
    assert head["head.safetensors:weight"].abs().max() > 0  # it began at zero
    ppo(found, tmp_path / "y", "--critic", "shared", "--learning-rate", "1e-30", model=tmp_path / "x", rm=vowels)
    again = weights(tmp_path / "y" / "critic")
    assert torch.equal(head["head.safetensors:weight"], again["head.safetensors:weight"])  # and goes on from there


@pytest.mark.full
def test_ppo_goes_on_from_a_ppo_checkpoint_with_its_critic(chain, plain, vowels, tmp_path):
    """At a learning rate of nothing what was loaded is saved; for other rewards the critic is the reward model anew."""
    found = chain()
    frozen = ("--learning-rate", "1e-30")
    ppo(found, tmp_path / "same", *frozen, model=plain)
    assert_same_weights(tmp_path / "same", plain, within=1e-20)
    ppo(found, tmp_path / "other", *frozen, "--reward", f"{vowels}:score", model=plain)
    critic, model = weights(tmp_path / "other" / "critic"), weights(found.reward)
    assert all(torch.allclose(critic[name], model[name], atol=1e-20) for name in model)
    parents = manifest(tmp_path / "same")["parents"]
    assert [(p["role"], p["stage"]) for p in parents] == [("model", "ppo"), ("reward", "reward")]
    assert metrics_of(tmp_path / "same")[0]["eval_kl"] == 0.0  # its reference is the checkpoint it starts from


def test_policy_and_critic_learn_and_the_others_do_not(chain, plain):
    """Check 52 through files: the two trained roles differ from where they began."""
    policy, start = weights(plain), weights(chain().sft)
    assert any(not torch.equal(policy[name], start[name]) for name in start)
    critic, reward = weights(plain / "critic"), weights(chain().reward)
    assert any(not torch.equal(critic[name], reward[name]) for name in reward)
    for folder in (chain().sft, chain().reward):
        assert {k: v for k, v in contents(folder).items() if k != "checkpoint.json"} == manifest(folder)["files"]


@pytest.mark.full
def test_a_reward_function_that_is_broken_leaves_no_folder(chain, tmp_path):
    (tmp_path / "f.py").write_text("def score(prompts, responses):\n    return [len(r) / 0 for r in responses]\n")
    line = ("ppo", "--model", chain().sft, "--reward", tmp_path / "f.py", "--dataset", chain().prompts)
    refused(*line, "--output", tmp_path / "x", *SMALL)
    assert not (tmp_path / "x").exists()
    (tmp_path / "f.py").write_text(VOWELS)
    done(*line, "--output", tmp_path / "x", *SMALL)  # mended, the same command begins at once


@pytest.mark.slow
def test_a_longer_response_is_paid_for_and_comes(chain, tmp_path):
    """Check 55: a reward for length raises it, with nothing to hold the policy back."""
    (tmp_path / "f.py").write_text("def score(prompts, responses):\n    return [0.1 * len(r) for r in responses]\n")
    flags = (
        "--max-steps", 60, "--batch-size", 16, "--max-response-tokens", 12, "--temperature", 1, "--kl-coef", 0,
        "--learning-rate", "1e-2", "--critic-learning-rate", "1e-2", "--missing-eos-penalty", 0,
        "--eval-fraction", 0.3, "--eval-limit", 16, "--stop-on", "nan",
    )  # fmt: skip
    line = ("ppo", "--model", chain().base, "--reward", tmp_path / "f.py", "--dataset", chain().prompts)
    metrics = result(*line, "--output", tmp_path / "x", *flags)["metrics"]
    assert metrics["eval_score"] > 1.25 * metrics["eval_score_before"]


@pytest.mark.full
def test_where_graphs_did_not_work_the_run_says_so(chain, tmp_path, monkeypatch):
    def failing(step):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr("stages.rollout.generate.capture_for", lambda device, tokens: failing)
    found = chain()
    line = ("--model", found.sft, "--reward", found.reward, "--dataset", found.prompts)
    found = done("ppo", *line, "--output", tmp_path / "x", *SMALL)
    assert "decoding ran without CUDA graphs: operation not permitted" in found.stderr


# --- estimators without a critic, and what else changes the objective


@pytest.mark.parametrize(
    ("advantage", "more"),
    [
        ("grpo", ("--responses-per-prompt", 2, "--loss-aggregation", "sequence")),
        *full(
            ("rloo", ("--responses-per-prompt", 2)),
            ("reinforce++", ()),
            ("reinforce++-baseline", ("--responses-per-prompt", 2, "--loss-aggregation", "constant")),
        ),
    ],
)
def test_estimators_without_a_critic_have_none(chain, tmp_path, advantage, more):
    ppo(chain(), tmp_path / "x", "--advantage", advantage, *more)
    assert not (tmp_path / "x" / "critic").exists()
    last = metrics_of(tmp_path / "x")[-1]
    assert last["value_loss"] == 0 and "explained_variance" not in last
    assert ("dead_group_rate" in last) == ("--responses-per-prompt" in more)
    assert metrics_of(tmp_path / "x")[1]["ratio_first_error"] <= 1e-5


@pytest.mark.full
def test_rloo_raises_what_it_is_paid_for(chain, tmp_path):
    (tmp_path / "vowels.py").write_text(VOWELS)
    more = ("--advantage", "rloo", "--responses-per-prompt", 4, "--max-steps", 12, "--temperature", 1, *FAST)
    found = ppo(chain(), tmp_path / "x", *more, "--missing-eos-penalty", 0, rm=f"{tmp_path / 'vowels.py'}:score")
    assert found["metrics"]["eval_score"] > found["metrics"]["eval_score_before"] + 0.3


@pytest.mark.full
def test_only_the_critic_learns_while_it_warms_up(chain, tmp_path):
    for steps in (2, 0):
        ppo(chain(), tmp_path / str(steps), "--critic-warmup", steps, *FAST)
    start = weights(Path(chain().sft))
    kept, moved = weights(tmp_path / "2"), weights(tmp_path / "0")
    assert all(torch.equal(kept[name], start[name]) for name in start)
    assert any(not torch.equal(moved[name], start[name]) for name in start)
    critic, reward = weights(tmp_path / "2" / "critic"), weights(Path(chain().reward))
    assert any(not torch.equal(critic[name], reward[name]) for name in critic)


@pytest.mark.full
def test_only_the_head_of_a_shared_critic_learns_while_it_warms_up(chain, tmp_path):
    """The policy keeps its weights to the bit, and the head moves, by a gradient that is clipped by its own norm."""
    for rate in ("3e-3", "3e-2"):
        more = ("--critic", "shared", "--critic-warmup", 2, "--critic-learning-rate", rate)
        ppo(chain(), tmp_path / rate, *more, *FAST)
    start, kept = weights(Path(chain().sft)), weights(tmp_path / "3e-2")
    assert all(torch.equal(kept[name], start[name]) for name in start)
    heads = [load_file(tmp_path / rate / "critic" / "head.safetensors")["weight"] for rate in ("3e-3", "3e-2")]
    assert 0 < heads[0].abs().max() < heads[1].abs().max()
    assert all(line["value_loss"] > 0 and line["grad_norm"] > 0 for line in metrics_of(tmp_path / "3e-2")[1:])


@pytest.mark.full
def test_demonstrations_can_be_mixed_in_where_steps_are_skipped(chain, tmp_path):
    """Each update takes its first step and skips later ones, which have no loss on demonstrations."""
    mixed = ("--ptx-dataset", chain().demonstrations, "--learning-rate", "3e-3", "--ppo-epochs", 3)
    ppo(chain(), tmp_path / "x", *mixed, "--target-approx-kl", "1e-9")
    for line in metrics_of(tmp_path / "x")[1:]:
        assert line["skipped_steps"] >= 1 and line["ptx_loss"] > 0


@pytest.mark.full
def test_demonstrations_can_be_mixed_in(chain, tmp_path):
    ppo(chain(), tmp_path / "x", "--ptx-dataset", chain().demonstrations, "--ptx-coef", 5, *FAST)
    ppo(chain(), tmp_path / "y", *FAST)
    mixed, plain = metrics_of(tmp_path / "x")[-1], metrics_of(tmp_path / "y")[-1]
    assert mixed["ptx_loss"] > 0 and "ptx_loss" not in plain
    assert any(not torch.equal(a, b) for a, b in zip(*(weights(tmp_path / n).values() for n in "xy"), strict=True))


@pytest.mark.full
def test_scores_are_charged_for_length_and_normalised(chain, tmp_path):
    (tmp_path / "flat.py").write_text("def score(prompts, responses):\n    return [7.0] * len(responses)\n")
    more = ("--length-penalty", "0.5", "--length-limit", 3, "--missing-eos-penalty", 0, "--kl-coef", 0)
    ppo(chain(), tmp_path / "x", *more, rm=f"{tmp_path / 'flat.py'}:score")
    line = metrics_of(tmp_path / "x")[1]
    assert line["reward_score"] == 7 and line["reward_total"] <= 7 - 0.5 * (line["response_length"] - 3) + 1e-6
    ppo(chain(), tmp_path / "y", "--normalise-scores", "--missing-eos-penalty", 0, "--kl-coef", 0)
    assert abs(metrics_of(tmp_path / "y")[1]["reward_total"]) <= 1e-5


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--advantage", "rloo"), "rloo compares the responses to one prompt"),
        (("--advantage", "reinforce++", "--critic", "shared"), "reinforce++ has no critic"),
        (("--kl-estimator", "k3"), "k3 in the reward does not have the gradient of the KL"),
        (("--kl-placement", "loss", "--kl-estimator", "k1"), "k1 in the loss does not have the gradient of the KL"),
        (("--dual-clip", "0.5"), "is too small"),
    ],
)
def test_choices_that_cannot_work_are_refused(chain, tmp_path, flags, what):
    line = ("--model", chain().sft, "--reward", chain().reward, "--dataset", chain().prompts)
    said = refused("ppo", *line, "--output", tmp_path / "x", *flags)
    assert what in said and not (tmp_path / "x").exists()
