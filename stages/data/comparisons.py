"""Which response is better: comparisons out of chosen/rejected rows, ranked lists and ratings."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pstdev

from stages.data.raw_rows import Content, Message, RawRow, bad_row, check_content, check_number, check_prompt, named

TURN = "\n\nAssistant:"  # ends the prompt in texts written like Anthropic's HH data


@dataclass(frozen=True)
class Pair:
    """One judgement: response `better` beats response `worse`, both being indices into a comparison's responses.

    `probability` that `better` really is the better one is never below a half: a pair that is given with less is
    stored the other way round, as what it says. At exactly a half it is a tie, and without a margin the order means
    nothing. `margin` is
    the lead of `better` over `worse`, in the units of the rows. It belongs to the order in which it was given, so it
    changes its sign with that order, and every loss of the pair stays the same.
    """

    better: int
    worse: int
    probability: float = 1.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.probability < 0.5:
            turned = {"better": self.worse, "worse": self.better, "probability": 1 - self.probability}
            if self.margin:  # 0 stays 0, not -0
                turned["margin"] = -self.margin
            for name, value in turned.items():
                object.__setattr__(self, name, value)

    @property
    def tie(self) -> bool:
        """Whether neither response is the likelier winner."""
        return self.probability == 0.5


@dataclass(frozen=True)
class Comparison:
    """Responses to one prompt and every judgement between them; each response is in at least one pair."""

    where: str
    prompt: Content
    responses: tuple[Content, ...]  # text if the prompt is text, else messages
    pairs: tuple[Pair, ...]
    guessed: bool = field(default=False, compare=False)  # the prompt is what texts share, so it may end in a response


@dataclass(frozen=True)
class Rating:
    """One rating of one response, as a row gives it."""

    where: str
    prompt: Content
    response: Content
    rating: float
    annotator: str | None


# --- chosen and rejected ------------------------------------------------------------------------------------------


def compare_chosen(row: RawRow) -> Comparison:
    """A row with `prompt`, `chosen` and `rejected`, the last two with or without the prompt's messages repeated.

    Optional are `probability`, that `chosen` really is the better one, and `margin`, by which it leads `rejected`.
    A text prompt goes with message lists only where it is the last message that both lists share. Raises DatasetError.
    """
    prompt, chosen, rejected = row.prompt(), row.content("chosen"), row.content("rejected")
    if isinstance(prompt, str) and not isinstance(chosen, str) and not isinstance(rejected, str):
        shared = shared_messages(chosen, rejected)
        if shared and shared[-1]["content"] == prompt:
            prompt = shared
    return _compare_two(row, prompt, chosen, rejected)


def compare_without_prompt(row: RawRow) -> Comparison:
    """A row with `chosen` and `rejected` alone: the beginning they share is the prompt. Raises DatasetError."""
    chosen, rejected = row.content("chosen"), row.content("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        _refuse_equal(row, chosen, rejected)
        prompt: Content = shared_text(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    elif isinstance(chosen, tuple) and isinstance(rejected, tuple):
        _refuse_equal(row, chosen, rejected)
        prompt = shared_messages(chosen, rejected)
    else:
        raise bad_row("`chosen` and `rejected` must both be text or both be messages", row.at("rejected"))
    if not prompt or isinstance(prompt, str) and not prompt.strip():
        raise bad_row("`chosen` and `rejected` share no beginning that could be the prompt", row.at("chosen"))
    compared = _compare_two(row, check_prompt(prompt, row.at("chosen")), chosen, rejected)
    return replace(compared, guessed=isinstance(prompt, str))


def shared_text(chosen: str, rejected: str) -> str:
    """The prompt that two texts share: up to the last assistant turn they both open, else up to a whole word.

    The whitespace before the word where they part belongs to the responses. Empty if they share nothing.
    """
    shared = os.path.commonprefix([chosen, rejected])
    turn = shared.rfind(TURN)
    if turn >= 0:
        return shared[: turn + len(TURN)]
    return shared[: max((index for index, letter in enumerate(shared) if letter.isspace()), default=0)]


def shared_messages(chosen: Sequence[Message], rejected: Sequence[Message]) -> tuple[Message, ...]:
    """The leading messages two conversations share, up to the last one that an assistant turn can answer."""
    pairs = zip(chosen, rejected, strict=False)
    shared = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    while shared and shared[-1]["role"] == "assistant":
        shared.pop()
    return tuple(shared)


def _compare_two(row: RawRow, prompt: Content, chosen: Content, rejected: Content) -> Comparison:
    responses = (
        _as_response(prompt, chosen, row.at("chosen")),
        _as_response(prompt, rejected, row.at("rejected")),
    )
    _refuse_equal(row, *responses)
    margin = _optional_number(row, "margin", 0.0)
    probability = _optional_number(row, "probability", 1.0)
    if not 0 <= probability <= 1:
        raise bad_row(f"a probability lies between 0 and 1, found {probability:g}", row.at("probability"))
    if margin < 0 and probability > 0.5:
        raise bad_row(
            f"`chosen` is preferred, but its margin over `rejected` is negative, {margin:g}", row.at("margin")
        )
    return Comparison(row.where, prompt, responses, (Pair(0, 1, probability, margin),))


def _as_response(prompt: Content, response: Content, where: str) -> Content:
    """`response` in the prompt's form, without the prompt's messages if it repeats them."""
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
        raise bad_row("the response does not end with an assistant turn that says something", where)
    return response


def _optional_number(row: RawRow, field: str, default: float) -> float:
    return default if row.values.get(field) in (None, "") else row.number(field)


def _refuse_equal(row: RawRow, chosen: Content, rejected: Content) -> None:
    if chosen == rejected:
        raise bad_row("`chosen` and `rejected` are the same", row.at("rejected"))


# --- ranked lists -------------------------------------------------------------------------------------------------


def compare_ranked(row: RawRow) -> Comparison:
    """A row with `prompt`, `responses` and `ranks`: rank 1 is best, equal ranks are ties. Raises DatasetError."""
    prompt = row.prompt()
    given, ranks = _cells(row, "responses"), _cells(row, "ranks")
    if len(given) != len(ranks):
        raise bad_row(f"there are {len(given)} responses but {len(ranks)} ranks", row.at("ranks"))
    responses = tuple(
        _as_response(prompt, check_content(response, where), where) for where, response in _numbered(row, "responses")
    )
    places = [check_number(rank, where) for where, rank in _numbered(row, "ranks")]
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


def _cells(row: RawRow, field: str) -> list[object]:
    value = row.get(field)
    if not isinstance(value, list):
        raise bad_row(f"expected a list, found {named(value)}", row.at(field))
    return value


def _numbered(row: RawRow, field: str) -> Iterable[tuple[str, object]]:
    return ((row.at(f"{field}[{index}]"), value) for index, value in enumerate(_cells(row, field)))


# --- ratings ------------------------------------------------------------------------------------------------------


def read_rating(row: RawRow, *, needs_annotator: bool = False) -> Rating:
    """A row with `prompt`, `response` and `rating` (higher is better), perhaps `annotator`. Raises DatasetError."""
    prompt = row.prompt()
    response = _as_response(prompt, row.content("response"), row.at("response"))
    annotator = row.values.get("annotator")
    if annotator in (None, ""):
        if needs_annotator:
            raise bad_row("normalise_raters needs to know who rated this row", row.at("annotator"))
        annotator = None
    elif isinstance(annotator, bool) or not isinstance(annotator, (str, int)):
        raise bad_row(f"expected a name or a number, found {named(annotator)}", row.at("annotator"))
    return Rating(row.where, prompt, response, row.number("rating"), None if annotator is None else str(annotator))


def compare_ratings(ratings: Iterable[Rating], threshold: float) -> tuple[list[Comparison], list[str]]:
    """Comparisons within each prompt, in order of first appearance, and why other prompts gave none.

    A response's ratings are averaged first; differences up to `threshold` are ties; margins are differences.
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
    """How often two annotators prefer the same of two responses to a prompt, and how often both prefer one at all.

    Every two annotators count once for every two responses that both rated more than `threshold` apart.
    """
    given: dict[str, dict[str, dict[str, list[float]]]] = {}  # prompt -> annotator -> response -> ratings
    for rating in ratings:
        if rating.annotator is not None:
            by_response = given.setdefault(_identity(rating.prompt), {}).setdefault(rating.annotator, {})
            by_response.setdefault(_identity(rating.response), []).append(rating.rating)
    agreed = both = 0
    for raters in given.values():
        means = [{response: fmean(numbers) for response, numbers in found.items()} for found in raters.values()]
        for one, other in itertools.combinations(means, 2):
            for a, b in itertools.combinations(one.keys() & other.keys(), 2):
                mine, theirs = one[a] - one[b], other[a] - other[b]
                if abs(mine) > threshold and abs(theirs) > threshold:
                    agreed, both = agreed + (mine * theirs > 0), both + 1
    return agreed, both


def _compare_group(group: list[Rating], threshold: float) -> Comparison:
    responses: dict[str, Content] = {}
    given: dict[str, list[float]] = {}
    for rating in group:
        key = _identity(rating.response)
        responses[key] = rating.response
        given.setdefault(key, []).append(rating.rating)
    means = {key: fmean(numbers) for key, numbers in given.items()}
    won = [
        (one, other) if means[one] > means[other] else (other, one)
        for one, other in itertools.combinations(means, 2)
        if abs(means[one] - means[other]) > threshold
    ]
    compared = [key for key in means if any(key in pair for pair in won)]
    pairs = tuple(
        Pair(compared.index(better), compared.index(worse), margin=means[better] - means[worse])
        for better, worse in won
    )
    return Comparison(group[0].where, group[0].prompt, tuple(responses[key] for key in compared), pairs)


def normalise_ratings(ratings: Sequence[Rating]) -> list[Rating]:
    """The same ratings as z-scores of each annotator (population deviation; 0 where they never vary)."""
    by_annotator: dict[str | None, list[float]] = {}
    for rating in ratings:
        by_annotator.setdefault(rating.annotator, []).append(rating.rating)
    scale = {name: (fmean(numbers), pstdev(numbers)) for name, numbers in by_annotator.items()}
    normalised = []
    for rating in ratings:
        mean, spread = scale[rating.annotator]
        score = (rating.rating - mean) / spread if spread else 0.0
        normalised.append(Rating(rating.where, rating.prompt, rating.response, score, rating.annotator))
    return normalised


def _identity(content: Content) -> str:
    return json.dumps(content)
