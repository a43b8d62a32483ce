"""Command that records how a demo model routes held-out text, in a file small enough to ship.

`python -m adapmoe_lab.demo.recording MODEL --text FOLDER --out FILE.npz`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from adapmoe_lab.demo.corpus import DEMO_DOMAINS, Domain, read_corpus
from adapmoe_lab.demo.measurements import WINDOW_TOKENS
from adapmoe_lab.demo.tokens import encode_stream, windows
from adapmoe_lab.engine.loading import load
from adapmoe_lab.profiling.routing.recorder import RoutingRecorder
from adapmoe_lab.records import RoutingTrace
from adapmoe_lab.records.arguments import whole_number

WINDOWS_PER_DOMAIN = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Record, write the file, and print what is in it; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m adapmoe_lab.demo.recording")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="folder it was trained on")
    parser.add_argument("--out", type=Path, required=True, help=".npz file to write")
    parser.add_argument(
        "--domains", nargs="+", metavar="NAME", help=f"default: {' '.join(DEMO_DOMAINS)}, or all"
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=WINDOWS_PER_DOMAIN,
        help=f"windows of {WINDOW_TOKENS} tokens per domain (default: %(default)s)",
    )
    parser.add_argument("--device", default=default_device, help="torch device")
    options = parser.parse_args(arguments)
    domains = read_corpus(options.text, options.domains)
    trace = record_routing(options.model, domains, options.windows, device=options.device)
    trace.save(options.out)
    print(
        f"Wrote the routing of {trace.n_tokens:,} tokens in {len(trace.labels)} sequences, "
        f"{options.out.stat().st_size / 1e6:.2f} MB, to {options.out}."
    )
    return 0


def record_routing(
    folder: Path, domains: Sequence[Domain], n_windows: int = WINDOWS_PER_DOMAIN, *, device: str
) -> RoutingTrace:
    """Return the experts chosen for held-out text and their weights, computed in float32.

    Every sequence is a window of 512 tokens, labelled with its domain, run in one forward pass.
    The windows are spread evenly over the domain's held-out text; a shorter text is one shorter
    window.

    Raises:
        ValueError: there is no window to take, or no domain has held-out text.
    """
    n_windows = whole_number("windows", n_windows, at_least=1)
    with load(folder, dtype="float32", device=device, link="none") as model:
        sequences: list[tuple[str, np.ndarray]] = []
        for domain in domains:
            stream = encode_stream(model.tokenizer.backend_tokenizer, domain.held_out)
            rows = windows(stream, WINDOW_TOKENS, n_windows * WINDOW_TOKENS)
            sequences += [(domain.name, row[:-1]) for row in rows]  # the last is only predicted
        if not sequences:
            raise ValueError(
                "no domain has held-out text to record; add valid.* files or more documents."
            )
        recorder = RoutingRecorder(model, predictors=())
        with torch.no_grad(), model.running(), model.engine.reading_store(), recorder.recording():
            for _, ids in sequences:
                model.hf(input_ids=torch.from_numpy(ids)[None].to(device), use_cache=False)
        trace = recorder.trace([name for name, _ in sequences]).chosen_only()
    return replace(trace, spec=replace(trace.spec, model_id=folder.resolve().name))


if __name__ == "__main__":
    sys.exit(main())
