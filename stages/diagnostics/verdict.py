"""Decides from its report whether a reward model is good enough for PPO, with the reasons. Pure, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from stages.errors import counted, verb_for
from stages.results import Table

MIN_PAIRS = 20  # held-out pairs that a decision needs
MIN_PROMPTS = 6  # prompts of those pairs; with 4 prompts of 5 equal pairs each, 6.6 % of random models would pass
OVERCONFIDENT = 0.1  # mean confidence above accuracy
LENGTH_CORRELATION = 0.5  # of scores and lengths
BEYOND_LABELS = 0.2  # difference between that correlation and the labels'
MIN_STD_RATIO = 0.1  # std of the scores of sampled responses, as a share of that within held-out pairs
FARTHEST = 3.0  # mean score of sampled responses, in standard deviations from the demonstrations
MORE_PAIRS = "raise --eval-fraction, or give an --eval-dataset"


@dataclass(frozen=True)
class Verdict:
    """A decision (go, caution, no-go or unknown), its reasons, and further notes."""

    decision: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def stored(self) -> dict[str, Any]:
        """As report.json has it."""
        return asdict(self)

    def table(self) -> Table:
        """For a person."""
        rows = [("reason", reason) for reason in self.reasons] + [("note", note) for note in self.notes]
        return Table(f"verdict: {self.decision}", ("kind", "the reward model on held-out data"), tuple(rows))


def reach_verdict(report: dict[str, Any]) -> Verdict:
    """The verdict on a report: that of `build_comparison_report`, and what the reward stage adds.

    no-go: at least MIN_PAIRS held-out pairs of MIN_PROMPTS prompts, and the 95 % interval of the accuracy includes a
    half or lies below. unknown: fewer. caution: another measure is beyond its limit. go: none is.
    """
    notes = tuple(_notes(report))
    pairs = report.get("pairs", 0)
    prompts = report.get("clusters", pairs)
    if pairs < MIN_PAIRS:
        reason = f"{counted(pairs, 'held-out pairs')} {verb_for(pairs, 'are')} too few, {MIN_PAIRS} are needed"
        return Verdict("unknown", (f"{reason}: {MORE_PAIRS}",), notes)
    if prompts < MIN_PROMPTS:
        reason = f"{pairs} held-out pairs of {counted(prompts, 'prompts')} are too few"
        return Verdict("unknown", (f"{reason}, {MIN_PROMPTS} prompts are needed: {MORE_PAIRS}",), notes)
    interval = f"95 % interval {report['accuracy_low']:.3f} to {report['accuracy_high']:.3f}"
    of_prompts = f" of {prompts} prompts" if prompts < pairs else ""
    accuracy = f"accuracy {report['accuracy']:.3f} ({interval}) on {pairs} held-out pairs{of_prompts}"
    above_chance = f"{accuracy} is better than chance (0.5)"
    cautions = tuple(_cautions(report))
    if report["accuracy_low"] <= 0.5:
        return Verdict("no-go", (f"{accuracy} is no better than chance (0.5)",), cautions + notes)
    if cautions:
        return Verdict("caution", cautions, (above_chance, *notes))
    rule = _best_rule(report)
    lead = () if rule is None else (f"it is above the accuracy of the {_describe_rule(*rule)}",)
    return Verdict("go", (above_chance, *lead), notes)


def _cautions(report: dict[str, Any]) -> Iterator[str]:
    rule = _best_rule(report)
    if rule is not None and rule[1]["lead_low"] <= 0:
        yield f"accuracy {report['accuracy']:.3f} is not clearly above that of the {_describe_rule(*rule)}"
    accuracy, confidence = report.get("expected_accuracy", report["accuracy"]), report["confidence"]
    noise = 1.96 * math.sqrt(accuracy * (1 - accuracy) / report.get("effective_pairs", report["pairs"]))
    if confidence - accuracy > max(OVERCONFIDENT, noise):
        yield (
            f"over-confident: mean confidence {confidence:.2f} but accuracy {accuracy:.2f} (allowed difference "
            f"{OVERCONFIDENT:g}), calibration error {report['calibration_error']:.2f}"
        )
    if report["log_loss"] > math.log(2):
        yield f"log-loss {report['log_loss']:.3f} is above {math.log(2):.3f}, the log-loss of a constant 0.5"
    scores, labels = report["score_length_corr"], report["label_length_corr"]
    if abs(scores) > LENGTH_CORRELATION and abs(scores - labels) > BEYOND_LABELS:
        yield (
            f"scores follow length: correlation {scores:.2f} (limit {LENGTH_CORRELATION:g}); the labels' correlation "
            f"with length is {labels:.2f} (allowed difference {BEYOND_LABELS:g})"
        )
    if samples := report.get("samples"):
        yield from _sample_cautions(report, samples)


def _sample_cautions(report: dict[str, Any], samples: dict[str, float]) -> Iterator[str]:
    std, pair_std = samples["within_std"], score_std_within_pairs(report)
    if std < MIN_STD_RATIO * pair_std:
        yield (
            f"the policy's responses to a prompt score almost alike: standard deviation {std:.3g}, against "
            f"{pair_std:.3g} within a comparison (minimum {MIN_STD_RATIO:g} of that)"
        )
    distance = distance_from_demonstrations(report)
    if abs(distance) > FARTHEST:
        yield (
            f"sampled responses score {samples['mean']:.3g} on average, {distance:+.1f} standard deviations from the "
            f"demonstrations (limit {FARTHEST:g})"
        )


def _best_rule(report: dict[str, Any]) -> tuple[str, dict[str, float]] | None:
    """The most accurate of the rules that do not read the prompt."""
    return max(report.get("baselines", {}).items(), key=lambda item: item[1]["accuracy"], default=None)


def _describe_rule(name: str, rule: dict[str, float]) -> str:
    interval = f"95 % interval {rule['lead_low']:.3f} to {rule['lead_high']:.3f}"
    return f"rule '{name}' ({rule['accuracy']:.3f}): difference on the same pairs {rule['lead']:.3f} ({interval})"


def score_std_within_pairs(report: dict[str, Any]) -> float:
    """Standard deviation of scores within a pair: half the root mean square of the margins."""
    return math.hypot(report["margin_mean"], report["margin_std"]) / 2


def distance_from_demonstrations(report: dict[str, Any]) -> float:
    """Mean score of sampled responses minus that of demonstrations, in standard deviations of the latter's scores."""
    unit = report["demonstrations_std"] or score_std_within_pairs(report)
    return (report["samples"]["mean"] - report["demonstrations_mean"]) / unit if unit else 0.0


def _notes(report: dict[str, Any]) -> Iterator[str]:
    accuracy, samples = report.get("accuracy"), report.get("samples")
    ceiling, agreement = report.get("agreement_ceiling", 1.0), report.get("annotator_agreement")
    if accuracy is not None and ceiling < 1:
        yield (
            f"the labels are uncertain: against single judgements the expected accuracy is at most {ceiling:.3f} "
            f"(this model: {report.get('expected_accuracy', accuracy):.3f})"
        )
    if agreement is not None:
        comparison = f" (accuracy of this model: {accuracy:.3f})" if accuracy is not None else ""
        yield f"two annotators agree on {agreement:.3f} of {counted(report['annotator_pairs'], 'pairs')}{comparison}"
    if samples and accuracy is not None:
        count = samples["count"]
        yield (
            f"{counted(count, 'sampled responses')} {verb_for(count, 'score')} {samples['mean']:.3g} on average, "
            f"{distance_from_demonstrations(report):+.1f} standard deviations from the demonstrations; their standard "
            f"deviation is {samples['std']:.3g} overall and {samples['within_std']:.3g} among responses to one prompt"
        )
