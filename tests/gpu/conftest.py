"""Every test here that makes sense on the CPU too runs there among the fast tests; on CUDA with `-m gpu`."""

from __future__ import annotations

import pytest
import torch

from stages.models.base import load_base
from stages.models.model_ref import open_model

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ("cpu", CUDA)


def pytest_generate_tests(metafunc):
    chosen = any("device_name" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "device_name" in metafunc.fixturenames and not chosen:
        metafunc.parametrize("device_name", DEVICES)


@pytest.fixture
def device(device_name) -> torch.device:
    """The device of this run of a test."""
    if device_name == "cuda" and not torch.cuda.is_available():
        pytest.fail("no CUDA device: `make gpu-check` is for machines that have one")
    return torch.device(device_name, 0) if device_name == "cuda" else torch.device("cpu")


@pytest.fixture
def opened(device, model_folder):
    """`opened("llama", dtype=torch.bfloat16)`: a loaded base of a small random model on the device."""

    def get(architecture: str = "llama", *, dtype: torch.dtype = torch.float32, four_bit: bool = False, **options):
        source = open_model(str(model_folder(architecture, **options)), stages=(), what="--model")
        return load_base(source, device=device, dtype=dtype, four_bit=four_bit)

    return get
