"""What changes between the calls of fused siblings is seen: nothing is shared that is not the same."""

import pytest
import torch
from sibling_models import BCQ, count_fused_calls, pair
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lutgemm.backends import cpu
from lutgemm.nn import set_accuracy

pytestmark = pytest.mark.skipif(
    cpu.BACKEND.unavailable() is not None, reason=f"backend cpu: {cpu.BACKEND.unavailable()}"
)


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each fused call."""
    return count_fused_calls(monkeypatch)


class Ops(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def double_scales(model: nn.Module) -> None:
    model.k_proj.scales.mul_(2)


def load_other_scales(model: nn.Module) -> None:
    model.k_proj.load_state_dict({name: t + (name == "scales") for name, t in model.k_proj.state_dict().items()})


def replace_scales(model: nn.Module) -> None:
    """By a tensor that may well get the place in memory, and the id, of the one before it."""
    values = model.k_proj.scales.tolist()
    model.k_proj.scales = None
    model.k_proj.scales = nn.Parameter(torch.tensor(values, dtype=torch.float16) * 2, requires_grad=False)


def replace_data(model: nn.Module) -> None:
    with torch.inference_mode(False):
        model.k_proj.scales.data = model.k_proj.scales.data * 2


def change_bias(model: nn.Module) -> None:
    model.k_proj.bias.add_(1)


def ask_for_exact(model: nn.Module) -> None:
    set_accuracy(model, "exact")


CHANGES = [double_scales, load_other_scales, replace_scales, replace_data, change_bias, ask_for_exact]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_siblings_is_seen(change, mode, stacked):
    apart, fused = pair(BCQ, True)
    with mode():
        x = torch.randn(2, 96)
        before = apart.k_proj(x)
        assert torch.equal(fused.q_proj(x), apart.q_proj(x))
        for model in (apart, fused):
            with torch.no_grad():
                change(model)
        assert torch.equal(fused.k_proj(x), apart.k_proj(x))
        assert not torch.equal(fused.k_proj(x), before)
        assert torch.equal(fused.v_proj(x), apart.v_proj(x))
        assert torch.equal(fused(x), apart(x))
    assert set(stacked) == {3}


def test_an_instruction_set_between_siblings_is_seen():
    for isa in cpu.available_isas():
        apart, fused = pair()
        x = torch.randn(2, 96)
        with torch.no_grad():
            fused.q_proj(x)
            with cpu.use_isa(isa):
                assert torch.equal(fused.k_proj(x), apart.k_proj(x))


def test_gradients_switched_on_between_siblings():
    _, fused = pair()
    x = torch.randn(2, 96)
    with torch.no_grad():
        fused.q_proj(x)
    fused.k_proj.scales.requires_grad_(True)
    assert fused.k_proj(x).requires_grad
    assert not fused.v_proj(x).requires_grad
    with torch.no_grad():
        fused.q_proj(x)
    x.requires_grad_(True)
    assert fused.v_proj(x).requires_grad


def test_inference_mode_between_siblings(stacked):
    _, fused = pair()
    x = torch.randn(2, 96)
    with torch.inference_mode():
        assert fused.q_proj(x).is_inference()
    assert not fused.k_proj(x).is_inference()
    with torch.inference_mode():
        assert fused.v_proj(x).is_inference()
    fused.q_proj(x)
    with torch.inference_mode():
        assert fused.k_proj(x).is_inference()
    assert stacked == [3, 3]


def test_a_mode_around_one_sibling_sees_its_operator():
    _, fused = pair()
    x = torch.randn(2, 96)
    with torch.no_grad():
        fused.q_proj(x)
        with Ops() as seen:
            fused.k_proj(x)
    assert seen.names == ["lutgemm.bcq_linear.default"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_activations_changed_between_siblings_are_seen(mode, stacked):
    apart, fused = pair()
    with mode():
        x = torch.randn(2, 96)
        assert torch.equal(fused.q_proj(x), apart.q_proj(x))
        x.mul_(2)
        assert torch.equal(fused.k_proj(x), apart.k_proj(x))
        assert torch.equal(fused.v_proj(x), apart.v_proj(x))
        assert torch.equal(fused.k_proj(x), apart.k_proj(x))
    assert len(stacked) >= 2


def test_changes_of_one_sibling_are_seen(stacked):
    apart, fused = pair(BCQ, True)
    x = torch.randn(2, 96)
    with torch.no_grad():
        for name in ("scales", "offsets", "bias", "codes"):
            for model in (apart, fused):
                model.v_proj.get_buffer(name).zero_() if name == "codes" else getattr(model.v_proj, name).mul_(2)
            assert torch.equal(fused(x), apart(x))
        for model in (apart, fused):
            model.k_proj.scales.data.mul_(2)
            model.k_proj.weight_record.repack()
        assert torch.equal(fused(x), apart(x))
        for model in (apart, fused):
            model.k_proj.scales = nn.Parameter(model.k_proj.scales * 3, requires_grad=False)
        assert torch.equal(fused(x), apart(x))
        fused.k_proj.accuracy = apart.k_proj.accuracy = "exact"
        assert torch.equal(fused(x), apart(x))
    assert stacked == [3] * 6
