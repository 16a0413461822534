"""Devices, precision, and ranks: two processes make of a batch what one does."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from stages.errors import ConfigError, DeviceError
from stages.training.devices import Ranks, peak_memory_gb, pick_device, pick_dtype
from tests.parts import relative
from tests.ranks import learn

CPU = torch.device("cpu")

# --- device and precision


@pytest.fixture
def cuda(monkeypatch):
    """Pretends that there are so many CUDA devices."""

    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


def test_auto_takes_cuda_where_there_is_one(cuda, monkeypatch):
    cuda(0)
    assert pick_device("auto") == CPU
    cuda(2)
    assert pick_device("auto") == torch.device("cuda", 0)
    for name, number in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, number)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0)
    assert pick_device("cpu") == CPU


def test_a_device_that_is_not_there_is_refused(cuda):
    cuda(0)
    with pytest.raises(DeviceError, match="torch sees no CUDA device"):
        pick_device("cuda")
    cuda(1)
    with pytest.raises(DeviceError, match="cuda:3 does not exist; the machine has 1 CUDA device"):
        pick_device("cuda:3")


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "cuda:x", ""])
def test_a_name_that_is_no_device_is_refused(name):
    with pytest.raises(ConfigError) as caught:
        pick_device(name)
    assert caught.value.where == "device" and "auto, cpu, cuda or cuda:N" in caught.value.fix


def test_precision_follows_the_device_unless_named():
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    assert pick_dtype("float16", CPU) == torch.float16
    assert pick_dtype("float32", torch.device("cuda", 0)) == torch.float32


def test_peak_memory_is_this_processs_own():
    assert 0.05 < peak_memory_gb(CPU) < 50


# --- ranks


def test_alone_every_method_is_the_identity(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = Ranks(CPU)
    x = torch.tensor([1.0, 2.0])
    assert ranks.first and ranks.size == 1
    assert ranks.share([1, 2, 3]) == ranks.gather([1, 2, 3]) == [1, 2, 3]
    assert ranks.sum(x) is x and x.tolist() == [1.0, 2.0]
    assert ranks.sum_floats({"a": 1.0}, CPU) == {"a": 1.0} and ranks.max(3.0, CPU) == 3.0
    assert ranks.largest(3) == ranks.from_first(3) == 3
    ranks.copy_from_first([x])
    with pytest.raises(ConfigError, match="^x: wrong$"), ranks.together():
        raise ConfigError("wrong", where="x")


def test_a_rank_on_cuda_makes_its_own_device_the_current_one(monkeypatch):
    """NCCL moves exchanged objects through the current device, which is number 0 on every rank unless set."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    Ranks(torch.device("cuda", 1))
    Ranks(CPU)
    assert chosen == [torch.device("cuda", 1)]


@pytest.mark.parametrize(("device", "backend"), [(CPU, "gloo"), (torch.device("cuda", 1), "nccl")])
def test_groups_know_their_device_and_wait_longer_for_words_than_for_tensors(monkeypatch, device, backend):
    """Ranks meet in the group for words after a reward function, however slow; tensors travel only then."""
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **more: calls.append((name, more)))
    monkeypatch.setattr(torch.distributed, "new_group", lambda **more: calls.append(more))
    Ranks(device)
    (name, tensors), words = calls
    assert (name, tensors["device_id"], words["backend"]) == (backend, device if device != CPU else None, "gloo")
    assert tensors["timeout"] >= timedelta(minutes=10) and words["timeout"] >= timedelta(hours=12)


def test_shares_are_dealt_out_in_turn(monkeypatch):
    ranks = Ranks(CPU)
    ranks.size = 3
    shares = []
    for ranks.rank in range(3):
        shares.append(ranks.share(list(range(7))))
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.fixture(scope="module")
def two_ranks(model_folder, tmp_path_factory):
    """What `learn` gives on one rank, and on each of two."""
    folder, out = str(model_folder("llama")), str(tmp_path_factory.mktemp("ranks") / "found")
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.ranks", folder, out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=root)
    assert done.returncode == 0, done.stderr
    return learn(folder, Ranks(CPU)), [torch.load(f"{out}-{rank}.pt") for rank in range(2)]


TALK = {"share", "gathered", "gathered twice", "sums", "max", "largest", "first", "from first", "copied", "ended"}


@pytest.mark.full
def test_two_ranks_learn_what_one_does(two_ranks):
    """Check 26: gradients, weights after a step, and every reported number, of SFT, reward model and PPO.

    Rows are of uneven length and number; the loss of each rank is divided by what all of them hold.
    """
    one, both = two_ranks
    compared = set(one) - TALK
    expected = {"sft", "reward", "kto 1", "kto 3", "ppo policy", "ppo critic", "ppo parts policy", "ppo parts critic"}
    assert {"sft gradient", *(f"{name} weights" for name in expected)} <= compared
    for found in both:
        assert set(found) - TALK == compared
        for name in compared:
            if isinstance(one[name], torch.Tensor):
                assert relative(found[name], one[name]) <= 1e-5, name
            else:
                assert found[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


@pytest.mark.full
def test_two_ranks_hold_the_same_weights_to_the_bit(two_ranks):
    _, (first, second) = two_ranks
    for name in first:
        if name.endswith("weights"):
            assert torch.equal(first[name], second[name]), name


@pytest.mark.full
def test_ranks_tell_each_other_what_they_have(two_ranks):
    _, (first, second) = two_ranks
    assert (first["share"], second["share"]) == (["a", "c", "e"], ["b", "d"])
    for found in (first, second):
        assert found["gathered"] == list("abcde")
        assert found["gathered twice"] == [f"{name}{k}" for name in "abcde" for k in (0, 1)]
        assert found["sums"] == {"x": 1.0, "y": pytest.approx(0.2)}
        assert (found["max"], found["largest"]) == (1.0, 11)
        assert found["from first"] == {"rank": 0, "infinite": math.inf} and found["copied"] == [0.0, 5.0]
    assert first["first"] and not second["first"]


@pytest.mark.full
def test_what_fails_on_one_rank_ends_all_with_its_message(two_ranks):
    """A mistake of the user's is told by the first rank alone; a defect by the rank that has it, and by the others."""
    _, (first, second) = two_ranks
    mine = ("RewardError", "--reward f.py: it raised\n  -> mend it")
    theirs = ("RewardError", "rank 1: --reward f.py: it raised\n  -> mend it")
    assert (first["ended"]["second fails"], second["ended"]["second fails"]) == ((*theirs, False), (*mine, True))
    assert first["ended"]["both fail"] == (*mine, False)
    assert second["ended"]["both fail"] == ("RewardError", "rank 0: --reward f.py: it raised\n  -> mend it", True)
    assert first["ended"]["defect"] == ("RuntimeError", "rank 1 failed: ZeroDivisionError: oh", False)
    assert second["ended"]["defect"] == ("ZeroDivisionError", "oh", False)
    assert first["ended"]["memory"][:2] == ("OutOfMemory", "rank 1: a pass") and first["ended"]["memory"][3] == 7
    assert first["ended"]["none"] is second["ended"]["none"] is None


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_tensors_return_their_memory():
    """Large blocks come from the heap once a larger one was freed (glibc adapts), and from the system afterwards."""
    program = """
import ctypes
from stages.training.devices import return_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks u f k".split()]
libc.mallinfo2.restype = Info
def own_blocks(size):
    before = libc.mallinfo2().hblks
    block = libc.malloc(size)
    after = libc.mallinfo2().hblks
    libc.free(block)
    return after - before
libc.free(libc.malloc(16 << 20))
print(own_blocks(2 << 20))
return_freed_memory()
print(own_blocks(8 << 20))  # more than what the heap holds free
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["0", "1"]
