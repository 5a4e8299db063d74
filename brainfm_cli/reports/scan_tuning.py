"""What a report and a model card say of an encoder of scans that was tuned: scores of test people beside floors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from brainfm_cli.reports.page import Section, paragraph, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd


def scores_section(scores: pd.DataFrame) -> Section:
    """Every score of every method with its interval; ``scores`` has score, method, value, low, high, reason, people, seed."""
    if scores.empty:
        return Section(title="Test people", blocks=(paragraph("Nobody tested (test_fraction is 0): nothing is claimed of this model."),))
    return Section(
        title="Test people",
        lead="People who neither trained nor chose anything; intervals are bootstrapped over people. The model must be above every floor.",
        blocks=(table(with_intervals(scores)),),
    )


def with_intervals(scores: pd.DataFrame, *further: str) -> pd.DataFrame:
    """The scores as they are printed, after any ``further`` columns."""
    shown = scores[[*further, "score", "method", "value", "people", "seed"]].copy()
    ends = [_ends(low, high, reason) for low, high, reason in zip(scores["low"], scores["high"], scores["reason"], strict=True)]
    shown.insert(3 + len(further), "95 % interval", ends)
    return shown


_ENCODER = {"linear": "the encoder is unchanged", "lora": "low-rank weights were added to the unchanged encoder (adapted.safetensors)", "full": "the encoder was trained further (adapted.safetensors)"}  # fmt: skip


def tuning_card(name: str, what: str, scores: pd.DataFrame, *, tune: str, trained: int, tested: int, notes: Sequence[str]) -> str:
    """README.md of the model folder, with the first score of every method."""
    first = scores if scores.empty else scores[scores["score"] == scores["score"].iloc[0]]
    people = f"On {tested} test people (95 % intervals over people):" if len(first) else "Nobody tested: nothing is claimed of it."
    records = first.to_dict("records")
    lines = [
        f"* {one['score']}, {one['method']}: {_number(one['value'])} ({_ends(one['low'], one['high'], one['reason'])})" for one in records
    ]
    return (
        f"# {name}\n\nAn `mri-language` encoder tuned for {what} by `brainfm prompt-tune` on {trained} people; {_ENCODER[tune]}.\n\n"
        f"{people}\n\n" + "\n".join(lines) + "\n\n" + "".join(f"* {note}\n" for note in notes)
        + "\nUse: `brainfm predict DATASET OUTPUT participant --model THIS_FOLDER`. The model is no medical device and not for clinical use.\n"
    )  # fmt: skip


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) and value == value else "not computed"  # noqa: PLR0124  (NaN alone differs from itself)


def _ends(low: object, high: object, reason: object) -> str:
    if not isinstance(low, float) or not isinstance(high, float) or low != low:  # noqa: PLR0124
        return f"no interval: {reason}" if isinstance(reason, str) else "no interval"
    return f"{low:.3f} to {high:.3f}"
