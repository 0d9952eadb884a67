"""Reward models and the reward-KL frontier on the bundled model: every cell resumable, one file a cell.

    python benchmarks/frontier.py world                                  enumerable worlds: the claims of page 13, a minute
    python benchmarks/frontier.py text [--seeds 0 1 2] [--minutes 8]     controlled sentiment; cells that exist are not run again
    python benchmarks/frontier.py ppo [--minutes 8]                      one knob of PPO at a time, for page 12
    python benchmarks/frontier.py reward [--seeds 0] [--minutes 8]       reward model of hh-harmless; goes on where it stopped
    … --record                                                           gather the cells into nbs/results/; refuses while one is missing
"""
import argparse
import json
import math
import sys
import time
from dataclasses import asdict

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from dpo_literate.results import Refusal, data_dir, repo_dir, save_result, to_json, write_atomic
from dpo_literate.runs import digest

RUNS = repo_dir() / "runs" / "frontier"
RANK, TARGETS = 16, "all-linear"


def clock(path):
    "Seconds that earlier pieces of this cell took."
    return json.loads(path.read_text())["seconds"] if path.exists() else 0.


class StopAfter(TrainerCallback):
    "Save and stop when the time of this piece is over."
    def __init__(self, seconds): self.end, self.stopped = time.monotonic() + seconds, False
    def on_step_end(self, args, state, control, **_):
        if time.monotonic() > self.end and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.stopped = True


# ------------------------------------------------------------ the reward model on human verdicts

REWARD = dict(data="hh_harmless", rank=RANK, lr=4e-4, epochs=1, batch=8, max_tokens=256, centring=.01, dtype="bfloat16")


def short_rows(name, side, tokenizer, limit):
    "Pairs whose prompt and longer reply fit, and how many there were."
    from dpo_literate.preferences import load_preferences
    from dpo_literate.rows import encode_pairs
    rows, _ = encode_pairs(load_preferences(str(data_dir() / name), side), tokenizer, max_length=None, identical="drop")
    kept = [r for r in rows if len(r.prompt_ids) + max(len(r.chosen_ids), len(r.rejected_ids)) <= limit]
    return kept, len(rows)


def reward_cell(seed, minutes):
    "One seed of the reward model; None while it is not finished."
    from peft import LoraConfig

    from dpo_literate.models import load_tokenizer
    from dpo_literate.reward_model import RewardConfig, RewardTrainer, load_reward_model, pair_scores
    c = REWARD | dict(seed=seed)
    folder = RUNS / f"reward-{seed}-{digest(c)}"
    if (folder / "cell.json").exists(): return json.loads((folder / "cell.json").read_text())
    start, tokenizer = time.perf_counter(), load_tokenizer("bundled")
    (train, of), (test, of_test) = (short_rows(c["data"], side, tokenizer, c["max_tokens"]) for side in ("train", "test"))
    args = RewardConfig(str(folder), num_train_epochs=c["epochs"], learning_rate=c["lr"], per_device_train_batch_size=c["batch"], max_length=None, centring=c["centring"],
                        seed=seed, warmup_steps=10, lr_scheduler_type="cosine", logging_steps=5, save_strategy="no", save_total_limit=1, report_to=[], disable_tqdm=True)
    stop = StopAfter(60 * minutes)
    adapter = LoraConfig(r=c["rank"], lora_alpha=2 * c["rank"], target_modules=TARGETS, exclude_modules=["score"])
    trainer = RewardTrainer(load_reward_model("bundled", c["dtype"]), args, train, test, processing_class=tokenizer, peft_config=adapter, callbacks=[stop])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    spent = clock(folder / "clock.json") + time.perf_counter() - start
    if stop.stopped:
        write_atomic(folder / "clock.json", to_json(dict(seconds=spent)))
        return None
    chosen, rejected = pair_scores(trainer.model, trainer.eval_dataset, trainer.pieces, 8)
    log = [{k: round(float(h[k]), 4) for k in ("step", "loss", "scores/accuracies")} for h in trainer.state.log_history if "loss" in h]
    cell = dict(seed=seed, chosen=[round(x, 4) for x in chosen.tolist()], rejected=[round(x, 4) for x in rejected.tolist()], log=log, train_pairs=len(train), of=of, test_pairs=len(test), of_test=of_test,
                seconds=clock(folder / "clock.json") + time.perf_counter() - start)
    write_atomic(folder / "cell.json", to_json(cell))
    return cell


def reward(args):
    cells = [reward_cell(seed, args.minutes) for seed in args.seeds]
    if None in cells: return print("not finished: run again") or 3
    save_result("reward_hh", dict(cells=cells), command="python benchmarks/frontier.py reward --seeds " + " ".join(map(str, args.seeds)), config=REWARD, seed=args.seeds,
                seconds=sum(c["seconds"] for c in cells), what="Scores that a reward model of the bundled model gives the held-out pairs of hh-harmless.")


# ------------------------------------------------------------ enumerable worlds

PRICES, WORLDS, VERDICTS_N = (2., 1., .5, .3), 10, 500


def one_world(seed):
    "What each method gets in one random world, and the differences the claims are about."
    import torch

    from dpo_literate.frontier import best_of_n, point_of, shortfall, wide_world
    from dpo_literate.ppo import drawn_pairs, world_dpo, world_ppo
    from dpo_literate.reward import fit_scores, win_counts
    from dpo_literate.world import sample_pairs
    world = wide_world(seed=seed)
    pairs = sample_pairs(world, VERDICTS_N, torch.Generator().manual_seed(seed))
    wins = win_counts(pairs, 3, 40) + .01 * (1 - torch.eye(40, dtype=torch.float64))
    scores, every = fit_scores(wins), drawn_pairs(world)
    def lost(policies): return [shortfall(world, p) for p in policies]
    def reward(policies): return [point_of(world, p).reward for p in policies]
    dpo, learned = [world_dpo(world, wins, b) for b in PRICES], [world_ppo(world, scores, b, seed)[-1] for b in PRICES]
    true = [world_ppo(world, world.rewards, b, seed)[-1] for b in PRICES]
    return dict(seed=seed, dpo_exact=lost([world_dpo(world, every, b) for b in PRICES]), dpo=lost(dpo), ppo_learned=lost(learned), ppo_true=lost(true),
                best_of_n=lost([best_of_n(world, n) for n in (2, 4, 8, 16, 32)]), dpo_minus_ppo=[a - b for a, b in zip(reward(dpo), reward(learned))])


def world(args):
    import torch

    from dpo_literate.results import bootstrap_interval, save_claims
    start = time.perf_counter()
    found = [one_world(seed) for seed in range(WORLDS)]
    command = "python benchmarks/frontier.py world"
    save_result("frontier_worlds", dict(worlds=found), command=command, config=dict(prices=PRICES, verdicts=VERDICTS_N, replies=40, prompts=3), seed=list(range(WORLDS)),
                seconds=time.perf_counter() - start, what="Reward each method leaves lying below the exact frontier, in ten random worlds.")
    def over(value): return [value(f) for f in found]
    def row(claim, figure, values, verdict, scale=""):
        low, high = bootstrap_interval(values)
        return dict(claim=claim, source="arXiv:2305.18290, Fig. 2", paper_figure=figure, ours=torch.tensor(values).mean().item(), low=low, high=high, seeds=WORLDS, command=command,
                    setup=f"3 prompts × 40 replies, tables, {VERDICTS_N} verdicts, β {', '.join(map(str, PRICES))}; {scale}", verdict=verdict(low, high))
    def mean(x): return sum(x) / len(x)
    near = over(lambda f: max(f["dpo_exact"]))
    same, against = over(lambda f: mean(f["dpo_minus_ppo"])), over(lambda f: mean(f["ppo_true"]) - mean(f["dpo"]))
    rows = [row("DPO told every preference reaches the optimum's frontier", "none: the optimum is unknown on text", near, lambda lo, hi: "held" if hi < 1e-6 else "did not hold", "most reward left lying"),
            row("DPO gets more reward than PPO with a reward learned from the same pairs", "DPO above PPO at every KL", same, lambda lo, hi: "held" if lo > .01 else "did not hold" if hi < .01 else "too small to tell", "DPO − PPO, same β"),
            row("DPO gets more reward than PPO with the true reward", "DPO above PPO-GT at every KL", against, lambda lo, hi: "held" if lo > 0 else "did not hold" if hi < 0 else "too small to tell", "reward left lying, PPO − DPO")]
    save_claims("frontier", rows)
    for r in rows: print(f"{r['verdict']:18} {r['ours']:+.2g} [{r['low']:+.2g}, {r['high']:+.2g}]  {r['claim']}")


# ------------------------------------------------------------ controlled sentiment on the bundled model

def small(cell):
    "What a record keeps of a cell: prompt means, costs, and its curve."
    def means(k): return [round(sum(x) / len(x), 4) for x in cell[k]]
    kept = {k: cell[k] for k in ("method", "strength", "seed", "seconds", "memory", "sampled")} | {k: cell[k] for k in ("log", "accuracy", "tied") if k in cell}
    return kept | {k: means(k) for k in ("rewards", "kls") if k in cell and cell["method"] != "shared"}


def text(args):
    from dpo_literate.frontier import STRENGTHS, FrontierConfig, plan, run_jobs
    config = FrontierConfig()
    jobs = plan(config, args.seeds, args.methods or list(STRENGTHS), args.prompts, RUNS / "text")
    cells = run_jobs(jobs, 0 if args.record else args.minutes)
    if not args.record: return 0
    if len(cells) < len(jobs): raise Refusal(f"{len(jobs) - len(cells)} cells are missing, first {jobs[len(cells)]}: run it without --record")
    save_result("frontier_text", dict(cells=[small(c) for c in cells]), command="python benchmarks/frontier.py text --record", config=asdict(config), seed=args.seeds,
                seconds=sum(c["seconds"] for c in cells), what="True reward and exact KL of every method on held-out prompts, with seconds, memory and tokens sampled.")


# ------------------------------------------------------------ what PPO on text is sensitive to

# 32 prompts × 4 replies, prompts and seed that page 13 does not use for its claims; the first arm is the setting of page 13
BASE = dict(lr=5e-4, value_lr=1e-4, epochs=2)
ARMS = {"page 13": {}, "lr / 50": dict(lr=1e-5), "lr / 5": dict(lr=1e-4), "lr × 4": dict(lr=2e-3), "value lr × 10": dict(value_lr=1e-3), "value lr 0": dict(value_lr=0.),
        "one epoch": dict(epochs=1), "not whitened": dict(whiten=False)}
TUNING_SEED = 9


def sweep_jobs(arms):
    from dpo_literate.frontier import FrontierConfig, Job
    return [Job(FrontierConfig(n_train=32, batch_size=16, ppo=BASE | ARMS[arm]), "ppo_true", .02, TUNING_SEED, None, RUNS / "text") for arm in arms]


def ppo(args):
    from dpo_literate.frontier import run_jobs
    arms = args.arms or list(ARMS)
    cells = run_jobs(sweep_jobs(arms), 0 if args.record else args.minutes)
    if not args.record: return 0
    if len(cells) < len(arms): raise Refusal(f"{len(arms) - len(cells)} cells are missing, first {arms[len(cells)]}: run it without --record")
    save_result("ppo_text", dict(arms=[small(c) | dict(name=arm, settings=BASE | ARMS[arm]) for c, arm in zip(cells, arms)]), command="python benchmarks/frontier.py ppo --record",
                config=dict(base=BASE, arms=ARMS, prompts=32, replies=128, batch_size=16, kl_coef=.02), seed=TUNING_SEED, seconds=sum(c["seconds"] for c in cells),
                what="PPO with the true reward on the bundled model, one setting changed at a time.")


def main(argv=None):
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = top.add_subparsers(dest="what", required=True)
    kinds.add_parser("world").set_defaults(run=world)
    for name, run, seeds in (("text", text, [0, 1, 2]), ("ppo", ppo, [0]), ("reward", reward, [0])):
        p = kinds.add_parser(name)
        p.add_argument("--seeds", type=int, nargs="+", default=seeds)
        p.add_argument("--minutes", type=float, default=math.inf, help="after these no new cell is begun")
        if name != "reward": p.add_argument("--record", action="store_true", help="write nbs/results")
        if name == "ppo": p.add_argument("--arms", nargs="+", help="some of them")
        if name == "text":
            p.add_argument("--prompts", help="a text file, a prompt a line; those of page 11 by default")
            p.add_argument("--methods", nargs="+", help="some of best_of_n dpo sft unlikelihood ppo_true ppo_learned")
        p.set_defaults(run=run)
    args = top.parse_args(argv)
    try: return args.run(args)
    except Refusal as no: return print(no, file=sys.stderr) or no.code


if __name__ == "__main__": sys.exit(main())
