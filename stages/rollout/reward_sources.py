"""Scores of responses by reward models on the shared base, classifiers and functions, combined into one."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from numbers import Real

import torch
from torch import Tensor

from stages.errors import RewardError, StopRequested, counted, words_of
from stages.maths.rewards import combine_scores
from stages.models.outputs import sequence_scores
from stages.models.roles import Roles, adapter_of, head_of
from stages.models.templates import stored_template
from stages.models.tokens import PromptRow, Text
from stages.results import Reporter
from stages.rollout.classifier_source import ClassifierSource, closed
from stages.rollout.reward_specs import RewardSpec, UserFunction, python_file, reason_of, source_names
from stages.rollout.user_code import TookTooLong, too_slow, user_code
from stages.training.signals import Signals

SHOWN_VALUE = 500  # characters of a value in a message
LARGEST_SCORE = torch.finfo(torch.float32).max
CULPRIT_SECONDS = 30.0  # limit of the search for the response at which a function fails


def check_templates(specs: list[RewardSpec], text: Text, prompts: list[PromptRow], reporter: Reporter) -> None:
    """Say how classifiers read; warn of a reward model that was trained on conversations in another chat template."""
    for spec in specs:
        if spec.classifier is not None:
            reporter.note(f"{spec.flag} {spec.name} reads {spec.reader.description}")
    if all(isinstance(prompt.text, str) for prompt in prompts):
        return
    for spec in specs:
        theirs = stored_template(spec.checkpoint.tokenizer) if spec.checkpoint is not None else None
        if isinstance(theirs, str) and theirs.strip() != str(text.tokenizer.chat_template).strip():
            reporter.warn(
                f"{spec.flag} {spec.name} was trained with another chat template than the policy's, so it scores "
                "conversations in an unfamiliar format; train it on the policy, without --chat-template"
            )


@dataclass(frozen=True)
class Scores:
    """The scores of responses."""

    total: Tensor  # (B,) combined, fp32 on the CPU
    by_source: dict[str, Tensor]  # (B,) of each source, without its weight; empty if there is only one source

    @cached_property
    def parts(self) -> list[dict[str, float]]:
        """The scores of each response by source."""
        columns = {name: values.tolist() for name, values in self.by_source.items()}
        return [{name: column[i] for name, column in columns.items()} for i in range(len(self.total))]


class RewardSources:
    """Scores responses with every source and combines the weighted scores."""

    def __init__(
        self,
        specs: list[RewardSpec],
        roles: Roles,
        prefix: str = "reward",
        timeout: float = 0,
        signals: Signals | None = None,
        combine: tuple[str, float] = ("sum", 1.0),
        text: Text | None = None,
        reporter: Reporter | None = None,
    ):
        """`text` is the policy's; `reporter` gets warnings of texts that a classifier has to cut."""
        self.combine, self.names = combine, source_names(specs)
        self.specs, self.roles, self.timeout, self.signals = specs, roles, timeout, signals or Signals()
        self.role_names = [f"{prefix}{i or ''}" for i in range(len(specs))]
        self.classifiers: dict[str, ClassifierSource] = {}
        for spec, role in zip(specs, self.role_names, strict=True):
            if spec.checkpoint is not None:
                adapter = adapter_of(roles.base, spec.checkpoint, trainable=False)
                roles.add(role, adapter, head_of(roles.base, spec.checkpoint.folder))
            elif spec.classifier is not None:
                self.classifiers[role] = ClassifierSource(spec, roles, text, reporter)

    def score(self, prompts: list[PromptRow], responses: list[Tensor], texts: list[str], ended: Tensor) -> Tensor:
        """Combined scores (B,) fp32 on the CPU, for the arguments of `score_by_source`."""
        return self.score_by_source(prompts, responses, texts, ended).total

    def score_by_source(
        self, prompts: list[PromptRow], responses: list[Tensor], texts: list[str], ended: Tensor
    ) -> Scores:
        """Scores of responses, combined and by source.

        responses: token ids (L_i,); texts: the same without special tokens, for functions; ended (B,): True if the
        response ends with a stop token, which is replaced by the prompt's own end token for reward models.
        """
        each = []
        for spec, role in zip(self.specs, self.role_names, strict=True):
            if spec.checkpoint is not None:
                each.append(model_scores(self.roles, role, prompts, responses, ended))
            elif spec.classifier is not None:
                each.append(self.classifiers[role].score(prompts, responses, texts, ended))
            elif spec.builtin is not None:
                lengths = (torch.tensor([len(r) for r in responses]) - ended.int()).tolist()
                each.append(torch.tensor(spec.builtin([p.columns for p in prompts], texts, lengths)))
            else:
                each.append(call_function(spec, prompts, texts, self.signals, timeout=self.timeout))
        total = combine_scores(torch.stack(each), [spec.weight for spec in self.specs], *self.combine)
        return Scores(total, dict(zip(self.names, each, strict=True)) if len(each) > 1 else {})

    def report_cut(self) -> None:
        """Say how many texts classifiers had to cut, all in all; the first such batch was warned of."""
        for source in self.classifiers.values():
            if source.cut and source.reporter is not None:
                source.reporter.note(f"{source.spec.name} read {source.cut} of {source.texts} texts cut to its context")


def model_scores(roles: Roles, role: str, prompts: list[PromptRow], responses: list[Tensor], ended: Tensor) -> Tensor:
    """Scores (B,) fp32 on the CPU of a reward model's role, for the arguments of `RewardSources.score`."""
    whole = []
    for prompt, response, done in zip(prompts, responses, ended.tolist(), strict=True):
        whole.append(torch.cat([prompt.ids, closed(prompt, response, done)]))

    def forward(sequences: list[Tensor]) -> list[Tensor]:
        return list(sequence_scores(roles, role, sequences).cpu())

    return torch.stack(roles.collect(role, whole, forward, [len(w) for w in whole]))


def call_function(
    spec: RewardSpec, prompts: list[PromptRow], texts: list[str], signals: Signals, *, timeout: float = 0
) -> Tensor:
    """Scores (B,) from a user's function.

    Raises RewardError, with the prompt, if the function raises, takes longer than `timeout` seconds (0: no limit), or
    returns anything but one finite number for each response.
    """
    where = f"{spec.flag} {spec.name}"
    try:
        numbers = _call(spec, prompts, texts, signals, timeout)
    except (StopRequested, RewardError):
        raise
    except TookTooLong:
        culprit = _culprit(spec, prompts, texts, signals, timeout)
        raise too_slow(where, timeout, f"for {counted(len(prompts), 'responses')}{culprit}") from None
    except BaseException as error:  # also what would end the process: it is reported as the function's error
        culprit = _culprit(spec, prompts, texts, signals, timeout)
        reason = reason_of(error, python_file(spec.name))
        raise RewardError(f"it raised {reason}{culprit}", where=where, fix="fix the function") from None
    return torch.tensor(numbers, dtype=torch.float32)


def _call(
    spec: RewardSpec, prompts: list[PromptRow], texts: list[str], signals: Signals, timeout: float
) -> list[float]:
    """What the function returns, as plain numbers; it gets copies of the rows, so it cannot change them."""
    function, where = spec.function, f"{spec.flag} {spec.name}"
    columns = {key: [p.columns.get(key) for p in prompts] for key in sorted({k for p in prompts for k in p.columns})}
    prompt_texts, columns = copy.deepcopy(([p.text for p in prompts], columns))
    imported = function.imported if isinstance(function, UserFunction) else None
    with user_code(where, signals, imported, timeout=timeout):
        values = _read_list(function(prompt_texts, list(texts), **_accepted(function, columns)), len(prompts), where)
        numbers = [_number(value) for value in values]
        if None in numbers:
            i = numbers.index(None)
            what = f"it returned {_shown(values[i])}{_for(prompts[i], texts[i])}"
            raise RewardError(what, where=where, fix="return a finite number for every response")
        return numbers  # type: ignore[return-value]


def _read_list(result: object, count: int, where: str) -> list:
    """The `count` values that a function returned; raises RewardError for anything else. Runs code of `result`."""
    try:
        values = result.tolist() if hasattr(result, "tolist") else result
        values = list(values) if isinstance(values, (list, tuple)) else values
    except (Exception, SystemExit) as error:
        got = f"a {type(result).__name__} that cannot be read: {type(error).__name__}: {words_of(error)}"
    else:
        if isinstance(values, list) and len(values) == count:
            return values
        got = counted(len(values), "numbers") if isinstance(values, list) else type(values).__name__
        got += f" for {counted(count, 'responses')}"
    raise RewardError(f"it returned {got}", where=where, fix="return a list with one number for each response")


def _number(value: object) -> float | None:
    """A value as a finite number within the range of float32, else None."""
    try:
        if not isinstance(value, (Real, Decimal)):
            value = value.item()  # type: ignore[attr-defined]  a tensor or an array of one number
        if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
            return None
        number = float(value)
        return number if abs(number) <= LARGEST_SCORE else None
    except (Exception, SystemExit):
        return None


def _shown(value: object) -> str:
    try:
        text = " ".join(repr(value).split())
    except (Exception, SystemExit):
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 3] + "..."


def _for(prompt: PromptRow, text: str) -> str:
    return f" for the response {text[:80]!r} to {str(prompt.text)[:80]!r} ({prompt.where})"


def _culprit(spec: RewardSpec, prompts: list[PromptRow], texts: list[str], signals: Signals, timeout: float) -> str:
    """The first response at which a function fails if it gets that one alone, in words; else nothing."""
    limit = min(timeout or CULPRIT_SECONDS, CULPRIT_SECONDS)
    began = started = time.monotonic()
    for prompt, text in zip(prompts, texts, strict=True):
        started = time.monotonic()
        try:
            _call(spec, [prompt], [text], signals, max(0.001, limit - (started - began)))
        except StopRequested:
            raise
        except TookTooLong:  # at this response, unless others used up the time
            return _for(prompt, text) if time.monotonic() - started > 0.5 * limit else ""
        except RewardError:
            continue
        except BaseException:
            return _for(prompt, text)
    return ""


def _accepted(function: Callable[..., object], columns: dict[str, list]) -> dict[str, list]:
    """The columns that a function takes: all with **columns, else those it names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return columns
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return {k: v for k, v in columns.items() if k not in {p.name for p in list(parameters)[:2]}}
    named = {p.name for p in list(parameters)[2:]}
    return {k: v for k, v in columns.items() if k in named}
