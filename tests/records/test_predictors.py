"""Fitted predictors: read back whole, or refused with the reason."""

from dataclasses import replace

import numpy as np
import pytest
from traces import make_spec

from adapmoe_lab.records import Predictors, RecordError


@pytest.fixture
def predictors():
    rng, spec = np.random.default_rng(0), make_spec()
    return Predictors(
        model_fingerprint=spec.fingerprint(),
        ridge={distance: rng.normal(size=(3, 17, 8)) for distance in (1, 2)},
        table_tokens=[4, 9],
        token_table=rng.normal(size=(2, 8)),
        last_hidden=rng.normal(size=(17, 8)),
        n_tokens=99,
        texts="abc",
    )


def test_reads_back_equal(predictors, tmp_path):
    again = Predictors.load(predictors.save(tmp_path / "made.safetensors"), predictors.sha256)
    for name in ("table_tokens", "token_table", "last_hidden"):
        np.testing.assert_array_equal(getattr(again, name), getattr(predictors, name))
    assert again.ridge.keys() == {1, 2}
    for distance, weights in predictors.ridge.items():
        np.testing.assert_array_equal(again.ridge[distance], weights)
    assert (again.n_tokens, again.texts) == (99, "abc")
    assert again.fingerprint() == predictors.fingerprint()


def test_bytes_leave_out_layers_without_a_source(predictors):
    assert predictors.n_bytes == 4 * ((2 + 1) * 17 * 8 + 2 + 2 * 8 + 17 * 8)


def test_values_and_origin_tell_them_apart(predictors):
    others = [
        replace(predictors, last_hidden=predictors.last_hidden + 1),
        replace(predictors, ridge={1: predictors.ridge[1]}),
        replace(predictors, texts="others"),
    ]
    assert len({one.fingerprint() for one in (predictors, *others)}) == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"table_tokens": [9, 4]}, "table_tokens must ascend, every token once"),
        ({"table_tokens": [4]}, r"token_table must have shape \[1, 8\], got \[2, 8\]"),
        ({"ridge": {0: np.zeros((3, 17, 8))}}, "distance 0 looks at no earlier layer"),
        (
            {"ridge": {1: np.zeros((3, 17, 8)), 2: np.zeros((2, 17, 8))}},
            r"ridge at distance 2 must have shape \[3, 17, 8\], got \[2, 17, 8\]",
        ),
        ({"last_hidden": np.full((17, 8), np.nan)}, "must be finite; fit them again"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(predictors, changed, message):
    with pytest.raises(RecordError, match=message):
        replace(predictors, **changed)


def test_a_changed_or_cut_file_is_refused(predictors, tmp_path):
    path = predictors.save(tmp_path / "made.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RecordError, match=r"it changed .*or fit the predictors again"):
        Predictors.load(path, predictors.sha256)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(RecordError, match=r"does not hold whole predictors .*; fit them again"):
        Predictors.load(path)
    with pytest.raises(FileNotFoundError, match="No predictors at"):
        Predictors.load(tmp_path / "none.safetensors")


def test_another_model_is_refused(predictors):
    predictors.check_model(make_spec())
    with pytest.raises(
        RecordError, match=r"'synthetic' .* has fingerprint .* Fit predictors to it"
    ):
        predictors.check_model(make_spec(n_experts=4))
