"""What was written is read back before it is published: whatever is altered in between is caught, and no manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stages.checkpoint.tensors import load_tensors, save_tensors
from stages.models.roles import HEAD, save_adapter
from stages.training import publishing
from stages.training.reload import check_reload, check_tokenizer
from tests.commands import SHORT, Chain, assert_same_weights, contents, done, rlhf
from tests.marks import full
from tests.parts import open_tiny_text, random_adapter, random_head

ADAPTER = "adapter_model.safetensors"
STEP = ("--max-steps", 1, "--batch-size", 4, "--limit-rows", 12, "--samples", 1)


def flip_lowest_bit(path: Path, name: str) -> None:
    """Change one number of one tensor of a file by one unit in its last place."""
    tensors = load_tensors(path)
    number = tensors[name].view(-1)[-1:].view(torch.int32)
    number ^= 1
    save_tensors(path, tensors)


@pytest.fixture
def written(open_tiny, tmp_path):
    """A base, an adapter with a head, and the folder they were saved to."""
    base = open_tiny("llama")
    adapter, head = random_adapter(base, 1), random_head(base.width, 2)
    save_adapter(tmp_path, base, adapter, head)
    return base, tmp_path, adapter, head


@pytest.mark.full
def test_one_bit_of_any_tensor_is_seen(written):
    """Even of a number whose change does not show in the states of a short text."""
    base, folder, adapter, head = written
    check_reload(base, folder, adapter, head)
    for file in (ADAPTER, HEAD):
        whole = (folder / file).read_bytes()
        names = list(load_tensors(folder / file))
        assert len(names) == (2 * 14 + 1 if file == ADAPTER else 2)
        for name in names:
            flip_lowest_bit(folder / file, name)
            with pytest.raises(AssertionError, match="is not the one in memory"):
                check_reload(base, folder, adapter, head)
            (folder / file).write_bytes(whole)
    check_reload(base, folder, adapter, head)
    assert all(not layer.lora_A for layer in base.lora.adapted.values())  # nothing is left on the base


@pytest.mark.parametrize("file", [ADAPTER, HEAD, "adapter_config.json"])
def test_a_file_that_is_gone_or_torn_is_seen(written, file):
    base, folder, adapter, head = written
    whole = (folder / file).read_bytes()
    for content in (None, b"", whole[:-9]):
        (folder / file).unlink(missing_ok=True)
        if content is not None:
            (folder / file).write_bytes(content)
        with pytest.raises(AssertionError, match="cannot be read back"):
            check_reload(base, folder, adapter, head)


@pytest.mark.parametrize(("key", "value"), [("lora_alpha", 8.5), ("r", 5)])
def test_a_changed_scale_or_rank_is_seen(written, key, value):
    base, folder, adapter, head = written
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(AssertionError, match="the adapter written|cannot be read back"):
        check_reload(base, folder, adapter, head)


def test_a_shared_critic_is_a_head_on_the_policys_trunk(written):
    base, folder, adapter, head = written
    save_tensors(folder / "critic" / HEAD, head.tensors())
    check_reload(base, folder / "critic", adapter, head, trunk=folder)
    flip_lowest_bit(folder / "critic" / HEAD, "bias")
    with pytest.raises(AssertionError, match="the head written to .*critic"):
        check_reload(base, folder / "critic", adapter, head, trunk=folder)


# --- the tokenizer ------------------------------------------------------------------------------------------------


def amend(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def other_merges(folder: Path) -> None:
    amend(folder / "tokenizer.json", lambda content: content["model"]["merges"].pop())


def other_eos(folder: Path) -> None:
    amend(folder / "tokenizer_config.json", lambda content: content.update(eos_token="<unk>"))


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


SPOILED = {
    "other merges": (other_merges, "tokenizer.json"),
    "another end of text": (other_eos, "end of text"),
    "no chat template": (no_template, "chat template"),
    "another chat template": (other_template, "chat template"),
    "no tokenizer": (no_tokenizer, "cannot be read back"),
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_another_tokenizer_is_seen(model_folder, tmp_path, spoil):
    text = open_tiny_text(model_folder("llama", chat=True))
    publishing.save_tokenizer(tmp_path, text)
    check_tokenizer(tmp_path, text, trust_remote_code=False)
    change, said = SPOILED[spoil]
    change(tmp_path)
    with pytest.raises(AssertionError, match=said):
        check_tokenizer(tmp_path, text, trust_remote_code=False)


# --- the stages ---------------------------------------------------------------------------------------------------


def command(found: Chain, stage: str, output: Path) -> list:
    data = {"sft": found.demonstrations, "ppo": found.prompts}.get(stage, found.comparisons)
    more = ("--reward", found.reward, *SHORT) if stage.startswith("ppo") else ()
    more += ("--critic", "shared") if stage == "ppo shared" else ()
    data = found.prompts if stage.startswith("ppo") else data
    return [stage.split()[0], "--model", found.sft, "--dataset", data, "--output", output, *STEP, *more]


CASES = [
    ("reward", HEAD),
    *full(
        ("sft", "tokenizer.json"), ("sft", ADAPTER), ("reward", ADAPTER), ("dpo", ADAPTER), ("ppo", ADAPTER),
        ("ppo", f"critic/{ADAPTER}"),
        ("ppo", f"critic/{HEAD}"), ("ppo shared", f"critic/{HEAD}"), ("ppo", "tokenizer.json"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("how", ["altered", *full("removed")])
@pytest.mark.parametrize(("stage", "name"), CASES)
def test_no_stage_publishes_what_does_not_read_back(chain, tmp_path, monkeypatch, stage, name, how):
    """The run stays unfinished, with its state; once the fault is gone the same command finishes it as ever."""
    found, out = chain(), tmp_path / "out"
    writes = {w: getattr(publishing, w) for w in ("save_adapter", "_save_critic", "save_tokenizer")}

    def spoiling(write):
        def spoil(folder, *rest):
            files = write(folder, *rest)
            place = out / name
            if how == "removed":
                place.unlink(missing_ok=True)
            elif place.suffix == ".json" and place.exists():
                other_merges(out)
            elif place.exists():
                flip_lowest_bit(place, list(load_tensors(place))[0])
            return files

        return spoil

    with monkeypatch.context() as patch:
        for writer, write in writes.items():
            if (writer == "save_tokenizer") == name.startswith("tok") and ("critic" in writer) == ("critic" in name):
                patch.setattr(publishing, writer, spoiling(write))
        ended = rlhf(*command(found, stage, out))
    assert ended.code == 1 and ended.stdout == "", ended.stderr
    assert "AssertionError" in ended.stderr and "written to" in ended.stderr and str(out) in ended.stderr
    assert not (out / "checkpoint.json").exists() and (out / "run.json").exists() and (out / "state").is_dir()
    done(*command(found, stage, out))
    assert (out / "checkpoint.json").exists() and not (out / "run.json").exists()
    if how == "removed" and name in (HEAD, f"critic/{HEAD}"):  # the same as a run that nothing happened to
        done(*command(found, stage, tmp_path / "whole"))
        assert_same_weights(out, tmp_path / "whole")
        assert contents(out)["tokenizer.json"] == contents(tmp_path / "whole")["tokenizer.json"]
