"""Reward models and the reward-KL frontier on the bundled model: one file a cell, all resumable.

    python benchmarks/frontier.py world
        enumerable worlds: the claims of page 13, a minute
    python benchmarks/frontier.py text [--seeds 0 1 2] [--minutes 8]
        controlled sentiment; cells that exist are not run again
    python benchmarks/frontier.py ppo [--minutes 8]
        one knob of PPO at a time, for page 12b
    python benchmarks/frontier.py reward [--seeds 0] [--minutes 8]
        reward model of hh-harmless, on halves; goes on where it stopped
    … --record
        gather the cells into nbs/results/; refuses while one is missing
"""
import argparse
import json
import math
import sys
import time
from dataclasses import asdict

from cells import above, below, claim_row, publish, recorded
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from dpo_literate.results import (
    Refusal,
    data_dir,
    repo_dir,
    save_result,
    to_json,
    write_atomic,
)
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

REWARD = dict(
    data="hh_harmless",
    dtype="float32",
    rank=RANK,
    lr=3e-4,
    epochs=1,
    batch=4,
    warmup=10,
    centring=0.01,
)


def halves(name, tokenizer):
    "All pairs of a data set in two halves that share no prompt."
    import torch

    from dpo_literate.reading import load_preferences
    from dpo_literate.rows import encode_pairs

    if data_dir() is None:
        raise Refusal(f"no data: set DPO_LITERATE_DATA to the folder that holds {name}")
    pairs = [
        p for side in ("train", "test") for p in load_preferences(str(data_dir() / name), side)
    ]
    rows, _ = encode_pairs(pairs, tokenizer, max_length=None, identical="drop")
    prompts = list(dict.fromkeys(tuple(r.prompt_ids) for r in rows))
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    first = {prompts[i] for i in order[::2]}
    return [[r for r in rows if (tuple(r.prompt_ids) in first) == side] for side in (True, False)]


def reward_trainer(c, folder, stop):
    "A reward model about to learn one half and be judged on the other."
    from peft import LoraConfig

    from dpo_literate.models import load_tokenizer
    from dpo_literate.reward_model import RewardConfig, RewardTrainer, load_reward_model
    tokenizer = load_tokenizer("bundled")
    both = halves(c["data"], tokenizer)
    args = RewardConfig(
        str(folder),
        num_train_epochs=c["epochs"],
        learning_rate=c["lr"],
        per_device_train_batch_size=c["batch"],
        max_length=None,
        centring=c["centring"],
        seed=c["seed"],
        warmup_steps=c["warmup"],
        lr_scheduler_type="cosine",
        logging_steps=5,
        save_strategy="no",
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
    )
    adapter = LoraConfig(
        r=c["rank"], lora_alpha=2 * c["rank"], target_modules=TARGETS, exclude_modules=["score"]
    )
    return RewardTrainer(
        load_reward_model("bundled", c["dtype"]),
        args,
        both[c["fold"]],
        both[1 - c["fold"]],
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[stop],
    )


def reward_cell(seed, fold, minutes):
    "A reward model of one half; None while it is not finished."
    from dpo_literate.reward_model import pair_scores
    c = REWARD | dict(seed=seed, fold=fold)
    folder = RUNS / f"reward-{fold}-{seed}-{digest(c)}"
    if (folder / "cell.json").exists(): return json.loads((folder / "cell.json").read_text())
    start, stop = time.perf_counter(), StopAfter(60 * minutes)
    trainer = reward_trainer(c, folder, stop)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    def spent(): return clock(folder / "clock.json") + time.perf_counter() - start
    if stop.stopped:
        write_atomic(folder / "clock.json", to_json(dict(seconds=spent())))
        return None
    chosen, rejected = pair_scores(trainer.model, trainer.eval_dataset, trainer.pieces, 8)
    log = [
        {k: round(float(h[k]), 4) for k in ("step", "loss", "scores/accuracies")}
        for h in trainer.state.log_history
        if "loss" in h
    ]
    def rounded(x): return [round(v, 4) for v in x.tolist()]

    cell = dict(
        seed=seed,
        fold=fold,
        chosen=rounded(chosen),
        rejected=rounded(rejected),
        log=log,
        train_pairs=len(trainer.train_dataset),
        seconds=spent(),
    )
    write_atomic(folder / "cell.json", to_json(cell))
    return cell


def reward(args):
    "Every pair is judged by the model that has not read it."
    from dpo_literate.models import load_tokenizer
    end, cells = time.monotonic() + 60 * args.minutes, []
    for seed, fold in ((s, f) for s in args.seeds for f in (0, 1)):
        cells.append(reward_cell(seed, fold, (end - time.monotonic()) / 60))
        if cells[-1] is None:
            return print(f"seed {seed} half {fold} is not finished: run again") or 3
        right = [(a > b) + (a == b) / 2 for a, b in zip(cells[-1]["chosen"], cells[-1]["rejected"])]
        print(
            f"seed {seed} half {fold}: {sum(right) / len(right):.3f} of {len(right)} "
            f"held-out pairs, {cells[-1]['seconds']:.0f} s",
            flush=True,
        )
    if not args.record: return 0
    both = halves(REWARD["data"], load_tokenizer("bundled"))
    for c in cells:
        c["lengths"] = [[len(r.chosen_ids), len(r.rejected_ids)] for r in both[1 - c["fold"]]]
    save_result(
        "reward_hh",
        dict(cells=cells),
        command="python benchmarks/frontier.py reward --record",
        config=REWARD,
        seed=args.seeds,
        seconds=sum(c["seconds"] for c in cells),
        what="Scores that reward models of the bundled model give the half of hh-harmless that "
        "they have not read, and the lengths of the replies (tokens).",
    )


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

    dpo, learned = (
        [world_dpo(world, wins, b) for b in PRICES],
        [world_ppo(world, scores, b, seed)[-1] for b in PRICES],
    )
    true = [world_ppo(world, world.rewards, b, seed)[-1] for b in PRICES]
    return dict(
        seed=seed,
        dpo_exact=lost([world_dpo(world, every, b) for b in PRICES]),
        dpo=lost(dpo),
        ppo_learned=lost(learned),
        ppo_true=lost(true),
        best_of_n=lost([best_of_n(world, n) for n in (2, 4, 8, 16, 32)]),
        dpo_minus_ppo=[a - b for a, b in zip(reward(dpo), reward(learned))],
    )


def world(args):
    start = time.perf_counter()
    found = [one_world(seed) for seed in range(WORLDS)]
    command = "python benchmarks/frontier.py world"
    save_result(
        "frontier_worlds",
        dict(worlds=found),
        command=command,
        config=dict(prices=PRICES, verdicts=VERDICTS_N, replies=40, prompts=3),
        seed=list(range(WORLDS)),
        seconds=time.perf_counter() - start,
        what="Reward each method leaves lying below the exact frontier, in ten random worlds.",
    )
    publish(judge_worlds)


def judge_worlds():
    "Page, and its claims, from the committed record."
    found, seeds = recorded("frontier_worlds")
    def over(value): return [value(f) for f in found["worlds"]]
    def mean(x): return sum(x) / len(x)
    def row(claim, figure, values, bar, scale):
        return claim_row(
            claim, "arXiv:2305.18290, Fig. 2", figure, values, bar, unit="world", seeds=seeds,
            command="python benchmarks/frontier.py world",
            setup=f"3 prompts × 40 replies, tables, {VERDICTS_N} verdicts, "
                  f"β {', '.join(map(str, PRICES))}; {scale}")
    return "frontier", [
        row("DPO told every preference reaches the optimum's frontier",
            "none: the optimum is unknown on text", over(lambda f: max(f["dpo_exact"])),
            below(1e-6), "most reward left lying"),
        row("DPO gets more reward than PPO with a reward learned from the same pairs",
            "DPO above PPO at every KL", over(lambda f: mean(f["dpo_minus_ppo"])), above(.01),
            "DPO − PPO, same β"),
        row("DPO gets more reward than PPO with the true reward", "DPO above PPO-GT at every KL",
            over(lambda f: mean(f["ppo_true"]) - mean(f["dpo"])), above(),
            "reward left lying, PPO − DPO")]


# ------------------------------------------------------------ controlled sentiment

def small(cell):
    "What a record keeps of a cell: prompt means, costs, its curve, and two replies to look at."
    from dpo_literate.frontier import by_prompt

    kept = {
        k: cell[k]
        for k in ("method", "strength", "seed", "sampled", "accuracy", "tied")
        if k in cell
    }
    if "texts" in cell: kept["texts"] = cell["texts"][:2]
    kept |= {k: round(cell[k], 3) for k in ("seconds", "memory")}
    if "log" in cell:
        kept["log"] = (
            {k: [h[k] for h in cell["log"]] for k in cell["log"][0]}
            if isinstance(cell["log"][0], dict)
            else cell["log"]
        )
    return kept | {
        k: [round(x, 4) for x in by_prompt(cell, k).tolist()]
        for k in ("rewards", "kls")
        if "kls" in cell
    }


# ------------------------------------------------------------ what PPO on text is sensitive to

# of a seed whose cells no claim uses; the arm that scored most goes to page 13
BASE = dict(lr=2e-4, value_lr=1e-4, epochs=2)
ARMS = {
    "base": {},
    "lr 1e-5": dict(lr=1e-5),
    "lr 5e-5": dict(lr=5e-5),
    "lr 5e-4": dict(lr=5e-4),
    "value lr 1e-3": dict(value_lr=1e-3),
    "value lr 0": dict(value_lr=0.0),
    "λ = 1": dict(lam=1.0),
    "not whitened": dict(whiten=False),
}
TUNING_SEED, KL_COEF, PROMPTS, BATCH = 9, .02, 32, 16     # 32 prompts × 4 replies, in steps of 16


def sweep_jobs(arms):
    from dpo_literate.frontier_cells import FrontierConfig, Job

    return [
        Job(
            FrontierConfig(n_train=PROMPTS, batch_size=BATCH, ppo=BASE | ARMS[arm]),
            "ppo_true",
            KL_COEF,
            TUNING_SEED,
            None,
            RUNS / "text",
        )
        for arm in arms
    ]


def late_score(cell):
    "Mean score of the second half of the batches, all on training prompts."
    half = [h["score"] for h in cell["log"]][len(cell["log"]) // 2:]
    return sum(half) / len(half)


def ppo(args):
    "One setting changed at a time."
    from dpo_literate.frontier_cells import run_jobs
    arms = args.arms or list(ARMS)
    cells = run_jobs(sweep_jobs(arms), 0 if args.record else args.minutes)
    if len(cells) < len(arms):
        return (
            print(
                f"{len(arms) - len(cells)} arms are missing, first {arms[len(cells)]!r}: "
                "run it again, without --record"
            )
            or 3
        )
    for arm, c in zip(arms, cells):
        print(
            f"{arm:16} score {c['log'][0]['score']:.3f} at first, "
            f"{late_score(c):.3f} in the second half"
        )
    if not args.record: return 0
    save_result(
        "ppo_text",
        dict(
            arms=[
                small(c) | dict(name=arm, settings=BASE | ARMS[arm]) for arm, c in zip(arms, cells)
            ]
        ),
        command="python benchmarks/frontier.py ppo --record",
        config=dict(
            base=BASE,
            arms=ARMS,
            prompts=PROMPTS,
            replies=4 * PROMPTS,
            batch_size=BATCH,
            kl_coef=KL_COEF,
        ),
        seed=TUNING_SEED,
        seconds=sum(c["seconds"] for c in cells),
        what="PPO with the true reward on the bundled model, one setting changed at a time.",
    )


# ------------------------------------------------------------ the frontier

def tuned(args):
    "The experiment with the sweep's best settings; None while the sweep is not finished."
    from dpo_literate.frontier_cells import FrontierConfig, run_jobs
    cells = run_jobs(sweep_jobs(ARMS), 0 if args.record else args.minutes)
    if len(cells) < len(ARMS): return None
    best = max(zip(ARMS, cells), key=lambda x: late_score(x[1]))[0]
    print(f"PPO as in the arm {best!r}", flush=True)
    return FrontierConfig(n_train=PROMPTS, batch_size=BATCH, ppo=BASE | ARMS[best])


def text_claims(cells, seeds, setup):
    "The paper's claims about the frontier; prompts are asked of every seed, so both are units."
    from dpo_literate.frontier import lead, whole_cost
    def row(claim, figure, values, bar, what, items=None):
        return claim_row(claim, "arXiv:2305.18290, §6.1 and Fig. 2", figure, values, bar,
                         items=items, seeds=seeds, setup=f"{setup}; {what}",
                         command="python benchmarks/frontier.py text --record")
    names = dict(ppo_learned="PPO with a learned reward", ppo_true="PPO with the true reward",
                 sft="SFT on chosen", unlikelihood="unlikelihood")
    rows = []
    for rival, name in names.items():
        of_seed = [lead([c for c in cells if c["seed"] == s], rival).mean().item() for s in seeds]
        rows.append(row(f"DPO gets more reward than {name} at equal KL", "DPO above at every KL",
                        of_seed, above(), "DPO − rival, over 32 held-out prompts",
                        lead(cells, rival).tolist()))
    def cost(method, seed, k):
        found = [whole_cost(c, cells)[k] for c in cells
                 if c["method"] == method and c["seed"] == seed]
        return sum(found) / len(found)
    times = [cost("ppo_learned", s, "seconds") / cost("dpo", s, "seconds") for s in seeds]
    extra = [cost("ppo_learned", s, "memory") - cost("dpo", s, "memory") for s in seeds]
    return rows + [
        row("DPO takes fewer seconds than PPO with a learned reward", "none: called lightweight",
            times, above(1.), "PPO / DPO, sampling and reward model included"),
        row("DPO takes less memory than PPO with a learned reward",
            "none: no reward model in memory", extra, above(), "PPO − DPO (GB), peak of a process")]


def judge_text():
    "Page, and its claims, from the committed record."
    found, seeds = recorded("frontier_text")
    config = found["_provenance"]["config"]
    setup = (f"SmolLM2-135M-Instruct, LoRA, VADER, {config['n_train'] * config['per_prompt']} "
             f"replies of at most {config['max_new_tokens']} tokens a method and seed")
    return "frontier_text", text_claims(found["cells"], seeds, setup)


def text(args):
    "Reward against KL; the record and its claims where asked for."
    from dpo_literate.frontier_cells import STRENGTHS, FrontierConfig, plan, run_jobs
    methods, start = args.methods or list(STRENGTHS), time.monotonic()
    config = (
        tuned(args)
        if any(m.startswith("ppo") for m in methods)
        else FrontierConfig(n_train=PROMPTS)
    )
    if config is None:
        return (
            print("the sweep of PPO's settings is not finished: run it again, without --record")
            or 3
        )
    jobs = plan(config, args.seeds, methods, args.prompts, RUNS / "text")
    cells = run_jobs(jobs, 0 if args.record else args.minutes - (time.monotonic() - start) / 60)
    if not args.record: return 0 if len(cells) == len(jobs) else 3
    if len(cells) < len(jobs):
        raise Refusal(
            f"{len(jobs) - len(cells)} cells are missing, first {jobs[len(cells)]}: "
            "run it without --record"
        )
    save_result(
        "frontier_text",
        dict(cells=[small(c) for c in cells]),
        command="python benchmarks/frontier.py text --record",
        config=asdict(config),
        seed=args.seeds,
        seconds=sum(c["seconds"] for c in cells),
        what="True reward and exact KL of every method on held-out prompts, with seconds, memory "
        "and tokens sampled.",
    )
    publish(judge_text)


def main(argv=None):
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = top.add_subparsers(dest="what", required=True)
    kinds.add_parser("world").set_defaults(run=world)
    def judge(args): return publish(judge_worlds, judge_text) or 0
    kinds.add_parser("judge", help="write the claims anew from the records").set_defaults(run=judge)
    for name, run, seeds in (("text", text, [0, 1, 2]), ("ppo", ppo, [0]), ("reward", reward, [0])):
        p = kinds.add_parser(name)
        p.add_argument("--seeds", type=int, nargs="+", default=seeds)
        p.add_argument(
            "--minutes", type=float, default=math.inf, help="after these no new cell is begun"
        )
        p.add_argument("--record", action="store_true", help="write nbs/results")
        if name == "ppo": p.add_argument("--arms", nargs="+", help="some of them")
        if name == "text":
            p.add_argument(
                "--prompts", help="a text file, a prompt a line; those of page 11 by default"
            )
            p.add_argument(
                "--methods",
                nargs="+",
                help="some of best_of_n dpo sft unlikelihood ppo_true ppo_learned",
            )
        p.set_defaults(run=run)
    args = top.parse_args(argv)
    try: return args.run(args)
    except Refusal as no: return print(no, file=sys.stderr) or no.code


if __name__ == "__main__": sys.exit(main())
