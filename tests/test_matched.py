"The matched penalty beyond the page: both layouts, loops and limits, factors, the term in a run."
import math
from types import SimpleNamespace

import pytest
import torch

from dpo_literate.logps import pad_rows
from dpo_literate.models import tiny_model
from dpo_literate.packing import pack_rows, packed_reply_logps
from dpo_literate.probes.base import SHORT_RUN, scored_states, short_run
from dpo_literate.probes.matched import (MatchedPenalty, arm_factor, capped, matched_term,
                                         reply_means, style_factor, style_penalty)
from dpo_literate.probes.tdi import added_noise
from dpo_literate.results import Refusal
from dpo_literate.rows import encode_pairs, tiny_tokenizer
from dpo_literate.trainer import DPOConfig, DPOTrainer

TOKENIZER = tiny_tokenizer()
PAIRS = [dict(prompt=f"the cat {'sat ' * (i % 3)}", chosen=f"on the mat {i}",
              rejected=f"and the dog {'sat ' * (i % 4)}{i}") for i in range(8)]
ROWS, _ = encode_pairs(PAIRS, TOKENIZER)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------ the penalty

@pytest.mark.parametrize("kind,tolerance", [("gpt2", 1e-9), ("llama", 1e-3), ("qwen2", 1e-3)])
def test_penalty_is_the_same_padded_and_packed(kind, tolerance):
    model, L, z = tiny_model(kind), random(32, 3) * .01, random(2, 8, 3, seed=1)
    a, b = (style_penalty(model, batch, L, 1, z) for batch in (pad_rows(ROWS), pack_rows(ROWS)[0]))
    assert (a / b - 1).abs().max() < tolerance


def test_penalty_equals_a_loop_over_pairs():
    model, L, z = tiny_model("gpt2"), random(32, 3) * .05, random(2, 8, 3, seed=1)
    batch = pad_rows(ROWS)
    got = style_penalty(model, batch, L, 1, z)
    size = reply_means(scored_states(model, batch), batch).square().sum(-1).mean()
    for i, row in enumerate(ROWS):
        total = 0.
        for reply in (row.chosen_ids, row.rejected_ids):
            ids, at = torch.tensor([row.prompt_ids + reply]), slice(len(row.prompt_ids) - 1, -1)
            def mean(): return model.base_model(ids).last_hidden_state[0, at].mean(0)
            clean = mean()
            for probe in z[:, i]:
                with added_noise(model, 1, L @ probe):
                    total = total + (mean() - clean).square().sum()
        assert abs(got[i] / (total / 4 / size) - 1) < 1e-9


def test_penalty_is_the_trace_of_the_jacobian():
    "Small noise, many probes: the mean is Tr(J Σ Jᵀ), J by finite differences along L's columns."
    model, L, batch = tiny_model("gpt2"), random(32, 2) * 1e-4, pad_rows(ROWS[:1])
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        got = style_penalty(model, batch, L, 1, random(400, 1, 2, seed=1))[0]
        columns = sum(style_penalty(model, batch, L[:, [k]], 1, one)[0] for k in range(2))
    assert abs(got / columns - 1) < .25


def test_cap_limits_and_keeps_the_direction():
    loss, p = torch.tensor([.6, .8]), torch.tensor([5., 7.], requires_grad=True)
    out = capped(p, loss, .3)
    assert abs(out.mean().item() - .3 * .7) < 1e-6
    assert torch.autograd.grad(out.sum(), p)[0].min() > 0
    small = torch.tensor([.01, .02])
    assert torch.equal(capped(small, loss), small) and capped(torch.zeros(2), loss).isfinite().all()


def test_the_term_is_the_capped_penalty_of_each_pair():
    model, L, batch = tiny_model("gpt2"), random(32, 3) * .01, pad_rows(ROWS)
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                output_hidden_states=True)
    loss = torch.full((8,), .6, dtype=torch.float64)
    how = dict(factor=L, block=1, cap=.3, probes=2, seed=4)
    got = matched_term(model, batch, out.hidden_states[-1], loss, **how)
    z = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(4)).double()
    assert got.shape == (8,)
    assert torch.allclose(got, capped(style_penalty(model, batch, L, 1, z), loss, .3), rtol=1e-6)


# ------------------------------------------------------------ the factors

def test_style_factor():
    delta = random(50, 4) @ random(4, 12, seed=1)
    L = style_factor(delta, shrinkage=0.)
    assert L.shape == (12, 4) and (L @ L.T - torch.cov(delta.T)).abs().max() < 1e-10
    assert style_factor(delta, rank=2).shape == (12, 2)
    assert abs(style_factor(delta).square().sum() / L.square().sum() - 1) < 1e-12


def test_arms_have_one_trace():
    L = style_factor(random(50, 4) @ random(4, 12, seed=1), shrinkage=0.)
    contents = random(30, 12, seed=2)
    arms = {arm: arm_factor(arm, L, contents, seed=5)
            for arm in ("matched", "isotropic", "wrong", "signal")}
    for factor in arms.values():
        assert abs(factor.square().sum() / L.square().sum() - 1) < 1e-9
    iso = arms["isotropic"] @ arms["isotropic"].T
    assert (iso - torch.eye(12, dtype=torch.float64) * iso[0, 0]).abs().max() < 1e-12
    gram = arms["wrong"].T @ arms["wrong"]
    assert (gram - torch.diag(L.norm(dim=0)**2)).abs().max() < 1e-9
    with pytest.raises(Refusal, match="arm"): arm_factor("best", L, contents)


# ------------------------------------------------------------ in a run

def trained(kind="gpt2", more=None, **settings):
    given = dict(num_train_epochs=2, layout="packed") | settings
    return short_run(tiny_model(kind), PAIRS, TOKENIZER, more=more, **given)


def matched(kind="gpt2", settings=None, peft_config=None, **term):
    term = MatchedPenalty(**(dict(factor=random(32, 3) * .01, block=1, warmup=0) | term))
    return trained(kind, dict(terms=(term,), peft_config=peft_config), **(settings or {}))


def apart(a, b):
    both = zip(a.model.parameters(), b.model.parameters())
    return max((p - q).abs().max().item() for p, q in both)


def test_without_weight_or_before_its_time_it_is_dpo():
    plain = trained()
    assert apart(plain, matched(weight=0.)) == 0. and apart(plain, matched(warmup=99)) == 0.


def test_the_term_in_a_run():
    plain, packed = trained(), matched()
    padded = matched(settings=dict(layout="padded"))
    assert apart(plain, packed) > 1e-4 and apart(packed, padded) < 1e-6
    first, of_plain = packed.state.log_history[0], plain.state.log_history[0]
    assert first["loss"] == of_plain["loss"] and abs(first["loss"] - math.log(2)) < 1e-12
    assert 0 < first["style_penalty"] <= .7 * .3 * first["loss"] + 1e-9
    assert apart(packed, matched()) == 0.


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("block", [0, 1])
def test_recomputed_layers_see_the_same_noise(kind, block):
    "Gradient checkpointing runs a layer again when the noise is gone; the weights must not notice."
    a = matched(kind, block=block)
    b = matched(kind, dict(gradient_checkpointing=True), block=block)
    assert apart(a, b) < (1e-9 if kind == "gpt2" else 1e-5)


def test_the_term_with_an_adapter():
    peft = pytest.importorskip("peft")
    def lora(): return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    off, on = (matched("llama", peft_config=lora(), weight=w) for w in (0., 5.))
    adapters = [[p for n, p in t.model.named_parameters() if "lora_B" in n] for t in (off, on)]
    assert adapters[0] and max((a - b).abs().max() for a, b in zip(*adapters)) > 1e-5


def test_clean_and_noisy_states_are_rounded_alike():
    "No noise costs nothing, also where a step without a `Trainer` scores under autocast."
    model, batch = tiny_model().float(), pad_rows(ROWS)
    term, loss = MatchedPenalty(0 * random(32, 3), block=1, warmup=0), torch.full((8,), .6)
    with term.watch(model), torch.autocast("cpu", torch.bfloat16): packed_reply_logps(model, batch)
    assert term(model, batch, None, SimpleNamespace(loss=loss)).tolist() == [0] * 8
    clean = term.seen[-1][0]
    bare = matched_term(model, batch, clean, loss, **term.given, seed=0)
    assert bare.max() > 0        # what another rounding of the noisy pass would cost


def test_evaluation_is_dpo(tmp_path):
    args = DPOConfig(str(tmp_path), **SHORT_RUN, max_steps=2)
    term = MatchedPenalty(random(32, 3) * .01, block=1, warmup=0)
    trainer = DPOTrainer(tiny_model("gpt2"), args=args, train_dataset=PAIRS, terms=(term,),
                         processing_class=TOKENIZER)
    trainer.train()
    found = trainer.evaluate(list(ROWS))["eval_loss"]
    trainer.step.terms = ()
    assert trainer.evaluate(list(ROWS))["eval_loss"] == found
