"""torch's quantized linear layers, each against the product with the dequantized weight."""

from __future__ import annotations

import pytest
import torch

from river_compile.exporters.quantizers.rtn import RoundToNearest
from river_compile.exporters.torch.linear import Dequantized, Int4Cpu, Int4Cuda, lowering_for
from river_compile.exporters.torch.weights import Store
from river_compile.passes.fx.grow_river import Product, RiverLinear
from river_compile.passes.quantizer import QuantizedWeight


def linear(inputs: int, outputs: int, bits: int = 4, group_size: int = 32, transposed: bool = True) -> RiverLinear:
    return RiverLinear("name", 0, "weight", transposed, inputs, outputs, bits, group_size, "")


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_off_by_half_a_step_at_most_and_keeps_zero(bits: int) -> None:
    weight = torch.randn(64, 48)
    weight[:, 5] = 0
    weight[:32, 6] = weight[:32, 6].abs() + 1
    quantized = RoundToNearest().quantize(weight.numpy(), bits, 32)
    found = torch.from_numpy(quantized.dequantize())
    step = torch.from_numpy(quantized.scales).T.repeat_interleave(32, 0)
    assert ((found - weight).abs() <= step * 0.501).all()
    assert not found[:, 5].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (8, 32), (4, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("outputs", [64, 40])
def test_the_cpu_kernel_multiplies_with_the_dequantized_weight(
    bits: int, group_size: int, bias: bool, dtype: torch.dtype, outputs: int
) -> None:
    torch.manual_seed(0)
    quantized = RoundToNearest().quantize(torch.randn(64, outputs).numpy(), bits, group_size)
    activation = torch.randn(2, 3, 64, dtype=dtype)
    addend = torch.randn(outputs, dtype=dtype) if bias else None
    lowering = Int4Cpu()
    operands = lowering.pack(quantized, dtype, torch.device("cpu"))
    found = lowering.function(activation, operands, outputs, bits, group_size, addend)
    expected = activation.float() @ torch.from_numpy(quantized.dequantize())
    expected = expected if addend is None else expected + addend.float()
    assert found.dtype == dtype
    assert found.shape == (2, 3, outputs)
    scale = float(expected.abs().max())
    assert float((found.float() - expected).abs().max()) < 0.01 * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_eight_bits_take_one_scale_an_output_where_that_is_faster_and_close(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    asked: list[torch.dtype] = []

    def prefers_int8(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
        asked.append(dtype)
        return True

    lowering = Int4Cpu(prefers_int8)
    weight = torch.randn(64, 40)
    eight = RoundToNearest().quantize(weight.numpy(), 8, 32)
    operands = lowering.pack(eight, dtype, torch.device("cpu"))
    assert [operand.dtype for operand in operands] == [torch.int8, torch.float32, torch.bfloat16]
    activation, addend = torch.randn(2, 3, 64, dtype=dtype), torch.randn(40, dtype=dtype)
    found = lowering.function(activation, operands, 40, 8, 32, addend)
    expected = activation.float() @ torch.from_numpy(eight.dequantize()) + addend.float()
    assert (found.dtype, found.shape) == (dtype, (2, 3, 40))
    assert float((found.float() - expected).norm() / expected.norm()) < 0.015
    # A river piece is never run as it is: Inductor must take the kernel's operands.
    compiled = torch.compile(lowering.function)(activation, operands, 40, 8, 32, addend)
    assert float((compiled.float() - expected).norm() / expected.norm()) < 0.015
    # A number that stands out takes the step of all others of its output, and groups would have kept them apart.
    weight[0] = 50
    apart = RoundToNearest().quantize(weight.numpy(), 8, 32)
    assert lowering.pack(apart, dtype, torch.device("cpu"))[0].dtype != torch.int8
    four = RoundToNearest().quantize(weight.numpy(), 4, 32)
    assert lowering.pack(four, dtype, torch.device("cpu"))[0].dtype != torch.int8
    assert asked == [dtype, dtype]


def test_eight_bits_are_far_closer_to_the_float_product_than_four() -> None:
    torch.manual_seed(0)
    weight, activation = torch.randn(256, 64), torch.randn(4, 256, dtype=torch.bfloat16)
    exact = activation.float() @ weight
    errors = []
    for bits in (4, 8):
        operands = Int4Cpu().pack(RoundToNearest().quantize(weight.numpy(), bits, 32), exact.dtype, exact.device)
        found = Int4Cpu().function(activation, operands, 64, bits, 32, None)
        errors.append(float((found.float() - exact).norm() / exact.norm()))
    assert errors[1] < errors[0] / 6


def test_each_device_has_its_lowering() -> None:
    assert isinstance(lowering_for(torch.device("cpu")), Int4Cpu)
    assert isinstance(lowering_for(torch.device("cuda")), Int4Cuda)


def test_a_weight_is_held_once_until_it_changes_or_dies() -> None:
    store = Store()
    parameter = torch.nn.Parameter(torch.randn(32, 64))
    product = Product((linear(64, 32),))
    first = store.get([parameter], product, Dequantized(), RoundToNearest())
    assert store.get([parameter], product, Dequantized(), RoundToNearest())[0] is first[0]
    assert store.nbytes([parameter]) == first[0].nbytes
    with torch.no_grad():
        parameter.add_(1)
    assert store.get([parameter], product, Dequantized(), RoundToNearest())[0] is not first[0]
    assert store.nbytes([parameter]) == first[0].nbytes
    other = torch.nn.Parameter(torch.randn(32, 64))
    assert store.nbytes([other]) == 0


def test_weights_side_by_side_are_one_product() -> None:
    parameters = [torch.nn.Parameter(torch.randn(32, 64)), torch.nn.Parameter(torch.randn(64, 16))]
    product = Product((linear(64, 32), linear(64, 16, transposed=False)))
    (joined,) = Store().get(parameters, product, Dequantized(), RoundToNearest())
    apart = [
        RoundToNearest().quantize(matrix.detach().contiguous().numpy(), 4, 32).dequantize()
        for matrix in (parameters[0].T, parameters[1])
    ]
    torch.testing.assert_close(joined, torch.cat([torch.from_numpy(part).T for part in apart]))
