"""Packed matrices on a real GPU: the kernels read what the CPU reads."""

import pytest
import torch

from adapmoe_lab.engine.quantised.packed import PackedMatrix
from adapmoe_lab.engine.quantised.quantise import quantise
from adapmoe_lab.records.precision import ALIGNMENT, PRECISIONS

pytest.importorskip("triton", reason="without triton, CUDA devices take the CPU's path")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

PACKED = ["int8", "int4", "int3", "int2", "mxfp4"]
SHAPES = [(1, 1), (7, 33), (300, 1000), (4100, 2048)]
MANY_ROWS = [(6500, 100), (25700, 70)]  # those that take the largest tiles

# Of the sum of |x| |w|: float32 sums; two roundings to the 8 bits of bfloat16, of the product and,
# where weights are unpacked first, of each weight.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def packed_on_both(name, shape, offset=0):
    """Return a matrix on the CPU and the same bytes `offset` bytes into a CUDA slot."""
    matrix = quantise(gaussian(*shape), PRECISIONS[name], solver="nearest")
    slot = torch.zeros(matrix.data.numel() + offset, dtype=torch.uint8, device="cuda")
    slot[offset:] = matrix.data.cuda()
    return matrix, PackedMatrix(matrix.precision, shape, slot[offset:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [1, 2, 8, 9])
@pytest.mark.parametrize("shape", SHAPES + MANY_ROWS)
@pytest.mark.parametrize("name", PACKED)
def test_matmul_is_close_to_the_dequantised_weights(name, shape, n_tokens, dtype):
    on_cpu, on_gpu = packed_on_both(name, shape)
    x = gaussian(n_tokens, shape[1], seed=1).to(dtype)
    weights = on_cpu.dequantise(torch.float32).double()
    expected = x.double() @ weights.T
    scale = x.double().abs() @ weights.abs().T
    product = on_gpu.matmul(x.cuda())
    assert product.dtype == dtype
    assert ((product.double().cpu() - expected).abs() <= TOLERANCE[dtype] * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PACKED)
def test_dequantised_weights_are_the_cpus(name, shape, dtype):
    on_cpu, on_gpu = packed_on_both(name, shape)
    assert torch.equal(on_gpu.dequantise(dtype).cpu(), on_cpu.dequantise(dtype))


@pytest.mark.parametrize("name", PACKED)
def test_a_slot_may_begin_at_any_multiple_of_the_alignment(name):
    _, aligned = packed_on_both(name, (37, 200))
    _, shifted = packed_on_both(name, (37, 200), offset=ALIGNMENT)
    x = gaussian(1, 200, seed=1).cuda()
    assert torch.equal(shifted.dequantise(torch.float32), aligned.dequantise(torch.float32))
    assert torch.equal(shifted.matmul(x), aligned.matmul(x))


@pytest.mark.parametrize("magnitude", [2.0**-40, 2.0**60])
@pytest.mark.parametrize("name", PACKED)
def test_x_may_be_tiny_or_huge(name, magnitude):
    _, matrix = packed_on_both(name, (37, 200))
    x = gaussian(1, 200, seed=1).cuda()
    product = matrix.matmul(x * magnitude) / magnitude
    torch.testing.assert_close(product, matrix.matmul(x), rtol=1e-4, atol=1e-7)


def test_x_may_be_a_strided_view():
    _, matrix = packed_on_both("int4", (37, 200))
    x = gaussian(200, 3, seed=1).cuda().T
    assert torch.equal(matrix.matmul(x), matrix.matmul(x.contiguous()))
