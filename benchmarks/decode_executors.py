"""One decode step by either executor, at OLMoE's geometry with random weights, on a GPU.

`python benchmarks/decode_executors.py --out FILE.json`

Tokens are given, so that both run the same text. Under given routing both choose the same experts:
counters must be equal. Logits are held against the unmodified model in float32, and against each
other; how far the host-driven executor is from itself with another attention kernel, that of a
cache of fixed length, is what rounding alone does. Times are those of the router's own choices too.
The checkpoint of 13 GiB is written to the temporary folder.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import adapmoe_lab as lab
from adapmoe_lab.assets import demo_folder
from adapmoe_lab.engine.executor import Decoder
from adapmoe_lab.engine.host_driven.decoder import TransformersDecoder
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.records import Traffic
from adapmoe_lab.records.files import save_json

GEOMETRY = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SHARES = (1.0, 0.5)
N_PROMPT, N_STEPS, N_WARM = 32, 72, 8


def save_checkpoint(folder: Path) -> None:
    """Write a model of random weights whose routers prefer some experts clearly."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmoe", **GEOMETRY)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.normal_(0, 0.05)
    model.save_pretrained(folder)
    for file in demo_folder().glob("*token*"):
        shutil.copy(file, folder)


@contextmanager
def given_routing(routers: Sequence[nn.Module], text: Text) -> Iterator[None]:
    """Let every router choose what the text says, from its position on."""

    def choose(layer: int) -> Any:
        def hook(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            logits = output[0]
            places = text.position + torch.arange(len(logits), device=logits.device)
            chosen = text.choices[layer].index_select(0, places)
            weights = logits.float().softmax(dim=-1).gather(1, chosen)
            weights = weights / weights.sum(dim=-1, keepdim=True)
            return logits, weights.to(output[1].dtype), chosen

        return hook

    with ExitStack() as hooks:
        for number, router in enumerate(routers):
            handle = router.register_forward_hook(choose(number))
            hooks.callback(handle.remove)
        yield


@torch.no_grad()
def run(model: LabModel, decoder: Decoder, text: Text) -> tuple[torch.Tensor, Traffic, list[float]]:
    """Return the logits [N, V] of every step, the counters and the seconds of all of them."""
    text.position.zero_()
    decoder.prefill(text.ids[:N_PROMPT])
    before, found, seconds = model.engine.traffic, [], []
    for number, token in enumerate(text.ids[N_PROMPT:].tolist()):
        text.position.fill_(N_PROMPT + number)
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits = decoder.step(token)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        found.append(logits.float().clone())
    return torch.stack(found), model.engine.traffic - before, seconds


def largest_and_median(found: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """Return the largest and the median of the steps' relative errors, both logits [N, V]."""
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    return [float(error.max()), float(error.median())]


class Text:
    """Given tokens and given routing, the same in every run."""

    def __init__(self, model: LabModel) -> None:
        """Draw them."""
        spec, generator = model.spec, torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 31000, (N_PROMPT + N_STEPS,), generator=generator)
        scores = torch.rand((spec.n_layers, len(self.ids), spec.n_experts), generator=generator)
        self.choices = scores.topk(spec.top_k, dim=-1).indices.cuda()
        self.position = torch.zeros(1, dtype=torch.int64, device="cuda")


def float32_logits(folder: str, text: Text) -> torch.Tensor:
    """Return the logits [N, V] of the unmodified model in float32 under the given routing."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    routers = [module for name, module in plain.named_modules() if name.endswith("mlp.gate")]
    with torch.no_grad(), given_routing(routers, text):
        return plain(text.ids[None].cuda()).logits[0, N_PROMPT:].clone()


def compare(
    model: LabModel, text: Text, share: float, exact: torch.Tensor | None
) -> dict[str, Any]:
    """Return counters, errors and times of both executors in the same slots.

    `exact` are the logits under given routing; None to let the routers choose.
    """
    config = replace(model.config, plan=slots_plan(model.spec, round(share * model.spec.n_experts)))
    with ExitStack() as stack:
        if exact is not None:
            routers = [layer.router.module for layer in model.layers]
            stack.enter_context(given_routing(routers, text))
        model.apply(config)
        host, of_host, host_s = run(model, TransformersDecoder(model.hf), text)
        model.apply(config)
        with observing(model, {}):  # runs layer by layer in the graph's cache
            alike, _, _ = run(model, model.decoder(), text)
        model.apply(config)
        graph, of_graph, graph_s = run(model, model.decoder(), text)
    errors = {
        "graph against host": largest_and_median(graph, host),
        "graph against host with the same attention": largest_and_median(graph, alike),
        "host against host with another attention": largest_and_median(alike, host),
    }
    if exact is not None:
        errors["host against float32"] = largest_and_median(host, exact)
        errors["graph against float32"] = largest_and_median(graph, exact)
    return {
        "share_of_experts_with_slots": share,
        "routing": "the router's own" if exact is None else "given",
        "host_ms": 1e3 * float(np.median(host_s[N_WARM:])),
        "graph_ms": 1e3 * float(np.median(graph_s[N_WARM:])),
        "host_misses_per_token": float(of_host.misses.sum()) / N_STEPS,
        "graph_misses_per_token": float(of_graph.misses.sum()) / N_STEPS,
        "counters_are_equal": bool(
            (of_host.hits == of_graph.hits).all() and (of_host.misses == of_graph.misses).all()
        ),
        "relative_errors_largest_and_median": errors,
        "host_samples_s": host_s,
        "graph_samples_s": graph_s,
    }


def main() -> int:
    """Compare both executors, print and save what was found; 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder))
        torch.cuda.empty_cache()
        model = lab.load(
            folder, device="cuda", dtype="bfloat16", executor="graph", max_context_tokens=512
        )
        text = Text(model)
        exact = float32_logits(folder, text)
        rows = [compare(model, text, share, routed) for routed in (exact, None) for share in SHARES]
        conditions = {**measurement_conditions(model), "model": "olmoe geometry, random weights"}
    for row in rows:
        print({name: value for name, value in row.items() if not name.endswith("samples_s")})
    save_json(options.out, {"geometry": GEOMETRY, "conditions": conditions, "rows": rows})
    return 0 if all(row["counters_are_equal"] for row in rows[: len(SHARES)]) else 1


if __name__ == "__main__":
    sys.exit(main())
