"""Which rows are used, for `limit_rows` to count. The tokenizer decides, so only then it is opened this early."""

from __future__ import annotations

import functools
from typing import Any

from stages.inputs.parts import Fits
from stages.measuring_config import EvaluateConfig
from stages.models.model_ref import ModelRef


def fitting(config: Any, *sources: ModelRef) -> Fits | None:
    """Whether all of these models use a row, by --long-rows; None without `limit_rows`, when nothing has to be counted.

    A bad row raises DatasetError, as when it is encoded.
    """
    if config.limit_rows is None:
        return None
    readers = [functools.cache(functools.partial(_reader, config, source)) for source in sources]
    return lambda row: all(reader()(row) for reader in readers)


def _reader(config: Any, source: ModelRef) -> Fits:
    """Whether a row is used by one model, whose tokenizer is opened for it."""
    from stages.training.row_tokens import open_encoder

    if source.is_classifier:
        return _classifier_reader(config, source)
    if not isinstance(config, EvaluateConfig):
        encoder = open_encoder(config, source)
    else:
        from stages.rollout.evaluation import sampling_of

        encoder = open_encoder(config, source, sampling_of(source, config).max_tokens)
    return lambda row: encoder.within(row) is not None


def _classifier_reader(config: EvaluateConfig, source: ModelRef) -> Fits:
    from stages.models.classifier_text import ClassifierText
    from stages.training.comparing import encode_comparison
    from stages.training.long_rows import encode_within

    reader = ClassifierText(source)
    limit = min(config.max_tokens, reader.context)
    encode = functools.partial(encode_comparison, text=reader, max_tokens=limit)
    return lambda row: encode_within(row, encode, config.long_rows, limit) is not None
