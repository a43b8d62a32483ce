"""How long a CUDA device takes to multiply a token, or eight, by an expert's matrix.

`python benchmarks/packed_matmul.py --out benchmarks/results/packed-matmul.json`

Each sample is a pass over so many copies of the matrix that none is still in the cache, replayed as
a CUDA graph so that Python's launches do not count, and divided by the number of copies.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn import functional

from adapmoe_lab.engine.quantised.packed import PackedMatrix
from adapmoe_lab.engine.quantised.quantise import quantise
from adapmoe_lab.records.files import save_json
from adapmoe_lab.records.precision import PRECISIONS

SHAPES = ((28672, 4096), (4096, 14336), (2048, 2048), (1536, 2048))
PRECISION_NAMES = ("bfloat16", "int8", "int4", "int3", "int2", "mxfp4")
N_TOKENS = (1, 8)
ROTATED_BYTES = 1 << 28
COPIED_BYTES = 1 << 30
N_SAMPLES = 60

Matmul = Callable[[torch.Tensor], torch.Tensor]


def pass_seconds(run: Callable[[], object]) -> list[float]:
    """Return the seconds of `N_SAMPLES` replays of what `run` launches, after three warm-ups."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(N_SAMPLES + 1)]
    for mark in marks:
        mark.record()
        graph.replay()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def copy_rate() -> float:
    """Return the bytes per second read and written by a large copy within the device."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    destination = torch.empty_like(source)
    seconds = pass_seconds(lambda: destination.copy_(source))
    return 2 * COPIED_BYTES / statistics.median(seconds)


def rotation(weight: torch.Tensor, name: str) -> tuple[int, list[Matmul]]:
    """Return the bytes of a matrix in a precision, and a matmul for each of its copies."""
    if name == "bfloat16":
        n_bytes = weight.numel() * weight.element_size()
        copies = [weight.clone() for _ in range(_n_copies(n_bytes))]
        return n_bytes, [lambda x, copy=copy: functional.linear(x, copy) for copy in copies]
    matrix = quantise(weight, PRECISIONS[name], solver="nearest")
    n_bytes = matrix.data.numel()
    matrices = [
        PackedMatrix(matrix.precision, matrix.shape, matrix.data.clone())
        for _ in range(_n_copies(n_bytes))
    ]
    return n_bytes, [copy.matmul for copy in matrices]


def measure(shape: tuple[int, int], name: str, rate: float) -> list[dict[str, object]]:
    """Time one shape in one precision, for every number of tokens."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(shape, generator=generator, device="cuda").mul_(0.02).bfloat16()
    n_bytes, matmuls = rotation(weight, name)
    rows = []
    for n_tokens in N_TOKENS:
        x = torch.randn((n_tokens, shape[1]), generator=generator, device="cuda").bfloat16()
        seconds = pass_seconds(lambda x=x: [matmul(x) for matmul in matmuls])
        samples = [s / len(matmuls) for s in seconds]
        median = statistics.median(samples)
        row = {
            "shape": shape,
            "precision": name,
            "n_tokens": n_tokens,
            "matrix_bytes": n_bytes,
            "n_copies": len(matmuls),
            "median_s": median,
            "bytes_per_s": n_bytes / median,
            "share_of_copy_rate": n_bytes / median / rate,
            "samples_s": samples,
        }
        rows.append(row)
    return rows


def main() -> int:
    """Measure every shape in every precision, print a table, write the raw samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("This measures a CUDA device, and torch sees none; run it on one.", file=sys.stderr)
        return 1
    rate = copy_rate()
    rows = []
    print(f"{torch.cuda.get_device_name()}: copies {rate / 1e9:.0f} GB/s, reads and writes")
    print("      matrix  precision  tokens       MB       us    GB/s  of copy  of bfloat16's time")
    for shape in SHAPES:
        plain: dict[object, float] = {}
        for name in PRECISION_NAMES:
            for row in measure(shape, name, rate):
                seconds = row["median_s"]
                row["ratio_to_bfloat16"] = seconds / plain.setdefault(row["n_tokens"], seconds)
                rows.append(row)
                print(_line(row), flush=True)
    document = {"conditions": _conditions(), "copy_bytes_per_s": rate, "rows": rows}
    save_json(options.out, document)
    return 0


def _n_copies(n_bytes: int) -> int:
    return ROTATED_BYTES // n_bytes + 1


def _line(row: dict[str, object]) -> str:
    size = "x".join(str(n) for n in row["shape"])
    return (
        f"{size:>12}  {row['precision']:9} {row['n_tokens']:7} {row['matrix_bytes'] / 1e6:8.2f} "
        f"{row['median_s'] * 1e6:8.2f} {row['bytes_per_s'] / 1e9:7.0f} "
        f"{row['share_of_copy_rate']:8.1%} {row['ratio_to_bfloat16']:8.2f}"
    )


def _conditions() -> dict[str, object]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "n_multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "x_dtype": "bfloat16",
        "n_samples": N_SAMPLES,
        "rotated_bytes": ROTATED_BYTES,
        "timing": "CUDA events around graph replays",
    }


if __name__ == "__main__":
    sys.exit(main())
