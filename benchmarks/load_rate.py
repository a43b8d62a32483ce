"""How fast a checkpoint of Mixtral's dimensions loads, and what its experts then cost to run.

`python benchmarks/load_rate.py --out benchmarks/results/load-rate.json`

Writes a random bfloat16 checkpoint of a few layers, loads it in bfloat16 and in packed precisions,
and compares the rate of loading with that of reading the same files and of pinned copies.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from adapmoe_lab.assets import demo_folder
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.resident_layer import decode_step_times
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.profiling.hardware.probe import probe_hardware
from adapmoe_lab.records.files import save_json

GIB = 2**30
N_EXPERTS, TOP_K, HIDDEN, WIDTH, N_HEADS, N_KV_HEADS = 8, 2, 4096, 14336, 32, 8
VOCABULARY = 8192


def write_checkpoint(folder: Path, n_layers: int, device: str) -> int:
    """Write a random Mixtral, a shard per layer; return its bytes."""
    head = HIDDEN // N_HEADS

    def matrix(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device, dtype=torch.bfloat16) / shape[-1] ** 0.5).cpu()

    shards = [
        {
            "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
            "lm_head.weight": matrix(VOCABULARY, HIDDEN),
            "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        }
    ]
    for layer in range(n_layers):
        at = f"model.layers.{layer}"
        tensors = {
            f"{at}.input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            f"{at}.post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            f"{at}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{at}.self_attn.k_proj.weight": matrix(N_KV_HEADS * head, HIDDEN),
            f"{at}.self_attn.v_proj.weight": matrix(N_KV_HEADS * head, HIDDEN),
            f"{at}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{at}.block_sparse_moe.gate.weight": matrix(N_EXPERTS, HIDDEN),
        }
        for expert in range(N_EXPERTS):
            for name, shape in (("w1", (WIDTH, HIDDEN)), ("w2", (HIDDEN, WIDTH))):
                tensors[f"{at}.block_sparse_moe.experts.{expert}.{name}.weight"] = matrix(*shape)
            up = f"{at}.block_sparse_moe.experts.{expert}.w3.weight"
            tensors[up] = matrix(WIDTH, HIDDEN)
        shards.append(tensors)
    weight_map = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(n_layers)))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / file, folder / file)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _config(n_layers: int) -> dict[str, object]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": n_layers,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KV_HEADS,
        "num_local_experts": N_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


def read_rate(folder: Path) -> float:
    """Return the bytes per second at which the files can be read, cached by the system or not."""
    buffer, n_bytes, start = bytearray(64 * 2**20), 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while n_read := file.readinto(buffer):
                n_bytes += n_read
    return n_bytes / (time.perf_counter() - start)


class PeakMemory:
    """Watches the most private memory this process holds, beyond what it held at the start."""

    def __enter__(self) -> PeakMemory:
        self._process, self._done = psutil.Process(), threading.Event()
        self._start = self.peak = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak -= self._start

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        return self._process.memory_info().rss - self._process.memory_info().shared


def decode_seconds(model: LabModel, n_steps: int) -> list[float]:
    """Return the seconds of decode steps with every expert resident."""
    with model.running():
        decode_step_times(model.hf, model.engine, 16)
        return decode_step_times(model.hf, model.engine, n_steps).tolist()


def main() -> int:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "int8", "int4"])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file_bytes = write_checkpoint(folder, options.layers, options.device)
        rates = [read_rate(folder) for _ in range(3)]
        print(f"{file_bytes / GIB:.2f} GiB of files, read at {np.median(rates) / 1e9:.2f} GB/s")
        for precision in options.precisions:
            start = time.perf_counter()
            with PeakMemory() as memory:
                model = load(folder, device=options.device, expert_dtype=precision)
            seconds = time.perf_counter() - start
            store_bytes = model.store.n_bytes
            steps = decode_seconds(model, options.steps)
            link = probe_hardware(model, n_steps=8, rounds=1)
            active = TOP_K * options.layers * model.spec.stored_expert_bytes
            run = {
                "precision": precision,
                "load_s": seconds,
                "store_bytes": store_bytes,
                "expert_bytes": model.spec.stored_expert_bytes,
                "peak_host_bytes": memory.peak,
                "decode_step_s": steps,
                "active_expert_bytes_per_token": active,
                "link_bytes_per_s": float(link.copy_bytes[-1] / link.copy_s[-1]),
                "conditions": measurement_conditions(model),
            }
            runs.append(run)
            print(
                f"{precision:9} loaded in {seconds:.1f} s: {file_bytes / seconds / 1e9:.2f} GB/s, "
                f"{file_bytes / seconds / np.median(rates):.0%} of the read rate; peak host memory "
                f"{memory.peak / store_bytes:.2f} of the store; decode step "
                f"{np.median(steps) * 1e3:.2f} ms; link {run['link_bytes_per_s'] / 1e9:.1f} GB/s"
            )
            model.close()
            del model
            if options.device != "cpu":
                torch.cuda.empty_cache()
    if options.out is not None:
        record = {"file_bytes": file_bytes, "read_bytes_per_s": rates, "runs": runs}
        save_json(options.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
