"""Which rows are used, for `limit_rows` to count. The tokenizer decides, so only then it is opened this early."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from stages.inputs.parts import Fits
from stages.measuring_config import EvaluateConfig
from stages.models.model_ref import ModelRef

if TYPE_CHECKING:
    from stages.training.row_tokens import RowEncoder


def fitting(config: Any, source: ModelRef) -> Fits | None:
    """Whether a row is used, by --long-rows; None without `limit_rows`, when nothing has to be counted.

    A bad row raises DatasetError, as when it is encoded.
    """
    if config.limit_rows is None:
        return None

    @functools.cache
    def encoder() -> RowEncoder:
        from stages.training.row_tokens import open_encoder

        if not isinstance(config, EvaluateConfig):
            return open_encoder(config, source)
        from stages.rollout.evaluation import sampling_of

        return open_encoder(config, source, sampling_of(source, config).max_tokens)

    return lambda row: encoder().within(row) is not None
