"""What DPO does to the bundled model beside what it was asked to do: the recorded runs of pages 30, 31 and 32.

    python benchmarks/probes.py displacement [--seeds 0 1 2] [--minutes 8]   train and read, one small file a cell
    python benchmarks/probes.py tdi [--seeds 0 1 2 3 4] [--minutes 8]
    python benchmarks/probes.py refusal [--seeds 0 1 2] [--minutes 8]
    python benchmarks/probes.py xstest --record                              hold the judges of page 31 against XSTest's labels: seconds, no model
    python benchmarks/probes.py displacement --record                        gather the cells into nbs/results/

A cell is one arm with one seed. A finished cell is kept under runs/probes/ and not run again, so a stopped run goes on where it was;
a cell that was made with other settings is made anew. --record refuses while a cell is missing.
"""
import difflib
import functools
import gzip
import hashlib
import json
import random
import sys
import time

import torch
from cells import above, below, by_seed, claim_row, gathered, key, options, polite_pairs, run_or_record, seconds_of, seeds_of, work

from dpo_literate.models import load_model, load_tokenizer
from dpo_literate.results import Refusal, data_dir, repo_dir, save_claims, save_result
from dpo_literate.rows import encode_pairs

CELLS = repo_dir() / "runs" / "probes"


def cell_path(page, config): return CELLS / f"{page}_{config['arm'].replace(' ', '-')}_{config.get('data', 'all')}_{config['seed']}_{key(config)}.json"


def path_of(page): return functools.partial(cell_path, page)


def summary(values): return ", ".join(f"{k} {v:.3g}" for k, v in values.items() if isinstance(v, float))


def split(kind, seed, train, held):
    "Training and held-out pairs: of the 300 pairs whose replies are most alike (near), or of the others (plain)."
    pairs = polite_pairs()
    alike = [difflib.SequenceMatcher(None, *(p[side][0]["content"].split() for side in ("chosen", "rejected"))).ratio() for p in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -alike[i])      # alike: the share of words kept
    pool = order[:300] if kind == "near" else order[300:]
    random.Random(seed).shuffle(pool)
    return [pairs[i] for i in pool[:train]], [pairs[i] for i in pool[train:train + held]]


# ------------------------------------------------------------ page 32: displacement

SETTINGS = dict(learning_rate=2e-5, beta=.1, per_device_train_batch_size=2, num_train_epochs=1, lr_scheduler_type="constant", logging_steps=1)
KINDS, TRAIN, HELD, CHES = ("near", "plain"), 24, 12, 24
MEMORY = {}


def displacement_configs(seeds):
    from dpo_literate.probes.displacement import REMEDIES
    def cells(kind, *arms): return [dict(arm=arm, data=kind, seed=seed, train=TRAIN, held=HELD, **SETTINGS) for seed in seeds for arm in arms]
    return cells("near", "DPO", *REMEDIES) + cells("plain", "DPO") + [dict(arm="CHES", data="both", seed=seed, pairs=CHES, beta=.1) for seed in seeds]


def start(kind, seed):
    "The model before, its tokenizer, the held-out rows and what the model says of them; kept between the arms of a seed."
    from dpo_literate.probes.displacement import fork_mass, pair_logps
    if MEMORY.get("key") != (kind, seed):
        MEMORY.clear()
        train, held = split(kind, seed, TRAIN, HELD)
        tokenizer, model = load_tokenizer("bundled"), load_model("bundled")
        rows, _ = encode_pairs(held, tokenizer)
        MEMORY.update(key=(kind, seed), train=train, rows=rows, tokenizer=tokenizer, logps=pair_logps(model, rows), mass=fork_mass(model, rows))
    return MEMORY


def displacement_cell(config):
    from transformers import PrinterCallback

    from dpo_literate.probes.displacement import DisplacementMonitor, fork_mass, log_lines, pair_logps, remedy, shift_of
    from dpo_literate.trainer import DPOConfig, DPOTrainer
    if config["arm"] == "CHES": return ches_cell(config)
    before = start(config["data"], config["seed"])
    settings = SETTINGS if config["arm"] == "DPO" else remedy(config["arm"], SETTINGS)
    args = DPOConfig(str(CELLS / "trainer" / f"{config['data']}_{config['seed']}"), seed=config["seed"], save_strategy="no", report_to=[], disable_tqdm=True, **settings)
    monitor = DisplacementMonitor()
    trainer = DPOTrainer("bundled", args=args, train_dataset=before["train"], processing_class=before["tokenizer"], callbacks=[monitor])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.eval()
    shift = pair_logps(trainer.model, before["rows"]) - before["logps"]
    mass = (fork_mass(trainer.model, before["rows"]) - before["mass"]).mean(0).tolist()
    lines = log_lines(trainer.state.log_history)
    return dict(chosen=shift[:, 0].mean().item(), rejected=shift[:, 1].mean().item(), fell=(shift[:, 0] < 0).double().mean().item(),
                accuracy=(shift[:, 0] > shift[:, 1]).double().mean().item(), fork_chosen=mass[0], fork_rejected=mass[1], fork_others=mass[2],
                warned=len(monitor.said), path=[[round(shift_of(x, side, args, lines[0]), 4) for side in ("chosen", "rejected")] for x in lines])


def ches_cell(config):
    "CHES of pairs of both kinds against the first-order movement of their chosen replies."
    from dpo_literate.probes.displacement import ches_scores, one_step_shift, rank_correlation
    model, tokenizer = load_model("bundled"), load_tokenizer("bundled")
    kinds = [split(kind, config["seed"], config["pairs"] // 2, 0)[0] for kind in KINDS]
    rows, _ = encode_pairs([p for pairs in kinds for p in pairs], tokenizer)
    speed = torch.tensor([one_step_shift(model, r, config["beta"]) for r in rows], dtype=torch.float64)
    half, score = len(rows) // 2, ches_scores(model, rows)
    plain = ches_scores(model, rows, normalised=False)
    def rho(x, s=slice(None)): return rank_correlation(x[s], -speed[s]).value
    return dict(rho=rho(score), rho_near=rho(score, slice(0, half)), rho_plain=rho(score, slice(half, None)), rho_unnormalised=rho(plain),
                falls=(speed < 0).double().mean().item(), speed=[round(v, 4) for v in speed.tolist()], score=[round(v, 2) for v in score.tolist()])


def record_displacement(configs):
    cells = gathered(configs, path_of("displacement"))
    seeds = seeds_of(cells)
    def of(arm, kind, name): return [v[name] for v in by_seed(cells, arm=arm, data=kind)]
    command = "python benchmarks/probes.py displacement --record"
    arms = {kind: list(dict.fromkeys(c["config"]["arm"] for c in cells if c["config"]["data"] == kind)) for kind in KINDS}
    names = [k for k, v in next(c for c in cells if c["config"]["arm"] == "DPO")["values"].items() if k != "path"]
    values = dict(arms={kind: {arm: {name: of(arm, kind, name) for name in names} for arm in arms[kind]} for kind in KINDS},
                  paths={kind: {arm: mean_path(of(arm, kind, "path")) for arm in arms[kind]} for kind in KINDS},
                  ches={k: of("CHES", "both", k) for k in ("rho", "rho_near", "rho_plain", "rho_unnormalised", "falls")})
    save_result("displacement", values, command=command, config=dict(**SETTINGS, train=TRAIN, held=HELD, ches_pairs=CHES, kinds=KINDS, model="bundled", data="polite_pairs"),
                seed=seeds, seconds=seconds_of(cells), what="Where the probability of held-out polite pairs goes under DPO and its remedies, bundled model, full fine-tuning")
    setup = f"SmolLM2-135M-Instruct, {TRAIN} polite pairs, 1 epoch, lr {SETTINGS['learning_rate']:g}, {HELD} held out"
    def row(claim, source, paper, values, verdict, setup=setup):
        return claim_row(claim, source, paper, values, verdict, setup=setup, seeds=seeds, command=command)
    near, plain = (of("DPO", kind, "chosen") for kind in KINDS)
    def against(arm, kind="near"): return [a - b for a, b in zip(of(arm, kind, "chosen"), of("DPO", kind, "chosen"))]
    save_claims("displacement", [
        row("DPO makes chosen replies less likely (nat), replies nearly alike", "arXiv:2410.08847 Table 16", "−59.2 / −48.1", near, below()),
        row("DPO makes chosen replies less likely (nat), ordinary pairs", "arXiv:2410.08847 Table 16", "−59.2 / −48.1", plain, below()),
        row("pairs nearly alike displace more: chosen, near minus ordinary (nat)", "arXiv:2410.08847 §5", None, [a - b for a, b in zip(near, plain)], below()),
        row("CHES ranks pairs by the fall of the chosen reply (Spearman's ρ)", "arXiv:2410.08847 §5", None, of("CHES", "both", "rho"), above(), f"SmolLM2-135M-Instruct, {CHES} pairs of both kinds, first-order step"),
        row("a likelihood term raises the chosen reply above DPO's (nat)", "arXiv:2410.08847 Table 16", "+79.4 / +76.7", against("a likelihood term"), above()),
        row("DPOP raises the chosen reply above DPO's (nat)", "arXiv:2402.13228", None, against("DPOP"), above()),
        row("IPO displaces as DPO does: chosen (nat)", "arXiv:2410.08847 Table 3", "alike", of("IPO", "near", "chosen"), below())])


def mean_path(paths): return [[round(sum(p[i][side] for p in paths) / len(paths), 3) for side in (0, 1)] for i in range(min(map(len, paths)))]


# ------------------------------------------------------------ page 30: style

BLOCK, CONTENTS, GRAM, STYLED = 15, 8, 16, ("upper", "polite", "markdown", "bullets", "json")
PENALTY = dict(weight=.7, cap=.3, warmup=1, probes=1)
ARMS = ("DPO", "matched", "isotropic", "wrong", "signal")


def tdi_configs(seeds):
    return [dict(arm=arm, seed=seed, train=TRAIN, held=HELD, block=BLOCK, contents=CONTENTS, gram=GRAM, styles=STYLED, **PENALTY, **SETTINGS)
            for seed in seeds for arm in ARMS]


def styled(tokenizer, pairs):
    "Token ids of each answer, plain and in five styles, and the content of each."
    from dpo_literate.probes.tdi import styled_ids
    ids, labels, styles = styled_ids(tokenizer, pairs)
    keep = [i for i, s in enumerate(styles) if s in ("plain", *STYLED)]
    return [ids[i] for i in keep], [labels[i] for i in keep], [styles[i] for i in keep]


def style_start(seed):
    "What the arms of a seed share: data, the model before as others see it, the directions of style and of content at the block."
    from dpo_literate.probes.displacement import pair_logps
    from dpo_literate.probes.tdi import embed, style_factor
    if MEMORY.get("key") != ("style", seed):
        MEMORY.clear()
        train, held = split("plain", seed, TRAIN, HELD)
        tokenizer, model = load_tokenizer("bundled"), load_model("bundled")
        rows, _ = encode_pairs(held, tokenizer)
        ids, labels, styles = styled(tokenizer, train[:GRAM])
        at = embed(model, ids, BLOCK)
        plain = {l: i for i, (l, s) in enumerate(zip(labels, styles)) if s == "plain"}
        delta = torch.stack([at[i] - at[plain[l]] for i, (l, s) in enumerate(zip(labels, styles)) if s != "plain"])
        seen = styled(tokenizer, held[:CONTENTS])
        MEMORY.update(key=("style", seed), train=train, rows=rows, tokenizer=tokenizer, style=style_factor(delta), contents=at[list(plain.values())],
                      seen=seen, before=embed(model, seen[0]), logps=pair_logps(model, rows))
    return MEMORY


def tdi_cell(config):
    from transformers import PrinterCallback

    from dpo_literate.probes.displacement import pair_logps
    from dpo_literate.probes.tdi import MatchedDPOTrainer, arm_factor, embed, layout_tdi, tdi_change
    from dpo_literate.trainer import DPOConfig, DPOTrainer
    s, seed = style_start(config["seed"]), config["seed"]
    args = DPOConfig(str(CELLS / "trainer" / f"style_{seed}"), seed=seed, save_strategy="no", report_to=[], disable_tqdm=True, **SETTINGS)
    more = dict(train_dataset=s["train"], processing_class=s["tokenizer"], args=args)
    if config["arm"] == "DPO": trainer = DPOTrainer("bundled", **more)
    else: trainer = MatchedDPOTrainer("bundled", factor=arm_factor(config["arm"], s["style"], s["contents"], seed).float(), block=BLOCK, **PENALTY, **more)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.eval()
    after, (_, labels, _) = embed(trainer.model, s["seen"][0]), s["seen"]
    shift = pair_logps(trainer.model, s["rows"]) - s["logps"]
    return dict(before=layout_tdi(s["before"], labels).value, after=layout_tdi(after, labels).value, change=tdi_change(s["before"], after, labels).value,
                accuracy=(shift[:, 0] > shift[:, 1]).double().mean().item(), margin=(shift[:, 0] - shift[:, 1]).mean().item())


def record_tdi(configs):
    cells = gathered(configs, path_of("tdi"))
    seeds, command = seeds_of(cells), "python benchmarks/probes.py tdi --record"
    def of(arm, name): return [v[name] for v in by_seed(cells, arm=arm)]
    names = list(cells[0]["values"])
    save_result("tdi", dict(arms={arm: {name: of(arm, name) for name in names} for arm in ARMS}), command=command,
                config={k: v for k, v in cells[0]["config"].items() if k not in ("arm", "seed")} | dict(model="bundled", data="polite_pairs"), seed=seeds,
                seconds=seconds_of(cells), what="Style TDI (layout form, classes are contents) of held-out answers after DPO with and without penalties of equal trace, bundled model")
    setup = f"SmolLM2-135M-Instruct, {TRAIN} polite pairs, 1 epoch, lr {SETTINGS['learning_rate']:g}; {CONTENTS} held-out answers in {len(STYLED) + 1} styles"
    def row(claim, paper, values, verdict):
        return claim_row(claim, "arXiv:2605.22800", paper, values, verdict, setup=setup, seeds=seeds, command=command)
    def gap(a, b, name="change"): return [x - y for x, y in zip(of(a, name), of(b, name))]
    save_claims("tdi", [
        row("DPO raises Style TDI (after over before)", "≈ 1.3", of("DPO", "change"), above(1.)),
        row("the matched penalty keeps it lower than DPO does (difference)", "preserved", gap("matched", "DPO"), below(0.)),
        row("matched is lower than isotropic (difference)", "matched < isotropic", gap("matched", "isotropic"), below(0.)),
        row("isotropic is lower than the wrong subspace (difference)", "isotropic < wrong-W", gap("isotropic", "wrong"), below(0.)),
        row("penalising content costs margin: signal minus matched (nat)", "hurts the task", gap("signal", "matched", "margin"), below(0.))])


# ------------------------------------------------------------ page 31: refusal

SAFETY = dict(learning_rate=2e-5, per_device_train_batch_size=2, lr_scheduler_type="constant", logging_steps=1)
EPOCHS, BETAS, TWINS, LIMIT = (1, 2, 4), (.03, .5), (8, 24), 20
REFUSAL_ARMS = {"before": dict(epochs=0), "refuse": dict(epochs=4), **{f"beta {b}": dict(beta=b) for b in BETAS},
                **{f"{n} calibration rows": dict(calibration=n) for n in TWINS}, "turned round": dict(reverse=True)}


def refusal_configs(seeds):
    from dpo_literate.probes.refusal import HELD_OUT_CONTRAST, REFUSALS, TRAIN_CONTRAST, WILLING
    texts = hashlib.sha256(json.dumps([TRAIN_CONTRAST, HELD_OUT_CONTRAST, REFUSALS, WILLING]).encode()).hexdigest()[:12]
    base = dict(texts=texts, epochs=2, beta=.1, calibration=0, reverse=False, limit=LIMIT, **SAFETY)
    return [dict(arm=arm, seed=seed, **{**base, **change}) for seed in seeds for arm, change in REFUSAL_ARMS.items()]


def asked(model, tokenizer, config):
    "Rates and leans on held-out topics, and what was said to the first of them."
    from dpo_literate.probes.refusal import ask_model, contrast_set
    items, out = contrast_set("held_out"), {}
    model.eval()
    for side in ("safe", "unsafe"):
        said = ask_model(model, tokenizer, [getattr(c, side) for c in items], limit=config["limit"], seed=config["seed"])
        out |= {f"{side}_refused": said.refused.mean().item(), f"{side}_lean": said.lean.mean().item(), f"{side}_each": said.refused.tolist()}
        if side == "safe": out["replies"] = [r[0][:160] for r in said.replies[:8]]
    return out


def refusal_cell(config):
    from transformers import PrinterCallback, TrainerCallback

    from dpo_literate.preferences import as_chat
    from dpo_literate.probes.refusal import contrast_set, safety_pairs
    from dpo_literate.trainer import DPOConfig, DPOTrainer
    tokenizer, read = load_tokenizer("bundled"), {}
    if not config["epochs"]: return dict(epochs={0: asked(load_model("bundled"), tokenizer, config)})
    pairs = [as_chat(p) for p in safety_pairs(contrast_set("train"), config["calibration"], config["reverse"], config["seed"])]

    class Ask(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **_):
            epoch = round(state.epoch)
            if epoch == config["epochs"] or epoch in EPOCHS and config["epochs"] == max(EPOCHS):
                read[epoch] = asked(model, tokenizer, config)
                model.train()
    args = DPOConfig(str(CELLS / "trainer" / f"refusal_{config['seed']}"), seed=config["seed"], beta=config["beta"], num_train_epochs=config["epochs"],
                     save_strategy="no", report_to=[], disable_tqdm=True, **SAFETY)
    trainer = DPOTrainer("bundled", args=args, train_dataset=pairs, processing_class=tokenizer, callbacks=[Ask()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    last = [h for h in trainer.state.log_history if "rewards/margins" in h][-1]
    return dict(epochs=read, margin=last["rewards/margins"], safe=read[config["epochs"]]["safe_refused"], unsafe=read[config["epochs"]]["unsafe_refused"])


def record_refusal(configs):
    cells = gathered(configs, path_of("refusal"))
    seeds, command = seeds_of(cells), "python benchmarks/probes.py refusal --record"
    def at(arm, epochs, name): return [v["epochs"][str(epochs)][name] for v in by_seed(cells, arm=arm)]
    states = [("before", "before", 0), *((f"refuse, {e} epoch{'s' * (e > 1)}", "refuse", e) for e in EPOCHS), *((arm, arm, 2) for arm in REFUSAL_ARMS if arm not in ("before", "refuse"))]
    names = ("safe_refused", "unsafe_refused", "safe_lean", "unsafe_lean")
    save_result("refusal", dict(states={label: {name: at(arm, e, name) for name in names} for label, arm, e in states},
                                replies={label: at(arm, e, "replies")[0] for label, arm, e in states}), command=command,
                config=dict(**SAFETY, epochs=EPOCHS, betas=(.1, *BETAS), calibration=(0, *TWINS), limit=LIMIT, pairs=24, held_out=24, model="bundled"), seed=seeds,
                seconds=seconds_of(cells), what="Share of held-out harmless and harmful prompts refused before and after DPO on safety pairs, bundled model, full fine-tuning")
    setup = f"SmolLM2-135M-Instruct, 24 safety pairs, lr {SAFETY['learning_rate']:g}, β 0.1, 2 epochs unless said; 24 held-out prompts a side, {LIMIT} tokens"
    def row(claim, source, paper, values, wanted):
        return claim_row(claim, source, paper, values, above() if wanted > 0 else below(), setup=setup, seeds=seeds, command=command)
    def gap(a, b, name): return [x - y for x, y in zip(at(*a, name), at(*b, name))]
    start, two = ("before", 0), ("refuse", 2)
    save_claims("refusal", [
        row("safety pairs raise refusals of harmful prompts (share)", "arXiv:2308.01263", "Mistral, guard prompt: 23.5 → 87.5 %", gap(two, start, "unsafe_refused"), 1),
        row("and refusals of harmless look-alikes with them (share)", "arXiv:2308.01263", "Mistral, guard prompt, full: 0.8 → 9.6 %", gap(two, start, "safe_refused"), 1),
        row("harmful prompts gain more refusals than harmless ones (share)", "arXiv:2308.01263", "+64 against +8.8 points", [u - s for u, s in zip(gap(two, start, "unsafe_refused"), gap(two, start, "safe_refused"))], 1),
        row("four epochs refuse more of the harmless than one (share)", "formula (31.2), reconstructed", None, gap(("refuse", 4), ("refuse", 1), "safe_refused"), 1),
        row("β = 0.5 refuses less of the harmless than β = 0.03 (share)", "formula (31.2), late; reconstructed", None, gap((f"beta {BETAS[1]}", 2), (f"beta {BETAS[0]}", 2), "safe_refused"), -1),
        row("a calibration row for each pair lowers refusals of the harmless (share)", "formula (31.1), reconstructed", None, gap((f"{TWINS[1]} calibration rows", 2), two, "safe_refused"), -1),
        row("the price: it lowers refusals of the harmful too (share)", "formula (31.1), reconstructed", None, gap((f"{TWINS[1]} calibration rows", 2), two, "unsafe_refused"), -1),
        row("pairs turned round lower refusals of harmful prompts (share)", "arXiv:2410.08847 §6", "74.4 → 33.4 % (by displacement)", gap(("turned round", 2), start, "unsafe_refused"), -1)])


def record_xstest(configs):
    from dpo_literate.probes.refusal import LABELS, agreement, looks_unsafe, validation, verdict_of
    if data_dir() is None: raise Refusal("no data: set DPO_LITERATE_DATA to the folder that holds xstest")
    began, folder = time.time(), data_dir() / "xstest"
    with gzip.open(folder / "mistral_completions.jsonl.gz", "rt", encoding="utf-8") as lines: rows = [json.loads(line) for line in lines]
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    wrong = [(LABELS[r["annotation"]], verdict_of(r["completion"]), r) for r in rows]
    errors = [dict(human=h, ours=o, prompt=r["prompt"], begins=" ".join(r["completion"].split()[:11]))
              for kind in (("refusal", "compliance"), ("compliance", "refusal"), ("partial", "refusal")) for h, o, r in [w for w in wrong if w[:2] == kind][::4][:4]]
    save_result("refusal_xstest", dict(completions=validation(rows), prompts=agreement([looks_unsafe(p["prompt"]) for p in prompts], [p["label"] == "unsafe" for p in prompts])._asdict(), errors=errors),
                command="python benchmarks/probes.py xstest --record", config=dict(data="xstest", completions=len(rows), prompts=len(prompts)), seed=None, seconds=time.time() - began,
                what="Agreement of the judges of page 31 with XSTest's human labels (Mistral-7B-Instruct completions; prompts)")


PAGES = {"displacement": (displacement_configs, displacement_cell, record_displacement, (0, 1, 2)), "tdi": (tdi_configs, tdi_cell, record_tdi, (0, 1, 2, 3, 4)),
         "refusal": (refusal_configs, refusal_cell, record_refusal, (0, 1, 2)), "xstest": (lambda seeds: [], None, record_xstest, ())}


def main(argv=None):
    parser = options(__doc__)
    parser.add_argument("page", choices=PAGES)
    parser.add_argument("--arms", nargs="+", help="run only these arms")
    args = parser.parse_args(argv)
    configs, cell, record, seeds = PAGES[args.page]
    def chosen(): return [c for c in configs(args.seeds or list(seeds)) if not args.arms or args.record or c["arm"] in args.arms]
    return run_or_record(args, chosen, lambda todo, minutes: work(todo, path_of(args.page), cell, summary, minutes), record)


if __name__ == "__main__": sys.exit(main())
