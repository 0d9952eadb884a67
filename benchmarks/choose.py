"""Which method forgives its knobs: DPO and PPO with the same learning rates and batches. Page 16.

    python benchmarks/choose.py
        all cells; one that exists is not made again
    python benchmarks/choose.py --record
        gather the cells into nbs/results/ and judge the claims; refuses while one is missing
"""
import sys

import torch
from cells import (above, below, claim_row, gathered, options, ran, recorded, run_or_record,
                   seconds_of, work)

from dpo_literate.frontier import wide_world
from dpo_literate.online import TablePolicy, TableRow, table_step
from dpo_literate.ppo import world_ppo
from dpo_literate.results import repo_dir, save_result
from dpo_literate.reward import fit_scores, win_counts
from dpo_literate.world import objective, sample_pairs

RUNS = repo_dir() / "runs" / "choose"
COMMAND = "python benchmarks/choose.py --record"
BETA, VERDICTS, STEPS, SEEDS = .5, 500, 100, range(20)
RATES, BATCHES = (.01, .05, .2, .5, 1.), (16, 64, 256)


def by_dpo(world, pairs, scores, lr, batch, seed):
    "Minibatches of the verdicts through page 10's step."
    g, model = torch.Generator().manual_seed(seed), TablePolicy(world.ref_logps, bound=1e6)
    optimizer, step = torch.optim.Adam(model.parameters(), lr=lr), table_step(world, beta=BETA)
    rows = [TableRow(*row, row[2]) for row in zip(*(index.tolist() for index in pairs))]
    for t in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr * (1 - t / STEPS)     # as `world_ppo` does
        some = [rows[i] for i in torch.randint(len(rows), (batch,), generator=g).tolist()]
        micro, N = step.begin(model, [some])
        (step.loss(model, micro[0][0]) / N).backward()
        optimizer.step(); optimizer.zero_grad()
    return model().detach()


def by_ppo(world, pairs, scores, lr, batch, seed):
    "PPO on the scores fitted to the same verdicts."
    return world_ppo(world, scores, BETA, seed, STEPS, batch, lr=lr)[-1]


def by_true_ppo(world, pairs, scores, lr, batch, seed):
    "PPO on the true reward."
    return world_ppo(world, world.rewards, BETA, seed, STEPS, batch, lr=lr)[-1]


ARMS = {"DPO": by_dpo, "PPO, learned reward": by_ppo, "PPO, true reward": by_true_ppo}


def gain(c):
    "Objective above the reference's, at every learning rate and batch."
    world = wide_world(seed=c["seed"])
    pairs = sample_pairs(world, VERDICTS, torch.Generator().manual_seed(c["seed"]))
    wins = win_counts(pairs, 3, 40) + .01 * (1 - torch.eye(40, dtype=torch.float64))
    def J(lp): return objective(lp, world.ref_logps, world.rewards, BETA).mean().item()
    scores, start = fit_scores(wins), J(world.ref_logps)
    return [[J(ARMS[c["arm"]](world, pairs, scores, lr, n, c["seed"])) - start for n in BATCHES]
            for lr in RATES]


def todo():
    return [dict(arm=arm, seed=seed, rates=RATES, batches=BATCHES, steps=STEPS, beta=BETA,
                 verdicts=VERDICTS) for seed in SEEDS for arm in ARMS]


def record(configs):
    cells = gathered(configs, RUNS)
    by = {arm: torch.tensor([c["values"] for c in cells if c["config"]["arm"] == arm])
          for arm in ARMS}                                        # (seeds, rates, batches)
    under = {arm: (r < 0).double().mean((1, 2)) for arm, r in by.items()}
    best = {arm: r.mean(0).amax().item() for arm, r in by.items()}
    save_result("choose_knobs", dict(rates=RATES, batches=BATCHES, under={
        arm: x.tolist() for arm, x in under.items()}, best=best, mean={
        arm: r.mean(0).tolist() for arm, r in by.items()}), command=COMMAND, seed=list(SEEDS),
        ran=ran(cells), seconds=seconds_of(cells), config={k: v for k, v in configs[0].items()
                                                         if k not in ("arm", "seed")},
        what="Share of runs that end below the reference, over one grid of learning rates and "
             "batches.")
    print(best)


def judge():
    "Page, and its claims, from the committed record."
    found, seeds = recorded("choose_knobs")
    under = {arm: torch.tensor(x).double() for arm, x in found["under"].items()}
    setup = (f"20 worlds, 3 prompts × 40 replies, {VERDICTS} verdicts, β .5, 15 settings of "
             "learning rate and batch, 100 steps; ")
    def row(claim, values, verdict, note):
        return claim_row(claim, "common advice", "yes", values.tolist(), verdict, unit="world",
                         setup=setup + note, seeds=len(seeds), command=COMMAND)
    return "16_choose", [
        row("DPO seldom ends below the reference", under["DPO"], below(.1), "share of settings"),
        row("PPO on a learned reward ends below the reference more often than DPO",
            under["PPO, learned reward"] - under["DPO"], above(), "difference in share"),
        row("PPO on the true reward ends below the reference more often than DPO",
            under["PPO, true reward"] - under["DPO"], above(), "difference in share")]


def main():
    args = options(__doc__).parse_args()
    torch.set_num_threads(1)
    def shown(x): return f"{sum(v < 0 for r in x for v in r)} of 15 below"
    def run(cells, minutes): return work(cells, RUNS, gain, shown, minutes)
    return run_or_record(args, todo, run, record, judge)


if __name__ == "__main__": sys.exit(main())
