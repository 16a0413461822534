"""`rlhf preview`: rows as the model will see them, their lengths, and what is odd; no weights, no torch."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys

import pytest

from rlhf_cli.console import show, show_passages
from stages.results import Passage, Piece, Result
from stages.tables import histogram_table
from stages.training.preview import _histogram
from tests.commands import done, refused, result, write_data
from tests.parts import open_tiny_text
from tests.tiny import build_config, build_tokenizer, write_jsonl

ROWS = [{"prompt": "red\nblue", "completion": " green"}, {"prompt": "one", "completion": " two three"}]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A base's config and tokenizer, without its weights."""
    folder = tmp_path_factory.mktemp("bare")
    tokenizer = build_tokenizer(folder, chat=True)
    build_config("llama", len(tokenizer)).save_pretrained(folder)
    return folder


def shown(stdout: str) -> str:
    """The texts of a preview, without its tables."""
    return stdout.split(": the rows\n")[0]


def test_a_row_is_shown_with_what_is_learned_in_brackets(bare, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", ROWS)
    ended = done("preview", "--model", bare, "--dataset", data)
    assert f"{data}:1: " in ended.stdout and "[[...]] is learned" in ended.stdout
    assert "<bos>red\\n\nblue[[ green<eos>]]\n" in ended.stdout and "<bos>one[[ two three<eos>]]" in ended.stdout
    chat = done("preview", "--model", bare, "--dataset", data, "--text-as", "chat").stdout
    assert "<|user|>red\\n\nblue<|end|><|assistant|>[[green<|end|>]]\n" in chat and "<bos>" not in shown(chat)
    every = done("preview", "--model", bare, "--dataset", data, "--mask", "all", "--show-rows", 1).stdout
    assert "<bos>[[red\\n\nblue green<eos>]]" in every and "one" not in shown(every)


def test_the_other_stages_show_what_they_read(bare, tmp_path):
    pair = {"prompt": "red", "chosen": " green", "rejected": " blue cat", "answer": 3}
    data = write_jsonl(tmp_path / "c.jsonl", [pair])
    reward = done("preview", "--model", bare, "--dataset", data).stdout
    assert "is where the score is read" in reward and reward.startswith(f"{data}:1: ")
    assert "<bos>red\n(response 1)  green[[<eos>]]\n(response 2)  blue cat[[<eos>]]\n" in reward
    dpo = done("preview", "--model", bare, "--dataset", data, "--stage", "dpo").stdout
    assert "(response 1) [[ green<eos>]]\n(response 2) [[ blue cat<eos>]]\n" in dpo
    ppo = done("preview", "--model", bare, "--dataset", data, "--stage", "ppo", "--max-response-tokens", 4).stdout
    assert "<bos>red (the response is sampled here)\n" in ppo and "[[" not in ppo


def test_numbers_are_those_of_the_rows(bare, tmp_path):
    text = open_tiny_text(bare)
    rows = [{"prompt": "red", "completion": " the" * size} for size in (1, 2, 3, 4, 30)]
    rows += [{"prompt": "the " * 40, "completion": "red"}, {"prompt": "red", "completion": ""}]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    line = ("preview", "--model", bare, "--dataset", data, "--max-tokens", 8, "--skip-bad-rows")
    found = result(*line)
    sizes = [len(text.tokenizer(row["prompt"] + row["completion"]).input_ids) + 1 for row in rows[:6]]
    assert (found["rows"], found["measured_rows"], found["form"], found["limit_tokens"]) == (6, 6, "text", 8)
    assert found["longest_row_tokens"] == max(sizes) and found["mean_tokens"] == round(sum(sizes) / 6, 1)
    assert (found["cut_share"], found["dropped_long_share"]) == (round(1 / 6, 4), round(1 / 6, 4))
    assert found["rows_left_out"]["skipped_rows"] == 1
    assert sum(part["rows"] for part in found["histogram"]) == 6
    assert {part["up_to"] for part in found["histogram"]} >= {8} and found["histogram"][0]["above"] == 0
    (first, *_) = found["examples"]
    (sequence,) = first["sequences"]
    whole = text.tokenizer("red the").input_ids
    assert sequence["ids"] == [*whole, text.eos_id] and first["where"] == f"{data}:1"
    assert sequence["marked"] == [False] * (len(whole) - 1) + [True, True]
    assert len(found["examples"]) == 3 and first["text"] == "<bos>red[[ the<eos>]]"
    dropped = result(*line, "--long-rows", "drop")
    assert (dropped["cut_share"], dropped["dropped_long_share"]) == (0, round(2 / 6, 4))
    assert "the row has" in refused(*line, "--long-rows", "stop", "--show-rows", 9)
    few = result(*line, "--limit-rows", 2)
    assert few["rows"] == 2 and few["longest_row_tokens"] == max(sizes[:2])


def test_warnings_are_in_the_object_too(bare, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "red ", "completion": "blue <|end|>"}] * 3)
    found = result("preview", "--model", bare, "--dataset", data, "--mask", "assistant")
    told = "\n".join(found["warnings"])
    assert "--mask assistant has no effect" in told and "have special tokens in the text, such as <|end|>" in told
    assert "do not begin with the tokens of the prompt as it is served" in told
    assert any("--text-as chat reads them as messages" in note for note in found["notes"])


def test_bad_rows_and_knobs_of_other_stages_are_told(bare, tmp_path):
    refusing = tmp_path / "t.jinja"
    refusing.write_text("{% if messages[0]['content'] == 'cat' %}{{ raise_exception('no cats') }}{% endif %}"
                        "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")  # fmt: skip
    rows = [{"prompt": [{"role": "user", "content": word}]} for word in ("red", "cat", "blue")]
    line = (
        "preview",
        "--model",
        bare,
        "--dataset",
        write_jsonl(tmp_path / "p.jsonl", rows),
        "--max-response-tokens",
        4,
    )
    found = result(*line, "--chat-template", refusing, "--max-tokens", 9)
    assert found["bad_rows"] == 1 and found["stage"] == "ppo" and len(found["examples"]) == 2
    told = "\n".join(found["warnings"])
    assert "1 row cannot be used; " in told and "no cats" in told
    assert "--max-tokens has no effect on what rlhf ppo reads" in told


def test_many_rows_are_sampled_and_it_is_said(bare, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.training.preview.CHARACTERS_READ", 400)
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "red blue", "completion": " green cat"}] * 100)
    found = result("preview", "--model", bare, "--dataset", data)
    assert (found["rows"], found["measured_rows"]) == (100, 25)  # 18 characters each


def test_a_dry_run_shows_the_same(model_folder, tmp_path):
    write_data(tmp_path)
    base, data = model_folder("llama"), tmp_path / "demonstrations.jsonl"
    ended = done("sft", "--model", base, "--dataset", data, "--output", tmp_path / "x", "--dry-run")
    assert "[[" in ended.stdout and "tokens per row" in ended.stdout and "sft: the plan" in ended.stdout
    plan = result("sft", "--model", base, "--dataset", data, "--output", tmp_path / "x", "--dry-run")
    assert plan["preview"]["measured_rows"] == plan["plan"]["rows"] and len(plan["preview"]["examples"]) == 3


@pytest.mark.full
def test_neither_torch_nor_weights_are_loaded(bare, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "red"},
                                                            {"role": "assistant", "content": "blue"}]}])  # fmt: skip
    assert not list(bare.glob("*.safetensors"))
    code = (
        "import sys; from tests.commands import done; "
        f"done('preview', '--model', {str(bare)!r}, '--dataset', {str(data)!r}, '--limit-rows', 1); "
        "print(sorted({'torch', 'peft', 'datasets'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_a_base_that_the_stages_refuse_may_be_previewed_but_not_one_without_a_tokenizer(bare, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", ROWS)
    told = refused("sft", "--model", bare, "--dataset", data, "--output", tmp_path / "x")
    assert "holds no weights" in told
    folder = tmp_path / "config only"
    folder.mkdir()
    shutil.copy(bare / "config.json", folder)
    assert "has no tokenizer" in refused("preview", "--model", folder, "--dataset", data)


# --- how it looks


PIECES = (
    Piece("<bos>", special=True),
    Piece("red"),
    Piece(" green", marked=True),
    Piece("<eos>", marked=True, special=True),
    Piece(" (cut)", note=True),
)


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_colours_on_a_terminal_brackets_elsewhere(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    passages = (Passage("d:1: 4 tokens; [[...]] is learned", PIECES),)
    piped, screen, without = io.StringIO(), Screen(), Screen()
    show_passages(passages, piped)
    assert piped.getvalue() == "d:1: 4 tokens; [[...]] is learned\n<bos>red[[ green<eos>]] (cut)\n\n"
    show_passages(passages, screen)
    assert "\x1b[1;32m green" in screen.getvalue() and "[[" not in screen.getvalue().replace("\x1b[", "")
    monkeypatch.setenv("NO_COLOR", "1")
    show_passages(passages, without)
    assert "[[ green<eos>]]" in without.getvalue()
    assert json.dumps(show(Result("preview", "done", None, {}, passages=passages), True, io.StringIO())) == "null"


@pytest.mark.parametrize(
    ("lengths", "limit", "edges"),
    [
        ([3, 9, 20], 10, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
        ([1, 5], 1024, [0, 1, 2, 3, 4, 5]),
        ([150, 990], 2048, [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]),
        ([5, 100_000], 1000, [*range(0, 12_000, 1000), 100_000]),
        ([7], 7, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_bins_are_even_and_end_at_the_limit(lengths, limit, edges):
    bins = _histogram(lengths, limit)
    assert [part["above"] for part in bins] + [bins[-1]["up_to"]] == edges
    assert sum(part["rows"] for part in bins) == len(lengths)
    if limit < max(lengths):
        assert limit in edges
    assert len(histogram_table("t", bins, limit).rows) == len(bins) + (limit in edges[1:])
