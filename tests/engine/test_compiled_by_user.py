"""A model whose user compiles it: experts are driven from the host, and nothing of that is seen."""

import pytest
import torch
from tiny_models import RECIPES, save_tiny

from adapmoe_lab.engine.loading import load

N_LAYERS = 10
"""More than the 8 forms that torch keeps of one function."""


@pytest.fixture
def _forgetting():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_forgetting")
def test_layers_do_not_use_up_what_a_compiler_keeps(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "mixtral", {**RECIPES["mixtral"], "num_hidden_layers": N_LAYERS})
    folder = save_tiny("mixtral", tmp_path)
    model = load(folder, device="cpu", link="none", announce=lambda _: None)
    assert model.spec.n_layers == N_LAYERS
    ids = torch.arange(1, 9)[None]
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        expected = model.hf(ids, use_cache=False).logits
        found = torch.compile(model.hf, backend="eager")(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected)
