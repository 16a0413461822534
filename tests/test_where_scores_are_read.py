"""One response has one score: in training, centring, PPO, evaluation and export it is read at the same token."""

from __future__ import annotations

import json

import pytest
import torch

from stages.data.comparisons import Comparison, Pair
from stages.data.rows import Demonstration, Prompt
from stages.models.base import load_base
from stages.models.model_ref import open_model
from stages.models.roles import Roles, adapter_of, head_of
from stages.models.templates import TEMPLATES
from stages.rollout.reward_sources import model_scores
from tests.commands import comparisons, demonstrations, done, prompts, refused, result, rlhf
from tests.parts import open_tiny_text
from tests.tiny import CHAT, build_model, build_tokenizer, write_jsonl

LEARN = ("--max-steps", 6, "--batch-size", 8, "--lora-rank", 4, "--learning-rate", "5e-3", "--sft-samples", 0)
ASKED = ({"role": "user", "content": "what is the time?"},)
SAID = {"role": "assistant", "content": "it is noon."}
NO_END = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% generation %}{{ m['content'] + '<|end|>\n\n' }}"
    "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def chat_base(folder, **options):
    """A tiny base whose vocabulary has ChatML's tokens."""
    build_model(folder, chat=True, **options)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "template", [CHAT, NO_END, MARKED, *TEMPLATES.values()], ids=["tiny", "no end", "marked", *TEMPLATES]
)
def test_comparison_demonstration_and_sample_are_the_same_tokens(tmp_path, template):
    """What PPO scores is prompt + response + the prompt's end token; a comparison and a demonstration are just that."""
    tokenizer = build_tokenizer(tmp_path, chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    text = open_tiny_text(tmp_path, stop_ids=(2,))
    prompt = text.prompt(Prompt("p:1", ASKED), 1000)
    words = " it is noon." if template == TEMPLATES["plain"] else "it is noon."
    said = tokenizer(words, add_special_tokens=False).input_ids
    sampled = [*prompt.ids.tolist(), *said, prompt.end_id]
    compared = text.comparison(Comparison("c:1", ASKED, ((SAID,), ({**SAID, "content": "no"},)), (Pair(0, 1),)), 1000)
    shown = text.judged(Demonstration("d:1", "", "", (*ASKED, SAID)), 1000)
    followed = text.judged(Demonstration("d:1", "", "", (*ASKED, SAID, *ASKED)), 1000)
    assert shown.ids.tolist() == compared[0].ids.tolist() == followed.ids.tolist()
    assert torch.equal(shown.targets, compared[0].targets) and shown.targets.tolist().index(True) == len(prompt.ids)
    assert shown.ids.tolist() == sampled


def test_plain_texts_are_the_same_tokens_too(tmp_path):
    """Also where a completion brings its own EOS, with a line break after it."""
    build_tokenizer(tmp_path)
    text = open_tiny_text(tmp_path)
    prompt = text.prompt(Prompt("p:1", "the cat"), 100)
    sampled = [*prompt.ids.tolist(), *text.tokenizer(" sat", add_special_tokens=False).input_ids, 2]
    for said in (" sat", " sat<eos>", " sat<eos>\n"):
        assert text.judged(Demonstration("d:1", "the cat", said), 100).ids.tolist() == sampled
        compared = text.comparison(Comparison("c:1", "the cat", (said, " ran"), (Pair(0, 1),)), 100)
        assert compared[0].ids.tolist() == sampled
        learned = text.demonstration(Demonstration("d:1", "the cat", said), "completion", 100)
        assert learned.ids.tolist() == sampled and learned.targets.sum() == len(sampled) - len(prompt.ids)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """SFT with ChatML, then a reward model centred on demonstrations that are conversations."""
    folder = tmp_path_factory.mktemp("read")
    base = chat_base(folder / "base")
    for name, rows in (("d", demonstrations), ("c", comparisons), ("p", prompts)):
        write_jsonl(folder / f"{name}.jsonl", rows(chat=True))
    shown = [{"messages": [*row["prompt"], {**SAID, "content": row["chosen"]}]} for row in comparisons(chat=True)[:60]]
    write_jsonl(folder / "shown.jsonl", shown)
    sft = ("sft", "--model", base, "--dataset", folder / "d.jsonl", "--output", folder / "sft", "--samples", 0)
    done(*sft, "--chat-template", "chatml", "--max-steps", 1, "--lora-rank", 2)
    told = result("reward", "--model", folder / "sft", "--dataset", folder / "c.jsonl", "--output", folder / "reward",
                  "--demonstrations", folder / "shown.jsonl", *LEARN)  # fmt: skip
    return folder, told


def served_scores(folder, rows) -> torch.Tensor:
    """Scores of conversations as PPO takes them: the prompt rendered, the response tokenised, the end token put."""
    source = open_model(str(folder / "reward"), stages=("reward",), what="--model")
    base = load_base(source, device=torch.device("cpu"), dtype=torch.float32)
    roles = Roles(base)
    roles.add("reward", adapter_of(base, source, trainable=False), head_of(base, folder / "reward"))
    text = open_tiny_text(folder / "reward")
    asked = [text.prompt(Prompt("p:1", row["messages"][:-1]), 1000) for row in rows]
    said = [text.tokenizer(row["messages"][-1]["content"], add_special_tokens=False).input_ids for row in rows]
    responses = [torch.tensor([*ids, 2]) for ids in said]  # ended by any stop token
    return model_scores(roles, "reward", asked, responses, torch.ones(len(rows), dtype=torch.bool))


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.full
def test_the_served_mean_of_demonstrations_is_zero(trained):
    folder, told = trained
    scores = served_scores(folder, rows_of(folder / "shown.jsonl"))
    assert float(scores.std()) > 1e-3
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
    assert told["report"]["demonstrations_mean"] == pytest.approx(0, abs=1e-5)
    assert told["report"]["demonstrations_std"] == pytest.approx(float(scores.std(unbiased=False)), abs=1e-5)


@pytest.mark.full
def test_a_report_on_comparisons_reads_where_ppo_reads(trained, tmp_path):
    folder, _ = trained
    rows = comparisons(chat=True)[::9]
    data = write_jsonl(tmp_path / "c.jsonl", rows)
    told = result("evaluate", "--model", folder / "reward", "--dataset", data)["reward_model"]
    for kind in ("chosen", "rejected"):
        shown = [{"messages": [*row["prompt"], {**SAID, "content": row[kind]}]} for row in rows]
        assert told[f"score_{kind}_mean"] == pytest.approx(float(served_scores(folder, shown).mean()), abs=1e-5)


@pytest.mark.full
def test_an_exported_reward_model_reads_conversations_there_too(trained, tmp_path):
    """By transformers alone: the exported chat template ends at the end token, which a classifier reads."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, _ = trained
    done("export", "--model", folder / "reward", "--output", tmp_path / "x")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "x").eval()
    words, sft = AutoTokenizer.from_pretrained(tmp_path / "x"), AutoTokenizer.from_pretrained(folder / "sft")
    rows = rows_of(folder / "shown.jsonl")[:8]
    found = []
    for row in rows:
        ids = words.apply_chat_template(row["messages"], return_dict=False)
        assert words.convert_ids_to_tokens(ids[-1]) == "<|im_end|>"
        with torch.no_grad():
            found.append(float(model(input_ids=torch.tensor([ids])).logits) + model.config.score_bias)
        question = {"conversation": row["messages"][:1], "tokenize": False, "add_generation_prompt": True}
        asked = [tokenizer.apply_chat_template(**question) for tokenizer in (words, sft)]
        assert asked[0] == asked[1]
    assert found == pytest.approx(served_scores(folder, rows).tolist(), abs=1e-4)


@pytest.mark.parametrize("template", [NO_END, TEMPLATES["plain"], "{% set messages = messages[-1:] %}" + NO_END])
def test_an_exported_template_ends_with_the_end_token_whatever_it_was(tmp_path, template):
    from stages.export import end_where_scored
    from stages.results import Silent

    build_tokenizer(tmp_path)
    text = open_tiny_text(tmp_path)
    text.tokenizer.chat_template = template
    text = type(text)(text.tokenizer, (2,))
    asked = text.render(ASKED, generate=True)
    judged = text.judged(Demonstration("d:1", "", "", (*ASKED, SAID)), 1000).ids.tolist()
    end_where_scored(text, Silent())
    served = text.tokenizer.apply_chat_template([*ASKED, SAID], return_dict=False)
    assert served == judged and served[-1] == 2
    assert text.render(ASKED, generate=True) == asked


@pytest.mark.full
def test_demonstrations_that_cannot_be_used_are_not_passed_over_in_silence(trained, tmp_path):
    folder, _ = trained
    bad = [{"messages": [*ASKED, SAID]}, {"messages": [*ASKED, {**SAID, "content": "one two three " * 60}]}]
    data = write_jsonl(tmp_path / "d.jsonl", bad)
    line = ("reward", "--model", folder / "sft", "--dataset", folder / "c.jsonl", "--demonstrations", data, "--dry-run")
    ended = rlhf(*line, "--output", tmp_path / "x")
    assert ended.code == 0 and "1 of 2 demonstrations is longer than max_tokens 128" in ended.stderr
    data = write_jsonl(tmp_path / "e.jsonl", [{"messages": [*ASKED, {"role": "tool", "content": "x"}]}])
    assert "e.jsonl:1" in refused(*line[:6], data, *line[7:], "--output", tmp_path / "x")


@pytest.mark.full
def test_a_reward_model_with_another_chat_template_is_named(trained, tmp_path):
    folder, _ = trained
    done("reward", "--model", folder / "sft", "--dataset", folder / "c.jsonl", "--output", tmp_path / "other",
         "--chat-template", "plain", *LEARN, "--eval-limit", 8)  # fmt: skip
    line = ("ppo", "--model", folder / "sft", "--dataset", folder / "p.jsonl", "--max-response-tokens", 4, "--dry-run")
    for reward, warned in ((tmp_path / "other", True), (folder / "reward", False)):
        ended = rlhf(*line, "--reward", reward, "--force", "--output", tmp_path / "x")
        assert ended.code == 0 and ("another chat template" in ended.stderr) == warned, ended.stderr
