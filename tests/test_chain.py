"""sft -> reward -> ppo -> evaluate -> sample -> export on tiny models: what is left on disk and on the terminal."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from stages.checkpoint.digests import base_digest, tokenizer_digest
from tests.commands import (
    SHORT,
    SMALL,
    comparisons,
    contents,
    demonstrations,
    done,
    lines_of,
    manifest,
    prompts,
    result,
    rlhf,
    weights,
)
from tests.marks import full

ARCHITECTURES = ("llama", *full("gpt2", "gpt_neox", "qwen2", "gemma3"))
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
COMMON = {"checkpoint.json", "config.yaml", "metrics.jsonl", *ADAPTER, *TOKENIZER}
FILES = {
    "sft": COMMON | {"samples.jsonl"},
    "reward": COMMON | {"head.safetensors", "report.json"},
    "ppo": COMMON | {"samples.jsonl"} | {f"critic/{name}" for name in (*ADAPTER, "head.safetensors")},
}
EVERYWHERE = {"step", "epoch", "tokens", "seconds", "lr", "grad_norm", "loss", "memory_gb"}
EVERYWHERE |= {"tokens_per_second", "samples_per_second"}
OF_PPO = {"reward_score", "reward_kl", "reward_total", "kl_k3", "kl_coef", "policy_loss", "value_loss", "entropy"}
OF_PPO |= {"approx_kl", "clip_fraction", "ratio_max", "explained_variance", "response_length", "eos_rate"}
OF_PPO |= {"truncated_rate", "duplicate_rate", "repetition_rate", "shared_response_rate", "score_length_corr"}
OF_PPO |= {"time_rollout", "time_experience", "time_update"}
METRICS = {
    "sft": EVERYWHERE,
    "reward": EVERYWHERE | {"accuracy", "margin", "score_chosen", "score_rejected"},
    "ppo": EVERYWHERE | OF_PPO,
}
EVALUATED = {
    "sft": {"eval_loss", "eval_perplexity"},
    "reward": {"eval_accuracy", "eval_log_loss", "eval_margin_mean", "eval_score_length_corr"},
    "ppo": {"eval_score", "eval_kl", "eval_length", "eval_eos_rate"},
}


@EVERY
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_checkpoint_holds_these_files_and_no_others(chain, architecture, stage):
    folder = chain(architecture).folder / stage
    found = contents(folder)
    assert found.keys() == FILES[stage]
    assert manifest(folder)["files"] == {name: digest for name, digest in found.items() if name != "checkpoint.json"}
    assert not [path for path in folder.rglob("*") if path.is_dir() and path.name != "critic"]


@EVERY
def test_every_checkpoint_names_its_base_and_its_parents(chain, architecture):
    found = chain(architecture)
    base = {"name": str(found.base), "path": str(found.base), "digest": base_digest(found.base)}
    for stage, parents in (("sft", {}), ("reward", {"model": "sft"}), ("ppo", {"model": "sft", "reward": "reward"})):
        about = manifest(found.folder / stage)
        assert about["stage"] == stage and about["format_version"] == 1
        assert {k: about["base"][k] for k in base} == base
        assert (found.folder / stage / about["base"]["relative"]).samefile(found.base)
        assert {p["role"]: p["stage"] for p in about["parents"]} == parents
        for parent in about["parents"]:
            folder = found.folder / parent["stage"]
            assert parent["path"] == str(folder) and parent["relative"] == f"../{parent['stage']}"
            assert parent["digest"] == hashlib.sha256((folder / "checkpoint.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("architecture", ["llama", *full("gpt2", "qwen2")])
def test_every_checkpoint_has_the_tokenizer_of_its_base(chain, architecture):
    found = chain(architecture)
    for stage in ("sft", "reward", "ppo"):
        assert manifest(found.folder / stage)["tokenizer_digest"] == tokenizer_digest(found.base)


@EVERY
@pytest.mark.parametrize(("stage", "data"), [("sft", "demonstrations"), ("reward", "comparisons"), ("ppo", "prompts")])
def test_a_manifest_says_what_was_done_with_what(chain, architecture, stage, data):
    found = chain(architecture)
    about, file = manifest(found.folder / stage), found.folder / f"{data}.jsonl"
    assert about["datasets"]["train"]["digest"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert about["datasets"]["train"]["rows"] == len(lines_of(file))
    assert (about["steps"], about["device"], about["dtype"]) == (3, "cpu", "float32")
    assert (about["config"]["lora_rank"], about["config"]["max_steps"], about["config"]["seed"]) == (4, 3, 0)
    assert about["versions"].keys() >= {"python", "rlhf", "torch", "transformers"}
    assert about["throughput"]["tokens_per_second"] > 0 and about["throughput"]["samples_per_second"] > 0
    assert about["stop_token_ids"] == [2] and about["created"].endswith("+00:00")


@EVERY
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_metrics_have_every_step_once_under_the_documented_names(chain, architecture, stage):
    lines = lines_of(chain(architecture).folder / stage / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[0].keys() == {"step"} | EVALUATED[stage]
    for line in lines[1:]:
        assert line.keys() >= METRICS[stage] and all(isinstance(line[name], (int, float)) for name in METRICS[stage])
    assert lines[3].keys() >= EVALUATED[stage] and not lines[2].keys() & EVALUATED[stage]


@EVERY
def test_ppo_begins_at_the_reference_and_its_first_minibatch_is_on_policy(chain, architecture):
    """Checks 1 and 2: no KL before the first update; ratio 1 in the first minibatch of each."""
    lines = lines_of(chain(architecture).ppo / "metrics.jsonl")
    assert lines[0]["eval_kl"] == 0.0
    assert lines[1]["reward_kl"] == 0.0 and lines[1]["kl_k3"] == 0.0
    for line in lines[1:]:
        assert abs(line["ratio_first"] - 1) < 1e-5
        assert line["reward_total"] != line["reward_score"]  # six tokens never end: the penalty is charged


@EVERY
def test_samples_hold_prompts_and_what_was_said(chain, architecture):
    found = chain(architecture)
    for stage in ("sft", "ppo"):
        rows = lines_of(found.folder / stage / "samples.jsonl")
        assert [row["step"] for row in rows] == [0, 0, 3, 3]
        assert all(row["prompt"] and isinstance(row["response"], str) and ".jsonl:" in row["where"] for row in rows)
    rows = lines_of(found.folder / "samples.jsonl")
    assert len(rows) == 64 and all(
        row.keys() == {"prompt", "response", "index", "ended", "tokens", "answer"} for row in rows
    )
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in prompts()]
    assert all(1 <= row["tokens"] <= 6 and (row["ended"] or row["tokens"] == 6) for row in rows)


@EVERY
def test_the_evaluation_compares_both_on_the_same_prompts(chain, architecture):
    found = json.loads((chain(architecture).folder / "evaluate.json").read_text())
    assert found["prompts"] == 16 and found["temperature"] == 0.7 and len(found["examples"]) == 3
    assert found["against"]["kl"] == 0.0 and found["policy"]["kl"] != 0.0
    assert found["win_rate"]["reward"]["n"] == 16
    for side in ("policy", "against"):
        assert found[side].keys() == {
            *("score", "score_error", "kl", "kl_error", "length", "eos_rate"),
            *("duplicate_rate", "distinct_1", "distinct_2"),
        }


@EVERY
def test_an_exported_model_is_the_checkpoint(chain, architecture):
    found = chain(architecture)
    for folder in ("exported", "exported_reward"):
        names = contents(found.folder / folder).keys()
        assert {"config.json", "model.safetensors", *TOKENIZER} <= names and "checkpoint.json" not in names
    assert "AutoModelForCausalLM" in found.ended["export"].stdout
    assert "AutoModelForSequenceClassification" in found.ended["export reward"].stdout


# --- what the terminal says


def test_the_last_lines_name_the_output_and_the_next_command(chain):
    found = chain()
    sft, reward, ppo = found.sft, found.reward, found.ppo
    closing = {
        "sft": [f"wrote {sft}", f"next: rlhf reward --model {sft} --dataset COMPARISONS --output DIR"],
        "reward": [
            f"wrote {reward}",
            f"next: rlhf ppo --model {sft} --reward {reward} --dataset PROMPTS --output DIR",
        ],
        "ppo": [
            f"wrote {ppo}",
            f"next: rlhf evaluate --model {ppo} --against {sft} --reward {reward} --dataset PROMPTS",
            f"next: rlhf export --model {ppo} --output DIR",
        ],
        "sample": [f"wrote {found.folder}/samples.jsonl"],
        "export": [
            f"wrote {found.folder}/exported",
            f"next: transformers.AutoModelForCausalLM.from_pretrained('{found.folder}/exported')",
        ],
    }
    for command, lines in closing.items():
        assert found.ended[command].stdout.splitlines()[-len(lines) :] == lines
    assert f"wrote {found.folder}/evaluate.json" in found.ended["evaluate"].stdout


def test_progress_goes_to_stderr_and_results_to_stdout(chain):
    found = chain()
    for stage in ("sft", "reward", "ppo"):
        ended = found.ended[stage]
        assert f"{stage} 3/3" in ended.stderr and f"{stage} 3/3" not in ended.stdout
        warnings = [line for line in ended.stderr.splitlines() if "warning" in line]
        # SFT says that a random base is worse than a uniform guess, PPO that responses of six tokens never end.
        said = {"sft": ["loss before training", "loss after training"], "ppo": ["no-eos: 100%"]}
        expected = said.get(stage, [])
        assert len(warnings) == len(expected)
        assert all(words in line for words, line in zip(expected, warnings, strict=True))
        assert "\x1b" not in ended.stderr + ended.stdout
    held_out = manifest(found.sft)["metrics"]["held_out_rows"]
    assert 20 < held_out < 80 and f"{256 - held_out} demonstrations, 3 steps, " in found.ended["sft"].stderr


def test_the_next_command_can_be_run_as_it_is_told(chain, tmp_path):
    """Every `next:` line, with its words in capitals replaced, is a command line that passes every check."""
    found = chain()
    places = {"COMPARISONS": found.comparisons, "PROMPTS": found.prompts, "DIR": tmp_path / "x"}
    told = [line for name in ("sft", "reward", "ppo") for line in found.ended[name].stdout.splitlines()]
    told = [line.removeprefix("next: rlhf ").split() for line in told if line.startswith("next: rlhf ")]
    assert len(told) == 4
    for words in told:
        short = SHORT if words[0] == "ppo" else ()  # the tiny base's context is no longer than a response by default
        ended = rlhf(*(places.get(word, word) for word in words), *short, "--dry-run")
        assert ended.code == 0 and "dry run: nothing was written" in ended.stdout, ended.stderr
    assert os.listdir(tmp_path) == []


def test_the_same_command_again_says_that_it_is_done_and_touches_nothing(chain):
    found = chain()
    before = {path: path.stat().st_mtime_ns for path in found.sft.rglob("*")}
    arguments = ["sft", "--model", found.base, "--dataset", found.demonstrations, "--output", found.sft]
    again = result(*arguments, *SMALL, "--learning-rate", "1e-4")
    assert again["status"] == "already done" and again["output"] == str(found.sft)
    assert again["metrics"] == manifest(found.sft)["metrics"] and again["steps"] == 3
    assert {path: path.stat().st_mtime_ns for path in found.sft.rglob("*")} == before


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_finished_command_again_prints_what_it_printed_at_its_end(chain, stage):
    found = chain()
    again = done(stage, "--config", found.folder / stage / "config.yaml")
    assert again.stdout == found.ended[stage].stdout.replace("\nwrote ", "\nalready done: ")


def test_the_written_config_is_a_recipe_of_the_same_run(chain):
    found = chain()
    for stage in ("sft", "reward", "ppo"):
        ended = result(stage, "--config", found.folder / stage / "config.yaml")
        assert ended["status"] == "already done"


def test_report_tells_the_run(chain):
    found = chain()
    ended = rlhf("report", found.folder)
    assert ended.code == 0
    assert "sft: loss per token" in ended.stdout and "wins by score" in ended.stdout
    accuracy = manifest(found.reward)["metrics"]["accuracy"]
    assert f"{100 * accuracy:.1f} %" in ended.stdout


# --- other precisions


@pytest.mark.full
def test_every_stage_runs_on_a_base_in_bfloat16(chain, tmp_path):
    """The base is rounded, adapters and heads stay fp32, and the first minibatch is still on policy."""
    found, half = chain(), ("--dtype", "bfloat16", "--gradient-checkpointing", "true", *SMALL)
    sft, reward, ppo = (tmp_path / name for name in ("sft", "reward", "ppo"))
    done("sft", "--model", found.base, "--dataset", found.demonstrations, "--output", sft, *half)
    done("reward", "--model", sft, "--dataset", found.comparisons, "--output", reward, *half)
    done(
        "ppo", "--model", sft, "--reward", reward, "--dataset", found.prompts, "--output", ppo, *half, *SHORT, "--force"
    )
    for folder in (sft, reward, ppo):
        assert manifest(folder)["dtype"] == "bfloat16"
        assert all(str(tensor.dtype) == "torch.float32" for tensor in weights(folder).values())
    lines = lines_of(ppo / "metrics.jsonl")
    assert [line["ratio_first"] for line in lines[1:]] == [1.0, 1.0, 1.0] and lines[0]["eval_kl"] == 0.0


# --- conversations


@pytest.mark.full
def test_conversations_go_through_every_stage(chain):
    found = chain(chat=True)
    template = json.loads((found.base / "tokenizer_config.json").read_text()).get("chat_template")
    for stage in ("sft", "reward", "ppo"):
        assert contents(found.folder / stage).keys() - {"chat_template.jinja"} == FILES[stage]
        assert manifest(found.folder / stage)["stop_token_ids"] == [2, 6]  # <eos>, and <|end|> of the template
        kept = found.folder / stage / "chat_template.jinja"
        assert (
            kept.exists()
            or json.loads((found.folder / stage / "tokenizer_config.json").read_text())["chat_template"] == template
        )
    rows = lines_of(found.folder / "samples.jsonl")
    assert rows[0]["prompt"] == [{"role": "user", "content": "red six"}]
    assert "<|assistant|>" not in "".join(row["response"] for row in rows)


def test_the_data_of_the_chain_is_what_its_docstrings_say():
    assert (len(demonstrations()), len(comparisons()), len(prompts())) == (256, 256, 64)
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in comparisons()]
    assert 0.3 < sum(longer) / len(longer) < 0.7
    assert all("thank you" in row["chosen"] and "thank" not in row["rejected"] for row in comparisons())
