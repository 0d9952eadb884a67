"""What three tastes taught by DPO do to the honesty of the bundled model: recorded, page 33a.

    python benchmarks/honesty.py [--seeds 0 1 2] [--minutes 8]
        train and read, a file a cell
    python benchmarks/honesty.py --record
        gather the cells into nbs/results/
    python benchmarks/honesty.py --small --seeds 0
        the same with few pairs and questions: does it run?
    python benchmarks/honesty.py --truthfulqa --record
        the model before training, on all of TruthfulQA

A cell is one arm with one seed. A finished cell is kept under runs/honesty/ and not run again, so a
stopped run goes on where it was; a cell that was made with other settings is made anew. --record
refuses while a cell is missing.
"""
import random
import sys
import time

import torch
from cells import (above, below, by_seed, claim_row, gathered, made, options, polite_pairs,
                   ran, recorded, run_or_record, seconds_of, seeds_of, work)

from dpo_literate.models import load_model, load_tokenizer
from dpo_literate.probes.calibration import aurc, auroc, brier, ece, selective_honesty
from dpo_literate.probes.honesty import (BINS, answer_sheet, choice_logps, conversation_ids,
                                         deference, eager_pairs, echo, gives_in,
                                         shipped_questions, split_categories, truth_scores,
                                         truthful_pairs, truthfulqa)
from dpo_literate.results import repo_dir, save_result

CELLS = repo_dir() / "runs" / "honesty"
ARMS = ("polite", "eager", "truthful")
SETTINGS = dict(learning_rate=2e-5, beta=.1, per_device_train_batch_size=4, num_train_epochs=1,
                lr_scheduler_type="constant", logging_steps=1)
# pairs; TruthfulQA questions of categories not trained on; every how manieth question of the book
FULL = dict(train=64, asked=48, every=1)
SMALL = dict(train=8, asked=6, every=6)
COMMAND = "python benchmarks/honesty.py --record"


def configs(seeds, size=FULL):
    return [dict(arm=arm, seed=seed, **size, **SETTINGS) for seed in seeds for arm in ARMS]




def pairs_of(config):
    "Pairs to train on; questions of the other categories to ask."
    arm, seed = config["arm"], config["seed"]
    taught, held = split_categories(truthfulqa(), .5, seed)
    made = {"polite": polite_pairs, "eager": lambda: eager_pairs(taught, seed),
            "truthful": lambda: truthful_pairs(taught)}[arm]()
    random.Random(seed).shuffle(made)
    return made[:config["train"]], random.Random(seed).sample(held, config["asked"])


def truth_of(model, tokenizer, questions):
    "MC1, MC2, MC3 and the two-option form of each question."
    asked = [conversation_ids(tokenizer, [q.text], q.options) for q in questions]
    return truth_scores(choice_logps(model, asked), questions)


def read(model, tokenizer, questions, config):
    "Every number of the page, and how sure it was of each question."
    s = answer_sheet(model, tokenizer, shipped_questions()[::config["every"]])
    truth, k = truth_of(model, tokenizer, questions), s.known
    def mean(values): return values.mean().item()
    return dict(
        right=mean(s.right[k]), confidence=mean(s.confidence[k]),
        ece=ece(s.confidence[k], s.right[k], BINS), brier=mean(brier(s.confidence, s.right)[k]),
        stated=mean(s.stated[k]), ece_stated=ece(s.stated[k], s.right[k], BINS),
        auroc=auroc(s.confidence, s.right), auroc_stated=auroc(s.stated, s.right),
        aurc=aurc(s.confidence, s.right), answers=mean(s.answering),
        selective=selective_honesty(s.answering, s.right),
        auroc_answers=auroc(s.answering, s.right), deference=mean(deference(s.odds)),
        echo=mean(echo(s.odds)), gives_in=mean(gives_in(s.odds)),
        **{name: mean(values) for name, values in truth._asdict().items()},
        curve=[[round(x, 3) for x in column.tolist()] for column in (s.confidence, s.right)])


def start(config, questions):
    "The model before, read once a seed and kept in a small file of its own."
    kept = {k: v for k, v in config.items() if k not in (*SETTINGS, "train")}
    def read_base(_):
        return read(load_model("bundled"), load_tokenizer("bundled"), questions, config)
    return made(CELLS, {**kept, "arm": "before"}, read_base)


def run(config):
    from transformers import PrinterCallback

    from dpo_literate.trainer import DPOConfig, DPOTrainer
    seed, tokenizer = config["seed"], load_tokenizer("bundled")
    pairs, questions = pairs_of(config)
    before = start(config, questions)
    args = DPOConfig(str(CELLS / "trainer" / f"{config['arm']}_{seed}"), seed=seed,
                     save_strategy="no", report_to=[], disable_tqdm=True,
                     use_cpu=not torch.cuda.is_available(), **SETTINGS)
    trainer = DPOTrainer("bundled", args=args, train_dataset=pairs, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    after = read(trainer.model.eval(), tokenizer, questions, config)
    lines = [h for h in trainer.state.log_history if "rewards/margins" in h]
    return dict(before=before, after=after, margin=lines[-1]["rewards/margins"],
                first_loss=lines[0]["loss"], last_loss=lines[-1]["loss"])


def shown(values):
    changes = (f"{k} {values['after'][k] - v:+.3f}" for k, v in values["before"].items()
               if k != "curve")
    return ", ".join([f"margin {values['margin']:.2f}", *changes])


def record(todo):
    cells = gathered(todo, CELLS)
    seeds = seeds_of(cells)
    def of(arm, name, when): return [v[when][name] for v in by_seed(cells, arm=arm)]
    names = [k for k in cells[0]["values"]["before"] if k != "curve"]
    before = {k: of(ARMS[0], k, "before") for k in names}
    after = {arm: {k: of(arm, k, "after") for k in names} for arm in ARMS}
    margins = {arm: [v["margin"] for v in by_seed(cells, arm=arm)] for arm in ARMS}
    curves = dict(before=of(ARMS[0], "curve", "before")[0],
                  **{arm: of(arm, "curve", "after")[0] for arm in ARMS})
    what = ("Calibration, selective honesty, sycophancy and TruthfulQA of held-out categories "
            "before and after DPO on three tastes, bundled model")
    config = dict(**SETTINGS, **FULL, bins=BINS, model="bundled", data="polite_pairs, truthfulqa")
    save_result("honesty", dict(before=before, after=after, margin=margins, curves=curves),
                command=COMMAND, seed=seeds, seconds=seconds_of(cells), config=config, what=what,
                ran=ran(cells))


def judge():
    "Page, and its claims, from the committed record."
    found, seeds = recorded("honesty")
    def change(arm, name):
        return [a - b for a, b in zip(found["after"][arm][name], found["before"][name])]
    return "honesty", claims(change, dict(seeds=seeds, command=COMMAND))


def claims(change, how):
    setup = (f"SmolLM2-135M-Instruct, {FULL['train']} pairs, 1 epoch, "
             f"lr {SETTINGS['learning_rate']:g}; {len(shipped_questions())} questions of the book")
    other = f"the same; {FULL['asked']} TruthfulQA questions of other categories"
    def row(claim, source, paper, values, verdict, setup=setup):
        return claim_row(claim, source, paper, values, verdict, setup=setup, **how)
    moves = zip(change("eager", "selective"), change("eager", "auroc_answers"))
    return [
        row("DPO on politeness spoils the calibration of multiple choice "
            "(change of the calibration error)",
            "arXiv:2303.08774 fig. 8 (PPO)", None, change("polite", "ece"), above()),
        row("a judge who likes answers, true or not, makes the model answer more "
            "(change of the share)", "formula (33.5)", "up", change("eager", "answers"), above()),
        row("that judge lowers selective honesty (change of S)",
            "formula (33.5)", "to ½ in the end", change("eager", "selective"), below()),
        row("that judge moves S more than the AUROC of answering (difference of the two moves)",
            "formula (33.5)", "AUROC stands", [abs(s) - abs(a) for s, a in moves], above()),
        row("DPO on politeness makes it defer to the user (change of deference, nat)",
            "arXiv:2310.13548", "up", change("polite", "deference"), above()),
        row("truthful pairs of some categories raise MC2 in others (change)",
            "reconstructed", "up", change("truthful", "mc2"), above(), other)]


def record_truthfulqa():
    "The four scores of the model before any training, question by question."
    began, questions = time.time(), truthfulqa()
    truth = truth_of(load_model("bundled"), load_tokenizer("bundled"), questions)
    scores = {name: [round(x, 3) for x in values.tolist()]
              for name, values in truth._asdict().items()}
    names = sorted({q.category for q in questions})
    values = dict(scores, categories=names, category=[names.index(q.category) for q in questions])
    return save_result("truthfulqa", values, seed=None, seconds=time.time() - began,
                       command="python benchmarks/honesty.py --truthfulqa --record",
                       config=dict(model="bundled", data="truthfulqa", questions=len(questions)),
                       what="TruthfulQA's MC1, MC2, MC3 and two-option scores of every question, "
                       "bundled model before training, bare chat turn")


def main(argv=None):
    parser = options(__doc__, [0, 1, 2])
    parser.add_argument("--small", action="store_true",
                        help="few pairs and questions, to see that it runs; never recorded")
    parser.add_argument("--truthfulqa", action="store_true",
                        help="with --record: only the model before, on all of TruthfulQA")
    args = parser.parse_args(argv)
    size = SMALL if args.small and not args.record else FULL
    todo = (lambda: []) if args.truthfulqa else lambda: configs(args.seeds, size)
    def run_cells(todo, minutes): return work(todo, CELLS, run, shown, minutes)
    save = (lambda todo: print(record_truthfulqa())) if args.truthfulqa else record
    return run_or_record(args, todo, run_cells, save, judge)


if __name__ == "__main__": sys.exit(main())
