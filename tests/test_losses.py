"Every registered loss: its constant at the start, its gradient, and the relations it has to obey."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from dpo_literate import losses
from dpo_literate.losses import INPUTS, LOSSES, dpo_loss, get_loss
from dpo_literate.results import Refusal

nats = st.floats(-200, 200, allow_nan=False)
four = st.tuples(nats, nats, nats, nats)


def tensors(values): return [torch.tensor([v], dtype=torch.float64) for v in values]


def names(values): return dict(zip(INPUTS, tensors(values)))


@settings(max_examples=1000, deadline=None)
@given(four, st.floats(.01, 5))
def test_swapping_adds_the_margin(values, beta):
    w, l, rw, rl = tensors(values)
    loss, chosen, rejected = dpo_loss(w, l, rw, rl, beta=beta)
    swapped, other_chosen, other_rejected = dpo_loss(l, w, rl, rw, beta=beta)
    assert abs(swapped - loss - (chosen - rejected)) <= 1e-12 * max(1, abs(chosen - rejected))
    assert torch.equal(chosen, other_rejected) and torch.equal(rejected, other_chosen)


@settings(max_examples=1000, deadline=None)
@given(four, st.floats(-50, 50), st.floats(.1, 10))
def test_shifts_cancel_and_beta_only_scales(values, shift, factor):
    w, l, rw, rl = tensors(values)
    loss = dpo_loss(w, l, rw, rl)[0]
    for moved in ((w + shift, l + shift, rw, rl), (w, l, rw + shift, rl + shift)):
        assert abs(dpo_loss(*moved)[0] - loss) < 1e-11
    assert abs(dpo_loss(w / factor, l / factor, rw / factor, rl / factor, beta=.1 * factor)[0] - loss) < 1e-11


@settings(max_examples=300, deadline=None)
@given(four, st.floats(0, .5))
def test_smoothing_mixes_both_readings_of_the_label(values, epsilon):
    w, l, rw, rl = tensors(values)
    plain, swapped = dpo_loss(w, l, rw, rl)[0], dpo_loss(l, w, rl, rw)[0]
    assert abs(dpo_loss(w, l, rw, rl, label_smoothing=epsilon)[0] - (1 - epsilon) * plain - epsilon * swapped) < 1e-11


@pytest.mark.parametrize("gap,loss,slope", [(1e4, 0., 0.), (-1e4, 1000., -.1)])
def test_huge_margins_stay_finite(gap, loss, slope):
    for dtype in (torch.float64, torch.float32):
        w = torch.tensor([gap], dtype=dtype, requires_grad=True)
        zero = torch.zeros(1, dtype=dtype)
        out = dpo_loss(w, zero, zero, zero)[0]
        out.sum().backward()
        assert out.item() == pytest.approx(loss, abs=1e-6) and w.grad.item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("beta,gap,slope", [(.1, 0., -.05), (.1, 2., -.045016600269), (.5, -3., -.408787238097)])
def test_gradient_by_the_book(beta, gap, slope):
    w = torch.tensor([gap], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    dpo_loss(w, zero, zero, zero, beta=beta)[0].sum().backward()
    assert w.grad.item() == pytest.approx(slope, abs=1e-10)


def test_equal_replies_give_exactly_no_gradient():
    y = torch.tensor([-7.], dtype=torch.float64, requires_grad=True)
    loss, *_ = dpo_loss(y, y, y.detach(), y.detach())
    loss.sum().backward()
    assert loss.item() == math.log(2) and y.grad.item() == 0.


@pytest.mark.parametrize("policy_w,policy_l,loss", [(-12., -10., .798139), (-9., -14., .474077)])
def test_published_vectors(policy_w, policy_l, loss):
    assert dpo_loss(*tensors((policy_w, policy_l, -11., -11.)))[0].item() == pytest.approx(loss, abs=5e-7)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_registered_loss_keeps_its_word(name):
    loss = LOSSES[name]
    assert loss.formula and loss.title and loss.source.startswith("arXiv:") and "beta" in loss.hyper
    z = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, chosen, rejected = loss(dict(zip(INPUTS, (z, z, z, z))))
    assert found.shape == chosen.shape == rejected.shape == (7,)
    assert (found - loss.at_init()).abs().max() < 1e-10
    inputs = [torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).requires_grad_(i < 2) for i in range(4)]
    assert torch.autograd.gradcheck(lambda w, l: loss.fn(w, l, *inputs[2:])[0], inputs[:2])


def test_ipo_rests_at_its_margin():
    for beta, gap in ((.1, 5.), (.5, 1.)):
        assert losses.LOSSES["ipo_sum"](names((gap, 0., 0., 0.)), beta=beta)[0].item() == pytest.approx(0., abs=1e-12)


@pytest.mark.parametrize("bad,said", [(dict(beta=0.), "beta"), (dict(beta=-1.), "beta"), (dict(beta=float("nan")), "beta"), (dict(beta=float("inf")), "beta"),
                                      (dict(label_smoothing=.6), "label_smoothing"), (dict(label_smoothing=-.1), "label_smoothing"), (dict(bta=.1), "bta")])
def test_settings_without_meaning_are_refused(bad, said):
    with pytest.raises(Refusal, match=said): LOSSES["sigmoid"](names((0., 0., 0., 0.)), **bad)


def test_missing_inputs_and_unknown_names_are_named():
    with pytest.raises(Refusal, match="ref_chosen_logps"): LOSSES["sigmoid"]({"policy_chosen_logps": torch.zeros(1), "policy_rejected_logps": torch.zeros(1)})
    with pytest.raises(Refusal, match="did you mean .*sigmoid"): get_loss("sigmoud")


def test_a_name_is_registered_once():
    def other(policy_chosen_logps, beta=.1): return policy_chosen_logps
    with pytest.raises(ValueError, match="already"): losses.register_loss("sigmoid", formula="x", source="arXiv:0", title="x", at_init=None)(other)
    def no_default(policy_chosen_logps, tau): return policy_chosen_logps
    with pytest.raises(TypeError, match="tau"): losses.register_loss("x", formula="x", source="arXiv:0", title="x", at_init=None)(no_default)
    assert "x" not in LOSSES
