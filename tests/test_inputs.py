"""stages/inputs/: what a command works on, opened and checked without torch and without writing anything."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest

from stages.checkpoint.manifest import checkpoint_digest
from stages.config import PpoConfig, RewardConfig, SftConfig
from stages.data.rows import Prompt
from stages.data.splits import is_held_out, split_held_out
from stages.errors import DatasetError, ModelError, OutputError
from stages.inputs import open_inputs
from stages.measuring_config import EvaluateConfig, ExportConfig, SampleConfig
from stages.models.candidates import parent_of
from stages.training.opening import Encoded
from tests.commands import contents, lines_of, refused, result
from tests.tiny import write_jsonl


def sft(c, place, **knobs) -> SftConfig:
    named = {"model": str(c.base), "dataset": str(c.demonstrations), "output": str(place / "x")}
    return SftConfig(**(named | knobs))


def ppo(c, place, **knobs) -> PpoConfig:
    named = {"model": str(c.sft), "reward": [str(c.reward)], "dataset": str(c.prompts), "output": str(place / "x")}
    return PpoConfig(**(named | {"max_response_tokens": 6} | knobs))


def evaluate(c, **knobs) -> EvaluateConfig:
    return EvaluateConfig(**({"model": str(c.ppo), "dataset": str(c.prompts)} | knobs))


def test_opening_writes_nothing_and_knows_every_digest(chain, tmp_path):
    found = chain()
    before = contents(found.folder)
    inputs = open_inputs("ppo", ppo(found, tmp_path))
    assert inputs.run.inputs == {
        "dataset": hashlib.sha256(found.prompts.read_bytes()).hexdigest(),
        "model": checkpoint_digest(found.sft),
        f"reward {found.reward}": checkpoint_digest(found.reward),
    }
    assert not inputs.done and not inputs.run.resuming and inputs.warnings == ()
    assert contents(found.folder) == before and os.listdir(tmp_path) == []


def test_rows_are_split_by_prompt(chain, tmp_path):
    inputs = open_inputs("sft", sft(chain(), tmp_path, eval_fraction=0.3, eval_limit=50))
    assert len(inputs.held_out) == 50 and inputs.unmeasured > 0
    assert len(inputs.train) + len(inputs.held_out) + inputs.unmeasured == 256
    assert not {row.prompt for row in inputs.train} & {row.prompt for row in inputs.held_out}
    counted = inputs.count_rows(Encoded(inputs.train), Encoded(inputs.held_out))
    left_out = {"skipped_rows": 0, "dropped_long_rows": 0, "cut_rows": 0}
    assert counted == {"used": len(inputs.train), "held_out_rows": 50 + inputs.unmeasured} | left_out
    told = f"{inputs.unmeasured} more rows have held-out prompts: not trained on, nor measured (--eval-limit)"
    assert inputs.notes == (told,) and inputs.warnings == ()
    other = open_inputs("sft", sft(chain(), tmp_path, eval_fraction=0.3, eval_limit=9, seed=5))
    assert other.train == inputs.train and len(other.held_out) == 9
    none = open_inputs("sft", sft(chain(), tmp_path, eval_fraction=0))
    assert len(none.train) == 256 and none.held_out == []


def test_held_out_rows_from_a_file_leave_the_dataset_whole(chain, tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", lines_of(chain().demonstrations)[:9])
    inputs = open_inputs("sft", sft(chain(), tmp_path, eval_dataset=str(held), eval_limit=4))
    assert len(inputs.train) == 256 and [row.where for row in inputs.held_out] == [f"{held}:{n}" for n in (1, 2, 3, 4)]
    assert inputs.run.inputs["eval_dataset"] == hashlib.sha256(held.read_bytes()).hexdigest()


def test_rows_that_were_left_out_are_told(chain, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}, {"prompt": "c", "completion": "d"}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    inputs = open_inputs("sft", sft(chain(), tmp_path, dataset=str(data), skip_bad_rows=True, eval_dataset=str(data)))
    told = f"1 row of {data} cannot be used and was dropped; {data}:2: completion: the text is empty"
    assert inputs.warnings[:2] == (told, told) and len(inputs.train) == 2


def test_an_eval_dataset_that_shares_prompts_with_the_dataset_is_told(chain, tmp_path):
    """As text and as messages; a prompt of the reward model's dataset is named by its row."""
    found = chain()
    mixed = [{"prompt": "nobody asked this"}, {"prompt": [{"role": "user", "content": " red green"}]}]
    held = write_jsonl(tmp_path / "held.jsonl", [*mixed, *lines_of(found.prompts)[:2]])
    told = f"{{}} of 4 rows of --eval-dataset {held} have prompts that are trained on, so their metrics"
    inputs = open_inputs("ppo", ppo(found, tmp_path, eval_dataset=str(held)))
    assert inputs.warnings[-1].startswith(told.format(2)) and inputs.warnings[-1].endswith(f"the first is {held}:3")
    data = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "red green", "chosen": " a", "rejected": " b"}] * 12)
    pairs = write_jsonl(tmp_path / "e.jsonl", [{"prompt": mixed[1]["prompt"], "chosen": "a", "rejected": "b"}])
    config = RewardConfig(model=str(found.sft), dataset=str(data), eval_dataset=str(pairs), output=str(tmp_path / "x"))
    assert open_inputs("reward", config).warnings[0].endswith(f"the first is {pairs}:1")
    apart = write_jsonl(tmp_path / "apart.jsonl", mixed[:1])
    assert open_inputs("ppo", ppo(found, tmp_path, eval_dataset=str(apart))).warnings == ()


def test_ptx_rows_with_held_out_prompts_are_not_trained_on(chain, tmp_path):
    found = chain()
    config = ppo(found, tmp_path, ptx_dataset=str(found.demonstrations), ptx_coef=0.1, eval_fraction=0.2)
    inputs = open_inputs("ppo", config)
    trained = {row.prompt for row in open_inputs("sft", sft(found, tmp_path, eval_fraction=0.2)).train}
    assert {row.prompt for row in inputs.ptx} == trained and len(trained) < 256
    assert not {row.prompt for row in inputs.held_out} & {row.prompt for row in inputs.ptx}
    told = f"{256 - len(trained)} of 256 rows of --ptx-dataset have held-out prompts and are not trained on"
    assert told in inputs.notes


def few_prompts(place) -> tuple[str, list[str]]:
    """A file of 12 prompts of which no hash lies below 1 %, and these, the one that is held out all the same first."""
    texts = [text for text in (f"the cat {n}" for n in range(30)) if not is_held_out(Prompt("f", text), 0.01)][:12]
    (held,) = split_held_out([Prompt("f", text) for text in texts], 0.01, 9)[1]
    texts.sort(key=lambda text: text != held.prompt)
    return str(write_jsonl(place / "few.jsonl", [{"prompt": text} for text in texts])), texts


def test_ptx_rows_with_a_prompt_that_is_held_out_here_alone_are_not_trained_on(chain, tmp_path):
    """The hash of the one prompt held out is not below the fraction: as text and as messages."""
    dataset, texts = few_prompts(tmp_path)
    talk = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": " x"}]
    rows = [{"prompt": talk[:1], "completion": talk[1:]}, *({"prompt": t, "completion": " x"} for t in texts)]
    ptx = str(write_jsonl(tmp_path / "ptx.jsonl", rows))
    inputs = open_inputs("ppo", ppo(chain(), tmp_path, dataset=dataset, ptx_dataset=ptx, eval_fraction=0.01))
    assert [row.prompt for row in inputs.held_out] == texts[:1]
    assert [row.prompt for row in inputs.ptx] == texts[1:]
    assert "2 of 13 rows of --ptx-dataset have held-out prompts and are not trained on" in inputs.notes


def test_a_ptx_dataset_of_held_out_prompts_alone_is_refused(chain, tmp_path):
    dataset, texts = few_prompts(tmp_path)
    ptx = str(write_jsonl(tmp_path / "ptx.jsonl", [{"prompt": texts[0], "completion": " x"}]))
    with pytest.raises(DatasetError) as caught:
        open_inputs("ppo", ppo(chain(), tmp_path, dataset=dataset, ptx_dataset=ptx, eval_fraction=0.01))
    assert caught.value.where == "--ptx-dataset" and "every row's prompt is held out" in caught.value.what
    assert "--eval-fraction" in caught.value.fix


def test_rows_that_other_stages_may_train_on_are_told_once(chain, tmp_path):
    """Few prompts, and one prompt for all rows; not where every held-out prompt's hash lies below the fraction."""
    dataset, texts = few_prompts(tmp_path)
    told = "so another stage may train on rows that are evaluated here; give --eval-dataset to be sure"
    few = open_inputs("ppo", ppo(chain(), tmp_path, dataset=dataset, eval_fraction=0.01)).warnings
    assert sum(told in warning for warning in few) == 1 and few[0].startswith(f"{dataset} has too few prompts")
    one = write_jsonl(tmp_path / "one.jsonl", [{"prompt": texts[0], "completion": f" {n}"} for n in range(60)])
    assert told in open_inputs("sft", sft(chain(), tmp_path, dataset=str(one))).warnings[0]
    assert open_inputs("sft", sft(chain(), tmp_path, dataset=str(one), eval_fraction=0)).warnings == ()
    assert open_inputs("sft", sft(chain(), tmp_path, dataset=str(one), eval_limit=0)).warnings == ()
    assert open_inputs("sft", sft(chain(), tmp_path)).warnings == ()


def test_a_parent_that_was_trained_on_what_is_held_out_here_is_told(chain, tmp_path):
    """The chain held out a fifth of the prompts in every stage."""
    found = chain()
    assert open_inputs("ppo", ppo(found, tmp_path, eval_fraction=0.2)).warnings == ()
    warnings = open_inputs("ppo", ppo(found, tmp_path, eval_fraction=0.3)).warnings
    why = "held out 0.2 of the prompts, this run 0.3: it may have been trained on prompts that are held out here"
    assert warnings == (f"{found.sft} {why}", f"{found.reward} {why}")
    assert open_inputs("ppo", ppo(found, tmp_path, eval_fraction=0)).warnings == ()
    shutil.copytree(found.sft, tmp_path / "old")
    about = json.loads((tmp_path / "old" / "checkpoint.json").read_text())
    del about["versions"]["split"]
    (tmp_path / "old" / "checkpoint.json").write_text(json.dumps(about))
    config = RewardConfig(model=str(tmp_path / "old"), dataset=str(found.comparisons), output=str(tmp_path / "x"))
    assert "was made by an earlier rlhf, which held out other prompts" in open_inputs("reward", config).warnings[0]


@pytest.mark.full
def test_a_run_that_was_begun_with_another_split_does_not_go_on(chain, tmp_path):
    """Neither an unfinished one, nor a finished one to a later end; a finished one is done all the same."""
    found = chain()
    line = ("sft", "--model", found.base, "--dataset", found.demonstrations, "--output", tmp_path / "x")
    line += ("--batch-size", 8, "--lora-rank", 4, "--keep-state")
    result(*line, "--max-steps", 2)
    about = json.loads((tmp_path / "x" / "checkpoint.json").read_text())
    assert about["versions"].pop("split") == 2
    (tmp_path / "x" / "checkpoint.json").write_text(json.dumps(about))
    assert result(*line, "--max-steps", 2)["status"] == "already done"
    said = refused(*line, "--max-steps", 3)
    assert "was started by an earlier rlhf, which held out other rows" in said and "--overwrite" in said
    os.remove(tmp_path / "x" / "checkpoint.json")
    record = {"format_version": 1, "id": "x", "rlhf": "0.1.0", **{n: about[n] for n in ("stage", "config", "inputs")}}
    (tmp_path / "x" / "run.json").write_text(json.dumps(record))
    assert "was started by an earlier rlhf" in refused(*line, "--max-steps", 2)
    (tmp_path / "x" / "run.json").write_text(json.dumps(record | {"split": 2}))
    assert open_inputs(
        "sft", sft(found, tmp_path, batch_size=8, lora_rank=4, keep_state=True, max_steps=2)
    ).run.resuming
    (tmp_path / "x" / "run.json").write_text(json.dumps(record))
    assert result(*line, "--max-steps", 2, "--overwrite")["status"] == "done"


def test_demonstrations_of_the_reward_model_are_an_input(chain, tmp_path):
    found = chain()
    config = RewardConfig(
        model=str(found.sft), dataset=str(found.comparisons), output=str(tmp_path / "x"),
        demonstrations=str(found.demonstrations),
    )  # fmt: skip
    inputs = open_inputs("reward", config)
    assert len(inputs.demonstrations.rows) == 256
    assert inputs.run.inputs["demonstrations"] == hashlib.sha256(found.demonstrations.read_bytes()).hexdigest()


def test_only_the_first_rank_is_a_writer(chain, tmp_path, monkeypatch):
    assert open_inputs("sft", sft(chain(), tmp_path)).run.writer
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not open_inputs("sft", sft(chain(), tmp_path)).run.writer


# --- what KL is measured from


def test_the_reference_is_the_parent_or_the_base(chain):
    found = chain()
    assert open_inputs("evaluate", evaluate(found)).reference.folder == found.sft
    assert open_inputs("evaluate", evaluate(found, model=str(found.sft))).reference.folder is None
    assert open_inputs("evaluate", evaluate(found, model=str(found.base))).reference.base == found.base
    given = evaluate(found, reference=str(found.base))
    assert open_inputs("evaluate", given).reference.base == found.base
    perplexity = evaluate(found, dataset=str(found.demonstrations))
    assert open_inputs("evaluate", perplexity).reference is None  # nothing is sampled


def test_a_whole_run_may_move_and_its_parents_are_found(chain, tmp_path):
    found = chain()
    shutil.copytree(found.folder, tmp_path / "moved")
    inputs = open_inputs("evaluate", evaluate(found, model=str(tmp_path / "moved" / "ppo")))
    assert inputs.reference.manifest.stage == "sft" and inputs.warnings == ()
    assert parent_of(inputs.source).folder.samefile(found.sft)  # the old place still stands, and is the same


def test_a_checkpoint_can_be_used_after_its_run_was_moved(chain, tmp_path):
    found = chain()
    shutil.copytree(found.folder, tmp_path / "moved")
    line = ("sample", "--model", tmp_path / "moved" / "ppo", "--dataset", found.prompts, "--max-response-tokens", 6)
    result(*line, "--output", tmp_path / "x.jsonl")
    assert lines_of(tmp_path / "x.jsonl") == lines_of(found.folder / "samples.jsonl")


# --- code that ships with a model


@pytest.mark.full
def test_trust_reaches_every_model_that_is_opened(chain, model_folder, tmp_path):
    """One --trust-remote-code is enough for --model, --reward, --against and --reference on such a base."""
    base = tmp_path / "base"
    shutil.copytree(chain().base, base)
    config = json.loads((base / "config.json").read_text()) | {"auto_map": {"AutoModel": "x.Y"}}
    (base / "config.json").write_text(json.dumps(config))
    found, place = chain(), str(base)
    line = ("reward", "--model", base, "--dataset", found.comparisons, "--output", tmp_path / "rm", "--max-steps", 1)
    assert "--trust-remote-code" in refused(*line)
    result(*line, "--batch-size", 4, "--trust-remote-code")
    trusting = {"model": place, "reward": [str(tmp_path / "rm")], "trust_remote_code": True}
    assert open_inputs("ppo", ppo(found, tmp_path, **trusting)).rewards[0].checkpoint.base == base
    more = {"against": place, "reference": place, "gold": [str(tmp_path / "rm")]}
    inputs = open_inputs("evaluate", evaluate(found, **trusting, **more))
    assert inputs.against.base == inputs.reference.base == base and len(inputs.gold) == 1
    with pytest.raises(ModelError, match="auto_map"):
        open_inputs("evaluate", evaluate(found, **trusting | {"trust_remote_code": False}))


# --- files that are written


@pytest.mark.parametrize(
    ("content", "free"),
    [
        (None, True),
        ("", True),
        ('{"prompt": "a", "response": "b", "index": 0, "ended": true, "tokens": 1, "x": 2}\n{"mine": 1}\n', True),
        ('{"prompt": "a", "response": "b"}\n', False),
        ("[1]\n", False),
        ("not JSON", False),
        ("\udcff", False),
    ],
)
def test_sample_writes_over_its_own_files_alone(chain, tmp_path, content, free):
    place = tmp_path / "x.jsonl"
    if content is not None:
        place.write_bytes(content.encode("utf-8", "surrogateescape"))
    config = SampleConfig(
        model=str(chain().sft), dataset=str(chain().prompts), output=str(place), max_response_tokens=6
    )
    if free:
        assert open_inputs("sample", config).source.folder == chain().sft
        return
    with pytest.raises(OutputError, match="will not be overwritten"):
        open_inputs("sample", config)


def test_evaluate_writes_over_its_own_files_alone(chain, tmp_path):
    (tmp_path / "x.json").write_text('{"model": "m", "dataset": "d", "policy": {}}')
    open_inputs("evaluate", evaluate(chain(), output=str(tmp_path / "x.json")))
    (tmp_path / "x.json").write_text('{"name": "package"}')
    with pytest.raises(OutputError, match="will not be overwritten"):
        open_inputs("evaluate", evaluate(chain(), output=str(tmp_path / "x.json")))


def test_a_home_is_expanded_in_outputs(chain, tmp_path, monkeypatch):
    """A recipe's `output: ~/x` is no folder called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert open_inputs("sft", sft(chain(), tmp_path, output="~/x")).run.folder == tmp_path / "x"
    line = ("sample", "--model", chain().sft, "--dataset", chain().prompts, "--max-response-tokens", 3)
    result(*line, "--limit-rows", 1, "--output", "~/x.jsonl")
    result("export", "--model", chain().sft, "--output", "~/exported")
    assert sorted(os.listdir(tmp_path)) == ["exported", "x.jsonl"]


def test_an_export_takes_a_checkpoint(chain, tmp_path):
    config = ExportConfig(model=str(chain().reward), output=str(tmp_path / "x"))
    assert open_inputs("export", config).source.manifest.stage == "reward"
