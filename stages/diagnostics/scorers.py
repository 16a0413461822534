"""What scores comparisons in `rlhf evaluate`, and the tokens in which each scorer reads them."""

from __future__ import annotations

from functools import partial

from stages.data.comparisons import Comparison
from stages.diagnostics.comparison_evaluation import ReadByClassifier
from stages.errors import counted, verb_for
from stages.measuring_config import EvaluateConfig
from stages.models.candidates import Candidate
from stages.models.classifier import load_classifier
from stages.models.classifier_text import ClassifierText
from stages.models.passes import Passes
from stages.models.tokens import Text
from stages.results import Reporter
from stages.training.comparing import TokenComparison, encode_comparison
from stages.training.devices import pick_device, pick_dtype
from stages.training.long_rows import context_limit, encode_within
from stages.training.opening import Encoded, encode_all, open_text


class Scorers:
    """The candidates, the tokenizer of those on the base, and the readers of those that are sequence classifiers."""

    def __init__(self, candidates: list[Candidate], config: EvaluateConfig, reporter: Reporter):
        self.candidates, self.config = candidates, config
        self.on_base = next((c.ref for c in candidates if not c.ref.is_classifier), None)
        self.text = open_text(self.on_base, config, reporter) if self.on_base else None
        self.readers = {c.name: ClassifierText(c.ref) for c in candidates if c.ref.is_classifier}
        self.classifiers: dict[str, ReadByClassifier] = {}
        for name, reader in self.readers.items():
            reporter.note(f"{name} reads {reader.description}")

    def read(self, rows: list[Comparison], reporter: Reporter) -> Encoded:
        """Comparisons in the tokens of the base, else of the first classifier; keeps those of every classifier.

        A row that one of them cannot read, or would have to cut under --long-rows drop, is left out for all.
        """
        config = self.config
        limits = {name: min(config.max_tokens, reader.context) for name, reader in self.readers.items()}
        texts: dict[str, Text | ClassifierText] = dict(self.readers)
        if self.text:
            limits[""] = context_limit(config.max_tokens, self.on_base, reporter)
            texts = {"": self.text} | texts

        policy = (
            "stop" if config.long_rows in ("stop", "drop") else config.long_rows
        )  # `encode_all` drops what is stopped

        def encode(row: Comparison) -> list[TokenComparison]:
            readings = ((partial(encode_comparison, text=text, max_tokens=limits[n]), n) for n, text in texts.items())
            return [encode_within(row, read, policy, limits[name]) for read, name in readings]

        only = next(iter(limits.values())) if len(set(limits.values())) == 1 else None
        encoded = encode_all(rows, encode, config=config, reporter=reporter, what="comparisons", limit=only)
        columns = {name: [row[i] for row in encoded.rows] for i, name in enumerate(texts)}
        for name, column in columns.items():
            cut = sum(row.cut for row in column)
            whose = f" for {name}" if name and len(columns) > 1 else ""
            if cut:
                some = f"{cut} of {counted(len(column), 'comparisons')} {verb_for(cut, 'were')} cut"
                reporter.note(f"{some} to {limits[name]} tokens{whose}")
        device = pick_device(config.device)
        about = {"device": device, "dtype": pick_dtype(config.dtype, device), "passes": Passes(device.type == "cuda")}
        for candidate in self.candidates:
            if candidate.name in self.readers:
                load = partial(load_classifier, candidate.ref, **about)
                self.classifiers[candidate.name] = ReadByClassifier(columns[candidate.name], load)
        cut_rows = sum(any(reading.cut for reading in row) for row in encoded.rows)
        return encoded._replace(rows=next(iter(columns.values())), cut=cut_rows)
