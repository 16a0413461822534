"""A judge: a model behind an OpenAI-compatible endpoint that compares two responses to a prompt, in both orders.

Replies are kept on disk, so a repeat makes no request. Source of the prompt and of the two orders: Zheng et al. 2023,
"Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena".
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from stages.checkpoint.atomic import make_folder, write_text
from stages.errors import JudgeError, words_of
from stages.measuring_config import EvaluateConfig
from stages.places import absolute

ATTEMPTS = 4
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between attempts, doubled each time
SECONDS = 120.0  # for one request
PARALLEL = 4  # requests at a time
REPLY_BYTES = 1 << 22
REPLY_TOKENS = 1024
TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
REFUSED = (401, 403)
INSTRUCTION = (
    "You are an impartial judge who compares two responses to the same prompt. Decide which one is more helpful, "
    "relevant, correct and harmless. Do not let the order of the responses or their length influence you. Explain your "
    "decision in at most three sentences. Then end with exactly one of these marks: [[A]] if response A is better, "
    "[[B]] if response B is better, [[C]] for a tie."
)
QUESTION = "<prompt>\n{}\n</prompt>\n\n<response A>\n{}\n</response A>\n\n<response B>\n{}\n</response B>"
ENDING = r"\b(?:response|answer|verdict|winner|choice|better)\b\W{0,6}(?:is\W{1,4})?(A|B|tie)\W*\Z"
VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5, "TIE": 0.5}  # share of the win that response A gets


@dataclass(frozen=True)
class Judge:
    """The endpoint of a judge, and where its replies are kept."""

    url: str  # ends before /chat/completions
    model: str
    key: str | None
    cache: Path

    @property
    def name(self) -> str:
        """The judge in messages."""
        return f"--judge {self.url}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would take the key to another host."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


def open_judge(config: EvaluateConfig) -> Judge:
    """The judge of a config, with its key from the environment."""
    url = config.judge.rstrip("/").removesuffix("/chat/completions")
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rlhf" / "judge"
    cache = absolute(config.judge_cache or home, "--judge-cache")
    return Judge(url, config.judge_model, os.environ.get(config.judge_key) or None, cache)


def check_judge(judge: Judge) -> tuple[str, ...]:
    """A warning if the endpoint cannot be reached but earlier replies are kept.

    Raises JudgeError if it cannot be reached, refuses the key, or its replies cannot be kept.
    """
    make_folder(judge.cache)
    if not os.access(judge.cache, os.W_OK | os.X_OK):
        fix = "give a folder that can be written as --judge-cache"
        raise JudgeError(f"nothing can be written into {judge.cache}", where="--judge-cache", fix=fix)
    try:
        _request(judge, "/models", None, attempts=1)
    except JudgeError as error:
        if error.status in REFUSED or (error.status is None and not any(judge.cache.iterdir())):
            raise
        if error.status is None:
            return (f"{judge.name} cannot be reached ({error.what}); only replies in {judge.cache} can be used",)
    return ()


# --- comparing


def judge_pairs(
    judge: Judge, rows: list[tuple[str, str, str]], log: Callable[[int], None]
) -> list[tuple[float | None, float | None]]:
    """For each prompt, response and other response: the response's share of the win if it is shown first, and second.

    None stands for a reply without a verdict. Equal responses are ties, without a request. `log` gets the number of
    rows that are done. Raises JudgeError.
    """
    found: list[tuple[float | None, float | None]] = [(0.5, 0.5)] * len(rows)
    pool = ThreadPoolExecutor(PARALLEL)
    try:
        asked = {pool.submit(_compare_both_ways, judge, *row): i for i, row in enumerate(rows) if row[1] != row[2]}
        for done, future in enumerate(as_completed(asked), 1):
            found[asked[future]] = future.result()
            log(len(rows) - len(asked) + done)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return found


def _compare_both_ways(judge: Judge, prompt: str, one: str, other: str) -> tuple[float | None, float | None]:
    first = read_verdict(ask(judge, prompt, one, other))
    second = read_verdict(ask(judge, prompt, other, one))
    return first, None if second is None else 1 - second


def read_verdict(reply: str) -> float | None:
    """Response A's share of the win by the last mark of a reply; None without one.

    Models that ignore the form are understood if they reply with one word, or end with words such as `winner: B`.
    """
    for form in (r"\[\[\s*(A|B|C|tie)\s*\]\]", r"\A\W*(A|B|C|tie)\W*\Z", ENDING):
        if marks := re.findall(form, reply, re.IGNORECASE):
            return VERDICTS[marks[-1].upper()]
    return None


def ask(judge: Judge, prompt: str, a: str, b: str) -> str:
    """The judge's reply to one comparison, from the cache if it was asked before. Raises JudgeError."""
    messages = [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": QUESTION.format(prompt, a, b)},
    ]
    body = {"model": judge.model, "messages": messages, "temperature": 0, "max_tokens": REPLY_TOKENS}
    identity = json.dumps([judge.url, body], sort_keys=True).encode()
    place = judge.cache / f"{hashlib.sha256(identity).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(place.read_text(encoding="utf-8"))["reply"]
        if isinstance(kept, str):
            return kept
    try:
        answer = _request(judge, "/chat/completions", body)
    except JudgeError as error:
        if error.status != 400:
            raise
        plain = {"model": judge.model, "messages": messages}  # some models refuse a temperature, or name the limit anew
        answer = _request(judge, "/chat/completions", plain)
    reply = _content_of(judge, answer)
    write_text(place, json.dumps({"model": judge.model, "reply": reply}))
    return reply


def _content_of(judge: Judge, answer: object) -> str:
    try:
        content = answer["choices"][0]["message"]["content"]  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        what = f"it answered {json.dumps(answer)[:200]}, which is no chat completion"
        raise JudgeError(what, where=judge.name, fix="give the address of an OpenAI-compatible endpoint") from None
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


# --- requests


def _request(judge: Judge, path: str, body: dict[str, object] | None, attempts: int = ATTEMPTS) -> object:
    """The JSON of a reply; a request that may succeed later is repeated. Raises JudgeError."""
    wait = FIRST_WAIT
    for attempt in range(1, attempts + 1):
        try:
            return _send(judge, path, body)
        except urllib.error.HTTPError as error:
            with error:
                problem, status = f"it answered {error.code} {error.reason}: {_beginning(error)}", error.code
            asked = error.headers.get("Retry-After", "")
            wait = max(wait, float(asked)) if re.fullmatch(r"\d{1,6}(\.\d+)?", asked) else wait
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem, status = f"{type(error).__name__}: {words_of(error)}", None
        if attempt == attempts or status not in (None, *TRY_AGAIN):
            break
        time.sleep(min(wait, LONGEST_WAIT))
        wait *= 2
    key = "give the API key in the environment variable that --judge-key names"
    fix = key if status in REFUSED else "check its address and model, then run the command again; replies are kept"
    raise JudgeError(problem, where=judge.name, fix=fix, status=status)


def _send(judge: Judge, path: str, body: dict[str, object] | None) -> object:
    """One request, which ends within about SECONDS."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    headers |= {"Authorization": f"Bearer {judge.key}"} if judge.key else {}
    request = urllib.request.Request(judge.url + path, data, headers)
    deadline = time.monotonic() + SECONDS
    parts, size = [], 0
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=SECONDS) as reply:
        while part := reply.read1(65536):
            parts.append(part)
            size += len(part)
            if size > REPLY_BYTES or time.monotonic() > deadline:
                raise TimeoutError(f"its reply is longer than {REPLY_BYTES} bytes or {SECONDS:g} seconds")
    return json.loads(b"".join(parts))


def _beginning(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(error.read(1000).decode("utf-8", "replace").split())[:200]
    except (OSError, http.client.HTTPException):
        return ""
