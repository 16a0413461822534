"""Every recipe is one that its stage takes, and the tiny world's gold reward is what its docstring says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from stages.measuring_config import STAGES
from stages.recipe import read_recipe, resolve

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted(RECIPES.glob("*/*.yaml"))
GIVEN = {"model": "m", "dataset": "d", "output": "o", "reward": ["r"]}
RECORD = "Record: basket, colour blue, price 33, arrives Sunday, aisle 6."
PROMPT = f"Emma asks: Where is the basket in your shop?\n{RECORD}\nAgent:"


def gold():
    spec = importlib.util.spec_from_file_location("tiny_gold", RECIPES / "tiny" / "gold.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_is_one_that_its_stage_takes(path):
    cls = STAGES[path.stem]
    recipe = read_recipe(path, cls)
    flags = {name: value for name, value in GIVEN.items() if name in cls.__dataclass_fields__ and name not in recipe}
    config = resolve(cls, recipe, flags)
    assert recipe and all(getattr(config, name) is not None for name in recipe)


@pytest.mark.parametrize("name", sorted({path.parent.name for path in FILES}))
def test_every_recipe_has_all_stages(name):
    assert {"sft", "reward", "ppo", "evaluate"} <= {path.stem for path in (RECIPES / name).glob("*.yaml")}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (" Aisle 6.", 1.0),  # right
        (" Aisle 5.", -1.0),  # wrong
        (" Hello Emma! In aisle 6. Is there anything else?", 2.0),  # right, a greeting and an offer
        (" Thanks for your message. It is in aisle 6.", 1.5),  # right, thanks
        (" Hello Emma! Thanks for your message. Sorry for the wait. Aisle 6. All the best.", 2.5),  # three kinds count
        (" Aisle 6. What a question.", 0.5),  # right, rude
        (" Aisle 6", 0.5),  # no full stop
        ("", -1 - 2.0),  # nothing at all: not right, and all of the form
    ],
)
def test_the_gold_reward_is_what_it_says(response, expected):
    assert gold().score([PROMPT], [response]) == [expected]


@pytest.mark.parametrize("response", ["\n\n\n", "!" * 500, "aisle " * 300, "6" * 80, "\x1b[31m", "Hello " * 90])
def test_the_gold_reward_is_bounded_whatever_the_text(response):
    found = gold().score([PROMPT, "no prompt of this world"], [response, response])
    assert all(gold().WORST <= number <= gold().BEST for number in found)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The tiny world with a base that was hardly trained, made twice."""
    folders = [tmp_path_factory.mktemp("world") / name for name in ("one", "two")]
    for folder in folders:
        line = [
            sys.executable,
            str(RECIPES / "tiny" / "prepare.py"),
            "--output",
            str(folder),
            "--steps",
            "2",
            "--rows",
            "60",
        ]
        subprocess.run(line, check=True, capture_output=True)
    return folders


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.full
def test_one_seed_makes_one_world(prepared):
    one, two = prepared
    for path in sorted((one / "data").glob("*.jsonl")):
        assert path.read_bytes() == (two / "data" / path.name).read_bytes()
    assert (one / "base" / "model.safetensors").read_bytes() == (two / "base" / "model.safetensors").read_bytes()


@pytest.mark.full
def test_held_out_prompts_are_seen_by_no_stage(prepared):
    data = prepared[0] / "data"
    held_out = {row["prompt"] for row in rows_of(data / "heldout.jsonl")}
    trained = {row["prompt"] for name in ("sft", "comparisons", "prompts") for row in rows_of(data / f"{name}.jsonl")}
    assert held_out and trained and not held_out & trained


@pytest.mark.full
def test_comparisons_mostly_prefer_what_gold_prefers(prepared):
    rows = rows_of(prepared[0] / "data" / "comparisons.jsonl")
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (gold().score(prompts, [row[key] for row in rows]) for key in ("chosen", "rejected"))
    agreed = sum(c > r for c, r in zip(chosen, rejected, strict=True)) / sum(
        c != r for c, r in zip(chosen, rejected, strict=True)
    )
    assert 0.7 < agreed < 1.0  # labels are drawn with noise
