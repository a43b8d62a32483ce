"""How long prompts take, beside what they cannot take less than, at a real model's geometry.

`python benchmarks/prefill.py --out FILE.json [--geometry olmoe|qwen3|mixtral] [--traces FOLDER]`

Prompts of drawn tokens run one after the other in the same slots, so that each finds what those
before it left; the first finds them empty. A prompt cannot take less than the link takes for the
bytes it misses; and what it may take is measured by transformers' own eager prefill with all
experts on the GPU. The larger of the two is the bound that ratios are of. Experts one by one, as
they run where they cannot run in groups, are timed too. Weights are random.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from decode_bench import (
    GEOMETRIES,
    best_s,
    checkpoint_folder,
    free_memory,
    made_model,
    save_checkpoint,
    wait_for,
)
from numpy.typing import NDArray
from stock_decoding import implementation

import adapmoe_lab as lab
from adapmoe_lab.engine.host_driven.decoder import TransformersDecoder
from adapmoe_lab.engine.host_driven.grouped import GroupedProducts
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.records.files import save_json

LENGTHS = (32, 512)
SHARES = (1.0, 0.5)
N_PROMPTS, N_ONE_BY_ONE, N_WARM = 9, 4, 2


def prompts(n_tokens: int, n: int) -> list[torch.Tensor]:
    """Return drawn prompts, int64 [T] each."""
    generator = torch.Generator().manual_seed(n_tokens)
    return list(torch.randint(3, 31000, (n, n_tokens), generator=generator))


def timed(hf: Any, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the seconds of a prompt, and the logits [V] of what follows it."""
    decoder = TransformersDecoder(hf)
    wait_for(hf.device)
    start = time.perf_counter()
    logits = decoder.prefill(ids)
    wait_for(hf.device)
    return time.perf_counter() - start, logits.float()


def link_rate(model: LabModel) -> float:
    """Return the bytes per second of copies of a layer's experts, one after the other."""
    sources = [model.store.buffer(0, expert) for expert in range(model.spec.n_experts)]
    target = torch.empty_like(sources[0], device=model.engine.device)

    def copy_all() -> None:
        for source in sources:
            target.copy_(source, non_blocking=True)

    return sum(source.numel() for source in sources) / best_s(copy_all, target.device, 4)


def of_stock(plain: Any) -> dict[int, tuple[list[float], list[torch.Tensor]]]:
    """Return seconds and logits of the unmodified model's prompts, by length."""
    found = {}
    with implementation(plain, "grouped_mm"):
        for n_tokens in LENGTHS:
            for ids in prompts(n_tokens, N_WARM):
                timed(plain, ids)
            runs = [timed(plain, ids) for ids in prompts(n_tokens, N_PROMPTS)]
            found[n_tokens] = [seconds for seconds, _ in runs], [logits for _, logits in runs]
    return found


def of_ours(
    model: LabModel, share: float, n_tokens: int, n_prompts: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], list[torch.Tensor]]:
    """Return seconds, bytes that crossed the link and logits of prompts, the slots empty before."""
    plan = slots_plan(model.spec, round(share * model.spec.n_experts))
    model.apply(replace(model.config, plan=plan))
    seconds, n_bytes, found = [], [], []
    for ids in prompts(n_tokens, n_prompts):
        before = model.engine.traffic.bytes_moved
        spent, logits = timed(model.hf, ids)
        seconds.append(spent)
        n_bytes.append(model.engine.traffic.bytes_moved - before)
        found.append(logits)
    return np.array(seconds), np.array(n_bytes), found


def compare(
    model: LabModel,
    share: float,
    n_tokens: int,
    rate: float,
    stock: tuple[Sequence[float], list[torch.Tensor]],
) -> dict[str, Any]:
    """Return times of prompts of a length, and how many times their bound they take."""
    of_ours(model, share, n_tokens, N_WARM)  # compiles the kernels
    ours, n_bytes, logits = of_ours(model, share, n_tokens, N_PROMPTS)
    with patch.object(GroupedProducts, "serves", lambda *_: False):
        one_by_one, _, _ = of_ours(model, share, n_tokens, N_ONE_BY_ONE)
    stock_s = float(np.median(stock[0]))
    bounds = np.maximum(n_bytes / rate, stock_s)
    errors = [
        float((found - expected).norm() / expected.norm())
        for found, expected in zip(logits, stock[1], strict=True)
    ]
    return {
        "share_of_experts_with_slots": share,
        "n_tokens": n_tokens,
        "ours_ms": 1e3 * float(np.median(ours[1:])),
        "one_by_one_ms": 1e3 * float(np.median(one_by_one[1:])),
        "stock_ms": 1e3 * stock_s,
        "link_ms": 1e3 * float(np.median(n_bytes[1:])) / rate,
        "times_the_bound": float(np.median(ours[1:] / bounds[1:])),
        "empty_slots": {
            "ours_ms": 1e3 * float(ours[0]),
            "one_by_one_ms": 1e3 * float(one_by_one[0]),
            "link_ms": 1e3 * float(n_bytes[0]) / rate,
            "times_the_bound": float(ours[0] / bounds[0]),
        },
        "median_relative_error_of_last_logits": float(np.median(errors)),
        "ours_s": ours.tolist(),
        "one_by_one_s": one_by_one.tolist(),
        "stock_s": list(stock[0]),
        "bytes": n_bytes.tolist(),
    }


def profiled(model: LabModel, share: float, n_tokens: int, path: Path) -> None:
    """Write a trace of one prompt, for chrome://tracing."""
    of_ours(model, share, n_tokens, N_WARM)
    with torch.profiler.profile() as profile:
        timed(model.hf, prompts(n_tokens, N_WARM + 1)[-1])
    profile.export_chrome_trace(str(path))


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print and save what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="olmoe")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written meanwhile")
    parser.add_argument("--traces", type=Path, help="folder for a trace of a prompt of each kind")
    options = parser.parse_args(arguments)
    with checkpoint_folder(options.geometry, options.folder) as folder:
        plain = made_model(options.geometry, options.device)
        save_checkpoint(plain, folder)
        stock = of_stock(plain)
        del plain
        free_memory()
        emulated = {} if options.device.type == "cuda" else {"link": "none"}
        model = lab.load(
            folder, device=options.device, dtype="bfloat16", executor="host", **emulated
        )
        rate = link_rate(model)
        rows = [
            compare(model, share, n_tokens, rate, stock[n_tokens])
            for share in SHARES
            for n_tokens in LENGTHS
        ]
        if options.traces is not None:
            options.traces.mkdir(parents=True, exist_ok=True)
            for share in SHARES:
                profiled(model, share, LENGTHS[0], options.traces / f"share_{share}.json")
        conditions = measurement_conditions(model)
        model.close()
    for row in rows:
        print({name: value for name, value in row.items() if not isinstance(value, list)})
    found = {"conditions": conditions, "link_bytes_per_s": rate, "rows": rows}
    sizes = {"geometry": options.geometry, "sizes": GEOMETRIES[options.geometry]}
    save_json(options.out, {**sizes, **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
