"""Device and precision of a run, and its rank among the processes that torchrun started."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stages import errors
from stages.errors import ConfigError, DeviceError, OutOfMemory, RankError, StopRequested, UserError, counted
from stages.launch import read_launch
from stages.models.passes import LARGEST_OF

TENSOR_TIMEOUT = datetime.timedelta(minutes=30)  # for a rank that computes as much as the others
TEXT_TIMEOUT = datetime.timedelta(days=1)  # for a rank whose reward function or disk is slow
MMAP_THRESHOLD = -3  # glibc: M_MMAP_THRESHOLD
OWN_BLOCK = 1 << 20  # bytes from which on a tensor has memory of its own
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device a knob names; `auto` is CUDA if there is one. Raises DeviceError for a device that does not exist."""
    if name == "auto":
        return _own_cuda_device() if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"`{name}` is no device", where="device", fix="give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"`{name}` is not supported", where="device", fix="give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"the device is {name}, but torch sees no CUDA device",
            where="device",
            fix="use --device cpu, or install a CUDA build of torch",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"{name} does not exist; the machine has {counted(torch.cuda.device_count(), 'CUDA devices')}",
            where="device",
            fix="choose a smaller index",
        )
    return _own_cuda_device() if device.type == "cuda" and device.index is None else device


def _own_cuda_device() -> torch.device:
    """The CUDA device of this process's rank on its machine. Raises DeviceError if there are too few."""
    local, count = read_launch().local, torch.cuda.device_count()
    if local >= count:
        raise DeviceError(
            f"LOCAL_RANK={local} in the environment, but the machine has {counted(count, 'CUDA devices')}",
            where="device",
            fix=f"start no more ranks than that (torchrun --nproc-per-node {count}), or use --device cpu",
        )
    return torch.device("cuda", local)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Precision of the frozen base; `auto` is bfloat16 on CUDA and float32 on the CPU."""
    if name != "auto":
        return TORCH_DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB: of the device on CUDA, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def return_freed_memory() -> None:
    """Have large tensors return their memory to the system when they are freed; only with glibc, on Linux.

    Its allocator otherwise keeps freed blocks of up to 32 MB for later, most of which the next pass cannot use.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, OWN_BLOCK)


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors can still use on a CUDA device; None on the CPU, whose memory is not planned."""
    if device.type != "cuda":
        return None
    free, whole = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return min(free, int(share * whole) - reserved) + reserved - torch.cuda.memory_allocated(device)


class Ranks:
    """This process among `size` data-parallel ones. Alone, every method is the identity.

    Tensors are exchanged in the device's group (NCCL on CUDA). All other values are exchanged as JSON in a second group
    on the CPU, with a timeout longer than any reward function: ranks wait there for each other before they exchange
    tensors.
    """

    def __init__(self, device: torch.device):
        launch = read_launch()
        self.rank, self.size = launch.rank, launch.size
        self.text_group = None  # for all values but tensors
        self.exchanging = False  # True in `together`: a stop of this rank reaches the others
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.size == 1:
            return
        if not torch.distributed.is_initialized():
            cuda = device.type == "cuda"
            torch.distributed.init_process_group(
                "nccl" if cuda else "gloo", timeout=TENSOR_TIMEOUT, device_id=device if cuda else None
            )
        self.text_group = torch.distributed.new_group(backend="gloo", timeout=TEXT_TIMEOUT)

    @property
    def first(self) -> bool:
        """True on the rank that writes files and messages."""
        return self.rank == 0

    def share(self, items: list) -> list:
        """This rank's part of a list that all ranks have; every item belongs to one rank."""
        return items[self.rank :: self.size]

    # --- tensors

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            with _explaining_failure():
                torch.distributed.all_reduce(x)
        return x

    def sum_floats(self, numbers: dict[str, float], device: torch.device) -> dict[str, float]:
        """Sums of a few named numbers over ranks."""
        return self._reduce(numbers, device, "SUM")

    def max(self, number: float, device: torch.device) -> float:
        """The largest over ranks."""
        return self._reduce({"": number}, device, "MAX")[""]

    def combine(self, values: dict[str, float], device: torch.device) -> dict[str, float]:
        """Named values of all ranks' parts of a batch, combined as `passes.combine` does; every rank has all names."""
        largest = {name: value for name, value in values.items() if name.startswith(LARGEST_OF)}
        sums = {name: value for name, value in values.items() if name not in largest}
        return self.sum_floats(sums, device) | self._reduce(largest, device, "MAX")

    def _reduce(self, numbers: dict[str, float], device: torch.device, op: str) -> dict[str, float]:
        if self.size == 1 or not numbers:
            return numbers
        packed = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
        with _explaining_failure():
            torch.distributed.all_reduce(packed, getattr(torch.distributed.ReduceOp, op))
        return dict(zip(numbers, packed.tolist(), strict=True))

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with the numbers of the first rank."""
        for tensor in tensors if self.size > 1 else ():
            with _explaining_failure():
                torch.distributed.broadcast(tensor, 0)

    # --- everything else

    def gather(self, items: list) -> list:
        """All ranks' items, which JSON can hold, in the order of the list that `share` divided."""
        if self.size == 1:
            return items
        parts = self._exchange(items)
        return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]

    def from_first(self, value: object) -> object:
        """The first rank's value, as JSON returns it, on every rank; those of the others are ignored."""
        return value if self.size == 1 else self._exchange(value if self.first else None)[0]

    def largest(self, number: int) -> int:
        """The largest whole number over ranks; waits as long as a reward function may take."""
        return number if self.size == 1 else max(self._exchange(number))

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the block fails on one rank, or is stopped by a signal there, it ends on all ranks with that failure.

        Nothing in the block may exchange anything between ranks: the others would wait for one that failed.
        """
        failure: Exception | StopRequested | None = None
        outer, self.exchanging = self.exchanging, True
        try:
            yield
        except (Exception, StopRequested) as error:
            if self.size == 1 or getattr(error, "immediate", False):
                raise
            failure = error
        finally:
            self.exchanging = outer
        failures = [None] if self.size == 1 else self._exchange(None if failure is None else _failure_to_json(failure))
        culprit = next((rank for rank, stored in enumerate(failures) if stored is not None), None)
        if culprit is None:
            return
        if failure is None or (culprit != self.rank and isinstance(failure, (UserError, StopRequested))):
            failure = _failure_from_json(failures[culprit], culprit)
        failure.told_by_first = isinstance(failure, UserError) and not self.first
        raise failure

    def _exchange(self, value: object) -> list:
        """The values of all ranks, through JSON, in the order of ranks."""
        text = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _explaining_failure():
            torch.distributed.all_gather(sizes, torch.tensor([len(text)]), group=self.text_group)
        padded = torch.zeros(max(int(n) for n in sizes), dtype=torch.uint8)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in sizes]
        with _explaining_failure():
            torch.distributed.all_gather(parts, padded, group=self.text_group)
        return [json.loads(part[: int(n)].numpy().tobytes()) for part, n in zip(parts, sizes, strict=True)]


@contextmanager
def _explaining_failure() -> Iterator[None]:
    """Raise RankError if an exchange between ranks fails; NCCL may wait instead, until torchrun ends all ranks."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise RankError(
            f"another rank ended, or cannot be reached ({reason})",
            fix="read the messages of the other ranks, then run the same command again",
        ) from None


def _failure_to_json(failure: Exception | StopRequested) -> dict[str, object]:
    fields = {name: getattr(failure, name, None) for name in ("what", "where", "fix", "tokens", "number")}
    return {"kind": type(failure).__name__, "text": str(failure), **fields}


def _failure_from_json(stored: dict[str, Any], rank: int) -> Exception | StopRequested:
    """The failure of another rank, with that rank's number."""
    kind = getattr(errors, stored["kind"], None)
    if kind is StopRequested:
        return StopRequested(stored["number"])
    if not (isinstance(kind, type) and issubclass(kind, UserError)):
        return RuntimeError(f"rank {rank} failed: {stored['kind']}: {stored['text']}")
    where = f"rank {rank}: {stored['where']}" if stored["where"] else f"rank {rank}"
    failure = kind(stored["what"], where=where, fix=stored["fix"])
    if isinstance(failure, OutOfMemory):
        failure.tokens = stored["tokens"]
    return failure
