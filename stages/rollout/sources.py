"""Scores responses: reward models on the shared base and Python functions, added up with their weights."""

from __future__ import annotations

import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor

from stages.errors import RewardError
from stages.models.forward import sequence_scores
from stages.models.roles import Roles, adapter_of, head_of
from stages.models.templates import stored_template
from stages.models.tokens import PromptRow, Text
from stages.results import Report
from stages.rollout.specs import Spec, python_file, reason_of
from stages.training.passes import collect

LARGEST = torch.finfo(torch.float32).max
CULPRIT_SECONDS = 30.0  # spent at most on finding the response at which a function fails


def check_templates(specs: list[Spec], text: Text, prompts: list[PromptRow], report: Report) -> None:
    """Warn of a reward model that was trained on conversations in another chat template than they are scored in."""
    if all(isinstance(prompt.text, str) for prompt in prompts):
        return
    for spec in specs:
        theirs = stored_template(spec.checkpoint.tokenizer) if spec.checkpoint is not None else None
        if isinstance(theirs, str) and theirs.strip() != str(text.tokenizer.chat_template).strip():
            report.warn(
                f"{spec.flag} {spec.name} was trained with another chat template than the policy's, so it reads "
                "conversations in a form that it does not know; train it on the policy, without --chat-template"
            )


class Rewards:
    """Scores responses with every source and adds them up, weighted."""

    def __init__(
        self,
        specs: list[Spec],
        roles: Roles,
        micro_batch_size: int | str,
        prefix: str = "reward",
        timeout: float = 0,
    ):
        self.specs, self.roles, self.micro_batch_size, self.timeout = specs, roles, micro_batch_size, timeout
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
                total += spec.weight * model_scores(self.roles, role, prompts, responses, ended, self.micro_batch_size)
            else:
                scores = call_function(spec.function, spec.name, prompts, texts, flag=spec.flag, timeout=self.timeout)
                total += spec.weight * scores
        return total


def model_scores(
    roles: Roles,
    role: str,
    prompts: list[PromptRow],
    responses: list[Tensor],
    ended: Tensor,
    micro_batch_size: int | str,
) -> Tensor:
    """Scores (B,) fp32 on the CPU of a reward model's role, for the arguments of `Rewards.score`."""
    whole = []
    for prompt, response, done in zip(prompts, responses, ended.tolist(), strict=True):
        closed = torch.cat([response[:-1], torch.tensor([prompt.end_id])]) if done else response
        whole.append(torch.cat([prompt.ids, closed]))

    def forward(rows: list[int]) -> list[Tensor]:
        return list(sequence_scores(roles, role, [whole[i] for i in rows]).cpu())

    with roles.use(role):
        on_cuda = roles.base.device.type == "cuda"
        return torch.stack(collect([len(w) for w in whole], micro_batch_size, forward, on_cuda=on_cuda))


def call_function(
    function: Callable[..., object],
    name: str,
    prompts: list[PromptRow],
    texts: list[str],
    *,
    flag: str = "--reward",
    timeout: float = 0,
) -> Tensor:
    """Scores (B,) from a user's function.

    Raises RewardError, with the prompt, where the function raises, takes longer than `timeout` seconds (0: no limit),
    or returns anything but one finite number for each response.
    """
    where = f"{flag} {name}"
    try:
        with time_limit(timeout):
            result = _called(function, prompts, texts)
    except TookTooLong:
        slow = _culprit(function, prompts, texts, timeout)
        raise RewardError(
            f"it took longer than {timeout:g} seconds for {len(prompts)} responses{slow}",
            where=where,
            fix="mend the function, or give it longer with --reward-timeout",
        ) from None
    except (Exception, SystemExit) as error:  # user code that calls sys.exit() must not end the run unsaid
        guilty = _culprit(function, prompts, texts, timeout)
        reason = reason_of(error, python_file(name))
        raise RewardError(f"it raised {reason}{guilty}", where=where, fix="mend the function") from None
    result = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(result, (list, tuple)) or len(result) != len(prompts):
        got = f"{len(result)} numbers" if isinstance(result, (list, tuple)) else type(result).__name__
        raise RewardError(
            f"it returned {got} for {len(prompts)} responses", where=where, fix="return a list with one number each"
        )
    for prompt, text, number in zip(prompts, texts, result, strict=True):
        if isinstance(number, bool) or not isinstance(number, Real) or not abs(number) <= LARGEST:
            raise RewardError(
                f"it returned {number!r}{_for(prompt, text)}",
                where=where,
                fix="return a finite number for every response",
            )
    return torch.tensor(result, dtype=torch.float32)


def _called(function: Callable[..., object], prompts: list[PromptRow], texts: list[str]) -> object:
    columns = {key: [p.columns.get(key) for p in prompts] for key in sorted({k for p in prompts for k in p.columns})}
    return function([p.text for p in prompts], list(texts), **_accepted(function, columns))


def _for(prompt: PromptRow, text: str) -> str:
    return f" for the response {text[:80]!r} to {str(prompt.text)[:80]!r} ({prompt.where})"


def _culprit(function: Callable[..., object], prompts: list[PromptRow], texts: list[str], timeout: float) -> str:
    """The first response at which a function fails by itself, in words; nothing where each by itself is well."""
    limit = min(timeout or CULPRIT_SECONDS, CULPRIT_SECONDS)
    began = now = time.monotonic()
    for prompt, text in zip(prompts, texts, strict=True):
        now = time.monotonic()
        try:
            with time_limit(max(0.001, limit - (now - began))):
                _called(function, [prompt], [text])
        except TookTooLong:  # the one that hangs, unless it only came last
            return _for(prompt, text) if time.monotonic() - now > 0.5 * limit else ""
        except (Exception, SystemExit):
            return _for(prompt, text)
    return ""


class TookTooLong(BaseException):
    """A time limit was reached; not an Exception, so that no user code swallows it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TookTooLong within the block after so many seconds (0: never; nor where the system has no such clock)."""
    if not seconds or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
