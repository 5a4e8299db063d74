"""What aligned mri-language models expect of people who took no part: the loss of their true report, and which disease each answer makes likeliest.

For ablations of ``align`` on the same people (``--set fit.contrast=false``): nothing is generated, so that a model costs seconds a person. The loss
is the mean cross-entropy of a token of the report, facts standing in the question; the disease is chosen among those of training reports by the
likelihood of the answer. Differences are paired over people.

    python benchmarks/mri_alignment.py DATASET aligned/models/ID other/models/ID --cohort aligned
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from brainfm_cli.bids.inputs import list_participants
from brainfm_cli.bids.reports import find_reports, read_reports
from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.config import Selection
from brainfm_cli.learning.radiology_reports import said_of
from brainfm_cli.learning.report_tasks import (
    DISEASE,
    PRESENT,
    closed_truth,
    facts_sentence,
    language_written_in,
    report_answer,
    report_question,
    restated,
)
from brainfm_cli.learning.uncertainty import resample_weights
from brainfm_cli.signals.slice_packing import SliceSettings
from brainfm_cli.signals.study_facts import study_facts
from brainfm_cli.systems.mri_language.speaking import cell_features, context_of_rows, load_teller

RESAMPLES = 2000


@torch.no_grad()
def read(model: Path, raw: Path, cohort: SliceCohort, *, diseases: bool) -> pd.DataFrame:
    """A row per test person of the model: loss of the true report with and without images, and whether the likeliest disease is the right one."""
    loaded = load_teller(model)
    split = pd.read_csv(model / "split.tsv", sep="\t", dtype=str)
    people = split.loc[split["role"] == "test", "participant_id"].tolist()
    reports = read_reports(find_reports(raw, None), list_participants(raw))
    features = cell_features(loaded.system.model.encoder, cohort, people)
    without, teller = loaded.teller.without_images(), loaded.teller
    rows = []
    for label in people:
        report = reports[label]
        written_in = language_written_in(report)
        if loaded.record.restated:
            report = restated(report)
        facts = study_facts(raw, label, Selection(), SliceSettings(), ()) if loaded.record.fit.facts else None
        prefix, _ = teller.read(features.slices[label], context_of_rows(cohort, features.rows[label]))
        turns = ((report_question(facts), report_answer(report)),)
        row: dict[str, Any] = {"person": label, "language": written_in}
        for name, given in (("images", prefix), ("no images", without)):
            said = teller.language.dialogues([turns], room=teller.speaker.num_vectors, longest=teller.fit.longest)
            row[f"report loss, {name}"] = float(teller.language.dialogue_loss(given, said)[0])
        true = closed_truth(DISEASE, report.text)
        if diseases and true:
            opening = (f"{facts_sentence(facts)} {PRESENT}".strip(), "Yes.")
            asked = [(opening, (DISEASE, f"{said_of('diseases', name).capitalize()}.")) for name in loaded.record.diseases]
            said = teller.language.dialogues(asked, room=teller.speaker.num_vectors, longest=teller.fit.longest)
            total = teller.language.dialogue_loss(prefix.expand(len(asked), -1, -1), said) * said.learnt[:, 1:].sum(dim=1)
            row["disease right"] = float(loaded.record.diseases[int(total.argmin())] == true)
        rows.append(row)
    return pd.DataFrame(rows).set_index("person")


def show(name: str, values: pd.Series) -> None:
    """Mean over people and its 95 % interval."""
    known = values.dropna()
    weights = resample_weights(list(known.index), RESAMPLES, np.random.default_rng(0))
    low, high = np.percentile(weights @ known.to_numpy(float) / len(known), [2.5, 97.5]).round(4).tolist()
    print(json.dumps({"what": name, "people": len(known), "mean": round(float(known.mean()), 4), "low": low, "high": high}), flush=True)


def main() -> None:
    """Print means by model, by language of the original report, and what the first model has less than each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--cohort", type=Path, required=True, help="where the slices are packed: the output of align")
    parser.add_argument("--diseases", action="store_true", help="choose among diseases too: twice the time")
    given = parser.parse_args()
    cohort = SliceCohort.open(given.cohort)
    tables = {str(model): read(model, given.dataset, cohort, diseases=given.diseases) for model in given.models}
    for model, table in tables.items():
        scores = [name for name in table.columns if name != "language"]
        for score in scores:
            show(f"{model}: {score}", table[score])
            for language, mine in table.groupby("language"):
                show(f"{model}: {score}, reports in {language}", mine[score])
        show(f"{model}: report loss, images less no images", table["report loss, images"] - table["report loss, no images"])
    first, *others = tables
    for other in others:
        for score in scores:
            show(f"{first} less {other}: {score}", tables[first][score] - tables[other][score])


if __name__ == "__main__":
    main()
