"""Typed rows of a dataset: the row format, detected by its columns, and the rows in that format."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from stages.data import comparisons
from stages.data.raw_rows import Content, Message, RawRow, bad_row, check_prompt, listed, quoted
from stages.data.readers import READERS
from stages.data.sources import RawDataset, read_raw_dataset
from stages.errors import DatasetError, LongRow, counted

PROBLEMS_KEPT = 5
SUFFIXES = tuple(READERS)  # of files that hold rows


@dataclass(frozen=True)
class Demonstration:
    """A response to imitate. With a chat template, `messages` are used if there are any."""

    where: str
    prompt: str  # "" for a plain text and for a conversation
    completion: str  # "" for a conversation
    messages: tuple[Message, ...] = ()  # empty for texts; an Alpaca row has both forms


@dataclass(frozen=True)
class Prompt:
    """A prompt to respond to. With a chat template, `messages` are used if there are any."""

    where: str
    prompt: Content
    columns: dict[str, object] = field(default_factory=dict)  # the row's other columns as JSON, for reward functions
    messages: tuple[Message, ...] = ()  # only for an Alpaca row, whose `prompt` is the same as plain text


Row = Demonstration | Prompt | comparisons.Comparison
Refine = Callable[[Row], Row | None]  # a row in the form that is used; None for one that is too long


@dataclass(frozen=True)
class Dataset:
    """The usable rows of a dataset, all of one kind."""

    rows: list
    kind: str  # of the rows in the file: "demonstration", "comparison", "rating" or "prompt"
    source: str
    digest: str
    skipped: int  # rows dropped as unusable, and prompts whose ratings gave no comparison
    problems: list[str]  # the reasons for the first few
    agreement: tuple[int, int] = (0, 0)  # `annotator_agreement` of ratings
    long: int = 0  # rows dropped because they are too long, if that was checked here
    turned: int = 0  # text rows that were turned into messages


@dataclass(frozen=True)
class Format:
    """The columns of one kind of row, and the function that reads such a row."""

    kind: str
    columns: tuple[str, ...]
    build: Callable[[RawRow], object]

    def fits(self, names: Iterable[str]) -> bool:
        return set(self.columns) <= set(names)


# --- demonstrations -----------------------------------------------------------------------------------------------


def _from_completion(row: RawRow) -> Demonstration:
    prompt, completion = row.prompt(), row.content("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Demonstration(row.where, prompt, completion)
    if isinstance(prompt, str):
        raise bad_row("the prompt is text but the completion is messages; give both in one form", row.at("completion"))
    if isinstance(completion, str):
        completion = ({"role": "assistant", "content": completion},)
    _require_assistant(completion, row.at("completion"))
    return Demonstration(row.where, "", "", prompt + completion)


def _from_conversation(key: str, row: RawRow) -> Demonstration:
    messages = row.messages(key)
    _require_assistant(messages, row.at(key))
    return Demonstration(row.where, "", "", messages)


def _from_alpaca(row: RawRow) -> Demonstration:
    prompt, question = _alpaca_prompt(row)
    answer = row.text("output")
    return Demonstration(row.where, prompt, answer, (*question, {"role": "assistant", "content": answer}))


def _alpaca_prompt(row: RawRow) -> tuple[str, tuple[Message, ...]]:
    """An instruction with its input as plain text under headings, and as a user message."""
    instruction = row.text("instruction")
    text, question = f"### Instruction:\n{instruction}\n\n", instruction
    if row.values.get("input") is not None and str(row.values["input"]).strip():
        context = row.text("input")
        text, question = f"{text}### Input:\n{context}\n\n", f"{instruction}\n\n{context}"
    return f"{text}### Response:\n", ({"role": "user", "content": question},)


def _require_assistant(messages: Sequence[Message], where: str) -> None:
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise bad_row("every assistant turn is empty or missing, so there is nothing to learn", where)


# --- prompts ------------------------------------------------------------------------------------------------------


def _prompt_of_conversation(key: str, row: RawRow) -> Prompt:
    messages = row.messages(key)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise bad_row("there is no turn for the assistant to answer", row.at(key))
    return Prompt(row.where, check_prompt(messages, row.at(key)), row.others(key))


def _prompt_of_alpaca(row: RawRow) -> Prompt:
    prompt, messages = _alpaca_prompt(row)
    return Prompt(row.where, prompt, row.others("instruction", "input"), messages)


# --- formats ------------------------------------------------------------------------------------------------------

DEMONSTRATIONS = (
    Format("demonstration", ("prompt", "completion"), _from_completion),
    Format("demonstration", ("messages",), functools.partial(_from_conversation, "messages")),
    Format("demonstration", ("conversations",), functools.partial(_from_conversation, "conversations")),
    Format("demonstration", ("instruction", "output"), _from_alpaca),
    Format("demonstration", ("text",), lambda row: Demonstration(row.where, "", row.text("text"))),
)
COMPARISONS = (
    Format("comparison", ("prompt", "chosen", "rejected"), comparisons.compare_chosen),
    Format("comparison", ("chosen", "rejected"), comparisons.compare_without_prompt),
    Format("comparison", ("prompt", "responses", "ranks"), comparisons.compare_ranked),
    Format("rating", ("prompt", "response", "rating"), comparisons.read_rating),
)
PROMPTS = (
    Format("prompt", ("prompt",), lambda row: Prompt(row.where, row.prompt(), row.others("prompt"))),
    Format("prompt", ("messages",), functools.partial(_prompt_of_conversation, "messages")),
    Format("prompt", ("conversations",), functools.partial(_prompt_of_conversation, "conversations")),
    Format("prompt", ("instruction",), _prompt_of_alpaca),
)
ALIASES = {
    "prompt": ("question", "query", "instruction", "problem", "context", "input", "post", "document"),
    "completion": ("answer", "response", "output", "chosen", "solution", "summary", "target", "label"),
    "chosen": ("preferred", "better", "winner", "accepted", "chosen_response", "response_chosen"),
    "rejected": ("dispreferred", "worse", "loser", "rejected_response", "response_rejected"),
    "responses": ("completions", "answers", "candidates", "outputs"),
    "ranks": ("rank", "ranking", "order"),
    "response": ("completion", "answer", "output", "candidate"),
    "rating": ("score", "stars", "grade", "reward"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "text": ("content", "story", "document", "sentence"),
}


# --- reading ------------------------------------------------------------------------------------------------------


def read_demonstrations(
    source: str,
    *,
    map: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    limit_rows: int | None = None,
    refine: Refine | None = None,
) -> Dataset:
    """The `Demonstration` rows of a dataset, for SFT; `limit_rows` counts rows after `refine`. Raises DatasetError."""
    return _read(_load(source, map, skip_bad_rows), DEMONSTRATIONS, skip_bad_rows, limit_rows, refine)


def read_prompts(
    source: str,
    *,
    map: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    limit_rows: int | None = None,
    refine: Refine | None = None,
    check: Callable[[Prompt], object] | None = None,
) -> Dataset:
    """The `Prompt` rows of a dataset, as `read_demonstrations` reads. Raises DatasetError.

    `check` raises DatasetError for a row that lacks something.
    """
    return _read(_load(source, map, skip_bad_rows), PROMPTS, skip_bad_rows, limit_rows, refine, check)


def read_comparisons(
    source: str,
    *,
    map: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    limit_rows: int | None = None,
    rating_threshold: float = 0.0,
    normalise_raters: bool = False,
    refine: Refine | None = None,
) -> Dataset:
    """The `Comparison` rows of a dataset of preferences; ratings give one per prompt. Raises DatasetError."""
    raw = _load(source, map, skip_bad_rows)
    if _choose_format(raw, COMPARISONS, skip_bad_rows).kind == "comparison":
        return _read(raw, COMPARISONS, skip_bad_rows, limit_rows, refine)
    read_rating = functools.partial(comparisons.read_rating, needs_annotator=normalise_raters)
    rated = _read(raw, (Format("rating", ("prompt", "response", "rating"), read_rating),), skip_bad_rows, None)
    ratings = comparisons.normalise_ratings(rated.rows) if normalise_raters else rated.rows
    compared, ties = comparisons.compare_ratings(ratings, rating_threshold)
    if not compared:
        what = f"no two responses to the same prompt differ by more than {rating_threshold:g} in rating"
        fix = "give several rated responses per prompt, or a lower rating_threshold"
        raise DatasetError(what, where=source, fix=fix)
    usable, bad, long = _refined(compared, lambda row: row, skip_bad_rows, limit_rows, refine)
    problems = [*rated.problems, *ties, *bad]
    _require_usable(usable, problems, long, source, "correct the rows")
    agreement = comparisons.annotator_agreement(ratings, rating_threshold)
    skipped = rated.skipped + len(ties) + len(bad)
    return Dataset(usable, "rating", source, raw.digest, skipped, problems[:PROBLEMS_KEPT], agreement, len(long))


def detect_kind(source: str, *, map: Mapping[str, str] | None = None) -> str:
    """The kind of a dataset's rows, by the first row's columns: "comparison", "rating", "demonstration" or "prompt".

    Raises DatasetError.
    """
    return _choose_format(_load(source, map, False), COMPARISONS + DEMONSTRATIONS + PROMPTS, False).kind


def _read(
    raw: RawDataset,
    formats: Sequence[Format],
    skip_bad_rows: bool,
    limit_rows: int | None,
    refine: Refine | None = None,
    check: Callable[[Prompt], object] | None = None,
) -> Dataset:
    row_format = _choose_format(raw, formats, skip_bad_rows)

    def build(row: RawRow) -> object:
        built = row_format.build(row)
        if check is not None:
            check(built)
        return built

    usable, bad, long = _refined(raw.rows, build, skip_bad_rows, limit_rows, refine)
    problems = [*raw.problems, *bad]
    fix = f"correct the rows ({row_format.kind} rows with {listed(row_format.columns)} were expected), or see --map"
    _require_usable(usable, problems, long, raw.name, fix)
    skipped = len(problems)
    return Dataset(usable, row_format.kind, raw.name, raw.digest, skipped, problems[:PROBLEMS_KEPT], long=len(long))


def _require_usable(usable: list, problems: list[str], long: list[str], source: str, fix: str) -> None:
    """Raise DatasetError, with the first problem, if no row is usable."""
    if not usable:
        what = f"none of the {counted(len(problems) + len(long), 'rows')} can be used; {(problems or long)[0]}"
        fix = fix if problems else "raise the limit on their length, or pass --long-rows cut"
        raise DatasetError(what, where=source, fix=fix)


def _refined(
    rows: Iterable, build: Callable, skip_bad_rows: bool, limit_rows: int | None, refine: Refine | None
) -> tuple[list, list[str], list[str]]:
    """Up to `limit_rows` rows that are built and refined; what is wrong with the bad ones; the places of long ones.

    Raises LongRow, and without `skip_bad_rows` the DatasetError of the first bad row.
    """
    usable: list = []
    problems: list[str] = []
    long: list[str] = []
    for row in rows:
        if limit_rows is not None and len(usable) == limit_rows:
            break
        try:
            built = build(row)
            refined = built if refine is None else refine(built)
        except LongRow:
            raise
        except DatasetError as error:
            if not skip_bad_rows:
                raise
            problems.append(f"{error.where}: {error.what}")
            continue
        if refined is None:
            long.append(f"{row.where}: it is too long")
        else:
            usable.append(refined)
    return usable, problems, long


def _load(source: str, map: Mapping[str, str] | None, skip_bad_rows: bool) -> RawDataset:
    """The raw rows, with columns renamed by `map` (name: column)."""
    raw = read_raw_dataset(source, skip_bad_rows=skip_bad_rows)
    if not map:
        return raw
    columns = list(dict.fromkeys(name for row in raw.rows for name in row.values))
    unmapped = set(columns) - set(map.values())
    for name, column in map.items():
        where = f"{source}: --map {quoted(name)}={quoted(column)}"
        if column not in columns:
            what, fix = f"there is no column `{quoted(column)}`", f"use one of the columns {listed(columns)}"
        elif list(map.values()).count(column) > 1:
            what, fix = f"the column `{quoted(column)}` gets two names", "map each column once"
        elif name in unmapped:
            what = f"two columns would be called `{quoted(name)}`"
            fix = f"rename the other one too, for example --map {name}={column},other_{name}={name}"
        else:
            continue
        raise DatasetError(what, where=where, fix=fix)
    names = {column: name for name, column in map.items()}
    rows = [RawRow({names.get(name, name): cell for name, cell in row.values.items()}, row.where) for row in raw.rows]
    return replace(raw, rows=rows)


def _choose_format(raw: RawDataset, formats: Sequence[Format], skip_bad_rows: bool) -> Format:
    """The first format that fits the first row or, if bad rows are skipped, the first row that any format fits."""
    for row in raw.rows if skip_bad_rows else raw.rows[:1]:
        for candidate in formats:
            if candidate.fits(row.values):
                return candidate
    first = raw.rows[0]
    accepted = "; ".join("+".join(candidate.columns) for candidate in formats)
    others = (other for other in COMPARISONS + DEMONSTRATIONS + PROMPTS if other.fits(first.values))
    kind = next((f", which is a {other.kind} row" for other in others), "")
    wanted = " or ".join(dict.fromkeys(candidate.kind for candidate in formats if candidate.kind != "rating"))
    what = f"the row has {listed(first.values)}{kind}; a {wanted} row has one of: {accepted}"
    raise DatasetError(what, where=first.where, fix=_suggest_map(list(first.values), formats))


def _suggest_map(columns: Sequence[str], formats: Sequence[Format]) -> str:
    """Advice for columns that fit no format: the first renaming after which they fit one."""
    if len(columns) == 1 and any(mark in columns[0] for mark in (";", "\t", "|")):
        return "separate the columns of a .csv file by commas"
    for candidate in formats:
        renamed: dict[str, str] = {}
        for name in candidate.columns:
            aliases = {alias.lower() for alias in (name, *ALIASES.get(name, ()))}
            free = (c for c in columns if c.lower() in aliases and c not in (*candidate.columns, *renamed.values()))
            column = name if name in columns else next(free, None)
            if column is not None:
                renamed[name] = column
        if len(renamed) == len(candidate.columns):
            return "try --map " + ",".join(f"{name}={c}" for name, c in renamed.items() if name != c)
    return "rename columns with --map name=column"
