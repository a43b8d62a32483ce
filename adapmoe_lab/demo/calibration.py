"""Command that samples the calibration text from a demo model itself.

`python -m adapmoe_lab.demo.calibration --model data/demo --out data/evaluation/calibration.jsonl`

Text the model wrote is text it finds likely, is no one's property, and is not its training text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from adapmoe_lab.demo.publish import write_lines
from adapmoe_lab.demo.sampling import SamplingPlan, sample_texts
from adapmoe_lab.models.demo_architecture import load_checkpoint

OPENINGS = {
    "story": (
        "Once upon a time there was a little",
        "One day, a boy named",
        "Lily and her mom went to",
        "The dog was very",
    ),
    "fiction": (
        "It was late in the evening when",
        '"You cannot mean it," said',
        "The old house stood",
        "I had never seen him",
    ),
    "python": ("import os\nimport sys\n", "def main(", "class Reader:\n", '    """Return the '),
    "german": ("Es war ein", "Der alte Herr", "Sie ging langsam", "Am anderen Morgen"),
    "encyclopedia": ("He was born in", "The album was", "The town is", "In 1950 , the"),
    "arithmetic": (
        "Tom has 12 apples.",
        "A box holds 24 pencils.",
        "Anna reads 15 pages a day.",
        "A train goes 60 miles in",
    ),
}
"""What the texts of each label begin with."""


def openings(n_texts: int) -> Iterator[tuple[str, str]]:
    """Yield (label, opening) so that every run of six texts has one of each label."""
    for number in range(n_texts):
        label = list(OPENINGS)[number % len(OPENINGS)]
        choices = OPENINGS[label]
        yield label, choices[number // len(OPENINGS) % len(choices)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Sample the texts and write them; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help=".jsonl file to write")
    parser.add_argument("--n-texts", type=int, default=72)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    model, tokenizer = load_checkpoint(options.model, dtype=torch.float32)
    plan = SamplingPlan(options.seed, 1.0, 0.98, options.max_new_tokens)
    labels, prompts = zip(*openings(options.n_texts), strict=True)
    texts = sample_texts(model, tokenizer, list(prompts), plan)
    records = (
        {"label": label, "text": prompt + text}
        for label, prompt, text in zip(labels, prompts, texts, strict=True)
    )
    write_lines(options.out, (json.dumps(record, ensure_ascii=False) for record in records))
    print(f"Wrote {len(texts)} texts to {options.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
