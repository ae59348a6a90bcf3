"""Products of fp32 by oneDNN: equal to float64 in value and gradients, with the layer's weights."""

import pytest
import torch
from torch import Tensor, nn

from elpo_ray.learner.products import Linear, product, use_in

TOLERANCE = 1e-5


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found.double() - expected).abs().max() <= TOLERANCE * expected.abs().max())


@pytest.mark.parametrize("shape", [(1, 300, 96), (7, 96), (1, 1, 96), (2, 3, 5, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_its_gradients_are_those_of_float64(
    shape: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 130, bias=bias)
    exact = nn.Linear(96, 130, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    use_in(nn.Sequential(layer))
    rows = torch.randn(shape, requires_grad=True)
    wide = rows.detach().double().requires_grad_()
    out, expected = layer(rows), exact(wide)
    assert isinstance(layer, Linear)
    assert "LinearFunction" in type(out.grad_fn).__name__, "torch's own product was taken"
    assert out.shape == expected.shape and close(out, expected)
    pull = torch.randn_like(out)
    out.backward(pull)
    expected.backward(pull.double())
    pairs = zip((rows, *layer.parameters()), (wide, *exact.parameters()), strict=True)
    for mine, reference in pairs:
        assert mine.grad is not None and reference.grad is not None
        assert mine.grad.shape == reference.grad.shape and close(mine.grad, reference.grad)


@pytest.mark.parametrize("turned", ["rows", "weight", "both"])
def test_a_product_reads_matrices_that_are_transposed_views(turned: str) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(50, 70), torch.randn(30, 70)
    seen = rows.T.contiguous().T if turned != "weight" else rows
    held = weight.T.contiguous().T if turned != "rows" else weight
    assert close(product(seen, held), rows.double() @ weight.double().T)


def test_a_frozen_layer_gets_no_gradient() -> None:
    layer = nn.Linear(8, 4).requires_grad_(False)
    use_in(nn.Sequential(layer))
    rows = torch.randn(3, 8, requires_grad=True)
    layer(rows).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert rows.grad is not None and close(rows.grad, layer.weight.double().sum(0).expand(3, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_and_no_rows_are_left_to_torch(dtype: torch.dtype) -> None:
    layer = nn.Linear(8, 4).to(dtype)
    plain = nn.Linear(8, 4).to(dtype)
    plain.load_state_dict(layer.state_dict())
    use_in(nn.Sequential(layer))
    rows = torch.randn(3, 8, dtype=dtype)
    assert torch.equal(layer(rows), plain(rows))
    empty = torch.empty(0, 8)
    assert nn.Sequential(nn.Linear(8, 4))(empty).shape == product(empty, torch.ones(4, 8)).shape


def test_layers_with_a_forward_pass_of_their_own_are_kept() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(8, 4), nn.Linear(4, 4))
    use_in(model)
    assert [type(module) for module in model] == [Own, Linear]
