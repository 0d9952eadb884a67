"Every registered loss: its constant at the start, its gradient, the relations it has to obey."
import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import softplus

from dpo_literate import losses
from dpo_literate.certificates import (example_inputs, relations_of, rest_of, slope_of, start_of,
                                       unit_beta)
from dpo_literate.losses import INPUTS, LOSSES, all_losses, divergence_score, dpo_loss, get_loss
from dpo_literate.results import Refusal

NAMES = sorted(all_losses())
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence", "chi_squared")
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
    scaled = dpo_loss(*(x / factor for x in (w, l, rw, rl)), beta=.1 * factor)[0]
    assert abs(scaled - loss) < 1e-11


@settings(max_examples=300, deadline=None)
@given(four, st.floats(0, .5))
def test_smoothing_mixes_both_readings_of_the_label(values, epsilon):
    w, l, rw, rl = tensors(values)
    plain, swapped = dpo_loss(w, l, rw, rl)[0], dpo_loss(l, w, rl, rw)[0]
    smoothed = dpo_loss(w, l, rw, rl, label_smoothing=epsilon)[0]
    assert abs(smoothed - (1 - epsilon) * plain - epsilon * swapped) < 1e-11


@pytest.mark.parametrize("gap,loss,slope", [(1e4, 0., 0.), (-1e4, 1000., -.1)])
def test_huge_margins_stay_finite(gap, loss, slope):
    for dtype in (torch.float64, torch.float32):
        w = torch.tensor([gap], dtype=dtype, requires_grad=True)
        zero = torch.zeros(1, dtype=dtype)
        out = dpo_loss(w, zero, zero, zero)[0]
        out.sum().backward()
        assert out.item() == pytest.approx(loss, abs=1e-6)
        assert w.grad.item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("beta,gap,slope", [
    (.1, 0., -.05), (.1, 2., -.045016600269), (.5, -3., -.408787238097)])
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


# ------------------------------------------------------------ four certificates, for every loss

def test_the_registry_is_complete(record_property):
    "The count is printed (`pytest -s`) and recorded; a loss without certificates fails below."
    record_property("losses", len(NAMES))
    print(f"{len(NAMES)} losses: {', '.join(NAMES)}")
    assert len(NAMES) >= 30


@pytest.mark.parametrize("name", NAMES)
def test_a_registered_loss_is_described(name):
    loss = LOSSES[name]
    assert loss.formula and loss.title and loss.source.startswith("arXiv:")
    assert loss.slope and loss.optimum and loss.relations, f"{name} has no certificates"
    assert set(loss.needs) <= set(INPUTS) and loss.quantity in ("sum", "mean")
    assert loss.fn.__doc__
    out = loss(example_inputs(7))
    assert len(out) == (3 if loss.paired else 2) and all(o.shape == (7,) for o in out)


@pytest.mark.parametrize("name", NAMES)
def test_certificate_1_constant_at_the_start(name):
    loss, found = LOSSES[name], start_of(LOSSES[name], example_inputs(50, seed=3))
    claimed = None if loss.at_init is None else loss.at_init()
    if claimed is None: assert found.std() > .01, f"{name} claims no constant, has {found[0]}"
    else: assert (found - claimed).abs().max() <= 1e-10 * max(1, abs(claimed))


@pytest.mark.parametrize("name", NAMES)
def test_certificate_2_slope_at_the_start(name):
    loss = LOSSES[name]
    for more in ({}, unit_beta(loss)):
        claimed = loss.slope(n=(5, 5), logp=-1., **more)
        assert slope_of(loss, **more) == pytest.approx(claimed, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("wins,losses", [(8, 2), (13, 7), (19, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_certificate_3_rest(name, wins, losses):
    loss, n = LOSSES[name], (6, 4)
    claimed = loss.optimum(wins / (wins + losses), n=n, **unit_beta(loss))
    found = rest_of(loss, wins, losses, n, **unit_beta(loss))
    assert found == pytest.approx(claimed, abs=2e-5, rel=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_certificate_4_relations(name):
    assert set(relations_of(LOSSES[name])) == set(LOSSES[name].relations)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_agrees_with_differences(name):
    loss, inputs = LOSSES[name], example_inputs(5, seed=11)
    policy = [k for k in inputs if k.startswith("policy")]
    inputs |= {k: inputs[k] + .013 * torch.arange(5) for k in policy}  # away from kinks, ties
    if "gap_mean" in loss.needs:  # β-DPO's β held at its floor: it takes no gradient
        inputs["gap_mean"] = torch.tensor(1e3).double()
    keys = [k for k in policy if k in loss.needs]
    leaves = [inputs[k].clone().clamp(max=-.1).requires_grad_() for k in keys]
    def value(*new): return loss(inputs | dict(zip(keys, new)))[0]
    assert torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_finite_at_ten_thousand_nats(name):
    drawn, far = example_inputs(5), torch.tensor([-1e4, 0., -1e4, 0., -200.])
    keys = [k for k in drawn if k.startswith("policy")]
    for dtype in (torch.float32, torch.float64):
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in drawn.items()}
        for turn in range(5):
            leaves = {k: far.to(dtype).roll(turn * (i + 1)).requires_grad_()
                      for i, k in enumerate(keys)}
            loss = LOSSES[name](inputs | leaves)[0]
            grads = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True,
                                        materialize_grads=True)
            assert loss.isfinite().all() and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("name", NAMES)
def test_a_reply_of_no_tokens_is_no_division_by_zero(name):
    nothing = dict.fromkeys(("chosen_lengths", "policy_chosen_logps"), torch.zeros(3).double())
    assert LOSSES[name](example_inputs(3) | nothing)[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_gets_no_gradient_it_did_not_ask_for(name):
    "Weights, baselines and running means are numbers: nothing flows into them."
    inputs, weights = example_inputs(4), ("chosen_wpo", "rejected_wpo")
    extra = {k: inputs[k].clone().requires_grad_() for k in weights if k in LOSSES[name].needs}
    if extra: assert not LOSSES[name](inputs | extra)[0].requires_grad


# ------------------------------------------------------------ divergences

@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("name", [n for n in NAMES if all_losses()[n].divergence])
def test_a_divergence_moves_the_policy_not_the_margin(name, kind):
    loss, more = LOSSES[name], dict(f_divergence_type=kind)
    if loss.at_init() is not None:
        start = start_of(loss, example_inputs(9), **more)
        assert (start - loss.at_init()).abs().max() < 1e-9
    claimed = loss.optimum(.65, n=(1, 1), beta=.3, **more)
    found = rest_of(loss, 13, 7, n=(1, 1), beta=.3, **more)
    assert found == pytest.approx(claimed, abs=2e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_never_overflow(kind, dtype):
    u = torch.tensor([-1e4, -200., -88.8, -30.5, -1., 0., 1., 200., 1e4], dtype=dtype)
    score = divergence_score(u.requires_grad_(), kind)
    grad, = torch.autograd.grad(score.sum(), u)
    assert score.isfinite().all() and (score**2).isfinite().all()
    assert grad.isfinite().all() and (grad >= 0).all()
    assert (score.diff() >= 0).all() and score[5] == 0.


@settings(max_examples=300, deadline=None)
@given(st.floats(-25, 25), st.floats(-1.5, 2.5))
def test_scores_by_the_book(u, alpha):
    exact = u if abs(alpha - 1) < 1e-6 else math.expm1((alpha - 1) * u) / (alpha - 1)
    if (alpha - 1) * u > 30: return
    def score(*kind): return divergence_score(torch.tensor([u], dtype=torch.float64), *kind).item()
    close = dict(rel=1e-10, abs=1e-12)
    assert score("alpha_divergence", alpha) == pytest.approx(exact, **close)
    assert score("forward_kl") == pytest.approx(1 - math.exp(-u), **close)
    js = math.log(2 / (1 + math.exp(-u)))
    assert score("js_divergence") == pytest.approx(js, rel=1e-9, abs=1e-12)
    assert score("chi_squared") == pytest.approx(u + math.expm1(u), **close)


def test_unknown_divergences_and_losses_without_one_are_refused():
    inputs = example_inputs(2)
    with pytest.raises(Refusal, match="use reverse_kl"):
        LOSSES["sigmoid"](inputs, f_divergence_type="hellinger")
    with pytest.raises(Refusal, match="no setting 'f_divergence_type'"):
        LOSSES["nca_pair"](inputs, f_divergence_type="forward_kl")


# ------------------------------------------------------------ the registry itself

@pytest.mark.parametrize("bad,said", [
    (dict(beta=0.), "beta"), (dict(beta=-1.), "beta"), (dict(beta=math.nan), "beta"),
    (dict(beta=math.inf), "beta"), (dict(label_smoothing=.6), "label_smoothing"),
    (dict(label_smoothing=-.1), "label_smoothing"), (dict(bta=.1), "bta")])
def test_settings_without_meaning_are_refused(bad, said):
    with pytest.raises(Refusal, match=said): LOSSES["sigmoid"](names((0., 0., 0., 0.)), **bad)


def test_missing_inputs_and_unknown_names_are_named():
    four = names((0., 0., 0., 0.))
    policy = {k: v for k, v in four.items() if k.startswith("policy")}
    for name, inputs, missing in (("sigmoid", policy, "ref_chosen_logps"),
                                  ("simpo", four, "chosen_lengths"), ("kto", four, "policy_logps"),
                                  ("orpo_full", four, "prompt_logps, prompt_lengths")):
        with pytest.raises(Refusal, match=missing): LOSSES[name](inputs)
    with pytest.raises(Refusal, match="did you mean .*sigmoid"): get_loss("sigmoud")


def test_a_name_is_registered_once():
    about = dict(formula="x", source="arXiv:0", title="x", at_init=None)
    def other(policy_chosen_logps, beta=.1): return policy_chosen_logps
    with pytest.raises(ValueError, match="already"):
        losses.register_loss("sigmoid", **about)(other)
    def no_default(policy_chosen_logps, tau): return policy_chosen_logps
    with pytest.raises(TypeError, match="tau"): losses.register_loss("x", **about)(no_default)
    assert "x" not in LOSSES


def test_later_pages_are_found_by_name_and_only_then():
    "Importing `losses` alone knows two losses; the first unknown name brings in the rest."
    code = ("import sys\nfrom dpo_literate.losses import LOSSES, get_loss\n"
            "assert sorted(LOSSES) == ['ipo_sum', 'sigmoid']\n"
            "get_loss('sigmoid'); assert 'dpo_literate.variants' not in sys.modules\n"
            "assert get_loss('hinge').name == 'hinge' and get_loss('kto').name == 'kto'\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""


def planted(what):
    "DPO's function with one mistake."
    def loss(chosen_logratio, rejected_logratio, beta=.1):
        w, l = beta * chosen_logratio, beta * rejected_logratio
        value = {"sign": softplus(w - l), "constant": softplus(l - w) + .01,
                 "rest": softplus(l - w + .1), "relation": softplus(.99 * l - w)}[what]
        return value, w, l
    return loss


@pytest.mark.parametrize("what", ["sign", "constant", "rest", "relation"])
def test_a_wrong_certificate_is_seen(what):
    "The certificates can fail: four planted mistakes."
    good = LOSSES["sigmoid"]
    bad = dataclasses.replace(good, fn=planted(what), hyper={"beta": .1}, needs=INPUTS[:4])
    passes = dict(
        sign=lambda: slope_of(bad) == pytest.approx(good.slope()),
        constant=lambda: (start_of(bad, example_inputs(5)) - math.log(2)).abs().max() < 1e-10,
        rest=lambda: rest_of(bad, beta=1.) == pytest.approx(good.optimum(.8), abs=1e-5),
        relation=lambda: "level" in relations_of(bad))
    assert not passes[what]()
