"""Command that measures a finished checkpoint again and rewrites its card.

`python -m adapmoe_lab.demo.measure data/demo --text FOLDER`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from adapmoe_lab.demo.card import write_card
from adapmoe_lab.demo.corpus import read_corpus
from adapmoe_lab.demo.measurements import measure_checkpoint, write_measurements


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write both files, and print the headline; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m adapmoe_lab.demo.measure")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="folder it was trained on")
    parser.add_argument("--pairs", type=Path, help="minimal pairs to score")
    parser.add_argument("--device", default=default_device, help="torch device")
    parser.add_argument(
        "--max-tokens", type=int, help="held-out tokens per domain; all if left out"
    )
    options = parser.parse_args(arguments)
    measured = measure_checkpoint(
        options.model,
        read_corpus(options.text),
        device=options.device,
        text=options.text,
        pairs=options.pairs,
        max_tokens=options.max_tokens,
    )
    write_measurements(options.model, measured)
    write_card(options.model)
    print(f"mean over domains: {measured['mean_nats_per_token']:.4f} nats per token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
