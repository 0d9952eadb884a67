"""A policy with few weights: what DPO and AuxDPO keep of RLHF's gain. Page 15b.

    python benchmarks/misspecified.py
        all cells, one a β and seed; one that exists is not made again
    python benchmarks/misspecified.py --record
        gather the cells into nbs/results/ and judge the claims; refuses while one is missing
"""
import sys

import torch
from cells import (above, below, by_seed, claim_row, gathered, options, ran, recorded,
                   run_or_record, seconds_of, work)

from dpo_literate.frontier import point_of, wide_world
from dpo_literate.misspecified import (every_pair, first_step, fit_aux, fit_dpo, fit_rlhf,
                                       own_pairs, pairs_of, tilted)
from dpo_literate.results import mean_interval, repo_dir, save_result
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


def claims(found):
    "found: of every cell `beta`, `D`, and what it found, in the order of the worlds."
    def of(beta, features=D): return [c for c in found if (c["beta"], c["D"]) == (beta, features)]
    def row(claim, source, paper, values, verdict, note):
        setup = f"{len(values)} worlds of {K} replies, exact expectations; {note}"
        return claim_row(claim, source, paper, values, verdict, unit="world", setup=setup,
                         seeds=len(values), command=COMMAND)
    def minus(beta, a, b): return [c["share"][a] - c["share"][b] for c in of(beta)]
    every, drawn, own = "DPO, every pair", "DPO, the reference's", "DPO, its own pairs"
    some, source = f"{D} features", "arXiv:2510.20413"
    share = "difference in share of RLHF's gain"
    rows = [row("on a table DPO is RLHF, whatever is asked", "DPO, section 4", "equal",
                [c["lost"] for c in of(1., K - 1)],
                below(1e-6), f"{K - 1} features, β 1; largest missing share"),
            row("DPO can be worse than not training", source, "shown",
                [c["fell"] for c in of(1.)], above(),
                f"{some}, β 1, every pair; share of worlds, reward minus β KL"),
            row("pairs of the reference keep more than every pair", source,
                "depends on the pairs", minus(1., drawn, every), above(), f"{some}, β 1; {share}")]
    rows += [row(f"AuxDPO gains more than DPO, β {b:g}, {said}", source, "more",
                 minus(b, "AuxDPO", arm), above(), f"{some}; {share}")
             for b in (.5, 5.) for said, arm in (("every pair", every),
                                                 ("pairs of the reference", drawn))]
    return rows + [
        row("AuxDPO is RLHF's first step, whatever is asked", source, "to first order",
            [c["off"] for c in of(1.)], below(1e-4),
            f"{some}, β 1; largest difference of a weight"),
        *(row(f"DPO on its own pairs keeps RLHF's gain, β {b:g}", "(15b.2), (15b.3)",
              "to first order", [c["share"][own] for c in of(b)], above(.95),
              f"{some}; share of RLHF's gain") for b in (.5, 5.))]


def short(x): return float(f"{x:.4g}")


def kept(c):
    "What the record keeps of a cell."
    v = c["values"]
    return dict(beta=c["config"]["beta"], D=c["config"]["D"], off=short(max(v["moved"], v["step"])),
                share={k: short(x) for k, x in v["share"].items()},
                lost=short(max(abs(1 - x) for x in v["share"].values())),
                fell=v["share"]["DPO, every pair"] < 0,
                lower=v["reward"]["DPO, every pair"] < 0)


def record(_):
    cells = gathered(configs(), RUNS)
    rows = [summed(cells, b, arm) for b in BETAS for arm in cells[0]["values"]["share"]]
    save_result("misspecified", dict(rows=rows, cells=[kept(c) for c in cells]), command=COMMAND,
                seed=0, seconds=seconds_of(cells), ran=ran(cells),
                config=dict(betas=BETAS, K=K, D=D, worlds=WORLDS),
                what="Share of RLHF's gain kept by DPO and AuxDPO where replies share weights.")


def judge():
    "Page, and its claims, from the committed record."
    return "15b_misspecified", claims(recorded("misspecified")[0]["cells"])


def main():
    args = options(__doc__).parse_args()
    torch.set_num_threads(1)
    def shown(c): return " ".join(f"{k} {v:.2f}" for k, v in c["share"].items())
    def run(todo, minutes): return work(todo, RUNS, cell, shown, minutes)
    return run_or_record(args, configs, run, record, judge)


if __name__ == "__main__": sys.exit(main())
