"""Rows as models of other tools read them: `rlhf preview`, and the rows that a classifier counts in `rlhf evaluate`."""

from __future__ import annotations

import shutil

import pytest

from stages.models.adapter_files import ADAPTER_CONFIG
from stages.models.classifier_text import ClassifierText
from stages.models.model_ref import open_model
from tests.commands import SMALL, done, refused, result
from tests.foreign import build_classifier, edit_json, peft_model, write_gguf
from tests.tiny import CHAT, build_tokenizer, write_jsonl

DEMONSTRATION = {"prompt": "red", "completion": " green"}
PAIRS = [{"prompt": "red", "chosen": " green" * size, "rejected": " blue"} for size in (1, 40, 2, 30, 3)]


def test_an_adapter_is_previewed_with_its_own_template_and_without_the_bases_weights(model_folder, tmp_path):
    adapter, bare = tmp_path / "adapter", tmp_path / "bare"
    shutil.copytree(model_folder("llama"), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    peft_model(model_folder("llama")).save_pretrained(adapter)
    edit_json(adapter / ADAPTER_CONFIG, base_model_name_or_path=str(bare))
    data = write_jsonl(tmp_path / "d.jsonl", [DEMONSTRATION])
    line = ("preview", "--model", adapter, "--dataset", data)
    assert "<bos>red[[ green<eos>]]" in done(*line).stdout
    assert "the tokenizer has no chat template" in refused(*line, "--text-as", "chat")
    (adapter / "chat_template.jinja").write_text(CHAT)
    assert "<|user|>red<|" in done(*line, "--text-as", "chat").stdout
    (adapter / "chat_template.jinja").unlink()
    build_tokenizer(adapter, chat=True)
    assert "<|user|>red<|end|><|assistant|>[[green<|end|>]]" in done(*line, "--text-as", "chat").stdout
    shutil.move(bare, tmp_path / "moved")
    assert "--base" in refused(*line)
    assert "<bos>red[[ green<eos>]]" in done(*line, "--base", tmp_path / "moved").stdout


def test_a_gguf_file_is_previewed(model_folder, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_gguf(model_folder("llama", chat=True), tmp_path / "m.gguf", template=CHAT)
    data = write_jsonl(tmp_path / "d.jsonl", [DEMONSTRATION])
    shown = done("preview", "--model", file, "--dataset", data, "--text-as", "chat").stdout
    assert "<|user|>red<|end|><|assistant|>[[green<|end|>]]" in shown


def test_a_classifier_has_no_preview(tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [DEMONSTRATION])
    said = refused("preview", "--model", build_classifier(tmp_path / "c"), "--dataset", data)
    assert "is a sequence classifier, from which no stage starts" in said


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_classifier_alone_counts_its_rows_and_shows_none(tmp_path, kind):
    """Cut, dropped or refused by its own limit, with or without --limit-rows."""
    folder = build_classifier(tmp_path / "c", kind)
    data = write_jsonl(tmp_path / "c.jsonl", PAIRS)
    line = ("evaluate", "--model", folder, "--dataset", data, "--dry-run", "--max-tokens", 20)
    plain = result(*line)
    assert plain["plan"] == {"comparisons": 5} and plain["rows"]["cut_rows"] == 2 and "preview" not in plain
    dropped = result(*line, "--long-rows", "drop")
    assert dropped["plan"] == {"comparisons": 3} and dropped["rows"]["dropped_long_rows"] == 2
    few = result(*line, "--long-rows", "drop", "--limit-rows", 2)
    assert few["plan"] == {"comparisons": 2} and few["rows"]["dropped_long_rows"] == 1
    stopped = refused(*line, "--long-rows", "stop")
    reader = ClassifierText(open_model(str(folder), stages=("classifier",), what="--model"))
    whole = reader.read("", "red", " green" * 40).size
    assert f"{data}:2" in stopped and f"the row has {whole} tokens; the longest may have 20" in stopped


def test_rows_of_a_base_and_a_classifier_are_those_that_both_read(model_folder, tmp_path):
    """With the preview that the base has of them, also if the classifier comes first."""
    folder, data = build_classifier(tmp_path / "c", context=24), write_jsonl(tmp_path / "c.jsonl", PAIRS)
    done("reward", "--model", model_folder("llama"), "--dataset", data, "--output", tmp_path / "rm", *SMALL)
    for first, second in ((tmp_path / "rm", folder), (folder, tmp_path / "rm")):
        line = ("evaluate", "--model", first, "--also", second, "--dataset", data, "--dry-run")
        found = result(*line)
        assert found["rows"]["cut_rows"] == 2 and found["preview"]["cut_share"] == 0
        assert "<bos>red" in found["preview"]["examples"][0]["text"]
        found = result(*line, "--long-rows", "drop", "--limit-rows", 2)
        assert found["plan"] == {"comparisons": 2} and found["rows"]["dropped_long_rows"] == 1
