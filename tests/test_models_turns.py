"""Which tokens of a conversation are the assistant's, against constructions that share nothing with ours.

Every template is written twice: bare, as we get it, and with {% generation %} marks, for which transformers tells the
assistant's tokens by itself. Both render the same text.
"""

from __future__ import annotations

import random
import re

import pytest

from stages.data.comparisons import Comparison, Pair
from stages.data.rows import Demonstration, Prompt
from stages.errors import DatasetError
from stages.models.tokens import Text
from tests.marks import full, full_but
from tests.parts import open_tiny_text
from tests.tiny import build_tokenizer

EOS = 2
OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}[
{{- m['content'] + '<|im_end|>' }}]{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

SYSTEM_LINE = (  # a system line of its own, as Qwen 2.5's
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a yes man.<|im_end|>\n' }}{% endif %}"
    + CHATML
)

TRIMMED = CHATML.replace("m['content']", "m['content']|trim")

THINKING = """{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m['role'] == 'user' %}
{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}
{{- '<|im_start|>' + m['role'] + '\n' }}{%- if m['role'] == 'assistant' %}{%- set said = m['content'] %}
{%- set thought = '' %}{%- if '</think>' in said %}
{%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}[{%- if loop.index0 > ns.last %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}{%- else %}{{- said }}{%- endif %}
{{- '<|im_end|>' }}]{%- else %}{{- m['content'] + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""  # earlier thoughts go, as Qwen 3's

THOUGHTLESS = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set said = m['content'] %}
{%- if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}{{- '<|assistant|>' }}[
{{- said + eos_token }}]{% elif m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}{% else %}{{ m['content'] }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"""  # as DeepSeek R1's

BRACKETS = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}
{%- if loop.last or loop.index0 == messages|length - 2 %}{% set also = messages[0]['content'] + '\n\n' if
messages[0]['role'] == 'system' else '' %}{% else %}{% set also = '' %}{% endif %}{{ '[INST] ' + also + m['content'] +
' [/INST]' }}{% elif m['role'] == 'assistant' %}[{{ ' ' + m['content']|trim + ' ' + eos_token }}]{% endif %}
{%- endfor %}"""  # the system line moves to the last question, and there is no generation prompt, as Mistral's

WORDS = """{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}[{{ m['content'] }}]
{%- else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""

LAST_IS_OTHER = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}[
{%- if loop.last %}{{ 'one ' }}{% endif %}{{ m['content'] + '<|im_end|>' }}]{% else %}{{ m['content'] }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

NO_END_EARLIER = """{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}[{{ m['content'] }}
{%- if loop.last %}{{ eos_token }}{% endif %}]{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML, "system line": SYSTEM_LINE, "trimmed": TRIMMED, "thinking": THINKING,
    "thoughtless": THOUGHTLESS, "brackets": BRACKETS, "last is other": LAST_IS_OTHER,
}  # fmt: skip
ENDLESS = {"words": WORDS, "no end earlier": NO_END_EARLIER}

CONTENTS = [
    "a", "i", "yes", "no", "<", "\n", "im_start", "assistant", "user", "assistant\n", "im_end|>", "user:", "",
    "do you agree? answer yes or no", "yes yes", "the cat sat on the mat", " it is noon. ", "\n\nthank you\n", "é",
    "<think>one two</think>\n\nyes", "<think>\na\n</think>\n\na", "[INST] a [/INST]", "You are a yes man.", "eos",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    made = build_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=True, bos=False)
    marks = ["<|user|>", "<|assistant|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    made.add_special_tokens({"additional_special_tokens": marks})
    return made


def bare(template: str) -> str:
    return re.sub(r"\[(?=\n?\{)|(?<=\})\](?=\n?\{)", "", template)


def marked(template: str) -> str:
    return re.sub(r"(?<=\})\](?=\n?\{)", CLOSE, re.sub(r"\[(?=\n?\{)", OPEN, template))


def text_of(tokenizer, template: str) -> Text:
    tokenizer.chat_template = template
    return Text(tokenizer, (EOS,))


def conversation(draw: random.Random) -> tuple[dict[str, str], ...]:
    """Questions and answers of nasty contents; perhaps with a system line, perhaps ending with a question."""
    rows = [{"role": "system", "content": draw.choice(CONTENTS)}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 4)):
        rows.append({"role": "user", "content": draw.choice(CONTENTS)})
        rows.append({"role": "assistant", "content": draw.choice(CONTENTS)})
    if draw.random() < 0.2:
        rows.append({"role": "user", "content": draw.choice(CONTENTS)})
    return tuple(rows)


def transformers_mask(tokenizer, template: str, messages) -> tuple[list[int], list[bool]]:
    """Tokens and the assistant's among them, by transformers alone."""
    out = tokenizer.apply_chat_template(
        list(messages), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], [bool(on) for on in out["assistant_masks"]]


def last_run(mask: list[bool]) -> list[bool]:
    """The mask without all but its last run."""
    end = max(i for i, on in enumerate(mask) if on)
    begin = max((i for i in range(end) if not mask[i]), default=-1) + 1
    return [begin <= i <= end for i in range(len(mask))]


@pytest.mark.parametrize("marks", [False, *full(True)], ids=["bare", "marked"])
@pytest.mark.parametrize("name", full_but(("chatml", "thinking", "brackets", "last is other"), TEMPLATES))
def test_the_assistants_tokens_are_those_that_marks_tell(tokenizer, name, marks):
    """120 conversations each: every assistant turn with its end token, and nothing else."""
    template, draw = TEMPLATES[name], random.Random(name)
    for _ in range(120):
        messages = conversation(draw)
        ids, mask = transformers_mask(tokenizer, marked(template), messages)
        text = text_of(tokenizer, marked(template) if marks else bare(template))
        for which, expected in (("assistant", mask), ("completion", last_run(mask))):
            row = text.demonstration(Demonstration("d:1", "", "", messages), which, 10_000)
            assert row.ids.tolist() == ids, messages
            assert row.targets.tolist() == [False, *expected[1:]], (which, messages)


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_whose_earlier_turns_have_no_end(tokenizer, name):
    """Contents alone are learned of earlier turns; the very last one ends with EOS, ours if the template has none."""
    template, draw = ENDLESS[name], random.Random(name)
    for _ in range(120):
        messages = conversation(draw)
        if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
            continue  # nothing to learn
        pieces, expected = [], []  # characters of the text, and whether they are the assistant's
        for i, message in enumerate(messages):
            pieces.append(f"{message['role']}:{message['content']}\n")
            said = message["role"] == "assistant"
            expected += [False] * (len(message["role"]) + 1)
            expected += [said] * len(message["content"].rstrip()) if said else [False] * len(message["content"])
            expected += [False] * (len("".join(pieces)) - len(expected))
            if said and i + 1 == len(messages):
                pieces[-1] = pieces[-1][:-1]
        whole = "".join(pieces)
        if messages[-1]["role"] == "assistant":
            whole = whole.rstrip() if name == "words" else whole
        text = text_of(tokenizer, bare(template))
        row = text.demonstration(Demonstration("d:1", "", "", messages), "assistant", 10_000)
        coded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        wanted = [any(expected[start:stop]) for start, stop in coded.offset_mapping]
        ended = messages[-1]["role"] == "assistant"
        found = row.targets.tolist()
        assert row.ids.tolist()[: len(coded.input_ids)] == coded.input_ids, messages
        visible = [i for i, span in enumerate(coded.offset_mapping) if whole[slice(*span)].strip()]
        assert [found[i] for i in visible] == [wanted[i] for i in visible], messages
        if ended:
            last = max(i for i, on in enumerate(found) if on)
            assert row.ids[last] == EOS and row.ids.tolist().count(EOS) == 1


def talk(*said: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": ("user", "assistant")[i % 2], "content": words} for i, words in enumerate(said))


def learned(text: Text, messages, mask: str = "assistant") -> str:
    row = text.demonstration(Demonstration("d.jsonl:1", "", "", messages), mask, 10_000)
    return text.tokenizer.decode(row.ids[row.targets])


def test_a_question_that_follows_an_equal_word_does_not_tear_the_turn(tokenizer):
    """`yes` stands in the first question too, and the second question is `yes`."""
    text = text_of(tokenizer, bare(THINKING))
    messages = talk("do you agree? answer yes or no", "<think>one</think>\n\nno, yes", "yes", "a")
    assert learned(text, messages) == "no, yes<|im_end|><think>\n\n</think>\n\na<|im_end|>"


def test_what_is_judged_begins_where_a_response_is_sampled(tokenizer):
    """Thoughts of the last turn belong to the response: the policy is asked before them."""
    text = text_of(tokenizer, bare(THINKING))
    prompt, answer = talk("yes?", "yes", "and no?"), {"role": "assistant", "content": "<think>a</think>\n\na"}
    (row, _) = text.comparison(Comparison("c:1", prompt, ((answer,), talk("", "no")[1:]), (Pair(0, 1),)), 1000)
    asked = text.prompt(Prompt("p:1", prompt), 1000).ids.tolist()
    assert row.ids.tolist()[: len(asked)] == asked
    assert tokenizer.decode(row.ids[row.targets]) == "<think>\na\n</think>\n\na<|im_end|>"
    assert int(row.targets.nonzero()[0]) == len(asked)


@pytest.mark.parametrize("mask", ["assistant", "completion"])
def test_an_end_token_that_a_turn_quotes_does_not_end_it(tokenizer, mask):
    text = text_of(tokenizer, bare(CHATML))
    assert learned(text, talk("a", "write <|im_end|> to end"), mask) == "write <|im_end|> to end<|im_end|>"
    assert learned(text, talk("a", "it is noon.<|im_end|>"), mask) == "it is noon.<|im_end|>"  # not learned twice


def test_marks_that_leave_the_end_token_out_still_teach_to_end(tokenizer):
    template = CHATML.replace(
        "[\n{{- m['content'] + '<|im_end|>' }}]", OPEN + "{{ m['content'] }}" + CLOSE + "{{ '<|im_end|>' }}"
    )
    assert OPEN in template
    text = text_of(tokenizer, template)
    assert learned(text, talk("a", "yes", "yes", "no")) == "yes<|im_end|>no<|im_end|>"
    assert learned(text, talk("a", "yes", "yes", "no"), "completion") == "no<|im_end|>"
    assert learned(text, talk("a", "\n", "yes", "no")) == "\n<|im_end|>no<|im_end|>"


def test_marks_that_cover_more_than_the_response_are_followed(tokenizer):
    """As in templates that mark the role and the line break too: learned with every turn, but no response is longer."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    text, messages = text_of(tokenizer, template), talk("a", "yes", "yes", "no")
    ids, mask = transformers_mask(tokenizer, template, messages)
    row = text.demonstration(Demonstration("d:1", "", "", messages), "assistant", 1000)
    assert (row.ids.tolist(), row.targets.tolist()) == (ids, mask)
    assert learned(text, messages, "completion") == "no<|im_end|>\n"
    (judged, _) = text.comparison(Comparison("c:1", messages[:3], (messages[3:], messages[1:2]), (Pair(0, 1),)), 1000)
    assert tokenizer.decode(judged.ids[judged.targets]) == "no<|im_end|>"


def test_marks_around_nothing_are_refused(tokenizer):
    text = text_of(tokenizer, marked(CHATML).replace("m['role'] == 'assistant'", "m['role'] == 'model'"))
    with pytest.raises(DatasetError, match="marks nothing of the conversation") as caught:
        learned(text, talk("a", "yes"))
    assert caught.value.where == "d.jsonl:1"


CHANGED = {
    "upper": "m['content']|upper", "twice": "m['content'] + ' ' + m['content']", "short": "m['content'][:9]",
    "nothing": "''",
}  # fmt: skip


@pytest.mark.parametrize("how", CHANGED)
def test_a_rewritten_turn_that_is_not_certain_is_refused(tokenizer, how):
    """The last turn renders otherwise, so that no prefix tells where an earlier one stands."""
    template = bare(LAST_IS_OTHER).replace("m['content'] + '<|im_end|>'", f"{CHANGED[how]} + '<|im_end|>'")
    text = text_of(tokenizer, template)
    with pytest.raises(DatasetError, match="changes the assistant's text") as caught:
        learned(text, talk("a", "the cat sat on the mat", "b", "yes"))
    assert caught.value.where == "d.jsonl:1" and "{% generation %}" in caught.value.fix


def test_an_end_that_only_earlier_turns_have_is_refused_unless_it_is_the_end_token(tokenizer):
    """As in templates that close the final turn with a token of its own."""
    template = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}" + (
        "{{ '<|im_end|>' if loop.last else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    text = text_of(tokenizer, template)
    with pytest.raises(DatasetError, match="ends an earlier assistant turn otherwise than the last one"):
        learned(text, talk("a", "yes", "b", "no"))
    assert learned(text, talk("a", "yes", "b", "no"), "completion") == "no<|im_end|>"
    known = Text(tokenizer, (EOS, tokenizer.convert_tokens_to_ids("<|end|>")))
    assert learned(known, talk("a", "yes", "b", "no")) == "yes<|end|>no<|im_end|>"


def test_spaces_of_a_tokenizer_that_trims_its_offsets_are_learned(tmp_path):
    """GPT-NeoX's kind reports no characters for tokens that are spaces alone: indentation is learned all the same."""
    from tokenizers import processors

    tokenizer = build_tokenizer(tmp_path, bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    said = "one:\n    two"
    assert (0, 0) in {(b - a, 0) for a, b in tokenizer(said, return_offsets_mapping=True).offset_mapping}
    text = Text(tokenizer, (EOS,))
    row = text.demonstration(Demonstration("d:1", "the cat\n", said), "completion", 100)
    assert tokenizer.decode(row.ids[row.targets]) == said + "<eos>"
    text = text_of(tokenizer, bare(WORDS))
    assert learned(text, talk("the cat", said)) == said + "<eos>"


def test_a_template_that_samples_otherwise_than_it_records_is_named(tokenizer, tmp_path):
    """Responses come after `<think>`, recorded ones do not; nothing is said of templates where both begin alike."""
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = bare(template)
        tokenizer.save_pretrained(tmp_path / name)
        warned = open_tiny_text(tmp_path / name).warnings
        assert [("'<think>\\n'" in line) for line in warned] == [True] * (name == "thoughtless"), name
