"""Packed linears give what plain ones give, whichever way a CPU makes them take."""

import pytest
import torch

from helixd.engine.linear import PackedLinear, PlainLinear, make_linear, packable

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [dtype for dtype in TOLERANCE if packable(CPU, dtype)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 191, 192])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_every_way_is_the_same_linear(dtype: torch.dtype, rows: int, bias: bool, residual: bool) -> None:
    random = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(96, 64, generator=random), torch.randn(rows, 64, generator=random)
    added, offset = torch.randn(rows, 96, generator=random), torch.randn(96, generator=random)
    exact = x.to(dtype).double() @ weight.to(dtype).double().t()
    exact += offset.to(dtype).double() if bias else 0.0
    exact += added.to(dtype).double() if residual else 0.0
    arguments = (x.to(dtype), added.to(dtype) if residual else None)
    parts = (weight.to(dtype), offset.to(dtype) if bias else None)
    ways = [PlainLinear(*parts)]
    ways += [PackedLinear(*parts, widen=widen, repeat=repeat) for widen in (False, True) for repeat in (False, True)]
    for way in ways:
        out = way(*arguments)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=TOLERANCE[dtype])


def test_small_weights_are_not_packed() -> None:
    assert isinstance(make_linear(torch.zeros(511, 512)), PlainLinear)
    assert isinstance(make_linear(torch.zeros(512, 512)), PackedLinear)
