"""Text that a tokenizer does not know is named before anyone trusts a loss on it."""

from __future__ import annotations

import math

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.data.comparisons import Comparison, Pair
from stages.data.rows import Demonstration, Prompt
from stages.models.coverage import Coverage, measure_coverage, sample_texts
from stages.training.language import warn_above_uniform
from tests.commands import comparisons, demonstrations, done, rlhf
from tests.test_models_templates import sentencepiece
from tests.tiny import TEXT, build_model, build_tokenizer, write_jsonl

CHINESE = "你好世界"  # four characters of three bytes each
SMALL = ("--max-steps", 1, "--batch-size", 4, "--lora-rank", 2)


def words(folder):
    """A tokenizer of whole words: what it does not know becomes <unk>."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "cat": 2, "sat": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def letters(folder):
    """A tokenizer of the letters it was trained on: others vanish without a trace."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="e")


def pieces(folder):
    sentencepiece(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_characters_spelled_in_bytes_are_counted(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    # 4 characters in 3 bytes each; `é` in 2 bytes; `a`, `b` whole; the space is no character to know.
    assert measure_coverage(tokenizer, [CHINESE, "ab é"]) == Coverage(7, 5, 0, 8, 12 + 2 + 1 + 2, 0)
    found = measure_coverage(pieces(tmp_path / "pieces"), [f"cat {CHINESE}"])
    assert (found.characters, found.in_bytes, found.unknown, found.unknown_tokens) == (7, 4, 0, 0)


def test_unknown_words_and_letters_are_counted(tmp_path):
    found = measure_coverage(words(tmp_path), ["cat dog sat <unk>", CHINESE])
    # `dog`, and the four Chinese letters as one word; an <unk> that is written out is not lost.
    assert found == Coverage(18, 0, 3 + 4, 21, 5, 2)
    vanished = measure_coverage(letters(tmp_path), [CHINESE, "the cat"])
    assert (vanished.characters, vanished.unknown, vanished.in_bytes) == (10, 4, 0)


@pytest.mark.parametrize(
    ("coverage", "said"),
    [
        (Coverage(100, 31, 0, 120, 200, 0), "31% of the characters are not in the tokenizer's vocabulary"),
        (Coverage(100, 31, 0, 120, 200, 0), "1.67 tokens per character"),
        (Coverage(100, 30, 0, 120, 200, 0), None),
        (
            Coverage(100, 0, 6, 120, 50, 4),
            "6% of the characters are unknown to the tokenizer and lost; 8% of",
        ),
        (Coverage(100, 0, 5, 120, 50, 4), None),
        (Coverage(0, 0, 0, 3, 1, 0), None),
    ],
)
def test_the_cause_is_said_in_numbers(coverage, said):
    assert said in coverage.cause if said else coverage.cause == ""


def test_known_text_is_not_complained_of(tmp_path):
    """English with a few accents and an emoji, on 300 tokens and on a SentencePiece vocabulary."""
    english = [f"{TEXT} café 🙂"]
    for tokenizer in (build_tokenizer(tmp_path), pieces(tmp_path / "pieces")):
        assert measure_coverage(tokenizer, english).cause == ""


def test_the_texts_of_every_kind_of_row_are_read():
    talk = ({"role": "user", "content": "b"}, {"role": "assistant", "content": "c"})
    rows = [
        Demonstration("1", "a", "b"), Demonstration("2", "", "", talk), Prompt("3", "d"), Prompt("4", talk[:1]),
        Comparison("5", "e", ("f", "g"), (Pair(0, 1),)), Comparison("6", talk[:1], (talk[1:], talk[1:]), (Pair(0, 1),)),
    ]  # fmt: skip
    assert list(sample_texts(rows)) == ["a", "b", "b", "c", "d", "b", "e", "f", "g", "b", "c", "c"]
    assert len(list(sample_texts([Prompt("p", str(i)) for i in range(1000)]))) == 250  # every fourth


class Heard:
    """A report that keeps its warnings."""

    def __init__(self):
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_a_loss_above_a_uniform_guess_is_named():
    heard = Heard()
    for loss in (0.0, math.log(512), float("nan")):
        warn_above_uniform(loss, 512, "the loss", "", heard)
    assert heard.warnings == []
    warn_above_uniform(21.7, 512, "the held-out loss", "no such letters", heard)
    warn_above_uniform(math.log(512) + 0.01, 512, "the loss", "", heard)
    assert "the held-out loss is 21.70 nats per token, above ln(512) = 6.24" in heard.warnings[0]
    assert heard.warnings[0].endswith("Likely cause: no such letters")
    assert "untrained" in heard.warnings[1]


# --- through the command line


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("base"))


def in_chinese(row: dict) -> dict:
    return {key: CHINESE[i % 4] + CHINESE * (1 + len(str(row)) % 3) + str(row[key])[-3:] for i, key in enumerate(row)}


UNREADABLE = "the base can hardly read the"


def warnings_of(*line: object) -> str:
    ended = rlhf(*line)
    assert ended.code == 0, ended.stderr
    return ended.stderr


@pytest.mark.full
def test_every_stage_names_text_that_the_base_cannot_read(base, tmp_path):
    asked = [{"prompt": row["prompt"]} for row in demonstrations()[:40]]
    (tmp_path / "r.py").write_text("def score(prompts, responses, **columns):\n    return [0.0] * len(responses)\n")
    for language in ("english", "chinese"):
        folder = tmp_path / language
        folder.mkdir()
        for name, rows in (("d", demonstrations()[:40]), ("c", comparisons()[:40]), ("p", asked)):
            write_jsonl(folder / f"{name}.jsonl", [in_chinese(row) for row in rows] if language == "chinese" else rows)
        data = {name: ("--dataset", folder / f"{name}.jsonl") for name in "dcp"}
        train = ("--output", folder / "x", "--dry-run")
        short = ("--max-response-tokens", 8)
        function = ("ppo", "--model", base, "--reward", tmp_path / "r.py", *short)
        readable = ("--dataset", tmp_path / "english" / "p.jsonl")
        lines = {
            "demonstrations": ("sft", "--model", base, *data["d"], *train),
            "comparisons": ("reward", "--model", base, *data["c"], *train),
            "comparisons ": ("dpo", "--model", base, *data["c"], *train),
            "prompts": (*function, *data["p"], *train),
            "ptx rows": (*function, *readable, "--ptx-dataset", folder / "d.jsonl", *train),
            "prompts ": ("sample", "--model", base, *data["p"], *short, "--output", folder / "s.jsonl", "--dry-run"),
            "rows": ("evaluate", "--model", base, *data["d"], "--dry-run"),
        }  # fmt: skip
        for what, line in lines.items():
            told = warnings_of(*line)
            assert (f"{UNREADABLE} {what.strip()}: " in told) == (language == "chinese"), (language, what, told)
            assert told.count(UNREADABLE) == (language == "chinese")


@pytest.mark.full
def test_sft_and_evaluate_name_a_loss_that_means_nothing(base, tmp_path):
    """A random base with large weights is worse than a uniform guess on anything; a trained one is not."""
    data = write_jsonl(tmp_path / "d.jsonl", demonstrations())
    line = ("sft", "--model", base, "--dataset", data, "--samples", 0, *SMALL)
    told = warnings_of(*line, "--output", tmp_path / "held", "--eval-fraction", 0.1)
    vocabulary = 300
    assert "the held-out loss before training is " in told and f"above ln({vocabulary}) = 5.70" in told
    assert "the held-out loss after training is " in told and UNREADABLE not in told
    told = warnings_of(*line, "--output", tmp_path / "none", "--eval-fraction", 0)
    assert "the loss of the first batch before training is " in told and told.count("nats per token") == 1
    assert "the loss is " in warnings_of("evaluate", "--model", base, "--dataset", data, "--limit-rows", 8)
    learn = ("--max-steps", 40, "--batch-size", 16, "--lora-rank", 8, "--learning-rate", "5e-3", "--eval-fraction", 0.1)
    told = warnings_of(*line[:-6], *learn, "--output", tmp_path / "learned")
    assert "before training" in told and "after training" not in told
    assert "nats per token" not in warnings_of(
        "evaluate", "--model", tmp_path / "learned", "--dataset", data, "--limit-rows", 8
    )


@pytest.mark.full
def test_dpo_names_a_reference_that_cannot_read_the_responses(base, tmp_path):
    data = write_jsonl(tmp_path / "c.jsonl", comparisons()[:40])
    told = warnings_of("dpo", "--model", base, "--dataset", data, "--output", tmp_path / "x", *SMALL)
    assert "the reference's loss on the responses is " in told
    learned = tmp_path / "sft"
    rows = [{"prompt": r["prompt"], "completion": r[key]} for r in comparisons() for key in ("chosen", "rejected")]
    shown = write_jsonl(tmp_path / "d.jsonl", rows)
    learn = ("--max-steps", 40, "--batch-size", 16, "--lora-rank", 2, "--learning-rate", "1e-2", "--samples", 0)
    done("sft", "--model", base, "--dataset", shown, "--output", learned, *learn)
    told = warnings_of("dpo", "--model", learned, "--dataset", data, "--output", tmp_path / "y", *SMALL)
    assert "nats per token" not in told
