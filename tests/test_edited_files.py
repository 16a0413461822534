"""Manifests, adapter configs, run.json and states with numbers that no run ever had: one message, nothing allocated."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from rlhf_cli import main
from stages.checkpoint.states import read_about
from stages.checkpoint.tensors import save_tensors
from stages.errors import CheckpointError
from stages.knobs import as_dict
from stages.measuring_config import STAGES
from stages.models.adapter_files import check_adapter_header
from stages.models.roles import save_adapter
from stages.recipe import damaged_knob, resolve
from tests.commands import SHORT, done, refused, rlhf
from tests.marks import full
from tests.parts import random_adapter, random_head
from tests.test_bad_input import heavy

DEEP = json.loads("[" * 200 + "]" * 200)
HUGE = 10**9
STEP = ("--max-steps", 1, "--batch-size", 4, "--limit-rows", 12, "--samples", 0)


def relist(folder):
    """Write the digests of a checkpoint's files anew, as somebody who edits them would."""
    stored = json.loads((folder / "checkpoint.json").read_text())
    stored["files"] = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in stored["files"]}
    (folder / "checkpoint.json").write_text(json.dumps(stored))


def edited(folder, place, name, **keys):
    """A copy of a checkpoint with keys of one JSON file replaced; `config__x` is a key of `config`."""
    shutil.copytree(folder, place)
    content = json.loads((place / name).read_text())
    for key, value in keys.items():
        outer, _, inner = key.partition("__")
        if inner:
            content[outer][inner] = value
        else:
            content[outer] = value
    (place / name).write_text(json.dumps(content))
    relist(place)
    return place


@pytest.mark.parametrize(
    "keys",
    [
        {"r": HUGE}, {"r": 0}, {"r": "4"}, {"lora_alpha": 0}, {"lora_alpha": float("nan")}, {"more": DEEP},
        *full(
            {"r": -4}, {"r": 4.5}, {"r": None}, {"r": True}, {"r": DEEP}, {"lora_alpha": -1}, {"lora_alpha": 1e308},
            {"lora_alpha": "32"}, {"lora_alpha": None}, {"lora_alpha": float("inf")}, {"lora_alpha": 10**400},
        ),
    ],
)  # fmt: skip
def test_an_adapter_config_of_absurd_numbers_is_refused(chain, tmp_path, keys):
    folder = edited(chain().sft, tmp_path / "sft", "adapter_config.json", **keys)
    line = ("sample", "--model", folder, "--dataset", chain().prompts, "--output", tmp_path / "x.jsonl", *SHORT)
    said = refused(*line)
    assert "adapter_config.json cannot be read" in said and "train the checkpoint again" in said
    assert refused("reward", "--model", folder, "--dataset", chain().comparisons, "--output", tmp_path / "y", *STEP)


@pytest.mark.parametrize(
    ("keys", "at"),
    [
        ({"steps": -1}, "`steps`"),
        ({"steps": 10**30}, "`steps`"),
        ({"steps": "3"}, "`steps`"),
        ({"seconds": -1}, "`seconds`"),
        ({"seconds": 1e999}, "is no number"),
        ({"stop_token_ids": [-1]}, "`stop_token_ids`"),
        ({"stop_token_ids": [2, 10**30]}, "`stop_token_ids`"),
        ({"stop_token_ids": ["2"]}, "`stop_token_ids`"),
        ({"stop_token_ids": [300_000]}, "there is no token 300000"),
        ({"config__lora_rank": HUGE}, "`config.lora_rank`"),
        ({"config__temperature": "warm"}, "`config.temperature`"),
        ({"config__max_response_tokens": HUGE}, "`config.max_response_tokens`"),
        ({"config__kl_coef": float("nan")}, "NaN is no number"),
        ({"config__kl_coef": "0.1"}, "`config.kl_coef`"),
        ({"config__lora_targets": "q_proj"}, "`config.lora_targets`"),
        ({"metrics": DEEP}, "nested too deeply"),
        ({"inputs": {"dataset": 3}}, "`inputs`"),
        ({"format_version": 0}, "is not a manifest"),
    ],
)
def test_a_manifest_of_absurd_numbers_is_refused(chain, tmp_path, keys, at):
    folder = edited(chain().ppo, tmp_path / "ppo", "checkpoint.json", **keys)
    line = ("sample", "--model", folder, "--dataset", chain().prompts, "--output", tmp_path / "x.jsonl", *SHORT)
    assert at in refused(*line) and not (tmp_path / "x.jsonl").exists()


def test_a_place_with_a_nul_is_refused(chain, tmp_path):
    shutil.copytree(chain().sft, tmp_path / "sft")
    stored = json.loads((tmp_path / "sft" / "checkpoint.json").read_text())
    stored["base"]["path"] = "a\0b"
    (tmp_path / "sft" / "checkpoint.json").write_text(json.dumps(stored))
    line = ("sample", "--model", tmp_path / "sft", "--dataset", chain().prompts, "--output", tmp_path / "x.jsonl")
    assert "`base`" in refused(*line, *SHORT)


def without(end):
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(f"0.self_attn.q_proj.{end}")}


def with_another(end, *shape):
    import torch

    return lambda tensors: tensors | {f"base_model.model.model.layers.0.self_attn.q_proj.{end}": torch.zeros(*shape)}


@pytest.mark.parametrize("folder", ["", "critic"])
@pytest.mark.parametrize(
    ("keys", "change", "says"),
    [
        ({"r": 8}, dict, "lora_A [4, 48], lora_B [32, 4]; with r 8 and lora of adapter_config.json, this base needs"),
        ({"use_dora": True}, dict, "this base needs lora_A [4, 48], lora_B [32, 4], lora_magnitude_vector [32]"),
        ({}, with_another("lora_magnitude_vector", 32), "are lora_A [4, 32], lora_B [32, 4], lora_magnitude_vector"),
        ({}, without("lora_A.weight"), "model.layers.0.self_attn.q_proj are lora_B [32, 4]; with r 4 and lora"),
        ({}, without("lora_B.weight"), "model.layers.0.self_attn.q_proj are lora_A [4, 32]; with r 4 and lora"),
        ({}, with_another("lora_A.weight", 4, 31), "lora_A [4, 31], lora_B [32, 4]"),
        ({}, with_another("lora_B.weight", 33, 4), "lora_A [4, 32], lora_B [33, 4]"),
        ({}, with_another("lora_A.weight", 4), "are lora_A [4], lora_B"),
        ({}, lambda tensors: {}, "holds no weights of LoRA"),
    ],
)
def test_an_adapter_of_other_shapes_than_its_config_is_refused_early(
    chain, tmp_path, monkeypatch, folder, keys, change, says
):
    from safetensors.torch import load_file

    place = edited(chain().ppo, tmp_path / "ppo", f"{folder}/adapter_config.json".lstrip("/"), **keys)
    file = place / folder / "adapter_model.safetensors"
    save_tensors(file, change(load_file(file)))
    relist(place)
    monkeypatch.setattr(main, "load", heavy)
    line = ("ppo", "--model", place, "--reward", chain().reward, "--dataset", chain().prompts, *SHORT)
    said = refused(*line, "--output", tmp_path / "x")
    assert f"error: {file}: " in said and says in said and "copy the checkpoint again" in said


@pytest.mark.parametrize("architecture", ["gpt2", *full("gpt_neox", "gemma3", "qwen3", "llama-tied")])
def test_adapters_as_they_are_stored_have_the_shapes_of_their_base(model_folder, open_tiny, tmp_path, architecture):
    for number, lora_type in enumerate(("lora", "dora")):
        base = open_tiny(architecture)
        adapter = random_adapter(base, 1, lora_type=lora_type)
        save_adapter(tmp_path / str(number), base, adapter, random_head(base.width, 1))
        check_adapter_header(tmp_path / str(number), model_folder(architecture), 4, lora_type)
        with pytest.raises(CheckpointError, match="with r 5"):
            check_adapter_header(tmp_path / str(number), model_folder(architecture), 5, lora_type)


@pytest.mark.parametrize("shape", [(4, 8), *full(((10**6,),), ((0,),), ((),))])
def test_a_head_of_another_shape_is_refused(chain, tmp_path, shape):
    import torch

    shutil.copytree(chain().reward, tmp_path / "reward")
    save_tensors(tmp_path / "reward" / "head.safetensors", {"weight": torch.zeros(shape), "bias": torch.zeros(())})
    relist(tmp_path / "reward")
    line = ("evaluate", "--model", chain().sft, "--dataset", chain().prompts, "--reward", tmp_path / "reward", *SHORT)
    assert "the scalar head's weights do not fit the base" in refused(*line)


# --- a run that is not finished -----------------------------------------------------------------------------------


@pytest.fixture
def begun(chain, tmp_path):
    """An unfinished run of three steps, with its state after the third, and the command that made it."""
    out = tmp_path / "out"
    line = ["sft", "--model", chain().base, "--dataset", chain().demonstrations, "--output", out, "--max-steps", 3]
    line += ["--batch-size", 4, "--lora-rank", 4, "--samples", 0, "--limit-rows", 12, "--keep-state", "--save-every", 1]
    done(*line)
    stored = json.loads((out / "checkpoint.json").read_text())
    (state,) = list((out / "state").glob("step-000003"))
    owner = json.loads((state / "state.json").read_text())["content"]["run"]
    (out / "checkpoint.json").unlink()
    record = {"format_version": 1, "id": owner, **{key: stored[key] for key in ("stage", "config", "inputs")}}
    (out / "run.json").write_text(json.dumps(record))
    return out, line


def change(path, change_content):
    content = json.loads(path.read_text())
    change_content(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", "many"), *full(("lora_rank", HUGE), ("max_steps", -3), ("max_steps", "3"), ("seed", 1e308))],
)
def test_a_run_of_absurd_choices_is_damaged(begun, key, value):
    out, line = begun
    change(out / "run.json", lambda content: content["config"].update({key: value}))
    said = refused(*line)
    assert f"`run.json` is damaged at `config.{key}`" in said and "--overwrite" in said
    assert "damaged at config." in refused("evaluate", *line[1:5], "--also", out / "state" / "step-000003")
    assert rlhf(*line, "--overwrite").code == 0


@pytest.mark.full
def test_nested_json_in_a_run_is_somebody_elses(begun):
    out, line = begun
    change(out / "run.json", lambda content: content["config"].update(model=DEEP))
    assert "does not hold an rlhf run" in refused(*line)


def redigested(state, change_content):
    """Change what a state says and write its digest anew."""

    def again(stored):
        change_content(stored["content"])
        text = json.dumps(stored["content"], sort_keys=True).encode()
        stored["sha256"] = hashlib.sha256(text).hexdigest()

    change(state / "state.json", again)


@pytest.mark.full
@pytest.mark.parametrize("step", [2, -1, HUGE, "3", 3.0, None])
def test_a_state_of_another_step_than_its_name_is_damaged(begun, step):
    out, line = begun
    redigested(out / "state" / "step-000003", lambda content: content.update(step=step))
    with pytest.raises(CheckpointError, match="is not what was saved"):
        read_about(out / "state" / "step-000003")
    ended = done(*line)
    assert "step-000003 is damaged and was skipped" in ended.stderr and "resuming after step 2" in ended.stderr


@pytest.mark.parametrize(
    "facts", [{}, *full({"updates.policy": "x", "bad_steps": 0}, {"updates.policy": 1, "bad_steps": None})]
)
def test_a_state_of_another_runs_facts_is_refused(begun, facts):
    out, line = begun
    for place in (out / "state").glob("step-*"):
        redigested(place, lambda content: content.update(facts=facts))
    assert "the saved state does not fit this run" in refused(*line)


@pytest.mark.full
def test_a_state_of_another_runs_weights_is_refused(begun):
    import torch

    out, line = begun
    for place in (out / "state").glob("step-*"):
        save_tensors(
            place / "state.safetensors", {f"policy.{n}": torch.zeros(7) for n in ("weights", "mean", "square")}
        )
        digest = hashlib.sha256((place / "state.safetensors").read_bytes()).hexdigest()
        redigested(place, lambda content, digest=digest: content.update(tensors=digest))
    assert "the saved state does not fit this run" in refused(*line)


# --- what is sound ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_every_config_that_a_stage_stores_is_sound(stage):
    cls = STAGES[stage]
    given = {
        "model": "m",
        "dataset": "d",
        "output": "o",
        "reward": ["r"],
        "lora_targets": "a,b",
        "micro_batch_size": "2",
    }
    given |= {
        "max_steps": "3",
        "best_of": "4" if stage == "sample" else "1,2",
        "map": "prompt=a",
        "gradient_checkpointing": "true",
    }
    names = cls.__dataclass_fields__
    config = resolve(cls, {}, {name: value for name, value in given.items() if name in names})
    assert damaged_knob(stage, json.loads(json.dumps(as_dict(config)))) == ""


def test_knobs_and_choices_of_other_versions_are_passed_over():
    assert damaged_knob("ppo", {"stop_on": ["a condition of later"], "lr_schedule": "wavy", "later": [1]}) == ""
    assert damaged_knob("a stage of later", {"seed": "x"}) == ""
    assert damaged_knob("ppo", {"seed": "x"}) == "seed"
