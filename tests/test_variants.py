"The family against plain arithmetic and against TRL: value, gradient, every known disagreement."
import importlib.util
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import softplus

from dpo_literate import one_world
from dpo_literate.departures import (RunningMeans, beta_dpo_filter, kto_kl, odpo_offset,
                                     quantile_coupling)
from dpo_literate.losses import all_losses, get_loss
from dpo_literate.objective import start_value
from dpo_literate.results import Refusal
from dpo_literate.settings import DPOConfig, objective_of
from dpo_literate.variants import increasing_root, rest_with_margin

LOSSES = all_losses()
TRL_NAMES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
             "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")
WITH_DIVERGENCE = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")


def sg(x): return 1 / (1 + math.exp(-x))


def nls(x): return math.log1p(math.exp(-x))  # −log σ


def same_process(x): return x


def one_process():
    "What TRL's loss code asks of accelerate, in a single process."
    return SimpleNamespace(device=torch.device("cpu"), gather=same_process,
                           gather_for_metrics=same_process)


def seeded(seed): return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------ golden values
# pair A: log π −12 and −10; pair B: −9 and −14; reference −11 everywhere; 6 and 4 tokens

REF = -11


def gap(f): return lambda w, l: f(.1 * (w - l))


def odds(x): return x - math.log(1 - math.exp(x))


def exo(m): return sg(m) * math.log(sg(m) / .999) + sg(-m) * math.log(sg(-m) / .001)


def discopop(m): return (1 - sg(m / .05)) * nls(m) + sg(m / .05) * math.exp(-m)


def squares(w, l): return (w - REF - 5)**2 + (l - REF + 5)**2


def nca(w, l): return nls(w) + .5 * nls(-w) + .5 * nls(-l)


def bent(x): return math.exp(-.25 * x) / .25


GOLDEN = [  # name, settings, the loss in plain arithmetic, what the literature's table has for A, B
    ("sigmoid", {}, gap(nls), .798139, .474077),
    ("sigmoid", dict(label_smoothing=.1), gap(lambda m: .9 * nls(m) + .1 * nls(-m)),
     .778139, .524077),
    ("robust", dict(label_smoothing=.1), gap(lambda m: (.9 * nls(m) - .1 * nls(-m)) / .8),
     .823139, .411577),
    ("hinge", {}, gap(lambda m: max(0, 1 - m)), 1.2, .5),
    ("ipo_sum", {}, lambda w, l: (w - l - 5)**2, 49., 0.),
    ("ipo", {}, lambda w, l: ((w - REF) / 6 - (l - REF) / 4 - 5)**2, 29.340278, 15.340278),
    ("exo_pair", dict(label_smoothing=1e-3), gap(exo), 3.110397, 1.945734),
    ("nca_pair", dict(beta=.1), lambda w, l: nca(.1 * (w - REF), .1 * (l - REF)),
     1.438793, 1.274386),
    ("bco_pair", dict(beta=.1), lambda w, l: nls(.1 * (w - REF)) + nls(-.1 * (l - REF)),
     1.488793, 1.152494),
    ("sppo_hard", dict(beta=.1), squares, 72., 13.),
    ("apo_zero", {}, lambda w, l: 1 - sg(.1 * (w - REF)) + sg(.1 * (l - REF)), 1.049958, .875723),
    ("kto_pair", {}, lambda w, l: sg(-.1 * (w - REF)) + sg(.1 * (l - REF)),
     .524979 + .524979, .450166 + .425557),
    ("apo_down", {}, lambda w, l: sg(.1 * (w - REF)) + 1 - sg(.1 * (w - l)), 1.024855, .927375),
    ("discopop", dict(beta=.1), gap(discopop), .805752, .606525),
    ("sigmoid_norm", dict(beta=.1), lambda w, l: nls(.1 * ((w - REF) / 6 - (l - REF) / 4)),
     .714198, .640447),
    ("cpo", dict(cpo_alpha=0.), gap(nls), .798139, .474077),
    ("simpo", dict(beta=2., gamma=.5), lambda w, l: nls(2 * (w / 6 - l / 4) - .5),
     .474077, .029750),
    ("orpo", {}, lambda w, l: -w / 6 + .1 * nls(odds(w / 6) - odds(l / 4)), 2.045193, 1.510293),
    ("r_dpo", dict(length_penalty=.05), lambda w, l: nls(.1 * (w - l) + .05 * 2),
     .744397, .437488),
    ("dpop", dict(beta=.1), lambda w, l: nls(.1 * (w - l - 50 * max(0, REF - w))),
     5.205501, .474077),
    ("cal_dpo", dict(beta=.1), lambda w, l: nls(w - l) + squares(w, l) / 2, 38.126928, 6.506715),
    ("alphapo", {}, lambda w, l: nls(2.5 * (bent(l / 4) - bent(w / 6)) - .1), .116039, .000088),
]


def pair_inputs(**more):
    w, l = torch.tensor([-12., -9.]).double(), torch.tensor([-10., -14.]).double()
    return dict(policy_chosen_logps=w, policy_rejected_logps=l, ref_chosen_logps=0 * w + REF,
                ref_rejected_logps=0 * w + REF, chosen_lengths=0 * w + 6,
                rejected_lengths=0 * w + 4, **more)


@pytest.mark.parametrize("name,settings,formula,a,b", GOLDEN, ids=[g[0] for g in GOLDEN])
def test_golden_values(name, settings, formula, a, b):
    "The table's six digits (*reconstructed* in plain arithmetic), ours to 1e-10 of the formula."
    found = get_loss(name)(pair_inputs(), **settings)[0].tolist()
    assert found == pytest.approx([formula(-12, -10), formula(-9, -14)], abs=1e-10)
    assert found == pytest.approx([a, b], abs=2e-6)


def test_golden_kto_one_reply_at_a_time():
    rows = dict(policy_logps=torch.tensor([-12., -10., -9., -14.]).double(),
                ref_logps=torch.full((4,), -11.).double(),
                label=torch.tensor([1, 0, 1, 0]), z0=torch.tensor(0.).double())
    found = get_loss("kto")(rows)[0].tolist()
    assert found == pytest.approx([.524979, .524979, .450166, .425557], abs=1e-6)


# ------------------------------------------------------------ TRL's own loss code, fed by us

def trl_dpo(token_logps, ref, mask, loss_type, sum_sq=None, **settings):
    "What TRL's DPOTrainer makes of these log-probabilities: its method, on a bag of settings."
    reason = "TRL is the oracle here and is not installed"
    DPOTrainer = pytest.importorskip("trl", reason=reason).DPOTrainer
    args = dict(beta=.1, label_smoothing=0., f_divergence_type="reverse_kl",
                f_alpha_divergence_coef=.5, discopop_tau=.05, use_weighting=False,
                loss_weights=[1.]) | settings
    own = {k: v for k, v in args.items() if k != "discopop_tau"}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=one_process(), aux_loss_enabled=False,
        ld_alpha=None, precompute_ref_logps=True, args=SimpleNamespace(**args), _tp_size=1,
        loss_types=[loss_type] if isinstance(loss_type, str) else loss_type,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, **own)
    zero = torch.zeros_like(token_logps).detach()
    out = SimpleNamespace(log_probs=token_logps, entropy=zero, mean_logits=zero,
                          log_sum_sq_probs=zero if sum_sq is None else sum_sq,
                          is_top1=zero.bool())
    inputs = dict(input_ids=torch.ones_like(mask), attention_mask=torch.ones_like(mask),
                  completion_mask=mask, ref_chosen_logps=ref[0], ref_rejected_logps=ref[1])
    return DPOTrainer._compute_loss(trainer, lambda **_: out, inputs, False)


def random_tokens(seed, B=5, T=12, dtype=torch.float32, spread=1., equal=False, prompt=2):
    "Token log-probs of 2B replies behind a prompt, the mask over all tokens, reference sums."
    g = seeded(seed)
    longest = T - prompt
    lengths = (torch.full((2 * B,), longest) if equal
               else torch.randint(2, longest + 1, (2 * B,), generator=g))
    at = torch.arange(T)
    mask = ((at >= prompt) & (at < prompt + lengths[:, None])).long()
    tokens = -spread * torch.rand(2 * B, T - 1, generator=g, dtype=dtype) * 2 * mask[:, 1:]
    ref = (tokens.sum(1) + spread * torch.randn(2 * B, generator=g, dtype=dtype)).detach()
    return tokens.requires_grad_(), ref.chunk(2), mask


def ours(tokens, ref, mask, name, sum_sq=None, **settings):
    "The same tokens through a loss of the registry."
    n, sums = mask[:, 1:].sum(1).to(tokens.dtype), tokens.sum(1)
    (w, l), (nw, nl) = sums.chunk(2), n.chunk(2)
    inputs = dict(policy_chosen_logps=w, policy_rejected_logps=l, ref_chosen_logps=ref[0],
                  ref_rejected_logps=ref[1], chosen_lengths=nw, rejected_lengths=nl)
    if sum_sq is not None:
        a = ((tokens - sum_sq).detach() * mask[:, 1:]).sum(1) / n
        inputs |= dict(zip(("chosen_wpo", "rejected_wpo"), a.chunk(2)))
    return get_loss(name)(inputs, **settings)[0]


def agree(tokens, a, b, tolerance=1e-6):
    "Value and gradient of two means, at the tokens of the replies."
    ga, gb = (torch.autograd.grad(x, tokens, retain_graph=True)[0] * (tokens != 0)
              for x in (a, b))
    size = max(1., abs(b.item()), gb.abs().max().item())
    assert abs(a.item() - b.item()) <= tolerance * size
    assert (ga - gb).abs().max() <= tolerance * size


SETTINGS = dict(robust=dict(label_smoothing=.1), exo_pair=dict(label_smoothing=.01), sft={})


@pytest.mark.parametrize("beta", [.05, .5])
@pytest.mark.parametrize("name", TRL_NAMES)
def test_values_and_gradients_are_those_of_trl(name, beta):
    more = SETTINGS.get(name, {})
    own = more if name == "sft" else more | {"beta": beta}
    for seed in range(20):
        tokens, ref, mask = random_tokens(seed, equal=name == "sft")
        theirs = trl_dpo(tokens, ref, mask, name, beta=beta, **more)
        agree(tokens, ours(tokens, ref, mask, name, **own).mean(), theirs)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_smoothed_aot_is_trls(name):
    tokens, ref, mask = random_tokens(3)
    more = dict(beta=.2, label_smoothing=.1)
    mine = ours(tokens, ref, mask, name, **more).mean()
    agree(tokens, mine, trl_dpo(tokens, ref, mask, name, **more))


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("name", WITH_DIVERGENCE)
def test_divergences_are_those_of_trl(name, kind):
    more = SETTINGS.get(name, {}) | dict(f_divergence_type=kind, beta=.3)
    for seed in range(5):
        tokens, ref, mask = random_tokens(seed)
        mine = ours(tokens, ref, mask, name, **more).mean()
        agree(tokens, mine, trl_dpo(tokens, ref, mask, name, **more), 2e-6)


def test_the_same_losses_take_a_divergence():
    "TRL reads f_divergence_type in seven losses; the registry marks the same seven."
    assert {n for n in TRL_NAMES if LOSSES[n].divergence} == set(WITH_DIVERGENCE)


def test_wpo_is_trls_weighting():
    for seed in range(5):
        tokens, ref, mask = random_tokens(seed)
        sum_sq = (-torch.rand(tokens.shape, generator=seeded(seed)) - .5) * mask[:, 1:]
        theirs = trl_dpo(tokens, ref, mask, "sigmoid", sum_sq, use_weighting=True)
        agree(tokens, ours(tokens, ref, mask, "wpo", sum_sq, beta=.1).mean(), theirs)


@pytest.mark.parametrize("name,parts,weights", [
    ("mpo", ["sigmoid", "bco_pair", "sft"], [.8, .2, 1.]), ("rpo", ["sigmoid", "sft"], [1., 1.])])
def test_mixtures_are_trls_lists(name, parts, weights):
    for seed in range(5):
        tokens, ref, mask = random_tokens(seed, equal=True)
        theirs = trl_dpo(tokens, ref, mask, parts, loss_weights=weights)
        agree(tokens, ours(tokens, ref, mask, name).mean(), theirs)


def trl_experimental(module, name):
    reason = "TRL is not installed"
    return getattr(pytest.importorskip(f"trl.experimental.{module}", reason=reason), name)


@pytest.mark.parametrize("name,loss_type,alpha,more", [
    ("cpo", "sigmoid", 0., dict(cpo_alpha=0.)), ("simpo", "simpo", 0., dict(gamma=.5)),
    ("alphapo", "simpo", .25, dict(gamma=.5, power=.25))])
def test_cpo_simpo_and_alphapo_are_trls(name, loss_type, alpha, more):
    CPOTrainer = trl_experimental("cpo", "CPOTrainer")
    tokens, ref, mask = random_tokens(1)
    (w, l), n = tokens.sum(1).chunk(2), mask[:, 1:].sum(1).float().chunk(2)
    given = (w, l) if name == "cpo" else (w / n[0], l / n[1])
    trainer = SimpleNamespace(alpha=alpha, loss_type=loss_type, simpo_gamma=.5, beta=.7,
                              label_smoothing=0., accelerator=one_process())
    theirs = CPOTrainer.cpo_loss(trainer, *given)[0].mean()
    agree(tokens, ours(tokens, ref, mask, name, beta=.7, **more).mean(), theirs)


def test_orpo_has_trls_odds():
    ORPOTrainer = trl_experimental("orpo", "ORPOTrainer")
    tokens, ref, mask = random_tokens(2)
    (w, l), n = tokens.sum(1).chunk(2), mask[:, 1:].sum(1).float().chunk(2)
    trainer = SimpleNamespace(beta=.3, accelerator=one_process())
    ratio = ORPOTrainer.odds_ratio_loss(trainer, w / n[0], l / n[1])[0]
    mine = ours(tokens, ref, mask, "orpo", beta=.3).mean()
    agree(tokens, mine, (-w / n[0] - ratio).mean())


def test_the_full_orpo_is_trls_whole_step():
    "One pair through TRL's own forward pass: its likelihood is that of prompt and reply."
    from dpo_literate.models import tiny_model
    ORPOTrainer = trl_experimental("orpo", "ORPOTrainer")
    model, beta = tiny_model(), .3
    prompt, chosen, rejected = [5, 9, 30, 7], [11, 12, 13], [40, 41]
    trainer = SimpleNamespace(
        beta=beta, accelerator=one_process(), is_encoder_decoder=False, padding_value=0,
        label_pad_token_id=-100, aux_loss_enabled=False, aux_loss_coef=0.,
        concatenated_inputs=ORPOTrainer.concatenated_inputs,
        get_batch_logps=ORPOTrainer.get_batch_logps)
    def row(ids, scored): return dict(input_ids=ids, attention_mask=[1] * len(ids), labels=scored)
    batch = {}
    for side, reply in (("chosen", chosen), ("rejected", rejected)):
        found = row(prompt + reply, [-100] * len(prompt) + reply)
        batch |= {f"{side}_{k}": torch.tensor([v]) for k, v in found.items()}
    batch |= {f"prompt_{k}": torch.tensor([v]) for k, v in row(prompt, prompt).items()}
    w, l, _, _, nll = ORPOTrainer.concatenated_forward(trainer, model, batch)[:5]
    ratio = ORPOTrainer.odds_ratio_loss(trainer, w, l)[0]

    def scored(reply):
        ids = torch.tensor(prompt + reply)
        logps = model(ids[None]).logits[0, :-1].log_softmax(-1)
        return logps.gather(-1, ids[1:, None])[:, 0].split([len(prompt) - 1, len(reply)])
    (before, yes), (_, no) = scored(chosen), scored(rejected)
    inputs = dict(prompt_logps=before.sum(), prompt_lengths=torch.tensor(len(prompt) - 1.),
                  policy_chosen_logps=yes.sum(), chosen_lengths=torch.tensor(3.),
                  policy_rejected_logps=no.sum(), rejected_lengths=torch.tensor(2.))
    mine = get_loss("orpo_full")({k: v[None] for k, v in inputs.items()}, beta=beta)[0]
    assert mine.item() == pytest.approx((nll - ratio.mean()).item(), abs=1e-6)
    reply_only = get_loss("orpo")({k: v[None] for k, v in inputs.items()}, beta=beta)[0]
    assert abs(mine - reply_only) > 1e-3


def test_the_trainer_refuses_the_full_orpo_by_name(tmp_path):
    from dpo_literate.models import tiny_model
    from dpo_literate.rows import tiny_tokenizer
    from dpo_literate.trainer import DPOTrainer
    pairs = [dict(prompt="the cat", chosen="sat", rejected="on")] * 2
    def made(loss): # the remedy is tried
        return DPOTrainer(tiny_model(), args=DPOConfig(str(tmp_path), loss_type=loss),
                          train_dataset=pairs, processing_class=tiny_tokenizer())
    with pytest.raises(Refusal, match="'orpo_full' needs prompt_logps.*use orpo,"):
        made("orpo_full")
    assert made("orpo").step.objective.parts[0][0].name == "orpo"


@pytest.mark.parametrize("loss_type,weights", [
    ("kto", dict(desirable_weight=1.3, undesirable_weight=.7)),
    ("apo_zero_unpaired", dict(desirable_weight=1.3, undesirable_weight=.7))])
def test_kto_is_trls(loss_type, weights):
    KTOTrainer = pytest.importorskip("trl", reason="TRL is not installed").KTOTrainer
    for seed in range(5):
        tokens, ref, mask = random_tokens(seed)
        rows, label = len(tokens), torch.rand(len(tokens), generator=seeded(seed)) > .4
        other = torch.randn(rows, generator=seeded(seed)) - 9.8
        other_ref, zero = torch.full((rows,), -10.), torch.zeros_like(tokens).detach()
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True), accelerator=one_process(), beta=.3,
            aux_loss_enabled=False, precompute_ref_logps=True, calculate_KL=loss_type == "kto",
            loss_type=loss_type, _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0, _tp_size=1, _compute_kl_logps=lambda *_: other, **weights)
        out = SimpleNamespace(log_probs=tokens, entropy=zero, mean_logits=zero,
                              is_top1=zero.bool())
        batch = dict(input_ids=torch.ones_like(mask), attention_mask=torch.ones_like(mask),
                     completion_mask=mask, label=label, ref_logps=torch.cat(ref),
                     ref_KL_logps=other_ref)
        theirs = KTOTrainer._compute_loss(trainer, lambda **_: out, batch, False)
        inputs = dict(policy_logps=tokens.sum(1), ref_logps=torch.cat(ref), label=label,
                      z0=kto_kl(other, other_ref))
        agree(tokens, get_loss(loss_type)(inputs, beta=.3, **weights)[0].mean(), theirs)


# ------------------------------------------------------------ where TRL is not followed, and why

def test_disagreement_trl_ignores_label_smoothing_on_sigmoid():
    "cDPO left TRL; the setting is still accepted and changes nothing there. Here it works."
    tokens, ref, mask = random_tokens(0)
    plain, smoothed = (trl_dpo(tokens, ref, mask, "sigmoid", label_smoothing=e).item()
                       for e in (0., .3))
    assert plain == smoothed
    mine = ours(tokens, ref, mask, "sigmoid", label_smoothing=.3).mean().item()
    assert mine != pytest.approx(smoothed, abs=1e-3)


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_disagreement_trl_counts_an_unscored_token_when_the_prompt_is_empty(name):
    """TRL divides by the completion mask before the shift: without a prompt the first token
    is counted, though nothing predicts it."""
    tokens, ref, mask = random_tokens(4, prompt=0)
    mine = ours(tokens, ref, mask, name, beta=.3).mean().item()
    theirs = trl_dpo(tokens, ref, mask, name, beta=.3).item()
    assert abs(mine - theirs) > 1e-3 * abs(theirs)
    n, (w, l) = mask[:, 1:].sum(1).float().chunk(2), tokens.sum(1).chunk(2)
    per_token = (w - ref[0]) / n[0] - (l - ref[1]) / n[1]          # of scored tokens
    by_hand = (per_token - 1 / .6)**2 if name == "ipo" else softplus(-.3 * per_token)
    assert mine == pytest.approx(by_hand.mean().item(), rel=1e-6)


def test_disagreement_trls_forward_kl_overflows():
    "Two replies 200 nats below the reference: −∞ minus −∞ in TRL, a number and a gradient here."
    tokens, ref, mask = random_tokens(5)
    ref, more = tuple(r + 200 for r in ref), dict(f_divergence_type="forward_kl")
    assert trl_dpo(tokens, ref, mask, "sigmoid", **more).isnan()
    mine = ours(tokens, ref, mask, "sigmoid", **more).mean()
    assert mine.isfinite() and torch.autograd.grad(mine, tokens)[0].isfinite().all()


def test_disagreement_trls_alpha_divergence_goes_dead():
    """TRL clamps the exponent: beyond it the gradient is exactly 0 and the reply is forgotten;
    the tangent keeps pulling."""
    tokens, ref, mask = random_tokens(5)
    ref = (ref[0] + 200, ref[1])
    more = dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=.5)
    both = (trl_dpo(tokens, ref, mask, "sigmoid", **more),
            ours(tokens, ref, mask, "sigmoid", **more).mean())
    theirs, mine = (torch.autograd.grad(x, tokens, retain_graph=True)[0][:5] for x in both)
    chosen = mask[:5, 1:].bool()
    assert (theirs[chosen] == 0).all() and (mine[chosen] < 0).all()


def test_disagreement_trls_discopop_is_not_a_number_below_minus_88():
    tokens, ref, mask = random_tokens(6)
    ref = (ref[0] + 1000, ref[1])
    assert trl_dpo(tokens, ref, mask, "discopop").isnan()
    mine = ours(tokens, ref, mask, "discopop", beta=.1).mean()
    assert mine.isfinite() and torch.autograd.grad(mine, tokens)[0].isfinite().all()


def part_of(tokens, ref, mask, rows):
    "Some pairs of a batch."
    B = len(tokens) // 2
    both = [torch.cat([x[rows], x[B:][rows]]) for x in (tokens, mask)]
    return both[0], tuple(r[rows] for r in ref), both[1]


def test_disagreement_trls_sft_depends_on_the_split():
    """TRL takes the mean over the tokens of a micro-batch. Cut in two, the mean of the means is
    another number; ours is the same."""
    batch = random_tokens(7, B=4)
    parts = [part_of(*batch, rows) for rows in (slice(0, 1), slice(1, 4))]
    whole, *halves = (trl_dpo(*x, "sft").item() for x in (batch, *parts))
    assert abs(whole - (halves[0] + 3 * halves[1]) / 4) > 1e-3
    assert torch.equal(ours(*batch, "sft"), torch.cat([ours(*x, "sft") for x in parts]))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_both_agree_that_aot_depends_on_the_split(name):
    "Not a fault of TRL's but of the method: which the registry says (`batch_dependent`)."
    batch = random_tokens(8, B=8, spread=3.)
    rows = [part_of(*batch, slice(i, i + 1)) for i in range(8)]
    one_by_one = torch.cat([ours(*row, name, beta=.5) for row in rows]).mean()
    assert LOSSES[name].batch_dependent
    assert abs(one_by_one - ours(*batch, name, beta=.5).mean()) > 1e-4


# ------------------------------------------------------------ what goes with the losses

@pytest.mark.parametrize("epsilon", [.05, .2, .4])
def test_robust_is_unbiased_under_flips(epsilon):
    "Over flips of probability ε the robust loss is in the mean the clean DPO loss; cDPO is not."
    straight = random_tokens(9, dtype=torch.float64)
    def turn(x): return torch.cat(x.chunk(2)[::-1])
    tokens, ref, mask = straight
    flipped = turn(tokens), ref[::-1], turn(mask)
    def expected(name):
        kept, turned = (ours(*x, name, label_smoothing=epsilon) for x in (straight, flipped))
        return (1 - epsilon) * kept + epsilon * turned
    clean = ours(*straight, "sigmoid")
    assert (expected("robust") - clean).abs().max() < 1e-10
    assert (expected("sigmoid") - clean).abs().max() > 1e-3


@pytest.mark.parametrize("p,tau,rest", [(1., .1, 5.), (.8, .1, 3.), (.6, .5, .2)])
def test_ipo_rests_where_it_must(p, tau, rest):
    "Two actions, preference p: h* = (2p − 1)/(2τ), nats for `ipo_sum`, nats a token for `ipo`."
    for name, n in (("ipo_sum", (1, 1)), ("ipo", (3, 7))):
        h = torch.tensor([rest], dtype=torch.float64, requires_grad=True)
        zero, loss = torch.zeros(1, dtype=torch.float64), get_loss(name)
        ends = dict(ref_chosen_logps=zero, ref_rejected_logps=zero,
                    chosen_lengths=zero + n[0], rejected_lengths=zero + n[1])
        ahead = dict(policy_chosen_logps=h * n[0], policy_rejected_logps=zero)
        behind = dict(policy_chosen_logps=zero, policy_rejected_logps=h * n[1])
        value = p * loss(ends | ahead, beta=tau)[0] + (1 - p) * loss(ends | behind, beta=tau)[0]
        value.sum().backward()
        assert abs(h.grad.item()) < 1e-8


@pytest.mark.parametrize("f,root", [(lambda x: x**3 - 8, 2.), (lambda x: math.tanh(x - 59), 59.),
                                    (lambda x: x - 100, math.inf), (lambda x: x + 100, -math.inf)])
def test_roots(f, root): assert increasing_root(f) == pytest.approx(root, abs=1e-9)


@pytest.mark.parametrize("beta", [1., .1, .01, .001])
def test_cal_dpo_rests_where_its_slope_is_zero(beta):
    "At β = 0.001 the root is at 300 nats, far outside of the usual bracket."
    p = .8
    a, b = LOSSES["cal_dpo"].optimum(p, beta=beta)
    x = torch.tensor([a / beta], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    def at(w, l):
        return get_loss("cal_dpo")(dict(policy_chosen_logps=w, policy_rejected_logps=l,
                                        ref_chosen_logps=zero, ref_rejected_logps=zero),
                                   beta=beta)[0]
    (p * at(x, -x) + (1 - p) * at(-x, x)).sum().backward()
    assert a == -b and abs(x.grad.item()) < 1e-6


@pytest.mark.parametrize("p", [.5, .6, .9])
@pytest.mark.parametrize("gamma", [0., .5, 2.])
def test_the_rest_with_a_margin_solves_its_equation(p, gamma):
    m = rest_with_margin(p, gamma)
    assert p * sg(gamma - m) == pytest.approx((1 - p) * sg(m + gamma), abs=1e-12)


def test_per_token_losses_divide_by_the_scored_tokens():
    tokens = torch.tensor([[0., -1., -2., -4.]] * 2).double()
    mask, ref = torch.tensor([[0, 0, 1, 1, 1]] * 2), (torch.zeros(1).double(),) * 2
    assert ours(tokens, ref, mask, "sft").item() == pytest.approx(7 / 3, abs=1e-12)


@pytest.mark.parametrize("n,m", [(1, 1), (2, 3), (5, 5), (7, 2)])
def test_the_coupling_gives_every_reply_its_share(n, m):
    "Shares of each chosen reply sum to 1, of each rejected one to n/m, in order."
    i, j, share = quantile_coupling(n, m)
    def total(at, size): return torch.zeros(size).double().index_add(0, at, share)
    assert torch.allclose(total(i, n), torch.ones(n).double())
    assert torch.allclose(total(j, m), torch.full((m,), n / m).double())
    assert len(share) <= n + m - 1 and (i.diff() >= 0).all() and (j.diff() >= 0).all()


def test_running_means_forget_and_never_see_their_own_batch():
    kept, like = RunningMeans(.9), torch.zeros(1, dtype=torch.float64)
    def now(name): return kept.inputs(like)[name]
    assert kept.inputs(like) == dict(reward_mean=torch.tensor(0.), gap_mean=torch.tensor(0.))
    kept.update(reward_mean=torch.tensor([1., 3.], requires_grad=True))
    assert now("reward_mean").item() == 2. and now("gap_mean").item() == 0.
    assert not now("reward_mean").requires_grad
    kept.update(reward_mean=torch.tensor([4.]))
    assert now("reward_mean").item() == pytest.approx(.9 * 2 + .1 * 4, abs=1e-12)
    assert now("reward_mean").dtype == torch.float64


def test_beta_dpo_asks_more_of_an_easy_batch():
    tokens, ref, mask = random_tokens(10, dtype=torch.float64)
    w, l = tokens.sum(1).chunk(2)
    inputs = dict(policy_chosen_logps=w, policy_rejected_logps=l, ref_chosen_logps=ref[0],
                  ref_rejected_logps=ref[1])
    gaps = ((w - ref[0]) - (l - ref[1])).detach()
    for before in (-2., 0., 2.):
        usual = {"gap_mean": torch.tensor(before).double()}
        found = get_loss("beta_dpo")(inputs | usual, beta=.2, beta_scale=.6)[0]
        beta = max(1e-3, .2 * (1 + .6 * (gaps.mean().item() - before)))
        assert (found - softplus(-beta * gaps)).abs().max() < 1e-12


def test_odpo_and_the_filter_refuse_and_keep():
    with pytest.raises(Refusal, match="score gap"): odpo_offset(torch.tensor([1., 0.]))
    kept = beta_dpo_filter(torch.randn(10, generator=seeded(1)), 0., 1., seeded(0))
    assert kept.sum() == 8 and set(kept.tolist()) == {0., 1.}


@pytest.mark.parametrize("name,settings,said", [
    ("robust", dict(label_smoothing=.5), "below 0.5"),
    ("exo_pair", dict(label_smoothing=0.), "above 0"),
    ("discopop", dict(discopop_tau=0.), "discopop_tau"),
    ("discopop", dict(discopop_tau=2.), "discopop_tau")])
def test_settings_without_meaning_are_refused(name, settings, said):
    with pytest.raises(Refusal, match=said): ours(*random_tokens(0), name, **settings)


# ------------------------------------------------------------ names in a configuration

def test_every_trl_name_is_a_loss():
    for name in TRL_NAMES + ("kto", "apo_zero_unpaired", "simpo"):
        assert get_loss(name).name == name


@pytest.mark.parametrize("name", TRL_NAMES)
def test_every_trl_name_is_a_configuration(name, tmp_path):
    smoothing = .01 if name in ("exo_pair", "robust") else 0.
    args = DPOConfig(str(tmp_path), loss_type=name, label_smoothing=smoothing, report_to="none")
    found = start_value(objective_of(args))
    assert found is None or math.isfinite(found)


def test_lists_with_weights_are_a_configuration(tmp_path):
    args = DPOConfig(str(tmp_path), loss_type=["sigmoid", "bco_pair"], loss_weights=[.8, .2],
                     report_to="none")
    want = .8 * math.log(2) + .4 * math.log(2)
    assert start_value(objective_of(args)) == pytest.approx(want, abs=1e-12)


# ------------------------------------------------------------ one world

METHODS = one_world.methods()


def drawn(condition, n_worlds=2, **shape):
    "Worlds and the verdicts of a judge in them."
    worlds = one_world.make_worlds(range(n_worlds), shared=condition.shared, **shape)
    return worlds, one_world.draw_verdicts(worlds, condition)


def few(n, **more): return one_world.Condition("", n=n, **more)


def test_worlds_differ_by_seed():
    a, b = one_world.make_worlds(range(3)), one_world.make_worlds(range(2, 4))
    assert torch.equal(a.rewards[2], b.rewards[0])
    assert not torch.equal(a.rewards[0], a.rewards[1])


@pytest.mark.parametrize("name", one_world.CONDITIONS)
def test_verdicts_are_the_same_every_time_and_compare_replies_of_one_prompt(name):
    condition = one_world.CONDITIONS[name]
    (w, l), again = drawn(condition)[1], drawn(condition)[1]
    assert torch.equal(w, again.chosen) and torch.equal(l, again.rejected)
    assert w.shape == (2, condition.n) and (w != l).all() and torch.equal(w // 8, l // 8)


def test_flips_turn_a_fifth_of_the_labels():
    straight, turned = (drawn(few(5000, flip=f))[1].chosen for f in (0., .2))
    assert (straight != turned).double().mean().item() == pytest.approx(.2, abs=.02)


@pytest.mark.parametrize("name", ["sigmoid", "aot", "beta_dpo", "bco", "kto", "simpo", "cal_dpo",
                                  "tr_dpo"])
def test_settings_and_seeds_do_not_touch_each_other(name):
    "Trained side by side or each for itself: the same policy."
    worlds, verdicts = drawn(few(40), 3)
    method = replace(METHODS[name], grid=(.1, .7))
    together = one_world.train_policies(worlds, verdicts, method, steps=20)
    for s in range(3):
        here = {k: getattr(worlds, k)[s:s + 1] for k in ("ref_logps", "rewards", "lengths")}
        said = type(verdicts)(*(v[s:s + 1] for v in verdicts))
        for g, value in enumerate(method.grid):
            single = replace(method, grid=(value,))
            found = one_world.train_policies(replace(worlds, **here), said, single, steps=20)
            assert (together[g, s] - found[0, 0]).abs().max() < 1e-9


@pytest.mark.parametrize("shared", [None, 3])
def test_every_loss_of_the_registry_takes_part(shared):
    assert {m.loss for m in METHODS.values()} == set(LOSSES) - set(one_world.APART)
    worlds, verdicts = drawn(few(30, shared=shared))
    for name, method in METHODS.items():
        logps = one_world.train_policies(worlds, verdicts, method, steps=5)
        assert logps.shape == (len(method.grid), 2, 6, 8) and logps.isfinite().all(), name
        assert (logps.exp().sum(-1) - 1).abs().max() < 1e-9, name
        assert (logps - worlds.ref_logps).abs().max() > 0, name


def test_dpo_finds_the_best_policy_when_told_enough():
    "Population of clean verdicts, β = the price: no regret to speak of (T11)."
    worlds, verdicts = drawn(few(60_000), n_prompts=2, n_replies=4)
    method = one_world.Method("sigmoid", grid=(.5,))
    trained = one_world.train_policies(worlds, verdicts, method, steps=400)
    regret = one_world.measure_policies(worlds, verdicts, trained)["regret"]
    assert (regret >= -1e-9).all() and regret.max() < 2e-3


@pytest.mark.parametrize("grid,edge", [((1e-4, .5, 1.), False), ((.5, 1., 2.), False),
                                       ((1e-4, 1e-3, .5), False), ((50., 100.), True),
                                       ((.5,), False)])
def test_a_setting_at_the_edge_of_its_grid_is_marked(grid, edge):
    "β = 0.5 is best in plenty of clean verdicts; a grid goes on beyond its end, four values far."
    method = one_world.Method("sigmoid", grid=grid)
    found = one_world.tune_and_test(method, few(3_000), steps=150)
    assert found["knob"] == .5 and found["edge"] is edge and len(found["regret"]) == 10


def test_the_table_marks_what_the_record_says_is_at_an_edge():
    comparison = one_world.recorded_comparison()
    fig = one_world.table_figure(comparison)
    points = {c.get_label(): c for c in fig.axes[0].collections}
    edges = sum(row["edge"] for rows in comparison.values() for row in rows.values())
    crosses = [c for c in fig.axes[0].collections if len(c.get_offsets()) == edges]
    assert edges > 0 and crosses and "best setting at the edge of its grid" in points


def test_the_best_of_one_half_is_judged_in_the_other():
    regret = dict(sigmoid=[1.] * 10, lucky=[.1] * 5 + [2.] * 5, honest=[.5] * 10)
    table = {"clean": {name: dict(regret=values) for name, values in regret.items()}}
    found = {name: lead for name, lead, *_ in one_world.best_losses(table, "clean", 2)}
    assert list(found) == ["lucky", "honest"]
    assert found == pytest.approx(dict(lucky=-1., honest=.5))


def bench():
    path = Path(__file__).parent.parent / "benchmarks" / "variants.py"
    spec = importlib.util.spec_from_file_location("bench_variants", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("wanted, below, above", [(-1, "held", "did not hold"),
                                                  (1, "did not hold", "held")])
def test_a_claim_asks_for_one_sign(wanted, below, above):
    line = bench().line(wanted)
    assert (line(-.3, -.1), line(.1, .3), line(-.1, .1)) == (below, above, "too small to tell")


@pytest.mark.parametrize("optimum, knob, edge, saved, tried", [
    (-1., .1, False, 0., 7),             # inside: the grid stays as it is
    (-2.9, .001, False, 0., 11),         # beyond its low end, and found there
    (.9, 2 * 10**.5, False, 0., 11),     # beyond its high end
    (-9., .0001, True, .5, 11)])         # further than the grid goes on
def test_a_grid_goes_on_where_its_best_setting_lies_at_the_end(
        monkeypatch, optimum, knob, edge, saved, tried):
    "Regret as if measured: the distance from an optimum, in decades."
    asked = []
    def scores(method, condition, seeds, steps, good):
        if seeds is one_world.TUNE: asked.extend(method.grid)
        far = (torch.tensor(method.grid).double().log10() - optimum).abs()
        return dict(regret=far[:, None].expand(-1, len(seeds)))
    monkeypatch.setattr(one_world, "_scores", scores)
    found = one_world.tune_and_test(one_world.Method("sigmoid"), None)
    assert (found["edge"], len(asked)) == (edge, tried)
    assert found["knob"] == pytest.approx(knob) and found["saved"] == pytest.approx(saved)
    assert len(found["regret"]) == len(one_world.TEST)


def test_the_filter_keeps_the_usual_pairs_of_each_batch():
    "Batches side by side: each keeps its own eight of ten, the outlier seldom."
    g = torch.Generator().manual_seed(0)
    gap = torch.randn(3, 4, 10, generator=g)
    gap[..., 0] = 30.
    mean, std = torch.zeros(3, 4, 1), torch.ones(3, 4, 1)
    kept = torch.stack([beta_dpo_filter(gap, mean, std, g) for _ in range(20)])
    assert (kept.sum(-1) == 8).all() and kept[..., 0].sum() == 0 < kept[..., 1:].min(0)[0].numel()


def test_the_filtered_method_sees_fewer_pairs():
    worlds = one_world.make_worlds(range(2))
    verdicts = one_world.draw_verdicts(worlds, one_world.CONDITIONS["flipped"])
    plain, kept = (one_world.train_policies(worlds, verdicts, METHODS[m], steps=8)
                   for m in ("beta_dpo", "beta_dpo_filter"))
    assert plain.shape == kept.shape and kept.isfinite().all() and (plain - kept).abs().max() > 1e-3


def test_claims_name_methods_that_take_part():
    claims = bench().CLAIMS
    assert len(claims) >= 6
    assert all({c.name, c.other} <= set(METHODS) for c in claims)
