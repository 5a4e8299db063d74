"""Graphs per second of the brain-graph system, beside the arithmetic floor measured in the same run.

Floor: floating-point operations (counted by torch, with its own attention, so that nothing computed twice counts twice) divided
by the rate of large matrix products kept up over a second, measured just before and just after each timed call and averaged.
The median over calls of time / floor is reported. A training step is two windows with all losses, backward, clipping and AdamW.

    python benchmarks/pretrain.py --regions 100 200 333 --batch 64 --preset base --dropout 0 0.2
    python benchmarks/pretrain.py --device cuda --precision bf16 --compile --batch 256
    python benchmarks/pretrain.py --account  # operations per graph and projected hours on a GPU, without one
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from brainfm_cli.learning.checkpoints import AtlasRecord
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.samples import PretrainBatch, Windows
from brainfm_cli.models import attention
from brainfm_cli.systems.brain_graph import BrainGraphSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

FRAMES = 200
COUNTED = 4
_CPU_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
# torch counts attention on GPUs only; on CPUs its kernels have names of their own.
_ATTENTION = {
    getattr(torch.ops.aten, _CPU_KERNEL): lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    getattr(torch.ops.aten, f"{_CPU_KERNEL}_backward"): lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
}


def windows(batch: int, regions: int, device: torch.device, *, seed: int, frames: int = FRAMES) -> Windows:
    """Windows of smooth noise with a few shared sources, so that graphs have positive edges."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(batch, frames, 12, generator=generator)
    series = sources @ torch.randn(12, regions, generator=generator) + torch.randn(batch, frames, regions, generator=generator)
    lengths = torch.full((batch,), frames)
    return Windows(atlas="A", series=series, frames=lengths, seconds=lengths * 2.0).to(device)


def batch_of(batch: int, regions: int, device: torch.device, *, frames: int = FRAMES) -> PretrainBatch:
    """Two windows of each of ``batch`` scans."""
    return PretrainBatch(
        first=windows(batch, regions, device, seed=1, frames=frames),
        second=windows(batch, regions, device, seed=2, frames=frames),
        crossed=False,
        other=None,
        other_rows=torch.empty(0, dtype=torch.int64, device=device),
        keys=torch.arange(batch, device=device) * 7919,
        dataset=torch.zeros(batch, dtype=torch.int64, device=device),
        participant=torch.arange(batch, device=device),
        counted=torch.ones(batch, dtype=torch.bool, device=device),
    )


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of square products, one after another for about a second (a fifth of one on a GPU)."""
    size, seconds = (8192, 0.2) if device.type == "cuda" else (2048, 1.0)  # a small product does not fill a GPU
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    once = timed(lambda: a @ b, device)
    count = max(3, round(seconds / once))
    return 2 * size**3 * count / timed(lambda: [a @ b for _ in range(count)], device)


def beside_floor(
    work: Callable[[], Any], operations: float, rate: Callable[[], float], device: torch.device, *, repeats: int
) -> tuple[float, ...]:
    """Seconds, operations per second of the matrix product, and time / floor, of the call with the median ratio; one call warms up."""
    work()
    found = []
    before = rate()
    for _ in range(repeats):
        seconds = timed(work, device)
        after = rate()
        mean = (before + after) / 2
        found.append((seconds * mean / operations, seconds, mean))
        before = after
    ratio, seconds, mean = sorted(found)[len(found) // 2]
    return seconds, mean, ratio


def total_loss(system: Any, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The terms of a loss as training weighs them."""
    return torch.stack([system.loss_weights[name] * value for name, value in terms.items() if not name.startswith("monitor_")]).sum()


def counted_flops(work: Callable[[], None]) -> float:
    """Floating-point operations of a call, with torch's own attention, so that nothing computed twice counts twice."""
    with (
        FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter,
        patch.object(attention, "_trained_on_cpu", lambda _: False),
    ):
        work()
    return float(counter.get_total_flops())


Calls = dict[str, tuple["Callable[[], None]", "Callable[[], None]"]]


def calls_of(
    regions: int, batch: int, preset: str, dropout: float, device: torch.device, *, precision: str, compiled: bool = False
) -> Calls:
    """Forward pass and training step: the call on the whole batch, and that on a few graphs whose operations are counted."""
    settings = BrainGraphSettings(kind="brain-graph", preset=preset, dropout=dropout)  # type: ignore[arg-type]
    torch.manual_seed(0)
    system = settings.build({"A": AtlasRecord(template="T", regions=tuple(f"r{i}" for i in range(regions)))})
    module = system.module.to(device)
    for part in system.repeated_parts if compiled else ():
        part.compile(dynamic=False)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    data, few = batch_of(batch, regions, device), batch_of(COUNTED, regions, device)
    half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def forward() -> None:
        module.eval()
        with torch.no_grad(), half:
            module.encode(system.graphs(data.first))

    def counted_forward() -> None:  # the counter cannot follow modules where gradients are off
        with half:
            module.encode(system.graphs(few.first))

    def step(data: PretrainBatch = data) -> None:
        module.train()
        with half:
            terms = system.losses(data, epoch=1.0)
        loss = total_loss(system, terms)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()

    return {"forward": (forward, counted_forward), "step": (step, lambda: step(few))}


def account(regions: int, preset: str, *, graphs: int, epochs: int, peak_tflops: float, shares: Sequence[float]) -> dict[str, Any]:
    """Operations per graph, and the hours that a training takes on a card of ``peak_tflops`` at shares of its peak. Nothing is timed."""
    calls = calls_of(regions, COUNTED, preset, 0.0, torch.device("cpu"), precision="fp32")
    per_graph = {name: counted_flops(counted) / COUNTED for name, (_, counted) in calls.items()}
    hours = per_graph["step"] * graphs * epochs / (peak_tflops * 1e12) / 3600
    return {
        "regions": regions,
        "preset": preset,
        **{f"{name}_gflops_per_graph": round(value / 1e9, 3) for name, value in per_graph.items()},
        **{f"hours_at_{share:.0%}": round(hours / share, 3) for share in shares},
    }


def measure(regions: int, batch: int, dropout: float, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    preset, precision = arguments.preset, arguments.precision

    def rate() -> float:
        return matmul_rate(device, torch.bfloat16 if precision == "bf16" else torch.float32)

    row: dict[str, Any] = {"regions": regions, "batch": batch, "preset": preset, "dropout": dropout}
    calls = calls_of(regions, batch, preset, dropout, device, precision=precision, compiled=arguments.compile)
    # the counter does not see into compiled kernels
    plain = calls_of(regions, COUNTED, preset, dropout, device, precision=precision) if arguments.compile else calls
    for name, (work, _) in calls.items():
        counted = plain[name][1]
        operations = counted_flops(counted) * batch / COUNTED  # counted on a few graphs, because it takes as long as running
        seconds, mean, ratio = beside_floor(work, operations, rate, device, repeats=arguments.repeats)
        row |= {
            f"{name}_gflops": round(operations / 1e9, 1),
            f"{name}_matmul_gflops_per_second": round(mean / 1e9, 1),
            f"{name}_seconds": round(seconds, 4),
            f"{name}_graphs_per_second": round(batch / seconds, 2),
            f"{name}_ms_per_graph": round(1000 * seconds / batch, 2),
            f"{name}_over_floor": round(ratio, 2),
        }
        if device.type == "cuda":
            row[f"{name}_mfu"] = round(operations / seconds / (arguments.peak_tflops * 1e12), 3)
    if device.type == "cuda":
        row["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
        row["hours"] = round(arguments.graphs * arguments.epochs / row["step_graphs_per_second"] / 3600, 3)
    if device.type == "cpu":
        row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    return row


def main() -> None:
    """Print one row per number of regions and dropout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regions", type=int, nargs="+", default=[100, 200, 333])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="compile the encoder's blocks, as execution.compile=true does")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--account", action="store_true", help="count operations and project hours; nothing is timed")
    parser.add_argument("--graphs", type=int, default=400_000, help="of the projected training")
    parser.add_argument("--epochs", type=int, default=12, help="of the projected training")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of the card; 989 is an H100 SXM")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.43], help="of the peak")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.account:
        size = {"graphs": arguments.graphs, "epochs": arguments.epochs, "peak_tflops": arguments.peak_tflops, "shares": arguments.shares}
        for regions in arguments.regions:
            print(json.dumps(account(regions, arguments.preset, **size)), flush=True)
        return
    device = choose_device(arguments.device)
    rows = []
    for dropout in arguments.dropout:
        for regions in arguments.regions:
            row = measure(regions, arguments.batch, dropout, device, arguments)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n", encoding="utf-8")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
