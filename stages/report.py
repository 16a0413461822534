"""What came of a run: the numbers its stages left in their manifests, and its policies side by side.

Reads JSON alone, so it answers at once and needs neither model nor device.
"""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

from stages.errors import CheckpointError
from stages.places import absolute
from stages.reading import read_text
from stages.results import Reporter, Result, Table
from stages.rollout.frontier import curve_tables

REPORTED_STAGES = ("sft", "reward", "ppo", "dpo")
MANIFEST, EVALUATION_FILE = "checkpoint.json", "evaluate.json"
ABSENT = "-"
SHOWN_CHARACTERS = 600  # characters of an example in a table
# Key in evaluate.json, what it means, decimals, whether it is a share shown in per cent.
REPORT_MEASURES = (
    ("score", "score by the reward model", 3, False),
    ("gold", "score by the gold source (never trained on)", 3, False),
    ("kl", "KL to the reference, nats per response", 3, False),
    ("length", "response length, tokens", 1, False),
    ("eos_rate", "ended by itself", 1, True),
)


def run(paths: list[str], reporter: Reporter) -> Result:
    """Tell what is known of every run folder (or single checkpoint folder) in `paths`.

    Raises CheckpointError for a folder that is missing or empty of results, and for a file that is not JSON.
    """
    runs = {path: read_run(path) for path in dict.fromkeys(paths)}
    tables: list[Table] = []
    if len(runs) > 1:
        tables.append(overview(runs))
    for path, found in runs.items():
        label = f"{path}: " if len(runs) > 1 else ""
        tables += [stage_table(label, found), held_out_table(label, found)]
        tables += [comparison_table(label, found), *curve_tables(found["evaluation"], label)]
        # Whole responses of several runs would bury the numbers; they stay in --json.
        tables += [examples_table(label, found)] if len(runs) == 1 else []
    advice = tuple(line for path, found in runs.items() for line in suggest_next_command(path, found))
    return Result(
        command="report",
        status="done",
        output=None,
        data={"runs": [{"run": path, **found} for path, found in runs.items()]},
        tables=tuple(table for table in tables if table.rows),
        next=advice[:1] if len(runs) > 1 else advice,
    )


# --- reading ------------------------------------------------------------------------------------------------------


def read_run(path: str) -> dict[str, object]:
    """Manifests by stage and the evaluation of one run folder: {"stages": {...}, "evaluation": {...}}.

    Raises CheckpointError where there is nothing to read.
    """
    folder = absolute(path, "RUN")
    if not folder.is_dir():
        raise CheckpointError(
            "no such folder", where=path, fix="give the folder that holds sft/, reward/, ppo/ or dpo/"
        )
    manifests = {stage: read_optional_json(folder / stage / MANIFEST) for stage in REPORTED_STAGES}
    own = read_optional_json(folder / MANIFEST)
    if own:
        manifests[str(own.get("stage", "checkpoint"))] = own
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
    """A JSON object from a file, {} where there is no such file; raises CheckpointError for anything else."""
    try:
        found = json.loads(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    except json.JSONDecodeError as error:
        raise _damaged(f"{path}:{error.lineno}", error.msg) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(str(path), str(error)) from None
    if not isinstance(found, dict):
        raise _damaged(str(path), "it is not a JSON object")
    return found


def _damaged(where: str, why: str) -> CheckpointError:
    return CheckpointError(f"the file is damaged: {why}", where=where, fix="run the stage that wrote it again")


# --- tables -------------------------------------------------------------------------------------------------------


def stage_table(label: str, found: dict) -> Table:
    """What each stage started from and how long it took."""
    rows = []
    for stage, manifest in found["stages"].items():
        speed = format_number(inner(manifest, "throughput", "tokens_per_second"), 0)
        base = inner(manifest, "base", "name")
        steps, seconds = format_number(manifest.get("steps"), 0), format_number(manifest.get("seconds"), 1)
        rows.append((stage, str(base) if base else ABSENT, steps, seconds, speed))
    return Table(f"{label}the stages", ("stage", "base", "steps", "seconds", "tokens/s"), tuple(rows))


def held_out_table(label: str, found: dict) -> Table:
    """What each stage does on rows it was not trained on."""
    sft, reward, ppo, dpo = (part(found["stages"], stage, "metrics") for stage in REPORTED_STAGES)
    rows = []
    if is_number(sft.get("eval_loss")):
        rows.append(("SFT: loss per token", change(sft, "eval_loss"), "lower is better"))
    if is_number(sft.get("eval_perplexity")):
        rows.append(("SFT: perplexity", format_number(sft["eval_perplexity"], 2), "1 would be certain of every token"))
    if is_number(reward.get("accuracy")):
        pairs = reward.get("eval_pairs")
        counted = f" of {format_number(pairs, 0)} comparisons" if is_number(pairs) else ""
        accuracy = share(reward["accuracy"], reward.get("accuracy_low"), reward.get("accuracy_high"))
        rows.append(("reward model: prefers the chosen response", accuracy + counted, "50 % is guessing"))
    if is_number(reward.get("longer_wins_accuracy")):
        longer = share(reward["longer_wins_accuracy"])
        rows.append(("for comparison: always prefer the longer one", longer, "what length alone explains"))
    if is_number(ppo.get("eval_score")):
        kl = (
            f"at KL {format_number(ppo['eval_kl'], 2)}"
            if is_number(ppo.get("eval_kl"))
            else "by what it was trained on"
        )
        rows.append(("PPO: score", change(ppo, "eval_score"), kl))
    if is_number(dpo.get("accuracy")):
        accuracy = share(dpo["accuracy"], dpo.get("accuracy_low"), dpo.get("accuracy_high"))
        rows.append(("DPO: prefers the chosen response", accuracy, "by its implicit reward"))
    return Table(f"{label}on held-out rows", ("measure", "value", "note"), tuple(rows))


def comparison_table(label: str, found: dict) -> Table:
    """The evaluated policy, beside what it was compared with where it was, measure by measure."""
    evaluation = found["evaluation"]
    names = name_sides(evaluation)
    sides = [part(evaluation, side) for side in ("against", "policy")][-len(names) :]
    rows = []
    for key, meaning, digits, percent in REPORT_MEASURES:
        if any(is_number(side.get(key)) for side in sides):
            rows.append((meaning, *(cell(side, key, digits, percent) for side in sides)))
    for source, meaning in (("reward", "wins by the reward model's score"), ("gold", "wins by the gold score")):
        rate = part(evaluation, "win_rate", source)
        if is_number(rate.get("rate")):
            counted = f", n {format_number(rate['n'], 0)}" if is_number(rate.get("n")) else ""
            wins = share(rate["rate"], rate.get("low"), rate.get("high"), counted)
            rows.append((meaning, *[ABSENT] * (len(names) - 1), wins))
    return Table(label + " against ".join(names), ("measure", *names), tuple(rows))


def examples_table(label: str, found: dict) -> Table:
    """The same prompts answered by each side, with their scores."""
    evaluation = found["evaluation"]
    names = name_sides(evaluation)
    keys = (("against", "against_score", "against_gold"), ("response", "score", "gold"))[-len(names) :]
    listed = evaluation.get("examples")
    examples = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    rows = [(ending(format_cell(e.get("prompt"))), *(format_response(e, *side) for side in keys)) for e in examples]
    return Table(f"{label}the same prompts, answered by {' and '.join(names)}", ("prompt", *names), tuple(rows))


def overview(runs: dict[str, dict]) -> Table:
    """Several runs, a line each."""
    rows = []
    for path, found in runs.items():
        sft, reward = (part(found["stages"], stage, "metrics") for stage in ("sft", "reward"))
        policy, against = (part(found["evaluation"], side) for side in ("policy", "against"))
        win = part(found["evaluation"], "win_rate", "reward")
        loss, accuracy = format_number(sft.get("eval_loss"), 3), share(reward.get("accuracy"))
        scores = (format_number(against.get("score"), 3), format_number(policy.get("score"), 3))
        rows.append((path, loss, accuracy, *scores, format_number(policy.get("kl"), 3), share(win.get("rate"))))
    columns = ("run", "SFT loss", "RM accuracy", "score SFT", "score PPO", "KL", "PPO wins")
    return Table("all runs", columns, tuple(rows))


# --- cells --------------------------------------------------------------------------------------------------------


def inner(mapping: object, *keys: str) -> object:
    """A nested value, None where any step of the way is absent or not a mapping."""
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, dict) else None
    return mapping


def part(mapping: object, *keys: str) -> dict:
    """A nested mapping, empty where there is none."""
    found = inner(mapping, *keys)
    return found if isinstance(found, dict) else {}


def is_number(value: object) -> bool:
    """Whether a value from JSON is a number; true and false are not, nor is one too large to reckon with."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**1000)


def format_number(value: object, digits: int) -> str:
    """A number with so many decimals, or a dash."""
    if not is_number(value):
        return ABSENT
    return f"{value:,.{digits}f}" if math.isfinite(value) else str(value)  # type: ignore[arg-type]


def change(metrics: dict, name: str) -> str:
    """A measure before training, where it was taken, and after."""
    before = metrics.get(f"{name}_before")
    return (f"{format_number(before, 3)} -> " if is_number(before) else "") + format_number(metrics[name], 3)


def share(rate: object, low: object = None, high: object = None, note: str = "") -> str:
    """A share in per cent, with its interval where there is one."""
    if not is_number(rate):
        return ABSENT
    interval = f"{100 * low:.1f} to {100 * high:.1f}" if is_number(low) and is_number(high) else ""  # type: ignore
    about = (interval + note).removeprefix(", ")
    return f"{100 * rate:.1f} %" + (f" ({about})" if about else "")  # type: ignore[operator]


def cell(side: dict, key: str, digits: int, percent: bool) -> str:
    """One measure of one side, with its standard error where it has one."""
    if percent:
        return share(side.get(key))
    error = side.get(f"{key}_error")
    return format_number(side.get(key), digits) + (f" ± {format_number(error, digits)}" if is_number(error) else "")


def format_response(example: dict, text: str, score: str, gold: str) -> str:
    """A response with its scores in a line below."""
    scores = [f"{name} {format_number(example[key], 2)}" for name, key in (("score", score), ("gold", gold))
              if is_number(example.get(key))]  # fmt: skip
    return "\n".join(
        filter(None, [beginning(format_cell(example.get(text))), f"[{', '.join(scores)}]" if scores else ""])
    )


def beginning(text: str) -> str:
    """As much of a response as a table bears; --json has all of it."""
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS].rstrip() + " ..."


def ending(text: str) -> str:
    """As much of a prompt as a table bears: its end, which is what was answered."""
    return text if len(text) <= SHOWN_CHARACTERS else "... " + text[-SHOWN_CHARACTERS:].lstrip()


def format_cell(value: object) -> str:
    """A prompt or response as text; a list of messages as `role: content` lines."""
    if isinstance(value, list):
        turns = [m for m in value if isinstance(m, dict)]
        return "\n".join(f"{m.get('role', '?')}: {m.get('content', '')}" for m in turns)
    return ABSENT if value is None else str(value).strip() or "(empty)"


def name_sides(evaluation: dict) -> tuple[str, ...]:
    """What is compared: SFT and PPO, unless the folders are called otherwise; PPO alone where nothing was compared."""
    paths = [inner(evaluation, key) for key in ("compared_with", "model")]
    names = [Path(path).name if isinstance(path, str) else "" for path in paths]
    if names[0] and names[0] == names[1]:  # two runs of one stage: only the whole path tells them apart
        return str(paths[0]), str(paths[1])
    sft, ppo = (name.upper() if name in REPORTED_STAGES else name for name in names)
    alone = not (sft or part(evaluation, "against"))
    return (ppo or "PPO",) if alone else (sft or "SFT", ppo or "PPO")


# --- what to do next ----------------------------------------------------------------------------------------------


def suggest_next_command(path: str, found: dict) -> list[str]:
    """The command that brings a run one step further; none where everything is there."""
    stages, folder = found["stages"], Path(path)
    here = {stage: shlex.quote(str(folder / stage)) for stage in REPORTED_STAGES}
    if found["evaluation"] or not (folder / "sft" / MANIFEST).is_file():
        return []
    if "reward" not in stages:
        return [f"rlhf reward --model {here['sft']} --dataset COMPARISONS --output {here['reward']}"]
    policies = [stage for stage in ("ppo", "dpo") if stage in stages]
    if not policies and inner(stages, "reward", "metrics", "verdict") == "no-go":
        return []  # `rlhf ppo` would refuse it
    if not policies:
        return [f"rlhf ppo --model {here['sft']} --reward {here['reward']} --dataset PROMPTS --output {here['ppo']}"]
    prompts = inner(stages.get("ppo"), "config", "dataset")
    prompts = shlex.quote(prompts) if isinstance(prompts, str) else "PROMPTS"
    also = f" --also {here['dpo']}" if len(policies) > 1 else ""
    target = shlex.quote(str(folder / EVALUATION_FILE))
    return [
        f"rlhf evaluate --model {here[policies[0]]}{also} --against {here['sft']} --reward {here['reward']}"
        f" --dataset {prompts} --output {target}"
    ]
