"""Rewards at the end of a corridor: four methods against its length and luck. Page 15a.

    python benchmarks/sparse.py
        all cells; one that exists is not made again. Learning rates are chosen on other corridors
    python benchmarks/sparse.py --record
        gather the cells into nbs/results/ and judge the claims; refuses while one is missing
"""
import math
import sys

import torch
from cells import (above, below, claim_row, gathered, made, options, ran, recorded,
                   run_or_record, seconds_of,
                   work)

from dpo_literate.results import repo_dir, save_result
from dpo_literate.sparse import RULES, train_corridors

RUNS = repo_dir() / "runs" / "sparse"
COMMAND = "python benchmarks/sparse.py --record"
BUDGET, LENGTHS, LUCK, RATES = 16_384, (2, 4, 6, 8, 10, 12), (1., .3, .1), (.1, .2, .4, .8, 1.6)


def search(c):
    return train_corridors(RULES[c["name"]], c["L"], c["p"], N=c["n"], budget=BUDGET, lr=c["lr"],
                           seed=c["seed"])


def config(name, L, p, lr, n, seed):
    return dict(arm=f"{name}-{L}-{p}-{lr}", name=name, L=L, p=p, lr=lr, n=n, seed=seed,
                budget=BUDGET)


def cost(found):
    "Mean log₂ of the walks; a run that found nothing counts twice the budget."
    return sum(math.log2(n or 2 * BUDGET) for n in found) / len(found)


def tuning(): return [config(name, 6, .3, lr, 8, 1000) for name in RULES for lr in RATES]


def tested():
    "Every length and luck with the rate that cost least at six places, p = 0.3."
    best = {name: min(RATES, key=lambda lr: cost(
        made(RUNS, config(name, 6, .3, lr, 8, 1000), search))) for name in RULES}
    return [config(name, L, p, best[name], 24, 0) for name in RULES for L in LENGTHS for p in LUCK]


def doublings(a, b):
    "log₂ of the walks of a over those of b; run by run, the censored stand at the budget."
    return [math.log2((x or BUDGET) / (y or BUDGET)) for x, y in zip(a, b)]


def claims(by):
    "by: (name, L, p) -> walks until found."
    def row(claim, source, paper, values, verdict, note):
        return claim_row(claim, source, paper, values, verdict, unit="corridor",
                         seeds=len(values), command=COMMAND,
                         setup=f"24 corridors, rates tuned on 8 others; {note}")
    def at(name, L=8, p=.3): return by[name, L, p]
    unit = "doublings of the walks at L = 8, p = 0.3"
    growth = [x / 4 for x in doublings(at("GRPO", 10), at("GRPO", 6))]
    steps = [x / 4 for x in doublings(at("step-wise DPO", 10), at("step-wise DPO", 6))]
    def lost(name): return [float(n is None) for n in at(name, 12, .1)]
    return [
        row("PPO finds it in fewer walks than DPO on trajectories", "common advice",
            "PPO for sparse rewards", doublings(at("trajectory DPO"), at("PPO")), above(), unit),
        row("GRPO finds it in fewer walks than DPO on trajectories", "common", "none",
            doublings(at("trajectory DPO"), at("GRPO")), above(), unit),
        row("GRPO finds it in fewer walks than PPO", "common", "none",
            doublings(at("PPO"), at("GRPO")), above(), unit),
        row("step-wise DPO finds it in fewer walks than DPO on trajectories", "arXiv:2406.18629",
            "yes", doublings(at("trajectory DPO"), at("step-wise DPO")), above(), unit),
        row("each further place costs GRPO more than a quarter of a doubling", "(15a.1)",
            "1 doubling", growth, above(.25), "doublings a place, L = 6 to 10, p = 0.3"),
        row("each further place costs step-wise DPO less than a quarter of a doubling",
            "arXiv:2406.18629", "none", steps, below(.25), "doublings a place, the same"),
        row("DPO on trajectories stops before PPO does", "common advice", "yes",
            [a - b for a, b in zip(lost("trajectory DPO"), lost("PPO"))], above(),
            "difference in the share not found at L = 12, p = 0.1, within 16,384 walks"),
    ]


def record(_):
    arms = gathered(tested(), RUNS)
    kept = [dict({k: c["config"][k] for k in ("name", "L", "p", "lr")}, found=c["values"])
            for c in arms]
    save_result("sparse_corridors", dict(budget=BUDGET, arms=kept), command=COMMAND, seed=[0, 1000],
                ran=ran(arms),
                seconds=seconds_of(arms + gathered(tuning(), RUNS)),
                config=dict(lengths=LENGTHS, luck=LUCK, rates=RATES, budget=BUDGET),
                what="Walks until half of them get through a corridor that pays at its end.")


def judge():
    "Page, and its claims, from the committed record."
    arms = recorded("sparse_corridors")[0]["arms"]
    return "15a_sparse", claims({(a["name"], a["L"], a["p"]): a["found"] for a in arms})


def main():
    args = options(__doc__).parse_args()
    torch.set_num_threads(1)
    def shown(found): return f"{sum(n is not None for n in found)} found"
    def run(_, minutes): # what is tested depends on what tuning found
        return sum(work(todo(), RUNS, search, shown, minutes) for todo in (tuning, tested))
    return run_or_record(args, list, run, record, judge)


if __name__ == "__main__": sys.exit(main())
