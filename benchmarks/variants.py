"""The races of page 20c, its claims, and the same losses on a real model.

    python benchmarks/variants.py world [--condition clean ...]   every loss under every judge: nbs/results/variants_world_*.json (under 10 min)
    python benchmarks/variants.py imbalance                       KTO with a tenth of its good replies: variants_imbalance.json
    python benchmarks/variants.py claims                          judge the claims from those: claims_20c_one_world.json
    python benchmarks/variants.py scan --pairs FILE [...]         loss x beta x seed on a language model: one line of JSON a run, resumable
    python benchmarks/variants.py record --runs FILE              the lines of a scan as variants_scan.json
"""
import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dpo_literate.results import Refusal, bootstrap_interval, data_dir, save_claims, save_result

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
    print(save_claims("20c_one_world", rows))
    for r in rows: print(f"{r['verdict']:18s} {r['ours']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]  {r['claim']}")


# ------------------------------------------------------------ a real model

def read_pairs(path, n):
    "Pairs of a file, or of the politeness set in the data folder."
    from dpo_literate.preferences import load_preferences
    if path: return list(load_preferences(path))[:n]
    if data_dir() is None: raise Refusal("no --pairs, and no data folder: set DPO_LITERATE_DATA")
    rows = [json.loads(line) for line in (data_dir() / "polite_pairs" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    def chat(role, text): return [{"role": role, "content": text}]
    pairs = [dict(prompt=chat("user", "\n".join(filter(None, (r["instruction"], r["input"])))), chosen=chat("assistant", r["chosen"]), rejected=chat("assistant", r["rejected"]))
             for r in rows if r["chosen"] != r["rejected"]]
    return pairs[:n]


def one_run(args, loss, beta, seed, train_set, held):
    "Train a fresh adapter with one loss, then score held-out pairs."
    import tempfile

    import peft
    from dpo_literate.models import load_model, load_tokenizer
    from dpo_literate.trainer import DPOConfig, DPOTrainer
    torch.manual_seed(seed)
    model, tokenizer, start = load_model(args.model), load_tokenizer(args.model), time.time()
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(folder, loss_type=loss, beta=beta, label_smoothing=args.label_smoothing if loss == "robust" else 0., learning_rate=args.lr, seed=seed,
                           per_device_train_batch_size=args.batch, per_device_eval_batch_size=args.batch, max_steps=args.steps, lr_scheduler_type="linear", warmup_steps=args.steps // 10,
                           logging_steps=max(1, args.steps // 10), save_strategy="no", report_to="none", disable_tqdm=True, max_length=512, truncation_mode="keep_start")
        trainer = DPOTrainer(model, args=config, train_dataset=train_set, eval_dataset=held, processing_class=tokenizer, peft_config=lora)
        before = trainer.evaluate()
        trainer.train()
        found = trainer.evaluate()
    out = dict(loss=loss, beta=beta, seed=seed, steps=args.steps, seconds=round(time.time() - start, 1), accuracy=found["eval_rewards/accuracies"], eval_loss=found["eval_loss"],
               **{f"{side}_drift": found[f"eval_logps/{side}"] - before[f"eval_logps/{side}"] for side in ("chosen", "rejected")})
    return out | (generated(args, trainer.model, tokenizer, seed) if args.prompts else {})


def generated(args, policy, tokenizer, seed):
    "Reward of fresh replies and their distance from the reference, by the tools of page 11."
    from dpo_literate.align import ask, kl_per_reply, load_reward, sample, score, split_prompts
    from dpo_literate.models import load_model
    prompts, ref = split_prompts()[1][:args.prompts], load_model(args.model).eval()
    policy.eval()
    replies = sample(policy, tokenizer, prompts, per_prompt=2, limit=args.limit, seed=seed)
    rewards = score(load_reward(args.reward)[0], prompts, replies)
    asked, said = [ask(p, tokenizer) for p in prompts for _ in range(2)], [r["ids"] for rs in replies for r in rs]
    kl = torch.cat([kl_per_reply(policy, ref, asked[k:k + 8], said[k:k + 8], .7)[0] for k in range(0, len(asked), 8)])
    return dict(reward=float(torch.tensor(rewards).double().mean()), kl=kl.double().mean().item(), length=sum(map(len, said)) / len(said))


def scan(args):
    pairs = read_pairs(args.pairs, args.n + args.held)
    held, train_set, runs = pairs[:args.held], pairs[args.held:], Path(args.runs)
    done = [json.loads(line) for line in runs.read_text().splitlines()] if runs.exists() else []
    have = {(r["loss"], r["beta"], r["seed"]) for r in done}
    grid = [(loss, beta, seed) for loss in args.losses for beta in (args.betas or SCAN.get(loss, (.1,))) for seed in range(args.seeds)]
    for key in grid:
        if key in have: continue
        row = one_run(args, *key, train_set, held)
        with runs.open("a") as f: f.write(json.dumps(row) + "\n")
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def record(args):
    if not Path(args.runs).is_file(): raise Refusal(f"no file {args.runs}: run the scan first")
    runs = [json.loads(line) for line in Path(args.runs).read_text().splitlines()]
    command = "python benchmarks/variants.py scan " + args.said
    print(save_result("variants_scan", {"runs": runs}, command=command, config=dict(said=args.said, losses=sorted({r["loss"] for r in runs}), steps=runs[0]["steps"]),
                      seed=sorted({r["seed"] for r in runs}), seconds=sum(r["seconds"] for r in runs), what="held-out accuracy, drift, and where asked reward and KL of each loss, beta and seed on a language model"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    w = commands.add_parser("world"); w.add_argument("--condition", nargs="*"); w.set_defaults(run=world)
    commands.add_parser("imbalance").set_defaults(run=imbalance)
    commands.add_parser("claims").set_defaults(run=claims)
    s = commands.add_parser("scan"); s.set_defaults(run=scan)
    s.add_argument("--pairs", help="a file of pairs; without it the politeness set of the data folder")
    s.add_argument("--model", default="bundled"); s.add_argument("--losses", nargs="*", default=list(SCAN)); s.add_argument("--betas", nargs="*", type=float)
    s.add_argument("--seeds", type=int, default=3); s.add_argument("--steps", type=int, default=60); s.add_argument("--batch", type=int, default=8); s.add_argument("--lr", type=float, default=1e-4)
    s.add_argument("--n", type=int, default=400, help="training pairs"); s.add_argument("--held", type=int, default=64, help="held-out pairs")
    s.add_argument("--prompts", type=int, default=0, help="sample this many held-out prompts for reward and KL"); s.add_argument("--limit", type=int, default=40)
    s.add_argument("--reward", default="vader"); s.add_argument("--label-smoothing", type=float, default=.1, help="of robust"); s.add_argument("--runs", default="variants_scan.jsonl")
    r = commands.add_parser("record"); r.add_argument("--runs", default="variants_scan.jsonl"); r.add_argument("--said", default="", help="the options the scan was given"); r.set_defaults(run=record)
    args = parser.parse_args(argv)
    try: args.run(args)
    except Refusal as no: sys.exit(str(no))


if __name__ == "__main__": main()
