"""A policy with few weights: what DPO and AuxDPO keep of RLHF's gain. Page 15b.

    python benchmarks/misspecified.py
        all cells, one a β and seed; one that exists is not made again
    python benchmarks/misspecified.py --record
        gather the cells into nbs/results/ and judge the claims; refuses while one is missing
"""
import sys

import torch
from cells import (above, below, by_seed, claim_row, gathered, options, run_or_record,
                   seconds_of, told, work)

from dpo_literate.frontier import point_of, wide_world
from dpo_literate.misspecified import (every_pair, first_step, fit_aux, fit_dpo, fit_rlhf,
                                       own_pairs, pairs_of, tilted)
from dpo_literate.results import mean_interval, repo_dir, save_claims, save_result
from dpo_literate.world import objective

RUNS = repo_dir() / "runs" / "misspecified"
COMMAND = "python benchmarks/misspecified.py --record"
BETAS, WORLDS, K, D = (.5, 1., 2., 5.), 48, 16, 4


def config(beta, seed, D=D): return dict(arm=f"{beta:g}-{D}", seed=seed, beta=beta, K=K, D=D)


def cell(c):
    "Share of RLHF's gain that each arm keeps, and its change of the mean reward."
    world = wide_world(1, c["K"], c["seed"])
    g = torch.Generator().manual_seed(10_000 + c["seed"])
    features = torch.randn(1, c["K"], c["D"], generator=g, dtype=torch.float64)
    beta, drawn = c["beta"], pairs_of(world, world.ref_logps)
    found = {"RLHF": fit_rlhf(world, features, beta),
             "DPO, every pair": fit_dpo(world, features, beta, every_pair(world)),
             "DPO, the reference's": fit_dpo(world, features, beta, drawn),
             "DPO, its own pairs": own_pairs(world, features, beta),
             "AuxDPO": fit_aux(world, features, beta, every_pair(world))}
    def J(lp): return objective(lp, world.ref_logps, world.rewards, beta).item()
    start, ends = J(world.ref_logps), {k: tilted(world, features, t) for k, t in found.items()}
    gain = J(ends["RLHF"]) - start
    before = point_of(world, world.ref_logps).reward
    aux = fit_aux(world, features, beta, drawn)
    return dict(share={k: (J(lp) - start) / gain for k, lp in ends.items() if k != "RLHF"},
                reward={k: point_of(world, lp).reward - before for k, lp in ends.items()},
                moved=(aux - found["AuxDPO"]).abs().max().item(),
                step=(first_step(world, features, beta) - found["AuxDPO"]).abs().max().item())


def configs():
    return [config(b, s) for b in BETAS for s in range(WORLDS)] + \
           [config(1., s, K - 1) for s in range(24)]


def summed(cells, beta, arm):
    values = [c["share"][arm] for c in by_seed(cells, arm=f"{beta:g}-{D}")]
    low, high = mean_interval(values)
    return dict(beta=beta, arm=arm, share=sum(values) / len(values), low=low, high=high,
                under=sum(v < 0 for v in values), worlds=len(values))


def claims(cells):
    def of(beta, D=D): return by_seed(cells, arm=f"{beta:g}-{D}")
    def row(claim, source, paper, values, verdict, note):
        return claim_row(claim, source, paper, values, verdict, seeds=len(values), command=COMMAND,
                         setup=f"{len(values)} worlds of {K} replies, exact expectations; {note}")
    def minus(beta, a, b): return [c["share"][a] - c["share"][b] for c in of(beta)]
    def fell(beta, arm): return [float(c["reward"][arm] < 0) for c in of(beta)]
    table = [max(abs(1 - s) for s in c["share"].values()) for c in of(1., K - 1)]
    some, source = f"{D} features", "arXiv:2510.20413"
    every, own = "DPO, every pair", "DPO, its own pairs"
    share = "difference in share of RLHF's gain"
    rows = [row("on a table DPO is RLHF, whatever is asked", "DPO, section 4", "equal", table,
                below(1e-6), f"{K - 1} features, β 1; largest missing share"),
            row("DPO can lower the reward of the reference", source, "shown", fell(1., every),
                above(), f"{some}, β 1, every pair; share of worlds"),
            row("pairs of the reference keep more than every pair", source, "depends on the pairs",
                minus(1., "DPO, the reference's", every), above(), f"{some}, β 1; {share}")]
    rows += [row(f"AuxDPO gains more than DPO, β {b:g}, {said}", source, "more",
                 minus(b, "AuxDPO", arm), above(), f"{some}; {share}")
             for b in (.5, 5.) for said, arm in
             (("every pair", every), ("pairs of the reference", "DPO, the reference's"))]
    return rows + [
        row("AuxDPO is RLHF's first step, whatever is asked", source, "to first order",
            [max(c["moved"], c["step"]) for c in of(1.)], below(1e-4),
            f"{some}, β 1; largest difference of a weight"),
        row("DPO on its own pairs keeps RLHF's gain at β 5", "page 15b", "to first order",
            [c["share"][own] for c in of(5.)], above(.95), f"{some}; share of RLHF's gain")]


def record(_):
    cells = gathered(configs(), RUNS)
    arms = list(cells[0]["share"])
    rows = [summed(cells, b, arm) for b in BETAS for arm in arms]
    save_result("misspecified", dict(rows=rows), command=COMMAND, seed=0,
                seconds=seconds_of(cells), config=dict(betas=BETAS, K=K, D=D, worlds=WORLDS),
                what="Share of RLHF's gain kept by DPO and AuxDPO where replies share weights.")
    save_claims("15b_misspecified", found := claims(cells))
    told(found)


def main():
    args = options(__doc__).parse_args()
    torch.set_num_threads(1)
    def shown(c): return " ".join(f"{k} {v:.2f}" for k, v in c["share"].items())
    def run(todo, minutes): return work(todo, RUNS, cell, shown, minutes)
    return run_or_record(args, configs, run, record)


if __name__ == "__main__": sys.exit(main())
