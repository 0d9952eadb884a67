"""Who may overrule whom, on the bundled model: the recorded comparison of page 21.

    python benchmarks/hierarchy.py [--seeds 0 1 2] [--minutes 8]   train and judge, one small file a cell
    python benchmarks/hierarchy.py --record                        gather the cells into nbs/results/

A cell is one arm with one seed. The arms of a seed start from one supervised model (the arm SFT, with or without segments), which is made first and
kept with its adapter under runs/hierarchy/. A finished cell is not run again, so a stopped run goes on where it was; a cell made with other settings is made anew.
--record refuses while a cell is missing.
"""
import random
import sys
from collections import Counter

import torch
from cells import above, by_seed, claim_row, gathered, key, options, run_or_record, seconds_of, seeds_of, work

from dpo_literate.hierarchy import (PAIRS, HierarchyTrainer, add_delimiters, add_segments, agreed, conflict, hierarchy_policy, hierarchy_rows, judge, load_hierarchy,
                                    macro, make_items, ppa, replies_to, save_hierarchy, train_hierarchy, whs)
from dpo_literate.models import load_model, load_tokenizer
from dpo_literate.results import Refusal, repo_dir, save_claims, save_result
from dpo_literate.rows import Row
from dpo_literate.trainer import DPOConfig

CELLS = repo_dir() / "runs" / "hierarchy"
LORA = dict(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
BASE = dict(save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, lr_scheduler_type="cosine", num_train_epochs=1, bf16=True, max_length=None)
SFT = dict(rows=480, learning_rate=1e-3, batch=8, warmup=6)   # this and the rate below: tried on seed 9, which the record leaves out
DPO = dict(per_pair=12, benign=32, cascades=6, learning_rate=1e-4, beta=.1, gaps=(3, 2, 1), batch=8)
HELD = dict(per_pair=6, aligned=3, benign=15, cascades=10, limit=12)
ARMS = {"DPO": dict(schedule="none"), "constant": dict(schedule="constant"), "linear": dict(schedule="linear"), "bilateral": dict(schedule="bilateral"),
        "DPO, no calibration": dict(schedule="none", calibration=False), "bilateral, no calibration": dict(schedule="bilateral", calibration=False),
        "bilateral, no segments": dict(schedule="bilateral", segments=False)}


def cell_path(config): return CELLS / f"{config['arm'].replace(', ', '_').replace(' ', '-')}_{config['seed']}_{key(config)}.json"


def sft_config(seed, segments): return dict(arm="SFT" if segments else "SFT, no segments", seed=seed, segments=segments, sft=SFT, held=HELD, lora=LORA, base=BASE)


def configs(seeds):
    "Supervised cells first, then the arms that start from them."
    found = []
    for seed in seeds:
        found += [sft_config(seed, segments) for segments in (True, False)]
        found += [dict(arm=arm, seed=seed, sft=SFT, dpo=DPO, held=HELD, lora=LORA, base=BASE, **{"calibration": True, "segments": True, **more}) for arm, more in ARMS.items()]
    return found


def folder_of(config): return CELLS / f"sft_{key(sft_config(config['seed'], config['segments']))}"


def here(): return dict(use_cpu=not torch.cuda.is_available())


def new_lora():
    from peft import LoraConfig
    return LoraConfig(**LORA)


def quiet_trainer(*args, **more):
    from transformers import PrinterCallback
    trainer = HierarchyTrainer(*args, **more)
    trainer.remove_callback(PrinterCallback)
    return trainer


def supervised(config):
    "Phase 1: what the marks and the demands mean; three prompts of four are without a conflict."
    tokenizer, model = load_tokenizer("bundled"), load_model("bundled")
    add_delimiters(model, tokenizer)
    if config["segments"]: add_segments(model, tokenizer, seed=config["seed"])
    policy = hierarchy_policy(model, tokenizer, new_lora(), config["seed"])
    rng = random.Random(f"sft {config['seed']}")
    rows = hierarchy_rows([(conflict if n % 4 == 3 else agreed)(rng.choice(PAIRS), rng) for n in range(SFT["rows"])], tokenizer)
    rows = [Row(r.prompt_ids, r.chosen_ids, r.rejected_ids[-1:], r.id) for r in rows]   # the loss reads the chosen reply only
    args = DPOConfig(str(CELLS / "trainer"), loss_type="sft", learning_rate=SFT["learning_rate"], warmup_steps=SFT["warmup"],
                     per_device_train_batch_size=SFT["batch"], seed=config["seed"], **here(), **BASE)
    trainer = quiet_trainer(policy, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    save_hierarchy(policy, tokenizer, folder_of(config))
    return dict(judged(policy, tokenizer, config), loss=trainer.state.log_history[-2]["loss"])


def preferred(config):
    "Phase 2: one arm, from the supervised model of its seed."
    model, tokenizer = load_hierarchy(load_model("bundled"), folder_of(config), merge=True)
    policy = hierarchy_policy(model, tokenizer, new_lora(), config["seed"])
    d = config["dpo"]
    items = make_items("train", config["seed"], per_pair=d["per_pair"], benign=d["benign"] * config["calibration"], cascades=d["cascades"])
    logs = train_hierarchy(policy, tokenizer, items, schedule=config["schedule"], gaps=tuple(d["gaps"]), out=CELLS / "trainer", seed=config["seed"],
                           learning_rate=d["learning_rate"], beta=d["beta"], per_device_train_batch_size=d["batch"], **here(), **BASE)
    first, last = ([[h for h in log if "loss" in h][n] for log in logs] for n in (0, -1))
    return dict(judged(policy, tokenizer, config), pairs=len(items), first_loss=[h["loss"] for h in first], margin=[h["rewards/margins"] for h in last])


@torch.no_grad()
def judged(policy, tokenizer, config):
    "Greedy replies to held-out items, judged by program."
    h = config["held"]
    items = make_items("held out", config["seed"], per_pair=h["per_pair"], aligned=h["aligned"], benign=h["benign"], cascades=h["cascades"])
    replies = replies_to(policy.to(torch.bfloat16), tokenizer, items, limit=h["limit"])
    seen = judge(items, replies)
    def mean(name, test): return seen[name][[test(x) for x in items]].mean().item()
    found = ppa(items, seen["won"])
    values = dict(macro=macro(found), whs=whs(found), cascades=mean("won", lambda x: x.kind == "cascade"), pairs_won={f"{i}{j}": v for (i, j), v in found.items()})
    for name in ("refused", "undone"):
        values[name] = mean(name, lambda x: x.kind in ("aligned", "benign"))
        values |= {f"{kind}_{name}": mean(name, lambda x: x.kind == kind) for kind in ("aligned", "benign")}
    conflicts = [x for x in items if x.kind == "conflict"][::2]
    values["upside_down"] = macro(ppa(conflicts, judge(conflicts, replies_to(policy, tokenizer, conflicts, limit=h["limit"], upside_down=True))["won"]))
    families = Counter(x.family for x in items if x.kind == "conflict")
    values["families_won"] = {f: mean("won", lambda x: x.family == f and x.kind == "conflict") for f in sorted(families)}
    values["examples"] = [dict(kind=x.kind, pair=list(x.pair), chosen=x.chosen, reply=y) for x, y in list(zip(items, replies))[::12]]
    return values


def run_cell(config):
    if config["arm"].startswith("SFT"): return supervised(config)
    if not (folder_of(config) / "hierarchy.safetensors").is_file():
        raise Refusal(f"{folder_of(config)} is missing: run the SFT cell of seed {config['seed']} first")
    return preferred(config)


def shown(values): return ", ".join(f"{k} {values[k]:.2f}" for k in ("macro", "whs", "cascades", "refused", "undone"))


# ------------------------------------------------------------ the record

def record(todo):
    cells, command = gathered(todo, cell_path), "python benchmarks/hierarchy.py --record"
    seeds = seeds_of(cells)
    names = list(dict.fromkeys(c["config"]["arm"] for c in cells))
    def of(arm, name): return [v[name] for v in by_seed(cells, arm=arm)]
    plain = ("macro", "whs", "cascades", "refused", "undone", "aligned_refused", "aligned_undone", "benign_refused", "benign_undone", "upside_down", "families_won", "pairs_won")
    arms = {arm: {name: of(arm, name) for name in plain} for arm in names}
    examples = {arm: of(arm, "examples")[0] for arm in ("SFT", "DPO", "bilateral")}
    config = dict(model="bundled", sft=SFT, dpo=DPO, held=HELD, lora=LORA, alpha=.3, **BASE)
    save_result("hierarchy", dict(arms=arms, examples=examples), command=command, config=config, seed=seeds, seconds=seconds_of(cells),
                what="Who wins a conflict of levels, and how often a harmless prompt is refused: DPO, a constant offset of equal mean, linear and bilateral GW-DPO, bundled model")
    save_claims("hierarchy", claims(of, seeds, command))


def claims(of, seeds, command):
    "The rows of the claims table; every difference is taken seed by seed, and a positive one favours the claim."
    setup = (f"SmolLM2-135M-Instruct, LoRA r{LORA['r']}, SFT on {SFT['rows']} rows, then {10 * DPO['per_pair'] + DPO['cascades']} conflicts and {DPO['benign']} calibration rows "
             f"in three stages; {10 * HELD['per_pair']} held-out conflicts, {10 * HELD['aligned'] + HELD['benign']} harmless prompts a seed")
    def gap(a, b, name, factor=1.): return [factor * x - y for x, y in zip(of(a, name), of(b, name))]
    def corner(arm):     # mean PPA of the pairs whose offset rises most, minus that of the others
        rise = [(sum(p[k] for k in ("01", "12")) / 2) - sum(v for k, v in p.items() if k not in ("01", "12")) / 8 for p in of(arm, "pairs_won")]
        return rise
    def row(claim, paper, values, source="arXiv:2606.10860 abstract"):
        return claim_row(claim, source, paper, values, above(), setup=setup, seeds=seeds, command=command)
    return [row("bilateral has a higher macro PPA than DPO (difference)", "higher", gap("bilateral", "DPO", "macro")),
            row("bilateral has a higher macro PPA than linear (difference)", "higher", gap("bilateral", "linear", "macro")),
            row("bilateral refuses at most half as often as DPO, phrase list (half of DPO's rate minus bilateral's)", "half", gap("DPO", "bilateral", "refused", .5)),
            row("it is the structure: bilateral has a higher macro PPA than a constant offset of equal mean (difference)", "left out", gap("bilateral", "constant", "macro"), "our control"),
            row("bilateral's gain over linear lies in the pairs 01 and 12 (their gain minus that of the others)", "predicted", [x - y for x, y in zip(corner("bilateral"), corner("linear"))],
                "arXiv:2606.10860 configuration"),
            row("calibration rows lower over-refusal, phrase list (bilateral without minus with)", "lower", gap("bilateral, no calibration", "bilateral", "refused")),
            row("calibration rows lower over-refusal, task not done (bilateral without minus with)", "lower", gap("bilateral, no calibration", "bilateral", "undone"), "our second detector"),
            row("segments lower over-refusal, phrase list (bilateral without minus with)", "lower", gap("bilateral, no segments", "bilateral", "refused")),
            row("DPO raises macro PPA over supervised training (difference)", "higher", gap("DPO", "SFT", "macro"))]


def main(argv=None):
    args = options(__doc__, [0, 1, 2]).parse_args(argv)
    return run_or_record(args, lambda: configs(args.seeds), lambda todo, minutes: work(todo, cell_path, run_cell, shown, minutes), record)


if __name__ == "__main__": sys.exit(main())
