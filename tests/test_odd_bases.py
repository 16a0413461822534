"""Commands on bases and checkpoints that are not what they should be: one message, or the numbers of the plain base."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from stages.checkpoint.tensors import load_tensors
from stages.training import publishing
from tests.commands import SHORT, done, refused, rlhf, write_data
from tests.marks import full
from tests.parts import publish_checkpoint, random_adapter, random_head
from tests.test_models_base import open_folder, save_model
from tests.test_models_checks import change_config, change_weight, with_adapter

STEPS = ("--batch-size", 8, "--lora-rank", 4, "--samples", 1, "--eval-fraction", 0.2, "--limit-rows", 40)


@pytest.fixture
def data(tmp_path):
    write_data(tmp_path)
    (tmp_path / "score.py").write_text(
        "def score(prompts, responses, **columns):\n    return [0.5 for _ in responses]\n"
    )
    return tmp_path


def training(stage: str, data, base, output, *more) -> tuple:
    rows = {"sft": "demonstrations", "ppo": "prompts"}.get(stage, "comparisons")
    ppo = ("--reward", f"{data / 'score.py'}:score", *SHORT) if stage == "ppo" else ()
    reward = ("--sft-samples", 0) if stage == "reward" else ()
    line = (stage, "--model", base, "--dataset", data / f"{rows}.jsonl", "--output", output)
    return (*line, *STEPS, *ppo, *reward, *more)


# --- an adapter of PEFT in the base's folder


@pytest.mark.full
@pytest.mark.parametrize(("architecture", "stages"), [("llama", ("reward", "dpo", "ppo")), ("gpt2", ())])
def test_an_adapter_beside_the_base_is_left_out_of_every_command(model_folder, data, architecture, stages):
    """The same weights, responses and merged model as on a base without it, and one warning each time."""
    base = shutil.copytree(model_folder(architecture), data / "base")
    prompts = ("--dataset", data / "prompts.jsonl", "--limit-rows", 6)

    def all_of_it(name):
        out = data / name
        sft = training("sft", data, base, out / "sft", "--max-steps", 2)
        ended = [done(*sft)]
        ended.append(done("sample", "--model", base, *prompts, *SHORT, "--output", out / "of_base.jsonl"))
        ended.append(done("sample", "--model", out / "sft", *prompts, *SHORT, "--output", out / "of_sft.jsonl"))
        ended.append(done("export", "--model", out / "sft", "--output", out / "merged"))
        ended.append(done("evaluate", "--model", out / "sft", *prompts, *SHORT, "--output", out / "evaluate.json"))
        for stage in stages:
            ended.append(done(*training(stage, data, out / "sft", out / stage, "--max-steps", 1)))
        return ended

    before = all_of_it("plain")
    assert not any("adapter of PEFT" in ended.stderr for ended in before)
    with_adapter(base)
    after = all_of_it("beside")
    assert all(ended.stderr.count("also holds an adapter of PEFT") == 1 for ended in after)
    for name in ("of_base.jsonl", "of_sft.jsonl"):
        assert (data / "plain" / name).read_text() == (data / "beside" / name).read_text()
    for name in ("sft", *stages, "merged"):
        file = "model.safetensors" if name == "merged" else "adapter_model.safetensors"
        mine, theirs = (load_tensors(data / run / name / file) for run in ("plain", "beside"))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.full
def test_a_run_goes_on_after_an_adapter_was_put_beside_its_base(model_folder, data):
    base = shutil.copytree(model_folder("llama"), data / "base")
    line = training("sft", data, base, data / "out", "--keep-state", "--lr-schedule", "constant")
    straight = [data / "straight" if part == data / "out" else part for part in line]
    done(*straight, "--max-steps", 3)
    done(*line, "--max-steps", 2)
    with_adapter(base)
    assert "resuming after step 2" in done(*line, "--max-steps", 3).stderr
    mine, theirs = (load_tensors(data / run / "adapter_model.safetensors") for run in ("out", "straight"))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


# --- recurrent models


@pytest.mark.full
def test_a_recurrent_model_goes_all_the_way(data):
    import transformers as t

    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}
    base = save_model(data / "base", t.MambaConfig(**shape, eos_token_id=2))
    done(*training("sft", data, base, data / "sft", "--max-steps", 2))
    done(*training("ppo", data, data / "sft", data / "ppo", "--max-steps", 1))
    lines = [json.loads(line) for line in (data / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["sampling_mismatch"] < 1e-3
    done("export", "--model", data / "ppo", "--output", data / "merged")


# --- divergence


@pytest.mark.parametrize("stage", ["sft", *full("reward", "dpo", "ppo")])
def test_divergence_is_named_and_ends_with_3(model_folder, data, stage):
    line = training(stage, data, model_folder("llama"), data / "out", "--max-steps", 2, "--save-every", 1)
    ended = rlhf(*line, "--learning-rate", 1e30)
    assert (ended.code, ended.stdout) == (3, ""), ended.stderr
    assert "stopped at step 1: training diverged" in ended.stderr and "lower --learning-rate" in ended.stderr
    assert "Traceback" not in ended.stderr and not (data / "out" / "checkpoint.json").exists()
    states = data / "out" / "state"
    assert not (states / "step-000001").exists() and not (states / "step-000002").exists()


def test_weights_that_are_finite_but_give_no_numbers_are_not_published(model_folder, data, monkeypatch):
    """Without held-out rows nothing is measured before publishing."""
    line = training("sft", data, model_folder("llama"), data / "out", "--max-steps", 1, "--eval-fraction", 0)

    def spoiled(roles, role, step):
        for parameter in roles.parameters(role):
            parameter.data.fill_(1e18)
        return whole(roles, role, step)

    whole = publishing._stop_if_states_overflow
    monkeypatch.setattr(publishing, "_stop_if_states_overflow", spoiled)
    ended = rlhf(*line)
    assert ended.code == 3 and "states that are not finite" in ended.stderr, ended.stderr
    assert not (data / "out" / "checkpoint.json").exists()


@pytest.mark.full
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_a_run_in_which_no_gradient_was_finite_is_not_published(model_folder, data, monkeypatch, stage):
    from stages.training.optimizer import AdamW

    monkeypatch.setattr("stages.training.progress.clip", lambda *_: float("nan"))
    stepped = []
    monkeypatch.setattr(AdamW, "step", lambda *_: stepped.append(1))
    more = ("--stop-on", "none") if stage == "ppo" else ()
    ended = rlhf(*training(stage, data, model_folder("llama"), data / "out", "--max-steps", 2, *more))
    assert ended.code == 3 and "no gradient was finite" in ended.stderr and not stepped, ended.stderr
    assert not (data / "out" / "checkpoint.json").exists()


# --- numbers that are none


@pytest.mark.full
def test_a_checkpoint_that_holds_no_numbers_is_refused_by_every_command(model_folder, data):
    base = open_folder(model_folder("llama"))
    adapter, head = random_adapter(base, 1), random_head(base.width, 2)
    whole = publish_checkpoint(data / "whole", base, "sft", adapter)
    list(adapter.parameters())[1].data[0, 0] = float("nan")
    broken = publish_checkpoint(data / "broken", base, "sft", adapter)
    reward = publish_checkpoint(data / "reward", base, "reward", adapter, head=head)
    head.bias.data.fill_(float("inf"))
    headless = publish_checkpoint(data / "headless", base, "reward", random_adapter(base, 1), head=head)
    scores = f"{data / 'score.py'}:score"
    prompts, force = ("--dataset", data / "prompts.jsonl", "--limit-rows", 12), ("--force",)
    lines = [
        ("sample", "--model", broken, *prompts, *SHORT, "--output", data / "s.jsonl"),
        ("evaluate", "--model", broken, *prompts, *SHORT),
        ("evaluate", "--model", whole, "--against", broken, "--reward", scores, *prompts, *SHORT),
        ("evaluate", "--model", whole, "--reward", reward, *prompts, *SHORT),
        ("evaluate", "--model", whole, "--reward", headless, *prompts, *SHORT),
        ("export", "--model", broken, "--output", data / "e"),
        ("export", "--model", headless, "--output", data / "e"),
        *(
            training(stage, data, broken, data / f"{stage}-on-it", "--max-steps", 1)
            for stage in ("sft", "reward", "dpo", "ppo")
        ),
        ("ppo", "--model", whole, "--reward", headless, *prompts, *SHORT, "--output", data / "p", *force),
    ]
    for line in lines:
        assert "are not finite numbers" in refused(*line), line
        assert not any((data / name).exists() for name in ("s.jsonl", "e")), line


def test_a_base_that_holds_no_numbers_is_refused_by_every_command(model_folder, data):
    base = shutil.copytree(model_folder("llama"), data / "base")
    change_weight(base, "model.layers.0.mlp.up_proj.weight", lambda weight: weight * float("nan"))
    prompts = ("--dataset", data / "prompts.jsonl", "--limit-rows", 6)
    for line in (
        training("sft", data, base, data / "sft", "--max-steps", 1),
        training("ppo", data, base, data / "ppo", "--max-steps", 1),
        ("sample", "--model", base, *prompts, *SHORT, "--output", data / "s.jsonl"),
        ("evaluate", "--model", base, *prompts, *SHORT),
    ):
        said = refused(*line)
        assert "model.layers.0.mlp.up_proj.weight" in said and "padded" not in said
    assert not (data / "sft").exists() and not (data / "ppo").exists()


# --- the right diagnosis


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_size": "abc"}, "Field 'hidden_size' expected int"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"model_type": "no-such-model"}, "model type `no-such-model`"),
        ({"hidden_act": "foo"}, "KeyError 'foo'"),
    ],
)
def test_a_bad_config_is_not_put_down_to_the_tokenizer(model_folder, data, values, said):
    base = shutil.copytree(model_folder("llama"), data / "base")
    change_config(base, **values)
    message = refused(*training("sft", data, base, data / "out", "--max-steps", 1))
    assert "its config.json describes no causal language model" in message and said in message
    assert "tokenizer" not in message and str(base) in message


def test_a_base_in_quantised_weights_is_one_clear_message(model_folder, data):
    base = shutil.copytree(model_folder("llama"), data / "base")
    change_config(base, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    for more in ((), ("--dry-run",)):
        said = refused(*training("sft", data, base, data / "out", "--max-steps", 1), *more)
        assert "quantised weights (bitsandbytes)" in said and "--load-in-4bit" in said
