"""How near the tool comes to the limits of a GPU, at the shapes of real models with random weights.

    python benchmarks/gpu.py [--shapes llama-3.1-8b,qwen2.5-0.5b,...] [--budget-seconds 300] [--output DIR|FILE.json]

Nothing is downloaded. The limits are measured in the same run, by a large matrix product and a large copy. Decoding is
compared with reading every weight, key and value once per token. Training is compared with the matrix-product rate, at
4 operations per weight and token plus attention. A PPO iteration (512 prompts x (512 + 512) tokens, fewer if time is
short) is compared with both, phase by phase. What does not fit into the time or into memory is left out and named.
Prints Markdown, and writes JSON too.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

DEFAULT = "llama-3.1-8b,qwen2.5-0.5b,qwen2.5-1.5b,qwen2.5-7b"
# What is asked of the 8B shape on an H100, in bf16 with adapters of rank 32.
TARGET_SHAPE = "llama-3.1-8b"
TARGETS = (
    ("decoding 64 responses, share of the bandwidth", "decode 64", "share_of_bandwidth", ">=", 0.50),
    ("training, share of the matrix-product rate", "training", "share_of_matmul", ">=", 0.45),
    ("four roles, gradients and moments: memory over bare weights", "memory", "over_bare", "<=", 1.25),
    ("PPO iteration, times its roofline", "iteration", "times_roofline", "<=", 2.5),
    ("PPO iteration, measured peak of memory over the plan's", "iteration", "measured_over_planned", "1 +-", 0.15),
)


class Clock:
    """What is left of a budget of seconds."""

    def __init__(self, seconds: float):
        self.ends = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()


def measure(name: str, device, clock: Clock, args: argparse.Namespace, limit, left_out: list[str]) -> dict:
    """Everything of one shape that there is time and memory for."""
    import torch
    from measures import SIZES, decode, expected_seconds, iterate, open_model, train
    from roofline import Iteration
    from shapes import SHAPES, build

    from stages.errors import OutOfMemory

    sizes, dtype = SIZES[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    found: dict = {}
    began = time.monotonic()
    base, shapes = build(SHAPES[name], device, dtype)
    model = open_model(base, shapes, args.tokens)
    bare = shapes.weights * dtype.itemsize
    found["memory"] = {"bare": bare, **model.memory}
    if device.type == "cuda":
        found["memory"]["over_bare"] = model.memory["gradients and moments"] / bare
    found["build_s"] = time.monotonic() - began

    def part(what: str, seconds: float, work) -> dict | None:
        if clock.left < seconds:
            left_out.append(f"{name}: {what}, for want of time ({seconds:.0f} s needed, {clock.left:.0f} s left)")
            return None
        try:
            found[what] = work()
        except (torch.OutOfMemoryError, OutOfMemory) as error:
            left_out.append(f"{name}: {what}, for want of memory ({str(error).splitlines()[0][:120]})")
            return None
        if base.passes.divisor > 1:
            left_out.append(f"{name}: {what} ran in passes of 1/{base.passes.divisor}, since memory ran out")
            base.passes.divisor = 1
        return found[what]

    guess = 0.25 * shapes.layers  # seconds; before anything was measured there is nothing better to go by
    for rows in sizes.batches:
        part(f"decode {rows}", guess, lambda rows=rows: decode(model, rows, sizes, limit))
    part("training", guess, lambda: train(model, sizes, limit))
    slowest = found.get(f"decode {sizes.batches[-1]}")
    if slowest and "training" in found:
        prompts = args.prompts
        rates = slowest["step_ms"] / 1e3, found["training"]["tokens_per_s"]
        wanted = [Iteration(p, args.tokens, args.tokens, 1) for p in halves(prompts)]
        times = [1.25 * expected_seconds(model, it, *rates) for it in wanted]
        fits = next((it for it, seconds in zip(wanted, times, strict=True) if seconds < clock.left), wanted[-1])
        if fits.prompts < prompts:
            left_out.append(f"{name}: iteration with {fits.prompts} of {prompts} prompts ({times[0]:.0f} s for all)")
        done = part("iteration", times[wanted.index(fits)], lambda: iterate(model, fits, limit))
        if done and done["measured_peak"]:
            done["measured_over_planned"] = done["measured_peak"] / done["planned_peak"]
    found["graphs"] = (
        base.native.capture_failure if base.native is not None else "only for architectures of our decoder"
    )
    return found


def halves(count: int) -> list[int]:
    """A number, its half, and so on down to 16, or itself where it is smaller."""
    found = [count]
    while found[-1] // 2 >= 16:
        found.append(found[-1] // 2)
    return found


def fits(name: str, device) -> bool:
    """True where the bare weights take at most 0.7 of the device."""
    import torch
    from shapes import SHAPES, bare_bytes

    if device.type == "cpu":
        return True
    return bare_bytes(SHAPES[name], 2) < 0.7 * torch.cuda.get_device_properties(device).total_memory


def run(args: argparse.Namespace) -> dict:
    """All shapes, one after the other; each may use what the ones before it left of the budget, but for a share."""
    import torch
    from measures import SIZES, ceilings

    from stages.checkpoint.manifest import versions

    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    began, whole, names = time.monotonic(), Clock(args.budget_seconds), args.shapes.split(",")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    limit = ceilings(device, dtype, SIZES[device.type])
    found: dict = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions() | {"cuda": torch.version.cuda},
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "ceilings": {"matmul_flops": limit.flops, "copy_bytes": limit.bytes},
        "left_out": [],
        "shapes": {},
    }
    for number, name in enumerate(names):
        share = max(0.6, 1 / (len(names) - number))  # the first shape is the one with targets
        if whole.left < 10 or not fits(name, device):
            why = "time" if whole.left < 10 else "memory"
            found["left_out"].append(f"{name}: everything, for want of {why}")
            continue
        clock = Clock(whole.left * share)
        found["shapes"][name] = measure(name, device, clock, args, limit, found["left_out"])
        save(found | {"seconds": time.monotonic() - began}, args.output)  # whatever becomes of the next one
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: done, {whole.left:.0f} s left", file=sys.stderr, flush=True)
    failures = [shape["graphs"] for shape in found["shapes"].values() if shape["graphs"]]
    graphs = failures[0] if failures else ("captured" if device.type == "cuda" else "only on CUDA")
    return found | {"decoding_graphs": graphs, "seconds": time.monotonic() - began}


# --- for a person


def markdown(found: dict) -> str:
    """What was found as Markdown: ceilings, a row per shape, targets, phases of an iteration, what was left out."""
    versions = ", ".join(
        f"{name} {v}" for name, v in found["versions"].items() if name in ("torch", "transformers", "cuda")
    )
    limit = found["ceilings"]
    lines = [f"# On {found['device']}", "", f"`{found['command']}` ({versions}, {found['seconds']:.0f} s)", ""]
    lines += [f"Ceilings: {limit['matmul_flops'] / 1e12:.1f} TFLOP/s, {limit['copy_bytes'] / 1e9:.0f} GB/s.", ""]
    lines += table(
        ("shape", *COLUMNS),
        [(name, *(cell(row, *c) for c in COLUMNS.values())) for name, row in found["shapes"].items()],
    )
    if TARGET_SHAPE in found["shapes"]:
        rows = [verdict(found["shapes"][TARGET_SHAPE], *target) for target in TARGETS]
        lines += ["", *table((f"target ({TARGET_SHAPE})", "wanted", "found", ""), rows)]
    for name, row in found["shapes"].items():
        if "iteration" in row:
            lines += ["", *phases(name, row["iteration"])]
    if found["left_out"]:
        lines += ["", "Left out or cut:", "", *(f"- {text}" for text in found["left_out"])]
    return "\n".join(lines) + "\n"


COLUMNS = {  # heading: (part, figure, format)
    "decode 64, tokens/s": ("decode 64", "tokens_per_s", "{:,.0f}"),
    "of bandwidth": ("decode 64", "share_of_bandwidth", "{:.0%}"),
    "decode 256, tokens/s": ("decode 256", "tokens_per_s", "{:,.0f}"),
    "of bandwidth ": ("decode 256", "share_of_bandwidth", "{:.0%}"),
    "training, tokens/s": ("training", "tokens_per_s", "{:,.0f}"),
    "of matmul": ("training", "share_of_matmul", "{:.0%}"),
    "roles / bare": ("memory", "over_bare", "{:.3f}"),
    "iteration, s": ("iteration", "total_s", "{:.1f}"),
    "x roofline": ("iteration", "times_roofline", "{:.2f}"),
    "peak / plan": ("iteration", "measured_over_planned", "{:.2f}"),
}


def cell(row: dict, part: str, figure: str, how: str) -> str:
    """One figure of a shape, or a dash."""
    value = row.get(part, {}).get(figure)
    return "–" if value is None else how.format(value)


def verdict(row: dict, what: str, part: str, figure: str, sign: str, wanted: float) -> tuple[str, ...]:
    """A target, what was found, and whether it was met."""
    value = row.get(part, {}).get(figure)
    if value is None:
        return what, f"{sign} {wanted:g}", "–", "not measured"
    met = {">=": value >= wanted, "<=": value <= wanted, "1 +-": abs(value - 1) <= wanted}[sign]
    return what, f"{sign} {wanted:g}", f"{value:.3f}", "pass" if met else "miss"


def phases(name: str, it: dict) -> list[str]:
    """An iteration phase by phase, beside the least it could take."""
    took, least = it["seconds"], it["least"]
    pairs = {
        "rollout": ("rollout", ("prefill", "decode")),
        "log-probabilities of the policy": ("policy", ()),
        "reference": ("reference", ("reference",)),
        "value": ("value", ("value",)),
        "reward": ("reward", ("reward",)),
        "update": ("update", ("train policy", "train critic")),
    }
    rows = []
    for what, (phase, parts) in pairs.items():
        bound = sum(least[part] for part in parts)
        rows.append((what, f"{took[phase]:.2f}", f"{bound:.2f}", f"{took[phase] / bound:.2f}" if bound else "–"))
    prompt, response = it["tokens"]
    head = f"{name}: {it['prompts']} x ({prompt} + {response})"
    memory = f"Peak {it['measured_peak'] / 1e9:.1f} GB, planned {it['planned_peak'] / 1e9:.1f} GB"
    passes = f"passes of {it['tokens_per_pass']} tokens{', activations recomputed' if it['recomputed'] else ''}"
    return [
        *table((head, "s", "least, s", "ratio"), rows),
        "",
        f"{memory}; {passes}; {it['responses_at_once']} at once.",
    ]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]


def places(output: str, device: str) -> tuple[Path, Path]:
    """The .json and the .md file: as named, or gpu-<device> in a folder."""
    path = Path(output)
    if path.suffix != ".json":
        path = path / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    return path, path.with_suffix(".md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", default=DEFAULT)
    parser.add_argument("--budget-seconds", type=float, default=300)
    parser.add_argument("--prompts", type=int, default=512, help="of a PPO iteration")
    parser.add_argument("--tokens", type=int, default=512, help="of every prompt and of every response in it")
    parser.add_argument("--output", help="folder, or .json file, to write to; the table goes beside it")
    parser.add_argument("--look", action="store_true", help="only say whether there is a CUDA device")
    args = parser.parse_args()
    if args.device == "cuda":
        refuse_without_cuda()
    if args.look:
        return
    found = run(args)
    save(found, args.output)
    print(markdown(found))


def save(found: dict, output: str | None) -> None:
    """Write what was found so far, as JSON and as Markdown."""
    if output:
        as_json, as_text = places(output, found["device"])
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        as_text.write_text(markdown(found), encoding="utf-8")


def refuse_without_cuda() -> None:
    """Exit with 2 and one line where torch, or a CUDA device, is missing."""
    try:
        import torch
    except ImportError:
        print(f"error: {sys.executable} has no torch; give another with PYTHON=", file=sys.stderr)
        sys.exit(2)
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device; these checks need one", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
