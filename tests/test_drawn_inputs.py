"""Drawn inputs: whatever plain transformers loads is served equally or refused in words.

Hypothesis draws configurations, layouts of shards, headers, number formats and arguments. Nothing
may end in a bare exception of another library, and nothing may be served otherwise than it is.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import change_config, check_equal_or_refused, refused_in_words
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from quantised_checkpoints import read_tensors, write_tensors
from safetensors.torch import save_file
from tiny_models import save_tiny

import adapmoe_lab as lab
from adapmoe_lab.models.checkpoint.checkpoint import look_at_model

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "hunyuan_v1_moe")
INDEX = "model.safetensors.index.json"
FAST_S, SLOW_S = 10.0, 100.0
"""Seconds for each of the six tests."""
BATCH = 8
"""Examples that share a seed, which a failure names."""

WHOLE = st.sampled_from([0, 1, 2, 3, 4, 8, 64, 128, -1])
ODD = st.one_of(
    WHOLE,
    st.sampled_from([None, True, False, 0.5, -1.5, "2", "", "nonsense", [], [2, 2, 2], [2, 1], {}]),
)
FIELDS = st.sampled_from(
    [
        "num_experts_per_tok", "num_local_experts", "num_experts", "n_routed_experts", "moe_topk",
        "num_hidden_layers", "hidden_size", "intermediate_size", "moe_intermediate_size",
        "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "hidden_act",
        "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "norm_topk_prob",
        "tie_word_embeddings", "dtype", "torch_dtype", "model_type", "architectures",
        "quantization_config", "attn_implementation", "auto_map", "max_position_embeddings",
        "sliding_window", "router_jitter_noise", "pad_token_id", "eos_token_id", "n_group",
        "topk_group", "first_k_dense_replace", "routed_scaling_factor", "num_shared_expert",
        "transformers_weights", "text_config", "mlp_only_layers", "decoder_sparse_step",
    ]
)  # fmt: skip
SPECIAL: dict[str, list[Any]] = {
    "quantization_config": [
        {"quant_method": name} for name in ("fp8", "mxfp4", "gptq", "awq", "bitsandbytes")
    ],
    "dtype": ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"],
    "hidden_act": ["silu", "gelu", "relu"],
    "rope_scaling": [{"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}],
    "transformers_weights": ["model.safetensors", "../model.safetensors", "other.safetensors"],
    "mlp_only_layers": [[0], [0, 1, 2]],
}
NUMBER_FORMATS = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int8, torch.uint8, torch.int64, torch.bool,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Return a small checkpoint of every family, each in one file."""
    made = {}
    for family in FAMILIES:
        made[family] = save_tiny(family, tmp_path_factory.mktemp(family))
        write_tensors(made[family], read_tensors(made[family]))
    return made


@contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """Give a copy to be changed, and remove it."""
    with tempfile.TemporaryDirectory() as place:
        yield shutil.copytree(folder, Path(place) / "model")


@st.composite
def changed_fields(draw) -> dict[str, Any]:
    """Draw one to three fields of a configuration and values for them, fitting or not."""
    names = draw(st.lists(FIELDS, min_size=1, max_size=3, unique=True))
    return {
        name: draw(st.one_of(ODD, st.sampled_from(SPECIAL[name])) if name in SPECIAL else ODD)
        for name in names
    }


def check_configuration(folders: dict[str, Path], family: str, fields: dict[str, Any]) -> None:
    with copied(folders[family]) as folder:
        change_config(folder, fields)
        check_equal_or_refused(folder)
        refused_in_words(lambda: look_at_model(folder))


def check_layout(folders: dict[str, Path], family: str, draw: Callable[..., Any]) -> None:
    """Divide the tensors into files at random, some twice, some nowhere, some in none's place."""
    with copied(folders[family]) as folder:
        tensors = read_tensors(folder)
        (folder / "model.safetensors").unlink()
        n_files = draw(st.integers(1, 3))
        files = [f"model-{number}.safetensors" for number in range(n_files)]
        home = {name: files[number % n_files] for number, name in enumerate(sorted(tensors))}
        content = {file: {n: tensors[n] for n, at in home.items() if at == file} for file in files}
        names = st.sampled_from(sorted(tensors))
        for name in draw(st.lists(names, max_size=1)):  # a second copy of other values
            content[draw(st.sampled_from(files))].setdefault(name, tensors[name] + 1)
        for name in draw(st.lists(names, max_size=1)):  # left out of its file
            content[home[name]].pop(name, None)
        for name in draw(st.lists(names, max_size=2)):  # left out of the index
            home.pop(name, None)
        for name in draw(st.lists(names, max_size=1)):  # placed elsewhere by the index
            home[name] = draw(st.sampled_from(files))
        for file in files:
            save_file(content[file], folder / file, metadata={"format": "pt"})
        if draw(st.booleans()):
            beside = draw(st.sampled_from(["model.safetensors", "extra.safetensors"]))
            whole = draw(st.booleans())
            save_file(
                tensors if whole else {"extra": torch.ones(2)}, folder / beside,
                metadata={"format": "pt"},
            )  # fmt: skip
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": home}))
        check_equal_or_refused(folder)


def check_header(folders: dict[str, Path], family: str, draw: Callable[..., Any]) -> None:
    """Change what the header of a file says of one tensor."""
    with copied(folders[family]) as folder:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        tensor = header[draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
        part = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        tensor[part] = draw(
            {
                "dtype": st.sampled_from(["F32", "I32", "U32", "F64", "BF16", "X9", None, 3]),
                "shape": st.lists(st.sampled_from([-1, 0, 1, 2, 32, 2.5, 2**40]), max_size=3),
                "data_offsets": st.lists(st.sampled_from([-1, 0, 4, 4096, 2**62]), max_size=3),
            }[part]
        )
        if draw(st.booleans()):
            tensor["surplus"] = 1
        encoded = json.dumps(header).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[end:])
        check_equal_or_refused(folder)


def check_formats(folders: dict[str, Path], family: str, draw: Callable[..., Any]) -> None:
    """Store some tensors in other number formats, float8 with scales or without."""
    with copied(folders[family]) as folder:
        tensors = read_tensors(folder)
        for name in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3)):
            dtype = draw(st.sampled_from(NUMBER_FORMATS))
            tensors[name] = tensors[name].to(dtype)
            if dtype == torch.float8_e4m3fn and draw(st.booleans()):
                return  # whether scales beside float8 are right is tested by their own tests
        write_tensors(folder, tensors)
        check_equal_or_refused(folder)


LOAD_ARGUMENTS = {
    "device": ["cpu", "cuda:99", "tpu", 3, None, "", torch.device("cpu"), torch.device("meta")],
    "dtype": ["float32", "bf16", torch.float32, "int8", None, 16, ""],
    "expert_dtype": [
        "auto", "int4", "int5", torch.bfloat16, None, 4, [], [["int4"] * 8] * 3, [["int4"]], "",
    ],
    "expert_memory": [
        "50%", "1GiB", 0, -1, 0.5, float("inf"), float("nan"), "half", "", True, np.int64(10**6),
        [], "-3MiB", "1e3", "150%", 10**30,
    ],
    "host_memory": ["1GiB", 0, -5, "x", float("nan"), np.float32(1e9), None],
    "max_context_tokens": [16, "16", 0, -2, 1.5, float("inf"), None, np.int32(8), 10**12],
    "batch_size": [1, 2, 0, -1, "2", 1.5, None],
    "link": ["none", "nonsense", 3, ""],
    "revision": ["main", 3, ""],
    "config": ["missing.json", 3, {}, ""],
    "store": ["", 3],
}  # fmt: skip


def check_arguments(folders: dict[str, Path], family: str, draw: Callable[..., Any]) -> None:
    names = draw(st.lists(st.sampled_from(sorted(LOAD_ARGUMENTS)), min_size=1, max_size=3))
    given_forms = {name: draw(st.sampled_from(LOAD_ARGUMENTS[name])) for name in names}
    plain = {"link": "none", "announce": lambda text: None}
    refused_in_words(lambda: lab.load(folders[family], **{**plain, **given_forms}))


USE_ARGUMENTS: dict[str, list[Any]] = {
    "texts": [
        "one text", ["a b", "c d"], [], [""], None, 3, [3], [b"bytes"], {"kind": "a text"}, [None],
    ],
    "max_tokens": [4, 0, -1, "4", 1.5, np.int64(3), None, float("nan")],
    "labels": [None, "ab", ["x"], 3],
    "n_candidates": [None, 1, 0, 99, "1"],
    "skipped_fraction": [None, 0.1, 0, 1, -0.1, "0.1", float("nan"), True],
    "expert_memory": ["50%", 0, "x", None, 0.5, float("inf")],
    "method": ["uniform", "nonsense", None, 3],
    "max_loss_increase_nats": [0.01, -1, float("nan"), "x", 0],
}  # fmt: skip


def check_uses(loaded: dict[str, Any], draw: Callable[..., Any]) -> None:
    """Profile and tune with drawn arguments."""
    model, trace, sensitivity = (loaded[name] for name in ("model", "trace", "sensitivity"))
    forms = {name: draw(st.sampled_from(values)) for name, values in USE_ARGUMENTS.items()}
    chosen = draw(st.sets(st.sampled_from(sorted(forms)), min_size=1, max_size=2))
    of_profile = {n: forms[n] for n in ("max_tokens", "labels", "n_candidates") if n in chosen}
    texts = forms["texts"] if "texts" in chosen else ["Once upon a time"]
    with tempfile.TemporaryDirectory() as project:
        refused_in_words(lambda: lab.profile(model, texts, project=project, **of_profile))
    of_tune = {
        n: forms[n]
        for n in ("skipped_fraction", "expert_memory", "method", "max_loss_increase_nats")
        if n in chosen
    }
    refused_in_words(lambda: lab.tune(trace, sensitivity, **of_tune))


@pytest.fixture(scope="module")
def loaded(folders, tmp_path_factory) -> dict[str, Any]:
    """Return a loaded model with a trace and a sensitivity."""
    model = lab.load(folders["mixtral"], link="none", device="cpu", announce=lambda text: None)
    texts = ["Once upon a time there was a king.", "def square(x): return x * x"]
    return {
        "model": model,
        "trace": lab.profile(model, texts, project=tmp_path_factory.mktemp("project")),
        "sensitivity": lab.sensitivity(model, texts),
    }


def drawn(budget_s: float, check: Callable[..., None], first_seed: int) -> None:
    """Run a check on batches of drawn examples until its time is over."""
    end = time.monotonic() + budget_s
    for number in itertools.count(first_seed):
        if time.monotonic() > end:
            return

        @seed(number)
        @settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def run(data) -> None:
            check(data.draw)

        run()


@pytest.fixture
def checks(folders, loaded) -> dict[str, Callable[..., None]]:
    """Return what to check by name, each of a function that draws."""
    family = st.sampled_from(FAMILIES)
    return {
        "configuration": lambda draw: check_configuration(
            folders, draw(family), draw(changed_fields())
        ),
        "layout": lambda draw: check_layout(folders, draw(family), draw),
        "header": lambda draw: check_header(folders, draw(family), draw),
        "formats": lambda draw: check_formats(folders, draw(family), draw),
        "arguments": lambda draw: check_arguments(folders, draw(family), draw),
        "uses": lambda draw: check_uses(loaded, draw),
    }


KINDS = ("configuration", "layout", "header", "formats", "arguments", "uses")


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_inputs_are_served_equally_or_refused_in_words(checks, kind):
    drawn(FAST_S, checks[kind], first_seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_drawn_inputs_are_served_equally_or_refused_in_words(checks, kind):
    drawn(SLOW_S, checks[kind], first_seed=0)
