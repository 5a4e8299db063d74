"""Trials per second of the brain-caption system: pretraining, encoding, alignment through a frozen language model, and caption tokens per second.

Floor and ratio as in benchmarks/pretrain.py: operations counted by torch, over the rate of large matrix products just before and
just after each timed call. With ``--peak`` (the device's rated operations per second) the share of it that was used is given too (MFU).

    python benchmarks/voxel.py --preset nano small base --voxels 15724 --batch 16
    python benchmarks/voxel.py --preset nano --voxels 320 --batch 32 --llm smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from typing import Any

import torch
from pretrain import beside_floor, counted_flops, matmul_rate
from torch import nn

from brainfm_cli.learning.checkpoints import ViewerRecord
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.voxel_samples import TrialBatch
from brainfm_cli.systems.brain_caption import BrainCaption, BrainCaptionSettings
from brainfm_cli.systems.brain_caption.aligned import CaptionFitSettings, build_captioner, load_language

CAPTION = "A red dog is under a table in the kitchen."


def system_of(preset: str, voxels: int, first_layer: str) -> BrainCaption:
    """A new model of one participant with voxels at random places."""
    torch.manual_seed(0)
    record = ViewerRecord(voxels=voxels, space="T1w", mask_sha256="", order_sha256="")
    settings = BrainCaptionSettings.from_values({"kind": "brain-caption", "preset": preset, "first_layer": first_layer})
    return settings.assemble({"01": record}, {"01": 30 * torch.randn(voxels, 3)})


def batch_of(batch: int, voxels: int, device: torch.device) -> TrialBatch:
    """Random responses, each with the same caption."""
    torch.manual_seed(1)
    return TrialBatch(
        participant="01",
        responses=torch.randn(batch, voxels),
        keys=torch.arange(batch),
        images=torch.arange(batch),
        names=tuple(str(number) for number in range(batch)),
        captions=(CAPTION,) * batch,
    ).to(device)


def measure(arguments: argparse.Namespace, preset: str, voxels: int, device: torch.device) -> dict[str, Any]:
    """One row of the table."""
    system = system_of(preset, voxels, arguments.first_layer)
    module = system.module.to(device)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    data, few = batch_of(arguments.batch, voxels, device), batch_of(2, voxels, device)
    half = torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16")

    def encode(batch: TrialBatch = data) -> None:
        module.eval()
        with half:
            system.model.encoder(system.model.patches("01", batch.responses))

    @torch.no_grad()
    def timed_encode() -> None:
        encode()

    def step(batch: TrialBatch = data) -> None:
        module.train()
        with half:
            loss = system.losses(batch, epoch=0.0)["patch"]
        _update(module, optimiser, loss)

    row: dict[str, Any] = {
        "preset": preset, "first_layer": arguments.first_layer, "voxels": voxels, "patches": -(-voxels // 16), "batch": arguments.batch,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "encoder_parameters": sum(parameter.numel() for parameter in system.model.encoder.parameters()),
    }  # fmt: skip
    _add(row, "encode", timed_encode, lambda: encode(few), arguments, device)
    _add(row, "train", step, lambda: step(few), arguments, device)
    if arguments.llm:
        _measure_alignment(row, system, arguments, data, few, device)
    if device.type == "cpu":
        row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    return row


def _measure_alignment(
    row: dict[str, Any], system: BrainCaption, arguments: argparse.Namespace, data: TrialBatch, few: TrialBatch, device: torch.device
) -> None:
    language = load_language(arguments.llm).to(device)
    captioner = build_captioner(system, CaptionFitSettings(alignment=False), language, contrast_width=384, seed=0)
    captioner.model.to(device)
    optimiser = torch.optim.AdamW(captioner.model.parameters(), lr=1e-4, fused=True)

    def step(batch: TrialBatch = data) -> None:
        captioner.model.train()
        _update(captioner.model, optimiser, captioner.losses(batch, epoch=0.0)["language"])

    _add(row, "align", step, lambda: step(few), arguments, device)
    row["q_former_parameters"] = sum(parameter.numel() for parameter in captioner.model.bridge.parameters())
    captioner.model.eval()
    scaled = captioner.model.scale("01", data.responses)
    tokens = 20

    def speak() -> None:
        captioner.say("01", scaled, max_tokens=tokens)

    took, _, _ = beside_floor(speak, 1.0, lambda: 1.0, device, repeats=arguments.repeats)
    row["caption_tokens_per_second"] = round(arguments.batch * tokens / took, 1)  # at most: captions may end earlier


def _add(row: dict[str, Any], name: str, work: Any, counted: Any, arguments: argparse.Namespace, device: torch.device) -> None:
    operations = counted_flops(counted) * arguments.batch / 2

    def rate() -> float:
        return matmul_rate(device, torch.bfloat16 if arguments.precision == "bf16" else torch.float32)

    took, mean, ratio = beside_floor(work, operations, rate, device, repeats=arguments.repeats)
    row |= {
        f"{name}_gflops_per_trial": round(operations / arguments.batch / 1e9, 3),
        f"{name}_trials_per_second": round(arguments.batch / took, 2),
        f"{name}_matmul_gflops_per_second": round(mean / 1e9, 1),
        f"{name}_over_floor": round(ratio, 2),
    }
    if arguments.peak:
        row[f"{name}_mfu"] = round(operations / took / arguments.peak, 3)


def _update(module: nn.Module, optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimiser.step()


def main() -> None:
    """Print one row per preset and number of voxels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["nano", "small", "base", "large"])
    parser.add_argument("--voxels", type=int, nargs="+", default=[15724])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--first-layer", choices=["person", "shared"], default="person")
    parser.add_argument("--llm", default="", help="also measure alignment and captions through this language model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--peak", type=float, help="rated operations per second of the device, for MFU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device, rows = choose_device(arguments.device), []
    for preset in arguments.preset:
        for voxels in arguments.voxels:
            rows.append(measure(arguments, preset, voxels, device))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
