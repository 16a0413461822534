"""A sequence classifier as a source of scores: prompts and responses in its own words, counted where they are cut."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stages.models.classifier import load_classifier
from stages.models.classifier_text import ClassifierRow
from stages.models.roles import Roles
from stages.models.tokens import PromptRow, Text
from stages.results import Reporter
from stages.rollout.reward_specs import RewardSpec


class ClassifierSource:
    """A loaded classifier. One that this tool exported reads the policy's own tokens, if it has the same vocabulary."""

    def __init__(self, spec: RewardSpec, roles: Roles, text: Text | None, reporter: Reporter | None):
        base = roles.base
        passes = replace(base.passes, tokens=None, divisor=1)
        self.spec, self.reader, self.reporter = spec, spec.reader, reporter
        self.model = load_classifier(spec.classifier, device=base.device, dtype=base.dtype, passes=passes)
        ours = self.reader.ours is not None and text is not None
        self.shares_tokens = ours and self.reader.tokenizer.get_vocab() == text.tokenizer.get_vocab()
        self.texts = self.cut = 0

    def score(self, prompts: list[PromptRow], responses: list[Tensor], texts: list[str], ended: Tensor) -> Tensor:
        """Scores (B,) fp32 on the CPU, for the arguments of `RewardSources.score`."""
        columns = zip(prompts, responses, texts, ended.tolist(), strict=True)
        rows = [self._read(*column) for column in columns]
        cut = sum(row.cut for row in rows)
        if cut and not self.cut and self.reporter is not None:
            where = f"{self.spec.flag} {self.spec.name}"
            self.reporter.warn(f"{where}: {cut} of {len(rows)} texts were cut to its {self.reader.context} tokens")
        self.texts, self.cut = self.texts + len(rows), self.cut + cut
        return self.model.scores(rows)

    def _read(self, prompt: PromptRow, response: Tensor, words: str, ended: bool) -> ClassifierRow:
        if self.shares_tokens:
            ids = torch.cat([prompt.ids, closed(prompt, response, ended)])
            limit = self.reader.context
            return ClassifierRow(ids[:limit], torch.ones(min(len(ids), limit), dtype=torch.bool), len(ids) > limit)
        if isinstance(prompt.text, str):
            return self.reader.read(prompt.where, prompt.text, words, ended=ended)
        answer = ({"role": "assistant", "content": words},)
        return self.reader.read(prompt.where, tuple(prompt.text), answer, ended=ended)


def closed(prompt: PromptRow, response: Tensor, ended: bool) -> Tensor:
    """A response (L,) as a reward model reads it: a stop token at its end becomes the prompt's own end token."""
    return torch.cat([response[:-1], torch.tensor([prompt.end_id])]) if ended else response
