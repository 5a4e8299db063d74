"""Scores of texts against reference texts: BLEU, ROUGE-L, CIDEr, METEOR, sentence cosine, objects named, distinct share.

Texts are of items (pictures, studies), each with one or more references. Every score knows its value for each item and, as
in :mod:`brainfm_cli.learning.scores`, for the whole set as a function of (resamples, items) weights, so that all are
resampled by picture with the same draws. Values are shares; published tables print them times 100. What lacks a resource
(a stemmer, an encoder) is not computed and says why; it is never 0.

Definitions: BLEU, ROUGE-L and CIDEr as pycocoevalcap computes them (Papineni 2002; Lin 2004; CIDEr-D of Vedantam 2015).
Tokens are lower-cased words without punctuation, English clitics split, as the Penn Treebank tokeniser leaves them;
Chinese, Japanese and Korean characters are tokens of their own.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.scores import Score
from brainfm_cli.learning.uncertainty import interval

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.learning.uncertainty import Weighted

    Gram = tuple[str, ...]

TOKENISER = "lower-cased words without punctuation, English clitics split; Chinese, Japanese and Korean by character"
_LONGEST = 4  # words of the longest n-gram
_IDEOGRAPH = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]"
_TOKEN = re.compile(
    rf"""{_IDEOGRAPH}
    |\d+(?:[.,:]\d+)+                                     # 1,000 or 3.5 or 4:30
    |(?:(?!{_IDEOGRAPH})\w)+?(?=n't\b)|n't\b              # does n't
    |'(?:s|re|ve|ll|d|m)\b                                # dog 's
    |(?:(?!{_IDEOGRAPH})[\w&$%])+(?:[-/.@](?:(?!{_IDEOGRAPH})\w)+)*   # black-and-white, t.v
    """,
    re.VERBOSE,
)
# CIDEr-D: width of the penalty on lengths that differ, and the factor that brings it to 0 … 10.
_CIDER_WIDTH, _CIDER_FACTOR = 6.0, 10.0
_ROUGE_BETA = 1.2


@dataclass(frozen=True, kw_only=True, eq=False)
class TextScore:
    """One score of texts: of every item, and of the whole set under weights."""

    label: str
    """As printed, with the variant."""
    meaning: str
    """One sentence for the report."""
    items: NDArray[np.float64] | None = None
    """(items,) value of each; NaN where undefined. None where nothing is computed."""
    weighted: Weighted | None = None
    """(resamples, items) weights → (resamples,) value of the set."""
    reason: str | None = None
    """Why nothing, or no interval, is computed."""

    def value(self) -> float | None:
        """Of the whole set."""
        if self.weighted is None or self.items is None:
            return None
        found = float(self.weighted(np.ones((1, len(self.items))))[0])
        return found if np.isfinite(found) else None

    def score(self, weights: NDArray[np.float64] | None = None, *, level: float = 0.95) -> Score:
        """The value with its interval over (resamples, items) ``weights`` of :func:`~brainfm_cli.learning.uncertainty.resample_weights`."""
        value = self.value()
        if value is None or self.weighted is None:
            return Score(reason=self.reason or "undefined for every item")
        if weights is None or self.reason is not None:
            return Score(value=value, reason=self.reason)
        found = interval(self.weighted, weights, method="percentile", level=level)
        return Score(value=value, low=found.low, high=found.high, reason=found.reason)


def lead(first: TextScore, floor: TextScore, weights: NDArray[np.float64], *, level: float = 0.95) -> Score:
    """How far ``first`` is above ``floor`` on the same items, with its paired interval.

    Raises
    ------
    InputDatasetError
        They are of different numbers of items.
    """
    if first.weighted is None or floor.weighted is None or first.items is None or floor.items is None:
        return Score(reason=first.reason or floor.reason)
    if len(first.items) != len(floor.items):
        raise InputDatasetError(f"{len(first.items)} texts are compared with {len(floor.items)}", fix="score both on the same items")
    a, b = first.weighted, floor.weighted
    pair = TextScore(
        label=first.label,
        meaning=first.meaning,
        items=first.items - floor.items,
        weighted=lambda rows: a(rows) - b(rows),
        reason=first.reason or floor.reason,
    )
    return pair.score(weights, level=level)


def not_computed(label: str, meaning: str, reason: str) -> TextScore:
    """A score whose resource is missing."""
    return TextScore(label=label, meaning=meaning, reason=reason)


def tokenise(text: str) -> list[str]:
    """The tokens that all scores of this module compare (:data:`TOKENISER`)."""
    return _TOKEN.findall(text.lower().replace("’", "'"))


def check_texts(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Refuse texts that cannot be scored.

    Raises
    ------
    InputDatasetError
        No texts, other numbers of texts and of references, or an item without a reference.
    """
    if len(candidates) != len(references) or not candidates:
        raise InputDatasetError(f"{len(candidates)} texts have references for {len(references)} items", fix="give one text per item")
    for place, said in enumerate(references):
        if isinstance(said, str) or not any(one.strip() for one in said):
            raise InputDatasetError(f"item {place} has no list of references", fix="give every item one or more reference texts, or leave it out")  # fmt: skip


def text_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, TextScore]:
    """Every score that needs nothing but the texts: bleu_1 … bleu_4, rouge_l, cider, meteor, distinct.

    Raises
    ------
    InputDatasetError
        As :func:`check_texts`.
    """
    from brainfm_cli.learning.meteor import meteor

    return {
        **bleu(candidates, references),
        "rouge_l": rouge_l(candidates, references),
        "cider": cider(candidates, references),
        "meteor": meteor(candidates, references),
        "distinct": distinct_share(candidates),
    }


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, TextScore]:
    """BLEU-1 to BLEU-4 (keys bleu_1 …): clipped n-gram precision, brevity by the nearest reference length; counts are summed over the set."""
    check_texts(candidates, references)
    hits, guesses, lengths, wanted = (np.zeros((len(candidates), size)) for size in (_LONGEST, _LONGEST, 1, 1))
    for place, (text, said) in enumerate(zip(candidates, references, strict=True)):
        words, others = tokenise(text), [tokenise(one) for one in said]
        lengths[place] = len(words)
        wanted[place] = min((abs(len(one) - len(words)), len(one)) for one in others)[1]
        most: Counter[Gram] = Counter()
        for one in others:
            most |= _grams(one)
        for gram, count in _grams(words).items():
            guesses[place, len(gram) - 1] += count
            hits[place, len(gram) - 1] += min(count, most[gram])
    sums = np.concatenate([hits, guesses, lengths, wanted], axis=1)

    def of(order: int) -> TextScore:
        def weighted(weights: NDArray[np.float64]) -> NDArray[np.float64]:
            return _bleu(weights @ sums, order)

        return TextScore(
            label=f"BLEU-{order}",
            meaning=f"share of a text's word sequences up to {order} long that a reference has, less for texts that are too short",
            items=_bleu(sums, order),
            weighted=weighted,
        )

    return {f"bleu_{order}": of(order) for order in range(1, _LONGEST + 1)}


def _bleu(sums: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    """(rows,) from hits of 1 … 4, guesses of 1 … 4, length and reference length; tiny terms as pycocoevalcap adds them."""
    hits, guesses, length, wanted = sums[:, :order], sums[:, _LONGEST : _LONGEST + order], sums[:, -2], sums[:, -1]
    precision = np.prod((hits + 1e-15) / (guesses + 1e-9), axis=1) ** (1 / order)
    ratio = (length + 1e-15) / (wanted + 1e-9)
    return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> TextScore:
    """ROUGE-L with β 1.2: longest common subsequence, best precision and best recall each over the references, mean over items."""
    check_texts(candidates, references)
    values = np.zeros(len(candidates))
    for place, (text, said) in enumerate(zip(candidates, references, strict=True)):
        words = tokenise(text)
        shared = [(_common(words, other), len(other)) for other in map(tokenise, said) if other]
        if not words or not shared:
            continue
        precision = max(length for length, _ in shared) / len(words)
        recall = max(length / total for length, total in shared)
        if precision and recall:
            values[place] = (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)
    return mean_of("ROUGE-L", "longest sequence of words shared with a reference, as F score with β 1.2", values)


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]], *, documents: Sequence[Sequence[str]] | None = None) -> TextScore:
    """CIDEr-D, 0 to 10: cosine of tf-idf vectors of n-grams 1 to 4, clipped, with a penalty on differing length; mean over items.

    ``documents`` are the reference sets that document frequencies are counted in; by default those of the items, as
    published scores do. They stay as they are when items are resampled.
    """
    check_texts(candidates, references)
    label, meaning = "CIDEr (CIDEr-D)", "agreement with the references in words that tell pictures apart, 0 to 10"
    counted = references if documents is None else documents
    if len(counted) < 2:
        return not_computed(label, meaning, "document frequencies need the references of two or more items")
    frequency: Counter[Gram] = Counter()
    for said in counted:
        frequency.update({gram for one in said for gram in _grams(tokenise(one))})
    weigh = _TfIdf(frequency, len(counted))
    values = np.array([weigh.agreement(text, said) for text, said in zip(candidates, references, strict=True)])
    return mean_of(label, meaning, values)


class _TfIdf:
    """N-gram vectors of one corpus."""

    def __init__(self, frequency: Counter[Gram], documents: int) -> None:
        self._frequency = frequency
        self._log_documents = np.log(float(documents))

    def agreement(self, text: str, references: Sequence[str]) -> float:
        """CIDEr-D of one text."""
        own, norms, length = self._vectors(text)
        total = np.zeros(_LONGEST)
        for said in references:
            other, other_norms, other_length = self._vectors(said)
            penalty = np.exp(-((length - other_length) ** 2) / (2 * _CIDER_WIDTH**2))
            for order, (mine, theirs) in enumerate(zip(own, other, strict=True)):
                product = sum(min(value, theirs[gram]) * theirs[gram] for gram, value in mine.items() if gram in theirs)
                scale = norms[order] * other_norms[order]
                total[order] += penalty * (product / scale if scale else product)
        return float(total.mean() / len(references) * _CIDER_FACTOR)

    def _vectors(self, text: str) -> tuple[list[dict[Gram, float]], NDArray[np.float64], int]:
        vectors: list[dict[Gram, float]] = [{} for _ in range(_LONGEST)]
        words = tokenise(text)
        for gram, count in _grams(words).items():
            vectors[len(gram) - 1][gram] = count * (self._log_documents - np.log(max(1.0, self._frequency[gram])))
        norms = np.sqrt([sum(value**2 for value in one.values()) for one in vectors])
        return vectors, norms, max(0, len(words) - 1)  # pycocoevalcap measures length in pairs of words


def sentence_cosine(candidates: NDArray[np.float64], references: Sequence[NDArray[np.float64]], *, encoder: str) -> TextScore:
    """Cosine of (items, width) vectors of the texts with the (references, width) vectors of each item, mean over its references.

    Raises
    ------
    InputDatasetError
        Numbers or widths differ, or a vector is all zero or not finite.
    """
    if len(candidates) != len(references) or any(
        one.ndim != 2 or one.shape[1] != candidates.shape[1] or not len(one) for one in references
    ):
        raise InputDatasetError("vectors of texts and references do not belong together", fix="encode both with the same encoder")
    own, others = _unit(candidates), [_unit(one) for one in references]
    values = np.array([float((other @ one).mean()) for one, other in zip(own, others, strict=True)])
    return mean_of(f"sentence cosine ({encoder})", "cosine of sentence vectors, mean over the references of an item", values)


def clip_score(pictures: NDArray[np.float64], texts: NDArray[np.float64], *, encoder: str) -> TextScore:
    """CLIPScore (Hessel 2021): 2.5 · max(cosine, 0) of (items, width) vectors of picture and text from one two-legged encoder."""
    if pictures.shape != texts.shape or pictures.ndim != 2:
        raise InputDatasetError(f"vectors of pictures {pictures.shape} and of texts {texts.shape}", fix="encode both with the same encoder")
    values = 2.5 * np.maximum(0.0, np.sum(_unit(pictures) * _unit(texts), axis=1))
    return mean_of(f"CLIPScore ({encoder})", "agreement of text and picture in the view of a vision-language encoder, 0 to 2.5", values)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    vectors = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(vectors).all() or (norms == 0).any():
        raise InputDatasetError("a vector of a text is zero or not finite", fix="encode again; an empty text has no vector")
    return np.asarray(vectors / norms)


def own_ranks(similarity: NDArray[np.floating], own: Sequence[int]) -> NDArray[np.float64]:
    """(items,) rank of each item's own candidate (column ``own``) in (items, candidates) similarity; the middle rank of ties; 1 is best.

    Raises
    ------
    InputDatasetError
        ``own`` names other than one candidate per item.
    """
    places = np.asarray(own, np.int64)
    if places.shape != (len(similarity),) or ((places < 0) | (places >= similarity.shape[1])).any():
        raise InputDatasetError(f"{similarity.shape} similarities with {len(places)} own candidates", fix="name one candidate per item")
    true = similarity[np.arange(len(places)), places][:, None]
    return np.asarray(0.5 + (similarity > true).sum(axis=1) + 0.5 * (similarity == true).sum(axis=1))


def retrieval(similarity: NDArray[np.floating], own: Sequence[int], *, top: Sequence[int] = (1, 5, 10)) -> dict[str, TextScore]:
    """top_k, mean_rank and percentile among n candidates of (items, candidates) similarity; by chance k/n, (n + 1)/2 and ½."""
    ranks, number = own_ranks(similarity, own), similarity.shape[1]
    found = {
        f"top_{k}": mean_of(f"own among the first {k} of {number}", f"chance {k / number:.4g}", (ranks <= k).astype(np.float64))
        for k in top
        if k < number
    }
    found["mean_rank"] = mean_of(f"mean rank among {number}", f"1 is best, chance {(number + 1) / 2:g}", ranks)
    behind = (number - ranks) / (number - 1) if number > 1 else np.full(len(ranks), np.nan)
    found["percentile"] = mean_of(f"share of {number - 1} others behind", "chance 0.5; also called two-way identification", behind)
    return found


def named_objects(text: str, vocabulary: Mapping[str, Iterable[str]]) -> set[str]:
    """Objects whose words (or their plurals) a text holds; ``vocabulary`` maps an object to its words or phrases."""
    padded = f" {' '.join(tokenise(text))} "
    return {name for name, words in vocabulary.items() if any(f" {form} " in padded for word in words for form in _forms(word))}


def _forms(word: str) -> set[str]:
    one = " ".join(tokenise(word))
    plurals = {f"{one}s", f"{one}es"}
    if one.endswith("y"):
        plurals.add(f"{one[:-1]}ies")
    if one.endswith("fe"):
        plurals.add(f"{one[:-2]}ves")
    return {one, *plurals} - {"s", "es", ""}


def object_f1(candidates: Sequence[str], references: Sequence[Sequence[str]], vocabulary: Mapping[str, Iterable[str]]) -> TextScore:
    """F1 of the objects that texts name against those that any reference names; counts are summed over the set."""
    check_texts(candidates, references)
    label, meaning = f"object F1 ({len(vocabulary)} objects)", "objects named by the text and by any of its references"
    if not vocabulary:
        return not_computed(label, meaning, "no vocabulary of objects was given")
    counts = np.zeros((len(candidates), 2))
    for place, (text, said) in enumerate(zip(candidates, references, strict=True)):
        mine, theirs = named_objects(text, vocabulary), {name for one in said for name in named_objects(one, vocabulary)}
        counts[place] = 2 * len(mine & theirs), len(mine) + len(theirs)

    def f1(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.divide(rows[:, 0], rows[:, 1], out=np.full(len(rows), np.nan), where=rows[:, 1] > 0)

    return TextScore(label=label, meaning=meaning, items=f1(counts), weighted=lambda weights: f1(weights @ counts))


def distinct_share(candidates: Sequence[str]) -> TextScore:
    """How many different texts there are, per text; a constant text gives 1/n."""
    label, meaning = "distinct share", "different texts per text"
    if not candidates:
        return not_computed(label, meaning, "no texts")
    names = [" ".join(tokenise(text)) for text in candidates]
    often = Counter(names)
    # each text counts 1/(how often it was said), so that the values of the items add up to the number of different texts
    values = np.array([1 / often[name] for name in names])
    return TextScore(
        label=label,
        meaning=meaning,
        items=values,
        weighted=lambda weights: weights @ values / weights.sum(1),
        reason="no interval: drawing items with replacement repeats texts",
    )


def mean_of(label: str, meaning: str, values: NDArray[np.float64]) -> TextScore:
    """A score that is the mean of (items,) values; items without a value (NaN) do not count."""
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)

    def mean(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights @ known
        return np.divide(weights @ filled, total, out=np.full(len(weights), np.nan), where=total > 0)

    return TextScore(label=label, meaning=meaning, items=values, weighted=mean)


def _grams(words: Sequence[str]) -> Counter[Gram]:
    return Counter(tuple(words[start : start + size]) for size in range(1, _LONGEST + 1) for start in range(len(words) - size + 1))


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, start=1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]
