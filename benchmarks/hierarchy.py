"""Who may overrule whom, on the bundled model: the recorded comparison of page 21b.

    python benchmarks/hierarchy.py [--seeds 0 1 2 …] [--minutes 8]
        train and judge, one small file a cell
    python benchmarks/hierarchy.py --record
        gather the cells into nbs/results/

A cell is one arm with one seed. The arms of a seed start from one supervised model (the arm SFT,
with or without segments), which is made first and kept with its adapter under runs/hierarchy/.
The blocks of every prompt are shuffled, and all arms and seeds are asked the same held-out items.
The committed record is older: blocks by rank, other items a seed, three seeds (page 21b says what
else). Its claims are made from it by --judge.
A finished cell is not run again, so a stopped run goes on where it was; a cell made with other
settings is made anew. --record refuses while a cell is missing.
"""
import random
import sys
from collections import Counter

import torch
from cells import (above, by_seed, claim_row, gathered, options, ran, recorded, run_or_record,
                   seconds_of, seeds_of, work)

from dpo_literate.gw_dpo import (add_delimiters, add_segments, hierarchy_policy,
                                 hierarchy_rows, keep_marks, load_hierarchy, save_hierarchy,
                                 train_hierarchy)
from dpo_literate.hierarchy import PAIRS, agreed, conflict, make_items, shuffled
from dpo_literate.hierarchy_eval import judge_replies, macro_mean, ppa, replies_to, whs
from dpo_literate.models import load_model, load_tokenizer
from dpo_literate.results import Refusal, repo_dir, save_result
from dpo_literate.rows import Row
from dpo_literate.runs import digest
from dpo_literate.trainer import DPOConfig, DPOTrainer

CELLS = repo_dir() / "runs" / "hierarchy"
COMMAND = "python benchmarks/hierarchy.py --record"
LORA = dict(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
BASE = dict(save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1,
            lr_scheduler_type="cosine", num_train_epochs=1, bf16=True, max_length=None)
# the two rates were tried on seed 9, which the record leaves out
SFT = dict(rows=480, learning_rate=1e-3, batch=8, warmup=6)
DPO = dict(per_pair=12, benign=32, cascades=6, learning_rate=1e-4, beta=.1, gaps=(3, 2, 1),
           batch=8)
HELD = dict(per_pair=30, aligned=40, benign=100, cascades=20, limit=12, seed=0)
SEEDS = range(8)
ARMS = {"DPO": dict(schedule="none"), "constant": dict(schedule="constant"),
        "linear": dict(schedule="linear"), "bilateral": dict(schedule="bilateral"),
        "DPO, no calibration": dict(schedule="none", calibration=False),
        "bilateral, no calibration": dict(schedule="bilateral", calibration=False),
        "bilateral, no segments": dict(schedule="bilateral", segments=False)}


def sft_config(seed, segments):
    return dict(arm="SFT" if segments else "SFT, no segments", seed=seed, segments=segments,
                sft=SFT, held=HELD, lora=LORA, base=BASE)


def configs(seeds):
    "Supervised cells first, then the arms that start from them."
    found = []
    for seed in seeds:
        found += [sft_config(seed, segments) for segments in (True, False)]
        shared = dict(seed=seed, sft=SFT, dpo=DPO, held=HELD, lora=LORA, base=BASE)
        for arm, more in ARMS.items():
            found.append(dict(arm=arm, **shared, **{"calibration": True, "segments": True, **more}))
    return found


def folder_of(config):
    return CELLS / f"sft_{digest(sft_config(config['seed'], config['segments']))}"


def here(): return dict(use_cpu=not torch.cuda.is_available())


def new_lora():
    from peft import LoraConfig
    return LoraConfig(**LORA)


def quiet_trainer(*args, **more):
    from transformers import PrinterCallback
    trainer = keep_marks(DPOTrainer(*args, **more))
    trainer.remove_callback(PrinterCallback)
    return trainer


def supervised_rows(seed, tokenizer):
    "Three prompts of four are without a conflict; the loss reads the chosen reply only."
    rng = random.Random(f"sft {seed}")
    makers = [conflict if n % 4 == 3 else agreed for n in range(SFT["rows"])]
    items = [make(rng.choice(PAIRS), rng) for make in makers]
    rows = hierarchy_rows(shuffled(items, seed), tokenizer)
    return [Row(r.prompt_ids, r.chosen_ids, r.rejected_ids[-1:], r.id) for r in rows]


def supervised(config):
    "Phase 1: what the marks and the demands mean."
    tokenizer, model = load_tokenizer("bundled"), load_model("bundled")
    add_delimiters(model, tokenizer)
    if config["segments"]: add_segments(model, tokenizer, seed=config["seed"])
    policy = hierarchy_policy(model, tokenizer, new_lora(), config["seed"])
    rows = supervised_rows(config["seed"], tokenizer)
    args = DPOConfig(str(CELLS / "trainer"), loss_type="sft", learning_rate=SFT["learning_rate"],
                     warmup_steps=SFT["warmup"], per_device_train_batch_size=SFT["batch"],
                     seed=config["seed"], **here(), **BASE)
    trainer = quiet_trainer(policy, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    save_hierarchy(policy, tokenizer, folder_of(config))
    loss = trainer.state.log_history[-2]["loss"]
    return dict(judged(policy, tokenizer, config), loss=loss)


def preferred(config):
    "Phase 2: one arm, from the supervised model of its seed."
    base = load_model("bundled")
    model, tokenizer = load_hierarchy(base, folder_of(config), merge=True)
    policy, d = hierarchy_policy(model, tokenizer, new_lora(), config["seed"]), config["dpo"]
    items = make_items("train", config["seed"], per_pair=d["per_pair"], cascades=d["cascades"],
                       benign=d["benign"] * config["calibration"])
    logs = train_hierarchy(policy, tokenizer, shuffled(items, config["seed"]),
                           schedule=config["schedule"],
                           gaps=tuple(d["gaps"]), out=CELLS / "trainer", seed=config["seed"],
                           learning_rate=d["learning_rate"], beta=d["beta"],
                           per_device_train_batch_size=d["batch"], **here(), **BASE)
    steps = [[h for h in log if "loss" in h] for log in logs]
    return dict(judged(policy, tokenizer, config), pairs=len(items),
                first_loss=[stage[0]["loss"] for stage in steps],
                margin=[stage[-1]["rewards/margins"] for stage in steps])


@torch.no_grad()
def judged(policy, tokenizer, config):
    "Greedy replies to held-out items, judged by program; every conflict also turned round."
    sizes = {k: v for k, v in config["held"].items() if k not in ("limit", "seed")}
    limit, seed = config["held"]["limit"], config["held"]["seed"]
    items = shuffled(make_items("held out", seed, **sizes), seed)
    replies = replies_to(policy.to(torch.bfloat16), tokenizer, items, limit=limit)
    seen = judge_replies(items, replies)
    return metrics(items, seen) | by_place(policy, tokenizer, items, seen["won"], limit) | dict(
        examples=[dict(kind=x.kind, pair=list(x.pair), chosen=x.chosen, reply=y)
                  for x, y in list(zip(items, replies))[::80]])


def by_place(policy, tokenizer, items, won, limit):
    """Macro PPA with the higher level first, and with it last, of the same conflicts.

    The shuffled prompt is one of the two; turned round it is the other."""
    conflicts = [x for x in items if x.kind == "conflict"]
    said = replies_to(policy, tokenizer, conflicts, limit=limit, upside_down=True)
    turned = judge_replies(conflicts, said)["won"]
    as_asked = won[[x.kind == "conflict" for x in items]]
    first = torch.tensor([x.order.index(x.pair[0]) < x.order.index(x.pair[1]) for x in conflicts])
    return dict(higher_first=macro_mean(ppa(conflicts, torch.where(first, as_asked, turned))),
                upside_down=macro_mean(ppa(conflicts, torch.where(first, turned, as_asked))))


def metrics(items, seen):
    "The numbers of page 21b, as plain means."
    def mean(name, test): return seen[name][[test(x) for x in items]].mean().item()
    found = ppa(items, seen["won"])
    values = dict(macro=macro_mean(found), whs=whs(found),
                  cascades=mean("won", lambda x: x.kind == "cascade"),
                  pairs_won={f"{i}{j}": v for (i, j), v in found.items()})
    for name in ("refused", "official", "undone"):
        values[name] = mean(name, lambda x: x.kind in ("aligned", "benign"))
        for kind in ("aligned", "benign"):
            values[f"{kind}_{name}"] = mean(name, lambda x: x.kind == kind)
    families = sorted(Counter(x.family for x in items if x.kind == "conflict"))
    values["families_won"] = {
        f: mean("won", lambda x: x.family == f and x.kind == "conflict") for f in families}
    return values


def run_cell(config):
    if config["arm"].startswith("SFT"): return supervised(config)
    if not (folder_of(config) / "hierarchy.safetensors").is_file():
        raise Refusal(f"{folder_of(config)} is missing: "
                      f"run the SFT cell of seed {config['seed']} first")
    return preferred(config)


def shown(values):
    names = ("macro", "whs", "cascades", "refused", "undone")
    return ", ".join(f"{k} {values[k]:.2f}" for k in names)


# ------------------------------------------------------------ the record

def record(todo):
    cells, command = gathered(todo, CELLS), COMMAND
    seeds = seeds_of(cells)
    names = list(dict.fromkeys(c["config"]["arm"] for c in cells))
    def of(arm, name): return [v[name] for v in by_seed(cells, arm=arm)]
    plain = [name for name in cells[0]["values"] if name not in ("examples", "loss")]
    arms = {arm: {name: of(arm, name) for name in plain} for arm in names}
    examples = {arm: of(arm, "examples")[0] for arm in ("SFT", "DPO", "bilateral")}
    config = dict(model="bundled", sft=SFT, dpo=DPO, held=HELD, lora=LORA, alpha=.3, **BASE)
    save_result("hierarchy", dict(arms=arms, examples=examples), command=command, config=config,
                seed=seeds, seconds=seconds_of(cells), ran=ran(cells),
                what="Who wins a conflict of levels, and how often a harmless prompt is refused: "
                     "DPO, a constant offset of equal mean, linear and bilateral GW-DPO, bundled "
                     "model")


def setup_of(config):
    "What a record ran with, in words."
    sft, dpo, held = config["sft"], config["dpo"], config["held"]
    return (f"SmolLM2-135M-Instruct, LoRA r{config['lora']['r']}, SFT on {sft['rows']} rows, then "
            f"{10 * dpo['per_pair'] + dpo['cascades']} conflicts and {dpo['benign']} calibration "
            f"rows in three stages; {10 * held['per_pair']} held-out conflicts, "
            f"{10 * held['aligned'] + held['benign']} harmless prompts"
            + ("" if "seed" in held else " a seed"))


def corner(pairs_won):
    "Mean PPA of the pairs whose offset rises most, minus that of the others."
    rising = [v for pair, v in pairs_won.items() if pair in ("01", "12")]
    others = [v for pair, v in pairs_won.items() if pair not in ("01", "12")]
    return sum(rising) / 2 - sum(others) / 8


def judge():
    "Page, and its claims, from the committed record."
    found, seeds = recorded("hierarchy")
    def of(arm, name): return found["arms"][arm][name]
    def all_arms(name): return [sum(x) / len(x) for x in zip(*(of(a, name) for a in found["arms"]))]
    return "hierarchy", claims(of, all_arms, seeds, setup_of(found["_provenance"]["config"]))


def claims(of, all_arms, seeds, setup):
    "Rows of the claims table: differences seed by seed, positive where they favour the claim."
    more = dict(setup=setup, seeds=seeds, command=COMMAND)
    try: place = rank_claim(all_arms("higher_first"), all_arms("upside_down"), more)
    except KeyError: place = place_claim(all_arms("macro"), all_arms("upside_down"), more)
    def gap(a, b, name, factor=1.):
        return [factor * x - y for x, y in zip(of(a, name), of(b, name))]
    def corners(arm): return map(corner, of(arm, "pairs_won"))
    in_corner = [x - y for x, y in zip(corners("bilateral"), corners("linear"))]
    bare, no_segments = "bilateral, no calibration", "bilateral, no segments"
    abstract = "arXiv:2606.10860 abstract"
    rows = [
        ("bilateral has a higher macro PPA than DPO (difference)",
         abstract, "higher", gap("bilateral", "DPO", "macro")),
        ("bilateral has a higher macro PPA than linear (difference)",
         abstract, "higher", gap("bilateral", "linear", "macro")),
        ("bilateral refuses at most half as often as DPO, phrase list "
         "(half of DPO's rate minus bilateral's)",
         abstract, "half", gap("DPO", "bilateral", "refused", .5)),
        ("it is the structure: bilateral has a higher macro PPA than a constant offset of equal "
         "mean (difference)",
         "our control", "left out", gap("bilateral", "constant", "macro")),
        ("bilateral's gain over linear lies in the pairs 01 and 12 "
         "(their gain minus that of the others)",
         "arXiv:2606.10860 configuration", "predicted", in_corner),
        ("calibration rows lower over-refusal, phrase list (bilateral without minus with)",
         abstract, "lower", gap(bare, "bilateral", "refused")),
        ("calibration rows lower over-refusal, task not done (bilateral without minus with)",
         "our second detector", "lower", gap(bare, "bilateral", "undone")),
        ("segments lower over-refusal, phrase list (bilateral without minus with)",
         abstract, "lower", gap(no_segments, "bilateral", "refused")),
        ("DPO raises macro PPA over supervised training (difference)",
         abstract, "higher", gap("DPO", "SFT", "macro"))]
    return [claim_row(*row, above(), **more) for row in rows] + [place]


def rank_claim(first, last, more):
    "Blocks were shuffled: does their place still count?"
    return claim_row("rank, not place: with the higher level last, a conflict is won no more than "
                     ".1 less often than with it first (macro PPA, difference, mean of all arms)",
                     "our control", "left out", [b - a for a, b in zip(first, last)], above(-.1),
                     **more)


def place_claim(first, last, more):
    "Blocks stood by rank: was it rank that was learned?"
    return claim_row("trained with the blocks by rank, these models follow place: with the blocks "
                     "turned round a conflict is won less often (macro PPA, difference, mean of "
                     "all arms)", "our control", "left out",
                     [a - b for a, b in zip(first, last)], above(), **more)


def main(argv=None):
    args = options(__doc__, list(SEEDS)).parse_args(argv)
    def run(todo, minutes): return work(todo, CELLS, run_cell, shown, minutes)
    return run_or_record(args, lambda: configs(args.seeds), run, record, judge)


if __name__ == "__main__": sys.exit(main())
