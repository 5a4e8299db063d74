"""METEOR with exact and stem matches: words of a text aligned with those of a reference, in as few chunks as possible.

Formula and parameters are those of METEOR 1.5 for English (Denkowski & Lavie 2014: α 0.85, β 0.2, γ 0.6, δ 0.75, stems
weigh 0.6). Its synonym and paraphrase tables are not used, so that values lie below those of the Java program and
compare only with this variant; the label says so. Function words are common words of closed classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_cli.learning.text_scores import TextScore, check_texts, not_computed, tokenise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_EXACT, _STEM = 1.0, 0.6
_BEAM = 40
_LABEL = "METEOR (exact and stem)"
_MEANING = "words shared with the best reference, exactly or by stem, less where their order is broken; METEOR 1.5 without synonyms and paraphrases"
_FUNCTION_WORDS = """
a about after all an and any are as at be been but by can could did do for from had has have he her him his i if in into is it its like me more
my n't no not of off on one or our out over 's she so some such than that the their them then there these they this to two up us was we were
what when which who will with would you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


@dataclass(frozen=True, slots=True)
class Alignment:
    """How a text and one reference match."""

    pairs: tuple[tuple[int, int, float], ...]
    """(place in the text, place in the reference, weight) of every matched word."""
    chunks: int
    """Runs of matches that stand side by side in both."""


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> TextScore:
    """METEOR of texts, each against its best reference; the score of the set is that of the summed counts, as METEOR 1.5 sums them.

    Raises
    ------
    InputDatasetError
        As :func:`brainfm_cli.learning.text_scores.check_texts`.
    """
    check_texts(candidates, references)
    if _stemmer() is None:
        return not_computed(_LABEL, _MEANING, "the package snowballstemmer is not installed: pip install 'brainfm-cli[train]'")
    counts = np.zeros((len(candidates), _COUNTS))
    for place, (text, said) in enumerate(zip(candidates, references, strict=True)):
        words = tokenise(text)
        found = np.array([_counts(words, tokenise(one)) for one in said])
        counts[place] = found[int(np.argmax(_score(found)))]
    return TextScore(label=_LABEL, meaning=_MEANING, items=_score(counts), weighted=lambda weights: _score(weights @ counts))


def align(words: Sequence[str], reference: Sequence[str]) -> Alignment:
    """The alignment with most matches, then fewest chunks, then least movement (a beam of 40 keeps it fast)."""
    stems, others = [_stem(word) for word in words], [_stem(word) for word in reference]
    options = [
        [
            (place, _EXACT if word == reference[place] else _STEM)
            for place in range(len(reference))
            if word == reference[place] or stem == others[place]
        ]
        for word, stem in zip(words, stems, strict=True)
    ]
    best: list[_Path] = [_Path(used=0, last=(-2, -2), matches=0, chunks=0, moved=0, pairs=())]
    for mine, choices in enumerate(options):
        grown = {(one.used, one.last): one for one in best}
        for path in best:
            for theirs, weight in choices:
                if path.used >> theirs & 1:
                    continue
                new = path.extended(mine, theirs, weight)
                key = (new.used, new.last)
                if key not in grown or new.rank < grown[key].rank:
                    grown[key] = new
        best = sorted(grown.values(), key=lambda one: one.rank)[:_BEAM]
    return Alignment(pairs=best[0].pairs, chunks=best[0].chunks)


@dataclass(frozen=True, slots=True)
class _Path:
    """A partial alignment."""

    used: int
    """Bits of the reference words that are taken."""
    last: tuple[int, int]
    """Places of the last match."""
    matches: int
    chunks: int
    moved: int
    """Sum of |place − place| of the matches."""
    pairs: tuple[tuple[int, int, float], ...]

    @property
    def rank(self) -> tuple[int, int, int]:
        return (-self.matches, self.chunks, self.moved)

    def extended(self, mine: int, theirs: int, weight: float) -> _Path:
        follows = self.last == (mine - 1, theirs - 1)
        return _Path(
            used=self.used | 1 << theirs,
            last=(mine, theirs),
            matches=self.matches + 1,
            chunks=self.chunks + (not follows),
            moved=self.moved + abs(mine - theirs),
            pairs=(*self.pairs, (mine, theirs, weight)),
        )


# text: words, function words, weighted content and function matches, matches; the same of the reference; chunks, chunks that break order
_COUNTS = 11


def _counts(words: Sequence[str], reference: Sequence[str]) -> list[float]:
    found = align(words, reference)
    row: list[float] = []
    for side, text in enumerate((words, reference)):
        hits = {True: 0.0, False: 0.0}
        for mine, theirs, weight in found.pairs:
            hits[text[theirs if side else mine] in FUNCTION_WORDS] += weight
        row += [len(text), sum(word in FUNCTION_WORDS for word in text), hits[False], hits[True], len(found.pairs)]
    return [*row, 0 if len(found.pairs) == len(words) == len(reference) and found.chunks == 1 else found.chunks]


def _score(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows,) from (rows, 11) counts."""
    shares = []
    for side in (counts[:, :5], counts[:, 5:10]):
        length, function, content_hits, function_hits = side[:, 0], side[:, 1], side[:, 2], side[:, 3]
        total = _DELTA * (length - function) + (1 - _DELTA) * function
        shares.append(_ratio(_DELTA * content_hits + (1 - _DELTA) * function_hits, total))
    precision, recall = shares
    mean = _ratio(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    broken = _ratio(counts[:, 10], (counts[:, 4] + counts[:, 9]) / 2)
    return mean * (1 - _GAMMA * broken**_BETA)


def _ratio(parts: NDArray[np.float64], totals: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(parts, totals, out=np.zeros(len(parts)), where=totals > 0)


@cache
def _stemmer() -> Any:  # noqa: ANN401
    try:
        import snowballstemmer
    except ModuleNotFoundError:
        return None
    return snowballstemmer.stemmer("english")


@cache
def _stem(word: str) -> str:
    return str(_stemmer().stemWord(word))
