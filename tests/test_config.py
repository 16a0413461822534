"""stages/config.py: what a knob is, and how defaults, recipes and flags become one checked config."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from stages.config import PpoConfig, RewardConfig, SftConfig
from stages.errors import ConfigError, UserError
from stages.knobs import REQUIRED, as_dict, default_of, knobs
from stages.measuring_config import STAGES, EvaluateConfig, SampleConfig
from stages.recipe import damaged_knob, differing, parse, read_recipe, resolve

NEEDED = {"model": "base", "dataset": "rows.jsonl", "output": "out"}
ALL_KNOBS = [(stage, name) for stage, cls in STAGES.items() for name in knobs(cls)]


def recipe_of(tmp_path, text, cls=SftConfig):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path, cls)


def resolved(tmp_path, text="", cls=SftConfig, **flags):
    return resolve(cls, recipe_of(tmp_path, text, cls), NEEDED | flags)


def complaint(tmp_path, text="", cls=SftConfig, **flags):
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, text, cls, **flags)
    return caught.value


# --- knobs --------------------------------------------------------------------------------------------------------


def test_every_knob_has_help_and_a_panel_and_a_default_within_its_bounds():
    for stage, name in ALL_KNOBS:
        field, about, kind = knobs(STAGES[stage])[name]
        assert about.help and about.panel and not about.help.endswith("."), (stage, name)
        default = default_of(field)
        if about.choices:
            left_out = {None} if about.auto else set()
            assert set(default if isinstance(default, list) else [default]) <= set(about.choices) | left_out
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            assert about.low is None or default >= about.low, (stage, name)
            assert about.above is None or default > about.above, (stage, name)
            assert about.high is None or default <= about.high, (stage, name)
        if default is not REQUIRED and default not in (None, [], {}):
            assert parse(default, kind, name) == default


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_the_names_that_recipes_rely_on_exist_in_every_training_stage(stage):
    names = (
        "max_steps epochs batch_size micro_batch_size learning_rate lora_rank lora_alpha seed device dtype "
        "limit_rows save_every eval_every"
    )
    assert set(names.split()) <= set(knobs(STAGES[stage]))


def test_the_names_that_ppo_recipes_rely_on_exist():
    names = (
        "reward max_prompt_tokens max_response_tokens temperature kl_coef kl_target gamma gae_lambda clip_range "
        "value_clip_range value_coef ppo_epochs minibatches missing_eos_penalty whiten_rewards responses_per_prompt "
        "advantage critic"
    )
    assert set(names.split()) <= set(knobs(PpoConfig))


def test_a_config_cannot_be_changed():
    config = SftConfig(**NEEDED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_list_and_dict_defaults_are_not_shared_between_configs():
    one, other = SftConfig(**NEEDED), SftConfig(**NEEDED)
    one.lora_targets.append("q_proj")
    one.map["prompt"] = "question"
    assert other.lora_targets == [] and other.map == {}


# --- precedence ---------------------------------------------------------------------------------------------------


def test_a_flag_beats_the_recipe_and_the_recipe_beats_the_default(tmp_path):
    assert resolved(tmp_path).batch_size == 16
    assert resolved(tmp_path, "batch_size: 8").batch_size == 8
    assert resolved(tmp_path, "batch_size: 8", batch_size="16").batch_size == 16


def test_a_flag_that_was_not_given_is_none_and_changes_nothing(tmp_path):
    assert resolved(tmp_path, "batch_size: 8", batch_size=None).batch_size == 8


def test_no_flag_turns_off_what_the_recipe_turned_on(tmp_path):
    assert resolved(tmp_path, "keep_state: true").keep_state is True
    assert resolved(tmp_path, "keep_state: true", keep_state=False).keep_state is False


def test_null_in_a_recipe_means_the_automatic_choice(tmp_path):
    assert resolved(tmp_path, "limit_rows: null").limit_rows is None
    assert resolved(tmp_path, "limit_rows: 5", limit_rows="none").limit_rows is None


def test_a_missing_required_knob_names_its_flag():
    with pytest.raises(ConfigError) as caught:
        resolve(SftConfig, {}, {"model": "base", "output": "out"})
    assert caught.value.what == "--dataset is required" and caught.value.exit_code == 2


# --- types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "value"), [("3e-4", 0.0003), ("3.0e-4", 0.0003), ("1", 1.0), ("0x10", 16.0), ("'2e-5'", 0.00002)]
)
def test_numbers_of_a_recipe_that_yaml_reads_as_text(tmp_path, given, value):
    learning_rate = resolved(tmp_path, f"learning_rate: {given}").learning_rate
    assert learning_rate == value and type(learning_rate) is float


@pytest.mark.parametrize(("given", "value"), [("7", 7), ("64.0", 64), ("1e2", 100), ("1_000", 1000), ("'12'", 12)])
def test_whole_numbers_in_all_their_spellings(tmp_path, given, value):
    steps = resolved(tmp_path, f"max_steps: {given}").max_steps
    assert steps == value and type(steps) is int


def test_a_whole_number_beyond_the_precision_of_floats_is_kept():
    assert parse("9007199254740993", int, "x") == 9007199254740993


@pytest.mark.parametrize("given", ["3.5", "yes", "true", "abc", ".inf", ".nan", "[1]", "{}", "2020-01-01"])
def test_what_is_not_a_whole_number(tmp_path, given):
    error = complaint(tmp_path, f"seed: {given}")
    assert "is not a whole number" in error.what
    assert error.where.endswith("recipe.yaml:1: seed") and error.fix == "give a whole number"


@pytest.mark.parametrize("given", [".inf", "-.inf", ".nan", "1e999", "5%", "'1,5'", "true"])
def test_what_is_not_a_number(tmp_path, given):
    assert "is not a number" in complaint(tmp_path, f"learning_rate: {given}").what


@pytest.mark.parametrize("given", ["1", "0", "maybe", "[true]"])
def test_what_is_neither_true_nor_false(tmp_path, given):
    assert "is not true or false" in complaint(tmp_path, f"keep_state: {given}").what


@pytest.mark.parametrize(("given", "value"), [("auto", "auto"), ("8", 8), ("8.0", 8)])
def test_a_whole_number_or_auto(tmp_path, given, value):
    assert resolved(tmp_path, f"micro_batch_size: {given}").micro_batch_size == value
    assert resolved(tmp_path, micro_batch_size=given).micro_batch_size == value


@pytest.mark.parametrize("given", ["Auto", "half", "2.5"])
def test_neither_a_whole_number_nor_auto(tmp_path, given):
    assert complaint(tmp_path, f"micro_batch_size: {given}").what == f"`{given}` is neither a number nor `auto`"


def test_a_text_knob_takes_a_number_as_text(tmp_path):
    assert resolve(SftConfig, recipe_of(tmp_path, "model: 7"), {"dataset": "d", "output": "o"}).model == "7"


def test_a_list_knob_takes_one_text_or_several(tmp_path):
    assert resolved(tmp_path, "lora_targets: q_proj").lora_targets == ["q_proj"]
    assert resolved(tmp_path, "lora_targets: [q_proj, v_proj]").lora_targets == ["q_proj", "v_proj"]
    assert resolved(tmp_path, "lora_targets: [a]", lora_targets=["b", "c"]).lora_targets == ["b", "c"]
    assert "is not a list of texts" in complaint(tmp_path, "lora_targets: {a: b}").what


@pytest.mark.parametrize("given", ["1,2,4", "'1, 2,4'", "[1, 2, 4]", "['1', '2,4']", "[1.0, 2, 4]"])
def test_whole_numbers_in_a_list(tmp_path, given):
    flags = {"model": "m", "dataset": "d", "reward": ["r"]}
    assert resolve(EvaluateConfig, recipe_of(tmp_path, f"best_of: {given}", EvaluateConfig), flags).best_of == [1, 2, 4]
    assert resolve(EvaluateConfig, {}, flags | {"best_of": ["1,2", "4"]}).best_of == [1, 2, 4]


@pytest.mark.parametrize("given", ["1,,2", "1.5", "a", "", "{1: 2}", "[true]", "[[1]]"])
def test_what_is_no_list_of_whole_numbers(given):
    with pytest.raises(ConfigError) as caught:
        parse(yaml.safe_load(given) if given else "", list[int], "--best-of")
    assert "is not a list of whole numbers, such as 1,2,4" in caught.value.what


def test_every_number_of_a_list_has_the_knobs_bounds():
    flags = {"model": "m", "dataset": "d", "reward": ["r"], "best_of": ["4,0"]}
    with pytest.raises(ConfigError) as caught:
        resolve(EvaluateConfig, {}, flags)
    assert (caught.value.what, caught.value.where) == ("0 is too small", "--best-of")


def test_map_takes_a_mapping_or_pairs(tmp_path):
    wanted = {"prompt": "question", "completion": "answer"}
    assert resolved(tmp_path, "map: {prompt: question, completion: answer}").map == wanted
    assert resolved(tmp_path, map="prompt=question, completion=answer").map == wanted
    for wrong in ("prompt", "prompt=", "=question", "a=b=c"):
        assert complaint(tmp_path, map=wrong).where == "--map"


# --- bounds and choices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("batch_size", "0", "the smallest value is 1"),
        ("epochs", "0", "give a number above 0"),
        ("eval_fraction", "0.6", "the largest value is 0.5"),
        ("warmup_ratio", "-0.1", "the smallest value is 0"),
        ("micro_batch_size", "0", "the smallest value is 1"),
        ("lora_rank", "5000", "the largest value is 4096"),
    ],
)
def test_values_out_of_bounds_name_the_flag_and_the_bound(tmp_path, name, value, fix):
    error = complaint(tmp_path, **{name: value})
    assert error.where == "--" + name.replace("_", "-") and error.fix == fix


@pytest.mark.parametrize(("name", "value"), [("eval_fraction", "0.5"), ("eval_fraction", "0"), ("warmup_ratio", "1")])
def test_bounds_themselves_are_allowed(tmp_path, name, value):
    assert getattr(resolved(tmp_path, **{name: value}), name) == float(value)


def test_temperature_zero_is_for_sample_alone(tmp_path):
    assert resolved(tmp_path, cls=SampleConfig, temperature="0").temperature == 0.0
    assert complaint(tmp_path, cls=PpoConfig, reward=["r"], temperature="0").where == "--temperature"


def test_a_wrong_choice_lists_the_choices_and_the_nearest(tmp_path):
    error = complaint(tmp_path, dtype="bf16")
    assert error.what == "`bf16` is not a choice"
    assert error.fix == "choose from auto, float32, bfloat16, float16; did you mean `bfloat16`?"


# --- recipes ------------------------------------------------------------------------------------------------------


def test_a_recipe_remembers_where_each_knob_stands(tmp_path):
    recipe = recipe_of(tmp_path, "# a comment\n\nseed: 3\nlora_targets:\n  - q_proj\n  - v_proj\nbatch_size: 4\n")
    places = {name: where.rsplit(":", 1)[1] for name, (_, where) in recipe.items()}
    assert places == {"seed": "3", "lora_targets": "4", "batch_size": "7"}
    assert recipe["lora_targets"][0] == ["q_proj", "v_proj"]


def test_an_error_in_a_recipe_names_file_line_and_knob(tmp_path):
    error = complaint(tmp_path, "seed: 1\nbatch_size: many\n")
    assert error.where == f"{tmp_path / 'recipe.yaml'}:2: batch_size"


@pytest.mark.parametrize(
    ("wrong", "meant"), [("batchsize", "batch_size"), ("batch-size", "batch_size"), ("sed", "seed")]
)
def test_an_unknown_key_suggests_the_nearest(tmp_path, wrong, meant):
    error = complaint(tmp_path, f"seed: 1\n{wrong}: 2\n")
    assert error.what == f"unknown knob `{wrong}`" and error.fix == f"did you mean `{meant}`?"
    assert error.where.endswith(":2")


def test_an_unknown_key_that_resembles_nothing_points_to_help(tmp_path):
    assert "--help" in complaint(tmp_path, "zzzzzz: 1").fix


def test_a_knob_of_another_stage_is_unknown(tmp_path):
    assert complaint(tmp_path, "kl_coef: 0.1").what == "unknown knob `kl_coef`"


def test_a_key_given_twice_is_refused_at_its_second_line(tmp_path):
    error = complaint(tmp_path, "seed: 1\nbatch_size: 2\nseed: 3\n")
    assert error.what == "`seed` is given twice" and error.where.endswith(":3")


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.getpid []",
        "seed: !!python/name:os.system",
        "model: !custom x",
        "seed: 1\n---\nseed: 2\n",
        "a: b: c",
        "\tseed: 1",
        "seed: [1",
        "? [a]\n: b",
        "*nowhere",
    ],
)
def test_tags_and_broken_yaml_are_refused(tmp_path, text):
    error = complaint(tmp_path, text)
    assert error.what.startswith("not valid YAML") and str(tmp_path / "recipe.yaml") in error.where


def test_a_broken_recipe_names_the_line(tmp_path):
    assert complaint(tmp_path, "seed: 1\nbatch_size: 2\na: b: c\n").where.endswith("recipe.yaml:3")


@pytest.mark.parametrize("text", ["- seed", "5", "just words"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path, text):
    assert complaint(tmp_path, text).what == "a recipe is a mapping of knobs to values"


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "\ufeffseed: 0\n"])
def test_an_empty_recipe_or_one_with_a_byte_order_mark_is_fine(tmp_path, text):
    assert resolved(tmp_path, text).seed == 0


def test_a_recipe_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the recipe: No such file"):
        read_recipe(tmp_path / "absent.yaml", SftConfig)
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        read_recipe(tmp_path, SftConfig)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_recipe(tmp_path / "latin.yaml", SftConfig)


# --- checks across knobs ------------------------------------------------------------------------------------------


def test_evaluating_needs_held_out_rows(tmp_path):
    error = complaint(tmp_path, "eval_every: 5\n", eval_fraction="0")
    assert error.where.endswith("recipe.yaml:1: eval_every") and "eval_fraction is 0" in error.what
    assert complaint(tmp_path, eval_fraction="0", eval_every="5").where == "--eval-every"
    assert resolved(tmp_path, eval_fraction="0", eval_every="5", eval_dataset="held.jsonl").eval_every == 5


def test_minibatches_must_divide_the_responses_of_a_batch(tmp_path):
    error = complaint(tmp_path, cls=PpoConfig, reward=["r"], batch_size="10", minibatches="4")
    assert error.what == "a batch of 10 responses does not split into 4 equal minibatches"
    assert error.where == "--minibatches"
    config = resolved(tmp_path, cls=PpoConfig, reward=["r"], batch_size="10", responses_per_prompt="2", minibatches="4")
    assert config.batch_size == 10 and config.minibatches == 4


def test_ppo_keeps_the_checks_of_every_training_stage(tmp_path):
    error = complaint(tmp_path, cls=PpoConfig, reward=["r"], eval_fraction="0", eval_every="5")
    assert error.where == "--eval-every"


def test_ppo_needs_a_reward_source(tmp_path):
    assert complaint(tmp_path, cls=PpoConfig).what == "--reward is required"
    assert complaint(tmp_path, "reward: []", cls=PpoConfig).what == "no reward source"
    assert resolved(tmp_path, "reward: rm", cls=PpoConfig).reward == ["rm"]
    assert resolved(tmp_path, cls=PpoConfig, reward=["rm", "f.py:g=0.5"]).reward == ["rm", "f.py:g=0.5"]


def test_a_win_rate_needs_something_that_scores(tmp_path):
    flags = {"model": "m", "dataset": "d", "against": "base"}
    with pytest.raises(ConfigError, match="win rate needs something that scores"):
        resolve(EvaluateConfig, {}, flags)
    assert resolve(EvaluateConfig, {}, flags | {"gold": ["g.py:f"]}).against == "base"


def test_ppo_has_defaults_of_its_own():
    config = PpoConfig(**NEEDED, reward=["r"])
    assert (config.adam_eps, config.warmup_ratio) == (1e-5, 0.0)
    assert RewardConfig(**NEEDED).adam_eps == 1e-8


# --- comparing with a stored config -------------------------------------------------------------------------------


def test_differing_names_what_changed_but_not_what_is_inert():
    config = SftConfig(**NEEDED, seed=1, save_every=10)
    stored = as_dict(SftConfig(**NEEDED, seed=2, save_every=20, learning_rate=1e-4))
    assert differing(config, stored) == ["learning_rate", "seed"]
    assert differing(config, as_dict(config)) == []


def test_differing_names_a_knob_that_only_one_side_knows():
    config = SftConfig(**NEEDED)
    assert differing(config, as_dict(config) | {"retired_knob": 3}) == ["retired_knob"]


def test_config_errors_are_user_errors_with_exit_code_2():
    error = ConfigError("wrong", where="--seed", fix="give another")
    assert isinstance(error, UserError) and error.exit_code == 2
    assert str(error) == "--seed: wrong\n  -> give another"


@pytest.mark.parametrize(
    ("given", "stops"),
    [
        (None, ["kl", "nan"]),
        ("stop_on: none", []),
        ("stop_on: []", []),
        ("stop_on: kl, dead-groups", ["kl", "dead-groups"]),
        ("stop_on: [nan, kl,nan]", ["nan", "kl"]),
    ],
)
def test_conditions_to_stop_on_come_as_a_list_or_with_commas(tmp_path, given, stops):
    path = tmp_path / "ppo.yaml"
    path.write_text("model: m\ndataset: d\noutput: o\nreward: r.py\n" + (given or ""))
    assert resolve(PpoConfig, read_recipe(path, PpoConfig), {}).stop_on == stops


def test_another_condition_to_stop_on_is_the_same_run():
    place = {"model": "m", "dataset": "d", "output": "o", "reward": ["r.py"]}
    assert differing(PpoConfig(**place, stop_on=["kl"]), as_dict(PpoConfig(**place, stop_on=[]))) == []


# --- removed knobs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "name", "reason"),
    [
        (SftConfig, "adam_beta1", "its value is fixed at 0.9"),
        (SftConfig, "adam-eps", "its value is fixed at 1e-08"),
        (PpoConfig, "adam_eps", "its value is fixed at 1e-05"),
        (PpoConfig, "ratio_limit", "its value is fixed at 10.0"),
        (PpoConfig, "force_biased_kl", "use force instead"),
    ],
)
def test_a_removed_knob_of_an_old_recipe_says_what_became_of_it(tmp_path, cls, name, reason):
    error = complaint(tmp_path, f"seed: 1\n{name}: 2\n", cls)
    assert (error.what, error.fix) == (f"unknown knob `{name}`", f"leave it out; it was removed: {reason}")
    assert error.where.endswith(":2")


def test_a_removed_knob_at_its_fixed_value_is_passed_over(tmp_path):
    """As config.yaml of an earlier version has it."""
    (tmp_path / "r.yaml").write_text("ratio_limit: 10.0\nforce_biased_kl: false\nbatch_size: 3\n", encoding="utf-8")
    assert read_recipe(tmp_path / "r.yaml", PpoConfig) == {"batch_size": (3, f"{tmp_path}/r.yaml:3")}


def test_a_removed_knob_of_another_stage_is_any_unknown_one(tmp_path):
    assert "removed" not in complaint(tmp_path, "ratio_limit: 10").fix


def test_a_stored_config_may_hold_removed_knobs_at_the_values_that_are_fixed_now():
    place = NEEDED | {"reward": ["r.py"]}
    old = {"adam_beta1": 0.9, "adam_eps": 1e-5, "ratio_limit": 10.0, "force_biased_kl": False}
    assert differing(PpoConfig(**place), as_dict(PpoConfig(**place)) | old) == []
    assert differing(PpoConfig(**place), as_dict(PpoConfig(**place)) | old | {"adam_eps": 1e-8}) == ["adam_eps"]
    sft = as_dict(SftConfig(**NEEDED))
    assert differing(SftConfig(**NEEDED), sft | {"adam_beta1": 0.9, "adam_eps": 1e-8}) == []
    assert differing(SftConfig(**NEEDED), sft | {"ratio_limit": 10.0}) == ["ratio_limit"]
    assert damaged_knob("ppo", json.loads(json.dumps(old))) == ""


def test_a_biased_kl_needs_force(tmp_path):
    biased = {"reward": ["r"], "kl_estimator": "k3", "kl_placement": "reward"}
    assert complaint(tmp_path, cls=PpoConfig, **biased).what == "k3 in the reward does not have the gradient of the KL"
    assert resolved(tmp_path, cls=PpoConfig, **biased, force=True).kl_is_biased
