"""Scores responses: reward models on the shared base and Python functions, added up with their weights."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from decimal import Decimal
from numbers import Real

import torch
from torch import Tensor

from stages.errors import RewardError, StopRequested, words_of
from stages.models.outputs import sequence_scores
from stages.models.roles import Roles, adapter_of, head_of
from stages.models.templates import stored_template
from stages.models.tokens import PromptRow, Text
from stages.results import Reporter
from stages.rollout.reward_specs import RewardSpec, UserFunction, python_file, reason_of
from stages.rollout.user_code import ClosedFiles, TookTooLong, too_slow, user_code
from stages.training.signals import Signals

SHOWN_VALUE = 500  # characters of a value in a message
LARGEST_SCORE = torch.finfo(torch.float32).max
CULPRIT_SECONDS = 30.0  # spent at most on finding the response at which a function fails


def check_templates(specs: list[RewardSpec], text: Text, prompts: list[PromptRow], reporter: Reporter) -> None:
    """Warn of a reward model that was trained on conversations in another chat template than they are scored in."""
    if all(isinstance(prompt.text, str) for prompt in prompts):
        return
    for spec in specs:
        theirs = stored_template(spec.checkpoint.tokenizer) if spec.checkpoint is not None else None
        if isinstance(theirs, str) and theirs.strip() != str(text.tokenizer.chat_template).strip():
            reporter.warn(
                f"{spec.flag} {spec.name} was trained with another chat template than the policy's, so it reads "
                "conversations in a form that it does not know; train it on the policy, without --chat-template"
            )


class RewardSources:
    """Scores responses with every source and adds them up, weighted."""

    def __init__(
        self,
        specs: list[RewardSpec],
        roles: Roles,
        prefix: str = "reward",
        timeout: float = 0,
        signals: Signals | None = None,
    ):
        self.specs, self.roles, self.timeout, self.signals = specs, roles, timeout, signals or Signals()
        self.names = {id(s): f"{prefix}{i or ''}" for i, s in enumerate(x for x in specs if x.checkpoint)}
        for spec in specs:
            if spec.checkpoint is not None:
                adapter = adapter_of(roles.base, spec.checkpoint, trainable=False)
                roles.add(self.names[id(spec)], adapter, head_of(roles.base, spec.checkpoint.folder))

    def score(self, prompts: list[PromptRow], responses: list[Tensor], texts: list[str], ended: Tensor) -> Tensor:
        """Weighted scores (B,) fp32 on the CPU.

        responses: token ids (L_i,); texts: the same without special tokens, for functions; ended (B,): True where the
        response stopped by itself, in which case reward models read the prompt's own end token in its place.
        """
        total = torch.zeros(len(prompts))
        for spec in self.specs:
            if spec.checkpoint is not None:
                role = self.names[id(spec)]
                total += spec.weight * model_scores(self.roles, role, prompts, responses, ended)
            else:
                total += spec.weight * call_function(spec, prompts, texts, self.signals, timeout=self.timeout)
        return total


def model_scores(roles: Roles, role: str, prompts: list[PromptRow], responses: list[Tensor], ended: Tensor) -> Tensor:
    """Scores (B,) fp32 on the CPU of a reward model's role, for the arguments of `RewardSources.score`."""
    whole = []
    for prompt, response, done in zip(prompts, responses, ended.tolist(), strict=True):
        closed = torch.cat([response[:-1], torch.tensor([prompt.end_id])]) if done else response
        whole.append(torch.cat([prompt.ids, closed]))

    def forward(sequences: list[Tensor]) -> list[Tensor]:
        return list(sequence_scores(roles, role, sequences).cpu())

    return torch.stack(roles.collect(role, whole, forward, [len(w) for w in whole]))


def call_function(
    spec: RewardSpec, prompts: list[PromptRow], texts: list[str], signals: Signals, *, timeout: float = 0
) -> Tensor:
    """Scores (B,) from a user's function.

    Raises RewardError, with the prompt, where the function raises, takes longer than `timeout` seconds (0: no limit),
    or returns anything but one finite number for each response.
    """
    where = f"{spec.flag} {spec.name}"
    try:
        numbers = _call(spec, prompts, texts, signals, timeout)
    except (StopRequested, ClosedFiles):
        raise
    except TookTooLong:
        slow = _culprit(spec, prompts, texts, signals, timeout)
        raise too_slow(where, timeout, f"for {len(prompts)} responses{slow}") from None
    except _NotNumbers as error:
        told = error.what if error.place is None else f"{error.what}{_for(prompts[error.place], texts[error.place])}"
        raise RewardError(told, where=where, fix=error.fix) from None
    except BaseException as error:  # whatever user code raises, to end the process too, must not end the run unsaid
        guilty = _culprit(spec, prompts, texts, signals, timeout)
        reason = reason_of(error, python_file(spec.name))
        raise RewardError(f"it raised {reason}{guilty}", where=where, fix="mend the function") from None
    return torch.tensor(numbers, dtype=torch.float32)


def _call(
    spec: RewardSpec, prompts: list[PromptRow], texts: list[str], signals: Signals, timeout: float
) -> list[float]:
    """What the function returns, as plain numbers; it gets copies, so whatever it does to them is its own affair."""
    function = spec.function
    columns = {key: [p.columns.get(key) for p in prompts] for key in sorted({k for p in prompts for k in p.columns})}
    asked, columns = copy.deepcopy(([p.text for p in prompts], columns))
    world = function.world if isinstance(function, UserFunction) else None
    with user_code(f"{spec.flag} {spec.name}", signals, world, timeout=timeout):
        result = function(asked, list(texts), **_accepted(function, columns))
        return _numbers(result, len(prompts))


class _NotNumbers(Exception):
    """What a function returned cannot be used; `place` is the response's, where it is about one."""

    def __init__(self, what: str, fix: str, place: int | None = None):
        self.what, self.fix, self.place = what, fix, place


def _numbers(result: object, count: int) -> list[float]:
    """A finite number for each of `count` responses; raises _NotNumbers for anything else. Runs code of the values."""
    fix = "return a list with one number each"
    try:
        values = result.tolist() if hasattr(result, "tolist") else result
        values = list(values) if isinstance(values, (list, tuple)) else values
    except (Exception, SystemExit) as error:
        what = f"it returned a {type(result).__name__} that cannot be read: {type(error).__name__}: {words_of(error)}"
        raise _NotNumbers(what, fix) from None
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)} numbers" if isinstance(values, list) else type(values).__name__
        raise _NotNumbers(f"it returned {got} for {count} responses", fix)
    numbers = [_number(value) for value in values]
    for place, number in enumerate(numbers):
        if number is None:
            what = f"it returned {_shown(values[place])}"
            raise _NotNumbers(what, "return a finite number for every response", place)
    return numbers  # type: ignore[return-value]


def _number(value: object) -> float | None:
    """A value as a finite number that float32 holds; None where it is none."""
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
    """The first response at which a function fails by itself, in words; nothing where each by itself is well."""
    limit = min(timeout or CULPRIT_SECONDS, CULPRIT_SECONDS)
    began = now = time.monotonic()
    for prompt, text in zip(prompts, texts, strict=True):
        now = time.monotonic()
        try:
            _call(spec, [prompt], [text], signals, max(0.001, limit - (now - began)))
        except StopRequested:
            raise
        except TookTooLong:  # the one that hangs, unless it only came last
            return _for(prompt, text) if time.monotonic() - now > 0.5 * limit else ""
        except _NotNumbers:
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
