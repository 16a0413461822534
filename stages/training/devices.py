"""Which device and precision a run uses, and its place among the ranks that torchrun started."""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor

from stages.errors import ConfigError, DeviceError
from stages.launch import read_launch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device a knob names; `auto` is CUDA where there is one. Raises DeviceError where it is absent."""
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
            "CUDA was asked for, but torch sees no CUDA device",
            where="device",
            fix="use --device cpu, or install a CUDA build of torch",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"{name} does not exist; there are {torch.cuda.device_count()} CUDA devices",
            where="device",
            fix="choose a smaller index",
        )
    return _own_cuda_device() if device.type == "cuda" and device.index is None else device


def _own_cuda_device() -> torch.device:
    """The CUDA device of this process's rank on its machine. Raises DeviceError where there are fewer."""
    local, count = read_launch().local, torch.cuda.device_count()
    if local >= count:
        raise DeviceError(
            f"LOCAL_RANK={local} in the environment, but there are {count} CUDA devices",
            where="device",
            fix=f"start at most {count} ranks on a machine (torchrun --nproc-per-node {count}), or use --device cpu",
        )
    return torch.device("cuda", local)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Precision of the frozen base; `auto` is bfloat16 on CUDA and float32 on the CPU."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB: of the device on CUDA, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors may still take on a CUDA device; None on the CPU, where nothing is planned by it."""
    if device.type != "cuda":
        return None
    free, whole = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return min(free, int(share * whole) - reserved) + reserved - torch.cuda.memory_allocated(device)


class Ranks:
    """This process among `size` data-parallel ones. Alone, every method is the identity."""

    def __init__(self, device: torch.device):
        launch = read_launch()
        self.rank, self.size = launch.rank, launch.size
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where NCCL puts the objects that ranks exchange
        if self.size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        """True on the rank that writes files and talks."""
        return self.rank == 0

    def share(self, items: list) -> list:
        """This rank's part of a list that all ranks hold; together the parts are the list."""
        return items[self.rank :: self.size]

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(x)
        return x

    def sum_floats(self, numbers: dict[str, float], device: torch.device) -> dict[str, float]:
        """Sum a few named numbers over ranks."""
        if self.size == 1:
            return numbers
        packed = self.sum(torch.tensor(list(numbers.values()), dtype=torch.float64, device=device))
        return dict(zip(numbers, packed.tolist(), strict=True))

    def gather(self, items: list) -> list:
        """All ranks' items in the order that `share` dealt them out."""
        if self.size == 1:
            return items
        parts: list[list] = [[] for _ in range(self.size)]
        torch.distributed.all_gather_object(parts, items)
        return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]

    def any(self, flag: bool, device: torch.device) -> bool:
        """True on every rank where it is true on one."""
        return bool(self.sum(torch.tensor(float(flag), device=device)).item() > 0)

    def max(self, number: float, device: torch.device) -> float:
        """The largest over ranks."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return float(largest)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            torch.distributed.barrier()
