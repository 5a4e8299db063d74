"""How often the intervals of a reader study hold the planted value, and how often a null contrast is called different.

Studies are simulated with the model of Roe & Metz (brainfm_cli/simulation/reading.py), whose areas over other readers and cases
are known, and analysed as 'predict group --reader-study' does. Contrasts: the arm (readers with the model less readers alone),
kinds of readers (seniority, hospital tier, specialty), the difference of their benefits, and the model less the readers.

    python benchmarks/reader_study.py --studies 2000 --out reader_study.json
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binom

from brainfm_cli.learning.reader_study import analyse
from brainfm_cli.learning.reading_table import ReaderStudySettings, Readings
from brainfm_cli.simulation.reading import ALONE, ARMS, ASSISTED, ReadingDesign, simulate_scores

if TYPE_CHECKING:
    from collections.abc import Iterator

    from brainfm_cli.learning.mrmc import Estimate
    from brainfm_cli.learning.reader_study import Endpoint

SETTINGS = ReaderStudySettings(bootstraps=10)
SENIORITY = ReadingDesign()
TIER = ReadingDesign(
    column="tier",
    readers={"primary": 4, "secondary": 4, "tertiary": 4},
    auc={
        ("primary", ALONE): 0.72, ("primary", ASSISTED): 0.84, ("secondary", ALONE): 0.78, ("secondary", ASSISTED): 0.85,
        ("tertiary", ALONE): 0.84, ("tertiary", ASSISTED): 0.87,
    },
)  # fmt: skip
SPECIALTY = ReadingDesign(
    column="specialty",
    readers={"brain specialist": 3, "generalist": 6},
    auc={
        ("brain specialist", ALONE): 0.88, ("brain specialist", ASSISTED): 0.89, ("generalist", ALONE): 0.76, ("generalist", ASSISTED): 0.86,
    },
)  # fmt: skip
DESIGNS: dict[str, ReadingDesign] = {
    "seniority, planted": SENIORITY,
    "seniority, null": replace(SENIORITY, auc=dict.fromkeys(SENIORITY.auc, 0.82), model_auc=0.82),
    "tier, planted": TIER,
    "tier, null": replace(TIER, auc=dict.fromkeys(TIER.auc, 0.82), model_auc=0.82),
    "specialty, planted": SPECIALTY,
    "specialty, null": replace(SPECIALTY, auc=dict.fromkeys(SPECIALTY.auc, 0.82), model_auc=0.82),
    "trial, other doctors per arm, planted": replace(SENIORITY, nested=True, readers={"junior": 8, "senior": 8}),
    "trial, other doctors per arm, null": replace(
        SENIORITY, nested=True, readers={"junior": 8, "senior": 8}, auc=dict.fromkeys(SENIORITY.auc, 0.82), model_auc=0.82
    ),
}


def contrasts(endpoint: Endpoint, design: ReadingDesign) -> Iterator[tuple[str, float, Estimate]]:
    """(name, planted value, estimate) of every contrast of one study."""
    yield "arm", design.true_mean(ASSISTED) - design.true_mean(ALONE), endpoint.changes[0].random
    for gap in endpoint.gaps:
        planted = design.auc[gap.first, gap.arm] - design.auc[gap.second, gap.arm]
        if gap.benefit:
            planted -= design.auc[gap.first, ALONE] - design.auc[gap.second, ALONE]
        if gap.difference.low is not None:
            yield f"{gap.first} − {gap.second}, {'benefit' if gap.benefit else gap.arm}", planted, gap.difference
    for arm, estimate in endpoint.model_less_readers.items():
        yield f"model − readers, {arm}", design.model_auc - design.true_mean(arm), estimate


def study(design: ReadingDesign, seed: int) -> Endpoint:
    """The AUC endpoint of one simulated study."""
    made = simulate_scores(design, np.random.default_rng([20261126, seed]))
    readings = Readings(
        arms=ARMS,
        readers=tuple(f"{kind} {place}" for place, kind in enumerate(made.kinds)),
        cases=tuple(str(number) for number in range(len(made.truth))),
        scores=made.scores,
        truth=made.truth,
        strata={design.column: made.kinds},
        model_scores=made.model,
    )
    return analyse(readings, SETTINGS).endpoints[0]


def coverage(design: ReadingDesign, studies: int) -> list[dict[str, float | str]]:
    """Per contrast: planted value, mean estimate, share of intervals that hold the planted value, share of p below 0.05."""
    seen: dict[str, list[tuple[float, float, bool, bool]]] = {}
    for seed in range(studies):
        for name, planted, found in contrasts(study(design, seed), design):
            assert found.value is not None
            held = found.low is not None and found.high is not None and found.low <= planted <= found.high
            seen.setdefault(name, []).append((planted, found.value, held, (found.p or 1.0) < 0.05))
    rows: list[dict[str, float | str]] = []
    for name, values in seen.items():
        planted, estimates, held, called = (np.array(column, float) for column in zip(*values, strict=True))
        rows.append(
            {
                "contrast": name,
                "studies": len(values),
                "planted": round(float(planted[0]), 4),
                "mean": round(float(estimates.mean()), 4),
                "spread": round(float(estimates.std(ddof=1)), 4),
                "coverage": round(float(held.mean()), 4),
                "called": round(float(called.mean()), 4),
            }
        )
    return rows


def main() -> None:
    """Run every design and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("reader_study.json"))
    options = parser.parse_args()
    low, high = (binom.ppf(q, options.studies, 0.95) / options.studies for q in (0.025, 0.975))
    print(f"{options.studies} studies per design; nominal coverage 95 % would be seen between {low:.3f} and {high:.3f}\n")
    print("| design | contrast | planted | mean estimate | spread | coverage | p < 0.05 |\n|---|---|---|---|---|---|---|")
    results = {}
    for name, design in DESIGNS.items():
        started = time.perf_counter()
        results[name] = coverage(design, options.studies)
        for row in results[name]:
            cells = (f"{row[key]:+.3f}" if key in ("planted", "mean") else f"{row[key]:.3f}" for key in ("planted", "mean", "spread", "coverage", "called"))  # fmt: skip
            print(f"| {name} | {row['contrast']} | {' | '.join(cells)} |")
        print(f"<!-- {time.perf_counter() - started:.0f} s -->", flush=True)
    options.out.write_text(
        json.dumps({"studies": options.studies, "designs": results}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
