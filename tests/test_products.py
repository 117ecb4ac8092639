"""The faster library for products of linear layers: same values, same gradients, torch's own choice respected."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from montessori import products
from montessori.products import fast_products, forward_replaced, product, torch_rounds_products

# Two orders of the same I float32 products and sums: √I · u each of rounding, relative to Σ |x||w|.
SLACK = 2 * 2.0**-24


@pytest.fixture(autouse=True, params=[True, False], ids=["on Intel's processors", "on others"])
def maker(request, monkeypatch):
    monkeypatch.setattr(products, "mkl_is_at_home", lambda: request.param)


def agree(got, want, scale, inner):
    return bool(((got - want).abs() <= SLACK * (inner**0.5 + 2) * scale).all())


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (1, 7), (0, 7), (7,)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_product_is_linear(shape, with_bias):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*shape, generator=generator), torch.randn(4, 7, generator=generator)
    bias = torch.randn(4, generator=generator) if with_bias else None
    got, want = product(x, weight, bias), F.linear(x, weight, bias)
    assert got.shape == want.shape
    scale = F.linear(x.abs(), weight.abs(), bias.abs() if with_bias else None)
    assert agree(got, want, scale, 7)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_strides(layout):
    generator = torch.Generator().manual_seed(0)
    x = {
        "transposed": torch.randn(6, 3, 8, generator=generator).transpose(0, 1),
        "strided": torch.randn(5, 16, generator=generator)[:, ::2],
        "expanded": torch.randn(1, 8, generator=generator).expand(4, 8),
    }[layout]
    weight = torch.randn(8, 10, generator=generator).t()
    assert agree(product(x, weight), F.linear(x, weight), F.linear(x.abs(), weight.abs()), 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_outside_default_float32_the_choice_is_torchs_own(dtype):
    x, weight = torch.randn(5, 7).to(dtype), torch.randn(4, 7).to(dtype)
    with torch.backends.mkldnn.flags(enabled=dtype != torch.float32):
        assert torch.equal(product(x, weight), F.linear(x, weight))


def test_a_frozen_model_has_the_same_output_and_input_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3, bias=False)).requires_grad_(False)
    x = torch.randn(4, 5, 6, requires_grad=True)
    fired = []
    model[0].register_forward_hook(lambda *_: fired.append("hook"))
    want = model(x).square().sum()
    (want_grad,) = torch.autograd.grad(want, x)
    with fast_products(model):
        got = model(x).square().sum()
        (got_grad,) = torch.autograd.grad(got, x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grad, want_grad)
    assert fired == ["hook", "hook"]
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)], ids=str)
def test_a_model_may_change_an_output_in_place(shape):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 9).requires_grad_(False), torch.randn(shape, requires_grad=True)
    (want,) = torch.autograd.grad(layer(x).mul_(2).square().sum(), x)
    seen = []
    with fast_products(layer):
        output = layer(x)
        output.register_hook(seen.append)
        (got,) = torch.autograd.grad(output.mul_(2).square().sum(), x)
    torch.testing.assert_close(got, want)
    if not products.mkl_is_at_home():
        # Torch's own output is a view, which loses its hooks when it is changed.
        torch.testing.assert_close(seen[0], 2 * (2 * layer(x)) * 2)


@pytest.fixture(params=["high", "medium"])
def lower_precision(request):
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


def test_rounding_is_seen_in_torchs_own_products(lower_precision):
    torch.manual_seed(0)
    x, y = torch.randn(128, 96), torch.randn(96, 64)
    exact = x.double() @ y.double()
    error = float((x @ y - exact).norm() / exact.norm())
    # Half a unit in the last place of tf32 at most, against float32's 2^-24 per product.
    assert torch_rounds_products() == (error > 2.0**-14)


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_lower_precision_stays_where_it_means_something(monkeypatch, lower_precision, rounds, device):
    monkeypatch.setattr(products, "torch_rounds_products", lambda: rounds)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device=device))
    with fast_products(model):
        seen = torch.get_float32_matmul_precision()
    assert seen == (lower_precision if rounds or device != "cpu" else "highest")
    assert torch.get_float32_matmul_precision() == lower_precision


@pytest.mark.parametrize("shape", [(4, 6), (6,), (2, 3, 6)], ids=str)
@pytest.mark.parametrize("trained", [("weight", "bias"), ("weight",), ("bias",)], ids=str)
def test_trained_layers_keep_their_gradients(shape, trained):
    torch.manual_seed(0)
    model, x, upstream = nn.Linear(6, 3), torch.randn(shape), torch.randn(*shape[:-1], 3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    want = torch.autograd.grad(model(x), wanted, upstream)
    with fast_products(model):
        got = torch.autograd.grad(model(x), wanted, upstream)
    for value, other in zip(got, want, strict=True):
        torch.testing.assert_close(value, other)


def test_a_product_without_gradients_is_the_same():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    want = model(x).detach()
    with fast_products(model), torch.no_grad():
        got = model(x)
    assert not got.requires_grad
    torch.testing.assert_close(got, want)


def test_someone_elses_forward_is_left_alone_and_put_back():
    module = nn.Linear(2, 2)
    theirs = module.forward = lambda x: x + 1
    with fast_products(module):
        assert torch.equal(module(torch.zeros(2)), torch.ones(2))
    with forward_replaced(module, lambda x: x + 2):
        assert torch.equal(module(torch.zeros(2)), torch.full((2,), 2.0))
    assert module.forward is theirs


@pytest.fixture(params=["everywhere", "products", "products on a GPU", "as high", "high but on a GPU"])
def newer_switches(request):
    """torch's newer switches for TF32, set in another process's place; `get_float32_matmul_precision` then raises."""
    switches = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "none"
    if request.param == "everywhere":
        torch.backends.fp32_precision = "tf32"
    elif "high" in request.param:
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.matmul.fp32_precision = "ieee" if "but" in request.param else "tf32"
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "tf32" if request.param == "products" else "none"
    yield request.param
    torch.set_float32_matmul_precision("highest")
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


def seen_by_switches() -> list[str]:
    return [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]


def test_products_are_unrounded_inside_and_as_the_user_has_them_outside(newer_switches):
    before = seen_by_switches()
    assert products.gpu_rounds_products() == ("but" not in newer_switches)
    with products.unrounded_products():
        assert not products.gpu_rounds_products()
        assert seen_by_switches() == ["ieee", "ieee"]
    assert seen_by_switches() == before
    if newer_switches == "everywhere":
        # What followed the switch above it still does.
        torch.backends.fp32_precision = "none"
        assert seen_by_switches() == ["none", "none"]


def test_of_several_threads_the_last_one_sets_the_switches_back(newer_switches):
    before = seen_by_switches()
    first, second = products.unrounded_products(), products.unrounded_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert seen_by_switches() == ["ieee", "ieee"]
    second.__exit__(None, None, None)
    assert seen_by_switches() == before


def test_models_compute_whichever_switch_was_used(newer_switches):
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    want, before = model(x).detach(), products.float32_precision()
    with fast_products(model):
        torch.testing.assert_close(model(x).detach(), want)
    assert products.float32_precision() == before
