"""Packed weights: exact bytes, errors within what the format allows, and independent readings."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from adapmoe_lab.engine.quantised.code_layout import E2M1, pack, unpack
from adapmoe_lab.engine.quantised.packed import PackedMatrix
from adapmoe_lab.engine.quantised.quantise import pack_mxfp4, quantise
from adapmoe_lab.records.precision import PRECISIONS, Precision

INTEGERS = ["int8", "int4", "int3", "int2"]
PACKED = [*INTEGERS, "mxfp4"]
SOLVERS = ["hqq", "nearest"]
SHAPES = [(1, 1), (5, 48), (7, 33), (3, 64), (2, 200)]

# hqq 0.2.8.post1's Quantizer.quantize(axis=1, device="cpu", compute_dtype=float32), dequantised and
# stored as float16, of `reference_weights()` with this project's group sizes; hqq itself needs
# packages that have no place in a light test.
REFERENCE = Path(__file__).parents[1] / "fixtures" / "hqq_reconstruction.npz"


def reference_weights():
    weights = np.random.default_rng(7).standard_normal((32, 256)).astype(np.float32) * 0.02
    weights[5] *= 8
    return torch.from_numpy(weights)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def relative_error(matrix, weight):
    return float((matrix.dequantise(torch.float32) - weight).norm() / weight.norm())


def read_by_hand(matrix, row, column):
    """Return one weight as the format's definition reads it, bit by bit."""
    precision = matrix.precision
    bits, places = precision.bits, precision.block_groups
    group, inside = divmod(column, precision.group_size)
    block, place = divmod(group, places)
    unit = block * precision.group_size + inside
    field = matrix.part("codes")[row, unit].item() & 0xFFFF
    if bits == 3:
        field |= matrix.part("high_codes")[row, unit].item() << 16
    code = field >> place * bits & (1 << bits) - 1
    scale = matrix.part("scales")[group, row].item()
    if precision.name == "mxfp4":
        return E2M1[code] * 2.0 ** (scale - 127)
    zero = matrix.part("zeros")[group, row].item() / 255 * (2**bits - 1)
    return (code - zero) * scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PACKED)
def test_every_weight_lies_where_the_format_says(name, shape):
    matrix = quantise(gaussian(*shape), PRECISIONS[name])
    weights = matrix.dequantise(torch.float32)
    expected = [[read_by_hand(matrix, r, c) for c in range(shape[1])] for r in range(shape[0])]
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-5, atol=1e-9)


@settings(deadline=None)
@given(st.sampled_from(PACKED), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_codes_survive_packing(name, n_groups, seed):
    precision = PRECISIONS[name]
    shape = (2, n_groups, precision.group_size)
    codes = np.random.default_rng(seed).integers(0, 2**precision.bits, shape, dtype=np.uint8)
    planes = pack(torch.from_numpy(codes), precision)
    unpacked = unpack(planes, precision)
    padded = unpacked.shape[1]
    assert 0 <= padded - n_groups < precision.block_groups
    n_bits = 8 * sum(plane.numel() * plane.element_size() for plane in planes.values())
    assert n_bits == 2 * padded * precision.group_size * precision.bits
    np.testing.assert_array_equal(unpacked[:, :n_groups], codes)
    assert not unpacked[:, n_groups:].any()


@settings(deadline=None)
@given(
    st.sampled_from(INTEGERS),
    st.sampled_from(SHAPES),
    st.floats(-6, 3),
    st.sampled_from([-1.0, 0.0, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_rounding_to_nearest_errs_by_at_most_half_a_step(name, shape, magnitude, offset, seed):
    weight = (gaussian(*shape, seed=seed) + offset) * 10**magnitude
    matrix = quantise(weight, PRECISIONS[name], solver="nearest")
    error = (matrix.dequantise(torch.float32) - weight).abs()
    steps = matrix.part("scales").T.float().repeat_interleave(matrix.precision.group_size, dim=1)
    assert (error <= steps[:, : shape[1]] * 0.5001 + weight.abs() * 1e-6).all()


@pytest.mark.parametrize("name", INTEGERS)
def test_no_group_is_fitted_worse_than_rounded_to_nearest(name):
    weight, precision = gaussian(32, 256), PRECISIONS[name]
    errors = [
        (quantise(weight, precision, solver=solver).dequantise(torch.float32) - weight)
        for solver in SOLVERS
    ]
    squares = [e.unflatten(1, (-1, precision.group_size)).square().sum(-1) for e in errors]
    assert (squares[0] <= squares[1] * 1.0001).all()
    assert squares[0].sum() < squares[1].sum()
    powers = [e.abs().pow(0.7).mean() for e in errors]
    assert powers[0] <= powers[1]


@pytest.mark.parametrize(
    ("name", "allowed"), [("int8", 1.06), ("int4", 1), ("int3", 1), ("int2", 1)]
)
def test_fitting_errs_no_more_than_the_hqq_library(name, allowed):
    # int8 stores its zero as a whole code, the library's is a float: 5 % more of 0.5 %.
    weight = reference_weights()
    with np.load(REFERENCE) as reconstructions:
        theirs = torch.from_numpy(reconstructions[name]).float() - weight
    ours = quantise(weight, PRECISIONS[name]).dequantise(torch.float32) - weight
    assert ours.norm() <= allowed * theirs.norm()
    assert ours.abs().pow(0.7).mean() <= allowed * theirs.abs().pow(0.7).mean()


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_bits_err_less(solver):
    weight = gaussian(64, 512)
    errors = [
        relative_error(quantise(weight, PRECISIONS[n], solver=solver), weight) for n in INTEGERS
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.006 < errors[1] < 0.08 < errors[2] < 0.17 < errors[3] < 0.4


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", PACKED)
def test_zero_groups_stay_zero_and_constant_ones_stay_close(name, solver):
    weight = torch.zeros(3, 96)
    weight[1], weight[2] = 0.3, -0.3
    weights = quantise(weight, PRECISIONS[name], solver=solver).dequantise(torch.float32)
    assert (weights[0] == 0).all()
    tolerance = 0.2 if name == "mxfp4" else 1e-3  # of E2M1, the nearest to 0.3 is 0.25
    torch.testing.assert_close(weights, weight, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PACKED)
def test_matmul_is_linear_with_the_dequantised_weights(name, dtype):
    matrix = quantise(gaussian(40, 72), PRECISIONS[name])
    for n_tokens in (0, 1, 3):
        x = gaussian(n_tokens, 72, seed=1).to(dtype)
        expected = functional.linear(x, matrix.dequantise(dtype))
        assert torch.equal(matrix.matmul(x), expected)
        assert matrix.matmul(x).dtype == dtype


@pytest.mark.parametrize("name", PACKED)
def test_a_matrix_is_written_into_a_slot_and_read_without_a_copy(name):
    weight, precision = gaussian(5, 48), PRECISIONS[name]
    n_bytes = precision.matrix_bytes(5, 48)
    slot = torch.full((n_bytes + 64,), 0xAB, dtype=torch.uint8)
    matrix = quantise(weight, precision, out=slot[32 : 32 + n_bytes])
    assert torch.equal(matrix.data, quantise(weight, precision).data)
    assert (slot[:32] == 0xAB).all()
    assert (slot[32 + n_bytes :] == 0xAB).all()
    assert matrix.part("codes").data_ptr() == slot[32:].data_ptr()
    before = matrix.dequantise(torch.float32)
    slot[32:].bitwise_not_()
    assert not torch.equal(matrix.dequantise(torch.float32).nan_to_num(), before)


def test_rows_are_independent_of_how_they_are_blocked():
    weight = gaussian(600, 4096)
    matrix = quantise(weight, PRECISIONS["int4"], solver="nearest")
    tail = quantise(weight[590:], PRECISIONS["int4"], solver="nearest")
    assert torch.equal(matrix.part("codes")[590:], tail.part("codes"))
    assert torch.equal(matrix.dequantise(torch.float32)[590:], tail.dequantise(torch.float32))


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_mxfp4_checkpoints_are_read_as_transformers_reads_them(seed):
    numbers = np.random.default_rng(seed)
    blocks = torch.from_numpy(numbers.integers(0, 256, (6, 3, 16), dtype=np.uint8))
    scales = torch.from_numpy(numbers.integers(90, 160, (6, 3), dtype=np.uint8))
    # transformers takes experts [E, output, n_groups, 16] and returns them [E, input, output].
    expected = convert_moe_packed_tensors(blocks[None], scales[None])[0].mT
    assert torch.equal(pack_mxfp4(blocks, scales, 96).dequantise(torch.bfloat16), expected)
    assert torch.equal(pack_mxfp4(blocks, scales, 70).dequantise(torch.bfloat16), expected[:, :70])


def test_mxfp4_numbers_survive_quantising():
    exact = torch.tensor(E2M1).repeat(3, 4) * torch.tensor([[0.25], [1.0], [1024.0]])
    assert torch.equal(quantise(exact, PRECISIONS["mxfp4"]).dequantise(torch.float32), exact)


def test_mxfp4_takes_the_nearest_number():
    weight = gaussian(8, 64)
    matrix = quantise(weight, PRECISIONS["mxfp4"])
    scales = matrix.part("scales").int() - 127
    for row, column in np.ndindex(8, 64):
        levels = torch.tensor(E2M1) * 2.0 ** scales[column // 32, row]
        taken = matrix.dequantise(torch.float32)[row, column]
        assert (taken - weight[row, column]).abs() == (levels - weight[row, column]).abs().min()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_a_weight_that_is_not_finite_is_named(name, value):
    weight = gaussian(600, 1024)
    weight[500, 17] = value
    with pytest.raises(ValueError, match=rf"weight\[500, 17\] is {value}\. The checkpoint"):
        quantise(weight, PRECISIONS[name], solver="nearest")


INT4 = PRECISIONS["int4"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: quantise(gaussian(4, 32), INT4, solver="gptq"), "one of hqq, nearest; got 'gptq'"),
        (lambda: quantise(gaussian(2, 4, 32), INT4), "got torch.float32 [2, 4, 32]. Give one"),
        (lambda: quantise(torch.ones(2, 32).int(), INT4), "got torch.int32 [2, 32]"),
        (lambda: quantise(gaussian(4, 32) * 1e8, INT4), "15 times the largest float16, 65504"),
        (
            lambda: quantise(gaussian(4, 32), PRECISIONS["bfloat16"]),
            "needs a precision with codes, such as int4; bfloat16 has none",
        ),
        (
            lambda: quantise(gaussian(4, 32), INT4, out=torch.zeros(80, dtype=torch.uint8)),
            "need a contiguous uint8 [288]; got a contiguous uint8 [80]",
        ),
        (
            lambda: PackedMatrix(INT4, (4, 32), torch.zeros(576, dtype=torch.uint8)[::2]),
            "got a strided uint8 [288]",
        ),
        (
            lambda: PackedMatrix(INT4, (4, 32), torch.zeros(290, dtype=torch.uint8)[2:]),
            "a multiple of 16; got data 2 bytes past one",
        ),
        (
            lambda: quantise(gaussian(4, 32), INT4).matmul(gaussian(2, 31)),
            "x must be [n, 32], as many columns as the matrix has inputs; got [2, 31]",
        ),
        (
            lambda: pack_mxfp4(
                *(torch.zeros(s, dtype=torch.uint8) for s in [(4, 2, 16), (4, 2)]), 65
            ),
            "65 inputs make blocks [output, 3, 16] and scales [output, 3]; got [4, 2, 16]",
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


def test_other_group_sizes_work_too():
    weight, precision = gaussian(6, 100), Precision("int4", 4, group_size=16)
    assert relative_error(quantise(weight, precision), weight) < 0.08
