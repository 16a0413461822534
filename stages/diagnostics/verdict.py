"""Whether a reward model is good enough for PPO: a decision from its report, with the reasons. Pure, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from stages.results import Table

MIN_PAIRS = 20  # held-out pairs without which nothing is decided
MIN_PROMPTS = 6  # prompts of theirs; of 4 with 5 pairs each that go together, 6.6 % of random models would pass
OVERCONFIDENT = 0.1  # mean confidence above accuracy
LENGTH_CORRELATION = 0.5
BEYOND_LABELS = 0.2  # of the scores' correlation with length beyond the labels'
MIN_STD_RATIO = 0.1  # of sampled scores, in standard deviations of held-out scores
FARTHEST = 3.0  # of the mean sampled score from the demonstrations', in their standard deviations


@dataclass(frozen=True)
class Verdict:
    """A decision (go, caution, no-go or unknown), what led to it, and what else is worth knowing."""

    decision: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def stored(self) -> dict[str, Any]:
        """As report.json has it."""
        return asdict(self)

    def table(self) -> Table:
        """For a person."""
        rows = [("because", reason) for reason in self.reasons] + [("also", note) for note in self.notes]
        return Table(f"verdict: {self.decision}", ("", "the reward model on what it was not trained on"), tuple(rows))


def reach_verdict(report: dict[str, Any]) -> Verdict:
    """The verdict on a report: that of `build_comparison_report`, and what the reward stage adds.

    no-go: at least MIN_PAIRS held-out pairs of MIN_PROMPTS prompts, and the 95 % interval of the accuracy includes a
    half or lies below. unknown: fewer. caution: anything else that speaks against it. go: nothing does.
    """
    notes = tuple(_notes(report))
    pairs = report.get("pairs", 0)
    if pairs < MIN_PAIRS:
        how = "raise --eval-fraction, or give an --eval-dataset"
        return Verdict(
            "unknown", (f"{pairs} held-out pairs are too few to tell, {MIN_PAIRS} are needed: {how}",), notes
        )
    prompts = report.get("clusters", pairs)
    if prompts < MIN_PROMPTS:
        what = f"{pairs} held-out pairs of {prompts} prompts are too few to tell, {MIN_PROMPTS} prompts are needed"
        return Verdict("unknown", (f"{what}: raise --eval-fraction, or give an --eval-dataset",), notes)
    cautions = tuple(_cautions(report))
    accuracy = _accuracy(report)
    if report["accuracy_low"] <= 0.5:
        return Verdict("no-go", (f"{accuracy} is no better than chance, 0.5",), cautions + notes)
    if cautions:
        return Verdict("caution", cautions, (f"{accuracy} is better than chance, 0.5", *notes))
    return Verdict("go", (f"{accuracy} is better than chance, 0.5", *_lead(report)), notes)


def _accuracy(report: dict[str, Any]) -> str:
    interval = f"[{report['accuracy_low']:.3f}, {report['accuracy_high']:.3f}]"
    prompts = report.get("clusters", report["pairs"])
    of_prompts = f" of {prompts} prompts" if prompts < report["pairs"] else ""
    return f"accuracy {report['accuracy']:.3f} {interval} on {report['pairs']} held-out pairs{of_prompts}"


def _cautions(report: dict[str, Any]) -> Iterator[str]:
    yield from _not_ahead(report)
    yield from _miscalibrated(report)
    scores, labels = report["score_length_corr"], report["label_length_corr"]
    if abs(scores) > LENGTH_CORRELATION and abs(scores - labels) > BEYOND_LABELS:
        yield (
            f"scores follow length: correlation {scores:.2f} (limit {LENGTH_CORRELATION:g}), where the labels' is "
            f"{labels:.2f}"
        )
    yield from _odd_on_samples(report)


def _best(report: dict[str, Any]) -> tuple[str, dict[str, float]] | None:
    """The rule without a prompt that is right most often."""
    return max(report.get("baselines", {}).items(), key=lambda item: item[1]["accuracy"], default=None)


def _not_ahead(report: dict[str, Any]) -> Iterator[str]:
    best = _best(report)
    if best is not None and best[1]["lead_low"] <= 0:
        name, found = best
        yield (
            f"accuracy {report['accuracy']:.3f} is not clearly above {found['accuracy']:.3f}, that of '{name}': lead "
            f"{_lead_of(found)}, pair by pair"
        )


def _lead(report: dict[str, Any]) -> Iterator[str]:
    best = _best(report)
    if best is not None:
        yield f"it leads '{best[0]}', accuracy {best[1]['accuracy']:.3f}, by {_lead_of(best[1])}, pair by pair"


def _lead_of(found: dict[str, float]) -> str:
    return f"{found['lead']:.3f} [{found['lead_low']:.3f}, {found['lead_high']:.3f}]"


def _miscalibrated(report: dict[str, Any]) -> Iterator[str]:
    accuracy, confidence = report.get("expected_accuracy", report["accuracy"]), report["confidence"]
    noise = 1.96 * math.sqrt(accuracy * (1 - accuracy) / report.get("effective_pairs", report["pairs"]))
    if confidence - accuracy > max(OVERCONFIDENT, noise):
        yield (
            f"over-confident: {confidence:.2f} sure on average and right in {accuracy:.2f} (limit {OVERCONFIDENT:g} "
            f"apart), calibration error {report['calibration_error']:.2f}"
        )
    if report["log_loss"] > math.log(2):
        yield f"log-loss {report['log_loss']:.3f} is above {math.log(2):.3f}, that of knowing nothing"


def _odd_on_samples(report: dict[str, Any]) -> Iterator[str]:
    samples = report.get("samples")
    if not samples:
        return
    std, pair_std = samples["within_std"], score_std_within_pairs(report)
    if std < MIN_STD_RATIO * pair_std:
        yield (
            f"no spread on samples of the policy: standard deviation {std:.3g} within a prompt, {pair_std:.3g} on "
            f"comparisons (at least {MIN_STD_RATIO:g} of that)"
        )
    distance = distance_from_demonstrations(report)
    if abs(distance) > FARTHEST:
        yield (
            f"samples of the policy score {samples['mean']:.3g} on average, {distance:+.1f} standard deviations from "
            f"demonstrations (limit {FARTHEST:g})"
        )


def score_std_within_pairs(report: dict[str, Any]) -> float:
    """Standard deviation of scores within a pair: half the root mean square of the margins."""
    return math.hypot(report["margin_mean"], report["margin_std"]) / 2


def distance_from_demonstrations(report: dict[str, Any]) -> float:
    """Of the mean sampled score, in standard deviations of demonstrations' scores."""
    unit = report["demonstrations_std"] or score_std_within_pairs(report)
    return (report["samples"]["mean"] - report["demonstrations_mean"]) / unit if unit else 0.0


def _notes(report: dict[str, Any]) -> Iterator[str]:
    accuracy = report.get("accuracy")
    ceiling, agreement = report.get("agreement_ceiling", 1.0), report.get("annotator_agreement")
    if accuracy is not None and ceiling < 1:
        expected = report.get("expected_accuracy", accuracy)
        single = f" ({expected:.3f} against single judgements)" if expected != accuracy else ""
        yield (
            f"labels this uncertain allow an accuracy of {ceiling:.3f}, {ceiling - expected:+.3f} from this one{single}"
        )
    if agreement is not None:
        away = f", {agreement - accuracy:+.3f} from its accuracy" if accuracy is not None else ""
        yield f"two annotators agree on {agreement:.3f} of {report['annotator_pairs']} pairs{away}"
    samples = report.get("samples")
    if samples and accuracy is not None:
        distance = distance_from_demonstrations(report)
        yield (
            f"{samples['count']} samples of the policy score {samples['mean']:.3g} on average, {distance:+.1f} "
            f"standard deviations from demonstrations; their own is {samples['std']:.3g}, "
            f"{samples['within_std']:.3g} within a prompt"
        )
