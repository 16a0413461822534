"""Comparisons of responses, from chosen/rejected rows, ranked lists and ratings."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pstdev

from stages.data.raw_rows import Content, Message, RawRow, bad_row, check_content, check_number, check_prompt, named
from stages.errors import counted

TURN = "\n\nAssistant:"  # ends the prompt in texts written like Anthropic's HH data


@dataclass(frozen=True)
class Pair:
    """One judgement: response `better` beats response `worse`, both being indices into a comparison's responses.

    `probability` is the probability that `better` is preferred. A pair given with less than a half is stored with its
    responses swapped, so it is never below a half. At a half the pair is a tie, and without a margin its order has no
    meaning. `margin` is the lead of `better` over `worse`, in the units of the rows; it changes its sign when the
    responses are swapped, so every loss of the pair stays the same.
    """

    better: int
    worse: int
    probability: float = 1.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.probability < 0.5:
            swapped = {"better": self.worse, "worse": self.better, "probability": 1 - self.probability}
            for name, value in (swapped | {"margin": 0.0 - self.margin}).items():  # 0 becomes 0, not -0
                object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Comparison:
    """Responses to one prompt and every judgement between them; each response is in at least one pair."""

    where: str
    prompt: Content
    responses: tuple[Content, ...]  # text if the prompt is text, else messages
    pairs: tuple[Pair, ...]
    guessed: bool = field(default=False, compare=False)  # the prompt is the texts' shared prefix, perhaps too long


@dataclass(frozen=True)
class Rating:
    """One rating of one response."""

    where: str
    prompt: Content
    response: Content
    rating: float
    annotator: str | None


# --- chosen and rejected ------------------------------------------------------------------------------------------


def compare_chosen(row: RawRow) -> Comparison:
    """The comparison of a row with `prompt`, `chosen` and `rejected`, which may repeat the prompt's messages.

    Optional columns are `probability`, that `chosen` is preferred, and `margin`, its lead over `rejected`. A text
    prompt fits message lists only if it is the last message that both share. Raises DatasetError.
    """
    prompt, chosen, rejected = row.prompt(), row.content("chosen"), row.content("rejected")
    if isinstance(prompt, str) and not isinstance(chosen, str) and not isinstance(rejected, str):
        shared = shared_messages(chosen, rejected)
        if shared and shared[-1]["content"] == prompt:
            prompt = shared
    return _compare_two(row, prompt, chosen, rejected)


def compare_without_prompt(row: RawRow) -> Comparison:
    """The comparison of a row with only `chosen` and `rejected`: their shared prefix is the prompt.

    Raises DatasetError.
    """
    chosen, rejected = row.content("chosen"), row.content("rejected")
    _refuse_equal(row, chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt: Content = shared_text(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    elif isinstance(chosen, tuple) and isinstance(rejected, tuple):
        prompt = shared_messages(chosen, rejected)
    else:
        raise bad_row("`chosen` and `rejected` must both be text or both be messages", row.at("rejected"))
    if not prompt or isinstance(prompt, str) and not prompt.strip():
        raise bad_row("`chosen` and `rejected` share no beginning that could be the prompt", row.at("chosen"))
    compared = _compare_two(row, check_prompt(prompt, row.at("chosen")), chosen, rejected)
    return replace(compared, guessed=isinstance(prompt, str))


def shared_text(chosen: str, rejected: str) -> str:
    """The shared prefix of two texts, up to the last assistant turn that both open, else up to a whole word.

    The whitespace before the first different word belongs to the responses. Empty if they share nothing.
    """
    shared = os.path.commonprefix([chosen, rejected])
    turn = shared.rfind(TURN)
    if turn >= 0:
        return shared[: turn + len(TURN)]
    return shared[: max((index for index, letter in enumerate(shared) if letter.isspace()), default=0)]


def shared_messages(chosen: Sequence[Message], rejected: Sequence[Message]) -> tuple[Message, ...]:
    """The shared leading messages of two conversations, up to the last one that an assistant turn can answer."""
    pairs = zip(chosen, rejected, strict=False)
    shared = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    while shared and shared[-1]["role"] == "assistant":
        shared.pop()
    return tuple(shared)


def _compare_two(row: RawRow, prompt: Content, chosen: Content, rejected: Content) -> Comparison:
    responses = (_as_response(prompt, chosen, row.at("chosen")), _as_response(prompt, rejected, row.at("rejected")))
    _refuse_equal(row, *responses)
    margin, probability = (
        default if row.values.get(name) in (None, "") else row.number(name)
        for name, default in (("margin", 0.0), ("probability", 1.0))
    )
    if not 0 <= probability <= 1:
        raise bad_row(f"a probability must be between 0 and 1, found {probability:g}", row.at("probability"))
    if margin < 0 and probability > 0.5:
        what = f"`chosen` is preferred, but its margin over `rejected` is negative, {margin:g}"
        raise bad_row(what, row.at("margin"))
    return Comparison(row.where, prompt, responses, (Pair(0, 1, probability, margin),))


def _as_response(prompt: Content, response: Content, where: str) -> Content:
    """`response` in the form of the prompt, without the prompt's messages if it repeats them."""
    if isinstance(prompt, str):
        if not isinstance(response, str):
            raise bad_row("the prompt is text but the response is messages; give both in one form", where)
        if not response.strip():
            raise bad_row("the text after the shared prompt is empty", where)
        return response
    if isinstance(response, str):
        return ({"role": "assistant", "content": response},)
    if response[: len(prompt)] == prompt:
        response = response[len(prompt) :]
    if not response or response[-1]["role"] != "assistant" or not response[-1]["content"].strip():
        raise bad_row("the response does not end with an assistant turn that has text", where)
    return response


def _refuse_equal(row: RawRow, chosen: Content, rejected: Content) -> None:
    if chosen == rejected:
        raise bad_row("`chosen` and `rejected` are the same", row.at("rejected"))


# --- ranked lists -------------------------------------------------------------------------------------------------


def compare_ranked(row: RawRow) -> Comparison:
    """The comparison of a row with `prompt`, `responses` and `ranks`: rank 1 is best, equal ranks are ties.

    Raises DatasetError.
    """
    prompt = row.prompt()
    cells, ranks = _list(row, "responses"), _list(row, "ranks")
    if len(cells) != len(ranks):
        what = f"the row has {counted(len(cells), 'responses')} but {counted(len(ranks), 'ranks')}"
        raise bad_row(what, row.at("ranks"))
    responses = tuple(_as_response(prompt, check_content(cell, where), where) for where, cell in cells)
    places = [check_number(rank, where) for where, rank in ranks]
    if len(set(places)) < 2:
        raise bad_row("at least two different ranks are needed to compare anything", row.at("ranks"))
    pairs = []
    for one, other in itertools.combinations(range(len(places)), 2):
        if places[one] == places[other]:
            continue
        if responses[one] == responses[other]:
            raise bad_row(f"responses {one + 1} and {other + 1} are the same, but not their ranks", row.at("responses"))
        pairs.append(Pair(one, other) if places[one] < places[other] else Pair(other, one))
    return Comparison(row.where, prompt, responses, tuple(pairs))


def _list(row: RawRow, field: str) -> list[tuple[str, object]]:
    """The items of a list, each with its place for messages."""
    value = row.get(field)
    if not isinstance(value, list):
        raise bad_row(f"expected a list, found {named(value)}", row.at(field))
    return [(row.at(f"{field}[{index}]"), item) for index, item in enumerate(value)]


# --- ratings ------------------------------------------------------------------------------------------------------


def read_rating(row: RawRow, *, needs_annotator: bool = False) -> Rating:
    """The rating of a row with `prompt`, `response`, `rating` (higher is better) and optional `annotator`.

    Raises DatasetError.
    """
    prompt = row.prompt()
    response = _as_response(prompt, row.content("response"), row.at("response"))
    annotator = row.values.get("annotator")
    if annotator in (None, ""):
        if needs_annotator:
            raise bad_row("normalise_raters needs the annotator of each row", row.at("annotator"))
        annotator = None
    elif isinstance(annotator, bool) or not isinstance(annotator, (str, int)):
        raise bad_row(f"expected a name or a number, found {named(annotator)}", row.at("annotator"))
    return Rating(row.where, prompt, response, row.number("rating"), None if annotator is None else str(annotator))


def compare_ratings(ratings: Iterable[Rating], threshold: float) -> tuple[list[Comparison], list[str]]:
    """Comparisons within each prompt, in order of first appearance, and the reasons why other prompts give none.

    The ratings of a response are averaged; differences up to `threshold` are ties; margins are differences.
    """
    groups: dict[str, list[Rating]] = {}
    for rating in ratings:
        groups.setdefault(_identity(rating.prompt), []).append(rating)
    comparisons, problems = [], []
    for group in groups.values():
        comparison = _compare_group(group, threshold)
        if comparison.pairs:
            comparisons.append(comparison)
        else:
            problems.append(f"{group[0].where}: no two responses to this prompt differ enough in rating")
    return comparisons, problems


def annotator_agreement(ratings: Iterable[Rating], threshold: float) -> tuple[int, int]:
    """The number of times that two annotators prefer the same of two responses, and of times that both prefer one.

    Every two annotators count once for every two responses to a prompt that both rated more than `threshold` apart.
    """
    by_prompt: dict[str, dict[str, dict[str, list[float]]]] = {}  # prompt -> annotator -> response -> ratings
    for rating in ratings:
        if rating.annotator is not None:
            by_response = by_prompt.setdefault(_identity(rating.prompt), {}).setdefault(rating.annotator, {})
            by_response.setdefault(_identity(rating.response), []).append(rating.rating)
    agreed = both = 0
    for raters in by_prompt.values():
        means = [{response: fmean(numbers) for response, numbers in rated.items()} for rated in raters.values()]
        for one, other in itertools.combinations(means, 2):
            for a, b in itertools.combinations(one.keys() & other.keys(), 2):
                lead, other_lead = one[a] - one[b], other[a] - other[b]
                if abs(lead) > threshold and abs(other_lead) > threshold:
                    agreed, both = agreed + (lead * other_lead > 0), both + 1
    return agreed, both


def _compare_group(group: list[Rating], threshold: float) -> Comparison:
    responses: dict[str, Content] = {}
    ratings: dict[str, list[float]] = {}
    for rating in group:
        key = _identity(rating.response)
        responses[key] = rating.response
        ratings.setdefault(key, []).append(rating.rating)
    means = {key: fmean(numbers) for key, numbers in ratings.items()}
    ordered = [
        (one, other) if means[one] > means[other] else (other, one)
        for one, other in itertools.combinations(means, 2)
        if abs(means[one] - means[other]) > threshold
    ]
    compared = [key for key in means if any(key in pair for pair in ordered)]
    pairs = tuple(
        Pair(compared.index(better), compared.index(worse), margin=means[better] - means[worse])
        for better, worse in ordered
    )
    return Comparison(group[0].where, group[0].prompt, tuple(responses[key] for key in compared), pairs)


def normalise_ratings(ratings: Sequence[Rating]) -> list[Rating]:
    """The ratings as z-scores of each annotator (population standard deviation; 0 if all are equal)."""
    by_annotator: dict[str | None, list[float]] = {}
    for rating in ratings:
        by_annotator.setdefault(rating.annotator, []).append(rating.rating)
    scale = {name: (fmean(numbers), pstdev(numbers)) for name, numbers in by_annotator.items()}
    normalised = []
    for rating in ratings:
        mean, std = scale[rating.annotator]
        normalised.append(replace(rating, rating=(rating.rating - mean) / std if std else 0.0))
    return normalised


def _identity(content: Content) -> str:
    return json.dumps(content)
