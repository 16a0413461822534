"""Marks for single cases of a parametrised test."""

from __future__ import annotations

import pytest


def full(*cases: object) -> list:
    """Cases that only `make test-all` runs; a tuple is a case of several arguments."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full) for case in cases]
