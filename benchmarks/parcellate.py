"""How fast one pass over a BOLD series is: against bare decompression and against nilearn, in one run on one machine.

    python benchmarks/parcellate.py --frames 200 --repeats 5 --out parcellate.json

The series is made up: nilearn's template on TemplateFlow's 2 mm grid (97 x 115 x 97), noise inside and outside, int16, gzip level 6.
nilearn gets every atlas on that grid already, so that resampling labels counts for us and not for it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPE = (97, 115, 97)
AFFINE = np.array([[2.0, 0, 0, -96], [0, 2.0, 0, -132], [0, 0, 2.0, -78], [0, 0, 0, 1]])
SPACE = "MNI152NLin2009cAsym"
ATLASES = ("Schaefer100", "Schaefer200", "Schaefer400", "AAL116", "AAL3v1", "Dosenbach160", "Power264", "Seitzman300")
_ONE_PASS = """
import sys, json, pathlib
from brainfm_cli.atlases.catalogue import find_atlas
from brainfm_cli.signals.parcellation import average_regions
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
atlases = [find_atlas(name, {}) for name in sys.argv[3:]]
before = peak()
average_regions(pathlib.Path(sys.argv[1]), atlases, space=%r, mask=pathlib.Path(sys.argv[2]))
print(json.dumps([before, peak()]))
"""


def write_series(folder: Path, frames: int) -> Path:
    """A compressed series of ``frames`` volumes, and beside it the brain mask of the same grid."""
    import nibabel as nib
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template
    from nilearn.image import resample_to_img

    grid = nib.Nifti1Image(np.zeros(SHAPE, np.int8), AFFINE)
    anatomy = resample_to_img(load_mni152_template(2), grid, copy_header=True, force_resample=True).get_fdata()
    mask = resample_to_img(load_mni152_brain_mask(2), grid, interpolation="nearest", copy_header=True, force_resample=True)
    nib.save(nib.Nifti1Image((mask.get_fdata() > 0).astype(np.uint8), AFFINE), folder / "mask.nii.gz")
    generator = np.random.default_rng(0)
    signal = generator.normal(size=(frames, 8))
    weights = generator.normal(size=(8, *SHAPE)).astype(np.float32)
    inside = mask.get_fdata() > 0
    data = np.empty((*SHAPE, frames), np.int16, order="F")
    for frame in range(frames):
        noise = generator.normal(size=SHAPE) * np.where(inside, 25, 4) + np.tensordot(signal[frame], weights, 1) * inside * 5
        data[..., frame] = np.maximum(10_000 * np.clip(anatomy, 0, None) / anatomy.max() * inside + noise, 0)
    path = folder / f"bold{frames}.nii.gz"
    image = nib.Nifti1Image(data, AFFINE)
    image.header.set_zooms((2.0, 2.0, 2.0, 2.0))
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


def other_masks(folder: Path, count: int) -> list[Path]:
    """Masks that differ in a few voxels, as those of different runs do: the operator is built anew for each."""
    import nibabel as nib

    image = nib.load(folder / "mask.nii.gz")
    paths = []
    for number in range(count):
        data = np.asarray(image.dataobj).copy()
        data[np.unravel_index(np.flatnonzero(data)[number], data.shape)] = 0
        paths.append(folder / f"mask{number}.nii.gz")
        nib.save(nib.Nifti1Image(data, image.affine), paths[-1])
    return paths


def timed(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def inflate(path: Path) -> None:
    """Bare decompression in this thread."""
    from isal import igzip

    buffer = bytearray(1 << 20)
    with igzip.open(path, "rb") as stream:
        while stream.readinto(buffer):
            pass


def inflate_threaded(path: Path) -> None:
    """Bare decompression through the reader that parcellate uses, a volume at a time."""
    from isal import igzip_threaded

    buffer = bytearray(2 * int(np.prod(SHAPE)))
    with igzip_threaded.open(path, "rb", threads=1) as stream:
        while stream.readinto(buffer):
            pass


def on_grid(names) -> list:
    """Label images of the atlases on the grid of the series."""
    import nibabel as nib

    from brainfm_cli.atlases.catalogue import find_atlas
    from brainfm_cli.signals.spaces import labels_on_grid

    return [nib.Nifti1Image(labels_on_grid(find_atlas(name, {}), SPACE, SHAPE, AFFINE)[0], AFFINE) for name in names]


def masker(labels, mask: Path):
    from nilearn.maskers import NiftiLabelsMasker

    return NiftiLabelsMasker(labels, mask_img=str(mask), resampling_target=None, standardize=None)


def nilearn_from_file(path: Path, mask: Path, images) -> list[np.ndarray]:
    """One masker per atlas on the file, as nilearn's examples do."""
    return [masker(image, mask).fit_transform(str(path)) for image in images]


def nilearn_in_memory(path: Path, mask: Path, images) -> list[np.ndarray]:
    """The file is read once, and all maskers work on the array in memory."""
    import nibabel as nib

    image = nib.load(path)
    loaded = nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header)
    return [masker(labels, mask).fit_transform(loaded) for labels in images]


def largest_difference(atlases, ours, theirs) -> float:
    """Largest relative difference from nilearn, which orders regions by label and leaves out those without voxels."""
    worst = []
    for atlas, mine, other in zip(atlases, ours, theirs, strict=True):
        series = mine.series[:, np.argsort(atlas.values)]
        series = series[:, np.isfinite(series).all(0)]
        if series.shape != other.shape:
            raise SystemExit(f"{atlas.name}: {series.shape[1]} regions, nilearn has {other.shape[1]}")
        worst.append(np.abs(series / other - 1).max())
    return float(max(worst))


def peak_memory(path: Path, mask: Path, names) -> tuple[float, float]:
    """Resident megabytes of a fresh process before and at the peak of one pass."""
    answer = subprocess.run([sys.executable, "-c", _ONE_PASS % SPACE, path, mask, *names], check=True, capture_output=True, text=True)
    return tuple(json.loads(answer.stdout))


def measure(frames: int, repeats: int, names) -> dict:
    from brainfm_cli.atlases.catalogue import find_atlas
    from brainfm_cli.signals.parcellation import average_regions

    times: dict[str, list[float]] = {"isal": [], "isal, threaded": [], "ours": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path, mask = write_series(folder, frames), folder / "mask.nii.gz"
        atlases = [find_atlas(name, {}) for name in names]
        inflate(path)  # into the page cache
        first, ours = timed(lambda: average_regions(path, atlases, space=SPACE, mask=mask))
        for other in other_masks(folder, repeats):
            times["isal"].append(timed(inflate, path)[0])
            times["isal, threaded"].append(timed(inflate_threaded, path)[0])
            times["ours"].append(timed(lambda other=other: average_regions(path, atlases, space=SPACE, mask=other))[0])
        images = on_grid(names)
        from_file, theirs = timed(nilearn_from_file, path, mask, images)
        in_memory, _ = timed(nilearn_in_memory, path, mask, images)
        ratios = {
            f"ours to {name}": [mine / bare for mine, bare in zip(times["ours"], times[name], strict=True)] for name in list(times)[:2]
        }
        memory = {}
        for count in (100, 400):
            series = write_series(folder, count)
            memory[count] = peak_memory(series, mask, names)
            series.unlink()
        return {
            "frames": frames,
            "atlases": list(names),
            "compressed_mb": path.stat().st_size / 1e6,
            "raw_mb": 2 * frames * int(np.prod(SHAPE)) / 1e6,
            "seconds": {**times, "ours, first run of a process": first, "nilearn, from file": from_file, "nilearn, in memory": in_memory},
            "ratios": ratios,
            "nilearn_from_file_to_ours": from_file / statistics.median(times["ours"]),
            "nilearn_in_memory_to_ours": in_memory / statistics.median(times["ours"]),
            "largest_relative_difference_from_nilearn": largest_difference(atlases, ours, theirs),
            "peak_mb_by_frames": {str(count): {"before": before, "peak": peak} for count, (before, peak) in memory.items()},
            "cores": os.cpu_count(),
        }


def report(result: dict) -> None:
    seconds = result["seconds"]
    print(f"{result['frames']} frames, {result['compressed_mb']:.0f} MB of {result['raw_mb']:.0f} MB, {len(result['atlases'])} atlases")
    for name, value in seconds.items():
        several = f" (of {len(value)}: {min(value):.2f} to {max(value):.2f})" if isinstance(value, list) else ""
        print(f"  {name:30s} {statistics.median(value) if isinstance(value, list) else value:8.2f} s{several}")
    for name, values in result["ratios"].items():
        print(f"  {name:30s} {statistics.median(values):8.2f} x ({min(values):.2f} to {max(values):.2f})")
    print(f"  {'nilearn from file to ours':30s} {result['nilearn_from_file_to_ours']:8.1f} x")
    print(f"  {'nilearn in memory to ours':30s} {result['nilearn_in_memory_to_ours']:8.1f} x")
    print(f"  largest relative difference from nilearn {result['largest_relative_difference_from_nilearn']:.3g}")
    for count, value in result["peak_mb_by_frames"].items():
        print(f"  peak at {count} frames {value['peak']:.0f} MB, of which {value['before']:.0f} MB before the pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--atlases", nargs="+", default=ATLASES)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    result = measure(arguments.frames, arguments.repeats, arguments.atlases)
    report(result)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
