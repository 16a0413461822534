"""Marks for single cases of a parametrised test."""

from __future__ import annotations

from collections.abc import Container, Iterable

import pytest


def full(*cases: object) -> list:
    """Cases that only `make test-all` runs; a tuple is a case of several arguments."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full) for case in cases]


def full_but(kept: Container, cases: Iterable) -> list:
    """All cases in their order, those that are not in `kept` only for `make test-all`."""
    return [case if case in kept else full(case)[0] for case in cases]
