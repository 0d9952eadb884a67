"""Reward models and the reward-KL frontier on the bundled model: every cell resumable, one file a cell.

    python benchmarks/frontier.py world                                     enumerable worlds: the claims of page 13, a minute
    python benchmarks/frontier.py reward [--seeds 0 1 2] [--minutes 8]      hh-harmless reward model; goes on where it stopped
    python benchmarks/frontier.py text [--seeds 0 1 2] [--methods dpo …]    controlled sentiment; cells that exist are not run again
"""
import argparse
import json
import sys
import time
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from dpo_literate.results import data_dir, save_result, to_json, write_atomic

RUNS = Path(__file__).resolve().parent.parent / "runs" / "frontier"
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

REWARD = dict(data="hh_harmless", rank=RANK, lr=2e-4, epochs=1, batch=8, max_length=512, truncation="keep_end", centring=.01)


def reward_cell(seed, minutes):
    "One seed of the hh-harmless reward model; None while it is not finished."
    from peft import LoraConfig

    from dpo_literate.preferences import load_preferences
    from dpo_literate.reward_model import RewardConfig, RewardTrainer, pair_scores
    folder = RUNS / f"reward-{seed}"
    done = folder / "cell.json"
    if done.exists(): return json.loads(done.read_text())
    start, c = time.perf_counter(), REWARD
    args = RewardConfig(str(folder), num_train_epochs=c["epochs"], learning_rate=c["lr"], per_device_train_batch_size=c["batch"], max_length=c["max_length"],
                        truncation_mode=c["truncation"], centring=c["centring"], seed=seed, warmup_steps=10, logging_steps=5, save_strategy="no",
                        save_total_limit=1, report_to=[], disable_tqdm=True, per_device_eval_batch_size=8)
    stop = StopAfter(60 * minutes)
    where = str(data_dir() / c["data"])
    adapter = LoraConfig(r=c["rank"], lora_alpha=2 * c["rank"], target_modules=TARGETS, exclude_modules=["score"])
    trainer = RewardTrainer("bundled", args, load_preferences(where, "train"), load_preferences(where, "test"), peft_config=adapter, callbacks=[stop])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    spent = clock(folder / "clock.json") + time.perf_counter() - start
    if stop.stopped:
        write_atomic(folder / "clock.json", to_json(dict(seconds=spent)))
        return None
    chosen, rejected = pair_scores(trainer.model, trainer.eval_dataset, trainer.pieces, 8)
    log = [{k: round(float(h[k]), 4) for k in ("step", "loss", "scores/accuracies")} for h in trainer.state.log_history if "loss" in h]
    cell = dict(seed=seed, chosen=[round(x, 4) for x in chosen.tolist()], rejected=[round(x, 4) for x in rejected.tolist()], log=log,
                train_pairs=len(trainer.rows if hasattr(trainer, "rows") else trainer.train_dataset), counts=str(trainer.counts), seconds=clock(folder / "clock.json") + time.perf_counter() - start)
    write_atomic(done, to_json(cell))
    return cell


def reward(args):
    cells = [reward_cell(seed, args.minutes) for seed in args.seeds]
    if None in cells: return print("not finished: run again")
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

def text(args):
    from dpo_literate.frontier import main_frontier
    args.output = RUNS / "text"
    code = main_frontier(args)
    report = json.loads((args.output / "report.json").read_text())
    if not args.methods: save_result("frontier_text", report["values"], command="python benchmarks/frontier.py text --prompts FILE --seeds " + " ".join(map(str, args.seeds)),
                                     config=report["config"], seed=args.seeds, seconds=report["seconds"],
                                     what="True reward and exact KL of every method on held-out prompts, with seconds, memory and tokens sampled.")
    return code


def main(argv=None):
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = top.add_subparsers(dest="what", required=True)
    one = kinds.add_parser("reward")
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument("--minutes", type=float, default=8., help="of this piece")
    one.set_defaults(run=reward)
    kinds.add_parser("world").set_defaults(run=world)
    two = kinds.add_parser("text")
    two.add_argument("--prompts", required=True, help="a text file, a prompt a line")
    two.add_argument("--methods", nargs="+", help="some of dpo ppo_true ppo_learned sft unlikelihood best_of_n; all by default, and only all is recorded")
    two.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    two.set_defaults(run=text)
    args = top.parse_args(argv)
    return args.run(args)


if __name__ == "__main__": sys.exit(main())
