"""Running out of memory: passes shrink, results stay the same, and a row too large for it is said to be."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages.errors import OutOfMemory
from stages.models.base import Base
from stages.models.passes import Passes
from stages.rollout import generate
from stages.training.devices import Ranks
from stages.training.progress import add_gradients
from tests.commands import assert_same_weights, done, lines_of, refused
from tests.marks import full
from tests.parts import sequences_of

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"
RUN = (
    "--batch-size",
    8,
    "--max-steps",
    2,
    "--lora-rank",
    4,
    "--samples",
    0,
    "--limit-rows",
    40,
    "--eval-fraction",
    0.2,
)
MORE = {
    "ppo": ("--max-response-tokens", 4, "--ppo-epochs", 2, "--learning-rate", "1e-3"),
    "dpo": (),
    "sft": (),
    "reward": (),
}


class OutOfMemoryInBackward(torch.autograd.Function):
    """The identity, whose backward pass finds no memory."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError(FULL)


class OneWeight:
    """Roles of which a single weight is trained."""

    base = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.tensor([3.0]))
        self.weight.grad = torch.zeros(1)

    def zero_gradients(self):
        self.weight.grad.zero_()


RANKS = Ranks(torch.device("cpu"))


def learn(fails, held=0.0, divisor=1):
    """Sum of squares of a weight per row, by `accumulate`; a pass that `fails(rows)` does so with half its gradient.

    `held` is the gradient that another loss of the same step has left there.
    """
    roles, passes = OneWeight(), Passes(False, 6, divisor=divisor)
    weight = roles.weight
    weight.grad.add_(held)
    sizes = []

    def forward(rows):
        sizes.append(len(rows))
        loss = sum((i + 1) * weight.square().sum() for i in rows)
        if fails(rows):
            # the first term's backward adds its gradient before the second one's fails
            loss = torch.stack([loss, OutOfMemoryInBackward.apply(loss * 1.0)]).sum()
            loss.register_hook(lambda grad: weight.grad.add_(100.0) and None)
        return loss, {"rows": float(len(rows))}

    again = partial(weight.grad.add_, held)
    sums = add_gradients(roles, RANKS, lambda: passes.accumulate(range(6), [1] * 6, forward), again=again)
    return float(weight.grad), sums, sizes, passes.divisor


@pytest.mark.parametrize("held", [0.0, 1000.0])
def test_a_pass_that_fails_half_way_leaves_no_trace_in_the_gradient(held):
    """d/dw of (1 + 2 + ... + 6) w^2 at 3 is 21 * 6, beside what the step's other loss had added before."""
    assert learn(lambda rows: False, held) == (held + 126.0, {"rows": 6.0}, [6], 1)
    gradient, sums, sizes, divisor = learn(lambda rows: len(rows) > 2, held)
    assert (gradient, sums) == (held + 126.0, {"rows": 6.0})
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1] and divisor == 4


def test_passes_before_the_one_that_failed_are_made_again():
    """The step begins anew: what earlier passes had added goes with the rest."""
    failed = []

    def fails(rows):
        return len(rows) > 1 and 5 in rows and not failed.append(rows)

    gradient, sums, sizes, _ = learn(fails, divisor=3)  # passes of two rows; the last of them fails once
    assert (gradient, sums) == (126.0, {"rows": 6.0})
    assert failed == [[4, 5]] and sizes == [2, 2, 2] + [1] * 6


class CopiesOfSize(TorchDispatchMode):
    """Lists operations that copy a tensor of one of these sizes."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.found = sizes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copies = func.name().split("::")[1].split(".")[0] in ("clone", "_to_copy", "copy_")
        if copies and out.numel() in self.sizes and out.dtype == torch.float32:  # not the fp64 of a gradient's norm
            self.found.append(func.name())
        return out


@pytest.mark.parametrize("stage", ["sft", *full("reward", "dpo", "ppo")])
def test_no_step_copies_weights_moments_or_gradients_in_case_it_fails(chain, tmp_path, monkeypatch, stage):
    """What saves a state and what a failure costs lies outside; no tensor of an optimiser's size is copied within."""
    from stages.training import loop

    line = (*command(chain(), stage, tmp_path / "out"), "--save-every", 2)
    counted = []
    timed = loop._timed

    def watched(update, step):
        sizes = {optimizer.weights.numel() for optimizer in progress[-1].optimizers.values()}
        with CopiesOfSize(sizes) as copies:
            found = timed(update, step)
        counted.append(copies.found)
        return found

    progress, resume = [], loop._resume
    monkeypatch.setattr(loop, "_resume", lambda *args: progress.append(args[0].progress) or resume(*args))
    monkeypatch.setattr(loop, "_timed", watched)
    done(*line)
    assert counted == [[], []]


def test_results_come_in_order_however_the_batch_had_to_be_cut():
    def forward(rows):
        if len(rows) > 2:
            raise torch.OutOfMemoryError(FULL)
        return [torch.tensor(float(row)) for row in rows]

    found = Passes(False).collect(range(5), [5, 9, 1, 7, 3], forward)
    assert [float(x) for x in found] == [0, 1, 2, 3, 4]


def test_other_failures_are_not_taken_for_it():
    def forward(rows):
        raise RuntimeError("shapes do not match")

    passes = Passes(False)
    with pytest.raises(RuntimeError, match="shapes"):
        passes.collect(range(2), [1, 2], forward)
    assert passes.divisor == 1


def fits(monkeypatch, rows):
    """Let a forward pass of more rows find no memory, in training and in sampling."""
    hidden, batch = Base.hidden, generate._sample_batch

    def small_hidden(base, sequences, wanted=None):
        if len(sequences) > rows:
            raise torch.OutOfMemoryError(FULL)
        return hidden(base, sequences, wanted)

    def small_batch(base, layers, prompts, *rest):
        if len(prompts) > rows:
            raise torch.OutOfMemoryError(FULL)
        return batch(base, layers, prompts, *rest)

    monkeypatch.setattr(Base, "hidden", small_hidden)
    monkeypatch.setattr(generate, "_sample_batch", small_batch)


def test_weights_that_do_not_fit_beside_the_base_are_said_to_be_too_large(open_tiny, monkeypatch):
    """Sampling in fp32 folds the adapter into copies of the weights."""

    def no_room(native):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(generate, "layers_of", no_room)
    with pytest.raises(OutOfMemory, match="sampling one response, 9 tokens"):
        generate.respond(open_tiny("llama"), sequences_of([5, 3]), [(0,), (1,)], (2,), generate.Sampling(1.0, 4))


def command(found, stage, output):
    inputs = {
        "sft": ("--model", found.base, "--dataset", found.demonstrations),
        "reward": ("--model", found.sft, "--dataset", found.comparisons),
        "dpo": ("--model", found.sft, "--dataset", found.comparisons),
        "ppo": ("--model", found.sft, "--reward", found.reward, "--dataset", found.prompts),
    }
    return (stage, *inputs[stage], "--output", output, *RUN, *MORE[stage])


@pytest.mark.parametrize("stage", ["sft", *full("reward", "dpo", "ppo")])
def test_a_run_in_too_little_memory_gives_the_same_result(chain, tmp_path, monkeypatch, stage):
    done(*command(chain(), stage, tmp_path / "whole"))
    fits(monkeypatch, 2)
    ended = done(*command(chain(), stage, tmp_path / "small"))
    assert "step 0: out of memory; micro-batches are now 1/" in ended.stderr
    assert ended.stderr.count("out of memory") == 1
    assert_same_weights(tmp_path / "small", tmp_path / "whole", within=2e-5)
    losses = [[line["loss"] for line in lines_of(tmp_path / run / "metrics.jsonl")[1:]] for run in ("small", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("stage", ["ppo", *full("sft")])
def test_where_one_row_is_too_much_the_message_has_the_plan_and_the_knobs(chain, tmp_path, monkeypatch, stage):
    fits(monkeypatch, 0)
    said = refused(*command(chain(), stage, tmp_path / "out"))
    assert "out of memory in" in said and FULL in said
    assert "needed at least: frozen base 0.00 GB" in said and "activations of the largest pass" in said
    assert "--gradient-checkpointing" in said and "--lora-rank" in said
