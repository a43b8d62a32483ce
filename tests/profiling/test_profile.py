"""Recorded routing against what the unmodified model routes."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from adapmoe_lab.engine.observing import observing
from adapmoe_lab.profiling.routing.profile import profile
from adapmoe_lab.profiling.routing.recorder import RoutingRecorder
from adapmoe_lab.records import RoutingTrace
from adapmoe_lab.records.hook_points import HookPoint


def plain_routing(checkpoint, ids):
    """Return router logits [T, L, E] and MoE inputs [T, L, D] of the unmodified model."""
    hf = AutoModelForCausalLM.from_pretrained(checkpoint)
    inputs, logits = [], []
    for layer in hf.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
        layer.mlp.gate.register_forward_hook(lambda _, __, out: logits.append(out[0]))
    with torch.no_grad():
        hf(ids[None])
    return torch.stack(logits, dim=1), torch.stack(inputs, dim=1), hf


def test_trace_holds_the_routing_of_the_unmodified_model(
    tiny_checkpoint, load_tiny, texts, tmp_path
):
    model = load_tiny(expert_memory="60%")
    trace = profile(model, texts, labels=["story", "code", "tale"], project=tmp_path)
    lengths = [len(model.encode(text)) for text in texts]
    assert trace.n_tokens == sum(lengths)
    assert trace.sequence_starts.tolist() == [0, *np.cumsum(lengths)[:-1]]
    assert np.bincount(trace.step_ids).tolist() == lengths
    assert trace.labels == ("story", "code", "tale")
    assert not trace.is_decode.any()
    logits, inputs, hf = plain_routing(tiny_checkpoint, model.encode(texts[0]))
    first = slice(0, lengths[0])
    probs = logits.softmax(-1)
    np.testing.assert_allclose(trace.router_probs[first], probs.numpy(), atol=1e-3)
    top = probs.topk(2, dim=-1)
    np.testing.assert_array_equal(trace.expert_indices[first], top.indices.numpy())
    weights = top.values / top.values.sum(-1, keepdim=True)
    np.testing.assert_allclose(trace.weights[first], weights.numpy(), atol=1e-5)
    predicted = trace.predictions["next_router"][1].experts[first]
    assert (predicted[:, 0] == -1).all()
    for layer in (1, 2):
        router = hf.model.layers[layer].mlp.gate.weight
        expected = torch.nn.functional.linear(inputs[:, layer - 1], router).topk(2).indices
        np.testing.assert_array_equal(predicted[:, layer], expected.numpy())


def test_a_kept_trace_is_reused_with_a_note(load_tiny, texts, tmp_path, capsys):
    model = load_tiny()
    first = profile(model, texts, project=tmp_path)
    assert "Recorded" in capsys.readouterr().out
    second = profile(model, texts, project=tmp_path)
    assert "Reused the trace of" in capsys.readouterr().out
    assert second.fingerprint() == first.fingerprint()
    profile(model, texts[:1], project=tmp_path)
    assert "Recorded" in capsys.readouterr().out
    profile(model, texts, project=tmp_path, reuse=False)
    assert "Recorded" in capsys.readouterr().out


def test_a_damaged_trace_is_recorded_again(load_tiny, texts, tmp_path, capsys):
    model = load_tiny()
    profile(model, texts, project=tmp_path)
    (kept,) = tmp_path.rglob("*.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    profile(model, texts, project=tmp_path)
    assert "Recording again, since the kept trace cannot be read" in capsys.readouterr().out
    assert RoutingTrace.load(kept).n_tokens > 0


def test_the_project_folder_may_be_named_by_the_environment(
    load_tiny, texts, tmp_path, monkeypatch
):
    monkeypatch.setenv("ADAPMOE_LAB_PROJECT", str(tmp_path / "mine"))
    profile(load_tiny(), texts)
    assert list((tmp_path / "mine" / "traces").glob("*.npz"))


def test_texts_may_come_by_their_labels(load_tiny, tmp_path):
    trace = profile(load_tiny(), {"story": "Once upon", "code": "x = 1"}, project=tmp_path)
    assert trace.labels == ("story", "code")
    assert np.diff([*trace.sequence_starts, trace.n_tokens]).tolist() == [9, 5]


@pytest.mark.parametrize("labels", ["abc", ["a", "b"]])
def test_labels_that_do_not_fit_are_refused_before_the_work(load_tiny, tmp_path, labels):
    seen = []
    with pytest.raises(ValueError, match="3 texts need as many labels, got"):
        profile(
            load_tiny(), ["x", "y", "z"], labels=labels, project=tmp_path,
            progress=lambda *told: seen.append(told),
        )  # fmt: skip
    assert not seen


def test_a_project_that_cannot_be_written_is_found_before_the_work(load_tiny, texts, tmp_path):
    (tmp_path / "file").write_text("in the way")
    seen = []
    with pytest.raises(NotADirectoryError, match=r"cannot be kept: .*file is no folder.* project="):
        profile(
            load_tiny(), texts, project=tmp_path / "file" / "project",
            progress=lambda *told: seen.append(told),
        )  # fmt: skip
    assert not seen
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_trace_that_cannot_be_kept_after_all_is_returned_with_a_note(
    load_tiny, texts, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RoutingTrace, "save", full)
    trace = profile(load_tiny(), texts, project=tmp_path)
    assert trace.n_tokens == sum(map(len, texts))
    assert "not kept" in (told := capsys.readouterr().out)
    assert "No space left on device" in told


def test_padded_batches_are_refused(load_tiny):
    model = load_tiny()
    with (
        RoutingRecorder(model).recording(),
        pytest.raises(ValueError, match="one sequence at a time, got a batch of 2"),
    ):
        model.hf(torch.ones((2, 5), dtype=torch.long))


def test_a_pass_without_token_ids_is_refused(load_tiny):
    model = load_tiny()
    embedded = model.hf.get_input_embeddings()(torch.tensor([[1, 2, 3]]))
    with RoutingRecorder(model).recording() as recorder:
        model.hf(torch.tensor([[1, 2, 3]]))
        with pytest.raises(ValueError, match="run the model on token ids, not on embeddings"):
            model.hf(inputs_embeds=embedded)
    assert recorder.trace().n_tokens == 3


def test_nothing_recorded_and_no_text_are_errors(load_tiny):
    model = load_tiny()
    with pytest.raises(ValueError, match="Nothing was recorded"):
        RoutingRecorder(model).trace()
    with pytest.raises(ValueError, match="at least one text"):
        profile(model, [])
    with pytest.raises(ValueError, match="an empty text"):
        profile(model, ["good", ""])


def test_an_interrupted_forward_leaves_no_half_step(load_tiny):
    model = load_tiny()
    recorder = RoutingRecorder(model)

    def stop(layer_pass):
        if layer_pass.layer == 1:
            raise KeyboardInterrupt

    with torch.no_grad(), recorder.recording():
        model.hf(model.encode("whole")[None])
        with pytest.raises(KeyboardInterrupt), observing(model, {HookPoint.EXPERTS_OUTPUT: stop}):
            model.hf(model.encode("broken off")[None])
        model.hf(model.encode("whole again")[None])
    assert recorder.trace().n_tokens == len("whole") + len("whole again")
