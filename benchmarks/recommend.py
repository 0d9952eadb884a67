"""AMRS on songs and films: world models, copycat, DPO, baselines. The recorded run of page 25a.

    python benchmarks/recommend.py [--seeds 0 1 ...] [--minutes 8] [--films FOLDER]
        one small file a cell; FOLDER holds ml-100k.inter of the recbole wheel
    python benchmarks/recommend.py --record
        gather the cells into nbs/results/

A cell is one leg with one seed, kept under runs/recommend/. Leg "songs": real songs, simulated
listeners, true utility known. Leg "world": the same log, a world model that knows songs by their
features alone; added when leg "songs" showed the other one too weak. Leg "films":
MovieLens-100k, two stars or fewer are a dislike. The films are read
where they lie and never copied here.
"""
import sys

import torch
from cells import (above, by_seed, claim_row, gathered, mean_of, options, ran, recorded,
                   run_or_record, seconds_of, seeds_of, work)
from torch.nn.functional import one_hot

from dpo_literate.recommend import (SIGNALS, Picker, Plays, WorldModel, copy_loss, correction_pairs,
                                    draw_listeners, feedback_loss, fit, greedy_policy, improve,
                                    last_values, music_songs, play, policy_of, production_policy,
                                    r_squared, utility_weights)
from dpo_literate.recommend_eval import (HOSTILE, doubly_robust, effective_size, factor_policy,
                                         fixed_policy, hostile, implicit_factors,
                                         popularity_scores, rating_features, read_log, snips,
                                         variety)
from dpo_literate.results import repo_dir, results_dir, save_result

COMMAND = "python benchmarks/recommend.py --films FOLDER --record"
CELLS = repo_dir() / "runs" / "recommend"
SEEDS = list(range(8))                 # settings were tried on seed 100, which is left out
BETAS = (.1, .3, 1., 3.)
SETTINGS = {
    "songs": dict(listeners=500, plays=25, lean=4., part=200, heard=5, sessions=10,
                  world_epochs=20, copy_epochs=12, betas=BETAS, beta=.3),
    "films": dict(plays=15, part=377, judged=100, world_epochs=12, copy_epochs=6,
                  betas=(.3,), beta=.3, rivals=("random", "popularity", "BPR", "ALS")),
    "world": dict(listeners=500, plays=25, lean=4., part=400, world_epochs=20)}


WHAT = {"songs": "Policies over real songs for simulated listeners, by true utility.",
        "world": "A world model that knows songs by their features alone: R² held out.",
        "films": "Policies over films for held-out users, by a second model and by estimators."}


def config_of(leg, seed): return dict(arm=leg, seed=seed, **SETTINGS[leg])


def world_of(features, plays, seed, c, **how):
    torch.manual_seed(seed)
    model = WorldModel(features, **how)
    return fit(model, feedback_loss, plays, c["world_epochs"], seed=seed)


@torch.no_grad()
def explained(world, held, mean):
    "R² of a world model and of the two plain guesses, signal by signal."
    guesses = dict(world=world(held).sigmoid(), last=last_values(held, mean),
                   mean=mean.expand_as(held.signals))
    there = [k for k in range(len(SIGNALS)) if not held.signals[..., k].isnan().all()]
    return {name: {SIGNALS[k]: r_squared(g[..., k], held.signals[..., k]) for k in there}
            for name, g in guesses.items()}


def learned(features, both, world, weights, seed, c):
    "The copycat, and what DPO makes of it at every β."
    torch.manual_seed(seed + 1000)
    copycat = fit(Picker(features), copy_loss, both, c["copy_epochs"], seed=seed)
    rows = correction_pairs(world, both, weights, seed=seed)
    tuned = {f"DPO {b:g}": improve(copycat, rows, beta=b, seed=seed) for b in c["betas"]}
    return len(rows), {"copycat": copycat, **tuned}


def policies(both, n, seed, pickers, world, weights):
    "Everybody who picks, by name; those of implicit only where it is installed."
    factors = {k.upper(): implicit_factors(k, both, n, seed) for k in ("bpr", "als")}
    return {"random": fixed_policy(torch.zeros(n)),
            "popularity": fixed_policy(popularity_scores(both, n)),
            **{k: factor_policy(f) for k, f in factors.items() if f is not None},
            **{k: policy_of(p) for k, p in pickers.items()},
            "greedy": greedy_policy(world, weights)}


# ------------------------------------------------------------ leg a

def songs_cell(c):
    "Real songs, simulated listeners."
    seed, weights = c["seed"], utility_weights(valence=.5, arousal=.5)
    songs = music_songs(seed)
    people = draw_listeners(songs, c["listeners"], seed)
    log, _ = play(production_policy(songs, seed, c["lean"]), songs, people,
                  c["plays"], seed)
    one, two, held = log[:c["part"]], log[c["part"]:2 * c["part"]], log[2 * c["part"]:]
    both, mean = log[:2 * c["part"]], one.signals.mean((0, 1))
    world, judge = (world_of(songs.features, p, seed + k, c) for p, k in ((one, 0), (two, 500)))
    placed = world_of(songs.features, one, seed, c, positions=True)
    deaf = world_of(songs.features, one, seed, c, feedback=False)
    pairs, pickers = learned(songs.features, both, world, weights, seed, c)
    who = policies(both, len(songs), seed, pickers, world, weights)
    who["production"] = production_policy(songs, seed, c["lean"])
    return dict(pairs=pairs, r2=explained(world, held, mean),
                r2_positions=explained(placed, held, mean)["world"],
                r2_deaf=explained(deaf, held, mean)["world"],
                policies={k: session(p, songs, c, weights, world, judge, log)
                          for k, p in who.items()},
                hostile=misled(held, world, judge, weights))


@torch.no_grad()
def session(policy, songs, c, weights, world, judge, log):
    "True and predicted utility, and variety, of a policy with newcomers."
    seed = c["seed"] + 10_000
    people = draw_listeners(songs, 100, seed)
    production = production_policy(songs, c["seed"], c["lean"])
    heard, _ = play(production, songs, people, c["heard"], seed)
    heard, means = play(policy, songs, people, c["sessions"], seed, heard)
    new = slice(c["heard"], None)
    def said(model): return (model(heard).sigmoid() @ weights)[:, new].mean().item()
    return dict(true=(means @ weights).mean().item(), liked=means[..., 1].mean().item(),
                trained_on=said(world), judge=said(judge),
                **variety(heard.items[:, new], songs.features, log.items))


@torch.no_grad()
def misled(held, world, judge, weights):
    "How far the two world models are apart about what the first likes best."
    def gap(plays):
        end = torch.arange(len(plays)), plays.lengths
        mine, other = (m.logits(m.encoder(plays)[end]).sigmoid() @ weights for m in (world, judge))
        best = mine.argmax(-1, keepdim=True)
        return (mine - other).gather(1, best).mean().item()
    return dict(as_logged=gap(held), **{kind: gap(hostile(held, kind)) for kind in HOSTILE})


def world_cell(c):
    "Songs are known by their features alone, and all training listeners are used."
    seed, songs = c["seed"], music_songs(c["seed"])
    people = draw_listeners(songs, c["listeners"], seed)
    log, _ = play(production_policy(songs, seed, c["lean"]), songs, people, c["plays"], seed)
    train, held = log[:c["part"]], log[c["part"]:]
    torch.manual_seed(seed)
    world = WorldModel(songs.features)
    world.encoder.own.weight.requires_grad_(False).zero_()
    fit(world, feedback_loss, train, c["world_epochs"], seed=seed)
    return dict(r2=explained(world, held, train.signals.mean((0, 1))))


# ------------------------------------------------------------ leg b

def films_cell(c, path):
    "MovieLens-100k: real ratings, no truth, so two judges that were not trained on."
    seed, weights = c["seed"], utility_weights(rating=1.)
    log, _, items = read_log(path, longest=c["plays"])
    order = torch.randperm(len(log), generator=torch.Generator().manual_seed(seed))
    one, two, held = (log[who] for who in order.split(c["part"]))
    both = log[order[:2 * c["part"]]]
    features = rating_features(both, len(items), seed=seed)
    world, judge = (world_of(features, p, seed + k, c) for p, k in ((one, 0), (two, 500)))
    pairs, pickers = learned(features, both, world, weights, seed, c)
    pickers = step_rivals(both, len(items), seed) | pickers
    mean = one.signals.nanmean((0, 1)).nan_to_num(.5)
    return dict(pairs=pairs, r2=explained(world, held, mean),
                policies=logged_values(pickers, held[:c["judged"]], world, judge))


def step_rivals(both, n, seed):
    "Who else picks, before every play and after the last: plays -> log-probabilities, (U, T+1, N)."
    def each(policy):
        def steps(plays):
            upto = [Plays(plays.items[:, :t + 1], plays.signals[:, :t + 1])
                    for t in range(plays.items.shape[1] + 1)]
            return torch.stack([policy(p) for p in upto], 1)
        return steps
    factors = {k: implicit_factors(k.lower(), both, n, seed) for k in ("BPR", "ALS")}
    return {"random": each(fixed_policy(torch.zeros(n))),
            "popularity": each(fixed_policy(popularity_scores(both, n))),
            **{k: each(factor_policy(f)) for k, f in factors.items() if f is not None}}


def logged_values(pickers, held, world, judge, size=5):
    "What the two models and two estimators say of policies on held-out users."
    parts = [logged_part(pickers, held[k:k + size], world, judge)
             for k in range(0, len(held), size)]
    return {name: summary(*map(torch.cat, zip(*(p[name] for p in parts)))) for name in parts[0]}


def summary(w, r, said, mine, value, probs):
    "The numbers of a policy; where it never picks what was logged there is no SNIPS."
    return dict(trained_on=mine.mean().item(), judge=value.mean().item(),
                snips=snips(w, r).item() if w.sum() else None,
                dr=doubly_robust(w, r, said, value).item(),
                ess=effective_size(w) / len(w) if w.sum() else 0.,
                entropy=torch.special.entr(probs.double().mean(0)).sum().item())


@torch.no_grad()
def logged_part(pickers, plays, world, judge):
    "Of some users' plays, for each policy: weights, ratings, expectations, pick probabilities."
    there = plays.items >= 0
    mine, other = (m.logits(m.encoder(plays)[:, :-1][there])[..., 1].sigmoid()
                   for m in (world, judge))                                  # (n, N)
    logps = {k: p(plays)[:, :-1][there].log_softmax(-1) for k, p in pickers.items()}
    logps["greedy"] = one_hot(mine.argmax(-1), mine.shape[-1]).float().log()
    at, r = plays.items[there][:, None], plays.signals[..., 1][there]
    def logged(x): return x.gather(1, at)[:, 0]
    return {k: (logged(x - logps["copycat"]).exp().clamp(max=50.), r, logged(other),
                (x.exp() * mine).sum(1), (x.exp() * other).sum(1), x.exp())
            for k, x in logps.items()}


# ------------------------------------------------------------ the record

def minus(a, b): return [x - y for x, y in zip(a, b)]


def gathered_leg(cells, leg):
    "Every number of a leg with its interval."
    some = by_seed(cells, arm=leg)
    def walk(parts):
        if isinstance(parts[0], dict): return {k: walk([p[k] for p in parts]) for k in parts[0]}
        return mean_of(parts) if None not in parts else None
    said = ("r2", "r2_positions", "r2_deaf", "policies")
    return walk(some) | dict(by_seed=[{k: shortened(v[k]) for k in said if k in v} for v in some])


def shortened(value):
    "Numbers to six digits, the shape as it is."
    if isinstance(value, dict): return {k: shortened(v) for k, v in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def claims(legs, seeds_of_leg):
    "Rows of the claims table; leg -> the values of its seeds, and the seeds."
    a, w, b = (legs.get(leg, []) for leg in ("songs", "world", "films"))
    def got(leg, policy, key): return [v["policies"][policy][key] for v in leg]
    def r2(leg, signal, who="world"): return [v["r2"][who][signal] for v in leg]
    dpo, s = f"DPO {SETTINGS['songs']['beta']:g}", "arXiv:2605.28810"
    setup_a = "767 songs of PMEmo, 500 simulated listeners of 25 plays, 100 newcomers of 10"
    setup_w = "the same songs and log, 400 listeners to learn from, 100 held out"
    setup_b = "MovieLens-100k, first 15 ratings of 943 users, 100 held out"
    def greedy_gap(key): return minus(got(a, "greedy", key), got(a, dpo, key))
    rows = [
        ("valence: R² of the world model minus that of the last value", "R² 0.426", setup_a,
         minus(r2(a, "valence"), r2(a, "valence", "last")), above()),
        ("arousal: R² of the world model minus that of the last value", "R² 0.379", setup_a,
         minus(r2(a, "arousal"), r2(a, "arousal", "last")), above()),
        ("no positions is the better world model (R² of valence, without minus with)",
         "no positions best", setup_a,
         minus(r2(a, "valence"), [v["r2_positions"]["valence"] for v in a]), above()),
        ("feedback is essential (R² of valence, with minus without)", "essential", setup_a,
         minus(r2(a, "valence"), [v["r2_deaf"]["valence"] for v in a]), above()),
        ("true utility: DPO minus copycat", "+0.04 valence, +0.037 arousal of their own, predicted",
         setup_a, minus(got(a, dpo, "true"), got(a, "copycat", "true")), above()),
        ("entropy of picks: DPO above 80 % of the copycat's (ratio)", "close to copycat", setup_a,
         [x / y for x, y in zip(got(a, dpo, "entropy"), got(a, "copycat", "entropy"))],
         above(.8)),
        ("predicted utility: greedy minus DPO", "greedy highest", setup_a,
         greedy_gap("trained_on"), above()),
        ("true utility: DPO minus greedy", None, setup_a,
         minus(got(a, dpo, "true"), got(a, "greedy", "true")), above()),
        ("Gini: greedy minus DPO", "greedy collapses", setup_a, greedy_gap("gini"), above()),
        ("optimism about greedy: predicted by the model trained on, minus true", None, setup_a,
         minus(got(a, "greedy", "trained_on"), got(a, "greedy", "true")), above())]
    if w: rows += [
        (f"{k}: R² of the features-only world model minus that of the last value", paper, setup_w,
         minus(r2(w, k), r2(w, k, "last")), above())
        for k, paper in (("valence", "R² 0.426"), ("arousal", "R² 0.379"))]
    if b: rows += [
        ("rating: R² of the world model minus that of the last value", None, setup_b,
         minus(r2(b, "rating"), r2(b, "rating", "last")), above()),
        ("rating: R² of the world model minus that of the mean", None, setup_b,
         minus(r2(b, "rating"), r2(b, "rating", "mean")), above()),
        ("rating by the second world model: DPO minus copycat", None, setup_b,
         minus(got(b, dpo, "judge"), got(b, "copycat", "judge")), above()),
        ("rating by SNIPS: DPO minus copycat", None, setup_b,
         minus(got(b, dpo, "snips"), got(b, "copycat", "snips")), above()),
        ("rating by DR: DPO minus copycat", None, setup_b,
         minus(got(b, dpo, "dr"), got(b, "copycat", "dr")), above()),
        ("optimism about greedy: the model trained on, minus the second one", None, setup_b,
         minus(got(b, "greedy", "trained_on"), got(b, "greedy", "judge")), above())]
    seeds = {setup: seeds_of_leg.get(leg)
             for setup, leg in ((setup_a, "songs"), (setup_w, "world"), (setup_b, "films"))}
    return [claim_row(claim, s, paper, values, verdict, setup=setup, seeds=seeds[setup],
                      command=COMMAND) for claim, paper, setup, values, verdict in rows]


def record(todo):
    "Gather what is there into nbs/results, a file a leg."
    cells = gathered(todo, CELLS)
    for leg in SETTINGS:
        some = [c for c in cells if c["config"]["arm"] == leg]
        if some:
            save_result(f"recommend_{leg}", gathered_leg(some, leg), command=COMMAND,
                        config=SETTINGS[leg], seed=seeds_of(some), seconds=seconds_of(some),
                        ran=ran(some), what=WHAT[leg])


def judge():
    "Page, and its claims, from the committed records."
    legs = [leg for leg in SETTINGS if (results_dir() / f"recommend_{leg}.json").is_file()]
    found = {leg: recorded(f"recommend_{leg}") for leg in legs}
    return "25_recommend", claims({leg: record["by_seed"] for leg, (record, _) in found.items()},
                                  {leg: seeds for leg, (_, seeds) in found.items()})


def shown(values):
    "A line of the log."
    if "policies" not in values: return {k: round(v["valence"], 3) for k, v in values["r2"].items()}
    key = "true" if "true" in values["policies"]["copycat"] else "judge"
    return {k: round(v[key], 3) for k, v in values["policies"].items()}


def main(argv=None):
    parser = options(__doc__, SEEDS)
    parser.add_argument("--legs", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--films", default="ml-100k", help="folder of ml-100k.inter")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    def cell(c):
        if c["arm"] == "songs": return songs_cell(c)
        if c["arm"] == "world": return world_cell(c)
        return films_cell(c, f"{args.films}/ml-100k.inter")
    def configs(): return [config_of(leg, seed) for leg in args.legs for seed in args.seeds]
    def run(todo, minutes): return work(todo, CELLS, cell, shown, minutes)
    return run_or_record(args, configs, run, record, judge)


if __name__ == "__main__": sys.exit(main())
