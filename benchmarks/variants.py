"""The races of page 20c, its claims, and the same losses on a real model.

    python benchmarks/variants.py world [--condition clean ...]   every loss under every judge: nbs/results/variants_world_*.json (under 10 min)
    python benchmarks/variants.py imbalance                       KTO with a tenth of its good replies: variants_imbalance.json
    python benchmarks/variants.py claims                          judge the claims from those: claims_20c_one_world.json
    python benchmarks/variants.py scan [--minutes 8] [...]        seven losses x three beta x three seeds on the bundled model, resumable
    python benchmarks/variants.py scan --record                   gather them into variants_scan.json

The scan trains on the demo's pairs: replies of the bundled model, ranked by VADER. They are read from runs/demo where the demo was run
and sampled anew where it was not. Another file of pairs: --pairs FILE. A finished run is kept under runs/variants/ and not run again.
"""
import argparse
import copy
import gc
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from dpo_literate.results import Refusal, bootstrap_interval, repo_dir, results_dir, save_claims, save_result

SCAN = {"sigmoid": (.05, .1, .3), "ipo_sum": (.01, .05, .1), "ipo": (.1, .3, 1.), "kto_pair": (.05, .1, .3), "simpo": (2., 5., 10.), "orpo": (.1, .5, 1.), "robust": (.05, .1, .3)}


def rounded(value): return [round(v, 4) for v in value] if isinstance(value, list) else value


def world(args):
    from dpo_literate.one_world import CONDITIONS, PRICE, TEST, TUNE, contest, methods
    for name in args.condition or CONDITIONS:
        start, out, every = time.time(), {}, methods()
        for m, method in every.items():
            out[m] = {k: rounded(v) for k, v in contest(method, CONDITIONS[name]).items()}
            mean = sum(out[m]["regret"]) / len(TEST)
            print(f"{name:9s} {m:18s} knob {out[m]['knob']:<5} regret {mean:6.3f}  {time.time() - start:5.0f} s", flush=True)
        print(save_result(f"variants_world_{name}", out, command=f"python benchmarks/variants.py world --condition {name}",
                          config=dict(condition=asdict(CONDITIONS[name]), steps=300, lr=.05, price=PRICE, tune=[TUNE.start, TUNE.stop],
                                      grids={m: [method.loss, method.knob, str(method.grid), str(method.settings)] for m, method in every.items()}),
                          seed=list(TEST), seconds=time.time() - start, what=f"regret, reward, KL, drift of chosen replies and length of every loss in ten enumerable worlds: {CONDITIONS[name].about}"))


def imbalance(args):
    from dpo_literate.one_world import CONDITIONS, TEST, contest, methods
    start, kto = time.time(), methods()["kto"]
    runs = dict(all=(1., {}), tenth=(.1, {}), tenth_weighed=(.1, dict(desirable_weight=10.)))
    out = {k: {a: rounded(v) for a, v in contest(replace(kto, settings=s), CONDITIONS["clean"], good=good).items()} for k, (good, s) in runs.items()}
    print(save_result("variants_imbalance", out, command="python benchmarks/variants.py imbalance", config={k: [g, s] for k, (g, s) in runs.items()}, seed=list(TEST),
                      seconds=time.time() - start, what="KTO on clean verdicts with all good replies, with a tenth of them, and with a tenth at ten times the weight"))


# ------------------------------------------------------------ claims

def difference(ours, other):
    "Mean and interval of a difference in the same worlds."
    gap = torch.tensor(ours, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    return gap.mean().item(), *bootstrap_interval(gap)


def verdict(low, high, wanted):
    "`wanted` is the sign that the claim asks of the difference."
    if low <= 0 <= high: return "too small to tell"
    return "held" if (low > 0) == (wanted > 0) else "did not hold"


CLAIMS = [  # claim, source, paper's figure, judge, method, other, key, wanted sign
    ("IPO stays closer to the best policy than DPO when the judge hardly errs", "arXiv:2310.12036", "theory: a finite margin at p = 1", "certain", "ipo_sum", "sigmoid", "regret", -1),
    ("IPO stays closer to the reference than DPO when the judge hardly errs", "arXiv:2310.12036", "theory: DPO's KL is unbounded at p = 1", "certain", "ipo_sum", "sigmoid", "kl", -1),
    ("robust DPO beats DPO when 20 % of labels are flipped", "arXiv:2403.00409", "theory: unbiased under flips", "flipped", "robust", "sigmoid", "regret", -1),
    ("robust DPO beats conservative DPO when 20 % of labels are flipped", "arXiv:2403.00409", "figure not read", "flipped", "robust", "cdpo", "regret", -1),
    ("KTO beats DPO on noisy labels", "arXiv:2402.01306", "advice of the paper; Mistral-Base AlpacaEval 2 LC 13.1 against DPO's 15.1 in SimPO's table", "flipped", "kto", "sigmoid", "regret", -1),
    ("beta-DPO beats DPO on noisy labels", "arXiv:2407.08639", "figure not read", "flipped", "beta_dpo", "sigmoid", "regret", -1),
    ("SimPO writes shorter than DPO under a judge who likes length", "arXiv:2405.14734", "Mistral-Base AlpacaEval 2 LC 21.4 against DPO's 15.1", "lengthy", "simpo", "sigmoid", "length", -1),
    ("SimPO beats DPO under a judge who likes length", "arXiv:2405.14734", "Mistral-Base AlpacaEval 2 LC 21.4 against DPO's 15.1", "lengthy", "simpo", "sigmoid", "regret", -1),
    ("R-DPO (told the price of a token) writes shorter than DPO under that judge", "arXiv:2403.19159", "up to +15-20 % length-controlled win rate (second-hand)", "lengthy", "r_dpo", "sigmoid", "length", -1),
    ("R-DPO (told the price of a token) beats DPO under that judge", "arXiv:2403.19159", "Mistral-Base AlpacaEval 2 LC 17.4 against DPO's 15.1", "lengthy", "r_dpo", "sigmoid", "regret", -1),
    ("DPOP keeps the chosen replies from falling as they do under DPO", "arXiv:2402.13228", "figure not read", "alike", "dpop", "sigmoid", "drift", 1),
    ("DPOP beats DPO on look-alike pairs", "arXiv:2402.13228", "figure not read", "alike", "dpop", "sigmoid", "regret", -1),
    ("DPO plus likelihood (RPO) keeps the chosen replies from falling as they do under DPO", "arXiv:2404.19733", "chosen log-probability rises with the likelihood term (second-hand)", "alike", "rpo", "sigmoid", "drift", 1),
    ("Cal-DPO keeps the chosen replies from falling as they do under DPO", "arXiv:2412.14516", "figure not read", "alike", "cal_dpo", "sigmoid", "drift", 1),
    ("NCA keeps the chosen replies from falling as they do under DPO", "arXiv:2402.05369", "figure not read", "alike", "nca_pair", "sigmoid", "drift", 1),
    ("EXO beats DPO", "arXiv:2402.00856", "figure not read", "clean", "exo_pair", "sigmoid", "regret", -1),
    ("DiscoPOP beats DPO", "arXiv:2406.08414", "figure not read", "clean", "discopop", "sigmoid", "regret", -1),
    ("ORPO, without a reference, beats DPO", "arXiv:2403.07691", "Mistral-Base AlpacaEval 2 LC 14.7 against DPO's 15.1", "clean", "orpo", "sigmoid", "regret", -1),
]


def claims(args):
    from dpo_literate.one_world import TEST, recorded
    from dpo_literate.results import load_result
    rows, races = [], recorded()
    for claim, source, figure, judge, name, other, key, wanted in CLAIMS:
        mean, low, high = difference(races[judge][name][key], races[judge][other][key])
        rows.append(dict(claim=claim, source=source, paper_figure=figure, setup=f"ten enumerable worlds, judge '{judge}': {key} of {name} minus {other}", ours=round(mean, 3),
                         low=round(low, 3), high=round(high, 3), seeds=len(TEST), verdict=verdict(low, high, wanted), command=f"python benchmarks/variants.py world --condition {judge}"))
    mean, low, high = difference(load_result("variants_imbalance", quiet=True)["tenth_weighed"]["regret"], races["clean"]["sigmoid"]["regret"])
    rows.append(dict(claim="KTO with a tenth of the good replies is no worse than DPO on all pairs", source="arXiv:2402.01306", paper_figure="up to 90 % fewer desirable replies without loss",
                     setup="ten enumerable worlds, judge 'clean', desirable weight 10: regret minus DPO's", ours=round(mean, 3), low=round(low, 3), high=round(high, 3),
                     seeds=len(TEST), verdict="held" if high <= 0 else "did not hold" if low > 0 else "too small to tell", command="python benchmarks/variants.py imbalance"))
    rows += scan_claims() if (results_dir() / "variants_scan.json").is_file() else []
    print(save_claims("20c_one_world", rows))
    for r in rows: print(f"{r['verdict']:18s} {r['ours']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]  {r['claim']}")


SCAN_CLAIMS = [  # claim, source, paper's figure, loss and beta, other loss and beta, key, wanted sign
    ("DPO ends further from the reference when beta is smaller", "arXiv:2305.18290", "theory: beta is the price of a nat", ("sigmoid", "low"), ("sigmoid", "high"), "kls", 1),
    ("DPO earns more reward when beta is smaller", "Preference Tuning LLMs with DPO methods", "Zephyr: best at the smallest beta; OpenHermes: at 0.6", ("sigmoid", "low"), ("sigmoid", "high"), "rewards", 1),
    ("KTO on pairs earns more than DPO, each at its best beta", "Preference Tuning LLMs with DPO methods", "Zephyr: all but one setting; OpenHermes: DPO above KTO", ("kto_pair", "best"), ("sigmoid", "best"), "rewards", 1),
    ("DPO earns more than IPO, each at its best beta", "Preference Tuning LLMs with DPO methods", "OpenHermes: DPO above KTO above IPO", ("sigmoid", "best"), ("ipo", "best"), "rewards", 1),
    ("IPO averaged over tokens earns more than IPO summed, each at its best beta", "Preference Tuning LLMs with DPO methods", "erratum of the post: averaged, not summed", ("ipo", "best"), ("ipo_sum", "best"), "rewards", 1),
    ("SimPO earns more than DPO, each at its best beta", "arXiv:2405.14734", "Mistral-Base AlpacaEval 2 LC 21.4 against DPO's 15.1", ("simpo", "best"), ("sigmoid", "best"), "rewards", 1),
    ("ORPO, without a reference, earns more than DPO, each at its best beta", "arXiv:2403.07691", "Mistral-Base AlpacaEval 2 LC 14.7 against DPO's 15.1", ("orpo", "best"), ("sigmoid", "best"), "rewards", 1),
    ("ORPO keeps the chosen replies from falling as they do under DPO", "arXiv:2403.07691", "figure not read", ("orpo", "low"), ("sigmoid", "low"), "chosen_drift", 1),
    ("robust DPO, told of 10 % of flips that are not there, earns less than DPO", "arXiv:2403.00409", "theory: unbiased under flips, more variance", ("robust", "best"), ("sigmoid", "best"), "rewards", -1)]


def chosen_beta(runs, loss, which):
    "A run of the scan: at the lowest or highest beta, or at the one that earns most on every second prompt."
    mine = sorted((r for r in runs if r["loss"] == loss), key=lambda r: r["beta"])
    return {"low": mine[0], "high": mine[-1], "best": max(mine, key=lambda r: mean(r["rewards"][::2]))}[which]


UNITS = dict(rewards="reward (VADER, -1 to 1)", kls="KL (nat a reply)", chosen_drift="drift of the chosen replies (nat)")


def scan_claim(runs, one, other, key, wanted):
    "Difference, interval over prompts (of a drift: over seeds) and verdict: a best beta is chosen on every second prompt and judged on the others, and the seeds must agree."
    a, b, best = chosen_beta(runs, *one), chosen_beta(runs, *other), "best" in (one[1], other[1])
    judged = slice(1, None, 2) if best else slice(None)
    gap = difference(a[key][judged], b[key][judged])
    part = dict(rewards="judged" if best else "reward", kls="kl").get(key, key)
    agree = len({x > y for x, y in zip(a[part], b[part])}) == 1
    return *gap, verdict(*gap[1:], wanted) if agree else "too small to tell", f"beta {a['beta']} against {b['beta']}"


def scan_claims():
    "The claims that the scan can answer."
    from dpo_literate.results import load_result
    record, rows = load_result("variants_scan", quiet=True), []
    for claim, source, figure, one, other, key, wanted in SCAN_CLAIMS:
        ours, low, high, said, betas = scan_claim(record["runs"], one, other, key, wanted)
        rows.append(dict(claim=claim, source=source, paper_figure=figure, setup=f"bundled model, controlled sentiment: {UNITS[key]} of {one[0]} minus {other[0]}, {betas}", ours=round(ours, 3), low=round(low, 3),
                         high=round(high, 3), seeds=len(record["_provenance"]["seed"]), verdict=said, command="python benchmarks/variants.py scan"))
    return rows


# ------------------------------------------------------------ a real model

def told(args):
    "Everything a run of the scan depends on besides loss, beta and seed."
    return {k: getattr(args, k) for k in ("model", "pairs", "steps", "batch", "lr", "held", "prompts", "limit", "reward", "label_smoothing")}


def prepare(args):
    "One base model for all runs: in float32 to train from, in bfloat16 to draw from and to measure distance to; pairs and prompts."
    from dpo_literate.align import AlignConfig, begin, make_rows, policy_at, replies_of
    from dpo_literate.models import load_model
    from dpo_literate.runs import Stages
    run = begin(AlignConfig(model=args.model, pairs=args.pairs, reward=args.reward, out=args.demo))
    run.stages, ref = Stages(Path(args.demo) / "work"), policy_at(run)
    before = None if args.pairs else replies_of(run, ref, run.model_hash, "before", run.held, run.config.per_prompt)
    rows, held = make_rows(run, ref, before)
    return SimpleNamespace(run=run, base=load_model(args.model), ref=ref, rows=rows, held=held[:args.held], prompts=run.held[:args.prompts], layout=None)


def answers(at, policy, args, seed):
    "One reply to each held-out prompt: its reward, its distance from the reference (nat), its length."
    from dpo_literate.align import score
    from dpo_literate.sampling import kl_per_reply, prompt_tokens, sample
    said = sample(policy, at.run.tokenizer, at.prompts, per_prompt=1, limit=args.limit, seed=seed)
    asked, ids = [prompt_tokens(p, at.run.tokenizer) for p in at.prompts], [r["ids"] for rs in said for r in rs]
    kl = torch.cat([kl_per_reply(policy, at.ref, asked[k:k + 8], ids[k:k + 8], .7)[0] for k in range(0, len(ids), 8)])
    return dict(rewards=rounded([r for rs in score(at.run.reward, at.prompts, said) for r in rs]), kls=rounded(kl.double().tolist()), length=sum(map(len, ids)) / len(ids))


def known(at, args):
    "How probable the base model finds the held-out replies: mean of the chosen and of the rejected (nat)."
    from dpo_literate.models import read_reference
    from dpo_literate.packing import pack_rows
    with torch.autocast("cpu", torch.bfloat16): table = read_reference(at.base, [b for k in range(0, len(at.held), args.batch) for b in pack_rows(at.held[k:k + args.batch])])
    return torch.tensor(list(table.values())).mean(0).tolist()


def fit(at, args, loss, beta, seed):
    "A fresh adapter trained with one loss; runs of a seed share folder, adapter and pairs, so the reference is read for the first of them only."
    import peft
    from dpo_literate.trainer import DPOConfig, DPOTrainer, epoch_order
    from transformers import PrinterCallback
    rows = [at.rows[i] for i in epoch_order(len(at.rows), seed, 0)[:args.steps * args.batch]]
    config = DPOConfig(str(repo_dir() / "runs" / "variants" / f"seed{seed}"), loss_type=loss, beta=beta, label_smoothing=args.label_smoothing if loss == "robust" else 0.,
                       learning_rate=args.lr, seed=seed, per_device_train_batch_size=args.batch, per_device_eval_batch_size=args.batch, max_steps=args.steps, bf16=True, use_cpu=True,
                       lr_scheduler_type="cosine", warmup_steps=max(1, args.steps // 10), logging_steps=args.steps, save_strategy="no", report_to=[], disable_tqdm=True, max_length=None)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(copy.deepcopy(at.base), args=config, train_dataset=rows, eval_dataset=at.held, processing_class=at.run.tokenizer, peft_config=lora)
    trainer.remove_callback(PrinterCallback)
    trainer.layout = at.layout      # asked once: every run has the same model and the same kind of rows
    trainer.train()
    at.layout = trainer.layout
    return trainer


def one_run(at, args, before, loss, beta, seed):
    "Train with one loss; held-out accuracy and drift, and what the policy says."
    start, trainer = time.process_time(), fit(at, args, loss, beta, seed)
    found = trainer.evaluate()
    policy = trainer.model.merge_and_unload().to(torch.bfloat16).eval()
    drift = {f"{side}_drift": found[f"eval_logps/{side}"] - x for side, x in zip(("chosen", "rejected"), before)}
    del trainer; gc.collect()       # a trainer and its model hold each other
    return dict(accuracy=found["eval_rewards/accuracies"], **drift, **answers(at, policy, args, seed), seconds=round(time.process_time() - start, 1))  # of the processor: what a quiet core would take


def scan(args):
    from dpo_literate.runs import Stages
    from transformers.utils import logging
    logging.set_verbosity_error(); logging.disable_progress_bar()
    stages, start, at, left = Stages(repo_dir() / "runs" / "variants"), time.time(), None, 0
    def late(): raise TimeoutError
    def ready():
        nonlocal at
        at = at or prepare(args)
        return at
    def made(name, key, make):
        "A part of the scan, from disk or made now; TimeoutError where there is no time left."
        return stages.do(name, told(args) | key, late if args.record or time.time() - start > 60 * args.minutes else make)
    seeds = range(args.seeds)
    cells = [(loss, beta, seed) for seed in seeds for loss in args.losses for beta in args.betas or SCAN[loss]]
    found, begun = {}, {}
    try: before = made("known", {}, lambda: known(ready(), args))
    except TimeoutError: raise Refusal("nothing of this scan is there: run it without --record") from None
    for seed in seeds:
        try: begun[seed] = made("start", dict(seed=seed), lambda: answers(ready(), ready().ref, args, seed))
        except TimeoutError: left += 1
    for loss, beta, seed in cells:
        try: row = found[loss, beta, seed] = made("run", dict(loss=loss, beta=beta, seed=seed), lambda: one_run(ready(), args, before, loss, beta, seed))
        except TimeoutError: left += 1; continue
        if not args.record: print(f"seed {seed}  {loss:9s} beta {beta:<5}  reward {mean(row['rewards']):.3f}  KL {mean(row['kls']):6.2f}  accuracy {row['accuracy']:.2f}  {row['seconds']:.0f} s", flush=True)
    if not args.record: print(f"{len(found)} of {len(cells)} runs are there"); return
    if left: raise Refusal(f"{left} parts of the scan are missing: run it without --record")
    record(args, found, begun)


def mean(values): return sum(values) / len(values)


def record(args, found, begun):
    "The scan as one file: means of each run, and rewards and distances of each prompt over the seeds."
    seeds = list(begun)
    over = lambda rows, key: rounded(torch.tensor([r[key] for r in rows], dtype=torch.float64).mean(0).tolist())
    groups = {(loss, beta): [found[loss, beta, s] for s in seeds] for loss, beta, s in found if s == seeds[0]}
    runs = [dict(loss=loss, beta=beta, rewards=over(rows, "rewards"), kls=over(rows, "kls"), **{k: rounded([r[k] for r in rows]) for k in ("accuracy", "chosen_drift", "rejected_drift", "length")},
                 reward=rounded([mean(r["rewards"]) for r in rows]), judged=rounded([mean(r["rewards"][1::2]) for r in rows]), kl=rounded([mean(r["kls"]) for r in rows])) for (loss, beta), rows in groups.items()]
    before = dict(rewards=over(list(begun.values()), "rewards"), reward=rounded([mean(b["rewards"]) for b in begun.values()]))
    print(save_result("variants_scan", dict(before=before, runs=runs), command="python benchmarks/variants.py scan", config=told(args) | {"losses": args.losses}, seed=seeds,
                      seconds=sum(r["seconds"] for r in found.values()), what="held-out reward and KL (one reply a prompt), accuracy and drift of each loss, beta and seed: controlled sentiment on the bundled model"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    w = commands.add_parser("world"); w.add_argument("--condition", nargs="*"); w.set_defaults(run=world)
    commands.add_parser("imbalance").set_defaults(run=imbalance)
    commands.add_parser("claims").set_defaults(run=claims)
    s = commands.add_parser("scan"); s.set_defaults(run=scan)
    s.add_argument("--pairs", help="a file of pairs; without it those of the demo"); s.add_argument("--demo", default="runs/demo", help="folder of the demo")
    s.add_argument("--model", default="bundled"); s.add_argument("--losses", nargs="*", default=list(SCAN)); s.add_argument("--betas", nargs="*", type=float)
    s.add_argument("--seeds", type=int, default=3); s.add_argument("--steps", type=int, default=16); s.add_argument("--batch", type=int, default=8); s.add_argument("--lr", type=float, default=4e-4)
    s.add_argument("--held", type=int, default=24, help="held-out pairs, for accuracy and drift"); s.add_argument("--prompts", type=int, default=40, help="held-out prompts, one reply each")
    s.add_argument("--limit", type=int, default=24, help="most tokens of such a reply"); s.add_argument("--reward", default="vader"); s.add_argument("--label-smoothing", type=float, default=.1, help="of robust")
    s.add_argument("--minutes", type=float, default=1e9, help="begin no further run after these"); s.add_argument("--record", action="store_true")
    args = parser.parse_args(argv)
    try: args.run(args)
    except Refusal as no: sys.exit(str(no))


if __name__ == "__main__": main()
