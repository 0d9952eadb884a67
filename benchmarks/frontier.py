"""Reward models and the reward-KL frontier on the bundled model: every cell resumable, one file a cell.

    python benchmarks/frontier.py reward [--seeds 0 1 2] [--minutes 8]      hh-harmless reward model; goes on where it stopped
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


def main(argv=None):
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = top.add_subparsers(dest="what", required=True)
    one = kinds.add_parser("reward")
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument("--minutes", type=float, default=8., help="of this piece")
    one.set_defaults(run=reward)
    args = top.parse_args(argv)
    return args.run(args)


if __name__ == "__main__": sys.exit(main())
