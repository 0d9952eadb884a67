"Pages 14 to 15a on other worlds than theirs: the table's step, searches, groups, corridors."
import math

import pytest
import torch

from dpo_literate.groups import (expected_gradient, group_advantages, loo_advantages, passed_kl,
                                 prompt_weight, rebel_loss, soft_values, train_groups)
from dpo_literate.losses import divergence_score, get_loss
from dpo_literate.online import (Optimism, TablePolicy, TableRow, chi_policy, draw_rows,
                                 hidden_world, samples_until, table_step, train_rounds)
from dpo_literate.results import Refusal
from dpo_literate.sparse import RULES, Walks, step_logps, train_corridors, walk
from dpo_literate.world import optimal_policy

SEEDS = range(5)


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slope(model, step, rows):
    "Gradient of a step's sum by the table."
    model.moved.grad = None
    (piece,), = step.begin(model, [rows])[0]
    step.loss(model, piece).backward()
    return model.moved.grad


# ------------------------------------------------------------ page 14

@pytest.mark.parametrize("loss", ["sigmoid", "ipo_sum", "hinge", "nca_pair"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_table_learns_what_the_loss_says(loss, seed):
    world = hidden_world(range(seed, seed + 3), n_replies=5)
    model, rows = TablePolicy(world.ref_logps), [TableRow(0, 1, 2, 2), TableRow(2, 4, 0, 4, 3.)]
    with torch.no_grad(): model.moved += normal(seed, 3, 5)
    ours = slope(model, table_step(world, loss, beta=.3), rows)
    x, w, l = torch.tensor([r[:3] for r in rows]).T
    lp, ref = model(), world.ref_logps
    value = get_loss(loss)(dict(policy_chosen_logps=lp[x, w], policy_rejected_logps=lp[x, l],
                                ref_chosen_logps=ref[x, w], ref_rejected_logps=ref[x, l]), beta=.3)
    plain = torch.autograd.grad((value[0] * torch.tensor([1., 3.])).sum(), model.moved)[0]
    assert (ours - plain).abs().max() < 1e-12 < ours.abs().max()


def test_worlds_in_one_table_do_not_notice_each_other():
    world = hidden_world(range(2), n_replies=4)
    model, step = TablePolicy(world.ref_logps), table_step(world, terms=(Optimism(.2),), beta=.3)
    one = slope(model, step, [TableRow(0, 1, 2, 2)]).clone()
    both = slope(model, step, [TableRow(0, 1, 2, 2), TableRow(1, 0, 3, 3)])
    assert torch.equal(one[0], both[0]) and both[1].abs().max() > 0 == one[1].abs().max()


@pytest.mark.parametrize("nats", [2., 9.])
def test_the_hidden_reply_is_as_rare_as_asked_and_the_best(nats):
    world = hidden_world(SEEDS, nats=nats)
    assert (world.ref_logps.logsumexp(-1)).abs().max() < 1e-12
    assert (world.ref_logps[:, -1] + nats).abs().max() < 1e-12
    assert (world.rewards.argmax(-1) == 15).all()


def test_the_judge_is_bradley_and_terry():
    world = hidden_world(range(1), n_replies=3)
    even = torch.full((1, 3), 1 / 3, dtype=torch.float64).log()
    rows = draw_rows(world, even, even, 60_000, torch.Generator().manual_seed(0))
    won = [sum((w, l) == pair for _, w, l, _ in rows) for pair in ((2, 0), (0, 2))]
    r = world.rewards[0]
    assert won[0] / sum(won) == pytest.approx((r[2] - r[0]).sigmoid().item(), abs=.01)
    assert all(second in (w, l) for _, w, l, second in rows)


def test_a_reply_that_no_pair_holds_is_not_found_however_long_one_trains():
    world = hidden_world(range(6), nats=30.)           # e^-30: no draw holds it
    end = train_rounds(world, 1, 32, table_step(world, beta=.25), steps=400, lr=.1)[-1]
    assert (end - world.ref_logps)[:, -1].max() < 0


def test_optimism_finds_what_passive_sampling_does_not():
    world = hidden_world(range(50, 58), nats=7.)
    def found(terms, beside):
        path = train_rounds(world, 64, 8, table_step(world, terms=terms, beta=.25), beside, lr=.3)
        return sum(n is not None for n in samples_until(path, 16))
    assert found((Optimism(.003),), True) >= 6 > 2 >= found((), False)


def test_rounds_repeat_and_seeds_differ():
    world = hidden_world(range(2))
    def end(seed): return train_rounds(world, 3, 4, table_step(world, beta=.25), seed=seed)[-1]
    assert torch.equal(end(0), end(0)) and not torch.equal(end(0), end(1))


@pytest.mark.parametrize("alpha", [-.1, math.inf, math.nan])
def test_a_bonus_without_meaning_is_refused(alpha):
    with pytest.raises(Refusal, match="alpha"): Optimism(alpha)


@pytest.mark.parametrize("beta", [.02, .5, 20.])
@pytest.mark.parametrize("seed", SEEDS)
def test_chi_policy_solves_its_equation(seed, beta):
    ref, r = normal(seed, 4, 12).log_softmax(-1), normal(seed + 9, 4, 12)
    lp = chi_policy(ref, r, beta)
    assert lp.logsumexp(-1).abs().max() < 1e-10
    left = beta * divergence_score(lp - ref, "chi_squared") - r          # constant in the reply
    there = lp > -600                        # below, π is too small for a float64 of its own
    level = left.masked_fill(~there, -math.inf).amax(-1, keepdim=True)
    assert (left - level)[there].abs().max() < 1e-7 * max(1, beta)
    assert (chi_policy(ref, r + 5, beta) - lp)[there].abs().max() < 1e-8


def test_chi_policy_moves_less_than_the_tilt():
    ref, r = normal(0, 50, 12).log_softmax(-1), normal(1, 50, 12)
    chi, tilt = chi_policy(ref, r, .3), optimal_policy(ref, r, .3)
    assert ((chi - ref).amax(-1) < (tilt - ref).amax(-1)).all()
    assert (chi_policy(ref, r, 1e5) - ref).abs().max() < 1e-4


# ------------------------------------------------------------ page 15

@pytest.mark.parametrize("G", [2, 3, 7])
@pytest.mark.parametrize("seed", SEEDS)
def test_advantages_against_plain_loops(seed, G):
    r = normal(seed, 6, G)
    loo = torch.tensor([[row[i] - (row.sum() - row[i]) / (G - 1) for i in range(G)] for row in r])
    assert (loo_advantages(r) - loo).abs().max() < 1e-12
    grpo = group_advantages(r)
    assert grpo.sum(-1).abs().max() < 1e-12 and (grpo.square().mean(-1) - 1).abs().max() < 1e-12
    assert group_advantages(torch.full((2, G), .3)).abs().max() == 0.
    assert (group_advantages(7 * r + 3) - grpo).abs().max() < 1e-10      # blind to scale and level


def test_one_reply_is_no_group():
    for how in (loo_advantages, group_advantages):
        with pytest.raises(Refusal, match="sample two"): how(torch.ones(3, 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_expected_gradients(seed):
    lp, r = normal(seed, 5).log_softmax(-1), normal(seed + 1, 5)
    exact = lp.exp() * (r - (lp.exp() * r).sum())
    assert (expected_gradient(lp, r, 4) - exact).abs().max() < 1e-12
    right = (r > 0).double()
    p = (lp.exp() * right).sum()
    if 0 < right.sum() < 5:
        binary = prompt_weight(p, 3) * lp.exp() * (right - p)
        assert (expected_gradient(lp, right, 3, group_advantages) - binary).abs().max() < 1e-12


@pytest.mark.parametrize("how", [loo_advantages, group_advantages])
def test_groups_walk_to_the_optimum(how):
    world = hidden_world(SEEDS, nats=2., best=2.)
    star = optimal_policy(world.ref_logps, world.rewards, 1.)
    end = train_groups(world, 1., 16, 300, how, lr=.03)[-1]
    def far(lp): return (lp.exp() - star.exp()).abs().sum(-1).mean()
    assert far(end) < .4 * far(world.ref_logps)


def test_rebel_rests_where_the_reward_is_paid_for():
    r, eta = normal(0, 9), 2.
    u = (eta * r).requires_grad_()
    assert torch.autograd.grad(rebel_loss(u, r, eta).sum(), u)[0].abs().max() < 1e-12


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_token_values_make_the_best_reply_policy(depth):
    shapes = [(2,) * (t + 1) for t in range(depth)]
    ref = [normal(i, *s).log_softmax(-1) for i, s in enumerate(shapes)]
    r, beta = normal(9, *shapes[-1]), .6
    def whole(token):
        return sum(x.reshape(*x.shape, *[1] * (depth - x.dim())).expand(shapes[-1]) for x in token)
    star = [(lp + q / beta).log_softmax(-1) for lp, q in zip(ref, soft_values(ref, r, beta))]
    best = optimal_policy(whole(ref).flatten(), r.flatten(), beta)
    assert (whole(star).flatten() - best).abs().max() < 1e-12
    by_hand = torch.zeros(shapes[-1], dtype=torch.float64)
    for y in torch.cartesian_prod(*[torch.arange(2)] * depth).view(-1, depth).tolist():
        for t in range(depth):
            a, b = ref[t][tuple(y[:t])], star[t][tuple(y[:t])]
            by_hand[tuple(y)] += (a.exp() * (a - b)).sum()
    assert (passed_kl(star, ref) - by_hand).abs().max() < 1e-12


# ------------------------------------------------------------ page 15a

def test_walks_end_at_the_first_wrong_step():
    walks = walk(normal(0, 3, 5), 200, 1., torch.Generator().manual_seed(1))
    logps = step_logps(normal(0, 3, 5), walks)
    for n, b in ((0, 3), (1, 7), (2, 99)):
        right, went, total = walks.right[n, b].tolist(), True, 0.
        for t, ok in enumerate(right):
            assert walks.visited[n, b, t] == float(went)
            z = normal(0, 3, 5)[n, t].item() * (1 if ok else -1)
            total -= went * math.log1p(math.exp(-z))
            went = went and bool(ok)
        assert walks.reward[n, b] == float(went)
        assert logps[n, b].sum().item() == pytest.approx(total, abs=1e-12)


def three_walks():
    "Through and paid; wrong at once; wrong at the second place; wrong at once."
    right = torch.tensor([[[1, 1], [0, 1], [1, 0], [0, 0]]]).double()
    visited = torch.tensor([[[1, 1], [1, 0], [1, 1], [1, 0]]]).double()
    return Walks(right, visited, torch.tensor([[1., 0., 0., 0.]]).double())


@pytest.mark.parametrize("name,raised", [("trajectory DPO", (True, True)), ("GRPO", (True, True)),
                                         ("PPO", (True, True)), ("step-wise DPO", (True, True))])
def test_each_rule_raises_the_right_steps(name, raised):
    logits, value = (torch.zeros(1, 2, dtype=torch.float64, requires_grad=True) for _ in "12")
    loss = RULES[name](logits, three_walks(), start=torch.zeros(1, 2).double(), value=value)
    down = torch.autograd.grad(loss, logits)[0][0]
    assert tuple((down < 0).tolist()) == raised


def test_trajectory_dpo_by_hand():
    logits = torch.tensor([[.4, -.2]], dtype=torch.float64, requires_grad=True)
    start = torch.zeros(1, 2, dtype=torch.float64)
    loss = RULES["trajectory DPO"](logits, three_walks(), start=start, beta=.5)
    def ls(z): return -math.log1p(math.exp(-z))
    gap = (ls(.4) + ls(-.2) + 2 * math.log(2)) - (ls(-.4) + math.log(2))
    assert loss.item() == pytest.approx(-ls(.5 * gap) / 2, abs=1e-12)   # one verdict in two twos


def test_a_search_counts_walks_and_says_when_it_found_nothing():
    found = train_corridors(RULES["step-wise DPO"], 3, 1., N=4, lr=.4, budget=400)
    assert all(n % 8 == 0 and 8 <= n <= 400 for n in found)
    assert train_corridors(RULES["GRPO"], 30, 1., N=2, budget=64) == [None, None]
