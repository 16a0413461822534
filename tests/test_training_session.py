"""What every stage does around its algorithm: opening, dropping rows, publishing and reading back."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from stages.checkpoint.manifest import read_manifest
from stages.checkpoint.run import open_run
from stages.data.rows import Dataset
from stages.errors import DatasetError, ModelError
from stages.models.heads import ScalarHead
from stages.models.model_ref import open_model
from stages.models.roles import Roles, adapter_of, head_of
from stages.results import Silent
from stages.training import session
from stages.training.devices import Ranks
from stages.training.long_rows import context_limit
from stages.training.opening import encode_all, open_base, open_text
from stages.training.plan import Work
from stages.training.progress import open_progress
from stages.training.publishing import publish_checkpoint
from stages.training.reload import check_reload
from stages.training.session import Session
from tests.parts import open_tiny_text, ppo_config, random_adapter, random_head, sequences_of, sft_config
from tests.tiny import build_config, build_tokenizer


class Notes(Silent):
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(("note", text))

    def warn(self, text):
        self.said.append(("warn", text))


class Row:
    def __init__(self, number):
        self.number, self.where = number, f"d.jsonl:{number}"


def encode(row):
    if row.number % 2:
        raise DatasetError("it is odd", where=row.where if row.number > 1 else None, fix="make it even")
    return 10 * row.number


# --- rows


def test_a_row_that_cannot_be_used_is_named(capsys):
    with pytest.raises(DatasetError) as caught:
        encode_all([Row(2), Row(1)], encode, config=sft_config(), reporter=Notes(), what="rows")
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("it is odd", "d.jsonl:1", "make it even")


def test_bad_rows_are_dropped_and_counted_when_asked():
    report = Notes()
    how = {"config": sft_config(skip_bad_rows=True), "reporter": report, "what": "rows"}
    assert encode_all([Row(n) for n in (2, 3, 4, 5)], encode, **how) == ([20, 40], 2, 0, 0)
    ((kind, text),) = report.said
    assert kind == "warn" and text.startswith("2 of 4 rows") and "d.jsonl:3" in text
    assert encode_all([], encode, **how) == ([], 0, 0, 0)


def test_a_dataset_of_bad_rows_alone_is_refused():
    with pytest.raises(DatasetError, match="none of the 2 rows can be used; it is odd"):
        encode_all([Row(3), Row(5)], encode, config=sft_config(skip_bad_rows=True), reporter=Notes(), what="rows")


def test_rows_are_no_longer_than_the_context(model_folder):
    source, report = open_model(str(model_folder("llama")), stages=(), what="--model"), Notes()
    assert context_limit(100, source, report) == 100 and not report.said
    assert context_limit(1024, source, report) == 128
    assert report.said == [("note", "max_tokens reduced to 128, the context length of the base")]


# --- opening


def test_the_text_knows_the_bases_stop_tokens(model_folder):
    source = open_model(str(model_folder("llama", chat=True)), stages=(), what="--model")
    assert open_text(source, sft_config()).stop_ids == (2, 6)
    assert open_text(source, sft_config(chat_template="plain")).turn_end_id == 2


def test_the_base_is_opened_as_the_config_says(model_folder):
    folder = model_folder("llama")
    source, text = open_model(str(folder), stages=(), what="--model"), open_tiny_text(folder)
    base = open_base(source, sft_config(device="cpu", dtype="bfloat16"), text)
    assert base.dtype == torch.bfloat16 and not base.checkpoints
    base = open_base(source, sft_config(device="cpu"), text)
    assert base.dtype == torch.float32


def load(folder, config):
    """A session on a base that was loaded for 64 rows of 100 tokens, and what it said."""
    source, report = open_model(str(folder), stages=(), what="--model"), Notes()
    run = Session("sft", config, SimpleNamespace(source=source, rewards=[]), report)
    run.text = open_tiny_text(folder)
    run.plan(Work("sft", [100] * 64, 64), lambda *_: 1)
    run.load_base()
    return run, report


@pytest.mark.parametrize(("asked", "free", "recomputes", "tokens"), [
    ("auto", None, False, 2048),  # on the CPU nothing is planned
    (True, None, True, 2048),
    ("auto", 4_000_000, True, None),
    (False, 4_000_000, False, None),
    ("auto", 10**12, False, 2048),
])  # fmt: skip
def test_passes_are_as_large_as_memory_has_room_for(model_folder, monkeypatch, asked, free, recomputes, tokens):
    monkeypatch.setattr(session, "free_memory", lambda device: free)
    run, report = load(model_folder("llama"), sft_config(device="cpu", gradient_checkpointing=asked))
    assert run.base.checkpoints is recomputes and bool(report.said) is recomputes
    assert run.base.passes.tokens == tokens if tokens else run.base.passes.tokens < 2048
    assert run.ranks.size == 1 and run.base.passes.micro_batch_size == "auto"


def test_a_base_that_cannot_recompute_is_refused_only_where_that_was_asked_for(model_folder, monkeypatch):
    def cannot(base):
        raise ModelError("`llama` cannot recompute its activations", where="--model")

    monkeypatch.setattr(session.Base, "checkpoint_activations", cannot)
    monkeypatch.setattr(session, "free_memory", lambda device: 4_000_000)
    with pytest.raises(ModelError):
        load(model_folder("llama"), sft_config(device="cpu", gradient_checkpointing=True))
    _, report = load(model_folder("llama"), sft_config(device="cpu"))
    assert report.said == [
        ("note", "activations do not fit into the memory, but `llama` cannot recompute its activations")
    ]


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer = build_tokenizer(tmp_path)
    AutoModelForCausalLM.from_config(build_config("llama", len(tokenizer) - 1)).save_pretrained(tmp_path)
    source = open_model(str(tmp_path), stages=(), what="--model")
    with pytest.raises(ModelError, match="the tokenizer has 300 tokens, the base has embeddings for 299"):
        open_base(source, sft_config(device="cpu"), open_tiny_text(tmp_path))


def test_optimisers_have_the_configs_constants(open_tiny):
    base = open_tiny("llama")
    config = ppo_config(adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-5, weight_decay=0.1)
    head = ScalarHead(base.width)
    progress = open_progress(config, {"policy": list(random_adapter(base, 1).parameters()), "critic": [head.weight]})
    assert list(progress.optimizers) == ["policy", "critic"]
    for optimizer in progress.optimizers.values():
        assert (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay) == (0.8, 0.95, 1e-5, 0.1)


# --- publishing


def session_on(run, config, roles, text):
    """A session whose training is over."""
    data = Dataset([1, 2, 3], "prompt", "p.jsonl", "d1", 0, [])
    over = Session("ppo", config, SimpleNamespace(run=run, source=roles.base.ref, data=data), Silent())
    over.text, over.roles, over.ranks = text, roles, Ranks(torch.device("cpu"))
    return over


@pytest.fixture
def published(open_tiny, model_folder, tmp_path):
    """A PPO-like checkpoint written by `publish_checkpoint`: its folder, the roles in memory, and the manifest."""
    base = open_tiny("llama", chat=True)
    text = open_tiny_text(model_folder("llama", chat=True))
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    roles.add("critic", random_adapter(base, 2), random_head(base.width, 3))
    folder = tmp_path / "ppo"
    config = ppo_config(output=str(folder))
    run = open_run(folder, "ppo", config, {"model": "abc"})
    run.start()
    lines = [
        {"step": 0},
        {"step": 1, "tokens": 30, "samples": 4, "seconds": 2.0},
        {"step": 2, "tokens": 50, "samples": 4, "seconds": 3.0},
    ]
    for line in lines:
        run.log(line["step"], {k: v for k, v in line.items() if k != "step"})
    publish_checkpoint(session_on(run, config, roles, text), "policy", {"loss": 1.5}, rewards=[])
    return folder, roles, read_manifest(folder)


def test_a_published_checkpoint_says_what_it_is(published):
    folder, roles, manifest = published
    assert (manifest.stage, manifest.steps, manifest.seconds) == ("ppo", 2, 5.0)
    assert manifest.throughput["tokens_per_second"] == 16.0 and manifest.throughput["samples_per_second"] == 1.6
    assert manifest.stop_token_ids == (2, 6) and manifest.dtype == "float32" and manifest.device == "cpu"
    assert manifest.parents == ()  # the base is no checkpoint
    assert manifest.base.digest == roles.base.ref.base_digest
    assert manifest.datasets == {"train": {"source": "p.jsonl", "digest": "d1", "rows": 3}}
    assert manifest.metrics == {"loss": 1.5} and manifest.inputs == {"model": "abc"}
    for name in ("adapter_model.safetensors", "critic/head.safetensors", "tokenizer.json", "config.yaml"):
        assert name in manifest.files
    assert not list(folder.glob(".tmp-*")) and not (folder / "run.json").exists()


def test_a_published_checkpoint_is_what_was_in_memory(published):
    """Check 51, through the folder: the same states under policy and critic, to the bit."""
    folder, roles, _ = published
    source = open_model(str(folder), stages=("ppo",), what="--model")
    base, again = roles.base, Roles(roles.base)
    again.add("policy again", adapter_of(base, source, trainable=False))
    critic = adapter_of(base, source, trainable=False, folder=folder / "critic")
    again.add("critic again", critic, head_of(base, folder / "critic"))
    sequences = sequences_of([9, 4])
    for role in ("policy", "critic"):
        with torch.no_grad():
            with roles.use(role):
                expected = base.hidden(sequences)
            with again.use(f"{role} again"):
                assert torch.equal(base.hidden(sequences), expected)
    assert torch.equal(again.heads["critic again"](expected), roles.heads["critic"](expected))
    text = open_text(source, sft_config())
    assert text.stop_ids == (2, 6) and text.has_template


def test_what_does_not_read_back_alike_is_not_published(open_tiny, tmp_path):
    from stages.models.roles import save_adapter

    base = open_tiny("llama")
    adapter, head = random_adapter(base, 1), random_head(base.width, 2)
    save_adapter(tmp_path, base, adapter, head)
    check_reload(base, tmp_path, adapter, head)
    list(adapter.parameters())[1].data[0, 0] += 0.01
    with pytest.raises(AssertionError, match="the adapter written to .* is not the one in memory"):
        check_reload(base, tmp_path, adapter, head)
    save_adapter(tmp_path, base, adapter, head)
    head.bias.data += 0.01
    with pytest.raises(AssertionError, match="the head written"):
        check_reload(base, tmp_path, adapter, head)
    assert all(not layer.lora_A for layer in base.lora.adapted.values())  # nothing is left on the base


def test_a_shared_critic_is_stored_as_a_head(open_tiny, model_folder, tmp_path):
    base, text = open_tiny("llama"), open_tiny_text(model_folder("llama"))
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    config = ppo_config(output=str(tmp_path / "ppo"))
    run = open_run(tmp_path / "ppo", "ppo", config, {})
    run.start()
    roles.heads["critic"] = random_head(base.width, 3)
    run.log(0, {})
    publish_checkpoint(session_on(run, config, roles, text), "policy", {}, rewards=[])
    assert sorted(p.name for p in (tmp_path / "ppo" / "critic").iterdir()) == ["head.safetensors"]
    assert torch.equal(head_of(base, tmp_path / "ppo" / "critic").weight, random_head(base.width, 3).weight)
    assert json.loads((tmp_path / "ppo" / "checkpoint.json").read_text())["steps"] == 0
