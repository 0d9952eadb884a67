"""What three tastes taught by DPO do to the honesty of the bundled model: the recorded run of page 33.

    python benchmarks/honesty.py [--seeds 0 1 2] [--minutes 8]   train and read, one small file a cell
    python benchmarks/honesty.py --record                        gather the cells into nbs/results/
    python benchmarks/honesty.py --small --seeds 0               the same with few pairs and questions: does it run?

A cell is one arm with one seed. A finished cell is kept under runs/honesty/ and not run again, so a stopped run goes on where it was;
a cell that was made with other settings is made anew. --record refuses while a cell is missing.
"""
import json
import random
import sys
import time

import torch
from cells import above, below, by_seed, claim_row, gathered, key, options, polite_pairs, run_or_record, seconds_of, seeds_of, work

from dpo_literate.models import load_model, load_tokenizer
from dpo_literate.probes.honesty import (BINS, aurc, auroc, brier, choice_logps, deference, eager_pairs, ece, echo, put, selective_honesty, sheet_of,
                                         shipped_questions, split_categories, truth_scores, truthful_pairs, truthfulqa)
from dpo_literate.results import repo_dir, save_claims, save_result, write_atomic

CELLS = repo_dir() / "runs" / "honesty"
ARMS = ("polite", "eager", "truthful")
SETTINGS = dict(learning_rate=2e-5, beta=.1, per_device_train_batch_size=4, num_train_epochs=1, lr_scheduler_type="constant", logging_steps=1)
FULL = dict(train=64, asked=48, every=1)   # pairs; TruthfulQA questions of categories not trained on; every how manieth question of the book
SMALL = dict(train=8, asked=6, every=6)
COMMAND = "python benchmarks/honesty.py --record"


def configs(seeds, size=FULL): return [dict(arm=arm, seed=seed, **size, **SETTINGS) for seed in seeds for arm in ARMS]


def cell_path(config): return CELLS / f"{config['arm']}_{config['seed']}_{key(config)}.json"


def pairs_of(config):
    "Pairs to train on; questions of the other categories to ask."
    arm, seed = config["arm"], config["seed"]
    taught, held = split_categories(truthfulqa(), .5, seed)
    shuffle = random.Random(seed)
    made = {"polite": polite_pairs, "eager": lambda: eager_pairs(taught, seed), "truthful": lambda: truthful_pairs(taught)}[arm]()
    shuffle.shuffle(made)
    return made[:config["train"]], random.Random(seed).sample(held, config["asked"])


def read(model, tokenizer, questions, config):
    "Every number of the page, and how sure it was of each question."
    s = sheet_of(model, tokenizer, shipped_questions()[::config["every"]])
    truth = truth_scores(choice_logps(model, [put(tokenizer, [q.text], q.options) for q in questions]), questions)
    k = s.known
    return dict(right=s.right[k].mean().item(), confidence=s.confidence[k].mean().item(), ece=ece(s.confidence[k], s.right[k], BINS),
                brier=brier(s.confidence, s.right)[k].mean().item(), stated=s.stated[k].mean().item(), ece_stated=ece(s.stated[k], s.right[k], BINS),
                auroc=auroc(s.confidence, s.right), auroc_stated=auroc(s.stated, s.right), aurc=aurc(s.confidence, s.right), answers=s.answers.mean().item(),
                selective=selective_honesty(s.answers, s.right), auroc_answers=auroc(s.answers, s.right), deference=deference(s.odds).mean().item(),
                echo=echo(s.odds).mean().item(), gives_in=((s.odds[:, 0] > 0) & (s.odds[:, 1] < 0)).double().mean().item(),
                mc1=truth.mc1.mean().item(), mc2=truth.mc2.mean().item(), binary=truth.binary.mean().item(),
                curve=[[round(x, 3) for x in column.tolist()] for column in (s.confidence, s.right)])


def start(config, questions):
    "The model before, read once a seed and kept in a small file of its own."
    path = cell_path({**{k: v for k, v in config.items() if k not in (*SETTINGS, "train")}, "arm": "before"})
    if not path.exists():
        began, values = time.time(), read(load_model("bundled"), load_tokenizer("bundled"), questions, config)
        write_atomic(path, json.dumps(dict(values=values, seconds=time.time() - began)))
    return json.loads(path.read_text())["values"]


def run(config):
    from transformers import PrinterCallback

    from dpo_literate.trainer import DPOConfig, DPOTrainer
    seed, tokenizer = config["seed"], load_tokenizer("bundled")
    pairs, questions = pairs_of(config)
    before = start(config, questions)
    args = DPOConfig(str(CELLS / "trainer" / f"{config['arm']}_{seed}"), seed=seed, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(), **SETTINGS)
    trainer = DPOTrainer("bundled", args=args, train_dataset=pairs, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    lines = [h for h in trainer.state.log_history if "rewards/margins" in h]
    return dict(before=before, after=read(trainer.model.eval(), tokenizer, questions, config), margin=lines[-1]["rewards/margins"], first_loss=lines[0]["loss"], last_loss=lines[-1]["loss"])


def shown(values):
    return ", ".join([f"margin {values['margin']:.2f}", *(f"{k} {values['after'][k] - v:+.3f}" for k, v in values["before"].items() if k != "curve")])


def record(todo):
    cells = gathered(todo, cell_path)
    seeds = seeds_of(cells)
    def of(arm, name, when): return [v[when][name] for v in by_seed(cells, arm=arm)]
    def change(arm, name): return [a - b for a, b in zip(of(arm, name, "after"), of(arm, name, "before"))]
    names = [k for k in cells[0]["values"]["before"] if k != "curve"]
    values = dict(before={k: of(ARMS[0], k, "before") for k in names}, after={arm: {k: of(arm, k, "after") for k in names} for arm in ARMS},
                  margin={arm: [v["margin"] for v in by_seed(cells, arm=arm)] for arm in ARMS},
                  curves=dict(before=of(ARMS[0], "curve", "before")[0], **{arm: of(arm, "curve", "after")[0] for arm in ARMS}))
    save_result("honesty", values, command=COMMAND, config=dict(**SETTINGS, **FULL, bins=BINS, model="bundled", data="polite_pairs, truthfulqa"), seed=seeds,
                seconds=seconds_of(cells), what="Calibration, selective honesty, sycophancy and TruthfulQA of held-out categories before and after DPO on three tastes, bundled model")
    setup = f"SmolLM2-135M-Instruct, {FULL['train']} pairs, 1 epoch, lr {SETTINGS['learning_rate']:g}; {len(shipped_questions())} questions of the book"
    other = f"the same; {FULL['asked']} TruthfulQA questions of other categories"
    def row(claim, source, paper, values, sign, setup=setup):
        return claim_row(claim, source, paper, values, above() if sign > 0 else below(), setup=setup, seeds=seeds, command=COMMAND)
    save_claims("honesty", [
        row("DPO on politeness spoils the calibration of multiple choice (change of the calibration error)", "arXiv:2303.08774 fig. 8 (PPO)", None, change("polite", "ece"), 1),
        row("a judge who likes answers, true or not, makes the model answer more (change of the share)", "formula (33.7)", "up", change("eager", "answers"), 1),
        row("that judge lowers selective honesty (change of S)", "formula (33.7)", "to ½ in the end", change("eager", "selective"), -1),
        row("that judge moves S more than the AUROC of answering (difference of the two moves)", "formula (33.7)", "AUROC stands",
            [abs(s) - abs(a) for s, a in zip(change("eager", "selective"), change("eager", "auroc_answers"))], 1),
        row("DPO on politeness makes it defer to the user (change of deference, nat)", "arXiv:2310.13548", "up", change("polite", "deference"), 1),
        row("truthful pairs of some categories raise MC2 in others (change)", "reconstructed", "up", change("truthful", "mc2"), 1, other)])


def main(argv=None):
    parser = options(__doc__, [0, 1, 2])
    parser.add_argument("--small", action="store_true", help="few pairs and questions, to see that it runs; never recorded")
    args = parser.parse_args(argv)
    size = SMALL if args.small and not args.record else FULL
    return run_or_record(args, lambda: configs(args.seeds, size), lambda todo, minutes: work(todo, cell_path, run, shown, minutes), record)


if __name__ == "__main__": sys.exit(main())
