"""What is right in a written report, read by the parser: the disease, whether there is one, its side and place; and what contradicts a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.learning.radiology_reports import affirmed, check_report, parse_report
from brainfm_cli.learning.report_tasks import main_finding
from brainfm_cli.learning.text_scores import TextScore, mean_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.learning.radiology_reports import Finding
    from brainfm_cli.signals.lesions import LesionFacts

_DISEASE = "share whose main disease (or its absence) is that of the true report"
_PRESENCE = "share that tells a lesion where the true report has none, or none where it has one"
_SIDE = "share that names another side than the true report, of those where both name one; lower is better"
_PLACE = "share that names a part of the brain of the true report, of those where that names one"
_MASK = "share with at least one statement that the measured mask does not bear out, of those with a mask; lower is better"


def report_scores(
    candidates: Sequence[str], references: Sequence[Sequence[str]], facts: Sequence[LesionFacts | None]
) -> dict[str, TextScore]:
    """Scores of what reports say; the first reference of each is the true report, ``facts`` are measured in its mask."""
    said, true = [main_finding(text) for text in candidates], [main_finding(texts[0]) for texts in references]
    places = [_places(texts[0]) for texts in references]
    return {
        "disease": mean_of("disease right", _DISEASE, _values(said, true, lambda one, other: float(_name(one) == _name(other)))),
        "presence": mean_of("presence errors", _PRESENCE, _values(said, true, lambda one, other: float((one is None) != (other is None)))),
        "side": mean_of("side errors", _SIDE, _values(said, true, _side_error)),
        "place": mean_of(
            "place right", _PLACE, np.array([float(bool(_places(text) & wanted)) if wanted else np.nan for text, wanted in zip(candidates, places, strict=True)])
        ),
        "mask": mean_of(
            "contradicts the mask", _MASK, np.array([np.nan if known is None else float(bool(check_report(text, known))) for text, known in zip(candidates, facts, strict=True)])
        ),
    }  # fmt: skip


def _values(
    said: Sequence[Finding | None], true: Sequence[Finding | None], of: Callable[[Finding | None, Finding | None], float]
) -> NDArray[np.float64]:
    return np.array([of(one, other) for one, other in zip(said, true, strict=True)], np.float64)


def _name(finding: Finding | None) -> str:
    return "" if finding is None else finding.disease


def _side_error(said: Finding | None, true: Finding | None) -> float:
    if said is None or true is None or said.side is None or true.side is None:
        return float("nan")
    return float(said.side != true.side)


def _places(text: str) -> set[str]:
    return {place for one in affirmed(parse_report(text)) for place in one.places}
