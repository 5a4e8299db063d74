"""Windows per second of the drug-response system's series encoder, train and embed, beside the arithmetic floor measured in the same run.

Floor and ratio as in benchmarks/pretrain.py: operations counted by torch, over the rate of large matrix products just before and
just after each timed call. A training step is resampling and scaling, masking, reconstruction, backward, clipping and AdamW; an
embedding is the frozen readout of whole windows. With ``--peak`` (the device's rated operations per second) the share of it that
was used is given too (MFU).

    python benchmarks/series.py --preset tiny base --regions 100 --seconds 200 --batch 16
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pretrain import batch_of, beside_floor, counted_flops, matmul_rate
from torch import nn

from brainfm_cli.learning.checkpoints import AtlasRecord
from brainfm_cli.learning.device import choose_device
from brainfm_cli.systems.drug_response import DrugResponseSettings

if TYPE_CHECKING:
    from brainfm_cli.learning.samples import PretrainBatch
    from brainfm_cli.systems.drug_response import DrugResponse


def system_of(preset: str, regions: int) -> DrugResponse:
    """A new model for an atlas of regions at random places."""
    torch.manual_seed(0)
    centres = 40 * torch.randn(regions, 3)
    places = tuple((float(x), float(y), float(z)) for x, y, z in centres)
    atlas = AtlasRecord(template="T", regions=tuple(f"r{number}" for number in range(regions)), centroids_mm=places)
    return DrugResponseSettings.from_values({"kind": "drug-response", "preset": preset}).build({"A": atlas})


def measure(preset: str, regions: int, seconds: float, batch: int, device: torch.device, *, precision: str, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    system = system_of(preset, regions)
    module = system.module.to(device)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    frames = round(seconds / 2.0)
    data, few = batch_of(batch, regions, device, frames=frames), batch_of(2, regions, device, frames=frames)
    half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def embed(data: PretrainBatch = data) -> None:
        module.eval()
        with half:
            system.graphs(data.first)

    def counted_embed() -> None:  # the counter cannot follow modules where gradients are off
        with half:
            module.series.encoder(system.patches(few.first))

    def step(data: PretrainBatch = data) -> None:
        module.train()
        with half:
            loss = system.losses(data, epoch=1.0)["patch"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()

    def rate() -> float:
        return matmul_rate(device, torch.bfloat16 if precision == "bf16" else torch.float32)

    parameters = sum(parameter.numel() for parameter in module.parameters())
    row: dict[str, Any] = {"preset": preset, "parameters": parameters, "regions": regions, "seconds": seconds, "batch": batch}
    for name, work, counted in (("embed", embed, counted_embed), ("train", step, lambda: step(few))):
        operations = counted_flops(counted) * batch / 2
        took, mean, ratio = beside_floor(work, operations, rate, device, repeats=repeats)
        row |= {
            f"{name}_gflops_per_window": round(operations / batch / 1e9, 3),
            f"{name}_windows_per_second": round(batch / took, 2),
            f"{name}_matmul_gflops_per_second": round(mean / 1e9, 1),
            f"{name}_over_floor": round(ratio, 2),
            f"{name}_flops_per_second": operations / took,
        }
    if device.type == "cpu":
        row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    return row


def main() -> None:
    """Print one row per preset and number of regions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["tiny", "base", "large"])
    parser.add_argument("--regions", type=int, nargs="+", default=[100])
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--peak", type=float, help="rated operations per second of the device, for MFU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device, rows = choose_device(arguments.device), []
    for preset in arguments.preset:
        for regions in arguments.regions:
            row = measure(
                preset, regions, arguments.seconds, arguments.batch, device, precision=arguments.precision, repeats=arguments.repeats
            )
            for name in ("embed", "train"):
                used = row.pop(f"{name}_flops_per_second")
                if arguments.peak:
                    row[f"{name}_mfu"] = round(used / arguments.peak, 3)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
