"""Is PPO fragile? DPO and PPO on tables with the same knobs and two optimisers. Page 12a.

    python benchmarks/fragile.py [--minutes 8]
        all cells; one that exists is not made again
    python benchmarks/fragile.py --record
        gather the cells into nbs/results/ and judge the claims; refuses while one is missing

A cell is an arm, an optimiser and a world; it holds the share of the possible gain that each of
its runs reached, a row a learning rate and a column a batch, null where the run broke.
"""
import sys
from statistics import fmean

import torch
from cells import (above, below, by_seed, claim_row, gathered, options, ran, recorded,
                   run_or_record, seconds_of, told, work)

from dpo_literate.frontier import wide_world
from dpo_literate.ppo import walk_dpo, world_ppo
from dpo_literate.results import repo_dir, save_claims, save_result
from dpo_literate.world import objective, optimal_policy

RUNS = repo_dir() / "runs" / "fragile"
COMMAND = "python benchmarks/fragile.py --record"
TUNING, WORLDS = range(900, 904), range(20)
# half decades; the rate of the values is fixed, so that only the policy's rate is a knob
OPTIMISERS = {"SGD": dict(rates=[10**(k / 2) for k in range(-2, 7)], value_lr=1.),
              "Adam": dict(rates=[10**(k / 2) for k in range(-6, 3)], value_lr=.05)}
SETTINGS = dict(beta=.5, steps=50, epochs=4, batches=[32, 512])
ARMS = ("DPO", "PPO", "PPO, no clip")
ENOUGH = .9   # share of the gain that counts as found


def todo(worlds=WORLDS):
    "Arms of one world after the other."
    return [dict(arm=arm, optimiser=name, seed=seed, **SETTINGS, **OPTIMISERS[name])
            for seed in worlds for name in OPTIMISERS for arm in ARMS]


def walk(c, world, lr, batch):
    "One run; its last policy."
    how = dict(steps=c["steps"], epochs=c["epochs"], batch=batch, lr=lr,
               optimizer=getattr(torch.optim, c["optimiser"]))
    if c["arm"] != "DPO":
        how |= dict(value_lr=c["value_lr"], clip=.2 if c["arm"] == "PPO" else 1e9)
    maker = walk_dpo if c["arm"] == "DPO" else world_ppo
    return maker(world, world.rewards, c["beta"], c["seed"], **how)[-1]


def cell(c):
    "Share of the possible gain, a row a rate."
    world = wide_world(seed=c["seed"])
    ref, r = world.ref_logps, world.rewards
    def J(logps): return objective(logps, ref, r, c["beta"]).mean().item()
    start, best = J(ref), J(optimal_policy(ref, r, c["beta"]))
    def share(lr, batch):
        try: return round((J(walk(c, world, lr, batch)) - start) / (best - start), 4)
        except RuntimeError: return None   # its probabilities were no longer numbers
    return [[share(lr, batch) for batch in c["batches"]] for lr in c["rates"]]


def tuned(cells, arm, optimiser):
    "Rate and batch, as places in the grid, that gained most in the tuning worlds."
    grids = by_seed(cells, arm=arm, optimiser=optimiser)
    def mean(i, j): return fmean(-1. if g[i][j] is None else g[i][j] for g in grids)
    return max(((i, j) for i in range(len(grids[0])) for j in range(len(grids[0][0]))),
               key=lambda at: mean(*at))


# ------------------------------------------------------------ the record

def record(configs):
    cells, tried = gathered(configs, RUNS), gathered(todo(TUNING), RUNS)
    arms = {f"{arm}, {name}": dict(grids=by_seed(cells, arm=arm, optimiser=name),
                                   best=tuned(tried, arm, name))
            for name in OPTIMISERS for arm in ARMS}
    save_result("fragile", dict(arms=arms, rates={k: v["rates"] for k, v in OPTIMISERS.items()}),
                command=COMMAND, config=SETTINGS | dict(optimisers=OPTIMISERS, tuning=list(TUNING)),
                seed=list(WORLDS), seconds=seconds_of(cells + tried), ran=ran(cells + tried),
                what="Share of the possible gain that DPO and PPO reach on tables, over the same "
                     "learning rates and batches, with SGD and with Adam.")
    save_claims(*judge())


def under(grid):
    "Share of the runs that broke or ended below the reference."
    runs = [x for row in grid for x in row]
    return fmean(float(x is None or x < 0) for x in runs)


def room(grid):
    "Decades of the learning rate at which a run finds enough, mean over the batches."
    columns = list(zip(*grid))
    return fmean(.5 * sum(x is not None and x >= ENOUGH for x in column) for column in columns)


def judge():
    "Page, and its claims, from the committed record."
    found, seeds = recorded("fragile")
    return "12a_ppo", claims(found["arms"], seeds)


def claims(arms, seeds):
    "Differences in the same worlds."
    setup = (f"{len(seeds)} worlds of 3 prompts × 40 replies, β .5, 50 batches used four times, "
             "nine rates × two batches; ")
    def each(arm, name, measure): return [measure(g) for g in arms[f"{arm}, {name}"]["grids"]]
    def minus(a, b, name, measure):
        return [x - y for x, y in zip(each(a, name, measure), each(b, name, measure))]
    def best(arm, name):
        i, j = arms[f"{arm}, {name}"]["best"]
        return [g[i][j] or 0. for g in arms[f"{arm}, {name}"]["grids"]]
    def row(claim, values, bar, note):
        return claim_row(claim, "common advice", "PPO is fragile, DPO is not", values, bar,
                         unit="world", setup=setup + note, seeds=seeds, command=COMMAND)
    rows = []
    for name in OPTIMISERS:
        rows += [
            row(f"PPO ends below the reference more often than DPO, {name}",
                minus("PPO", "DPO", name, under), above(), "share of runs, PPO − DPO"),
            row(f"DPO finds 90 % of the gain over a wider range of rates than PPO, {name}",
                minus("DPO", "PPO", name, room), above(), "decades, DPO − PPO"),
            row(f"the clip keeps PPO from ending below the reference, {name}",
                minus("PPO, no clip", "PPO", name, under), above(),
                "share of runs, without − with"),
            row(f"each at its best setting, DPO gains as much as PPO (less than .02 below), {name}",
                [a - b for a, b in zip(best("DPO", name), best("PPO", name))], above(-.02),
                "share of the gain, settings chosen in four other worlds")]
    return rows + [row("DPO seldom ends below the reference (in less than one run of ten), SGD",
                       each("DPO", "SGD", under), below(.1), "share of runs")]


def main():
    args = options(__doc__).parse_args()
    torch.set_num_threads(1)
    def shown(grid): return f"{under(grid):.2f} below, {room(grid):.2f} decades"
    def run(_, minutes): return work(todo(TUNING) + todo(), RUNS, cell, shown, minutes)
    code = run_or_record(args, todo, run, record, judge)
    if args.record or args.judge: told(judge()[1])
    return code


if __name__ == "__main__": sys.exit(main())
