"""Built-in chat templates, and the tokens before plain text, such as BOS, which a template has to write itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import DatasetError, ModelError
from stages.places import absolute
from stages.reading import read_text

if TYPE_CHECKING:
    from stages.models.tokens import Text

PROBE_MESSAGES = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"})

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
    """The template that --chat-template names: a built-in one, fitted to the tokenizer, or a file's text.

    Raises ModelError if the file cannot be read.
    """
    if name in TEMPLATES:
        return write_opening(tokenizer) + TEMPLATES[name]
    try:
        return read_text(absolute(name, "--chat-template"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"cannot read the chat template: {error}",
            where="--chat-template",
            fix="give chatml, plain or a .jinja file",
        ) from None


def opening_tokens(tokenizer) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before every plain text, such as BOS, if any."""
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    starts = (k for k in range(len(whole) - len(bare) + 1) if whole[k : k + len(bare)] == bare)
    return tuple(whole[: next(starts, 0)])


def write_opening(tokenizer) -> str:
    """Jinja that writes the tokenizer's opening tokens, since rendered text is tokenised without special tokens."""
    opening = opening_tokens(tokenizer)
    if opening == (tokenizer.bos_token_id,):
        return "{{ bos_token }}"
    words = "".join(tokenizer.convert_ids_to_tokens(list(opening)))
    return f"{{{{ {words!r} }}}}" if words else ""


def scored_template(template: str, *, writes_end: bool) -> str:
    """The template, ending at the token of which a reward model reads the score: the last turn's end token.

    EOS is added if the template writes no end token. With a generation prompt the template is unchanged.
    """
    end = "" if writes_end else " + eos_token"
    return (
        f"{{% set conversation %}}{template}{{% endset %}}{{{{ conversation if add_generation_prompt or "
        f"messages[-1]['role'] != 'assistant' else conversation.rstrip(){end} }}}}"
    )


def stored_template(folder: Path) -> str | None:
    """The chat template that is saved with a tokenizer, if any."""
    alone, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if alone.exists():
            return alone.read_text(encoding="utf-8")
        return json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None  # loading the tokenizer raises the error


def template_warnings(text: Text, name: str | None) -> list[str]:
    """Warnings of a chat template that trains other tokens than it serves; `name` is what --chat-template gave.

    A file's template that lacks the opening tokens is used all the same: some models are served without them. Raises
    ModelError if it writes them twice.
    """
    opening, warnings = list(text.opening), []
    if opening and name is not None and name not in TEMPLATES:
        words, ids = (
            "".join(text.tokenizer.convert_ids_to_tokens(opening)),
            text.encode(text.render(PROBE_MESSAGES), rendered=True).ids,
        )
        if ids[: 2 * len(opening)] == opening * 2:
            raise ModelError(
                f"the template writes {words} twice",
                where=f"--chat-template {name}",
                fix="write it once, as {{ bos_token }}",
            )
        if ids[: len(opening)] != opening:
            warnings.append(
                f"--chat-template {name} does not write {words}, which the tokenizer puts before plain text; "
                "conversations are trained and sampled without it. Begin the file with {{ bos_token }} unless the "
                "model is meant to do without"
            )
    try:
        prompt, whole = text.render(PROBE_MESSAGES[:1], generate=True), text.render(PROBE_MESSAGES)
    except DatasetError:
        return warnings
    extra = prompt[len(os.path.commonprefix([prompt, whole])) :]
    if extra:
        warnings.append(
            f"the chat template ends a prompt with {extra!r}, which it does not write before a recorded response: "
            "responses are sampled after it, demonstrations and comparisons are learned without it"
        )
    return warnings
