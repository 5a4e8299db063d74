"""Checks of an evaluation itself: the same scan under two names, pretraining people, sites that give labels away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.results import AuditItem
from brainfm_cli.learning.targets import class_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from brainfm_cli.learning.kernels import Kernel
    from brainfm_cli.learning.splits import Split
    from brainfm_cli.learning.targets import Target

# Two scans of one person correlate below 0.95 (centred Fisher-z profiles); a copy of one scan at 1 but for rounding.
_SAME_SCAN = 0.9999
_FEW = 20


def audit_scans(split: Split, kernels: Mapping[str, Kernel]) -> AuditItem:
    """Whether one scan occurs under two participant names.

    Raises
    ------
    InputDatasetError
        It does, and a fold has one name in training and the other in test.
    """
    check = "Same scan under two names"
    if not kernels:
        return AuditItem(check=check, verdict="not checked", text="No connectivity floor was fitted, so connectivity was not compared.")
    pairs: set[tuple[str, str]] = set()
    for kernel in kernels.values():
        alike = np.argwhere(np.triu(kernel.similarity() > _SAME_SCAN, k=1))
        pairs |= {(kernel.participants[a], kernel.participants[b]) for a, b in alike}
    for first, second in sorted(pairs):
        for fold in split.folds():
            if len({first, second} & set(fold.train)) == 1 and len({first, second} & set(fold.test)) == 1:
                raise InputDatasetError(
                    f"the split leaks: {first} and {second} have the same scan and are on both sides of repeat {fold.repeat}, fold {fold.fold}",
                    fix="remove one of them ('where'), or give both one value of a column and set design.group to it",
                )
    if pairs:
        text = "; ".join(f"{a} = {b}" for a, b in sorted(pairs)[:5])
        return AuditItem(
            check=check, verdict="warning", text=f"{len(pairs)} pairs of people have the same scan, always on one side: {text}."
        )
    return AuditItem(
        check=check, verdict="passed", text=f"No two participants have the same connectivity (correlation above {_SAME_SCAN})."
    )


def audit_pretraining(overlap: int | None, tested: int) -> AuditItem:
    """Whether test people were in a model's pretraining; ``overlap`` is none where no model says whom it saw."""
    check = "Pretraining people in the test set"
    if overlap is None:
        return AuditItem(check=check, verdict="not checked", text="No model with a list of pretraining people was evaluated.")
    if overlap:
        return AuditItem(check=check, verdict="warning", text=f"Transductive: {overlap} of {tested} test people were in the pretraining (without labels).")  # fmt: skip
    return AuditItem(check=check, verdict="passed", text="None of the test people was in the pretraining.")


def audit_site(target: Target, table: pd.DataFrame, column: str = "site") -> AuditItem:
    """Whether sites give the label away."""
    check = "Sites and labels"
    rows = table.loc[list(target.participants)]
    if column not in rows or len(sites := set(rows[column].map(class_text)) - {""}) < 2:
        return AuditItem(check=check, verdict="not checked", text="Fewer than two sites are known.")
    names = rows[column].map(class_text)
    if target.kind == "continuous":
        values = pd.Series(target.observed, index=names.index)
        share = float(((values.groupby(names).transform("mean") - values.mean()) ** 2).sum() / ((values - values.mean()) ** 2).sum())
        return AuditItem(
            check=check,
            verdict="warning" if share > 0.1 else "passed",
            text=f"Site alone explains {share:.0%} of the variance of '{target.name}'.",
        )
    counts = pd.crosstab(names, [target.classes[int(code)] for code in target.observed])
    if {class_text(value) for value in rows[column]} - {""} == set(target.classes) and bool((counts.gt(0).sum() == 1).all()):
        return AuditItem(check=check, verdict="warning", text=f"'{target.name}' is the site itself.")
    single = [str(site) for site in counts.index[counts.gt(0).sum(axis=1) == 1]]
    expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / counts.to_numpy().sum()
    chi2 = float(((counts.to_numpy() - expected) ** 2 / expected).sum())
    association = float(np.sqrt(chi2 / counts.to_numpy().sum() / (min(counts.shape) - 1)))
    if len(single) == len(sites):
        return AuditItem(check=check, verdict="warning", text=f"Every site has one class of '{target.name}' only: site and label cannot be told apart, and no score here speaks for the label.")  # fmt: skip
    text = f"Association of site and '{target.name}': Cramér's V = {association:.2f}."
    if single:
        text += f" One class only at: {', '.join(single[:10])}."
    return AuditItem(check=check, verdict="warning" if single or association > 0.3 else "passed", text=text)


def audit_size(target: Target) -> AuditItem:
    """Whether the smallest class (or the cohort) is too small for more than a hint."""
    smallest = min(target.counts().values()) if target.classes else len(target.participants)
    what = "smallest class" if target.classes else "test set"
    return AuditItem(
        check="Number of people", verdict="warning" if smallest < _FEW else "passed", text=f"The {what} has {smallest} people."
    )
