"""What upvotes teach: an audit of real votes, and DPO on pairs made of them: page 26's record.

    python benchmarks/community.py [--seeds 0 1 2] [--minutes 30]
        train and measure, one small file a cell
    python benchmarks/community.py --record
        gather the cells and audit the votes (seconds, no model)

Data: counsel_chat (MIT), questions that a public forum got and licensed therapists answered, with
readers' upvotes and views. No text of it is recorded, and no model made of it is kept: nothing
here is fit to answer a person in need. A cell is one seed; it holds out a fifth of the threads.
"""
import gzip
import json
import random
import statistics

import torch
from cells import (above, claim_row, gathered, options, ran, recorded, row_of, run_or_record,
                   seconds_of, seeds_of, work)

from dpo_literate.align import distinct
from dpo_literate.community import (Vote, agreement, by_thread, confounds_of, partial_out,
                                    reading_ease, style_match, thread_interval, thread_ranks,
                                    vote_pairs, words)
from dpo_literate.models import load_model, load_tokenizer
from dpo_literate.packing import pack_rows, packed_reply_logps
from dpo_literate.results import Refusal, data_dir, repo_dir, save_result
from dpo_literate.rows import encode_pairs
from dpo_literate.sampling import decoder, greedy, prompt_tokens, sampling_dtype

CELLS = repo_dir() / "runs" / "community"
SETTINGS = dict(model="bundled", train=80, held_share=.35, per_thread_train=1, per_thread_held=1,
                reply_words=24, prompt_words=20, beta=.1, learning_rate=3e-4, lora_r=8, batch=4,
                epochs=1., asked=8, limit=32)


RULES = ("any higher score", "rank, views and length taken out")


def counsel_votes():
    "The answers of counsel_chat as votes."
    if data_dir() is None:
        raise Refusal("no data: set DPO_LITERATE_DATA to the folder that holds counsel_chat")
    path = data_dir() / "counsel_chat" / "questions.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [Vote(str(q["question_id"]), q["title"], a["text"], float(a["upvotes"]),
                     views=float(a["views"]), where=f"question {q['question_id']}, answer {n}")
                for q in map(json.loads, file) for n, a in enumerate(q["answers"])]


def rules(votes):
    "Pairs by rule: name -> `VotePairs`."
    scores = [v.score for v in votes]
    ranks = thread_ranks(votes, scores)
    known = confounds_of(votes)
    left, explained = partial_out(votes, ranks, known)
    views, _ = partial_out(votes, ranks, dict(views=known["views"]))
    return {"any higher score": vote_pairs(votes),
            "score gap of 2": vote_pairs(votes, gap=2.),
            "top and bottom quarter": vote_pairs(votes, ranks, gap=.25, top=.75, bottom=.25),
            "rank, views and length taken out": vote_pairs(votes, left, gap=.25)}, explained


def audit():
    "How much of each rule's pairs one number explains."
    votes, found = counsel_votes(), {}
    known, scores = confounds_of(votes), [v.score for v in votes]
    pairs, explained = rules(votes)
    for name, p in pairs.items():
        found[name] = dict(pairs=len(p.at), threads=len(set(p.threads)), replies=dict(p.counts),
                           **{k: agreement(p, x) for k, x in known.items()},
                           style=agreement(p, [style_match(v.reply, v.prompt) for v in votes]),
                           ease=agreement(p, [reading_ease(v.reply) for v in votes]))
    ranks = thread_ranks(votes, scores)
    alone = {k: partial_out(votes, ranks, {k: x})[1] for k, x in known.items()}
    return dict(rules=found, explained=dict(alone, together=explained), replies=len(votes),
                threads=len(by_thread(votes)))


# ------------------------------------------------------------ DPO

def cut(text, n): return " ".join(text.split()[:n])


def chats(pairs, at):
    "Some pairs as chats, texts cut to their first words."
    def turn(role, text): return [dict(role=role, content=text)]
    v, s = pairs.votes, SETTINGS
    found = [dict(prompt=turn("user", cut(v[w].prompt, s["prompt_words"])),
                  chosen=turn("assistant", cut(v[w].reply, s["reply_words"])),
                  rejected=turn("assistant", cut(v[l].reply, s["reply_words"]))) for w, l in at]
    same = [p["chosen"] == p["rejected"] for p in found]
    return [p for p, no in zip(found, same) if not no], [a for a, no in zip(at, same) if not no]


def split(pairs, seed):
    "Pairs to train on and held-out pairs, no thread in common, a few of each thread."
    rng, threads = random.Random(seed), sorted(set(pairs.threads))
    rng.shuffle(threads)
    held = set(threads[:round(SETTINGS["held_share"] * len(threads))])
    sides = ([], [])
    for thread in threads:
        of = [p for p, t in zip(pairs.at, pairs.threads) if t == thread]
        rng.shuffle(of)
        key = "per_thread_held" if thread in held else "per_thread_train"
        sides[thread in held].extend(of[:SETTINGS[key]])
    rng.shuffle(sides[0])
    return sides[0][:SETTINGS["train"]], sides[1]


@torch.no_grad()
def logps(model, rows):
    "Sums and lengths of chosen and rejected replies, in the order of the rows."
    sums, lengths = {}, {}
    for piece in pack_rows(rows, capacity=1024):
        with torch.autocast("cpu", torch.bfloat16): out = packed_reply_logps(model, piece)
        for k, row in enumerate(piece.rows):
            at = [k, k + piece.n_pairs]
            sums[row.id], lengths[row.id] = out.sums[at].tolist(), out.lengths[at].tolist()
    return [sums[r.id] for r in rows], [lengths[r.id] for r in rows]


def replies(model, tokenizer, prompts):
    return greedy(decoder(model, sampling_dtype(model)), tokenizer,
                  [prompt_tokens(p, tokenizer) for p in prompts], SETTINGS["limit"])


def measures(prompts, said):
    "Rule metrics of replies; the texts themselves are not kept."
    return dict(words=statistics.mean(len(words(y)) for y in said), distinct2=distinct(said, 2),
                style=statistics.mean(map(style_match, said, prompts)),
                ease=statistics.mean(map(reading_ease, said)))


def trained(rows, seed):
    "The bundled model after an epoch, the adapter merged in."
    from peft import LoraConfig
    from transformers import PrinterCallback, set_seed

    from dpo_literate.settings import DPOConfig
    from dpo_literate.trainer import DPOTrainer
    set_seed(seed)
    args = DPOConfig(str(CELLS / "trainer"), beta=SETTINGS["beta"], seed=seed, bf16=True,
                     learning_rate=SETTINGS["learning_rate"], num_train_epochs=SETTINGS["epochs"],
                     lr_scheduler_type="cosine", warmup_steps=1, use_cpu=True, max_length=None,
                     per_device_train_batch_size=SETTINGS["batch"], save_strategy="no",
                     report_to=[], disable_tqdm=True, logging_steps=1)
    lora = LoraConfig(r=SETTINGS["lora_r"], lora_alpha=2 * SETTINGS["lora_r"],
                      target_modules="all-linear", task_type="CAUSAL_LM")
    run = DPOTrainer(load_model("bundled"), args=args, train_dataset=rows, peft_config=lora,
                     processing_class=load_tokenizer("bundled"))
    run.remove_callback(PrinterCallback)
    run.train()
    late = [h["rewards/accuracies"] for h in run.state.log_history if "loss" in h][-4:]
    return run.model.merge_and_unload().eval(), statistics.mean(late)


def right(x): return [(v > 0) + .5 * (v == 0) for v in x]


def cell(config):
    "One seed and one rule."
    seed, tokenizer, votes = config["seed"], load_tokenizer("bundled"), counsel_votes()
    pairs = rules(votes)[0][config["rule"]]
    to_train, aside = split(pairs, seed)
    train, _ = chats(pairs, to_train)
    held, at = chats(pairs, aside)
    rows, _ = encode_pairs(held, tokenizer, max_length=None)
    threads = [votes[w].thread for w, _ in at]
    asked = sorted({cut(votes[w].prompt, SETTINGS["prompt_words"]) for w, _ in at})
    asked = asked[:SETTINGS["asked"]]
    base = load_model("bundled").eval()
    before, lengths = logps(base, rows)
    said = measures(asked, replies(base, tokenizer, asked))
    del base
    model, late = trained(train, seed)
    after, _ = logps(model, rows)
    margin = [(a[0] - b[0]) - (a[1] - b[1]) for a, b in zip(after, before)]
    mean = [b[0] / n[0] - b[1] / n[1] for b, n in zip(before, lengths)]
    long = [len(words(votes[w].reply)) - len(words(votes[l].reply)) for w, l in at]
    seen = [votes[w].views - votes[l].views for w, l in at]
    shown_long = [n[0] - n[1] for n in lengths]
    of = dict(after=margin, before=mean, length=long, views=seen, shown_length=shown_long)
    r = statistics.correlation(margin, shown_long) if len(set(shown_long)) > 1 else 0.
    return dict(train=len(train), held=len(at), threads=len(set(threads)), late_accuracy=late,
                accuracy={k: thread_interval(right(v), threads) for k, v in of.items()},
                margin=statistics.mean(margin), explained_by_length=r * r,
                before=said, after=measures(asked, replies(model, tokenizer, asked)))


def shown(v): return (f"{v['train']} pairs, {v['held']} held out: accuracy "
                      + ", ".join(f"{k} {x[0]:.2f}" for k, x in v["accuracy"].items()))


# ------------------------------------------------------------ the record

ASKED = "asked of LLUMI, arXiv:2605.30273"


def claim(name, figure, found, verdict, more):
    return row_of(name, ASKED, figure, found, verdict, **more)


def claims(found, runs, more):
    "Rows of the claims table: the audit over threads, the training over seeds."
    every = found["rules"]["any higher score"]
    strict = found["rules"]["top and bottom quarter"]
    left = found["rules"]["rank, views and length taken out"]
    def of(rule):
        return dict(setup=f"counsel_chat, {rule['pairs']} pairs of {rule['threads']} threads; "
                          "threads are the unit", seeds=None, command=more["command"],
                    unit="thread", n=rule["threads"], test="bootstrap")
    def accuracy(name): return [run["accuracy"][name][0] for run in runs]
    def trained(name, values, verdict):
        return claim_row(name, ASKED, "not reported", values, verdict, **more)
    more_than_length = [x - y for x, y in zip(accuracy("after"), accuracy("length"))]
    return [
        claim("Votes follow exposure: the chosen reply was seen more (share of pairs, any higher "
              "score)", "not reported", every["views"], above(.5), of(every)),
        claim("The same under the stricter rule, top against bottom quarter",
              "top 2 % against bottom 15 % (reconstructed)", strict["views"], above(.5),
              of(strict)),
        claim("The same with views and length partialled out of the ranks", "not done",
              left["views"], above(.5), of(left)),
        claim("Votes follow length: the chosen reply is longer (share of pairs, any higher score)",
              "not reported", every["length"], above(.5), of(every)),
        trained("DPO on votes orders held-out pairs better than chance (accuracy)",
                accuracy("after"), above(.5)),
        trained("DPO on votes orders them better than length does (difference)",
                more_than_length, above(0))]


def record(todo):
    cells, found = gathered(todo, CELLS), audit()
    seeds = seeds_of(cells)
    command = "python benchmarks/community.py --record --seeds " + " ".join(map(str, seeds))
    values = [dict(rule=c["config"]["rule"], seed=c["config"]["seed"], **c["values"])
              for c in cells]
    save_result("community", dict(audit=found, runs=values), command=command, config=SETTINGS,
                seed=seeds, seconds=seconds_of(cells), ran=ran(cells),
                what="Upvotes of counsel_chat: what pairs "
                "by rule are about, and DPO of SmolLM2-135M-Instruct on some of them")


def judge():
    "Page, and its claims, from the committed record."
    found, seeds = recorded("community")
    runs, command = found["runs"], found["_provenance"]["command"]
    setup = (f"SmolLM2-135M-Instruct, LoRA r {SETTINGS['lora_r']}, {runs[0]['train']} pairs, "
             f"replies cut to {SETTINGS['reply_words']} words, {runs[0]['held']} held-out "
             "threads a seed")
    more = dict(setup=setup, seeds=seeds, command=command)
    return "26_community", claims(found["audit"], runs, more)


def main():
    parser = options(__doc__, [0, 1, 2])
    parser.add_argument("--rules", nargs="+", default=RULES[:1], choices=RULES)
    args = parser.parse_args()
    def configs():
        return [dict(arm=rule, rule=rule, seed=s, **SETTINGS)
                for rule in args.rules for s in args.seeds]
    def run(todo, minutes): return work(todo, CELLS, cell, shown, minutes)
    return run_or_record(args, configs, run, record, judge)


if __name__ == "__main__": raise SystemExit(main())
