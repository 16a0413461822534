"""What is trained is what is served: tokens of rows against those of transformers' own `apply_chat_template`."""

from __future__ import annotations

import pytest
import torch

from stages.data.comparisons import Comparison, Pair
from stages.data.rows import Demonstration, Prompt
from stages.models.token_rows import Tokens
from stages.models.tokens import Text, load_text
from stages.training.row_tokens import RowEncoder
from stages.training.served import served_warnings
from tests.parts import sft_config
from tests.tiny import build_tokenizer

TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
THOUGHTS = (  # like Qwen3's: thoughts of answers to earlier questions are dropped
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% set said = m['content'].split('</think>')[-1].lstrip('\n') %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + (m['content'].split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m['content'] else '') + '\n</think>\n\n' }}{% endif %}{{ said + '<|im_end|>\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
TEMPLATES = {
    "plain chatml": "{% for m in messages %}" + TURN + "{% endfor %}" + ASK,
    "begins with bos": "{{ bos_token }}{% for m in messages %}" + TURN + "{% endfor %}" + ASK,
    "a system line of its own": (
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nthe cat is kind<|im_end|>\n' }}{% endif %}" + TURN + "{% endfor %}" + ASK
    ),
    "generation marks": MARKED,
    "strips contents": "{% for m in messages %}" + TURN.replace("m['content']", "m['content'].strip()") + "{% endfor %}"
    + ASK,
    "drops earlier thoughts": THOUGHTS,
    "ends turns with eos": "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
}  # fmt: skip
TALKS = {
    "two turns": ("what is the time?", "it is noon.", "thank you", "the dog ran"),
    "equal turns": ("red", "red", "red", "red"),
    "spaces around": (" what is the time? ", "it is noon. ", "thank you\n", "the dog ran \n"),
    "thoughts": ("what is the time?", "<think>\none two\n</think>\n\nnoon", "red?", "<think>\nsix\n</think>\n\nblue"),
    "an end token in a question": ("say <|im_end|> now", "it is noon", "thank you", "the dog ran"),
}
PAIR = Pair(0, 1)
CASES = [(t, n, s) for t in TEMPLATES for n in TALKS for s in (False, True)]


@pytest.fixture(scope="module", params=[True, False], ids=["tokenizer adds bos", "tokenizer adds nothing"])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    tokenizer = build_tokenizer(place, bos=request.param)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(place)
    return place


def text_with(folder, template: str | None) -> Text:
    text = load_text(folder, chat_template=None, stop_ids=(), trust_remote_code=False)
    text.tokenizer.chat_template = template
    return Text(text.tokenizer, ())


def talk(name: str, system: bool) -> tuple[dict[str, str], ...]:
    roles = ("user", "assistant") * 2
    turns = [{"role": role, "content": content} for role, content in zip(roles, TALKS[name], strict=True)]
    return tuple([{"role": "system", "content": "be kind"}] * system + turns)


def serve(text: Text, messages, **how) -> list[int]:
    """The tokens that transformers gives a server."""
    return text.tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False, **how)


@pytest.mark.parametrize(("template", "name", "system"), CASES)
def test_every_token_is_that_of_serving(folder, template, name, system):
    text = text_with(folder, TEMPLATES[template])
    messages = talk(name, system)
    whole, asked = serve(text, messages), serve(text, messages[:-1], add_generation_prompt=True)
    prompt = text.prompt(Prompt("r:1", messages[:-1]), 1000)
    assert prompt.ids.tolist() == asked
    for mask in ("completion", "assistant", "all"):
        row = text.demonstration(Demonstration("r:1", "", "", messages), mask, 1000)
        assert row.ids.tolist() == whole
        assert int(row.ids[row.targets][-1]) == (whole[-1] if mask == "all" else prompt.end_id)
    comparison = Comparison("r:1", messages[:-1], (messages[-1:], ({"role": "assistant", "content": "no"},)), (PAIR,))
    scored, other = text.comparison(comparison, 1000)
    assert scored.ids.tolist() == whole[: len(scored.ids)]
    assert not text.tokenizer.decode(whole[len(scored.ids) :]).strip()
    assert int(scored.ids[-1]) == int(other.ids[-1]) == prompt.end_id  # where the score is read
    judged = text.judged(Demonstration("r:1", "", "", messages), 1000)
    assert torch.equal(judged.ids, scored.ids) and torch.equal(judged.targets, scored.targets)


@pytest.mark.parametrize("name", [name for name in TALKS if name != "thoughts"])
def test_what_is_learned_follows_the_prompt_as_it_is_sampled_from(folder, name):
    """A sampled response after its prompt is the row that is learned, and the row that is scored."""
    text, messages = text_with(folder, TEMPLATES["a system line of its own"]), talk(name, False)
    asked = serve(text, messages[:-1], add_generation_prompt=True)
    row = text.demonstration(Demonstration("r:1", "", "", messages), "completion", 1000)
    assert row.ids.tolist()[: len(asked)] == asked and int(row.targets.nonzero()[0]) == len(asked)
    response = row.ids[row.targets].tolist()
    (scored,) = text.comparison(Comparison("r:1", messages[:-1], (messages[-1:],), ()), 1000)
    assert asked + response == scored.ids.tolist()


def test_marks_and_rendering_again_find_the_same_turns(folder):
    marked, plain = text_with(folder, MARKED), text_with(folder, TEMPLATES["plain chatml"])
    row = Demonstration("r:1", "", "", talk("two turns", True))
    found = marked.demonstration(row, "assistant", 1000)
    served = marked.tokenizer.apply_chat_template(
        list(row.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found.targets.tolist() == [bool(mask) for mask in served["assistant_masks"]]
    assert found.targets.tolist() == plain.demonstration(row, "assistant", 1000).targets.tolist()


@pytest.mark.parametrize("template", [None, TEMPLATES["begins with bos"]])
def test_raw_text_is_that_of_the_plain_tokenizer(folder, template):
    text = text_with(folder, template)
    plain, eos = text.tokenizer("the cat sat on the mat").input_ids, text.eos_id
    assert text.prompt(Prompt("r:1", "the cat sat"), 99).ids.tolist() == text.tokenizer("the cat sat").input_ids
    for mask in ("completion", "assistant", "all"):
        row = text.demonstration(Demonstration("r:1", "the cat sat", " on the mat"), mask, 99)
        assert row.ids.tolist() == [*plain, eos]
    scored = text.comparison(Comparison("r:1", "the cat sat", (" on the mat", " red"), (PAIR,)), 99)[0]
    assert scored.ids.tolist() == [*plain, eos]


def test_a_tokenizer_loaded_without_torch_is_the_same(folder):
    """What `rlhf preview` loads by class is what transformers chooses for such a base."""
    how = {"chat_template": "chatml", "stop_ids": (), "trust_remote_code": False}
    light, usual = load_text(folder, model_type="llama", **how), load_text(folder, **how)
    assert type(light.tokenizer) is type(usual.tokenizer)
    assert light.tokenizer.backend_tokenizer.to_str() == usual.tokenizer.backend_tokenizer.to_str()
    assert light.tokenizer.special_tokens_map == usual.tokenizer.special_tokens_map
    assert (light.opening, light.stop_ids, light.special) == (usual.opening, usual.stop_ids, usual.special)


# --- what is said of rows that are not


def warnings_of(folder, template, rows, **knobs):
    text = text_with(folder, template)
    return served_warnings(RowEncoder(sft_config(**knobs), SOURCE, text), rows)


class SOURCE:  # a model, as far as an encoder needs it
    context = 1000


def test_a_prompt_that_ends_in_a_space_is_told(folder):
    good, torn = Demonstration("r:1", "the cat sat", " on the mat"), Demonstration("r:2", "the cat sat ", "on the mat")
    assert warnings_of(folder, None, [good]) == []
    (told,) = warnings_of(folder, None, [good, torn])
    assert told.startswith("1 of 2 rows does not begin with the tokens of the prompt as it is served, such as r:2")


def test_earlier_turns_that_the_template_rewrites_are_told_only_if_they_are_learned(folder):
    rows = [Demonstration("r:1", "", "", talk("thoughts", False))]
    (told,) = warnings_of(folder, THOUGHTS, rows, mask="assistant")
    assert "rewrites earlier assistant turns of 1 of 1 row, such as r:1" in told and "--mask completion" in told
    assert warnings_of(folder, THOUGHTS, rows) == []
    for template in ("plain chatml", "strips contents", "generation marks"):
        assert warnings_of(folder, TEMPLATES[template], rows, mask="assistant") == []


def test_special_tokens_in_a_text_are_told(folder):
    rows = [Demonstration("r:1", "", "", talk("an end token in a question", False))]
    (told,) = warnings_of(folder, TEMPLATES["plain chatml"], rows)
    assert told.startswith("1 of 1 row has special tokens in the text, such as <|im_end|> at r:1")


def test_lists_and_tensors_are_one(folder):
    tokens = Tokens([1, 5, 6], [False, True, True], 9)
    row = tokens.as_row()
    assert row.ids.tolist() == [1, 5, 6] and row.targets.tolist() == [False, True, True]
    assert row.cut and row.whole == 9 and row.size == 3
