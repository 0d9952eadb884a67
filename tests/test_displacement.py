"Displacement beyond the page: random worlds, the fork on four families, samples against counts."
import math
from types import SimpleNamespace

import pytest
import torch

from dpo_literate.models import tiny_model
from dpo_literate.probes.base import far_pairs, near_pairs, short_run, teach_replies
from dpo_literate.probes.displacement import (FORK, draw_replies, fork_mass, fork_rows,
                                              fresh_replies, log_lines, logps_of, mass_change,
                                              mass_moved, moved_share, next_token_mass,
                                              pair_logps, probe, shift_of)
from dpo_literate.rows import Row, encode_pairs, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAIRS = [dict(prompt=f"the cat {'sat ' * (i % 3)}", chosen=f"on the mat {i}",
              rejected=f"on the dog {'sat ' * (i % 4)}{i}") for i in range(6)]
ROWS, _ = encode_pairs(PAIRS, TOKENIZER)
KINDS = ("llama", "qwen2", "gpt2", "gemma2")
ENDS = {TOKENIZER.eos_token_id}


# ------------------------------------------------------------ the account

@pytest.mark.parametrize("seed", range(10))
def test_the_account_balances(seed):
    g = torch.Generator().manual_seed(seed)
    before, after = (torch.randn(7, 5, dtype=torch.float64, generator=g).log_softmax(-1)
                     for _ in range(2))
    w, l = torch.stack([torch.randperm(5, generator=g)[:2] for _ in range(7)]).T
    change = mass_change(before, after, w, l)
    for i in range(7):
        moved = after[i].exp() - before[i].exp()
        others = sum(moved[k] for k in range(5) if k not in (w[i], l[i]))
        assert abs(change.chosen[i] - moved[w[i]]) < 1e-15
        assert abs(change.rejected[i] - moved[l[i]]) < 1e-15
        assert abs(change.others[i] - others) < 1e-15
        assert abs(sum(b[i] for b in change)) < 1e-14


def test_forks_are_where_replies_part():
    rows = [Row([1], [5, 6, 7], [5, 8]), Row([1, 2], [5, 6], [9, 6]), Row([1], [5, 6], [5])]
    cut = [(r.prompt_ids, r.chosen_ids, r.rejected_ids) for r in fork_rows(rows)]
    assert cut == [([1, 5], [6], [8]), ([1, 2], [5], [9])]


@pytest.mark.parametrize("kind", KINDS)
def test_fork_mass_against_a_softmax(kind):
    model = tiny_model(kind)
    mass = fork_mass(model, ROWS, batch_size=4)
    for r, got in zip(fork_rows(ROWS), mass):
        p = model(torch.tensor([r.prompt_ids])).logits[0, -1].double().softmax(-1)
        w, l = p[r.chosen_ids[0]], p[r.rejected_ids[0]]
        assert (got - torch.stack([w, l, 1 - w - l])).abs().max() < 1e-5


# ------------------------------------------------------------ samples

def test_samples_estimate_the_exact_share():
    "One-token replies can be listed: the estimate is within four standard errors of the truth."
    a, b = tiny_model(seed=0), tiny_model(seed=1)
    ids, n = ROWS[0].prompt_ids, 600
    exact, top, before, after = next_token_mass(a, b, ids, k=320)
    assert abs((after - before).abs().sum() / 2 - exact) < 1e-12 and len(set(top)) == 320
    for policy, reference in ((a, b), (b, a)):
        found = mass_moved(policy, reference, ids, ENDS, n=n, max_new_tokens=1)
        assert abs(found.share - exact) < 4 * .5 / math.sqrt(n), (found.share, exact)
    assert mass_moved(a, a, ids, ENDS, n=8, max_new_tokens=3).share < 1e-6


def test_the_share_that_moved():
    ratio = torch.tensor([0., math.log(4), -3., math.inf], dtype=torch.float64)
    assert moved_share(ratio).tolist() == pytest.approx([0, .75, 0, 1])


def test_sampled_replies_end_where_they_end():
    model, prompt = tiny_model(scale=1.), ROWS[0].prompt_ids
    ends = set(range(0, 320, 3))
    replies = draw_replies(model, prompt, 40, 6, ends)
    assert len(replies) == 40 and all(1 <= len(y) <= 6 for y in replies)
    assert all(t not in ends for y in replies for t in y[:-1])
    assert any(y[-1] in ends for y in replies)
    assert draw_replies(model, prompt, 40, 6, ends) == replies
    odd = logps_of(model, prompt, replies[:5])
    alone = torch.cat([logps_of(model, prompt, [y]) for y in replies[:5]])
    assert odd.shape == (5,) and (odd - alone).abs().max() < 1e-5


def test_another_seed_draws_other_replies():
    model, prompt = tiny_model(), ROWS[0].prompt_ids
    one, two = (draw_replies(model, prompt, 5, 4, ENDS, seed) for seed in (0, 1))
    assert one != two


def test_fresh_replies_of_one_model_are_not_new():
    model = tiny_model("gpt2")
    old, new, moved = fresh_replies(model, model, TOKENIZER, ["tell me", "why"], limit=5)
    assert torch.equal(old, new) and moved.tolist() == [0, 0] and (old <= 5).all()


# ------------------------------------------------------------ the log

def test_a_loss_without_reference_is_read_from_its_raw_numbers():
    args = SimpleNamespace(loss_type=["simpo"], beta=2.)
    line = {"rewards/chosen": -9., "logps/chosen": -52., "logps/rejected": -60.}
    assert shift_of(line, "chosen", args, {"logps/chosen": -50.}) == -2.


def test_another_divergence_is_read_from_its_raw_numbers():
    args = SimpleNamespace(loss_type=["sigmoid"], beta=.1, f_divergence_type="js_divergence")
    line = {"rewards/chosen": -9., "logps/chosen": -52.}
    assert shift_of(line, "chosen", args, {"logps/chosen": -50.}) == -2.
    assert shift_of(line, "chosen", SimpleNamespace(loss_type=["sigmoid"], beta=.1), {}) == -90


def test_lines_about_other_things_are_left_out():
    pair = {"rewards/chosen": 0., "logps/chosen": -1.}
    assert log_lines([{"train_runtime": 3.}, pair, {"eval_loss": 1.}]) == [pair]


# ------------------------------------------------------------ the probe

@pytest.mark.parametrize("pairs,falls", [(near_pairs()[::2], True), (far_pairs()[::2], False)])
def test_the_probe_tells_a_displaced_run_from_a_healthy_one(pairs, falls):
    rows, _ = encode_pairs(pairs, TOKENIZER)
    start = teach_replies(tiny_model(scale=1.), rows)
    model = short_run(start, pairs, TOKENIZER, num_train_epochs=6).model
    found = probe(model, start, TOKENIZER, pairs=pairs, progress=False)
    by_hand = (pair_logps(model, rows) - pair_logps(start, rows))[:, 0].mean().item()
    assert abs(found["chosen reply (nat)"].difference - by_hand) < 1e-9
    chosen = found["chosen reply (nat)"]
    assert (chosen.high < -1) == falls and ("replies fell" in found.words) == (chosen.high < 0)
    assert found["pairs with the chosen reply likelier (share)"].after > .5
    mass = [found[f"at the fork: {who} (probability)"].difference for who in FORK]
    assert abs(sum(mass)) < 1e-9
