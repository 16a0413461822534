"""Text to tokens: which are learned, where a turn ends, and what is said back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from stages.data.comparisons import Comparison, Pair
from stages.data.rows import Demonstration, Prompt
from stages.errors import DatasetError, ModelError
from stages.models.tokens import Text, load_text
from tests.parts import open_tiny_text
from tests.tiny import CHAT, build_tokenizer

EOS, END = 2, 6  # <eos> and <|end|>
TALK = (
    {"role": "user", "content": "what is the time?"},
    {"role": "assistant", "content": "it is noon."},
    {"role": "user", "content": "thank you very much!"},
    {"role": "assistant", "content": "the dog ran to the park"},
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def plain(model_folder):
    return open_tiny_text(model_folder("llama"))


@pytest.fixture(scope="module")
def chat(model_folder):
    return open_tiny_text(model_folder("llama", chat=True))


def with_template(model_folder, template: str, **options) -> Text:
    text = open_tiny_text(model_folder("llama"), **options)
    text.tokenizer.chat_template = template
    return Text(text.tokenizer, (EOS,))


def ids_of(text, piece):
    return text.tokenizer(piece, add_special_tokens=False).input_ids


def talk(*turns):
    roles = ("user", "assistant") * len(turns)
    return tuple({"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False))


def conversation(messages=TALK):
    return Demonstration("d.jsonl:1", "", "", messages)


def texts(prompt, completion):
    return Demonstration("d.jsonl:1", prompt, completion)


def learned(row):
    return row.ids[row.targets].tolist()


# --- conversations


def pieces_of_talk(text):
    """The tokens of TALK in the tiny template, piece by piece, and which of them a mask learns."""
    parts = []
    for turn, message in enumerate(TALK):
        parts += [(f"<|{message['role']}|>", ()), (message["content"], (turn,)), ("<|end|>", (turn,))]
    ids, marks = [], []
    for piece, mark in parts:
        ids += ids_of(text, piece)
        marks += [mark] * len(ids_of(text, piece))
    return ids, marks


@pytest.mark.parametrize(("mask", "turns"), [("completion", {3}), ("assistant", {1, 3}), ("all", None)])
def test_a_conversations_targets_are_exact(chat, mask, turns):
    """Check 29: the tokens of assistant turns with their end token; `all` but the first, which nothing predicts."""
    ids, marks = pieces_of_talk(chat)
    expected = [turns is None or bool(mark) and mark[0] in turns for mark in marks]
    expected[0] = False
    row = chat.demonstration(conversation(), mask, 1000)
    assert row.ids.tolist() == ids
    assert row.targets.tolist() == expected
    assert not row.cut and EOS not in ids
    assert learned(row).count(END) == {"completion": 1, "assistant": 2, "all": 4}[mask]


@pytest.mark.parametrize("mask", ["completion", "assistant"])
def test_what_the_user_says_is_never_learned(chat, mask):
    """Check 29: editing the user's turns changes no target."""
    edited = talk("blue bird", TALK[1]["content"], "one two three four five six", TALK[3]["content"])
    assert learned(chat.demonstration(conversation(edited), mask, 1000)) == learned(
        chat.demonstration(conversation(), mask, 1000)
    )


def test_a_template_without_an_end_token_gets_eos_once_at_the_very_end(model_folder):
    """Check 29: EOS is a target exactly once, after the last turn's last visible token."""
    text = with_template(model_folder, NO_END)
    assert text.turn_end_id == EOS
    whole = (
        "user:what is the time?\nassistant:it is noon.\nuser:thank you very much!\nassistant:the dog ran to the park"
    )
    learnt = {
        "completion": "the dog ran to the park<eos>",
        "assistant": "it is noon.the dog ran to the park<eos>",
        "all": whole[1:] + "<eos>",  # `u` is the first token
    }
    for mask, expected in learnt.items():
        row = text.demonstration(conversation(), mask, 1000)
        assert row.ids.tolist() == [*ids_of(text, whole), EOS]
        assert text.tokenizer.decode(row.ids[row.targets]) == expected


def test_plain_template_ends_every_assistant_turn_with_eos(model_folder):
    text = open_tiny_text(model_folder("llama"), chat_template="plain")
    assert text.turn_end_id == EOS
    row = text.demonstration(conversation(), "completion", 1000)
    expected = (
        "<bos>Human: what is the time?\n\nAssistant: it is noon.<eos>\n\nHuman: thank you very much!\n\nAssistant:"
    )
    assert text.render(TALK[:3], generate=True) == expected
    assert text.tokenizer.decode(row.ids) == (expected + " the dog ran to the park<eos>\n\n")
    assert text.tokenizer.decode(row.ids[row.targets]) == " the dog ran to the park<eos>"
    every = text.demonstration(conversation(), "assistant", 1000)
    assert text.tokenizer.decode(every.ids[every.targets]) == " it is noon.<eos> the dog ran to the park<eos>"
    prompt = text.prompt(Prompt("p", TALK[:3]), 1000)
    assert row.ids.tolist()[: len(prompt.ids)] == prompt.ids.tolist()  # sampled from what was trained on
    assert int(row.targets.nonzero()[0]) == len(prompt.ids)


def test_chatml_without_its_tokens_gets_eos_once(model_folder):
    text = open_tiny_text(model_folder("llama"), chat_template="chatml")
    assert text.turn_end_id == EOS  # `<|im_end|>` is spelled out in this vocabulary: no single token can stop it
    row = text.demonstration(conversation(), "completion", 1000)
    assert text.tokenizer.decode(row.ids[row.targets]) == "the dog ran to the park<|im_end|><eos>"
    assert row.ids.tolist().count(EOS) == 1 and row.ids[-1] == EOS


def test_chatml_with_its_tokens_ends_turns_with_them(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path)
    text = open_tiny_text(tmp_path, chat_template="chatml")
    end = text.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert text.turn_end_id == end and text.stop_ids == (EOS, end)
    row = text.demonstration(conversation(), "assistant", 1000)
    said = text.tokenizer.decode(row.ids[row.targets])
    assert said == "it is noon.<|im_end|>the dog ran to the park<|im_end|>"  # not the line break after it
    assert EOS not in row.ids


def test_an_end_token_that_only_the_base_names_ends_turns_too(model_folder):
    """Some bases end turns with a token that their tokenizer does not call special but generation_config stops at."""
    tokenizer = open_tiny_text(model_folder("llama")).tokenizer
    tokenizer.chat_template = CHAT.replace("<|end|>", "!")
    mark = ids_of(SimpleNamespace(tokenizer=tokenizer), "!")[0]
    assert Text(tokenizer, (EOS, mark)).turn_end_id == mark
    assert Text(tokenizer, (EOS,)).turn_end_id == EOS


def test_a_turn_that_is_not_the_last_message_keeps_what_follows(chat):
    row = chat.demonstration(conversation(TALK[:3]), "completion", 1000)
    assert chat.tokenizer.decode(row.ids[row.targets]) == "it is noon.<|end|>"
    assert row.ids[-1] == END and not row.targets[-1]


def test_a_template_that_trims_is_followed(model_folder):
    template = CHAT.replace("m['content']", "m['content']|trim")
    tokenizer = open_tiny_text(model_folder("llama", chat=True)).tokenizer
    tokenizer.chat_template = template
    text = Text(tokenizer, (EOS,))
    spaced = talk(" what is the time? ", "  it is noon. ", "thank you", " the dog\n")
    row = text.demonstration(conversation(spaced), "assistant", 1000)
    assert text.tokenizer.decode(row.ids[row.targets]) == "it is noon.<|end|>the dog<|end|>"


def test_a_template_that_rewrites_earlier_turns_is_followed(model_folder):
    """Some templates render a turn otherwise once it is not the last, so prefixes do not match."""
    tokenizer = open_tiny_text(model_folder("llama", chat=True)).tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ 'one two ' }}{% endif %}"
        "{{ m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    text = Text(tokenizer, (EOS,))
    row = text.demonstration(conversation(), "assistant", 1000)
    said = text.tokenizer.decode(row.ids[row.targets])
    assert said == "it is noon.<|end|>one two the dog ran to the park<|end|>"


def test_a_template_that_changes_what_is_said_is_refused(model_folder):
    changed = NO_END.replace("m['content']", "(m['content']|upper if loop.last else m['content']|title)")
    text = with_template(model_folder, changed)
    with pytest.raises(DatasetError, match="changes the assistant's text") as caught:
        text.demonstration(conversation(), "assistant", 1000)
    assert caught.value.where == "d.jsonl:1"


def test_a_template_that_refuses_says_why(model_folder):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + NO_END
    text = with_template(model_folder, template)
    with pytest.raises(DatasetError, match="the chat template refuses the conversation: no system role"):
        text.render(({"role": "system", "content": "be kind"},))


def test_a_conversation_needs_a_template(plain):
    for call in (
        lambda: plain.demonstration(conversation(), "completion", 1000),
        lambda: plain.prompt(Prompt("d.jsonl:1", TALK[:1]), 1000),
        lambda: plain.comparison(Comparison("d.jsonl:1", TALK[:1], (TALK[1:2], TALK[3:]), (Pair(0, 1),)), 100),
    ):
        with pytest.raises(DatasetError, match="no chat template") as caught:
            call()
        assert caught.value.where == "d.jsonl:1" and "--chat-template" in caught.value.fix


# --- plain texts


@pytest.mark.parametrize("mask", ["completion", "assistant", "all"])
def test_texts_are_tokenised_whole_with_eos_once(plain, mask):
    row = plain.demonstration(texts("the cat sat", " on the mat."), mask, 1000)
    prompt, completion = ids_of(plain, "the cat sat"), ids_of(plain, " on the mat.")
    assert row.ids.tolist() == [1, *prompt, *completion, EOS]
    learnt = mask == "all"
    assert row.targets.tolist() == [False, *[learnt] * len(prompt), *[True] * (len(completion) + 1)]


def test_a_text_alone_is_learned_whole(plain):
    row = plain.demonstration(texts("", "the cat sat"), "completion", 1000)
    assert learned(row) == [*ids_of(plain, "the cat sat"), EOS]


def test_a_token_across_the_border_is_learned(plain):
    """Texts are not tokenised apart: ` cat` is one token, and part of it is the completion's."""
    whole = ids_of(plain, "the cat")
    row = plain.demonstration(texts("the c", "at"), "completion", 1000)
    assert row.ids.tolist() == [1, *whole, EOS] != [1, *ids_of(plain, "the c"), *ids_of(plain, "at"), EOS]
    assert learned(row) == [whole[-1], EOS]


def test_an_eos_that_the_completion_brings_is_not_doubled(plain):
    assert learned(plain.demonstration(texts("the cat", " sat<eos>"), "completion", 1000)) == [
        *ids_of(plain, " sat"),
        EOS,
    ]
    rows = plain.comparison(Comparison("c:1", "the cat", (" sat<eos>", " ran"), (Pair(0, 1),)), 100)
    assert [row.ids.tolist().count(EOS) for row in rows] == [1, 1]


def test_an_eos_that_the_tokenizer_adds_is_not_doubled(plain):
    import copy

    from tokenizers import processors

    tokenizer = copy.deepcopy(plain.tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", EOS)]
    )
    text = Text(tokenizer, (EOS,))
    assert tokenizer("the cat").input_ids[-1] == EOS
    assert text.demonstration(texts("the", " cat"), "completion", 1000).ids.tolist() == [
        1,
        *ids_of(plain, "the cat"),
        EOS,
    ]
    assert text.prompt(Prompt("p", "the cat"), 100).ids.tolist() == [1, *ids_of(plain, "the cat")]


def test_an_instruction_row_follows_the_template_where_there_is_one(plain, chat):
    row = Demonstration(
        "d:1", "### Instruction:\nhello\n\n### Response:\n", "it is noon.", talk("hello", "it is noon.")
    )
    assert chat.tokenizer.decode(chat.demonstration(row, "completion", 1000).ids) == (
        "<|user|>hello<|end|><|assistant|>it is noon.<|end|>"
    )
    assert plain.tokenizer.decode(plain.demonstration(row, "completion", 1000).ids) == (
        "<bos>### Instruction:\nhello\n\n### Response:\nit is noon.<eos>"
    )


def test_bytes_of_one_letter_are_learned_or_not_together(plain):
    row = plain.demonstration(texts("the é", "ü"), "completion", 1000)
    assert plain.tokenizer.decode(row.ids[row.targets], skip_special_tokens=True) == "ü"
    assert len(learned(row)) == 3  # two bytes and EOS


# --- rows too long


@pytest.mark.parametrize("mask", ["completion", "assistant", "all"])
def test_a_long_row_is_cut_without_a_false_end(plain, chat, mask):
    """Check 29: what is left is the beginning of the whole row; EOS and end-of-turn are gone."""
    for text, row in ((plain, texts("the cat", " sat on the mat and the dog ran")), (chat, conversation())):
        whole = text.demonstration(row, mask, 1000)
        size = len(whole.ids)
        short = text.demonstration(row, mask, size - 1)
        assert short.cut and not whole.cut
        assert torch.equal(short.ids, whole.ids[:-1]) and torch.equal(short.targets, whole.targets[:-1])
        assert short.ids[-1] not in (EOS, END)
        assert not text.demonstration(row, mask, size).cut


def test_a_row_whose_prompt_fills_it_is_refused(plain):
    with pytest.raises(DatasetError, match="nothing is left to learn within 4 tokens") as caught:
        plain.demonstration(texts("the cat sat on the mat", " and"), "completion", 4)
    assert caught.value.where == "d.jsonl:1" and "--max-tokens" in caught.value.fix


# --- prompts


def test_prompts_as_text_and_as_messages(plain, chat):
    row = plain.prompt(Prompt("p.jsonl:1", "the cat sat", {"answer": 4}), 100)
    assert row.ids.tolist() == [1, *ids_of(plain, "the cat sat")]
    assert (row.text, row.end_id, row.columns, row.where) == ("the cat sat", EOS, {"answer": 4}, "p.jsonl:1")
    row = chat.prompt(Prompt("p.jsonl:2", TALK[:3]), 100)
    assert chat.tokenizer.decode(row.ids) == (
        "<|user|>what is the time?<|end|><|assistant|>it is noon.<|end|>"
        "<|user|>thank you very much!<|end|><|assistant|>"
    )
    assert row.text == list(TALK[:3]) and row.end_id == END
    assert chat.prompt(Prompt("p.jsonl:3", "the cat"), 100).end_id == EOS  # text stays text


def test_a_prompt_that_does_not_fit_is_refused(plain):
    row = Prompt("p.jsonl:7", "the cat sat")
    size = len(plain.prompt(row, 100).ids)
    assert len(plain.prompt(row, size).ids) == size
    with pytest.raises(DatasetError, match=f"the prompt has {size} tokens, {size - 1} fit") as caught:
        plain.prompt(row, size - 1)
    assert caught.value.where == "p.jsonl:7: prompt" and "--max-prompt-tokens" in caught.value.fix


def test_a_prompt_without_tokens_is_refused(tmp_path):
    build_tokenizer(tmp_path, bos=False)
    with pytest.raises(DatasetError, match="the prompt has no tokens"):
        open_tiny_text(tmp_path).prompt(Prompt("p.jsonl:1", ""), 10)


# --- responses


def test_a_response_is_read_without_its_end_and_with_its_spacing(plain):
    prompt = torch.tensor([1, *ids_of(plain, "the cat")])
    for said in (" sat on", "sat", " sat \n", "", "ü!"):
        response = torch.tensor([*ids_of(plain, said), EOS], dtype=torch.int64)
        assert plain.response_text(prompt, response) == said


def test_a_stop_token_that_is_not_special_is_left_out_too(model_folder, plain):
    """Else a function that compares answers would see `4!` where the model said `4` and stopped."""
    mark = ids_of(plain, "!")[0]
    text = open_tiny_text(model_folder("llama"), stop_ids=(EOS, mark))
    prompt = torch.tensor([1, *ids_of(plain, "the cat")])
    assert text.response_text(prompt, torch.tensor([*ids_of(plain, " sat"), mark])) == " sat"
    assert text.response_text(prompt, torch.tensor([mark])) == ""
    assert text.response_text(prompt, torch.tensor([mark, *ids_of(plain, " sat")])) == "! sat"


def test_spacing_is_kept_by_a_tokenizer_whose_decoder_strips_it(tmp_path):
    """Tokenizers in SentencePiece's manner drop the space before the first word that they decode."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", "▁the", "▁cat", "▁sat", "s"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", bos_token="<bos>")
    text = Text(fast, (2,))
    assert fast.decode([6]) == "sat"
    assert text.response_text(torch.tensor([1, 4, 5]), torch.tensor([6, 2])) == " sat"
    assert text.response_text(torch.tensor([1, 4, 5]), torch.tensor([7, 2])) == "s"


def test_a_letter_that_begins_in_the_prompt_is_still_read(plain):
    whole = ids_of(plain, "ü")
    assert len(whole) == 2
    said = plain.response_text(torch.tensor([1, whole[0]]), torch.tensor([whole[1], *ids_of(plain, " sat"), EOS]))
    assert said.endswith(" sat")


# --- comparisons


def test_each_response_is_judged_to_its_end(plain, chat):
    row = Comparison("c.jsonl:1", "the cat", (" sat on the mat.", " ran"), (Pair(0, 1),))
    found = plain.comparison(row, 100)
    for said, one in zip(row.responses, found, strict=True):
        assert one.ids.tolist() == [1, *ids_of(plain, "the cat"), *ids_of(plain, said), EOS]
        assert learned(one) == [*ids_of(plain, said), EOS]
    row = Comparison("c.jsonl:1", TALK[:3], (TALK[3:], talk("x", "it is noon.")[1:]), (Pair(0, 1),))
    found = chat.comparison(row, 100)
    for said, one in zip(("the dog ran to the park", "it is noon."), found, strict=True):
        prompt = ids_of(chat, chat.render(TALK[:3], generate=True))
        assert one.ids.tolist() == [*prompt, *ids_of(chat, said), END] and not one.cut
        assert learned(one) == [*ids_of(chat, said), END]


def test_a_judged_conversation_ends_at_its_stop_token(model_folder):
    """The line break that ChatML writes after a turn is not read by the reward model; PPO never samples it either."""
    text = open_tiny_text(model_folder("llama"), chat_template="plain")
    row = Comparison("c.jsonl:1", TALK[:1], (TALK[1:2], TALK[3:]), (Pair(0, 1),))
    assert [one.ids[-1].item() for one in text.comparison(row, 100)] == [EOS, EOS]


def test_a_long_prompt_loses_its_beginning_and_a_long_response_its_end(plain):
    prompt, response = "one two three four five six seven", " red green blue"
    whole = plain.comparison(Comparison("c:1", prompt, (response, " x"), (Pair(0, 1),)), 1000)[0]
    before = int((~whole.targets).sum())
    after = len(whole.ids) - before
    assert before >= 12 and after >= 4

    def fitted(size):
        return plain.comparison(Comparison("c:1", prompt, (response, " x"), (Pair(0, 1),)), size)[0]

    row = fitted(after + 6)  # the whole response, BOS and the prompt's last five tokens
    assert row.cut and row.ids.tolist() == [1, *whole.ids[before - 5 :].tolist()]
    assert row.targets.tolist() == [False] * 6 + [True] * after
    size = after  # a quarter is kept for the prompt, and the response loses its end
    row = fitted(size)
    kept = size // 4
    assert row.cut and row.ids.tolist() == [
        1,
        *whole.ids[before - kept + 1 : before].tolist(),
        *whole.ids[before : before + size - kept].tolist(),
    ]
    assert EOS not in row.ids


# --- loading


def test_stop_ids_are_eos_the_turns_end_and_the_bases_own(model_folder):
    assert open_tiny_text(model_folder("llama"), stop_ids=(2, 9)).stop_ids == (2, 9)
    assert open_tiny_text(model_folder("llama"), stop_ids=()).stop_ids == (EOS,)
    assert open_tiny_text(model_folder("llama", chat=True)).stop_ids == (EOS, END)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = build_tokenizer(tmp_path)
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    folder = tmp_path / "no-eos"
    plain.save_pretrained(folder)
    with pytest.raises(ModelError, match="names no end-of-sequence token") as caught:
        open_tiny_text(folder)
    assert caught.value.where == str(folder) and "eos_token" in caught.value.fix


def test_a_tokenizer_without_offsets_is_refused(monkeypatch, tmp_path):
    slow = SimpleNamespace(is_fast=False, eos_token_id=2)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: slow)
    with pytest.raises(ModelError, match="no character offsets"):
        open_tiny_text(tmp_path)


def test_a_tokenizer_that_cannot_be_loaded_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        open_tiny_text(tmp_path)


def test_a_template_comes_from_a_file(model_folder, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(NO_END)
    text = open_tiny_text(model_folder("llama"), chat_template=str(path))
    assert text.render(TALK[:1], generate=True) == "user:what is the time?\nassistant:"
    for wrong in (str(tmp_path / "none.jinja"), str(tmp_path)):
        with pytest.raises(ModelError, match="cannot read the chat template") as caught:
            load_text(model_folder("llama"), chat_template=wrong, stop_ids=(), trust_remote_code=False)
        assert caught.value.where == "--chat-template"


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_the_pad_token_changes_no_target(tmp_path, plain, pad):
    """Without a pad token, or with EOS in its place, EOS is learned all the same."""
    build_tokenizer(tmp_path, pad=pad)
    row = texts("the cat", " sat")
    one, other = (text.demonstration(row, "completion", 100) for text in (plain, open_tiny_text(tmp_path)))
    assert torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets)
