"""What the model says to held-out prompts, written to samples.jsonl while it trains."""

from __future__ import annotations

from stages.data.rows import Prompt
from stages.errors import DatasetError
from stages.models.tokens import PromptRow
from stages.rollout.generate import Sampling, generate
from stages.training.session import Session

SAMPLE_TOKENS = 128


def show_samples(session: Session, role: str, prompts: list[Prompt], step: int) -> None:
    """Answer a few held-out prompts under a role at temperature 0.7 and append them to samples.jsonl."""
    roles, text = session.roles, session.text
    room = min(SAMPLE_TOKENS, roles.base.context // 2)
    rows: list[PromptRow] = []
    for prompt in prompts:
        try:
            rows.append(text.prompt(prompt, roles.base.context - room))
        except DatasetError:  # too long to answer, though not too long to learn from
            continue
    if not rows or not session.ranks.first:
        return
    # The same noise at every step: differences are learned.
    keys = [(session.config.seed, "samples", i) for i in range(len(rows))]
    with roles.use(role):
        responses = generate(roles.base, [r.ids for r in rows], keys, text.stop_ids, Sampling(0.7, room))
    session.run.samples(
        [
            {"step": step, "prompt": row.text, "response": text.response_text(row.ids, response), "where": row.where}
            for row, response in zip(rows, responses, strict=True)
        ]
    )


def flatten_text(prompt: object) -> str:
    """A prompt as a person reads it: its text, or a conversation in lines of `role: content`."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
