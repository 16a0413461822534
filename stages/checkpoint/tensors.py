"""Tensors on disk: safetensors only, never pickle. Reading a header needs no torch."""

from __future__ import annotations

import json
import typing
from pathlib import Path

from stages.checkpoint import atomic
from stages.errors import CheckpointError

if typing.TYPE_CHECKING:
    from torch import Tensor


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors of any shape, dtype and device to one file, whole or not at all.

    Equal tensors without metadata give equal bytes. Raises OutputError.
    """
    import safetensors.torch

    plain, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor  # the format refuses two views of one storage
        seen.add(storage)
    atomic.write_bytes(path, safetensors.torch.save(plain, metadata))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a file, on the CPU. Raises CheckpointError for a missing or damaged file."""
    read_header(path)
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise damaged(path, str(error)) from error


def tensor_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a tensor file. Raises CheckpointError for a missing or damaged file."""
    return read_header(path)[0].get("__metadata__") or {}


def shapes_in(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a file, by name. Raises CheckpointError for a missing or damaged file."""
    entries = read_header(path)[0].items()
    return {name: tuple(entry["shape"]) for name, entry in entries if name != "__metadata__"}


def read_header(path: str | Path) -> tuple[dict[str, dict], int]:
    """The header of a safetensors file and the offset in bytes at which its tensors start, without torch.

    Raises CheckpointError for a missing file, and for one whose size does not match its header.
    """
    import safetensors

    try:
        with open(path, "rb") as file:
            head = file.read(8)
            if head == b"version ":
                raise damaged(path, "it is a Git LFS pointer, not the file itself", fix="fetch it with `git lfs pull`")
            with safetensors.safe_open(path, framework="np"):  # checks the whole header; it does not give offsets
                length = int.from_bytes(head, "little")
                return json.loads(file.read(length)), 8 + length
    except (safetensors.SafetensorError, ValueError) as error:
        raise damaged(path, str(error)) from error
    except OSError as error:
        what, fix = f"cannot read: {error.strerror or error}", "check that the file exists and is readable"
        raise CheckpointError(what, where=str(path), fix=fix) from error


def damaged(path: str | Path, reason: str, fix: str = "") -> CheckpointError:
    """The error for a tensor file that cannot be used as it is."""
    fix = fix or "copy or download it again; if this tool wrote it, run the command that made it with --overwrite"
    return CheckpointError(f"damaged or incomplete: {reason}", where=str(path), fix=fix)
