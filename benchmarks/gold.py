"""The true reward of the learning benchmark: how cheerful the sentences of a response are, from its text alone.

A sentence scores its different cheerful words minus its different gloomy ones, limited to -2 and 2, so that repeating a
word, or putting many words into one sentence, gains nothing. A response scores the mean of its sentences.
"""

from __future__ import annotations

import re

CHEERFUL = frozenset(
    re.findall(
        r"\w+",
        "happy happily glad joy love loved loves loving kind nice good great best better fun funny smile "
        "smiled smiles smiling laugh laughed laughing friend friends hug hugged play played playing proud "
        "safe warm beautiful pretty wonderful brave thank thanked thanks share shared sharing help helped "
        "helpful excited surprise yummy sweet gentle clean new bright lucky cheer cheered enjoy enjoyed "
        "together",
    )
)
GLOOMY = frozenset(
    re.findall(
        r"\w+",
        "sad sadly cry cried crying angry mad scared afraid fear hurt hurts bad mean worse worst lost lonely "
        "broke broken break fell fall dark cold sick pain hard wrong sorry upset worried tired hungry dirty "
        "ugly die died dead hate hated fight fought yell yelled shout shouted scary monster trouble problem "
        "alone stuck",
    )
)
MOST = 2  # of a sentence


def cheerfulness(text: str) -> float:
    """Mean over sentences of cheerful minus gloomy words; 0 for a text without words."""
    sentences = [set(words) for part in re.split(r"[.!?]+", text.lower()) if (words := re.findall(r"[a-z]+", part))]
    counts = [len(words & CHEERFUL) - len(words & GLOOMY) for words in sentences]
    return sum(max(-MOST, min(MOST, count)) for count in counts) / len(counts) if counts else 0.0


def score(prompts: list, responses: list[str], **columns: list) -> list[float]:
    """Reward function of `--gold benchmarks/gold.py`."""
    return [cheerfulness(response) for response in responses]
