"""Responses to held-out prompts, written to samples.jsonl during training."""

from __future__ import annotations

from collections.abc import Iterator

from stages.data.rows import Prompt
from stages.errors import DatasetError
from stages.models.tokens import PromptRow, Text
from stages.rollout.generate import Sampling, generate
from stages.training.session import Session

SAMPLE_TOKENS = 128


def prompts_up_to(text: Text, prompts: list[Prompt], tokens: int) -> Iterator[PromptRow]:
    """The prompts of at most so many tokens; longer ones may be trained on or scored, but are not answered."""
    for prompt in prompts:
        try:
            yield text.prompt(prompt, tokens)
        except DatasetError:
            continue


def show_samples(session: Session, role: str, prompts: list[Prompt], step: int) -> None:
    """Answer a few held-out prompts under a role at temperature 0.7 and append them to samples.jsonl."""
    base, text = session.base, session.text
    room = min(SAMPLE_TOKENS, base.context // 2)
    rows = list(prompts_up_to(text, prompts, base.context - room))
    if not rows or not session.ranks.first:
        return
    # The same noise at every step, so that differences come from training.
    keys = [(session.config.seed, "samples", i) for i in range(len(rows))]
    with session.roles.use(role):
        responses = generate(base, [r.ids for r in rows], keys, text.stop_ids, Sampling(0.7, room))
    session.run.samples(
        [
            {"step": step, "prompt": row.text, "response": text.response_text(row.ids, response), "where": row.where}
            for row, response in zip(rows, responses, strict=True)
        ]
    )


def flatten_text(prompt: object) -> str:
    """A prompt's text, or a conversation in lines of `role: content`."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
