"""The results of runs: the metrics in their stages' manifests, and their policies side by side.

Reads only JSON, so it is fast and needs neither model nor device.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from stages.cells import ABSENT, format_number, format_share, inner, is_number, part
from stages.checkpoint.manifest import MANIFEST
from stages.errors import CheckpointError
from stages.places import absolute
from stages.reading import read_object
from stages.results import Reporter, Result, Table, reward_flags
from stages.tables import REPORTED_STAGES, evaluation_tables

EVALUATION_FILE = "evaluate.json"


def run(paths: list[str], reporter: Reporter) -> Result:
    """Results of every run folder (or single checkpoint folder) in `paths`, as tables and JSON.

    Raises CheckpointError for a folder that is missing or has no results, and for a file that is not JSON.
    """
    runs = {path: read_run(path) for path in dict.fromkeys(paths)}
    tables: list[Table] = []
    if len(runs) > 1:
        tables.append(overview(runs))
    for path, results in runs.items():
        label = f"{path}: " if len(runs) > 1 else ""
        tables += [stage_table(label, results), held_out_table(label, results)]
        # Responses of several runs would hide the numbers; --json has them.
        tables += evaluation_tables(results["evaluation"], label, with_examples=len(runs) == 1)
    advice = tuple(line for path, results in runs.items() for line in suggest_next_command(path, results))
    return Result(
        command="report",
        status="done",
        output=None,
        data={"runs": [{"run": path, **results} for path, results in runs.items()]},
        tables=tuple(table for table in tables if table.rows),
        next=advice[:1] if len(runs) > 1 else advice,
    )


# --- reading ------------------------------------------------------------------------------------------------------


def read_run(path: str) -> dict[str, object]:
    """Manifests by stage and the evaluation of one run folder: {"stages": {...}, "evaluation": {...}}.

    Raises CheckpointError if there is nothing to read.
    """
    folder = absolute(path, "RUN")
    if not folder.is_dir():
        raise CheckpointError(
            "no such folder", where=path, fix="give the folder that holds sft/, reward/, ppo/ or dpo/"
        )
    manifests = {stage: read_optional_json(folder / stage / MANIFEST) for stage in REPORTED_STAGES}
    checkpoint = read_optional_json(folder / MANIFEST)
    if checkpoint:
        manifests[str(checkpoint.get("stage", "checkpoint"))] = checkpoint
    stages = {stage: manifest for stage, manifest in manifests.items() if manifest}
    evaluation = read_optional_json(folder / EVALUATION_FILE)
    if not stages and not evaluation:
        unfinished = [stage for stage in REPORTED_STAGES if (folder / stage).is_dir()]
        raise CheckpointError(
            f"{' and '.join(unfinished)} did not finish yet" if unfinished else "nothing to report here",
            where=path,
            fix=f"the report needs {path}/sft, reward, ppo or dpo with a {MANIFEST}, or {path}/{EVALUATION_FILE}",
        )
    return {"stages": stages, "evaluation": evaluation}


def read_optional_json(path: Path) -> dict[str, object]:
    """A JSON object from a file, {} if there is no such file; raises CheckpointError for anything else."""
    try:
        return read_object(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    except json.JSONDecodeError as error:
        raise _damaged(f"{path}:{error.lineno}", error.msg) from None
    except ValueError as error:
        raise _damaged(str(path), str(error)) from None


def _damaged(where: str, why: str) -> CheckpointError:
    return CheckpointError(f"the file is damaged: {why}", where=where, fix="run the stage that wrote it again")


# --- tables -------------------------------------------------------------------------------------------------------


def stage_table(label: str, results: dict) -> Table:
    """Base, steps, duration and speed of every stage."""
    rows = []
    for stage, manifest in results["stages"].items():
        speed = format_number(inner(manifest, "throughput", "tokens_per_second"), 0)
        base = inner(manifest, "base", "name")
        steps, seconds = format_number(manifest.get("steps"), 0), format_number(manifest.get("seconds"), 1)
        rows.append((stage, str(base) if base else ABSENT, steps, seconds, speed))
    return Table(f"{label}the stages", ("stage", "base", "steps", "seconds", "tokens/s"), tuple(rows))


def held_out_table(label: str, results: dict) -> Table:
    """Metrics of every stage on rows it was not trained on."""
    sft, reward, ppo, dpo = (part(results["stages"], stage, "metrics") for stage in REPORTED_STAGES)
    rows = []
    if is_number(sft.get("eval_loss")):
        rows.append(("sft: loss per token", change(sft, "eval_loss"), "lower is better"))
    if is_number(sft.get("eval_perplexity")):
        rows.append(("sft: perplexity", format_number(sft["eval_perplexity"], 2), "1 would be certain of every token"))
    if is_number(reward.get("accuracy")):
        pairs = reward.get("eval_pairs")
        counted = f" of {format_number(pairs, 0)} comparisons" if is_number(pairs) else ""
        accuracy = format_share(reward["accuracy"], reward.get("accuracy_low"), reward.get("accuracy_high"))
        rows.append(("reward model: prefers the chosen response", accuracy + counted, "50 % is guessing"))
    if is_number(reward.get("longer_wins_accuracy")):
        longer = format_share(reward["longer_wins_accuracy"])
        rows.append(("for comparison: always prefer the longer one", longer, "what length alone explains"))
    if is_number(ppo.get("eval_score")):
        kl = ppo.get("eval_kl")
        note = f"at KL {format_number(kl, 2)}" if is_number(kl) else "by the reward it was trained on"
        rows.append(("ppo: score", change(ppo, "eval_score"), note))
    if is_number(dpo.get("accuracy")):
        accuracy = format_share(dpo["accuracy"], dpo.get("accuracy_low"), dpo.get("accuracy_high"))
        rows.append(("dpo: prefers the chosen response", accuracy, "by its implicit reward"))
    return Table(f"{label}on held-out rows", ("measure", "value", "note"), tuple(rows))


def overview(runs: dict[str, dict]) -> Table:
    """Several runs, a line each."""
    rows = []
    for path, results in runs.items():
        sft, reward = (part(results["stages"], stage, "metrics") for stage in ("sft", "reward"))
        policy, against = (part(results["evaluation"], side) for side in ("policy", "against"))
        win = part(results["evaluation"], "win_rate", "reward")
        loss, accuracy = format_number(sft.get("eval_loss"), 3), format_share(reward.get("accuracy"))
        scores = (format_number(against.get("score"), 3), format_number(policy.get("score"), 3))
        rows.append((path, loss, accuracy, *scores, format_number(policy.get("kl"), 3), format_share(win.get("rate"))))
    columns = ("run", "sft loss", "reward accuracy", "score sft", "score ppo", "KL", "ppo wins")
    return Table("all runs", columns, tuple(rows))


def change(metrics: dict, name: str) -> str:
    """A measure after training, preceded by the one before training if there is one."""
    before = metrics.get(f"{name}_before")
    return (f"{format_number(before, 3)} -> " if is_number(before) else "") + format_number(metrics[name], 3)


# --- what to do next ----------------------------------------------------------------------------------------------


def suggest_next_command(path: str, results: dict) -> list[str]:
    """The command for the next stage of a run; none if the run is complete."""
    stages, folder = results["stages"], Path(path)
    paths = {stage: shlex.quote(str(folder / stage)) for stage in REPORTED_STAGES}
    if results["evaluation"] or not (folder / "sft" / MANIFEST).is_file():
        return []
    if "reward" not in stages:
        return [f"rlhf reward --model {paths['sft']} --dataset COMPARISONS --output {paths['reward']}"]
    policies = [stage for stage in ("ppo", "dpo") if stage in stages]
    if not policies and inner(stages, "reward", "metrics", "verdict") == "no-go":
        return []  # `rlhf ppo` would refuse it
    if not policies:
        return [f"rlhf ppo --model {paths['sft']} --reward {paths['reward']} --dataset PROMPTS --output {paths['ppo']}"]
    prompts, sources = (inner(stages.get("ppo"), "config", knob) for knob in ("dataset", "reward"))
    prompts = shlex.quote(prompts) if isinstance(prompts, str) else "PROMPTS"
    named = isinstance(sources, list) and sources and all(isinstance(source, str) for source in sources)
    combine = (inner(stages.get("ppo"), "config", knob) for knob in ("reward_combine", "reward_std_coef"))
    rewards = reward_flags(sources, *combine) if named else f"--reward {paths['reward']}"
    also = f" --also {paths['dpo']}" if len(policies) > 1 else ""
    target = shlex.quote(str(folder / EVALUATION_FILE))
    return [
        f"rlhf evaluate --model {paths[policies[0]]}{also} --against {paths['sft']} {rewards}"
        f" --dataset {prompts} --output {target}"
    ]
