"""Who finds a reply that the reference hardly says, and who believes too few verdicts: page 14.

    python benchmarks/online.py
        all cells; one that exists is not made again. Settings are chosen on worlds of their own
    python benchmarks/online.py --record
        gather the cells into nbs/results/ and judge the claims; refuses while one is missing
"""
import math
import sys

import torch
from cells import (above, below, claim_row, gathered, made, options, ran, recorded,
                   run_or_record, seconds_of,
                   work)

from dpo_literate.frontier import point_of, wide_world
from dpo_literate.online import (
    Optimism, chi_policy, hidden_world, samples_until, table_step, train_rounds)
from dpo_literate.ppo import world_ppo
from dpo_literate.results import bootstrap_interval, repo_dir, save_result
from dpo_literate.reward import fit_scores, win_counts
from dpo_literate.world import World, optimal_policy, sample_pairs

RUNS = repo_dir() / "runs" / "online"
COMMAND = "python benchmarks/online.py --record"
BETA, ALPHA, BUDGET, BOUND = .25, .003, 4096, 16.
TUNING, WORLDS = range(1000, 1008), range(24)
RARITIES = (4, 5, 6, 7, 8)                      # −log π_ref of the hidden reply (nat)


# ------------------------------------------------------------ the search

def one_prompt(world, i):
    "World i alone."
    return World(world.prompts[i:i + 1], world.replies[i:i + 1], torch.ones(1).double(),
                 world.ref_logps[i:i + 1], world.rewards[i:i + 1])


def by_ppo(world, lr, batch, **_):
    "PPO with the true reward, each world by itself."
    found = []
    for i in range(len(world.prompts)):
        own = one_prompt(world, i)
        path = world_ppo(own, own.rewards, BETA, seed=i, lr=lr, batch=batch, steps=BUDGET // batch)
        found += samples_until(path, batch)
    return found


def by_drawing(world, **_):
    "Best of n: draws from the reference until the hidden reply is among them."
    g, found = torch.Generator().manual_seed(0), []
    for p in world.ref_logps.exp():
        at = (torch.multinomial(p, BUDGET, True, generator=g) == len(p) - 1).nonzero().flatten()
        found.append(int(at[0]) + 1 if len(at) else None)
    return found


def by_rounds(world, lr, pairs, rounds=None, steps=8, beside_ref=False, alpha=0.):
    "DPO on its own samples: `train_rounds` with these settings."
    step = table_step(world, terms=(Optimism(alpha),) if alpha else (), beta=BETA)
    path = train_rounds(world, rounds or BUDGET // pairs // 2, pairs, step, beside_ref, BOUND,
                        steps, lr)
    return samples_until(path, 2 * pairs)


SLOW, QUICK = (.01, .03, .1, .3), (.02, .05, .2, .5)
GRIDS = {                                       # what is tried on the tuning worlds
    "online DPO": [dict(lr=lr, pairs=n) for lr in SLOW for n in (8, 32)],
    "reference beside": [dict(lr=lr, pairs=n, beside_ref=True) for lr in SLOW for n in (8, 32)],
    "XPO": [dict(lr=lr, pairs=n, beside_ref=True, alpha=ALPHA) for lr in SLOW for n in (8, 32)],
    "PPO": [dict(lr=lr, batch=n) for lr in QUICK for n in (16, 64)],
}
FIXED = {                                       # no grid: trained until nothing moves
    "best of n": {},
    "offline DPO, 64 pairs": dict(lr=.1, pairs=64, rounds=1, steps=300),
    "iterative DPO": dict(lr=.1, pairs=256, rounds=8, steps=300),
}
HOW = {"PPO": by_ppo, "best of n": by_drawing}


def search_cell(c):
    "Samples until found, in each world."
    world = hidden_world(range(*c["worlds"]), nats=c["nats"])
    return HOW.get(c["name"], by_rounds)(world, **c["settings"])


def search_config(name, settings, nats, worlds):
    return dict(arm=f"{name}-{nats}", seed=worlds.start, name=name, settings=settings, nats=nats,
                worlds=(worlds.start, worlds.stop), budget=BUDGET, beta=BETA, bound=BOUND)


def cost(found):
    "Mean log₂ of the samples; a run that found nothing counts twice the budget."
    return sum(math.log2(n or 2 * BUDGET) for n in found) / len(found)


def tuning(): return [search_config(name, s, 6, TUNING) for name, grid in GRIDS.items()
                      for s in grid]


def tested():
    "The arms with the settings that cost least on the tuning worlds."
    def tried(name, s): return cost(made(RUNS, search_config(name, s, 6, TUNING), search_cell))
    best = {name: min(grid, key=lambda s: tried(name, s)) for name, grid in GRIDS.items()}
    every = [(name, s, nats) for name, s in (best | {"best of n": {}}).items() for nats in RARITIES]
    every += [(name, s, 6) for name, s in FIXED.items() if s]
    return [search_config(name, s, nats, WORLDS) for name, s, nats in every]


# ------------------------------------------------------------ too few verdicts, two links

BETAS = torch.logspace(.8, -1.6, 22).tolist()
SPREAD, VERDICTS, MANY = 2., (100, 300, 1000), range(96)


def overfit_cell(c):
    "Reward gained and KL along β of both links, one world after the other."
    curves = []
    for seed in range(*c["worlds"]):
        wide = wide_world(seed=seed)
        own = World(wide.prompts, wide.replies, wide.prompt_p,
                    (c["spread"] * wide.ref_logps).log_softmax(-1), wide.rewards)
        pairs = sample_pairs(own, c["n"], torch.Generator().manual_seed(seed))
        wins = win_counts(pairs, 3, 40) + .01 * (1 - torch.eye(40, dtype=torch.float64))
        scores, start = fit_scores(wins), point_of(own, own.ref_logps).reward
        curves.append([[[at.kl, at.reward - start] for at in (
            point_of(own, policy(own.ref_logps, scores, b)) for b in c["betas"])]
            for policy in (optimal_policy, chi_policy)])
    return curves


def overfit():
    return [dict(arm=f"overfit-{n}", seed=0, n=n, spread=SPREAD, betas=BETAS,
                 worlds=(MANY.start, MANY.stop)) for n in VERDICTS]


def bands(r):
    "Mean over worlds and its interval, a row a β: KL, reward, low, high."
    return [[r[:, b, 0].mean().item(), r[:, b, 1].mean().item(), *bootstrap_interval(r[:, b, 1])]
            for b in range(r.shape[1])]


# ------------------------------------------------------------ claims

SEARCH = ("24 worlds of 16 replies, hidden reply at e^-6, β .25, at most 4,096 samples, "
          "tuned on 8 others")
OVER = "96 worlds, 3 prompts × 40 replies, 300 verdicts, exact policies of the same fitted scores"


def doublings(a, b):
    "log₂ of the samples of a over those of b, world by world; the censored stand at the budget."
    return [math.log2((x or BUDGET) / (y or BUDGET)) for x, y in zip(a, b)]


def search_claims(arms):
    by = {(a["name"], a["nats"]): a["found"] for a in arms}
    found = {name: ns for (name, nats), ns in by.items() if nats == 6}
    def a_nat(name): return [x / 4 for x in doublings(by[name, 8], by[name, 4])]
    def row(claim, source, paper, values, verdict, note):
        return claim_row(claim, source, paper, values, verdict, unit="world",
                         setup=f"{SEARCH}; {note}", seeds=len(values), command=COMMAND)
    def shares(name): return [x is not None for x in found[name]]
    unit, exact = "doublings of the samples, censored runs at the budget", "arXiv:2405.21046"
    xpo, online, ppo, best = (found[k] for k in ("XPO", "online DPO", "PPO", "best of n"))
    return [
        row("offline DPO on 64 pairs finds it in less than half of the worlds", exact,
            "never, without coverage", shares("offline DPO, 64 pairs"), below(.5),
            "share of worlds that found it"),
        row("online DPO finds it", "common", "yes", shares("online DPO"), above(.5),
            "share of worlds"),
        row("PPO with the true reward finds it", "common", "yes", shares("PPO"), above(.5),
            "share of worlds"),
        row("XPO finds it", exact, "yes, in polynomial time", shares("XPO"), above(.5),
            "share of worlds"),
        row("XPO needs fewer samples than online DPO", exact, "exponentially fewer",
            doublings(online, xpo), above(), unit),
        row("XPO needs fewer samples than PPO", "this page", "none", doublings(ppo, xpo), above(),
            unit),
        row("online DPO needs fewer samples than drawing from the reference", "common", "none",
            doublings(best, online), above(), unit),
        row("XPO needs fewer samples than drawing from the reference", exact, "none",
            doublings(best, xpo), above(), unit),
        row("PPO needs fewer samples than online DPO", "common", "none", doublings(online, ppo),
            above(), unit),
        row("a nat of rarity costs online DPO more than a quarter of a doubling", exact,
            "exponential", a_nat("online DPO"), above(.25), "doublings a nat, e^-4 to e^-8"),
        row("a nat of rarity costs XPO less than a quarter of a doubling", exact, "polynomial",
            a_nat("XPO"), below(.25), "doublings a nat, e^-4 to e^-8"),
    ]


def overfit_claims(reward):
    "reward: (worlds, link, β), of 300 verdicts."
    half = len(reward) // 2
    def row(claim, paper, values, verdict, note):
        return claim_row(claim, "arXiv:2407.13399", paper, values.tolist(), verdict,
                         unit="world", setup=f"{OVER}; {note}", seeds=len(values),
                         command=COMMAND)
    best = reward[:half].mean(0).argmax(-1)     # β of each link, chosen on the other half
    def fall(link): return reward[half:, link, best[link]] - reward[half:, link, -1]
    picked = reward[half:, 1, best[1]] - reward[half:, 0, best[0]]
    return [
        row("DPO loses reward beyond its best β", "yes", fall(0), above(),
            "reward lost at the smallest β, best β of the other half"),
        row("χPO loses less there than DPO", "yes", fall(0) - fall(1), above(), "difference"),
        row("χPO beats DPO at the smallest β", "yes", reward[:, 1, -1] - reward[:, 0, -1], above(),
            "difference in reward"),
        row("χPO beats DPO, each at its best β", "yes", picked, above(),
            "difference in reward, best β of the other half"),
    ]


def record(_):
    todo = tested()
    arms, tried = gathered(todo, RUNS), gathered(tuning(), RUNS)
    curves = {c["config"]["n"]: torch.tensor(c["values"]) for c in gathered(overfit(), RUNS)}
    seconds = seconds_of(arms + tried)
    kept = [dict(name=c["config"]["name"], nats=c["config"]["nats"], found=c["values"],
                 settings=c["config"]["settings"]) for c in arms]
    save_result("online_search", dict(budget=BUDGET, arms=kept, tried=[
        dict(name=c["config"]["name"], **c["config"]["settings"], cost=round(cost(c["values"]), 2))
        for c in tried]), command=COMMAND, seconds=seconds, seed=[WORLDS.start, WORLDS.stop],
        ran=ran(arms + tried),
        config=dict(beta=BETA, bound=BOUND, alpha=ALPHA, budget=BUDGET, rarities=RARITIES,
                    tuning=[TUNING.start, TUNING.stop]),
        what="Replies sampled until a policy gives the hidden best reply with probability 1/2.")
    save_result("online_overfit", dict(betas=BETAS, curves={
        n: {name: bands(r[:, i]) for i, name in enumerate(("DPO", "χPO"))}
        for n, r in curves.items()},
        rewards_300=[[[round(x, 4) for x in link] for link in world]
                     for world in curves[300][..., 1].tolist()]), command=COMMAND,
        seed=[MANY.start, MANY.stop], ran=ran(gathered(overfit(), RUNS)),
        seconds=seconds_of(gathered(overfit(), RUNS)),
        config=dict(spread=SPREAD, verdicts=VERDICTS, betas=BETAS, worlds=len(MANY)),
        what="True reward that DPO's and χPO's exact policies gain along β, from few verdicts.")


def judge():
    "Page, and its claims, from the committed records."
    search, over = (recorded(f"online_{part}")[0] for part in ("search", "overfit"))
    return "14_online", (search_claims(search["arms"])
                         + overfit_claims(torch.tensor(over["rewards_300"]).double()))


def main():
    args = options(__doc__).parse_args()
    torch.set_num_threads(1)
    def shown(values): return f"{sum(x is not None for x in values)} found"
    makers = {overfit: overfit_cell, tuning: search_cell, tested: search_cell}
    def run(_, minutes): # what is tested depends on what tuning found
        return sum(work(todo(), RUNS, make, shown, minutes) for todo, make in makers.items())
    return run_or_record(args, list, run, record, judge)


if __name__ == "__main__": sys.exit(main())
