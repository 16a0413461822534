"""What is trained begins as what is served: BOS once, from the saved template, whatever the tokenizer adds to text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stages.data.comparisons import Comparison, Pair
from stages.data.rows import Demonstration, Prompt
from stages.errors import ModelError
from stages.models.templates import CHATML, PLAIN, opening_tokens
from stages.models.tokens import load_text
from tests.commands import demonstrations, done, lines_of
from tests.tiny import TEXT, build_model, build_tokenizer, write_jsonl

TALK = (
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what is the time?"},
    {"role": "assistant", "content": "it is noon."},
    {"role": "user", "content": "thank you"},
    {"role": "assistant", "content": "the dog ran"},
)
BARE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ADDED = {  # what the post-processor puts around plain text, and the tokens before it
    "nothing": (None, []),
    "bos": ("<bos> $A", ["<bos>"]),
    "eos": ("$A <eos>", []),
    "bos and eos": ("<bos> $A <eos>", ["<bos>"]),
    "eos as bos": ("<eos> $A", ["<eos>"]),
    "another end": ("<bos> $A <|end|>", ["<bos>"]),
    "two": ("<|user|> <bos> $A", ["<|user|>", "<bos>"]),
}


def byte_level(folder: Path, added: str) -> Path:
    """A tokenizer like Llama 3's: byte-level, special tokens from the post-processor."""
    around, before = ADDED[added]
    tokenizer = build_tokenizer(folder, chat=True, bos=False)
    tokenizer.chat_template = None
    if around:
        ids = [(t, tokenizer.convert_tokens_to_ids(t)) for t in around.split() if t != "$A"]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    if before and before[-1] == "<eos>":
        tokenizer.bos_token = "<eos>"
    tokenizer.save_pretrained(folder)
    return folder


def sentencepiece(folder: Path) -> Path:
    """A tokenizer like Llama 2's: a space before each text, bytes for unknown letters, `add_bos_token`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
    )
    fast.save_pretrained(folder)
    return folder


def text_and_served(folder: Path, template: str, out: Path):
    """Our text with --chat-template, and the tokenizer as it is served from the checkpoint that it is saved with."""
    text = load_text(folder, chat_template=template, stop_ids=(), trust_remote_code=False)
    text.tokenizer.save_pretrained(out)
    return text, AutoTokenizer.from_pretrained(out)


def assert_as_served(text, served, before: list[int]) -> None:
    """Rows, prompts and comparisons are the served tokens and begin with `before` once."""
    whole = served.apply_chat_template(list(TALK), return_dict=False)
    asked = served.apply_chat_template(list(TALK[:4]), add_generation_prompt=True, return_dict=False)
    row = text.demonstration(Demonstration("d:1", "", "", TALK), "completion", 1000).ids.tolist()
    prompt = text.prompt(Prompt("p:1", TALK[:4]), 1000).ids.tolist()
    judged = text.comparison(Comparison("c:1", TALK[:4], (TALK[4:], TALK[2:3]), (Pair(0, 1),)), 1000)[0].ids.tolist()
    assert row[:-1] == whole[: len(row) - 1] and prompt == asked  # chatml spelled out ends with an EOS of our own
    assert judged == row[: len(judged)]
    for ids in (row, prompt, judged):
        assert ids[: len(before)] == before and ids[len(before) : 2 * len(before)] != (before or None)
    assert prompt == row[: len(prompt)]


@pytest.mark.parametrize("template", ["chatml", "plain"])
@pytest.mark.parametrize("added", ADDED)
def test_our_templates_write_what_the_tokenizer_puts_before_text(tmp_path, added, template):
    text, served = text_and_served(byte_level(tmp_path / "base", added), template, tmp_path / "out")
    before = text.tokenizer.convert_tokens_to_ids(ADDED[added][1])
    assert opening_tokens(text.tokenizer) == tuple(before)
    assert_as_served(text, served, before)
    plain = text.prompt(Prompt("p:1", "the cat"), 100).ids.tolist()
    assert plain == [*before, *text.tokenizer("the cat", add_special_tokens=False).input_ids]
    assert text.warnings == []


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_so_they_do_for_a_tokenizer_of_sentencepieces_kind(tmp_path, template):
    text, served = text_and_served(sentencepiece(tmp_path / "base"), template, tmp_path / "out")
    assert_as_served(text, served, [1])


def test_a_tokenizer_that_adds_nothing_leaves_our_templates_as_they_are(tmp_path):
    folder = byte_level(tmp_path, "nothing")
    for name, template in (("chatml", CHATML), ("plain", PLAIN)):
        text = load_text(folder, chat_template=name, stop_ids=(), trust_remote_code=False)
        assert text.tokenizer.chat_template == template


@pytest.mark.parametrize("added", ["nothing", "bos", "bos and eos"])
def test_a_template_from_a_file_is_used_as_it_is(tmp_path, added):
    """With `bos_token` it gives BOS once; without, none, and the command says so where plain text has one."""
    folder = byte_level(tmp_path / "base", added)
    bos = AutoTokenizer.from_pretrained(folder).bos_token_id
    for name, template, before in (("with", "{{ bos_token }}" + BARE, [bos]), ("without", BARE, [])):
        path = tmp_path / f"{name}.jinja"
        path.write_text(template)
        text, served = text_and_served(folder, str(path), tmp_path / name)
        assert_as_served(text, served, before)
        assert served.chat_template == template
        warned = added != "nothing" and name == "without"
        assert len(text.warnings) == warned and all("<bos>" in line and str(path) in line for line in text.warnings)


def test_a_template_that_writes_bos_twice_is_refused(tmp_path):
    folder = byte_level(tmp_path, "bos")
    (tmp_path / "twice.jinja").write_text("{{ bos_token }}<bos>" + BARE)
    with pytest.raises(ModelError, match="writes <bos> twice"):
        load_text(folder, chat_template=str(tmp_path / "twice.jinja"), stop_ids=(), trust_remote_code=False)


@pytest.mark.parametrize("added", ["bos", "bos and eos", "two"])
def test_text_that_spells_its_beginning_out_gets_it_once(tmp_path, added):
    """Conversations that were rendered beforehand often stand in a dataset with their <bos>."""
    text = load_text(byte_level(tmp_path, added), chat_template=None, stop_ids=(), trust_remote_code=False)
    words = "".join(ADDED[added][1])
    bare, spelled = (text.prompt(Prompt("p:1", said), 100).ids for said in ("the cat", words + "the cat"))
    assert torch.equal(bare, spelled)
    one, other = (
        text.demonstration(Demonstration("d:1", said, " sat"), "completion", 100)
        for said in ("the cat", words + "the cat")
    )
    assert torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets)


def test_a_prompt_that_was_cut_still_begins_with_bos(tmp_path):
    text, _ = text_and_served(byte_level(tmp_path / "base", "bos"), "plain", tmp_path / "out")
    long = ({"role": "user", "content": "one two three four five six " * 5},)
    row = text.comparison(Comparison("c:1", long, (TALK[2:3], TALK[4:]), (Pair(0, 1),)), 40)[0]
    assert row.cut and len(row.ids) == 40 and row.ids.tolist().count(1) == 1 and row.ids[0] == 1


def test_every_stage_trains_and_samples_on_the_served_tokens(tmp_path, monkeypatch):
    """Through the command line: what `rlhf sft` learns from, and what `rlhf sample` asks, begin with one <bos>."""
    import stages.sample
    import stages.sft

    seen: dict[str, list[list[int]]] = {"learned": [], "asked": []}
    learn, generate = stages.sft.learn_rows, stages.sample.generate

    def note_learned(roles, role, rows, *rest):
        seen["learned"] += [row.ids.tolist() for row in rows]
        return learn(roles, role, rows, *rest)

    def note_asked(base, prompts, *rest, **options):
        seen["asked"] += [ids.tolist() for ids in prompts]
        return generate(base, prompts, *rest, **options)

    monkeypatch.setattr(stages.sft, "learn_rows", note_learned)
    monkeypatch.setattr(stages.sample, "generate", note_asked)
    base = build_model(tmp_path / "base")
    data = write_jsonl(tmp_path / "d.jsonl", demonstrations(chat=True)[:40])
    out = tmp_path / "sft"
    done("sft", "--model", base, "--dataset", data, "--output", out, "--chat-template", "plain",
         "--max-steps", 1, "--batch-size", 4, "--lora-rank", 2, "--samples", 0)  # fmt: skip
    done("sample", "--model", out, "--dataset", data, "--output", tmp_path / "s.jsonl", "--max-response-tokens", 2)
    served = AutoTokenizer.from_pretrained(out)
    rows = [row["messages"] for row in lines_of(data)]
    whole = [served.apply_chat_template(row, return_dict=False) for row in rows]
    assert len(seen["learned"]) == 4 and all(ids in whole for ids in seen["learned"])
    asked = [served.apply_chat_template(row[:1], add_generation_prompt=True, return_dict=False) for row in rows]
    assert seen["asked"] == asked
    assert all(ids.count(1) == 1 and ids[0] == 1 for ids in seen["learned"] + seen["asked"])
