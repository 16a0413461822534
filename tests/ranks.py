"""One step of SFT, of a reward model and of PPO as one rank among several does it; run as a program, two of them.

`python -m tests.ranks MODEL OUT` leaves OUT-0.pt and OUT-1.pt behind.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys

import torch

from stages import dpo, reward
from stages.errors import OutOfMemory, RewardError
from stages.maths.preferences import kto_baseline
from stages.maths.tensors import whiten
from stages.models.base import load_base
from stages.models.model_ref import open_model
from stages.models.roles import Roles
from stages.rollout.clipped import ExperienceWithAdvantages, clipped_steps
from stages.rollout.experience import Experience, lay_out
from stages.training.devices import Ranks
from stages.training.implicit import summed_logprobs
from stages.training.language import count_targets, learn_rows
from stages.training.progress import apply_gradients, open_progress
from tests.parts import (
    dpo_config,
    experience_of,
    in_passes_of,
    judged_at_random,
    open_tiny_text,
    ppo_config,
    prompt_rows,
    random_adapter,
    random_head,
    reward_config,
    roles_on,
    sequences_of,
    session_of,
    sft_config,
    token_comparisons,
    token_rows,
)

CPU = torch.device("cpu")


def learn(folder: str, ranks: Ranks) -> dict[str, object]:
    """What one step of each kind makes of the weights and reports, as seen by this rank."""
    source = open_model(folder, stages=(), what="--model")
    base = load_base(source, device=CPU, dtype=torch.float32)
    found = sft_step(base, ranks) | reward_step(base, ranks) | talk(ranks)
    for rows in (3, 1):  # of one row the second rank has none
        found |= kto_step(base, ranks, rows)
    return found | ppo_step(base, ranks, folder, "ppo", 1, 1) | ppo_step(base, ranks, folder, "ppo parts", 2, 4)


def sft_step(base, ranks):
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    config = sft_config(adam_eps=1e-3)
    progress = open_progress(config, {"policy": roles.parameters("policy")})
    rows = token_rows()
    sums = learn_rows(in_passes_of(roles, 2), "policy", ranks.share(rows), count_targets(rows))
    found = {"sft loss": ranks.combine(sums, CPU)["loss"]}
    optimizer = progress.optimizers["policy"]
    before = optimizer.gradient.clone()
    found["sft gradient"] = ranks.sum(before)
    found["sft norm"] = apply_gradients(progress, {"policy": 1e-2}, 0.5, ranks, 1)["grad_norm"]
    return found | {"sft weights": optimizer.weights}


def reward_step(base, ranks):
    roles = Roles(base)
    roles.add("reward", random_adapter(base, 2), random_head(base.width, 3))
    config = reward_config(adam_eps=1e-3)
    progress = open_progress(config, {"reward": roles.parameters("reward")})
    rows = token_comparisons()[1:]  # three: one rank has two of them
    sums = reward.backward_reward(roles, ranks.share(rows), len(rows), config)
    apply_gradients(progress, {"reward": 1e-2}, 1.0, ranks, 1)
    found = {f"reward {name}": value for name, value in ranks.sum_floats(sums, CPU).items()}
    return found | {"reward weights": progress.optimizers["reward"].weights}


def kto_step(base, ranks, count):
    """KTO on the first rows of a dataset of four, of which the reference says 1 nat less."""
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    roles.add("reference", None)
    config = dpo_config(loss="kto", beta=0.5, adam_eps=1e-3, micro_batch_size=2)
    in_passes_of(roles, 2)
    progress = open_progress(config, {"policy": roles.parameters("policy")})
    rows, numbers = token_comparisons(), [2, 0, 3][:count]
    batch = [
        dpo.ReferencedComparison(rows[i], summed_logprobs(roles, "policy", rows[i].responses) - 1) for i in numbers
    ]
    shifts = dpo.policy_shifts(roles, ranks.share(dpo.cross_batch(rows, numbers)))
    baseline = kto_baseline(shifts, ranks.sum)
    sums = dpo.backward_dpo(roles, ranks.share(batch), count, config, baseline)
    apply_gradients(progress, {"policy": 1e-2}, 1.0, ranks, 1)
    found = {f"kto {count} {name}": value for name, value in ranks.sum_floats(sums, CPU).items()}
    found[f"kto {count} baseline"] = float(baseline)
    return found | {f"kto {count} weights": progress.optimizers["policy"].weights}


def ppo_step(base, ranks, folder, name, minibatches, several):
    """One update on five prompts with `several` responses each, of which a rank holds those to its own prompts."""
    roles = roles_on(base)
    text = open_tiny_text(folder, stop_ids=(2, *range(7, 47)))
    prompts = [prompt for prompt in prompt_rows(sequences_of([9, 3, 14, 6, 5])) for _ in range(several)]
    whole = judged_at_random(experience_of(roles, text, prompts))
    mine = ranks.share(list(range(5)))
    judged = part_of(whole, [i * several + k for i in mine for k in range(several)])
    advantages = whiten(judged.advantages, judged.experience.mask, ranks.sum)
    old = dataclasses.replace(judged.experience, logprobs=judged.experience.logprobs - 0.3 * judged.advantages)
    judged = dataclasses.replace(judged, experience=old, advantages=advantages)
    knobs = {"ppo_epochs": 1, "minibatches": minibatches, "responses_per_prompt": several}
    config = ppo_config(**knobs, adam_eps=1e-3, target_approx_kl=None, ratio_limit=1e9)
    progress = open_progress(config, {role: roles.parameters(role) for role in ("policy", "critic")})
    learned = clipped_steps(session_of(config, roles, ranks=ranks, progress=progress), judged, 1e-2, 0)
    found = {f"{name} {key}": value for key, value in learned.items()}
    return found | {f"{name} {role} weights": progress.optimizers[role].weights for role in ("policy", "critic")}


def part_of(judged: ExperienceWithAdvantages, rows: list[int]) -> ExperienceWithAdvantages:
    """Some rows of a batch, as a rank that sampled only these would hold them."""
    whole = judged.experience
    r = whole.rollout
    rollout = lay_out(
        [r.prompts[i] for i in rows], [r.responses[i] for i in rows], [r.texts[i] for i in rows], r.ended[rows]
    )
    width = rollout.mask.shape[1]
    columns = (whole.logprobs, whole.reference_logprobs, whole.values)
    logprobs, reference, values = (c[rows, :width] for c in columns)
    experience = Experience(
        rollout, rollout.mask, logprobs, reference, values, whole.score[rows], whole.entropy[rows, :width]
    )
    return ExperienceWithAdvantages(experience, judged.advantages[rows, :width], judged.returns[rows, :width])


def talk(ranks):
    """What ranks tell each other beside gradients."""
    mine = ranks.share(list("abcde"))
    twice = [name + str(k) for name in mine for k in (0, 1)]
    return {
        "share": mine,
        "gathered": ranks.gather(mine),
        "gathered twice": sorted(ranks.gather(twice)),
        "sums": ranks.sum_floats({"x": float(ranks.rank), "y": 0.1}, CPU),
        "max": ranks.max(float(ranks.rank), CPU),
        "largest": ranks.largest(10 + ranks.rank),
        "first": ranks.first,
        "from first": ranks.from_first({"rank": ranks.rank, "infinite": math.inf}),
        "copied": copied(ranks),
        "ended": {name: ended(ranks, on, error) for name, (on, error) in FAILURES.items()},
    }


MISTAKE = RewardError("it raised", where="--reward f.py", fix="mend it")
FAILURES = {
    "second fails": ([1], MISTAKE),
    "both fail": ([0, 1], MISTAKE),
    "defect": ([1], ZeroDivisionError("oh")),
    "memory": ([1], OutOfMemory("a pass", tokens=7)),
    "none": ([], MISTAKE),
}


def copied(ranks):
    """A tensor as the first rank had it."""
    x = torch.tensor([float(ranks.rank), 5.0 - 5 * ranks.rank])
    ranks.copy_from_first([x])
    return x.tolist()


def ended(ranks, on, error):
    """What a block ends with on this rank where it fails on the ranks `on`."""
    try:
        with ranks.together():
            if ranks.rank in on and ranks.size > 1:
                raise error
    except Exception as failure:
        told = getattr(failure, "told_by_first", False), getattr(failure, "tokens", None)
        return (type(failure).__name__, str(failure), *told)[: 4 if told[1] is not None else 3]


def as_rank(rank: int, folder: str, out: str) -> None:
    """One of two ranks, in a process of its own."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}-store", rank=rank, world_size=2)
    ranks = Ranks(CPU)
    ranks.largest(0)
    torch.save(learn(folder, ranks), f"{out}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import transformers.models.llama.modeling_llama  # noqa: F401  once, before the processes part

    torch.multiprocessing.start_processes(as_rank, args=tuple(sys.argv[1:3]), nprocs=2, start_method="fork")
