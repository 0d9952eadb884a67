"""Groups of replies: which gradients agree, and how large a group should be. Page 15.

    python benchmarks/groups.py
        all cells; one that exists is not made again. Learning rates are chosen on other worlds
    python benchmarks/groups.py --record
        gather the cells into nbs/results/ and judge the claims; refuses while one is missing
"""
import sys

import torch
from cells import (above, below, claim_row, gathered, made, options, ran, recorded,
                   run_or_record, seconds_of,
                   work)

from dpo_literate.frontier import wide_world
from dpo_literate.groups import (
    expected_gradient, group_advantages, loo_advantages, rebel_loss, train_groups)
from dpo_literate.losses import dpo_loss
from dpo_literate.ppo import policy_loss
from dpo_literate.results import bootstrap_interval, repo_dir, save_result
from dpo_literate.world import objective, optimal_policy

RUNS = repo_dir() / "runs" / "groups"
COMMAND = "python benchmarks/groups.py --record"
BETA, TUNING, WORLDS = .5, dict(n_prompts=16, seed=1000), dict(n_prompts=48, seed=0)
RATES = (.01, .02, .05, .1, .2, .4)
ADVANTAGES = {"RLOO": loo_advantages, "GRPO": group_advantages}
SIZES = ((2, 512), (16, 512), (4, 256), (16, 64))     # replies a group, updates


def shares(c):
    "What share of the gain a method gets, in each world of one prompt."
    world = wide_world(**c["worlds"])
    path = train_groups(world, BETA, c["G"], c["updates"], ADVANTAGES[c["name"]], c["lr"])
    def J(lp): return objective(lp, world.ref_logps, world.rewards, BETA)
    start, best = J(world.ref_logps), J(optimal_policy(world.ref_logps, world.rewards, BETA))
    return ((J(path[-1]) - start) / (best - start)).tolist()


def config(name, G, updates, lr, worlds):
    return dict(arm=f"{name}-{G}-{updates}-{lr}", seed=worlds["seed"], name=name, G=G,
                updates=updates, lr=lr, worlds=worlds, beta=BETA)


def mean(x): return sum(x) / len(x)


def tuning():
    return [config(name, *size, lr, TUNING) for name in ADVANTAGES for size in SIZES
            for lr in RATES]


def tested():
    "Every arm with the rate that gains most on the tuning worlds."
    def tried(name, size, lr): return mean(made(RUNS, config(name, *size, lr, TUNING), shares))
    return [config(name, *size, max(RATES, key=lambda lr: tried(name, size, lr)), WORLDS)
            for name in ADVANTAGES for size in SIZES]


# ------------------------------------------------------------ gradients, exactly

def first_step(lp, ref, r, beta=1.):
    "Minus the gradient of online DPO's expected loss, a judge who always names the better reply."
    now = lp.clone().requires_grad_()
    new, p = now.log_softmax(-1), lp.exp()
    w, l = (r[:, None] > r[None, :]).nonzero().T
    losses = dpo_loss(new[w], new[l], ref[w], ref[l], beta=beta)[0]
    return -torch.autograd.grad((2 * p[w] * p[l] * losses).sum(), now)[0]


def turned(a, b): return 1 - torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def rebel_gap(seed):
    "REBEL's slope against 4β times that of RLOO with the KL in the reward, on random pairs."
    g = torch.Generator().manual_seed(seed)
    dr, du = torch.randn(2, 50, generator=g, dtype=torch.float64)
    gap, now = du.clone().requires_grad_(), torch.zeros(50, 2).double().requires_grad_()
    pair = torch.stack([dr - BETA * du, torch.zeros(50)], -1)
    loo = policy_loss(now, now.detach(), loo_advantages(pair)).mean(-1).sum()
    ours = torch.autograd.grad(rebel_loss(gap, dr, 1 / BETA).sum(), gap)[0]
    return (ours - 4 * BETA * torch.autograd.grad(loo, now)[0][:, 0]).abs().max().item()


def gradients(seed):
    "Differences between expected gradients in one world of eight replies."
    world = wide_world(1, 8, seed)
    ref, r = world.ref_logps[0], world.rewards[0]
    moved = optimal_policy(ref, r, 1.)
    def gap(a, b): return (a - b).abs().max().item()
    def mean_reward(lp): return lp.exp() * (r - (lp.exp() * r).sum())
    two = [expected_gradient(lp, r, 2, group_advantages) for lp in (ref, moved)]
    return dict(start=gap(two[0], first_step(ref, ref, r)),
                later=turned(two[1], first_step(moved, ref, r)),
                loo=gap(expected_gradient(ref, r, 4), mean_reward(ref)),
                grpo=turned(expected_gradient(ref, r, 4, group_advantages), mean_reward(ref)),
                rebel=rebel_gap(seed))


def exact_claims(found):
    "found: a world -> its differences, from `gradients`."
    def row(claim, source, paper, key, bar, note):
        return claim_row(claim, source, paper, [f[key] for f in found], below(bar), unit="world",
                         seeds=24, setup=f"24 worlds of 8 replies, exact expectations; {note}",
                         command=COMMAND)
    far, turn = "largest difference", "1 − cosine of the two directions"
    return [
        row("GRPO of two is online DPO's first step (β = 1, a judge who never errs)",
            "arXiv:2510.00977", "the same form", "start", 1e-10, far),
        row("GRPO of two is online DPO after it, too", "its title", "\"secretly DPO\"", "later",
            1e-3, f"{turn}, at the optimum of β = 1"),
        row("REBEL is RLOO of two with the KL in its reward", "arXiv:2404.16767",
            "a generalisation", "rebel", 1e-10, f"{far}, 50 pairs, wherever the policy stands"),
        row("RLOO of four follows the mean reward", "arXiv:2402.14740", "unbiased", "loo", 1e-10,
            far),
        row("GRPO of four follows the mean reward", "common", "none", "grpo", 1e-3, turn),
    ]


def size_claims(by):
    "by: (name, G, updates) -> shares by world."
    def row(claim, source, paper, values, verdict, note):
        return claim_row(claim, source, paper, values, verdict, unit="world", seeds=len(values),
                         command=COMMAND,
                         setup=f"48 worlds of 40 replies, β .5, rates tuned on 16 others; {note}")
    def minus(a, b): return [x - y for x, y in zip(by[a], by[b])]
    two, same, equal = ("GRPO", 2, 512), ("GRPO", 16, 512), ("GRPO", 16, 64)
    kept = [x / y for x, y in zip(by[two], by[same])]
    return [
        row("GRPO of two keeps 97.6 % of GRPO of sixteen at an eighth of the replies",
            "arXiv:2510.00977", "97.6 %", kept, above(.976), "ratio of gains, 512 updates each"),
        row("at equal replies GRPO of two gains more than of sixteen", "arXiv:2510.00977", "none",
            minus(two, equal), above(), "difference in share of the gain, 1,024 replies"),
        row("RLOO gains more than GRPO, groups of sixteen", "arXiv:2402.14740", "none",
            minus(("RLOO", 16, 512), same), above(), "difference in share of the gain"),
        row("RLOO gains more than GRPO, groups of two", "arXiv:2402.14740", "none",
            minus(("RLOO", 2, 512), two), above(), "difference in share of the gain"),
    ]


def record(_):
    arms = gathered(tested(), RUNS)
    rows = [dict({k: c["config"][k] for k in ("name", "G", "updates", "lr")},
                 shares=[round(x, 5) for x in c["values"]],
                 share=mean(c["values"]), **dict(zip(("low", "high"),
                                                     bootstrap_interval(c["values"]))))
            for c in arms]
    exact = [gradients(seed) for seed in range(24)]
    save_result("groups_size", dict(arms=rows, exact=exact), command=COMMAND,
                seed=WORLDS["seed"], ran=ran(arms),
                seconds=seconds_of(arms + gathered(tuning(), RUNS)),
                config=dict(beta=BETA, sizes=SIZES, rates=RATES, worlds=WORLDS, tuning=TUNING),
                what="Share of the possible gain that groups of several sizes reach.")


def judge():
    "Page, and its claims, from the committed record."
    found, _ = recorded("groups_size")
    by = {(a["name"], a["G"], a["updates"]): a["shares"] for a in found["arms"]}
    return "15_groups", exact_claims(found["exact"]) + size_claims(by)


def main():
    args = options(__doc__).parse_args()
    torch.set_num_threads(1)
    def shown(values): return f"{mean(values):.3f}"
    def run(_, minutes): # what is tested depends on what tuning found
        return sum(work(todo(), RUNS, shares, shown, minutes) for todo in (tuning, tested))
    return run_or_record(args, list, run, record, judge)


if __name__ == "__main__": sys.exit(main())
