"""Surrogates and the configs that name them: read back whole, or refused with the reason."""

import json
from dataclasses import replace

import numpy as np
import pytest
from drawn_surrogates import random_surrogates
from traces import make_spec

from adapmoe_lab.records import GatingTable, RecordError, Surrogates, TunedConfig


@pytest.fixture
def surrogates():
    return random_surrogates(make_spec(), ranks=[0, 3, 1])


@pytest.fixture
def config(surrogates):
    spec = make_spec()
    return replace(
        TunedConfig.untuned(spec),
        gating=GatingTable.per_layer([0.7] * 3, top_k=2),
        compensation=surrogates,
    )


def assert_equal(found, expected):
    for name in ("down", "up", "offset"):
        for a, b in zip(getattr(found, name), getattr(expected, name), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(found.gain, expected.gain)
    assert found.fingerprint() == expected.fingerprint()


def test_reads_back_equal(surrogates, tmp_path):
    made = replace(surrogates, n_tokens=99, texts="abc", gradient_weighted=True)
    again = Surrogates.load(made.save(tmp_path / "made.safetensors"))
    assert_equal(again, made)
    assert (again.n_tokens, again.texts, again.gradient_weighted) == (99, "abc", True)


def test_bytes_are_those_of_every_number(surrogates):
    arrays = [*surrogates.down, *surrogates.up, *surrogates.offset]
    assert surrogates.n_bytes(2) == 2 * sum(array.size for array in arrays)
    assert surrogates.ranks == (0, 3, 1)


def test_values_and_origin_tell_surrogates_apart(surrogates):
    others = [
        replace(surrogates, gain=surrogates.gain + 0.1),
        replace(surrogates, texts="others"),
        random_surrogates(make_spec(), ranks=[0, 3, 1], seed=1),
    ]
    assert len({s.fingerprint() for s in (surrogates, *others)}) == 4
    assert random_surrogates(make_spec(), [0, 3, 1]).fingerprint() == surrogates.fingerprint()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"gain": [0.0]}, "3 of down, 3 of up, 3 of offset, 1 of gain"),
        ({"up": [np.zeros((8, 16, 2))] * 3}, r"up of layer 0 must have shape \[8, 16, 0\], got"),
        ({"offset": [np.zeros((8, 4))] * 3}, r"down of layer 0 must have shape \[8, 0, 4\]"),
        ({"offset": [np.zeros(8)] * 3}, r"offset of layer 0 must have shape \[any, any\], got"),
        ({"gain": [0, 0, np.nan]}, "must be finite; fit them again"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(surrogates, changed, expected):
    with pytest.raises(RecordError, match=expected):
        replace(surrogates, **changed)


def test_a_config_keeps_its_surrogates_in_a_file_beside_it(config, tmp_path):
    path = config.save(tmp_path / "tuned.json")
    section = json.loads(path.read_text())["compensation"]
    assert section["file"] == f"tuned.{section['sha256'][:12]}.safetensors"
    assert section["ranks"] == [0, 3, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == [section["file"], "tuned.json"]
    again = TunedConfig.load(path)
    assert_equal(again.compensation, config.compensation)
    assert again.to_json() == config.to_json()


def test_a_config_saved_again_finds_its_own(config, tmp_path):
    """Both files stay; each config names the one it was saved with."""
    first = config.save(tmp_path / "tuned.json").read_text()
    other = replace(config, compensation=random_surrogates(make_spec(), seed=1))
    path = other.save(tmp_path / "tuned.json")
    assert_equal(TunedConfig.load(path).compensation, other.compensation)
    path.write_text(first)
    assert_equal(TunedConfig.load(path).compensation, config.compensation)


def test_what_is_beside_a_config_is_checked(config, tmp_path):
    path = config.save(tmp_path / "tuned.json")
    (tensors,) = tmp_path.glob("*.safetensors")
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RecordError, match=r"has the SHA-256 \w{12}, expected \w{12}: it changed"):
        TunedConfig.load(path)
    tensors.unlink()
    with pytest.raises(RecordError, match=r"needs tuned\.\w{12}\.safetensors beside it, which is"):
        TunedConfig.load(path)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"kind": "quantised"}, "asks for compensation by 'quantised'; expected 'surrogates'"),
        ({"file": "../tuned.safetensors"}, "must lie beside it, without a folder in their name"),
        ({"sha256": "0" * 64}, r"has the SHA-256 \w{12}, expected 000000000000"),
    ],
)
def test_a_wrong_section_is_named(config, tmp_path, changed, expected):
    path = config.save(tmp_path / "tuned.json")
    document = json.loads(path.read_text())
    document["compensation"].update(changed)
    path.write_text(json.dumps(document))
    with pytest.raises(RecordError, match=expected):
        TunedConfig.load(path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.9])
def test_a_file_cut_short(surrogates, tmp_path, share):
    path = surrogates.save(tmp_path / "made.safetensors")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(RecordError, match=r"does not hold whole surrogates .*; fit them again"):
        Surrogates.load(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="No surrogates at"):
        Surrogates.load(tmp_path / "none.safetensors")


def test_another_models_surrogates_are_refused(config):
    other = random_surrogates(make_spec(n_experts=4))
    with pytest.raises(RecordError, match=r"fitted to a model of 3 layers x 4 experts.*for 'synth"):
        replace(config, compensation=other)
    same_shape = replace(config.compensation, model_fingerprint="0123")
    with pytest.raises(RecordError, match=r"fingerprint 0123;.*Fit surrogates to this model"):
        replace(config, compensation=same_shape)


def test_two_rules_for_the_kept_weights_are_refused(config):
    renormalising = replace(config.gating, renormalise=True)
    with pytest.raises(RecordError, match="renormalises the kept weights and the surrogates scale"):
        replace(config, gating=renormalising)
