"""Slices per second of the mri-language encoder by preset, and memory of training from a store that is larger than memory should hold.

Training makes two augmented, masked views of each slice, with all losses. Floor and ratio as in benchmarks/pretrain.py: operations
counted by torch, over the rate of large matrix products just before and just after each timed call; ``--peak`` gives the share of the
device's rated operations per second (MFU). ``--stream`` writes a store of so many slices, trains ``--steps`` steps on batches drawn from all
of it, with all losses, reads every other batch of the epoch, and watches the memory of the process (anonymous pages, peak over all steps).

    python benchmarks/volume.py --preset nano tiny small --batch 16
    python benchmarks/volume.py --stream 200000 --preset nano --steps 400
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pretrain import beside_floor, counted_flops, matmul_rate, total_loss
from torch import nn

from brainfm_cli.bids.slice_cohort import PackedScan, SliceCohort, write_index, write_participant
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.slice_samples import SliceBatch, SliceBatches
from brainfm_cli.systems.mri_language import MriLanguage, MriLanguageSettings
from brainfm_cli.systems.mri_language.encoder import context_of

COUNTED = 2
PER_PERSON = 500


def system_of(preset: str, dims: int) -> MriLanguage:
    """A new model."""
    torch.manual_seed(0)
    return MriLanguageSettings.from_values({"kind": "mri-language", "preset": preset, "dims": dims}).build()


def batch_of(batch: int, size: int, dims: int, device: torch.device) -> SliceBatch:
    """Round heads of random intensities, each of another person."""
    torch.manual_seed(1)
    axes = torch.meshgrid(*(torch.linspace(-1, 1, size),) * dims, indexing="ij")
    head = sum(axis.square() for axis in axes) < 0.6
    zeros = torch.zeros(batch, dtype=torch.int64)
    return SliceBatch(
        images=(torch.randint(1, 256, (batch, *head.shape)) * head).to(torch.uint8),
        sequence=zeros, plane=zeros, z_mm=torch.zeros(batch), participant=torch.arange(batch), keys=torch.arange(batch) + 7,
    ).to(device)  # fmt: skip


def measure(preset: str, batch: int, size: int | None, dims: int, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    system = system_of(preset, dims)
    side = size or system.settings.size
    module = system.module.to(device)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    data, few = batch_of(batch, side, dims, device), batch_of(COUNTED, side, dims, device)
    half = torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16")

    def encode(given: SliceBatch) -> None:
        module.eval()
        with half:
            system.model.encoder(given.images.float() / 255, context_of(given))

    @torch.no_grad()
    def infer() -> None:
        encode(data)

    def step(given: SliceBatch = data) -> None:
        module.train()
        with half:
            terms = system.losses(given, epoch=0.0)
        loss = total_loss(system, terms)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()

    row: dict[str, Any] = {
        "preset": preset, "dims": dims, "size": side, "batch": batch, "precision": arguments.precision, "device": str(device),
        "threads": torch.get_num_threads(), "parameters": sum(parameter.numel() for parameter in module.parameters()),
    }  # fmt: skip
    for name, work, counted in (("infer", infer, lambda: encode(few)), ("train", step, lambda: step(few))):
        operations = counted_flops(counted) * batch / COUNTED
        rate = lambda: matmul_rate(device, torch.bfloat16 if arguments.precision == "bf16" else torch.float32)  # noqa: E731
        took, mean, ratio = beside_floor(work, operations, rate, device, repeats=arguments.repeats)
        row |= {
            f"{name}_gflops_per_slice": round(operations / batch / 1e9, 3),
            f"{name}_slices_per_second": round(batch / took, 2),
            f"{name}_matmul_gflops_per_second": round(mean / 1e9, 1),
            f"{name}_over_floor": round(ratio, 2),
        }
        if arguments.peak:
            row[f"{name}_mfu"] = round(operations / took / arguments.peak, 3)
    row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    return row


def write_store(root: Path, count: int, size: int) -> SliceCohort:
    """A packed cohort of random slices, 500 of each person."""
    rng, tables, people = np.random.default_rng(0), [], []
    for number in range(-(-count // PER_PERSON)):
        label = f"{number:05d}"
        items = rng.integers(0, 256, (PER_PERSON, size, size), dtype=np.uint8)
        scan = PackedScan(
            name=f"sub-{label}_T1w", path=f"sub-{label}/anat/sub-{label}_T1w.nii.gz", session="", sequence="T1w", grid={}, native_shape=(size, size, PER_PERSON),
            native_affine=tuple(map(tuple, np.eye(4).tolist())), mask=None, labels={}, notes=(),
        )  # fmt: skip
        rows = pd.DataFrame(
            {
                "dataset": "random", "participant": label, "session": "", "site": "", "scan": scan.name, "sequence": "T1w", "plane": "axial",
                "item": np.arange(PER_PERSON, dtype=np.int32), "slice": np.arange(PER_PERSON, dtype=np.int32), "z_mm": np.float32(0), "brain": np.float32(0.5),
                "noise": np.float32(0), "ghosting": np.float32(0), "entropy": np.float32(4), "lesion": np.int32(-1), "why": "",
            }
        )  # fmt: skip
        write_participant(root / f"sub-{label}", iter([(scan, rows, items, None)]))
        tables.append(pd.read_parquet(root / f"sub-{label}" / "items.parquet"))
        people.append(f"sub-{label}")
    described = {"size": size, "dims": 2, "labels": {}, "items_sha256": {}}
    write_index(root, pd.concat(tables, ignore_index=True), pd.DataFrame({"participant_id": people}), described)
    return SliceCohort.open(root)


def stream(count: int, preset: str, batch: int, steps: int) -> dict[str, Any]:
    """Memory while an epoch's batches of a store are read, of which the first ``steps`` are trained on with all losses."""
    system = system_of(preset, 2)
    with tempfile.TemporaryDirectory(prefix="brainfm-") as folder:
        cohort = write_store(Path(folder), count, system.settings.size)
        source = SliceBatches(
            cohort=cohort, rows=np.arange(len(cohort.slices)), validation_rows=np.array([], np.int64), batch_size=batch, seed=0
        )
        epoch: Any = source.training(0, rank=0, world_size=1)
        optimiser = torch.optim.AdamW(system.module.parameters(), lr=1e-4)
        people, memory, began = set(), [_anonymous_mb()], time.perf_counter()
        for place in range(steps):
            given = epoch[place]
            people |= set(given.participant.tolist())
            loss = total_loss(system, system.losses(given, epoch=0.0))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            memory.append(_anonymous_mb())
        started = time.perf_counter()
        for place in range(steps, len(epoch)):
            epoch[place]
        rest = len(epoch) - steps
        return {
            "slices": len(cohort.slices), "size": cohort.size, "store_gb": round(len(cohort.slices) * cohort.size**2 / 1e9, 2), "steps": steps,
            "batch": batch, "people_trained_on": len(people), "trained_slices_per_second": round(steps * batch / (started - began), 1),
            "anonymous_mb_before": memory[0], "anonymous_mb_after_a_tenth": max(memory[: 1 + steps // 10]), "anonymous_mb_peak": max(memory),
            "anonymous_mb_after_epoch": _anonymous_mb(), "read_slices_per_second": round(rest * batch / (time.perf_counter() - started)),
        }  # fmt: skip


def _anonymous_mb() -> float:
    """Memory that no file lies behind: what the kernel cannot drop."""
    (line,) = (one for one in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if one.startswith("RssAnon"))
    return round(int(line.split()[1]) * 1.024e-3, 1)


def main() -> None:
    """Print one row per preset, or that of the store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["nano"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=None)
    parser.add_argument("--dims", type=int, default=2, choices=(2, 3))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--peak", type=float, default=None, help="rated operations per second of the device, e.g. 989e12")
    parser.add_argument("--stream", type=int, default=None, help="slices of a store whose reading is measured")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for preset in arguments.preset:
        if arguments.stream:
            row = stream(arguments.stream, preset, arguments.batch, arguments.steps)
        else:
            row = measure(preset, arguments.batch, arguments.size, arguments.dims, choose_device(arguments.device), arguments)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
