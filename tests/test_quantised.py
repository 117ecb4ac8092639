"""8-bit optimizer states: as their codes say, and with real optimizers the step that these take next."""

from __future__ import annotations

import copy

import pytest
import torch
from support import make_model, make_rows
from torch import nn

from montessori import AdamWState, InfluenceEstimator
from montessori.checkpoints import read_state
from montessori.errors import StateError
from montessori.optim_state import parameter_state
from montessori.oracle import apply_step

GROUP = {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1, "alpha": 0.0, "t_alpha": None}


def entry_of(numel, block, shape=None):
    """A bitsandbytes entry with random codes, and the moments that they stand for, value by value."""
    generator = torch.Generator().manual_seed(numel)
    blocks = -(-numel // block)
    entry, moments = {"step": 7}, []
    for part in ("1", "2"):
        codes = torch.randint(0, 256, (numel,), generator=generator).to(torch.uint8)
        table, scales = torch.rand(256, generator=generator), torch.rand(blocks, generator=generator)
        moments.append(torch.stack([table[int(code)] * scales[i // block] for i, code in enumerate(codes)]))
        entry |= {f"state{part}": codes.reshape(shape or -1), f"qmap{part}": table, f"absmax{part}": scales}
    return entry, moments


@pytest.mark.parametrize(("numel", "block"), [(1, 256), (256, 256), (1000, 256), (5000, 2048)])
def test_codes_become_the_values_they_stand_for(numel, block):
    entry, moments = entry_of(numel, block)
    state = parameter_state(GROUP, entry, "weight")
    assert torch.equal(state.exp_avg, moments[0])
    assert torch.equal(state.exp_avg_sq, moments[1])
    assert (state.step.step, state.step.beta2, state.step.weight_decay, state.step.decoupled) == (8, 0.99, 0.1, True)


def test_a_state_dict_wraps_what_is_quantised():
    entry, moments = entry_of(600, 256, (20, 30))
    wrapped = {"step": entry.pop("step"), "__bnb_optimizer_quant_state__": entry}
    state = parameter_state(GROUP, wrapped, "weight")
    assert torch.equal(state.exp_avg, moments[0].reshape(20, 30))


def test_moments_too_small_to_quantise_are_taken_as_they_are():
    moments = torch.randn(2, 5)
    state = parameter_state(GROUP, {"step": 3, "state1": moments[0], "state2": moments[1] ** 2}, "weight")
    assert torch.equal(state.exp_avg, moments[0])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"state2": None}, "expected the state of Adam or AdamW of bitsandbytes"),
        ({"unorm_vec": torch.zeros(1)}, "got keys .*unorm_vec"),
        ({"absmax1": None}, "without qmap and absmax"),
        ({"absmax2": torch.ones(9)}, "absmax of 9 blocks for 600 codes"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(change, told):
    entry, _ = entry_of(600, 256)
    entry = {key: value for key, value in (entry | change).items() if value is not None}
    with pytest.raises(StateError, match=told) as error:
        parameter_state(GROUP, entry, "weight")
    assert "optimizer state of weight" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_third_beta_is_that_of_ademamix():
    with pytest.raises(StateError, match=r"betas \(0.9, 0.99, 0.9999\)"):
        parameter_state(GROUP | {"betas": (0.9, 0.99, 0.9999)}, entry_of(300, 256)[0], "weight")


OPTIMIZERS = {
    "bitsandbytes": ("AdamW8bit", "Adam8bit", "PagedAdamW8bit", "AdamW"),
    "torchao": ("AdamW8bit", "Adam8bit", "AdamW4bit", "AdamWFp8"),
}


@pytest.fixture
def problem(request):
    """A network with one large weight and its optimizer after five steps."""
    package, name = request.param
    library = pytest.importorskip(f"{package}.optim")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 30))
    optimizer = getattr(library, name)(network.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(5):
        backward(network)
        optimizer.step()
    return network, optimizer


def backward(network):
    network.zero_grad()
    network(torch.randn(16, 128)).square().mean().backward()


CASES = [(package, name) for package, names in OPTIMIZERS.items() for name in names]


@pytest.mark.quantised
@pytest.mark.parametrize("problem", CASES, indirect=True, ids=str)
@torch.compiler.set_stance("force_eager")
def test_the_next_step_is_that_of_the_optimizer(problem):
    network, optimizer = problem
    backward(network)
    ours = copy.deepcopy(network)
    grads = {name: parameter.grad for name, parameter in network.named_parameters()}
    # float32 moments are the optimizer's own, which it changes in place.
    apply_step(dict(ours.named_parameters()), AdamWState.from_optimizer(network, optimizer), grads)
    optimizer.step()
    for before, after in zip(ours.parameters(), network.parameters(), strict=True):
        # Both round parameters to float32 after the step; the step itself is a thousandth of them.
        assert (before - after).abs().max() <= 2 * torch.finfo(torch.float32).eps * after.abs().max()


@pytest.mark.quantised
@pytest.mark.parametrize("problem", [("bitsandbytes", "AdamW8bit")], indirect=True, ids=str)
def test_a_saved_optimizer_is_the_live_one(problem, tmp_path):
    network, optimizer = problem
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    live, saved = AdamWState.from_optimizer(network, optimizer), read_state(tmp_path, network)
    assert live.digest() == saved.digest()


@pytest.mark.quantised
def test_influence_is_that_of_the_real_8_bit_step():
    library = pytest.importorskip("bitsandbytes.optim")
    model = make_model("llama_tied", torch.float32)
    optimizer = library.AdamW8bit(model.parameters(), lr=1e-3, weight_decay=0.05)
    optimizer.args.min_8bit_size = 1
    rows = make_rows(6, seed=3)

    def loss_of(row):
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        return model(input_ids=ids, labels=labels).loss

    for row in rows[:3]:
        optimizer.zero_grad()
        loss_of(row).backward()
        optimizer.step()
    candidate, reference = rows[4], rows[5:]
    scores = InfluenceEstimator(model, optimizer, reference, "exact").score([candidate])
    with torch.no_grad():
        before = loss_of(reference[0]).item()
    optimizer.zero_grad()
    loss_of(candidate).backward()
    optimizer.step()
    with torch.no_grad():
        real = before - loss_of(reference[0]).item()
    # Each loss, near 4, is rounded to float32 a few times.
    assert scores.influence[0] == pytest.approx(real, abs=16 * torch.finfo(torch.float32).eps * before)
    assert abs(real) > 1e-3


@pytest.mark.quantised
@pytest.mark.parametrize(("name", "told"), [("Lion8bit", "unknown optimizer Lion8bit"), ("AdEMAMix8bit", "unknown")])
def test_other_8_bit_optimizers_are_refused(name, told):
    library = pytest.importorskip("bitsandbytes.optim")
    network = nn.Linear(80, 60)
    with pytest.raises(StateError, match=told):
        AdamWState.from_optimizer(network, getattr(library, name)(network.parameters(), lr=1e-3))


@pytest.mark.quantised
def test_a_setting_that_changes_the_step_is_refused():
    library = pytest.importorskip("bitsandbytes.optim")
    network = nn.Linear(80, 60)
    optimizer = library.AdamW8bit(network.parameters())
    optimizer.args.skip_zeros = True
    with pytest.raises(StateError, match="skip_zeros=True is not supported"):
        AdamWState.from_optimizer(network, optimizer)
