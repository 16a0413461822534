"""Built-in scores of plain texts: equal to a reference, matching a pattern or a template, near a length."""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass

MATCH_SECONDS = 1.0  # for one pattern on one response; an unfinished match counts as none
GAP = "..."  # in a template: any text that is not empty


def exact_score(response: str, references: tuple[str, ...]) -> float:
    """1 if the response equals a reference, apart from case, spacing and full-width forms; else 0."""
    return float(normalise(response) in {normalise(reference) for reference in references})


def normalise(text: str) -> str:
    """A text in Unicode's NFKC form without case, with single spaces between words."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# --- patterns


def regex_score(response: str, pattern: str) -> float:
    """1 if the pattern is found in the response, else 0; also 0 if that takes longer than MATCH_SECONDS."""
    try:
        return float(compiled(pattern).search(response, timeout=MATCH_SECONDS) is not None)
    except TimeoutError:
        return 0.0


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str):
    """A pattern of the package `regex`, which takes those of `re` and has a time limit. Raises ValueError."""
    import regex

    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"is no regular expression: {error}") from None


# --- templates


@dataclass(frozen=True)
class Template:
    """A template such as `<think>...</think><answer>...</answer>`: its fixed texts, and where it has gaps."""

    fixed: tuple[str, ...]
    gaps: tuple[bool, ...]  # before each fixed text and after the last: whether a text stands there


@functools.cache
def read_template(text: str) -> Template:
    """The parts of a template. Raises ValueError if it has no fixed text, or one of them twice."""
    fixed, gaps, gap = [], [], False
    for number, part in enumerate(text.replace("…", GAP).split(GAP)):
        gap = gap or number > 0
        for each in filter(None, re.split(r"(?<=>)\s*(?=<)", part.strip())):
            fixed.append(each)
            gaps.append(gap)
            gap = False
    if not fixed:
        raise ValueError(f"has no text beside `{GAP}`")
    if len(set(fixed)) < len(fixed):
        raise ValueError("has one text twice")
    return Template(tuple(fixed), (*gaps, gap))


def format_score(response: str, template: Template) -> float:
    """1 if the response is the template with a text that is not blank in every gap, else 0.

    Every fixed text occurs once in the response; white space around it is ignored.
    """
    rest = response
    for fixed, gap in zip(template.fixed, template.gaps, strict=False):
        if response.count(fixed) != 1:
            return 0.0
        before, found, rest = rest.partition(fixed)
        if not found or bool(before.strip()) != gap:
            return 0.0
    return float(bool(rest.strip()) == template.gaps[-1])


# --- length


def length_score(length: int, target: float) -> float:
    """min(length, target) / max(length, target): 1 at the target, a half at half and at twice of it."""
    return min(length, target) / max(length, target)
