"""The enumerable world, over many seeds and shapes; Bradley-Terry fits; the DPO optimum against
theory (T11)."""
import math
import pytest, torch
import torch.nn.functional as F
from dpo_literate.world import (kl, log_partition, objective, optimal_policy, preference_probs,
                                sample_pairs,
                                small_world, total_variation)


def random_world(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(*shape, dtype=torch.float64, generator=generator)
    return F.log_softmax(2 * draw(), -1), 2 * draw(), generator


@pytest.mark.parametrize("beta", [0.05, 0.5, 1., 20.])
@pytest.mark.parametrize("seed", range(10))
def test_objective_is_its_top_minus_the_distance_to_the_optimum(seed, beta):
    ref, r, generator = random_world(seed, 5, 7)
    best, top = optimal_policy(ref, r, beta), beta * log_partition(ref, r, beta)
    policies = F.log_softmax(torch.randn(200, 5, 7, dtype=torch.float64, generator=generator), -1)
    value = objective(policies, ref, r, beta)
    torch.testing.assert_close(value, top - beta * kl(policies, best), atol=1e-9, rtol=1e-9)
    assert (value <= top + 1e-12).all() and objective(best, ref, r, beta).shape == (5,)


@pytest.mark.parametrize("seed", range(10))
def test_reward_is_recovered_up_to_its_level(seed):
    ref, r, _ = random_world(seed, 3, 6)
    back = 0.3 * (optimal_policy(ref, r, 0.3) - ref) + 0.3 * log_partition(ref, r, 0.3)[:, None]
    torch.testing.assert_close(back, r, atol=1e-10, rtol=0)


def test_kl_of_zeros_is_zero_not_nan():
    one = torch.tensor([1., 0.], dtype=torch.float64).log()
    assert (kl(one, one).item() == 0. and kl(one, torch.tensor([.5, .5]).double().log()).item()
            == pytest.approx(math.log(2)))


def test_huge_rewards_stay_finite():
    ref, r, _ = random_world(0, 4)
    assert (log_partition(ref, 1e8 * r, 1.).isfinite()
            and optimal_policy(ref, 1e8 * r, 1.).exp().sum() == pytest.approx(1))


@pytest.mark.parametrize("seed", range(5))
def test_total_variation_is_a_distance(seed):
    a, b, c = (random_world(3 * seed + i, 6)[0] for i in range(3))
    assert total_variation(a, a) == 0 and total_variation(a, b) == total_variation(b, a)
    assert total_variation(a, c) <= total_variation(a, b) + total_variation(b, c) + 1e-15
    assert kl(a, b) >= 2 * total_variation(a, b) ** 2            # Pinsker


def test_pairs_repeat_with_their_seed_and_never_compare_a_reply_with_itself():
    draw = lambda seed: sample_pairs(small_world(), 5000, torch.Generator().manual_seed(seed))
    first, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.chosen, other.chosen) and (first.chosen != first.rejected).all()


def test_pairs_follow_the_judge_everywhere():
    world = small_world()
    pairs = sample_pairs(world, 400_000, torch.Generator().manual_seed(3))
    wins = torch.zeros(3, 4, 4, dtype=torch.float64)
    wins.index_put_(tuple(pairs), torch.ones(400_000, dtype=torch.float64), accumulate=True)
    total, p = wins + wins.transpose(1, 2), preference_probs(world.rewards)
    seen = total > 500
    z = ((wins - total * p) / (total * p * (1 - p)).sqrt())[seen]
    assert seen.sum() > 25 and z.abs().max() < 4.5


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.])
@pytest.mark.parametrize("actions", [4, 6, 8])
def test_dpo_optimum_is_the_closed_form(actions, beta):
    """T11: exact expected loss over all ordered pairs, L-BFGS, float64: total variation at most
    1e-8."""
    ref, r, _ = random_world(actions, actions)
    r = r / 2                                    # standard normal rewards, as T11 has them
    p, logits = preference_probs(r), ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=3000, history_size=50,
                                  line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-15, tolerance_change=1e-18)

    def loss():
        optimizer.zero_grad()
        implicit = beta * (F.log_softmax(logits, -1) - ref)
        value = -(p * F.logsigmoid(implicit[:, None] - implicit[None, :])).sum()
        value.backward()
        return value
    for _ in range(3): optimizer.step(loss)
    assert total_variation(F.log_softmax(logits.detach(), -1), optimal_policy(ref, r, beta)) <= 1e-8


def test_dpo_optimum_in_single_precision():
    "T11 in float32 with Adam: 3,000 steps, total variation at most 1e-5."
    ref, r, _ = random_world(4, 4)
    ref, r = ref.float(), (r / 2).float()
    p, logits = preference_probs(r), ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
    for _ in range(3000):
        optimizer.zero_grad()
        implicit = 0.5 * (F.log_softmax(logits, -1) - ref)
        (-(p * F.logsigmoid(implicit[:, None] - implicit[None, :])).sum()).backward()
        optimizer.step(); schedule.step()
    assert total_variation(F.log_softmax(logits.detach(), -1), optimal_policy(ref, r, 0.5)) <= 1e-5
