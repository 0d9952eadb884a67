"""Preferences for a one-step generator of small pictures: the recorded comparison of page 24a.

    python benchmarks/drpo.py [--seeds 0 1 2 3 4] [--minutes 40]
        train and measure, one small file a cell
    python benchmarks/drpo.py --record
        gather the cells into nbs/results/

A seed has a base generator of its own, trained first and kept under runs/drpo/; every arm of the
seed starts from it. The three encoders (features, reward, judge) are the same for all seeds. A
finished cell is not run again, so a stopped run goes on where it was; a cell made with other
settings is made anew. --record refuses while a cell is missing.
"""
import base64
import io
import statistics
import time
from dataclasses import asdict, replace
from functools import cache, partial

import torch
from cells import (above, below, by_seed, claim_row, gathered, options, ran, recorded,
                   run_or_record,
                   seconds_of, seeds_of, work)
from torch.utils.checkpoint import checkpoint

from dpo_literate.drpo import PUBLISHED
from dpo_literate.one_step import (Encoder, Scene, align, color_coverage, compressed_size,
                                   draw_prompts, drpo_loss, load_emoji, measure, new_source,
                                   raw_features, reward_gradient_loss, stage_features, train_base,
                                   train_encoder, word_logps, word_rank)
from dpo_literate.results import repo_dir, save_result
from dpo_literate.runs import digest

CELLS = repo_dir() / "runs" / "drpo"
ENCODERS = dict(features=dict(widths=(16, 32, 64), seed=100, steps=500),
                reward=dict(widths=(24, 32, 64), seed=101, steps=350),
                judge=dict(widths=(16, 48, 48), seed=102, steps=350))
BASE = dict(steps=200, P=6, K=12, lr=2e-3)
ALIGN = dict(steps=30, P=4, K=12)
MEASURED = 16  # samples a prompt
LR = {"drpo": 1e-3, "reward gradient": 1e-3, "score function": 1e-3, "dpo": 1e-3}
ARMS = {  # name -> method, and what differs from DrPO as its trainer has it
    "DrPO": dict(method="drpo"),
    "reward gradient": dict(method="reward gradient"),
    "score function": dict(method="score function"),
    "DPO": dict(method="dpo"),
    "DrPO, no reference": dict(method="drpo", lambda_ref=0.),
    "DrPO, reference 1": dict(method="drpo", lambda_ref=1.),
    "DrPO, pixels": dict(method="drpo", features="pixels"),
    "DrPO, weight 10": dict(method="drpo", weight=10.),
    "DrPO on size": dict(method="drpo", reward="size"),
    "DrPO, low floor, masked": dict(method="drpo", floor=1e-12, masked="all")}
SHOWN = ("DrPO", "reward gradient", "DrPO on size")
HEAVY = dict(widths=[(32, 64, 64), (192, 384, 384)], P=1, K=12)


FIRST = list(ARMS)[:7]  # made for all seeds before the others are begun


def configs(seeds):
    "The base of each seed, the clock, and the arms, the main ones first."
    shared = dict(encoders=ENCODERS, base=BASE, align=ALIGN, measured=MEASURED)
    bases = [dict(arm="base", seed=seed, encoders=ENCODERS, base=BASE, measured=MEASURED)
             for seed in seeds]
    arms = [dict(arm=name, seed=seed, lr=LR[how["method"]], how=how, **shared)
            for seed in seeds for name, how in ARMS.items()]
    early = [c for pair in zip(bases, ([a for a in arms if a["seed"] == seed and a["arm"] in FIRST]
                                       for seed in seeds)) for c in (pair[0], *pair[1])]
    clocks = [dict(arm="clock", seed=seed, heavy=HEAVY) for seed in seeds]
    late = [a for name in list(ARMS)[7:] for a in arms if a["arm"] == name]
    return early + clocks + late


@cache
def emoji(): return load_emoji()


@cache
def encoder(name):
    "One of the three, trained once and kept."
    how = ENCODERS[name]
    path = CELLS / f"encoder_{name}_{digest(how)}.pt"
    if path.is_file():
        found = Encoder(len(emoji().colors), len(emoji().groups), how["widths"])
        found.load_state_dict(torch.load(path, weights_only=True))
        return found.eval().requires_grad_(False)
    found = train_encoder(emoji(), how["steps"], widths=how["widths"], seed=how["seed"])
    torch.save(found.state_dict(), path)
    return found


@cache
def base_of(seed):
    "The generator that all arms of a seed start from."
    path = CELLS / f"base_{seed}_{digest([BASE, ENCODERS['features']])}.pt"
    made = dict(BASE, steps=0) if path.is_file() else BASE
    found = train_base(emoji(), encoder("features"), seed=seed, **made)
    if path.is_file(): found.load_state_dict(torch.load(path, weights_only=True))
    else: torch.save(found.state_dict(), path)
    return found


def rewards():
    "What can be asked for, and how it is judged."
    return dict(reward=partial(word_logps, encoder("reward")),
                judge=partial(word_logps, encoder("judge")),
                colour=lambda x, w: color_coverage(x, w, emoji().colors),
                size=lambda x, w: compressed_size(x),
                rank=partial(word_rank, encoder("reward")))


def features_of(kind):
    return raw_features if kind == "pixels" else partial(stage_features, encoder("features"))


def settings(how):
    "The trainer's settings for ViT-MAE features, and what the arm changes."
    found, changed = PUBLISHED["ViT-MAE"], {k: how[k] for k in ("floor",) if k in how}
    if "weight" in how: changed |= dict(positive=how["weight"], negative=how["weight"])
    preference = replace(found.preference, **changed, masked=how.get("masked", "own"))
    return replace(found, preference=preference, reference=replace(found.reference, **changed),
                   lambda_ref=how.get("lambda_ref", found.lambda_ref))


def scene_of(how, P, K):
    return Scene(emoji(), features_of(how.get("features", "encoder")),
                 rewards()[how.get("reward", "reward")], P, K, settings(how))


def gallery(policy, seed=7, samples=6):
    "Every sixth prompt, as a JPEG in base64."
    from PIL import Image
    prompts = emoji().prompts()[::6]
    z = torch.randn(len(prompts) * samples, policy.noise, generator=new_source(seed))
    with torch.no_grad(): x = policy(prompts.repeat_interleave(samples, 0), z)
    tiles = ((x + 1) * 127.5).round().byte().unflatten(0, (len(prompts), samples))
    sheet = tiles.permute(0, 3, 1, 4, 2).reshape(len(prompts) * 32, samples * 32, 3)
    file = io.BytesIO()
    Image.fromarray(sheet.numpy()).save(file, "JPEG", quality=88)
    return base64.b64encode(file.getvalue()).decode()


def arm(config):
    "One arm, from the base of its seed."
    seed, how = config["seed"], config.get("how")
    base = policy = base_of(seed)
    if how:
        scene = scene_of(how, config["align"]["P"], config["align"]["K"])
        policy = align(base, scene, how["method"], config["align"]["steps"], config["lr"], seed)
    found = measure(policy, base, emoji(), rewards(), encoder("judge"), MEASURED)
    if seed == 0 and config["arm"] in ("base", *SHOWN): found["gallery"] = gallery(policy)
    return found


class Heavy:
    "A large frozen reward, its backward with or without recomputing its forward."
    def __init__(self, widths, recompute):
        torch.manual_seed(0)
        born = Encoder(len(emoji().colors), len(emoji().groups), widths)
        self.net, self.recompute = born.eval().requires_grad_(False), recompute
        self.seconds = 0.

    def __call__(self, x, words):
        start = time.perf_counter()
        again = self.recompute and torch.is_grad_enabled()
        out = (checkpoint(word_logps, self.net, x, words, use_reentrant=False) if again
               else word_logps(self.net, x, words))
        self.seconds += time.perf_counter() - start
        return out


def one_update(loss_of, scene, policy, base, optimizer, asked, source):
    "Seconds of an update: forward without the reward, the reward's forward, backward, step."
    scene.reward.seconds, marks = 0., [time.perf_counter()]
    loss = loss_of(scene, policy, base, asked, source)
    marks.append(time.perf_counter())
    loss.backward()
    marks.append(time.perf_counter())
    optimizer.step(); optimizer.zero_grad()
    marks.append(time.perf_counter())
    forward, backward, step = (b - a for a, b in zip(marks, marks[1:]))
    return dict(forward=forward - scene.reward.seconds, reward=scene.reward.seconds,
                backward=backward, step=step)


def clock(config):
    "Both updates by turns on one generator, at two sizes of the reward."
    P, K, found = HEAVY["P"], HEAVY["K"], {}
    base, source = base_of(0), new_source(config["seed"])
    for widths in HEAVY["widths"]:
        for name, loss_of, again in (("DrPO", drpo_loss, False),
                                     ("gradient", reward_gradient_loss, False),
                                     ("gradient, recomputed", reward_gradient_loss, True)):
            scene = scene_of({}, P, K)._replace(reward=Heavy(widths, again))
            policy = train_base(emoji(), encoder("features"), steps=0)
            optimizer = torch.optim.AdamW(policy.parameters(), 1e-4)
            asked = draw_prompts(emoji().prompts(), P, K, policy.noise, source)
            turns = [one_update(loss_of, scene, policy, base, optimizer, asked, source)
                     for _ in range(4)][1:]
            found[f"{name} {widths[0]}"] = {k: statistics.median(t[k] for t in turns)
                                            for k in turns[0]}
    return found


def run(todo, minutes):
    CELLS.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    made = lambda config: clock(config) if config["arm"] == "clock" else arm(config)
    shown = lambda v: {k: round(x, 3) for k, x in v.items() if isinstance(x, float)}
    return work(todo, CELLS, made, shown, minutes)


def gap(cells, metric, one, other="base"):
    "Differences of two arms, paired by seed."
    return [a[metric] - b[metric]
            for a, b in zip(by_seed(cells, arm=one), by_seed(cells, arm=other))]


def ratio(cells, name, width):
    "Seconds of an update, over those of DrPO's, by turn."
    total = lambda c, key: sum(c[f"{key} {width}"].values())
    return [total(c, name) / total(c, "DrPO") for c in by_seed(cells, arm="clock")]


def claims(cells):
    "What the paper says, its figure, our values, and what would make it hold."
    widest, table = HEAVY["widths"][-1][0], "results, SD-Turbo, Pick-a-Pic"
    trained, ours = "trained reward (nat), {} minus {}", "this page"
    return [
        ("DrPO raises the reward it is trained on", table, "PickScore 21.88 → 23.49",
         trained.format("DrPO", "base"), gap(cells, "reward", "DrPO"), above()),
        ("DrPO raises a judge that it never saw", table, "Aesthetic 6.054 → 6.485",
         "judge (nat), DrPO minus base", gap(cells, "judge", "DrPO"), above()),
        ("DrPO beats one-step DPO", table, "23.49 against 22.02",
         trained.format("DrPO", "DPO"), gap(cells, "reward", "DrPO", "DPO"), above()),
        ("DrPO beats the score function", table, "23.49 against 21.98",
         trained.format("DrPO", "score function"),
         gap(cells, "reward", "DrPO", "score function"), above()),
        ("the reward's gradient has more of the trained reward", table, "24.69 against 23.49",
         trained.format("reward gradient", "DrPO"),
         gap(cells, "reward", "reward gradient", "DrPO"), above()),
        ("DrPO beats the reward's gradient before an independent judge",
         "Qwen3-VL, read off a figure", "win rate about 54.5 %",
         "judge (nat), DrPO minus reward gradient",
         gap(cells, "judge", "DrPO", "reward gradient"), above()),
        ("a tie of 1 keeps spread", "reference ablation", "CLIP 25.88 → 26.22",
         "spread, λ = 1 minus λ = 0",
         gap(cells, "spread", "DrPO, reference 1", "DrPO, no reference"), above()),
        ("a tie of 1 costs reward", "reference ablation", "PickScore 23.55 → 23.49",
         trained.format("λ = 1", "λ = 0"),
         gap(cells, "reward", "DrPO, reference 1", "DrPO, no reference"), below()),
        ("raw features fail", "feature ablation", "raw latent 20.52, latent-MAE 23.48",
         trained.format("encoder features", "pixels"),
         gap(cells, "reward", "DrPO", "DrPO, pixels"), above()),
        ("weights of 3000 beat weights of 10", "trainer against drift.py", None,
         trained.format("3000", "10"), gap(cells, "reward", "DrPO", "DrPO, weight 10"), above()),
        ("weights of 10 keep more spread", ours, None, "spread, 10 minus 3000",
         gap(cells, "spread", "DrPO, weight 10", "DrPO"), above()),
        ("the floor costs reward", ours, None,
         trained.format("low floor and masked copies", "as published"),
         gap(cells, "reward", "DrPO, low floor, masked", "DrPO"), above()),
        ("a reward without a gradient rises: compressed size", ours, None,
         "thousand bytes saved, DrPO minus base", gap(cells, "size", "DrPO on size"), above()),
        ("an update costs 3.5 × less than the reward's gradient", "cost of an update, HPSv3",
         "21.62 s against 6.17 s", f"seconds, ratio, reward of width {widest}",
         ratio(cells, "gradient", widest), above(3.5)),
        ("and 3.5 × less where the reward's forward is computed again", ours, None,
         f"seconds, ratio, reward of width {widest}",
         ratio(cells, "gradient, recomputed", widest), above(3.5))]


def row(cells, claim, source, paper, setup, values, verdict):
    if source != "this page": source = f"arXiv:2606.02521, {source}"
    return claim_row(claim, source, paper, values, verdict, setup=setup, seeds=seeds_of(cells),
                     command="python benchmarks/drpo.py --record")


def record(todo):
    "The numbers of each arm and seed, the gallery, the claims."
    cells = gathered(todo, CELLS)
    arms = ["base", *ARMS]
    plain = lambda v: {k: round(x, 4) for k, x in v.items() if k != "gallery"}
    values = {arm: [plain(v) for v in by_seed(cells, arm=arm)] for arm in arms}
    clocks = [{k: {part: round(s, 4) for part, s in v.items()} for k, v in c.items()}
              for c in by_seed(cells, arm="clock")]
    how = dict(command="python benchmarks/drpo.py --record", seed=seeds_of(cells),
               seconds=seconds_of(cells), ran=ran(cells))
    config = dict(encoders=ENCODERS, base=BASE, align=ALIGN, lr=LR, arms=ARMS, heavy=HEAVY,
                  measured=MEASURED, settings=asdict(PUBLISHED["ViT-MAE"]))
    save_result("drpo", dict(arms=values, clock=clocks), config=config, **how,
                what="DrPO and its rivals on a one-step generator of emoji32, by arm and seed.")
    pictures = {arm: by_seed(cells, arm=arm, seed=0)[0]["gallery"] for arm in ("base", *SHOWN)}
    save_result("drpo_gallery", pictures, config=config, **how | dict(seed=0),
                what="Samples of four arms for the same prompts and noise, JPEG in base64.")


def judge():
    "Page, and its claims, from the committed record."
    found, seeds = recorded("drpo")
    def told(arm, values): return [dict(config=dict(arm=arm, seed=s), values=v)
                                   for s, v in zip(seeds, values)]
    cells = told("clock", found["clock"])
    for arm, values in found["arms"].items(): cells += told(arm, values)
    return "24_drpo", [row(cells, *claim) for claim in claims(cells)]


if __name__ == "__main__":
    args = options(__doc__, seeds=list(range(5))).parse_args()
    raise SystemExit(run_or_record(args, lambda: configs(args.seeds), run, record, judge))
