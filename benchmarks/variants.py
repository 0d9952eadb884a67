"""The comparison of page 20c, its claims, and the same losses on a real model.

    python benchmarks/variants.py world [--condition clean ...]
        every loss under every judge: nbs/results/variants_world_*.json (under 10 min)
        --edges: only the losses whose best setting lay at the end of its grid
    python benchmarks/variants.py imbalance
        KTO with a tenth of its good replies: variants_imbalance.json
    python benchmarks/variants.py claims
        judge the claims from those: claims_20c_one_world.json
    python benchmarks/variants.py scan [--minutes 8] [...]
        seven losses x three beta x three seeds on the bundled model, resumable
    python benchmarks/variants.py scan --record
        gather them into variants_scan.json

The scan trains on the demo's pairs: replies of the bundled model, ranked by VADER. They are read
from runs/demo where the demo was run and sampled anew where it was not. Another file of pairs:
--pairs FILE. A finished run is kept under runs/variants/ and not run again.
"""
import argparse
import copy
import gc
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from cells import above, below, claim_row, publish

from dpo_literate.results import Refusal, commit, load_result, repo_dir, save_result

SCAN = {"sigmoid": (.05, .1, .3), "ipo_sum": (.01, .05, .1), "ipo": (.1, .3, 1.),
        "kto_pair": (.05, .1, .3), "simpo": (2., 5., 10.), "orpo": (.1, .5, 1.),
        "robust": (.05, .1, .3)}


def rounded(value): return [round(v, 4) for v in value] if isinstance(value, list) else value


def mean(values): return sum(values) / len(values)


# ------------------------------------------------------------ the enumerable worlds

def world(args):
    "Every loss under one judge after the other; with --edges only where a record asks for more."
    from dpo_literate.one_world import CONDITIONS
    for name in args.condition or CONDITIONS: one_judge(name, args.edges)


def kept_of(name):
    "Rows of the committed record that need no wider grid, and the commit each was made at."
    from dpo_literate.one_world import RECORDS
    found = load_result(RECORDS[name], quiet=True)
    history = found.pop("_provenance")
    made = {c["method"]: c["commit"] for c in history.get("ran", {}).get("cells", [])}
    rows = {m: row for m, row in found.items() if not row["edge"] or "saved" in row}
    return rows, {m: made.get(m, history["commit"]) for m in rows}


def one_judge(name, edges):
    from dpo_literate.one_world import CONDITIONS, PRICE, TEST, TUNE, methods, tune_and_test
    start, every, condition = time.time(), methods(), CONDITIONS[name]
    out, at = kept_of(name) if edges else ({}, {})
    todo = {m: method for m, method in every.items() if m not in out}
    if not todo: return
    for m, method in todo.items():
        out[m] = {k: rounded(v) for k, v in tune_and_test(method, condition).items()}
        at[m] = commit()
        print(f"{name:9s} {m:18s} knob {out[m]['knob']:<5.3g} "
              f"regret {mean(out[m]['regret']):6.3f}  {time.time() - start:5.0f} s", flush=True)
    grids = {m: [method.loss, method.knob, str(method.grid), str(method.settings)]
             for m, method in every.items()}
    config = dict(condition=asdict(condition), steps=300, lr=.05, price=PRICE,
                  tune=[TUNE.start, TUNE.stop], grids=grids)
    print(save_result(
        f"variants_world_{name}", {m: out[m] for m in every}, config=config, seed=list(TEST),
        command=f"python benchmarks/variants.py world --condition {name}",
        seconds=time.time() - start,
        ran=dict(shared={}, cells=[dict(method=m, commit=at[m]) for m in every]),
        what="regret, reward, KL, drift of chosen replies and length of every loss in ten "
             f"enumerable worlds: {condition.about}"))


def imbalance(args):
    "KTO where good replies are rare."
    from dpo_literate.one_world import CONDITIONS, TEST, methods, tune_and_test
    start, kto = time.time(), methods()["kto"]
    runs = dict(all=(1., {}), tenth=(.1, {}), tenth_weighed=(.1, dict(desirable_weight=10.)))
    out = {}
    for name, (good, settings) in runs.items():
        found = tune_and_test(replace(kto, settings=settings), CONDITIONS["clean"], good=good)
        out[name] = {k: rounded(v) for k, v in found.items()}
    print(save_result(
        "variants_imbalance", out, command="python benchmarks/variants.py imbalance",
        config={k: [good, s] for k, (good, s) in runs.items()}, seed=list(TEST),
        seconds=time.time() - start,
        what="KTO on clean verdicts with all good replies, with a tenth of them, and with a tenth "
             "at ten times the weight"))


# ------------------------------------------------------------ claims

def gap(ours, other):
    "Differences in the same worlds."
    return [x - y for x, y in zip(ours, other)]


def line(wanted): return above() if wanted > 0 else below()  # the sign the claim asks


class Claim(NamedTuple):
    claim: str
    source: str
    figure: str  # the paper's
    judge: str   # a condition of page 20c
    name: str    # the method
    other: str   # what it is compared with
    key: str     # which measurement
    wanted: int  # sign that the claim asks of the difference


UNREAD = "figure not read"


def mistral(theirs): return f"Mistral-Base AlpacaEval 2 LC {theirs} against DPO's 15.1"


CLAIMS = [Claim(*fields) for fields in (
    ("IPO stays closer to the best policy than DPO when the judge hardly errs",
     "arXiv:2310.12036", "theory: a finite margin at p = 1",
     "certain", "ipo_sum", "sigmoid", "regret", -1),
    ("IPO stays closer to the reference than DPO when the judge hardly errs",
     "arXiv:2310.12036", "theory: DPO's KL is unbounded at p = 1",
     "certain", "ipo_sum", "sigmoid", "kl", -1),
    ("robust DPO beats DPO when 20 % of labels are flipped",
     "arXiv:2403.00409", "theory: unbiased under flips",
     "flipped", "robust", "sigmoid", "regret", -1),
    ("robust DPO beats conservative DPO when 20 % of labels are flipped",
     "arXiv:2403.00409", UNREAD, "flipped", "robust", "cdpo", "regret", -1),
    ("KTO beats DPO on noisy labels",
     "arXiv:2402.01306", "advice of the paper; " + mistral(13.1) + " in SimPO's table",
     "flipped", "kto", "sigmoid", "regret", -1),
    ("beta-DPO (without its filter) beats DPO on noisy labels",
     "arXiv:2407.08639", UNREAD, "flipped", "beta_dpo", "sigmoid", "regret", -1),
    ("SimPO writes shorter than DPO under a judge who likes length",
     "arXiv:2405.14734", mistral(21.4), "lengthy", "simpo", "sigmoid", "length", -1),
    ("SimPO beats DPO under a judge who likes length",
     "arXiv:2405.14734", mistral(21.4), "lengthy", "simpo", "sigmoid", "regret", -1),
    ("R-DPO (told the price of a token) writes shorter than DPO under that judge",
     "arXiv:2403.19159", "up to +15-20 % length-controlled win rate (second-hand)",
     "lengthy", "r_dpo", "sigmoid", "length", -1),
    ("R-DPO (told the price of a token) beats DPO under that judge",
     "arXiv:2403.19159", mistral(17.4), "lengthy", "r_dpo", "sigmoid", "regret", -1),
    ("DPOP keeps the chosen replies from falling as they do under DPO",
     "arXiv:2402.13228", UNREAD, "alike", "dpop", "sigmoid", "drift", 1),
    ("DPOP beats DPO on look-alike pairs",
     "arXiv:2402.13228", UNREAD, "alike", "dpop", "sigmoid", "regret", -1),
    ("DPO plus likelihood (RPO) keeps the chosen replies from falling as they do under DPO",
     "arXiv:2404.19733", "chosen log-probability rises with the likelihood term (second-hand)",
     "alike", "rpo", "sigmoid", "drift", 1),
    ("Cal-DPO keeps the chosen replies from falling as they do under DPO",
     "arXiv:2412.14516", UNREAD, "alike", "cal_dpo", "sigmoid", "drift", 1),
    ("NCA keeps the chosen replies from falling as they do under DPO",
     "arXiv:2402.05369", UNREAD, "alike", "nca_pair", "sigmoid", "drift", 1),
    ("EXO beats DPO",
     "arXiv:2402.00856", UNREAD, "clean", "exo_pair", "sigmoid", "regret", -1),
    ("DiscoPOP beats DPO",
     "arXiv:2406.08414", UNREAD, "clean", "discopop", "sigmoid", "regret", -1),
    ("ORPO (likelihood of the reply only), without a reference, beats DPO",
     "arXiv:2403.07691", mistral(14.7), "clean", "orpo", "sigmoid", "regret", -1),
)]


def world_claims():
    "The claims that the enumerable worlds can answer."
    from dpo_literate.one_world import TEST, recorded_comparison
    rows, comparison = [], recorded_comparison()
    for c in CLAIMS:
        table = comparison[c.judge]
        edges = [m for m in (c.name, c.other) if table[m]["edge"]]
        at = f"; at the edge of its grid: {', '.join(edges)}" if edges else ""
        rows.append(claim_row(
            c.claim, c.source, c.figure, gap(table[c.name][c.key], table[c.other][c.key]),
            line(c.wanted), unit="world", seeds=len(TEST),
            setup=f"{len(TEST)} enumerable worlds, judge '{c.judge}': {c.key} of {c.name} minus "
                  f"{c.other}{at}",
            command=f"python benchmarks/variants.py world --condition {c.judge}"))
    return rows + [imbalance_claim(comparison["clean"]["sigmoid"]["regret"], len(TEST))]


def imbalance_claim(dpo, seeds):
    kto = load_result("variants_imbalance", quiet=True)["tenth_weighed"]["regret"]
    return claim_row("KTO with a tenth of the good replies is no worse than DPO on all pairs "
                     "(regret at most .05 above)",
                     "arXiv:2402.01306", "up to 90 % fewer desirable replies without loss",
                     gap(kto, dpo), below(.05), unit="world", seeds=seeds,
                     setup=f"{seeds} enumerable worlds, judge 'clean', desirable weight 10: "
                           "regret minus DPO's",
                     command="python benchmarks/variants.py imbalance")


def judge():
    "Page, and its claims, from the committed records."
    return "20c_one_world", world_claims() + scan_claims()


def claims(args):
    publish(judge)


class ScanClaim(NamedTuple):
    claim: str
    source: str
    figure: str   # the paper's
    one: tuple    # loss, and its beta: "low", "high" or "best"
    other: tuple  # what it is compared with
    key: str      # which measurement, a key of `UNITS`
    wanted: int   # sign that the claim asks of the difference


POST = "Preference Tuning LLMs with DPO methods"

SCAN_CLAIMS = [ScanClaim(*fields) for fields in (
    ("DPO ends further from the reference when beta is smaller",
     "arXiv:2305.18290", "theory: beta is the price of a nat",
     ("sigmoid", "low"), ("sigmoid", "high"), "kls", 1),
    ("DPO earns more reward when beta is smaller",
     POST, "Zephyr: best at the smallest beta; OpenHermes: at 0.6",
     ("sigmoid", "low"), ("sigmoid", "high"), "rewards", 1),
    ("KTO on pairs earns more than DPO, each at its best beta",
     POST, "Zephyr: all but one setting; OpenHermes: DPO above KTO",
     ("kto_pair", "best"), ("sigmoid", "best"), "rewards", 1),
    ("DPO earns more than IPO, each at its best beta",
     POST, "OpenHermes: DPO above KTO above IPO",
     ("sigmoid", "best"), ("ipo", "best"), "rewards", 1),
    ("IPO averaged over tokens earns more than IPO summed, each at its best beta",
     POST, "erratum of the post: averaged, not summed",
     ("ipo", "best"), ("ipo_sum", "best"), "rewards", 1),
    ("SimPO earns more than DPO, each at its best beta",
     "arXiv:2405.14734", mistral(21.4), ("simpo", "best"), ("sigmoid", "best"), "rewards", 1),
    ("ORPO (reply only), without a reference, earns more than DPO, each at its best beta",
     "arXiv:2403.07691", mistral(14.7), ("orpo", "best"), ("sigmoid", "best"), "rewards", 1),
    ("ORPO (reply only) keeps the chosen replies from falling as they do under DPO",
     "arXiv:2403.07691", UNREAD, ("orpo", "low"), ("sigmoid", "low"), "chosen_drift", 1),
    ("robust DPO, told of 10 % of flips that are not there, earns less than DPO",
     "arXiv:2403.00409", "theory: unbiased under flips, more variance",
     ("robust", "best"), ("sigmoid", "best"), "rewards", -1),
)]

UNITS = dict(rewards="reward (VADER, -1 to 1)", kls="KL (nat a reply)",
             chosen_drift="drift of the chosen replies (nat)")


def chosen_beta(runs, loss, which):
    "A run at the lowest or highest beta, or at the one that earns most on every second prompt."
    mine = sorted((r for r in runs if r["loss"] == loss), key=lambda r: r["beta"])
    best = max(mine, key=lambda r: mean(r["rewards"][::2]))
    return {"low": mine[0], "high": mine[-1], "best": best}[which]


def scan_values(runs, one, other, key):
    """Differences by seed, by prompt (None for a drift, which has no prompts), and the two betas.

    A best beta is chosen on every second prompt and judged on the others."""
    a, b = chosen_beta(runs, *one), chosen_beta(runs, *other)
    best = "best" in (one[1], other[1])
    part = dict(rewards="judged" if best else "reward", kls="kl").get(key, key)
    judged = slice(1, None, 2) if best else slice(None)
    items = gap(a[key][judged], b[key][judged]) if key in ("rewards", "kls") else None
    return gap(a[part], b[part]), items, f"beta {a['beta']} against {b['beta']}"


def scan_claims():
    "The claims that the scan can answer."
    record, rows = load_result("variants_scan", quiet=True), []
    for c in SCAN_CLAIMS:
        values, items, betas = scan_values(record["runs"], c.one, c.other, c.key)
        rows.append(claim_row(
            c.claim, c.source, c.figure, values, line(c.wanted), items=items,
            seeds=len(record["_provenance"]["seed"]), command="python benchmarks/variants.py scan",
            setup=f"bundled model, controlled sentiment: {UNITS[c.key]} of {c.one[0]} minus "
                  f"{c.other[0]}, {betas}"))
    return rows


# ------------------------------------------------------------ a real model

def asked(args):
    "Everything a run of the scan depends on besides loss, beta and seed."
    names = ("model", "pairs", "steps", "batch", "lr", "held", "prompts", "limit", "reward",
             "label_smoothing")
    return {k: getattr(args, k) for k in names}


def prepare(args):
    """One base model for all runs: in float32 to train from, in bfloat16 to draw from and to
    measure distance to; pairs and prompts."""
    from dpo_literate.align import AlignConfig, begin, make_rows, policy_at, replies_of
    from dpo_literate.models import load_model
    from dpo_literate.runs import Stages
    config = AlignConfig(model=args.model, pairs=args.pairs, reward=args.reward, out=args.demo)
    run = begin(config)
    run.stages, ref = Stages(Path(args.demo) / "work"), policy_at(run)
    before = None
    if not args.pairs:
        before = replies_of(run, ref, run.model_hash, "before", run.held, run.config.per_prompt)
    rows, held = make_rows(run, ref, before)
    return SimpleNamespace(run=run, base=load_model(args.model), ref=ref, rows=rows,
                           held=held[:args.held], prompts=run.held[:args.prompts], layout=None)


def answers(at, policy, args, seed):
    "One reply to each held-out prompt: its reward, distance from the reference (nat), length."
    from dpo_literate.align import score
    from dpo_literate.sampling import kl_per_reply, prompt_tokens, sample
    tokenizer = at.run.tokenizer
    said = sample(policy, tokenizer, at.prompts, per_prompt=1, limit=args.limit, seed=seed)
    asked = [prompt_tokens(p, tokenizer) for p in at.prompts]
    ids = [r["ids"] for rs in said for r in rs]
    parts = [slice(k, k + 8) for k in range(0, len(ids), 8)]
    kl = torch.cat([kl_per_reply(policy, at.ref, asked[k], ids[k], .7)[0] for k in parts])
    rewards = [r for rs in score(at.run.reward, at.prompts, said) for r in rs]
    return dict(rewards=rounded(rewards), kls=rounded(kl.double().tolist()),
                length=mean([len(i) for i in ids]))


def known(at, args):
    "How probable the base model finds the held-out replies: mean of chosen and rejected (nat)."
    from dpo_literate.models import read_reference
    from dpo_literate.packing import pack_rows
    groups = [at.held[k:k + args.batch] for k in range(0, len(at.held), args.batch)]
    with torch.autocast("cpu", torch.bfloat16):
        table = read_reference(at.base, [b for rows in groups for b in pack_rows(rows)])
    return torch.tensor(list(table.values())).mean(0).tolist()


def training(args, loss, beta, seed):
    "Settings of one run."
    from dpo_literate.trainer import DPOConfig
    return DPOConfig(
        str(repo_dir() / "runs" / "variants" / f"seed{seed}"), loss_type=loss, beta=beta,
        label_smoothing=args.label_smoothing if loss == "robust" else 0.,
        learning_rate=args.lr, seed=seed, per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch, max_steps=args.steps, bf16=True, use_cpu=True,
        lr_scheduler_type="cosine", warmup_steps=max(1, args.steps // 10),
        logging_steps=args.steps, save_strategy="no", report_to=[], disable_tqdm=True,
        max_length=None)


def fit(at, args, loss, beta, seed):
    """A fresh adapter trained with one loss; runs of a seed share folder, adapter and pairs, so
    the reference is read for the first of them only."""
    import peft
    from dpo_literate.step import epoch_order
    from dpo_literate.trainer import DPOTrainer
    from transformers import PrinterCallback
    rows = [at.rows[i] for i in epoch_order(len(at.rows), seed, 0)[:args.steps * args.batch]]
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear",
                           task_type="CAUSAL_LM")
    trainer = DPOTrainer(copy.deepcopy(at.base), args=training(args, loss, beta, seed),
                         train_dataset=rows, eval_dataset=at.held,
                         processing_class=at.run.tokenizer, peft_config=lora)
    trainer.remove_callback(PrinterCallback)
    if at.layout: trainer.layout_check = lambda model, rows: at.layout.why_padded # asked once:
    trainer.train()                              # every run has the same model and kind of rows
    at.layout = trainer.step.layout
    return trainer


def one_run(at, args, before, loss, beta, seed):
    "Train with one loss; held-out accuracy and drift, and what the policy says."
    start, trainer = time.process_time(), fit(at, args, loss, beta, seed)
    found = trainer.evaluate()
    policy = trainer.model.merge_and_unload().to(torch.bfloat16).eval()
    drift = {f"{side}_drift": found[f"eval_logps/{side}"] - x
             for side, x in zip(("chosen", "rejected"), before)}
    del trainer; gc.collect()  # a trainer and its model hold each other
    said = answers(at, policy, args, seed)
    seconds = round(time.process_time() - start, 1)  # of the processor: what a quiet core takes
    return dict(accuracy=found["eval_rewards/accuracies"], **drift, **said, seconds=seconds)


class Scan:
    "The parts of a scan, from disk or made now while there is time."
    def __init__(self, args):
        from dpo_literate.runs import Stages
        self.args, self.start, self.left, self._at = args, time.time(), 0, None
        self.stages = Stages(repo_dir() / "runs" / "variants")

    def at(self):
        self._at = self._at or prepare(self.args)
        return self._at

    def part(self, name, key, make):
        "A part under its name and key; None, and counted, where it may not be made."
        late = self.args.record or time.time() - self.start > 60 * self.args.minutes
        def never(): raise TimeoutError
        try: return self.stages.do(name, asked(self.args) | key, never if late else make)
        except TimeoutError:
            self.left += 1
            return None


def shown(row, loss, beta, seed):
    return (f"seed {seed}  {loss:9s} beta {beta:<5}  reward {mean(row['rewards']):.3f}  "
            f"KL {mean(row['kls']):6.2f}  accuracy {row['accuracy']:.2f}  {row['seconds']:.0f} s")


def scan(args):
    "Run what is missing of the scan, or record it."
    from transformers.utils import logging
    logging.set_verbosity_error(); logging.disable_progress_bar()
    parts, seeds, found, begun = Scan(args), range(args.seeds), {}, {}
    before = parts.part("known", {}, lambda: known(parts.at(), args))
    if before is None:
        raise Refusal("nothing of this scan is there: run it without --record")
    for seed in seeds:
        def start(): return answers(parts.at(), parts.at().ref, args, seed)
        said = parts.part("start", dict(seed=seed), start)
        if said is not None: begun[seed] = said
    cells = [(loss, beta, seed) for seed in seeds for loss in args.losses
             for beta in args.betas or SCAN[loss]]
    for loss, beta, seed in cells:
        def run(): return one_run(parts.at(), args, before, loss, beta, seed)
        row = parts.part("run", dict(loss=loss, beta=beta, seed=seed), run)
        if row is None: continue
        found[loss, beta, seed] = row
        if not args.record: print(shown(row, loss, beta, seed), flush=True)
    if not args.record: return print(f"{len(found)} of {len(cells)} runs are there")
    if parts.left:
        raise Refusal(f"{parts.left} parts of the scan are missing: run it without --record")
    record(args, found, begun)


def record(args, found, begun):
    "The scan as one file: means of each run, rewards and distances of each prompt over the seeds."
    seeds = list(begun)
    def over(rows, key):
        return rounded(torch.tensor([r[key] for r in rows], dtype=torch.float64).mean(0).tolist())
    def each(rows, f): return rounded([f(r) for r in rows])
    runs, plain = [], ("accuracy", "chosen_drift", "rejected_drift", "length")
    for loss, beta in dict.fromkeys((loss, beta) for loss, beta, seed in found if seed == seeds[0]):
        rows = [found[loss, beta, seed] for seed in seeds]
        runs.append(dict(
            loss=loss, beta=beta, rewards=over(rows, "rewards"), kls=over(rows, "kls"),
            **{k: rounded([r[k] for r in rows]) for k in plain},
            reward=each(rows, lambda r: mean(r["rewards"])),
            judged=each(rows, lambda r: mean(r["rewards"][1::2])),
            kl=each(rows, lambda r: mean(r["kls"]))))
    first = list(begun.values())
    before = dict(rewards=over(first, "rewards"), reward=each(first, lambda r: mean(r["rewards"])))
    print(save_result(
        "variants_scan", dict(before=before, runs=runs), seed=seeds,
        command="python benchmarks/variants.py scan", config=asked(args) | {"losses": args.losses},
        seconds=sum(r["seconds"] for r in found.values()),
        what="held-out reward and KL (one reply a prompt), accuracy and drift of each loss, beta "
             "and seed: controlled sentiment on the bundled model"))


def add_scan(p):
    "Arguments of `scan`."
    p.set_defaults(run=scan)
    p.add_argument("--pairs", help="a file of pairs; without it those of the demo")
    p.add_argument("--demo", default="runs/demo", help="folder of the demo")
    p.add_argument("--model", default="bundled")
    p.add_argument("--losses", nargs="*", default=list(SCAN))
    p.add_argument("--betas", nargs="*", type=float)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=16)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--lr", type=float, default=4e-4)
    p.add_argument("--held", type=int, default=24, help="held-out pairs: accuracy and drift")
    p.add_argument("--prompts", type=int, default=40, help="held-out prompts, one reply each")
    p.add_argument("--limit", type=int, default=24, help="most tokens of such a reply")
    p.add_argument("--reward", default="vader")
    p.add_argument("--label-smoothing", type=float, default=.1, help="of robust")
    p.add_argument("--minutes", type=float, default=1e9, help="begin no further run after these")
    p.add_argument("--record", action="store_true")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    judges = commands.add_parser("world")
    judges.add_argument("--condition", nargs="*")
    judges.add_argument("--edges", action="store_true",
                        help="keep the rows of the committed record whose setting lies inside its "
                             "grid")
    judges.set_defaults(run=world)
    commands.add_parser("imbalance").set_defaults(run=imbalance)
    commands.add_parser("claims").set_defaults(run=claims)
    add_scan(commands.add_parser("scan"))
    args = parser.parse_args(argv)
    try: args.run(args)
    except Refusal as no: sys.exit(str(no))


if __name__ == "__main__": main()
