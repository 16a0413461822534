"""Make what the tiny recipe starts from: a base model, demonstrations, comparisons, prompts and held-out prompts.

    python recipes/tiny/prepare.py --output runs/tiny

writes runs/tiny/base (a model that transformers loads) and runs/tiny/data. The same arguments give the same files;
data/facts.json tells what is known of them, among it the accuracy that no reward model can exceed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import time
from pathlib import Path

import world
from gold import BEST, WORST, judge, score

# The base learns from agents of every kind. Demonstrations are mostly right and mostly curt, so that preferences have
# something left to teach. Comparisons show every way to be better or worse.
HEARD = world.Habit(right=0.6, courteous=0.5, rude=0.4, flawed=0.1)
DEMONSTRATED = world.Habit(right=0.85, courteous=0.35, rude=0.1, flawed=0.02)
COMPARED = world.Habit(right=0.6, courteous=0.6, rude=0.3, flawed=0.2)
SHARPNESS = 2.0  # the judge prefers a to b with probability sigmoid(SHARPNESS * (gold of a - gold of b))


def main() -> None:
    """Prepare the folder that --output names, unless it holds the same already."""
    arguments = parse_arguments()
    wanted = {
        "sources": digest_of_sources(),
        "seed": arguments.seed,
        "steps": arguments.steps,
        "rows": arguments.rows,
    }
    facts_file = arguments.output / "data" / "facts.json"
    if facts_file.exists() and wanted.items() <= json.loads(facts_file.read_text()).items():
        print(f"{arguments.output} is prepared already")
        return
    # Everything is written to a temporary folder; data/, which holds facts.json, is moved into place last.
    aside = arguments.output / ".prepare"
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "data").mkdir(parents=True)
    texts, facts = write_data(aside / "data", arguments.rows, arguments.seed, arguments.steps)
    facts["base"] = write_base(aside / "base", texts, arguments.seed)
    (aside / "data" / "facts.json").write_text(json.dumps({**wanted, **facts}, indent=2) + "\n")
    for name in ("data", "base"):  # facts.json is removed first and put back last, so it never describes another base
        shutil.rmtree(arguments.output / name, ignore_errors=True)
    for name in ("base", "data"):
        os.replace(aside / name, arguments.output / name)
    aside.rmdir()
    print(
        f"demonstrations: {facts['demonstrations']['right']:.0%} right, "
        f"{facts['demonstrations']['courteous']:.0%} courteous, gold score {facts['demonstrations']['gold']:.2f} "
        f"(range {WORST:g} to {BEST:g})\n"
        f"comparisons: no reward model can be right more often than {facts['comparison_ceiling']:.1%}"
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write base/ and data/ into")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the base (%(default)s)")
    parser.add_argument("--rows", type=int, default=2000, help="demonstrations; the rest goes with it (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of world and base (%(default)s)")
    return parser.parse_args()


def digest_of_sources() -> str:
    """Hash of the Python files of this recipe; a change in any of them means other data."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def write_data(folder: Path, rows: int, seed: int, steps: int) -> tuple[list[str], dict[str, object]]:
    """Write the datasets into `folder`; returns the base's training texts and what is known of the data.

    No prompt occurs in two of them, so nothing that is held out has been seen.
    """
    from base import BATCH

    rng = random.Random(seed)
    seen: set[str] = set()
    write_rows(folder / "heldout.jsonl", [{"prompt": case.prompt} for case in world.draw_cases(rng, rows // 4, seen)])
    write_rows(folder / "prompts.jsonl", [{"prompt": case.prompt} for case in world.draw_cases(rng, rows, seen)])

    cases = world.draw_cases(rng, rows, seen)
    demonstrations = [{"prompt": c.prompt, "completion": world.draw_response(rng, c, DEMONSTRATED)} for c in cases]
    write_rows(folder / "sft.jsonl", demonstrations)

    cases = world.draw_cases(rng, 2 * rows, seen)
    comparisons, certainties = zip(*(world.compare(rng, c, COMPARED, SHARPNESS) for c in cases), strict=True)
    write_rows(folder / "comparisons.jsonl", comparisons)

    texts = [world.draw_document(rng, case, HEARD) for case in world.draw_cases(rng, steps * BATCH, seen)]
    return texts, {
        "comparison_ceiling": mean(certainties),
        "demonstrations": describe(demonstrations),
    }


def describe(demonstrations: list[dict[str, str]]) -> dict[str, float]:
    """How good the demonstrations are by the gold score."""
    prompts, responses = zip(*((row["prompt"], row["completion"]) for row in demonstrations), strict=True)
    parts = [judge(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    return {
        "right": mean([part["fact"] > 0 for part in parts]),
        "courteous": mean([part["courtesy"] > 0 for part in parts]),
        "gold": mean(score(prompts, responses)),
    }


def write_base(folder: Path, texts: list[str], seed: int) -> dict[str, object]:
    """Train the base on `texts` and save it with its tokenizer; returns its size and final loss."""
    import torch
    import transformers
    from base import new_model, train_model, train_tokenizer

    began = time.perf_counter()
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(texts[:4000])
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts).input_ids]
    model = new_model(tokenizer)
    loss = train_model(model, rows, random.Random(seed))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = model.num_parameters()
    print(f"base: {size:,} parameters, loss {loss:.3f} after {time.perf_counter() - began:.0f} s")
    return {"parameters": size, "loss": loss}


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def mean(numbers: list[float] | tuple[float, ...]) -> float:
    """The arithmetic mean."""
    return sum(numbers) / len(numbers)


if __name__ == "__main__":
    main()
