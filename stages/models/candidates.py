"""Models to measure, as --model and --also name them: bases, checkpoints, and the policies in a run's resume states.

Checked on disk before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stages.checkpoint.manifest import is_checkpoint, locate
from stages.checkpoint.states import ABOUT, AHEAD, STATE, read_about, states_in
from stages.errors import CheckpointError
from stages.models.classifier_ref import CLASSIFIER
from stages.models.model_ref import FOREIGN, ModelRef, open_model, same_base
from stages.places import absolute
from stages.reading import read_json
from stages.recipe import damaged_knob

POLICIES = ("sft", "ppo", "dpo", FOREIGN)
ADAPTERS = (*POLICIES, "reward")
SCORERS = ("reward", CLASSIFIER)
IMPLICIT = ("dpo", "ppo")  # policies with an implicit reward, for which they are optimal: beta log(policy / reference)


@dataclass(frozen=True)
class Candidate:
    """A model to measure beside others."""

    name: str  # as the user gave it; for a state its folder
    ref: ModelRef  # for a state its run's checkpoint if that is finished, else what the run started from
    stage: str | None  # that trained it; None for a plain base
    knobs: dict[str, Any] = field(default_factory=dict)  # of that stage
    state: Path | None = None
    step: int | None = None  # of a state
    reference: ModelRef | None = None  # of its implicit reward

    @property
    def is_unfinished(self) -> bool:
        """True for a state whose run has no checkpoint: `ref` is what it started from."""
        return self.state is not None and not is_checkpoint(run_of(self.state))

    @property
    def beta(self) -> float:
        """The weight of the KL in its training; 0 without one."""
        return float(self.knobs.get("beta" if self.stage == "dpo" else "kl_coef") or 0.0)

    @property
    def label(self) -> str:
        """A short name, not always unique."""
        if self.state is not None:
            return f"{run_of(self.state).name} step {self.step}"
        return Path(self.name).name or self.name


def labels_of(candidates: list[Candidate]) -> list[str]:
    """Short names of candidates; those with equal ones get the names that the user gave."""
    short = [candidate.label for candidate in candidates]
    return [c.name if short.count(label) > 1 else label for c, label in zip(candidates, short, strict=True)]


def candidate_of(name: str, ref: ModelRef) -> Candidate:
    """A candidate that is an open base or checkpoint."""
    if ref.manifest is None:
        return Candidate(name, ref, CLASSIFIER if ref.is_classifier else None)
    return Candidate(name, ref, ref.manifest.stage, dict(ref.manifest.config))


def open_candidates(
    name: str, stages: tuple[str, ...], what: str, *, trust_remote_code: bool = False, base: str | None = None
) -> list[Candidate]:
    """The candidates that one flag names: a base, a checkpoint, a resume state, or every state in a folder of them.

    Raises ModelError or CheckpointError naming the flag `what`.
    """
    path = absolute(name, what)
    if (path / ABOUT).is_file():
        return [_open_state(name, path, stages, what, trust_remote_code)]
    if path.name == STATE and path.parent.is_dir() and not is_checkpoint(path):
        places = states_in(path)
        if not places:
            raise CheckpointError(f"{name} holds no state", where=what, fix="train with --keep-state --keep-states 10")
        return [_open_state(str(Path(name) / p.name), p, stages, what, trust_remote_code) for p in places]
    if (path / "run.json").is_file() and states_in(path / STATE) and not is_checkpoint(path):
        raise CheckpointError(
            f"{name} is an unfinished run", where=what, fix=f"finish it, or give its states: {Path(name) / STATE}"
        )
    ref = open_model(name, stages=stages, what=what, trust_remote_code=trust_remote_code, base=base)
    return [candidate_of(name, ref)]


def open_beside(
    names: list[str],
    first: ModelRef,
    stages: tuple[str, ...],
    advice: str,
    *,
    trust_remote_code: bool = False,
    base: str | None = None,
) -> list[Candidate]:
    """The candidates that --also names, from `stages` (with "sft", a plain base too), all on one base but classifiers.

    Raises CheckpointError for another stage or base; in `advice`, {} is the name.
    """
    candidates: list[Candidate] = []
    how = {"trust_remote_code": trust_remote_code, "base": base}
    for name in names:
        for candidate in open_candidates(name, (*ADAPTERS, *stages), "--also", **how):
            if candidate.stage not in stages and not (candidate.stage is None and "sft" in stages):
                kinds = {None: "a base model", CLASSIFIER: "a sequence classifier"}
                what = kinds.get(candidate.stage, f"a `{candidate.stage}` checkpoint")
                policy = "which has no score of its own, and cannot be measured on comparisons"
                raise CheckpointError(
                    f"{name} is {what}, {policy if 'reward' in stages else 'no policy that could answer prompts'}",
                    where="--also",
                    fix=advice.format(name),
                )
            candidates.append(candidate)
    on_base = [ref for ref in (first, *(c.ref for c in candidates)) if not ref.is_classifier]
    for ref in on_base[1:]:
        same_base(on_base[0], ref, first_flag="--model" if on_base[0] is first else "--also", second_flag="--also")
    return candidates


def with_reference(candidate: Candidate, given: ModelRef | None, *, trust_remote_code: bool = False) -> Candidate:
    """The candidate with the reference of its implicit reward: `given`, else the model that its training started from.

    Raises CheckpointError if it cannot score comparisons.
    """
    if candidate.stage in SCORERS:
        if candidate.state is not None:
            raise CheckpointError(
                f"{candidate.name} is a state of a `reward` run, which cannot be evaluated",
                where="--also",
                fix="finish the run and give its folder",
            )
        return candidate
    if not candidate.beta:
        raise CheckpointError(
            f"{candidate.name} was trained with kl_coef 0, so it has no implicit reward",
            where="--model, --also",
            fix="leave it out, or give --reward to score its responses to prompts",
        )
    parent = candidate.ref if candidate.is_unfinished else parent_of(candidate.ref, trust_remote_code)
    return replace(candidate, reference=given or parent)


def parent_of(ref: ModelRef, trust_remote_code: bool = False) -> ModelRef:
    """The checkpoint from which a policy's training started, else its base. Raises UserError if it is gone."""
    if ref.manifest is None:
        return ref
    parent = next((p for p in ref.manifest.parents if p.role == "model"), None)
    if parent is None:
        return open_model(str(ref.base), stages=(), what="base", trust_remote_code=trust_remote_code)
    place = str(locate(ref.folder, parent))
    known = str(ref.base) if parent.stage == FOREIGN else None  # --base may have named it
    return open_model(place, stages=ADAPTERS, what="reference", trust_remote_code=trust_remote_code, base=known)


def run_of(state: Path) -> Path:
    """The output folder of the run that saved a state."""
    return Path(state).absolute().parent.parent


def _open_state(name: str, place: Path, stages: tuple[str, ...], what: str, trusted: bool) -> Candidate:
    """One resume state of a finished or an unfinished run."""
    run = run_of(place)
    try:
        about = read_about(place)
    except CheckpointError as error:
        raise CheckpointError(f"{name} is damaged: {error.what}", where=what, fix="give another state") from None
    if is_checkpoint(run):
        ref = open_model(str(run), stages=stages, what=what, trust_remote_code=trusted)
        stage, knobs = ref.manifest.stage, dict(ref.manifest.config)
    else:
        record = _read_run(run, what)
        stage, knobs = record["stage"], record["config"]
        if stage not in stages:
            raise CheckpointError(f"{name} is of a `{stage}` run", where=what, fix=f"give one of {', '.join(stages)}")
        if about["run"] != record["id"]:
            raise CheckpointError(
                f"{name} was saved by an earlier run in this folder", where=what, fix="give a state of the current run"
            )
        named = {"trust_remote_code": trusted, "base": knobs.get("base")}
        ref = open_model(str(knobs["model"]), stages=stages, what=what, **named)
        if ref.digest != record["inputs"].get("model"):
            raise CheckpointError(
                f"{knobs['model']} has changed since {name} was trained from it",
                where=what,
                fix="restore the old model",
            )
    step = int(about["step"]) + (AHEAD in about["facts"])
    return Candidate(name, ref, stage, knobs, place, step)


def _read_run(run: Path, what: str) -> dict[str, Any]:
    damaged = ""
    try:
        record = read_json(run / "run.json")
        texts = record["stage"], record["id"], record["config"]["model"]
        damaged = damaged_knob(record["stage"], record["config"])
        if not damaged and all(isinstance(text, str) for text in texts) and isinstance(record["inputs"], dict):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    damage = f" (it is damaged at config.{damaged})" if damaged else ""
    raise CheckpointError(
        f"{run} has neither checkpoint.json nor a sound run.json{damage}",
        where=what,
        fix="give a state inside its run",
    )
