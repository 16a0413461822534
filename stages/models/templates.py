"""Chat templates of our own, and what a tokenizer puts before plain text, which a template has to write by itself."""

from __future__ import annotations

import json
from pathlib import Path

from stages.errors import ModelError
from stages.places import absolute
from stages.reading import read_text

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ ('Human: ' if message['role'] == 'user' else 'System: ') + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "plain": PLAIN}


def choose_template(name: str, tokenizer) -> str:
    """The template that --chat-template names: one of ours, fitted to the tokenizer, or a file's text as it is.

    Raises ModelError where the file cannot be read.
    """
    if name in TEMPLATES:
        return write_opening(tokenizer) + TEMPLATES[name]
    return _read_template(name)


def opening_tokens(tokenizer) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before every plain text, such as BOS; none where it adds none."""
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    found = (k for k in range(len(whole) - len(bare) + 1) if whole[k : k + len(bare)] == bare)
    return tuple(whole[: next(found, 0)])


def write_opening(tokenizer) -> str:
    """Jinja that writes the tokenizer's opening tokens, since rendered text is tokenised without special tokens."""
    opening = opening_tokens(tokenizer)
    if opening == (tokenizer.bos_token_id,):
        return "{{ bos_token }}"
    words = "".join(tokenizer.convert_ids_to_tokens(list(opening)))
    return f"{{{{ {words!r} }}}}" if words else ""


def scored_template(template: str, *, writes_end: bool) -> str:
    """The template, ending where a reward model reads the score: at the last turn's end token, without a line break.

    Where it writes no end token, EOS. With a generation prompt it is the template as it was.
    """
    end = "" if writes_end else " + eos_token"
    return (
        f"{{% set conversation %}}{template}{{% endset %}}{{{{ conversation if add_generation_prompt or "
        f"messages[-1]['role'] != 'assistant' else conversation.rstrip(){end} }}}}"
    )


def stored_template(folder: Path) -> str | None:
    """The chat template that is saved with a tokenizer; None where there is none."""
    alone, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if alone.exists():
            return alone.read_text(encoding="utf-8")
        return json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None  # whoever loads the tokenizer says what is wrong


def _read_template(name: str) -> str:
    try:
        return read_text(absolute(name, "--chat-template"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"cannot read the chat template: {error}",
            where="--chat-template",
            fix="give chatml, plain or a .jinja file",
        ) from None
