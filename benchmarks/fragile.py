"""Is PPO fragile? DPO and PPO on tables with the same knobs and two optimisers. Page 12a.

    python benchmarks/fragile.py [--minutes 8]
        all cells; one that exists is not made again
    python benchmarks/fragile.py --record
        gather the cells into nbs/results/ and judge the claims; refuses while one is missing

A cell is an arm, an optimiser and a batch; it holds the share of the possible gain that each run
reached, a row a world and a column a learning rate, null where the run broke. Its runs walk side
by side as one tensor: the steps are those of `world_ppo` and `walk_dpo`, table by table, which a
test checks.
"""
import sys
from statistics import fmean

import torch
from cells import (above, below, claim_row, gathered, options, ran, recorded, run_or_record,
                   seconds_of, work)

from dpo_literate.frontier import wide_world
from dpo_literate.losses import dpo_loss
from dpo_literate.ppo import policy_loss, value_loss
from dpo_literate.results import repo_dir, save_result
from dpo_literate.world import objective, optimal_policy

RUNS = repo_dir() / "runs" / "fragile"
COMMAND = "python benchmarks/fragile.py --record"
TUNING, WORLDS = range(900, 904), range(20)
# half decades; the rate of the values is fixed, so that only the policy's rate is a knob
OPTIMISERS = {"SGD": dict(rates=[10**(k / 2) for k in range(-2, 7)], value_lr=1.),
              "Adam": dict(rates=[10**(k / 2) for k in range(-6, 3)], value_lr=.05)}
SETTINGS, BATCHES = dict(beta=.5, steps=50, epochs=4), (32, 512)
ARMS = ("DPO", "PPO", "PPO, no clip")
ENOUGH = .9   # share of the gain that counts as found


def todo(worlds=WORLDS):
    return [dict(arm=f"{arm}-{name}-{batch}", seed=worlds.start, method=arm, optimiser=name,
                 batch=batch, worlds=[worlds.start, worlds.stop], **SETTINGS, **OPTIMISERS[name])
            for name in OPTIMISERS for arm in ARMS for batch in BATCHES]


# ------------------------------------------------------------ tables side by side: (R,S,N,K)

class Descent:
    "SGD or Adam, with a learning rate for each table."
    def __init__(self, p, adam): self.p, self.adam, self.t, self.m, self.v = p, adam, 0, 0., 0.

    def step(self, rate):
        g, self.t = self.p.grad, self.t + 1
        if self.adam:
            self.m, self.v = .9 * self.m + .1 * g, .999 * self.v + .001 * g * g
            size = (self.v / (1 - .999**self.t)).sqrt() + 1e-8
            g = self.m / (1 - .9**self.t) / size
        with torch.no_grad(): self.p -= rate * g
        self.p.grad = None


def of_prompt(tables, x):
    "Rows of the tables at the prompts x, (R,S,B,K)."
    return tables.gather(2, x[..., None].expand(*x.shape, tables.shape[-1]))


def prompts(shape, n, batch, g):
    "A prompt for each of the batch, of every table."
    even, rows = torch.full((n,), 1 / n, dtype=torch.float64), shape[0] * shape[1] * batch
    return torch.multinomial(even, rows, replacement=True, generator=g).view(*shape, batch)


def pick(logits, at): return logits.log_softmax(-1).flatten(2).gather(-1, at)


def ppo_walks(ref, rewards, c, g):
    "Steps of `world_ppo` in every table; log π at the end."
    (R, S, N, K), beta = ref.shape, c["beta"]
    logits, value = ref.clone().requires_grad_(), ref.new_zeros(R, S, N).requires_grad_()
    clip = 1e9 if c["method"] == "PPO, no clip" else .2
    walk, guesses = (Descent(p, c["optimiser"] == "Adam") for p in (logits, value))
    rate = torch.tensor(c["rates"], dtype=torch.float64).view(-1, 1, 1, 1)
    for step in range(c["steps"]):
        with torch.no_grad():
            x = prompts((R, S), N, c["batch"], g)
            rows = of_prompt(logits.softmax(-1), x).flatten(0, 2)
            at = x * K + torch.multinomial(rows, 1, generator=g).view(x.shape)
            old, guess = pick(logits, at), value.gather(-1, x)
            earned = (rewards.flatten(2).gather(-1, at)
                      - beta * (old - ref.flatten(2).gather(-1, at)))
            raw = earned - guess
            centred = raw - raw.mean(-1, keepdim=True)
            advantage = centred * (centred.square().mean(-1, keepdim=True) + 1e-8).rsqrt()
        for _ in range(c["epochs"]):
            loss = policy_loss(pick(logits, at), old, advantage, clip)
            loss = loss + value_loss(value.gather(-1, x), guess, earned, clip)
            loss.mean(-1).sum().backward()
            walk.step(rate * (1 - step / c["steps"])); guesses.step(c["value_lr"])
    return logits.detach().log_softmax(-1)


def dpo_walks(ref, rewards, c, g):
    "Steps of `walk_dpo` in every table; log π at the end."
    R, S, N, K = ref.shape
    logits = ref.clone().requires_grad_()
    walk = Descent(logits, c["optimiser"] == "Adam")
    rate = torch.tensor(c["rates"], dtype=torch.float64).view(-1, 1, 1, 1)
    for step in range(c["steps"]):
        x = prompts((R, S), N, c["batch"] // 2, g)
        rows = of_prompt(ref.exp(), x).flatten(0, 2)
        a, b = torch.multinomial(rows, 2, generator=g).view(*x.shape, 2).unbind(-1)
        said = torch.rand(x.shape, dtype=torch.float64, generator=g)
        better = [rewards.flatten(2).gather(-1, x * K + y) for y in (a, b)]
        first = said < (better[0] - better[1]).sigmoid()
        w, l = x * K + torch.where(first, a, b), x * K + torch.where(first, b, a)
        for _ in range(c["epochs"]):
            now = [pick(logits, at) for at in (w, l)]
            then = [ref.flatten(2).gather(-1, at) for at in (w, l)]
            dpo_loss(*now, *then, beta=c["beta"])[0].mean(-1).sum().backward()
            walk.step(rate * (1 - step / c["steps"]))
    return logits.detach().log_softmax(-1)


def cell(c):
    "Share of the possible gain, a row a world and a column a rate."
    worlds = [wide_world(seed=seed) for seed in range(*c["worlds"])]
    ref, r = (torch.stack(x) for x in zip(*((w.ref_logps, w.rewards) for w in worlds)))
    g = torch.Generator().manual_seed(c["seed"])
    wide = [t.expand(len(c["rates"]), *t.shape) for t in (ref, r)]
    end = (dpo_walks if c["method"] == "DPO" else ppo_walks)(*wide, c, g)
    def J(logps): return objective(logps, ref, r, c["beta"]).mean(-1)
    start, best = J(ref), J(optimal_policy(ref, r, c["beta"]))
    shares = ((J(end) - start) / (best - start)).T.tolist()
    return [[round(x, 4) if abs(x) < 1e9 else None for x in row] for row in shares]


# ------------------------------------------------------------ the record

def grids(cells, arm, name):
    "Of each world its runs, a row a rate and a column a batch."
    of = {c["config"]["batch"]: c["values"] for c in cells
          if (c["config"]["method"], c["config"]["optimiser"]) == (arm, name)}
    return [[list(row) for row in zip(*rows)] for rows in zip(*(of[b] for b in BATCHES))]


def tuned(cells, arm, name):
    "Rate and batch, as places in the grid, that gained most in the tuning worlds."
    found = grids(cells, arm, name)
    def mean(at): return fmean(-1. if g[at[0]][at[1]] is None else g[at[0]][at[1]] for g in found)
    return max(((i, j) for i in range(len(found[0])) for j in range(len(BATCHES))), key=mean)


def record(configs):
    cells, tried = gathered(configs, RUNS), gathered(todo(TUNING), RUNS)
    arms = {f"{arm}, {name}": dict(grids=grids(cells, arm, name), best=tuned(tried, arm, name))
            for name in OPTIMISERS for arm in ARMS}
    save_result("fragile", dict(arms=arms, rates={k: v["rates"] for k, v in OPTIMISERS.items()}),
                command=COMMAND, seed=list(WORLDS), seconds=seconds_of(cells + tried),
                config=SETTINGS | dict(batches=BATCHES, optimisers=OPTIMISERS, tuning=list(TUNING)),
                ran=ran(cells + tried),
                what="Share of the possible gain that DPO and PPO reach on tables, over the same "
                     "learning rates and batches, with SGD and with Adam.")


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
    def shown(shares): return f"{under(shares):.2f} of the runs below"
    def run(_, minutes): return work(todo(TUNING) + todo(), RUNS, cell, shown, minutes)
    return run_or_record(args, todo, run, record, judge)


if __name__ == "__main__": sys.exit(main())
