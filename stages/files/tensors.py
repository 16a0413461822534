"""Tensors on disk: safetensors only, never pickle. Reading a header needs no torch."""

from __future__ import annotations

import json
import math
import typing
from pathlib import Path

from stages.errors import CheckpointError
from stages.files import atomic

if typing.TYPE_CHECKING:
    from torch import Tensor

_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors of any shape, dtype and device to one file, whole or not at all.

    The same tensors and metadata always give the same bytes. Raises OutputError.
    """
    import safetensors.torch

    plain, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor  # the format refuses two views of one storage
        seen.add(storage)
    data = safetensors.torch.save(plain)
    atomic.write_bytes(path, _with_metadata(data, metadata) if metadata else data)


def _with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """Put metadata into a header in sorted order; the library's own order changes from run to run."""
    length = int.from_bytes(data[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items()))} | json.loads(data[8 : 8 + length])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[8 + length :]))


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
    """The texts stored beside the tensors. Raises CheckpointError for a missing or damaged file."""
    return read_header(path)[0].get("__metadata__", {})


def read_header(path: str | Path) -> tuple[dict[str, dict], int]:
    """The header of a safetensors file and the offset in bytes at which its tensors start, without torch.

    Checks that the tensors fill the file, one after the other, each as large as its shape. Raises CheckpointError.
    """
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            if head == b"version ":
                raise damaged(path, "it is a Git LFS pointer, not the file itself", fix="fetch it with `git lfs pull`")
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(_LARGEST_HEADER, size - 8):
                raise damaged(path, "its header does not fit into the file")
            header = json.loads(file.read(length))
        spans = sorted(_span_of(entry) for name, entry in header.items() if name != "__metadata__")
        if not all(isinstance(text, str) for text in header.get("__metadata__", {}).values()):
            raise ValueError
    except OSError as error:
        raise CheckpointError(
            f"cannot read: {error.strerror or error}", where=str(path), fix="see that the file is there and readable"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(path, "its header is not one of safetensors") from error
    end = 0
    for start, stop in spans:
        if start != end:
            raise damaged(path, "its tensors overlap, or leave a hole")
        end = stop
    if 8 + length + end != size:
        raise damaged(path, f"it has {size} bytes where its header speaks of {8 + length + end}")
    return header, 8 + length


def _span_of(entry: dict) -> tuple[int, int]:
    """Where a tensor begins and ends, in bytes after the header; raises ValueError where an entry makes no sense."""
    start, end = entry["data_offsets"]
    whole = all(type(number) is int and number >= 0 for number in (start, end, *entry["shape"]))
    if not whole or start > end or not isinstance(entry["dtype"], str):
        raise ValueError
    size = _BYTES.get(entry["dtype"])  # None: a dtype that only the library knows, and checks
    if size is not None and end - start != size * math.prod(entry["shape"]):
        raise ValueError
    return start, end


def damaged(path: str | Path, reason: str, fix: str = "") -> CheckpointError:
    """The error for a tensor file that cannot be used as it is."""
    fix = fix or "copy or download it again; if this tool wrote it, run the command that made it with --overwrite"
    return CheckpointError(f"damaged or incomplete: {reason}", where=str(path), fix=fix)
