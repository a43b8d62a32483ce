"""Two gigabytes of experts: how much memory loading takes, by the process's own accounting."""

import json
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import byte_tokenizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads anonymous memory from /proc"),
]

MIB = 2**20
L, E, HIDDEN, WIDTH = 12, 16, 1024, 1824
EXPERT_BYTES = 3 * HIDDEN * WIDTH * 2
STORE_BYTES = L * E * EXPERT_BYTES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Write a random Mixtral in bfloat16, a shard per layer."""
    folder = tmp_path_factory.mktemp("large")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": L,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_local_experts": E,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for layer in range(L):
        tensors = layer_tensors(layer)
        if layer == 0:
            tensors |= {
                "model.embed_tokens.weight": matrix(len(tokenizer), HIDDEN),
                "lm_head.weight": matrix(len(tokenizer), HIDDEN),
                "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            }
        name = f"model-{layer + 1:05}-of-{L:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 2e9
    return folder


def layer_tensors(layer):
    at = f"model.layers.{layer}"
    tensors = {
        f"{at}.input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        f"{at}.post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        f"{at}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
        f"{at}.self_attn.k_proj.weight": matrix(HIDDEN // 4, HIDDEN),
        f"{at}.self_attn.v_proj.weight": matrix(HIDDEN // 4, HIDDEN),
        f"{at}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
        f"{at}.block_sparse_moe.gate.weight": matrix(E, HIDDEN),
    }
    for expert in range(E):
        path = f"{at}.block_sparse_moe.experts.{expert}"
        tensors[f"{path}.w1.weight"] = matrix(WIDTH, HIDDEN)
        tensors[f"{path}.w2.weight"] = matrix(HIDDEN, WIDTH)
        tensors[f"{path}.w3.weight"] = matrix(WIDTH, HIDDEN)
    return tensors


def matrix(*shape):
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5)


SCRIPT = """
import json, sys, threading, time, torch
from pathlib import Path
from adapmoe_lab.engine.loading import load
import transformers.models.mixtral.modeling_mixtral
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
folder, work, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
start = peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
try:
    begin = time.perf_counter()
    model = load(folder, device="cpu", link="none", **options)
    seconds, loading_peak = time.perf_counter() - begin, peak
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        logits = model.hf(ids).logits
finally:
    done.set()
    watcher.join()
torch.save(logits, work / "logits.pt")
print(json.dumps({"start": start, "loading_peak": loading_peak, "peak": peak, "seconds": seconds,
                  "slot_bytes": model.memory.slot_bytes, "store": type(model.store).__name__,
                  "weights": model.memory.needs.weights}))
"""


def run(checkpoint, work, **options):
    """Load in a process of its own, whose freed memory goes back to the system at once."""
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "ADAPMOE_LAB_CACHE": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    work.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint), str(work), json.dumps(options)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), torch.load(work / "logits.pt")


@pytest.fixture(scope="module")
def in_memory(checkpoint, tmp_path_factory):
    return run(checkpoint, tmp_path_factory.mktemp("memory"), expert_memory="15%")


def test_loading_takes_the_store_and_a_tenth(in_memory):
    measured, _ = in_memory
    assert measured["store"] == "HostStore"
    most = 1.10 * STORE_BYTES + measured["slot_bytes"] + measured["weights"]
    assert STORE_BYTES < measured["loading_peak"] - measured["start"] < most


def test_it_equals_the_unmodified_model(in_memory, checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="grouped_mm")
    with torch.no_grad():
        expected = plain(torch.arange(1, 25)[None]).logits
    assert torch.equal(in_memory[1], expected)


def test_a_quarter_of_a_gibibyte_is_enough(in_memory, checkpoint, tmp_path):
    """Beyond what Python and its libraries hold before anything is loaded."""
    measured, logits = run(checkpoint, tmp_path, host_memory="256MiB")
    assert measured["store"] == "DiskStore"
    assert measured["peak"] - measured["start"] < 400 * MIB
    assert torch.equal(logits, in_memory[1])


def test_a_prepared_store_reopens_at_once(in_memory, checkpoint, tmp_path):
    store = str(tmp_path / "experts")
    run(checkpoint, tmp_path, store=store, expert_memory="15%")
    measured, logits = run(checkpoint, tmp_path, store=store, expert_memory="15%")
    assert measured["store"] == "PreparedStore"
    assert measured["seconds"] < 2
    assert measured["loading_peak"] - measured["start"] - measured["weights"] < 50 * MIB
    assert torch.equal(logits, in_memory[1])


def test_a_flipped_byte_is_caught(checkpoint, tmp_path):
    run(checkpoint, tmp_path, host_memory="256MiB")
    shard = sorted(checkpoint.glob("*.safetensors"))[5]
    flip_bytes(shard)
    try:
        with pytest.raises(AssertionError, match=r"of MoE layer 5 .*changed or is damaged"):
            run(checkpoint, tmp_path, host_memory="256MiB")
    finally:
        flip_bytes(shard)


def flip_bytes(path):
    """Flip a bit in several experts of a shard: a short text does not use them all.

    The time of writing stays, as with a failing disk; a file that is written anew is another model.
    """
    before = path.stat()
    size = before.st_size
    with path.open("r+b") as file:
        for eighth in range(1, 7):
            file.seek(eighth * size // 8)
            byte = file.read(1)[0]
            file.seek(eighth * size // 8)
            file.write(bytes([byte ^ 0x08]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
