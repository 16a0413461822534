"""Built-in scores against a reference text, between 0 and 1, by the libraries that papers use (extra `text`)."""

from __future__ import annotations

import functools
import re

WIDE = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")  # Chinese characters and kana, written without spaces
TOKEN = re.compile(rf"{WIDE.pattern}|(?:(?!{WIDE.pattern})[^\W_])+")


class Words:
    """Tokens for ROUGE: words, and single characters of scripts without spaces; for ASCII those of rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, in lower case."""
        return TOKEN.findall(text.lower())


def rouge_score(response: str, references: tuple[str, ...], kind: str) -> float:
    """F1 of ROUGE (Lin 2004) by rouge-score, the best over the references; `kind` is rouge1, rouge2, rougeL, ..."""
    return _rouge(kind).score_multi(references, response)[kind].fmeasure


def bleu_score(response: str, references: tuple[str, ...]) -> float:
    """Sentence BLEU by sacrebleu (Post 2018), exponential smoothing, effective order; Chinese by characters."""
    tokens = "zh" if any(map(WIDE.search, references)) else "13a"
    return _bleu(tokens).sentence_score(response, list(references)).score / 100


def chrf_score(response: str, references: tuple[str, ...]) -> float:
    """Sentence chrF2 (Popović 2015) by sacrebleu: character n-grams up to 6."""
    return _chrf().sentence_score(response, list(references)).score / 100


@functools.cache
def _rouge(kind: str):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=Words())


@functools.cache
def _bleu(tokens: str):
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokens, effective_order=True)


@functools.cache
def _chrf():
    from sacrebleu.metrics import CHRF

    return CHRF()
