"""Checks of an evaluation itself: the same scan under two names, pretraining people, sites that give labels away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold

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
# Two scans of one person are each other's nearest by a margin (Fisher z of the correlation). Measured on 155 people of one
# study, halves of a scan (84 frames) standing for two scans: 0.2 finds about three quarters of the pairs and accuses one or two pairs of strangers.
_SAME_PERSON_MARGIN = 0.2
_FEW = 20
_SITE_FOLDS = 5
_SITE_PEOPLE = 10  # people that a site needs to be told from connectivity


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


def audit_people(split: Split, kernels: Mapping[str, Kernel]) -> AuditItem:
    """Pairs of participants who look like two scans of one person: each other's nearest, by far, in all atlases together.

    A fingerprint is no proof, neither of sameness nor of difference, so this never refuses.
    """
    check = "One person under two names"
    if not kernels:
        return AuditItem(check=check, verdict="not checked", text="No connectivity floor was fitted, so connectivity was not compared.")
    names = next(iter(kernels.values())).participants
    if len(names) < _FEW:
        return AuditItem(check=check, verdict="not checked", text=f"Fewer than {_FEW} people to compare with.")
    alike = np.mean([np.arctanh(np.clip(kernel.similarity(), -_SAME_SCAN, _SAME_SCAN)) for kernel in kernels.values()], axis=0)
    np.fill_diagonal(alike, -np.inf)
    nearest, ranked = alike.argmax(1), np.sort(alike, axis=1)
    margin = ranked[:, -1] - ranked[:, -2]
    pairs = [
        (names[row], names[other])
        for row, other in enumerate(nearest)
        if row < other and nearest[other] == row and min(margin[row], margin[other]) > _SAME_PERSON_MARGIN
    ]
    together = split.groups
    apart = [(a, b) for a, b in pairs if a in together and b in together and together[a] != together[b]]
    if not apart:
        return AuditItem(check=check, verdict="passed", text="No two participants' connectivity stands out as one person's (short scans can hide it).")  # fmt: skip
    text = f"{len(apart)} pairs look like two scans of one person ({'; '.join(f'{a} and {b}' for a, b in apart[:5])}): if they are, give both one value of a column and set design.group to it."  # fmt: skip
    return AuditItem(check=check, verdict="warning", text=text)


def audit_site_in_connectivity(kernels: Mapping[str, Kernel], table: pd.DataFrame, column: str = "site") -> AuditItem:
    """How well sites are told from connectivity, by cross-validated logistic regression."""
    check = "Sites in connectivity"
    if not kernels or column not in table:
        return AuditItem(check=check, verdict="not checked", text="No connectivity floor was fitted, or no site is known.")
    names = next(iter(kernels.values())).participants
    sites = table.loc[list(names), column].map(class_text)
    counts = sites[sites != ""].value_counts()
    large = [str(site) for site in counts.index[counts >= _SITE_PEOPLE]]
    if len(large) < 2:
        return AuditItem(check=check, verdict="not checked", text=f"Fewer than two sites have {_SITE_PEOPLE} people.")
    people = [name for name in names if sites[name] in large]
    labels = sites[people].to_numpy()
    best, where = 0.0, ""
    for atlas, kernel in kernels.items():
        decided = np.empty(len(people), dtype=object)
        for train, test in StratifiedKFold(_SITE_FOLDS, shuffle=True, random_state=0).split(labels[:, None], labels):
            inside, outside = kernel.coordinates([people[row] for row in train], [people[row] for row in test])
            decided[test] = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000).fit(inside, labels[train]).predict(outside)
        score = float(balanced_accuracy_score(labels, decided.astype(str)))
        best, where = max((best, where), (score, atlas))
    chance = 1 / len(large)
    told = f"Balanced accuracy {best:.2f} for {len(large)} sites from connectivity ({where}); chance is {chance:.2f}."
    verdict: Literal["warning", "passed"] = "warning" if best > chance + (1 - chance) / 4 else "passed"
    return AuditItem(check=check, verdict=verdict, text=told + (" Scores of a target that differs between sites may be scores of the site." if verdict == "warning" else ""))  # fmt: skip


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
