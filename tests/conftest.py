"""Shared fixtures: models are built once per test run."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads cost more than they give
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.fsync = lambda handle: None  # what tests write need not outlive a power cut


def pytest_collection_finish():
    """Spare the garbage collector what has been imported by now: it stays to the end."""
    gc.freeze()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """`model_folder("gpt2", chat=True, ...)`: the folder of a tiny random model, made on first use."""
    from tests.tiny import build_model

    made: dict[tuple, Path] = {}

    def get(architecture: str = "llama", **options: object) -> Path:
        key = (architecture, *sorted(options.items()))
        if key not in made:
            made[key] = build_model(tmp_path_factory.mktemp("model"), architecture, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def open_tiny(model_folder):
    """`open_tiny("gpt2")`: a loaded `Base` of a tiny random model, fresh on every call."""
    import torch

    from stages.models.base import load_base
    from stages.models.model_ref import open_model

    torch.set_num_threads(1)

    def get(architecture: str = "llama", **options: object):
        source = open_model(str(model_folder(architecture, **options)), stages=(), what="--model")
        return load_base(source, device=torch.device("cpu"), dtype=torch.float32)

    return get


@pytest.fixture(scope="session")
def chain(tmp_path_factory, model_folder):
    """`chain("gpt2", chat=True)`: every stage run once on a tiny model, made on first use; look, do not touch."""
    import torch

    from tests.commands import run_chain

    torch.set_num_threads(1)
    made: dict[tuple, object] = {}

    def get(architecture: str = "llama", *, chat: bool = False):
        key = (architecture, chat)
        if key not in made:
            folder = tmp_path_factory.mktemp("chain")
            made[key] = run_chain(folder, model_folder(architecture, chat=chat), chat=chat)
        return made[key]

    return get
