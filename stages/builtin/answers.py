"""The final answer of a maths problem: found in a text, and compared as a number.

Conventions: GSM8K (Cobbe et al. 2021) ends solutions with `#### 72` and ignores thousands separators; MATH (Hendrycks
et al. 2021) puts the answer into the last \\boxed{} and ignores units, currency, per cent and degree signs and spacing.
Every pattern is linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

DIGITS = 100  # of a number that is read; a longer one is compared as text
TOLERANCE = Fraction(1, 10**6)  # relative, unless both numbers are whole: 33.3333333 equals 100/3

NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
CURRENCY = r"(?:[€£¥₹]|USD|RMB)"
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "万": 10**4, "亿": 10**8}
VALUE = re.compile(
    rf"""
    (?<![A-Za-z\d_.])(?:(?<!\d,))
    (?P<sign>(?<![\w)\]}}%])[-+])? (?:{CURRENCY}\s?)? (?P<inner>(?<![\w)\]}}%])-)?
    (?: (?P<whole>\d{{1,15}})\s{{1,3}}(?P<top>\d{{1,15}})/(?P<bottom>\d{{1,15}})              # 1 1/2
      | (?P<n>{NUMBER}) (?: \s?/\s?(?P<d>-?(?:{NUMBER})) )?                              # 3/4, 0.5
        (?: \s?(?:\*|×|x|\\times|\\cdot)\s?10\s?\^\s?\{{?(?P<power>-?\d{{1,3}})\}}?      # 1.5 x 10^3
          | [eE](?P<exponent>[-+]?\d{{1,3}})(?![\w.]) )? )
    \s?(?P<percent>%)? (?:\s?(?P<scale>{"|".join(SCALES)}))?
    """,
    re.VERBOSE,
)
# A few words after a number: cm, cm^2, apples per day, km/h, 元. Of single letters only units, since 5x is no number.
WORD = r"(?:(?![A-Za-z](?![A-Za-z]))[^\W\d_]{1,30}|[mgLlsh])(?:\^\{?[23]\}?|[²³])?"
UNIT = re.compile(rf"(?:{WORD}(?:[ /.]{{1,3}}{WORD}){{0,4}}\.?)?")
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)\s+(?P<bare>[^\s{}$]+)|\\.|[{}]", re.DOTALL)
MARKED = re.compile(r"####[ \t]*([^\n]*)")
WORDS = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{2,}")
FRACTION = re.compile(
    rf"(?:(?P<whole>\d)\s?)?\\[dtc]?frac\s?(?:\{{\s?(-?(?:{NUMBER}))\s?\}}|(\d))\s?(?:\{{\s?(-?(?:{NUMBER}))\s?\}}|(\d))"
)
TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
DROPPED = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[!,;: ()\[\]]|\^\s?\{?\s?\\circ\s?\}?|\\degree|°")


def maths_score(response: str, answers: tuple[str, ...]) -> float:
    """1 if the final answer of a response equals one of the reference answers, else 0."""
    found = final_answer(response)
    return float(any(same_answer(found, answer) for answer in answers))


def final_answer(text: str) -> str:
    """The last complete \\boxed{}; else the last number behind `####`; else the last number; "" if there is none."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    lines = [line.strip() for line in MARKED.findall(text)]
    number = next((line for line in reversed(lines) if values_of(line)), None)
    if number is not None:
        return number
    return last_number(text) or (lines[-1] if lines else "")


def reference_answer(text: str) -> str:
    """The answer that a row's cell stands for: itself, or the final answer of a solution written out."""
    if last_boxed(text) is not None or MARKED.search(text):
        return final_answer(text)
    words = sum(1 if word.isascii() else 2 for word in WORDS.findall(clean(text)))  # Chinese has no spaces
    sentence = words > 1 and not values_of(text)
    return (last_number(text) if sentence else "") or text.strip()


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{} or \\fbox{} that is closed."""
    found: tuple[int, int] | None = None
    opened: list[int | None] = []  # where the content of each open brace begins; None for braces of other commands
    for mark in BOXED.finditer(text):
        if mark["bare"] is not None:
            found = mark.span("bare")
        elif mark[0] == "}":
            begin = opened.pop() if opened else None
            if begin is not None and (found is None or found[0] < begin):  # else a box within this one
                found = begin, mark.start()
        elif mark[0].endswith("{") and not mark[0].startswith("\\{"):
            opened.append(None if mark[0] == "{" else mark.end())
    return text[slice(*found)] if found else None


def last_number(text: str) -> str:
    """The last number of a text, with its sign, per cent sign and scale; "" if there is none."""
    last = ""
    for match in VALUE.finditer(clean(text)):
        last = match[0].strip()
    return last


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are equal: as numbers if both are, else as texts without spacing and case."""
    mine, theirs = values_of(one), values_of(other)
    if mine and theirs:
        return any(_equal(a, b) for a in mine for b in theirs)
    plain = _plain(one)
    return bool(plain) and plain == _plain(other)


def values_of(text: str) -> tuple[Fraction, ...]:
    """The values that an answer may have; none if it is no single number. `50%` may be 50 or 0.5, as in both papers."""
    if len(text) > 4 * DIGITS:
        return ()
    answer = clean(text).strip().rstrip(".。,;").strip()
    answer = re.split(r"=|≈|\\approx", answer)[-1].strip()
    match = VALUE.match(answer)
    rest = answer[match.end() :].strip() if match else ""
    if match is None or not UNIT.fullmatch(rest) or len(match[0]) > DIGITS:
        return ()
    value = _value_of(match)
    if value is None:
        return ()
    return (value, value / 100) if match["percent"] else (value,)


def _value_of(match: re.Match) -> Fraction | None:
    """The number that VALUE has matched; None for a division by zero."""
    if match["whole"]:
        top, bottom, whole = Fraction(match["top"]), Fraction(match["bottom"]), Fraction(match["whole"])
    else:
        top, whole = Fraction(match["n"].replace(",", "")), Fraction(0)
        bottom = Fraction((match["d"] or "1").replace(",", ""))
    if not bottom:
        return None
    negative = (match["sign"] or "").startswith("-") != bool(match["inner"])
    value = (whole + top / bottom) * Fraction(10) ** int(match["power"] or match["exponent"] or 0)
    return (-value if negative else value) * SCALES.get(match["scale"], 1)


def clean(text: str) -> str:
    """A text in plain characters: full-width digits, vulgar and LaTeX fractions, minus signs and spacing commands."""
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/").translate(MINUS)
    text = TEXT.sub(r" \1", text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%"))
    text = re.sub(r"-\s?\$", "-", DROPPED.sub("", text)).replace("$", " ").replace("~", " ")
    text = re.sub(r"\bper ?cent\b", "%", text)
    text = re.sub(rf"百分之\s?({NUMBER})", r"\1%", text)
    text = re.sub(r"(?<!\d)(\d{1,15})\s?分之\s?(\d{1,15})", r"\2/\1", text)
    return FRACTION.sub(_fraction, text)


MINUS = str.maketrans({mark: "-" for mark in "−–‐‑"})


def _fraction(match: re.Match) -> str:
    whole, *parts = match.groups()
    top, bottom = (part for part in parts if part is not None)
    return f"{whole} {top}/{bottom}" if whole else f"{top}/{bottom}"


def _equal(a: Fraction, b: Fraction) -> bool:
    if a == b or (a.denominator == b.denominator == 1):
        return a == b
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def _plain(answer: str) -> str:
    """An answer for comparison as text: without spacing, case, final stop, and a short left side such as `x =`."""
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", clean(answer))
    text = re.sub(r"\s+", "", text).rstrip(".。").casefold()
    return re.sub(r"^[^=]{1,2}=(?=[^=]+$)", "", text)
