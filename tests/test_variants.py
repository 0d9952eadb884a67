"The family against plain arithmetic and against TRL 1.16, value and gradient; every known disagreement with its reason."
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from dpo_literate.departures import Baselines, keep_usual, kto_kl, odpo_offset
from dpo_literate.losses import all_losses, get_loss
from dpo_literate.results import Refusal

LOSSES = all_losses()
TRL_NAMES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
             "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")
WITH_DIVERGENCE = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")


def sg(x): return 1 / (1 + math.exp(-x))


def nls(x): return math.log1p(math.exp(-x))  # −log σ


# ------------------------------------------------------------ golden values, A: −12, −10; B: −9, −14; reference −11 twice; 6 and 4 tokens

def golden():
    "name, settings, the loss in plain arithmetic (a function of w, l), what the literature file has for A and for B."
    def gap(f): return lambda w, l: f(.1 * (w - l))
    def odds(x): return x - math.log(1 - math.exp(x))
    ref = -11
    return {
        "sigmoid": ({}, gap(nls), .798139, .474077),
        "sigmoid, smoothed": (dict(label_smoothing=.1), gap(lambda m: .9 * nls(m) + .1 * nls(-m)), .778139, .524077),
        "robust": (dict(label_smoothing=.1), gap(lambda m: (.9 * nls(m) - .1 * nls(-m)) / .8), .823139, .411577),
        "hinge": ({}, gap(lambda m: max(0, 1 - m)), 1.2, .5),
        "ipo_sum": ({}, lambda w, l: (w - l - 5)**2, 49., 0.),
        "ipo": ({}, lambda w, l: ((w - ref) / 6 - (l - ref) / 4 - 5)**2, 29.340278, 15.340278),
        "exo_pair": (dict(label_smoothing=1e-3), gap(lambda m: sg(m) * math.log(sg(m) / .999) + sg(-m) * math.log(sg(-m) / .001)), 3.110397, 1.945734),
        "nca_pair": (dict(beta=.1), lambda w, l: nls(.1 * (w - ref)) + .5 * nls(-.1 * (w - ref)) + .5 * nls(-.1 * (l - ref)), 1.438793, 1.274386),
        "bco_pair": (dict(beta=.1), lambda w, l: nls(.1 * (w - ref)) + nls(-.1 * (l - ref)), 1.488793, 1.152494),
        "sppo_hard": (dict(beta=.1), lambda w, l: (w - ref - 5)**2 + (l - ref + 5)**2, 72., 13.),
        "apo_zero": ({}, lambda w, l: 1 - sg(.1 * (w - ref)) + sg(.1 * (l - ref)), 1.049958, .875723),
        "kto_pair": ({}, lambda w, l: sg(-.1 * (w - ref)) + sg(.1 * (l - ref)), .524979 + .524979, .450166 + .425557),
        "apo_down": ({}, lambda w, l: sg(.1 * (w - ref)) + 1 - sg(.1 * (w - l)), 1.024855, .927375),
        "discopop": (dict(beta=.1), gap(lambda m: (1 - sg(m / .05)) * nls(m) + sg(m / .05) * math.exp(-m)), .805752, .606525),
        "sigmoid_norm": (dict(beta=.1), lambda w, l: nls(.1 * ((w - ref) / 6 - (l - ref) / 4)), .714198, .640447),
        "cpo": (dict(cpo_alpha=0.), gap(nls), .798139, .474077),
        "simpo": (dict(beta=2., gamma=.5), lambda w, l: nls(2 * (w / 6 - l / 4) - .5), .474077, .029750),
        "orpo": ({}, lambda w, l: -w / 6 + .1 * nls(odds(w / 6) - odds(l / 4)), 2.045193, 1.510293),
        "r_dpo": (dict(length_penalty=.05), lambda w, l: nls(.1 * (w - l) + .05 * 2), .744397, .437488),
        "dpop": (dict(beta=.1), lambda w, l: nls(.1 * (w - l - 50 * max(0, ref - w))), 5.205501, .474077),
        "cal_dpo": (dict(beta=.1), lambda w, l: nls(w - l) + ((w - ref - 5)**2 + (l - ref + 5)**2) / 2, 38.126928, 6.506715),
        "alphapo": ({}, lambda w, l: nls(2.5 * (math.exp(-.25 * l / 4) - math.exp(-.25 * w / 6)) / .25 - .1), .116039, .000088),
    }


@pytest.mark.parametrize("key", golden())
def test_golden_values(key):
    "The table's six digits (computed by its authors in plain arithmetic: *reconstructed*), ours to 1e-10 of the formula."
    settings, formula, *table = golden()[key]
    w, l = torch.tensor([-12., -9.]).double(), torch.tensor([-10., -14.]).double()
    inputs = dict(policy_chosen_logps=w, policy_rejected_logps=l, ref_chosen_logps=0 * w - 11, ref_rejected_logps=0 * w - 11,
                  chosen_lengths=0 * w + 6, rejected_lengths=0 * w + 4)
    found = get_loss(key.partition(",")[0])(inputs, **settings)[0].tolist()
    assert found == pytest.approx([formula(-12, -10), formula(-9, -14)], abs=1e-10)
    assert found == pytest.approx(table, abs=2e-6)


def test_golden_kto_one_reply_at_a_time():
    rows = dict(policy_logps=torch.tensor([-12., -10., -9., -14.]).double(), ref_logps=torch.full((4,), -11.).double(),
                label=torch.tensor([1, 0, 1, 0]), kl=torch.tensor(0.).double())
    assert get_loss("kto")(rows)[0].tolist() == pytest.approx([.524979, .524979, .450166, .425557], abs=1e-6)


# ------------------------------------------------------------ TRL's own loss code, fed with given log-probabilities

def trl_dpo(token_logps, ref, mask, loss_type, sum_sq=None, **settings):
    "The mean loss that TRL's DPOTrainer makes of these token log-probabilities: its method, on a trainer that is only a bag of settings."
    DPOTrainer = pytest.importorskip("trl", reason="TRL is the oracle here and is not installed").DPOTrainer
    defaults = dict(beta=.1, label_smoothing=0., f_divergence_type="reverse_kl", f_alpha_divergence_coef=.5, discopop_tau=.05, use_weighting=False, loss_weights=[1.])
    s = SimpleNamespace(**(defaults | settings))
    same = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, args=s,
                              loss_types=[loss_type] if isinstance(loss_type, str) else loss_type, _metrics=defaultdict(lambda: defaultdict(list)),
                              _total_train_tokens=0, _tp_size=1, **{k: v for k, v in vars(s).items() if k != "discopop_tau"})
    zero = torch.zeros_like(token_logps).detach()
    out = SimpleNamespace(log_probs=token_logps, log_sum_sq_probs=zero if sum_sq is None else sum_sq, entropy=zero, mean_logits=zero, is_top1=zero.bool())
    inputs = dict(input_ids=torch.ones_like(mask), attention_mask=torch.ones_like(mask), completion_mask=mask, ref_chosen_logps=ref[0], ref_rejected_logps=ref[1])
    return DPOTrainer._compute_loss(trainer, lambda **_: out, inputs, False)


def random_tokens(seed, B=5, T=12, dtype=torch.float32, spread=1., equal=False, prompt=2):
    "Token log-probabilities of 2B replies behind a prompt, the mask over all tokens, reference sums."
    g = torch.Generator().manual_seed(seed)
    lengths = torch.full((2 * B,), T - prompt) if equal else torch.randint(2, T - prompt + 1, (2 * B,), generator=g)
    at = torch.arange(T)
    mask = ((at >= prompt) & (at < prompt + lengths[:, None])).long()
    tokens = -spread * torch.rand(2 * B, T - 1, generator=g, dtype=dtype) * 2 * mask[:, 1:]
    ref = (tokens.sum(1) + spread * torch.randn(2 * B, generator=g, dtype=dtype)).detach().chunk(2)
    return tokens.requires_grad_(), ref, mask


def ours(tokens, ref, mask, name, sum_sq=None, **settings):
    n, sums = mask[:, 1:].sum(1).to(tokens.dtype), tokens.sum(1)
    (w, l), (nw, nl) = sums.chunk(2), n.chunk(2)
    inputs = dict(policy_chosen_logps=w, policy_rejected_logps=l, ref_chosen_logps=ref[0], ref_rejected_logps=ref[1], chosen_lengths=nw, rejected_lengths=nl)
    if sum_sq is not None:
        gap = ((tokens - sum_sq).detach() * mask[:, 1:]).sum(1) / n
        inputs |= dict(chosen_wpo=gap.chunk(2)[0], rejected_wpo=gap.chunk(2)[1])
    return get_loss(name)(inputs, **settings)[0]


def agree(tokens, a, b, tolerance=1e-6):
    "Value and gradient of two means, at the tokens of the replies."
    ga, gb = (torch.autograd.grad(x, tokens, retain_graph=True)[0] * (tokens != 0) for x in (a, b))
    size = max(1., abs(b.item()), gb.abs().max().item())
    assert abs(a.item() - b.item()) <= tolerance * size and (ga - gb).abs().max() <= tolerance * size


SETTINGS = dict(robust=dict(label_smoothing=.1), exo_pair=dict(label_smoothing=.01), sft={})


@pytest.mark.parametrize("beta", [.05, .5])
@pytest.mark.parametrize("name", TRL_NAMES)
def test_values_and_gradients_are_those_of_trl(name, beta):
    for seed in range(20):
        tokens, ref, mask = random_tokens(seed, equal=name == "sft")
        more = SETTINGS.get(name, {})
        mine = ours(tokens, ref, mask, name, **more, **({} if name == "sft" else {"beta": beta}))
        agree(tokens, mine.mean(), trl_dpo(tokens, ref, mask, name, beta=beta, **more))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_smoothed_aot_is_trls(name):
    tokens, ref, mask = random_tokens(3)
    agree(tokens, ours(tokens, ref, mask, name, beta=.2, label_smoothing=.1).mean(), trl_dpo(tokens, ref, mask, name, beta=.2, label_smoothing=.1))


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", WITH_DIVERGENCE)
def test_divergences_are_those_of_trl(name, kind):
    for seed in range(5):
        tokens, ref, mask = random_tokens(seed)
        more = SETTINGS.get(name, {}) | dict(f_divergence_type=kind, beta=.3)
        agree(tokens, ours(tokens, ref, mask, name, **more).mean(), trl_dpo(tokens, ref, mask, name, **more), 2e-6)


def test_the_same_losses_take_a_divergence():
    "TRL reads f_divergence_type in seven losses; the register marks the same seven."
    assert {n for n in TRL_NAMES if LOSSES[n].divergence} == set(WITH_DIVERGENCE)


def test_wpo_is_trls_weighting():
    for seed in range(5):
        tokens, ref, mask = random_tokens(seed)
        sum_sq = (-torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) - .5) * mask[:, 1:]
        agree(tokens, ours(tokens, ref, mask, "wpo", sum_sq, beta=.1).mean(), trl_dpo(tokens, ref, mask, "sigmoid", sum_sq, use_weighting=True))


def test_mixtures_are_trls_lists():
    for seed in range(5):
        tokens, ref, mask = random_tokens(seed, equal=True)
        agree(tokens, ours(tokens, ref, mask, "mpo").mean(), trl_dpo(tokens, ref, mask, ["sigmoid", "bco_pair", "sft"], loss_weights=[.8, .2, 1.]))
        agree(tokens, ours(tokens, ref, mask, "rpo").mean(), trl_dpo(tokens, ref, mask, ["sigmoid", "sft"], loss_weights=[1., 1.]))


def test_cpo_simpo_and_alphapo_are_trls():
    CPOTrainer = pytest.importorskip("trl.experimental.cpo", reason="TRL is not installed").CPOTrainer
    for loss_type, name, alpha, more in (("sigmoid", "cpo", 0., dict(cpo_alpha=0.)), ("simpo", "simpo", 0., dict(gamma=.5)), ("simpo", "alphapo", .25, dict(gamma=.5, power=.25))):
        tokens, ref, mask = random_tokens(1)
        (w, l), n = tokens.sum(1).chunk(2), mask[:, 1:].sum(1).float().chunk(2)
        given = (w, l) if name == "cpo" else (w / n[0], l / n[1])
        trainer = SimpleNamespace(alpha=alpha, loss_type=loss_type, simpo_gamma=.5, beta=.7, label_smoothing=0., accelerator=SimpleNamespace(device="cpu"))
        agree(tokens, ours(tokens, ref, mask, name, beta=.7, **more).mean(), CPOTrainer.cpo_loss(trainer, *given)[0].mean())


def test_orpo_is_trls():
    ORPOTrainer = pytest.importorskip("trl.experimental.orpo", reason="TRL is not installed").ORPOTrainer
    tokens, ref, mask = random_tokens(2)
    (w, l), n = tokens.sum(1).chunk(2), mask[:, 1:].sum(1).float().chunk(2)
    trainer = SimpleNamespace(beta=.3, accelerator=SimpleNamespace(device="cpu"))
    ratio = ORPOTrainer.odds_ratio_loss(trainer, w / n[0], l / n[1])[0]
    agree(tokens, ours(tokens, ref, mask, "orpo", beta=.3).mean(), (-w / n[0] - ratio).mean())


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_is_trls(loss_type):
    KTOTrainer = pytest.importorskip("trl", reason="TRL is not installed").KTOTrainer
    for seed in range(5):
        tokens, ref, mask = random_tokens(seed)
        rows, label = len(tokens), torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed)) > .4
        other, other_ref = torch.randn(rows, generator=torch.Generator().manual_seed(seed)) - 9.8, torch.full((rows,), -10.)
        same = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
        weights = dict(desirable_weight=1.3, undesirable_weight=.7) if loss_type == "kto" else dict(desirable_weight=1., undesirable_weight=1.)
        trainer = SimpleNamespace(model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False, precompute_ref_logps=True, calculate_KL=loss_type == "kto",
                                  loss_type=loss_type, beta=.3, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
                                  _compute_kl_logps=lambda *_: other, **weights)
        zero = torch.zeros_like(tokens).detach()
        out = SimpleNamespace(log_probs=tokens, entropy=zero, mean_logits=zero, is_top1=zero.bool())
        batch = dict(input_ids=torch.ones_like(mask), attention_mask=torch.ones_like(mask), completion_mask=mask, label=label, ref_logps=torch.cat(ref), ref_KL_logps=other_ref)
        theirs = KTOTrainer._compute_loss(trainer, lambda **_: out, batch, False)
        inputs = dict(policy_logps=tokens.sum(1), ref_logps=torch.cat(ref), label=label, kl=kto_kl(other, other_ref))
        agree(tokens, get_loss(loss_type)(inputs, beta=.3, **(weights if loss_type == "kto" else {}))[0].mean(), theirs)


# ------------------------------------------------------------ where TRL is not followed, and why

def test_disagreement_trl_ignores_label_smoothing_on_sigmoid():
    "cDPO left TRL; the setting is still accepted and changes nothing there. Here it does what it says."
    tokens, ref, mask = random_tokens(0)
    plain, smoothed = (trl_dpo(tokens, ref, mask, "sigmoid", label_smoothing=e).item() for e in (0., .3))
    assert plain == smoothed
    assert ours(tokens, ref, mask, "sigmoid", label_smoothing=.3).mean().item() != pytest.approx(smoothed, abs=1e-3)


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_disagreement_trl_counts_an_unscored_token_when_the_prompt_is_empty(name):
    "TRL divides by the completion mask before the shift: without a prompt the first token is counted, though nothing predicts it."
    tokens, ref, mask = random_tokens(4, prompt=0)
    mine, theirs = ours(tokens, ref, mask, name, beta=.3).mean().item(), trl_dpo(tokens, ref, mask, name, beta=.3).item()
    assert abs(mine - theirs) > 1e-3 * abs(theirs)
    n, (w, l) = mask[:, 1:].sum(1).float().chunk(2), tokens.sum(1).chunk(2)
    gap = (w - ref[0]) / n[0] - (l - ref[1]) / n[1]                   # per scored token
    by_hand = (gap - 1 / .6)**2 if name == "ipo" else torch.nn.functional.softplus(-.3 * gap)
    assert mine == pytest.approx(by_hand.mean().item(), rel=1e-6)


def test_disagreement_trls_forward_kl_overflows():
    "Two replies 200 nats below the reference: −∞ minus −∞ in TRL, a number and a gradient here."
    tokens, ref, mask = random_tokens(5)
    ref = tuple(r + 200 for r in ref)
    assert trl_dpo(tokens, ref, mask, "sigmoid", f_divergence_type="forward_kl").isnan()
    mine = ours(tokens, ref, mask, "sigmoid", f_divergence_type="forward_kl").mean()
    assert mine.isfinite() and torch.autograd.grad(mine, tokens)[0].isfinite().all()


def test_disagreement_trls_alpha_divergence_goes_dead():
    "TRL clamps the exponent: beyond it the gradient is exactly 0 and the reply is forgotten; the tangent keeps pulling."
    tokens, ref, mask = random_tokens(5)
    ref = (ref[0] + 200, ref[1])
    theirs = torch.autograd.grad(trl_dpo(tokens, ref, mask, "sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=.5), tokens)[0]
    mine = torch.autograd.grad(ours(tokens, ref, mask, "sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=.5).mean(), tokens)[0]
    chosen = mask[:5, 1:].bool()
    assert (theirs[:5][chosen] == 0).all() and (mine[:5][chosen] < 0).all()


def test_disagreement_trls_discopop_is_not_a_number_below_minus_88():
    tokens, ref, mask = random_tokens(6)
    ref = (ref[0] + 1000, ref[1])
    assert trl_dpo(tokens, ref, mask, "discopop").isnan()
    mine = ours(tokens, ref, mask, "discopop", beta=.1).mean()
    assert mine.isfinite() and torch.autograd.grad(mine, tokens)[0].isfinite().all()


def test_disagreement_trls_sft_depends_on_the_split():
    "TRL takes the mean over the tokens of a micro-batch. Cut in two, the mean of the means is another number; ours is the same."
    tokens, ref, mask = random_tokens(7, B=4)
    def part(i): return [torch.cat([x[i], x[4:][i]]) for x in (tokens, mask)] + [tuple(r[i] for r in ref)]
    whole = trl_dpo(tokens, ref, mask, "sft").item()
    halves = [trl_dpo(t, r, m, "sft").item() for t, m, r in (part(slice(0, 1)), part(slice(1, 4)))]
    assert abs(whole - (halves[0] + 3 * halves[1]) / 4) > 1e-3
    mine = [ours(t, r, m, "sft") for t, m, r in (part(slice(0, 1)), part(slice(1, 4)))]
    assert torch.equal(ours(tokens, ref, mask, "sft"), torch.cat(mine))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_both_agree_that_aot_depends_on_the_split(name):
    "Not a fault of TRL's but of the method: which the register says (`batch_dependent`)."
    tokens, ref, mask = random_tokens(8, B=8, spread=3.)
    one = torch.cat([ours(torch.cat([tokens[i:i + 1], tokens[8 + i:9 + i]]), tuple(r[i:i + 1] for r in ref), torch.cat([mask[i:i + 1], mask[8 + i:9 + i]]), name, beta=.5) for i in range(8)])
    assert LOSSES[name].batch_dependent and abs(one.mean() - ours(tokens, ref, mask, name, beta=.5).mean()) > 1e-4


# ------------------------------------------------------------ what goes with the losses

@pytest.mark.parametrize("epsilon", [.05, .2, .4])
def test_robust_is_unbiased_under_flips(epsilon):
    "In expectation over flips of probability ε the robust loss is the clean DPO loss; the conservative one is not."
    tokens, ref, mask = random_tokens(9, dtype=torch.float64)
    def turn(x): return torch.cat(x.chunk(2)[::-1])
    straight, flipped = (tokens, ref, mask), (turn(tokens), ref[::-1], turn(mask))
    def expected(name): return (1 - epsilon) * ours(*straight, name, label_smoothing=epsilon) + epsilon * ours(*flipped, name, label_smoothing=epsilon)
    clean = ours(*straight, "sigmoid")
    assert (expected("robust") - clean).abs().max() < 1e-10 and (expected("sigmoid") - clean).abs().max() > 1e-3


@pytest.mark.parametrize("p,tau,rest", [(1., .1, 5.), (.8, .1, 3.), (.6, .5, .2)])
def test_ipo_rests_where_it_must(p, tau, rest):
    "Two actions, preference p: h* = (2p − 1)/(2τ), in nats for `ipo_sum`, in nats a token for `ipo`."
    for name, n in (("ipo_sum", (1, 1)), ("ipo", (3, 7))):
        h = torch.tensor([rest], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        ends = dict(ref_chosen_logps=zero, ref_rejected_logps=zero, chosen_lengths=zero + n[0], rejected_lengths=zero + n[1])
        ahead = get_loss(name)(ends | dict(policy_chosen_logps=h * n[0], policy_rejected_logps=zero), beta=tau)[0]
        behind = get_loss(name)(ends | dict(policy_chosen_logps=zero, policy_rejected_logps=h * n[1]), beta=tau)[0]
        (p * ahead + (1 - p) * behind).sum().backward()
        assert abs(h.grad.item()) < 1e-8


def test_per_token_losses_divide_by_the_scored_tokens():
    tokens, ref, mask = torch.tensor([[0., -1., -2., -4.]] * 2).double(), (torch.zeros(1).double(),) * 2, torch.tensor([[0, 0, 1, 1, 1]] * 2)
    assert ours(tokens, ref, mask, "sft").item() == pytest.approx(7 / 3, abs=1e-12)


def test_running_means_forget_and_never_see_their_own_batch():
    kept, like = Baselines(.9), torch.zeros(1, dtype=torch.float64)
    assert kept.inputs(like) == dict(reward_mean=torch.tensor(0.), gap_mean=torch.tensor(0.))
    leaf = torch.tensor([1., 3.], requires_grad=True)
    kept.update(reward_mean=leaf)
    assert kept.inputs(like)["reward_mean"].item() == 2. and kept.inputs(like)["gap_mean"].item() == 0. and not kept.inputs(like)["reward_mean"].requires_grad
    kept.update(reward_mean=torch.tensor([4.]))
    assert kept.inputs(like)["reward_mean"].item() == pytest.approx(.9 * 2 + .1 * 4, abs=1e-12) and kept.inputs(like)["reward_mean"].dtype == torch.float64


def test_beta_dpo_asks_more_of_an_easy_batch():
    tokens, ref, mask = random_tokens(10, dtype=torch.float64)
    w, l = tokens.sum(1).chunk(2)
    inputs = dict(policy_chosen_logps=w, policy_rejected_logps=l, ref_chosen_logps=ref[0], ref_rejected_logps=ref[1])
    gap = ((w - ref[0]) - (l - ref[1])).detach()
    for before in (-2., 0., 2.):
        found = get_loss("beta_dpo")(inputs | {"gap_mean": torch.tensor(before).double()}, beta=.2, beta_scale=.6)[0]
        beta = max(1e-3, .2 * (1 + .6 * (gap.mean().item() - before)))
        assert (found - torch.nn.functional.softplus(-beta * gap)).abs().max() < 1e-12


def test_odpo_and_the_filter_refuse_and_keep():
    with pytest.raises(Refusal, match="score gap"): odpo_offset(torch.tensor([1., 0.]))
    kept = keep_usual(torch.randn(10), 0., 1., torch.Generator().manual_seed(0))
    assert kept.sum() == 8 and set(kept.tolist()) == {0., 1.}


@pytest.mark.parametrize("name,settings,said", [("robust", dict(label_smoothing=.5), "below 0.5"), ("exo_pair", dict(label_smoothing=0.), "above 0"),
                                                ("discopop", dict(discopop_tau=0.), "discopop_tau"), ("discopop", dict(discopop_tau=2.), "discopop_tau")])
def test_settings_without_meaning_are_refused(name, settings, said):
    with pytest.raises(Refusal, match=said): ours(*random_tokens(0), name, **settings)


# ------------------------------------------------------------ names in a configuration

def test_every_trl_name_is_a_loss():
    for name in TRL_NAMES + ("kto", "apo_zero_unpaired", "simpo"): assert get_loss(name).name == name


@pytest.mark.parametrize("name", TRL_NAMES)
def test_every_trl_name_is_a_configuration(name, tmp_path):
    from dpo_literate.objective import start_value
    from dpo_literate.settings import DPOConfig, objective_of
    args = DPOConfig(str(tmp_path), loss_type=name, label_smoothing=.01 if name in ("exo_pair", "robust") else 0., report_to="none")
    found = start_value(objective_of(args))
    assert found is None or math.isfinite(found)


def test_lists_with_weights_are_a_configuration(tmp_path):
    from dpo_literate.objective import start_value
    from dpo_literate.settings import DPOConfig, objective_of
    args = DPOConfig(str(tmp_path), loss_type=["sigmoid", "bco_pair"], loss_weights=[.8, .2], report_to="none")
    assert start_value(objective_of(args)) == pytest.approx(.8 * math.log(2) + .4 * math.log(2), abs=1e-12)


# ------------------------------------------------------------ one world

def small():
    from dpo_literate.one_world import CONDITIONS, Condition, ask, make_arena, methods, train
    return SimpleNamespace(conditions=CONDITIONS, Condition=Condition, ask=ask, make_arena=make_arena, methods=methods(), train=train)


def test_worlds_and_verdicts_are_the_same_every_time_and_differ_by_seed():
    w = small()
    a, b = w.make_arena(range(3)), w.make_arena(range(2, 4))
    assert torch.equal(a.rewards[2], b.rewards[0]) and not torch.equal(a.rewards[0], a.rewards[1])
    for name, condition in w.conditions.items():
        arena = w.make_arena(range(2), shared=condition.shared)
        one, two = w.ask(arena, condition), w.ask(arena, condition)
        assert torch.equal(one.chosen, two.chosen) and torch.equal(one.rejected, two.rejected) and one.chosen.shape == (2, condition.n)
        assert (one.chosen != one.rejected).all() and torch.equal(one.chosen // 8, one.rejected // 8), name  # one prompt, two replies


def test_flips_turn_a_fifth_of_the_labels():
    w = small()
    arena = w.make_arena(range(2))
    straight, turned = (w.ask(arena, w.Condition("", n=5000, flip=f)) for f in (0., .2))
    share = (straight.chosen != turned.chosen).double().mean().item()
    assert share == pytest.approx(.2, abs=.02)


def test_settings_and_seeds_do_not_touch_each_other():
    "Trained side by side or alone: the same policy."
    from dataclasses import replace
    w = small()
    arena = w.make_arena(range(3))
    verdicts = w.ask(arena, w.Condition("", n=40))
    for name in ("sigmoid", "aot", "beta_dpo", "bco", "kto", "simpo", "cal_dpo", "tr_dpo"):
        method = replace(w.methods[name], grid=(.1, .7))
        both = w.train(arena, verdicts, method, steps=20)
        for g, value in enumerate(method.grid):
            for s in range(3):
                alone_arena = replace(arena, ref_logps=arena.ref_logps[s:s + 1], rewards=arena.rewards[s:s + 1], lengths=arena.lengths[s:s + 1])
                alone = w.train(alone_arena, type(verdicts)(verdicts.chosen[s:s + 1], verdicts.rejected[s:s + 1]), replace(method, grid=(value,)), steps=20)
                assert (both[g, s] - alone[0, 0]).abs().max() < 1e-9, name


def test_every_loss_of_the_register_takes_part():
    w = small()
    assert set(LOSSES) <= {m.loss for m in w.methods.values()} and len(w.methods) >= len(LOSSES)
    for condition in (w.Condition("", n=30), w.Condition("", n=30, shared=3)):
        arena = w.make_arena(range(2), shared=condition.shared)
        verdicts = w.ask(arena, condition)
        for name, method in w.methods.items():
            logps = w.train(arena, verdicts, method, steps=5)
            assert logps.shape == (len(method.grid), 2, 6, 8) and logps.isfinite().all(), name
            assert (logps.exp().sum(-1) - 1).abs().max() < 1e-9 and (logps - arena.ref_logps).abs().max() > 0, name


def test_dpo_finds_the_best_policy_when_told_enough():
    "Population of clean verdicts, β = the price: no regret to speak of (T11 through the race's own code)."
    from dpo_literate.one_world import Method, measure
    w = small()
    arena = w.make_arena(range(2), n_prompts=2, n_replies=4)
    verdicts = w.ask(arena, w.Condition("", n=60_000))
    regret = measure(arena, verdicts, w.train(arena, verdicts, Method("sigmoid", grid=(.5,)), steps=400))["regret"]
    assert (regret >= -1e-9).all() and regret.max() < 2e-3


def test_verdicts_on_claims_follow_the_interval():
    import importlib.util
    from pathlib import Path
    spec = importlib.util.spec_from_file_location("bench_variants", Path(__file__).parent.parent / "benchmarks" / "variants.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    assert [bench.verdict(*v) for v in ((-.3, -.1, -1), (.1, .3, -1), (-.1, .1, -1), (.1, .2, 1), (-.2, -.1, 1))] == \
        ["held", "did not hold", "too small to tell", "held", "did not hold"]
    assert len(bench.CLAIMS) >= 6 and all(name in small().methods for *_, name, _other, _key, _wanted in bench.CLAIMS)
