"""Knobs without effect, that contradict others, or that are absurd: each is one message, before any model loads."""

from __future__ import annotations

import pytest

from stages.config import DpoConfig, PpoConfig, RewardConfig, SftConfig
from stages.errors import ConfigError
from stages.knobs import REQUIRED, as_dict, default_of, knobs
from stages.measuring_config import STAGES, EvaluateConfig, SampleConfig
from stages.recipe import LARGEST, read_recipe, resolve, split_paths
from tests.commands import refused, result
from tests.marks import full
from tests.tiny import write_jsonl

NEEDED = {"model": "m", "dataset": "d", "output": "o"}
RLOO = {"advantage": "rloo", "responses_per_prompt": "4"}


def resolved(cls, tmp_path, text="", **flags):
    (tmp_path / "r.yaml").write_text(text)
    needed = NEEDED | ({"reward": ["rm"]} if cls is PpoConfig else {})
    return resolve(cls, read_recipe(tmp_path / "r.yaml", cls), needed | flags)


# Stage, flags, the knob without effect
IDLE = [
    (SftConfig, {"eval_dataset": "e", "eval_fraction": "0.1"}, "eval_fraction"),
    (SftConfig, {"warmup_ratio": "1", "lr_schedule": "cosine"}, "lr_schedule"),
    (RewardConfig, {"eval_fraction": "0", "sft_samples": "4"}, "sft_samples"),
    (DpoConfig, {"loss": "ipo", "desirable_weight": "1"}, "desirable_weight"),
    (DpoConfig, {"undesirable_weight": "1"}, "undesirable_weight"),
    (SampleConfig, {"temperature": "0", "top_p": "0.9"}, "top_p"),
    (SampleConfig, {"temperature": "0", "responses_per_prompt": "2"}, "responses_per_prompt"),
    (PpoConfig, {"ptx_coef": "0.5"}, "ptx_coef"),
    (PpoConfig, {"kl_horizon": "5000"}, "kl_horizon"),
    (PpoConfig, {"length_penalty": "0.1", "length_limit": "256"}, "length_limit"),
    (PpoConfig, {"value_coef": "0", "critic_learning_rate": "1e-3"}, "critic_learning_rate"),
    (PpoConfig, {"value_coef": "0", "critic_warmup": "2"}, "critic_warmup"),
    (PpoConfig, {"value_coef": "0", "value_clip_range": "0.1"}, "value_clip_range"),
    (PpoConfig, RLOO | {"gae_lambda": "0.9"}, "gae_lambda"),
    (PpoConfig, RLOO | {"gae_lambda": "0.95"}, "gae_lambda"),  # its default, but said with a flag
    (PpoConfig, RLOO | {"critic_lambda": "0"}, "critic_lambda"),
    (PpoConfig, RLOO | {"value_clip_range": "0.1"}, "value_clip_range"),
    (PpoConfig, RLOO | {"value_coef": "0.5"}, "value_coef"),
    (PpoConfig, RLOO | {"gamma": "0.99"}, "gamma"),
    (PpoConfig, RLOO | {"whiten_advantages": True}, "whiten_advantages"),
    (PpoConfig, {"advantage": "reinforce++", "gae_lambda": "0.9"}, "gae_lambda"),
]


@pytest.mark.parametrize(("cls", "flags", "name"), IDLE, ids=[f"{c.__name__}-{n}" for c, _, n in IDLE])
def test_a_flag_without_effect_is_a_mistake(tmp_path, cls, flags, name):
    with pytest.raises(ConfigError) as caught:
        resolved(cls, tmp_path, **flags)
    assert caught.value.where == "--" + name.replace("_", "-")
    assert caught.value.what.startswith(f"{name} has no effect because ") and caught.value.fix.startswith(
        "leave it out, or "
    )


# Stage, flags with which the same knobs do something, or are off as they are anyway
USEFUL = [
    (SftConfig, {"eval_dataset": "e", "eval_fraction": "0"}),
    (SftConfig, {"eval_fraction": "0", "eval_limit": "9"}),  # at most nine are none
    (SftConfig, {"warmup_ratio": "0.5", "lr_schedule": "constant"}),
    (DpoConfig, {"loss": "kto", "desirable_weight": "1"}),
    (SampleConfig, {"top_p": "0.9", "responses_per_prompt": "2"}),
    (SampleConfig, {"temperature": "0", "responses_per_prompt": "1"}),
    (EvaluateConfig, {"gold": ["g.py:f"], "reward_timeout": "5"}),
    (PpoConfig, {"reward": ["rm", "f.py=0.5"], "reward_timeout": "5"}),
    (PpoConfig, {"reward_timeout": "5"}),  # it changes no result, so a shared script may hold it
    (PpoConfig, RLOO | {"gamma": "1"}),  # 1 is what undiscounted means
    (PpoConfig, {"kl_coef": "0", "kl_placement": "reward"}),  # of a sweep over kl_coef
    (PpoConfig, {"ptx_dataset": "p", "ptx_coef": "0.5", "kl_target": "2", "kl_horizon": "5000"}),
    (PpoConfig, {"length_penalty": "0.1", "length_limit": "255"}),
    (PpoConfig, {"gae_lambda": "0.9", "gamma": "0.99", "critic_lambda": "0", "critic_warmup": "2"}),
    (PpoConfig, RLOO | {"critic_warmup": "0", "whiten_advantages": False}),
    (PpoConfig, {"advantage": "reinforce++", "gamma": "0.99", "whiten_advantages": True}),
    (PpoConfig, {"clip_range": "0.2", "clip_range_high": "0.28"}),
    (PpoConfig, {"clip_range": "0.2", "clip_range_high": "0.2"}),
]


@pytest.mark.parametrize(("cls", "flags"), USEFUL)
def test_knobs_with_an_effect_are_taken(tmp_path, cls, flags):
    assert resolved(cls, tmp_path, **flags)


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_recipe_with_every_default_is_taken(tmp_path, stage):
    """As config.yaml of a checkpoint is, which holds every knob."""
    cls = STAGES[stage]
    required = [name for name, (field, _, _) in knobs(cls).items() if default_of(field) is REQUIRED]
    config = resolve(cls, {}, {name: [name] if name == "reward" else name for name in required})
    everything = {name: (value, f"r.yaml: {name}") for name, value in as_dict(config).items()}
    assert resolve(cls, everything, {}) == config


def test_a_recipes_knob_without_effect_is_named_by_its_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        resolved(PpoConfig, tmp_path, "seed: 1\nkl_horizon: 5000\n")
    assert caught.value.where == f"{tmp_path / 'r.yaml'}:2: kl_horizon"


def test_a_recipes_default_is_no_mistake(tmp_path):
    text = "advantage: rloo\nresponses_per_prompt: 4\ngae_lambda: 0.95\nkl_horizon: 10000\nwhiten_advantages: true\n"
    assert resolved(PpoConfig, tmp_path, text).advantage == "rloo"


def test_a_flag_may_leave_a_shared_recipe_without_effect(tmp_path):
    assert resolved(RewardConfig, tmp_path, "sft_samples: 8\n", eval_fraction="0").sft_samples == 8
    assert resolved(PpoConfig, tmp_path, "gae_lambda: 0.9\n", **RLOO).gae_lambda == 0.9


def test_contradictions_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--clip-range-high 0.1 is below clip_range 0.2"):
        resolved(PpoConfig, tmp_path, clip_range_high="0.1")
    with pytest.raises(ConfigError, match="are both 0, so nothing is learned"):
        resolved(DpoConfig, tmp_path, loss="kto", desirable_weight="0", undesirable_weight="0")


# --- knobs without effect on the rows that are given ----------------------------------------------------------------


@pytest.mark.parametrize("stage", ["reward", *full("dpo")])
@pytest.mark.parametrize("flag", [("--rating-threshold", 1), ("--normalise-raters",)])
def test_knobs_of_ratings_need_ratings(chain, tmp_path, stage, flag):
    line = (stage, "--model", chain().base, "--dataset", chain().comparisons, "--output", tmp_path / "x", *flag)
    said = refused(*line, "--dry-run")
    assert f"error: {flag[0]} has no effect" in said and "not ratings" in said


def test_a_margin_in_the_loss_needs_margins(chain, tmp_path):
    line = ("reward", "--model", chain().base, "--output", tmp_path / "x", "--loss-margin", "--dry-run")
    assert "no row of" in refused(*line, "--dataset", chain().comparisons)
    rows = [{"prompt": f"red {i}", "chosen": " a", "rejected": " b", "margin": i} for i in range(3)]
    assert result(*line, "--dataset", write_jsonl(tmp_path / "m.jsonl", rows))["plan"]["rows"] == 2


@pytest.mark.parametrize(
    ("data", "flags", "says"),
    [
        ("prompts", ("--mask", "all"), "error: --mask has no effect"),
        ("prompts", ("--max-tokens", 9), "error: --max-tokens has no effect"),
        ("demonstrations", ("--reference", "BASE"), "error: --reference has no effect"),
    ],
)
def test_evaluate_refuses_knobs_of_other_rows(chain, data, flags, says):
    found = chain()
    flags = [found.base if flag == "BASE" else flag for flag in flags]
    line = ("evaluate", "--model", found.sft, "--dataset", getattr(found, data), *flags, "--max-response-tokens", 4)
    assert says in refused(*line, "--dry-run")


def test_a_reward_model_is_not_judged_by_another(chain):
    found = chain()
    line = ("evaluate", "--model", found.reward, "--dataset", found.comparisons, "--reward", found.reward)
    assert "--reward: " in refused(*line) and "and nothing is sampled" in refused(*line)


# --- lists ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [["q_proj,v_proj"], ["q_proj", "v_proj"], [" q_proj , v_proj,"], "q_proj,v_proj"])
def test_layers_between_commas_are_several(tmp_path, given):
    assert resolved(SftConfig, tmp_path, lora_targets=given).lora_targets == ["q_proj", "v_proj"]
    assert resolved(SftConfig, tmp_path, f"lora_targets: {given}").lora_targets == ["q_proj", "v_proj"]


def test_sources_between_commas_are_several(tmp_path):
    for name in ("reward", "gold", "also"):
        found = resolved(EvaluateConfig, tmp_path, **{"reward": ["rm"]} | {name: ["runs/a,runs/b", "c"]})
        assert getattr(found, name) == ["runs/a", "runs/b", "c"]
    assert resolved(PpoConfig, tmp_path, reward=["a=0.7,f.py:score=0.3"]).reward == ["a=0.7", "f.py:score=0.3"]
    assert resolved(PpoConfig, tmp_path, "reward: a,b\n", reward=None).reward == ["a", "b"]


def test_a_place_whose_name_holds_a_comma_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    (tmp_path / "a,b" / "f,g.py").write_text("")
    assert split_paths("a,b") == ["a,b"]
    assert split_paths("a,b=0.5,c") == ["a,b=0.5", "c"]
    assert split_paths("x,a,b/f,g.py:score=0.5,a,b") == ["x", "a,b/f,g.py:score=0.5", "a,b"]
    assert split_paths("a,c") == ["a", "c"]


def test_several_layers_are_trained(chain, tmp_path):
    line = ("sft", "--model", chain().base, "--dataset", chain().demonstrations, "--output", tmp_path / "x")
    sizes = {
        names: result(*line, "--dry-run", "--lora-targets", names)["plan"]["trainable_parameters_per_adapter"]
        for names in ("q_proj", "v_proj", "q_proj,v_proj")
    }
    assert sizes["q_proj,v_proj"] == sizes["q_proj"] + sizes["v_proj"] > 0


# --- absurd numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (SftConfig, "epochs", "1e300"),
        (SftConfig, "batch_size", 10**9),
        (SftConfig, "lora_rank", 10**6),
        (SftConfig, "lora_alpha", "1e308"),
        (PpoConfig, "responses_per_prompt", 10**9),
        (PpoConfig, "max_response_tokens", 10**9),
        (PpoConfig, "reward_timeout", "1e308"),
        (SampleConfig, "responses_per_prompt", 10**9),
        (EvaluateConfig, "best_of", [10**9]),
    ],
)
def test_absurd_numbers_are_refused(tmp_path, cls, name, value):
    with pytest.raises(ConfigError, match="too large") as caught:
        resolved(cls, tmp_path, **{name: value})
    assert caught.value.fix.startswith("the largest value is ")


WHOLE = [(s, n) for s, cls in STAGES.items() for n, (_, about, kind) in knobs(cls).items() if "int" in str(kind)]


def test_every_whole_number_has_a_largest_value():
    needed = {"model": "m", "dataset": "d", "output": "o", "reward": ["f.py"]}
    for stage, name in WHOLE:
        cls = STAGES[stage]
        with pytest.raises(ConfigError, match=f"{name.replace('_', '.')}.* is too large"):
            resolve(cls, {}, {n: v for n, v in needed.items() if n in knobs(cls)} | {name: str(LARGEST + 1)})


def test_an_update_has_a_largest_size(tmp_path):
    assert resolved(PpoConfig, tmp_path, batch_size="100", responses_per_prompt="10000")
    with pytest.raises(ConfigError, match="an update of 1,010,000 responses is too large"):
        resolved(PpoConfig, tmp_path, batch_size="101", responses_per_prompt="10000")


def test_numbers_of_steps_cost_nothing(chain, tmp_path):
    line = ("sft", "--model", chain().base, "--dataset", chain().demonstrations, "--output", tmp_path / "x")
    many = ("--samples", LARGEST, "--eval-limit", LARGEST, "--limit-rows", LARGEST, "--max-tokens", LARGEST)
    assert result(*line, *many, "--max-steps", LARGEST, "--dry-run")["plan"]["steps"] == LARGEST


def test_the_plan_of_many_responses_takes_no_memory(chain, tmp_path):
    """10,000 responses to each of 61 prompts: the list of their sizes alone would be megabytes."""
    import tracemalloc

    tracemalloc.start()
    line = ("ppo", "--model", chain().sft, "--reward", chain().reward, "--dataset", chain().prompts)
    more = ("--output", tmp_path / "x", "--responses-per-prompt", 10_000, "--batch-size", 1, "--minibatches", 100)
    plan = result(*line, *more, "--max-response-tokens", 4, "--dry-run")["plan"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan["rows"] % 10_000 == 0 and plan["rows"] >= 600_000
    assert plan["tokens_per_epoch"] == pytest.approx(plan["rows"] * 7, rel=0.5) and peak < 30e6


def test_the_plan_of_many_samples_takes_no_memory(chain, tmp_path):
    line = ("sample", "--model", chain().sft, "--dataset", chain().prompts, "--output", tmp_path / "x.jsonl")
    more = ("--max-response-tokens", 4, "--dry-run")
    assert "64,000,000 responses; the maximum is 10,000,000" in refused(*line, *more, "--responses-per-prompt", 10**6)
    assert result(*line, *more, "--responses-per-prompt", 10**5)["plan"]["responses"] == 64 * 10**5


def test_the_best_of_too_many_is_refused(chain, tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"red {i}"} for i in range(1001)])
    line = ("evaluate", "--model", chain().sft, "--dataset", tmp_path / "p.jsonl", "--reward", chain().reward)
    assert "10,010,000 responses; the maximum is" in refused(*line, "--best-of", "2,10000", "--dry-run")


def test_defaults_lie_within_the_largest_values():
    for cls in STAGES.values():
        for f, about, _ in knobs(cls).values():
            default = default_of(f)
            if isinstance(default, (int, float)) and not isinstance(default, bool):
                assert default <= (about.high if about.high is not None else LARGEST)
