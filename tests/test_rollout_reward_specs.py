"""What --reward may name: checkpoints and functions in files, with their weights."""

from __future__ import annotations

import sys

import pytest

from stages.checkpoint.digests import file_digest
from stages.errors import CheckpointError, ConfigError, RewardError
from stages.models.model_ref import open_model
from stages.rollout.reward_specs import is_function, load_function, open_rewards, parse_reward, python_file, reason_of
from tests.parts import publish_checkpoint, random_adapter, random_head

SCORE = "def score(prompts, responses):\n    return [1.0] * len(responses)\n"


def refused(name):
    with pytest.raises(RewardError) as caught:
        load_function(str(name), "--reward")
    assert caught.value.fix
    return caught.value


# --- flags


@pytest.mark.parametrize(
    ("flag", "name", "weight"),
    [
        ("runs/reward", "runs/reward", 1.0),
        ("runs/reward=0.5", "runs/reward", 0.5),
        ("f.py:score=-2", "f.py:score", -2.0),
        ("runs/lr=3e-4/reward", "runs/lr=3e-4/reward", 1.0),  # an equals sign of the path's own
        ("runs/lr=3e-4/reward=2", "runs/lr=3e-4/reward", 2.0),
        ("f.py", "f.py", 1.0),
    ],
)
def test_a_flag_is_a_source_and_perhaps_a_weight(flag, name, weight):
    assert parse_reward(flag) == (name, weight)


@pytest.mark.parametrize("flag", ["runs/reward=nan", "runs/reward=inf", "=1"])
def test_a_weight_is_a_finite_number_of_a_named_source(flag):
    with pytest.raises(ConfigError, match="has no finite weight") as caught:
        parse_reward(flag, "--gold")
    assert caught.value.where == "--gold"


@pytest.mark.parametrize(
    ("name", "function", "path"),
    [
        ("f.py", True, "f.py"),
        ("a/f.py:length", True, "a/f.py"),
        ("home/.pyenv/f.py:length", True, "home/.pyenv/f.py"),
        ("my.python/f.py", True, "my.python/f.py"),
        ("old.py.d/f.py:length", True, "old.py.d/f.py"),
        ("runs/reward", False, None),
        ("my.python/reward", False, None),
    ],
)
def test_a_function_is_a_python_file_and_perhaps_a_name(name, function, path):
    assert is_function(name) == function
    if function:
        assert str(python_file(name)) == path


# --- functions


def test_the_function_is_score_unless_named(tmp_path):
    path = tmp_path / "f.py"
    path.write_text(SCORE + "def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    assert load_function(str(path), "--reward")(["p"], ["abc"]) == [1.0]
    assert load_function(f"{path}:", "--reward")(["p"], ["abc"]) == [1.0]
    assert load_function(f"{path}:length", "--reward")(["p"], ["abc"]) == [3.0]


def test_a_file_in_a_folder_called_like_python_is_found(tmp_path):
    folder = tmp_path / ".pyenv"
    folder.mkdir()
    (folder / "f.py").write_text(SCORE)
    assert load_function(f"{folder}/f.py:score", "--reward")(["p"], ["abc"]) == [1.0]


def test_a_file_may_import_its_neighbours_and_declare_dataclasses(tmp_path):
    (tmp_path / "rlhf_test_neighbour.py").write_text("WORTH = 4.0\n")
    path = tmp_path / "f.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom rlhf_test_neighbour import WORTH\n"
        "@dataclass\nclass Rule:\n    worth: float\n"
        "def score(prompts, responses):\n    return [Rule(WORTH).worth for _ in responses]\n"
    )
    before = list(sys.path)
    assert load_function(str(path), "--reward")(["p"], ["r"]) == [4.0]
    assert sys.path == before


def test_a_missing_file(tmp_path):
    error = refused(tmp_path / "none.py:score")
    assert error.what == f"{tmp_path / 'none.py'} does not exist" and error.where == "--reward"


def test_a_missing_function_is_refused_with_those_there_are(tmp_path):
    path = tmp_path / "f.py"
    path.write_text("score = 3\ndef length(p, r): ...\ndef _hidden(): ...\n")
    for name in (f"{path}:lenght", f"{path}"):
        error = refused(name)
        wanted = "lenght" if "lenght" in name else "score"
        assert error.what == f"{path} has no function `{wanted}`" and error.fix == "name a function that it has: length"
    path.write_text("")
    assert refused(path).fix == "define the function in it"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import math\nx = 1 / 0\n", "ZeroDivisionError: division by zero ({path}:2)"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module' ({path}:1)"),
        ("def score(:\n", "SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path, text, said):
    path = tmp_path / "f.py"
    path.write_text(text)
    before = list(sys.path)
    error = refused(path)
    assert error.what.startswith("importing it failed: " + said.format(path=path))
    assert error.where == f"--reward {path}" and sys.path == before


def test_a_reason_names_the_deepest_line_of_the_users_own_file(tmp_path):
    path = tmp_path / "f.py"
    path.write_text("def inner():\n    return {}['x']\n\ndef outer():\n    return inner()\n")
    function = load_function(f"{path}:outer", "--reward")
    with pytest.raises(KeyError) as caught:
        function()
    assert reason_of(caught.value, path) == f"KeyError: 'x' ({path}:2)"
    assert reason_of(ValueError("no trace"), path) == "ValueError: no trace"


# --- all of them


@pytest.fixture
def base(open_tiny):
    return open_tiny("llama")


@pytest.fixture
def reward(base, tmp_path):
    adapter, head = random_adapter(base, 1), random_head(base.width, 2)
    return publish_checkpoint(tmp_path / "reward", base, "reward", adapter, head=head)


def test_sources_are_opened_in_order_with_weights_and_digests(base, reward, tmp_path):
    path = tmp_path / "f.py"
    path.write_text(SCORE)
    first, second = open_rewards([f"{path}:score=0.25", str(reward)], base.ref)
    assert (first.name, first.weight, first.checkpoint) == (f"{path}:score", 0.25, None)
    assert first.function(["p"], ["r"]) == [1.0] and first.digest == file_digest(path)
    assert (second.name, second.weight, second.function) == (str(reward), 1.0, None)
    assert second.checkpoint.manifest.stage == "reward" and second.digest == file_digest(reward / "checkpoint.json")


def test_a_base_is_no_reward(base, model_folder):
    with pytest.raises(RewardError, match="is a base model, not a reward source") as caught:
        open_rewards([str(model_folder("llama"))], base.ref, what="--gold")
    assert caught.value.where == "--gold"


def test_an_sft_checkpoint_is_no_reward(base, tmp_path):
    folder = publish_checkpoint(tmp_path / "sft", base, "sft", random_adapter(base, 1))
    with pytest.raises(CheckpointError, match="is a `sft` checkpoint"):
        open_rewards([str(folder)], base.ref)


def test_a_reward_on_another_base_is_refused(reward, model_folder):
    other = open_model(str(model_folder("llama", seed=1)), stages=(), what="--model")
    with pytest.raises(CheckpointError, match="cannot share one frozen base") as caught:
        open_rewards([str(reward)], other)
    assert caught.value.where == "--model, --reward"
    assert open_rewards([str(reward)], None)[0].weight == 1.0  # measuring a reward model alone needs no policy
