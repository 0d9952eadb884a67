"""Replies shared across the pairs of a question, against sharing the prompt a pair, on real votes.

    python benchmarks/shared.py [--rounds 3] [--questions 2] [--record]

The pairs of `counsel_chat`: all ordered pairs of answers to a question, cut at 512 tokens. The
bundled model, float32, the pairs of some questions with four to six answers (a question with
seven takes minutes a pass without sharing): forward and backward of one optimizer step,
reference left out. A round runs both layouts on the same pairs, one after the other; ratios are
of processor time within a round. Rounds already measured are read from `runs/shared/`.
"""
import argparse
import gzip
import json
import time

import torch

MAX_LENGTH, CAPACITY, ANSWERS = 512, 2048, (4, 5, 6)


def questions():
    "Questions of the training part with four answers or more, each with its pairs."
    from dpo_literate.results import Refusal, data_dir
    if data_dir() is None:
        raise Refusal("the benchmark reads counsel_chat: set DPO_LITERATE_DATA to the folder "
                      "that holds it")
    def lines(name):
        path = data_dir() / "counsel_chat" / name
        with gzip.open(path, "rt") as file: return list(map(json.loads, file))
    asked = {q["question_id"]: q for q in lines("questions.jsonl.gz")}
    found = {}
    for p in lines("pair_index.jsonl.gz"):
        if p["split"] == "train": found.setdefault(p["question_id"], []).append(p)
    return [(asked[k], pairs) for k, pairs in sorted(found.items())]


def rows_of(some):
    "Their pairs, as the trainer would have them."
    from dpo_literate.models import load_tokenizer
    from dpo_literate.rows import encode_pairs
    def turn(role, text): return [{"role": role, "content": text}]
    data = [dict(prompt=turn("user", q["question"]),
                 chosen=turn("assistant", q["answers"][p["chosen"]]["text"]),
                 rejected=turn("assistant", q["answers"][p["rejected"]]["text"]))
            for q, pairs in some for p in pairs]
    return encode_pairs(data, load_tokenizer("bundled"), max_length=MAX_LENGTH,
                        truncation="keep_start", identical="drop")[0]


def timed(model, rows, kind):
    "Seconds, processor seconds and tokens of forward and backward over these rows."
    from torch.nn.functional import logsigmoid

    from dpo_literate.packing import packed_reply_logps
    from dpo_literate.step import Layout
    pieces, sums = Layout(kind, capacity=CAPACITY)(rows), []
    clock, cpu = time.perf_counter(), time.process_time()
    for piece in pieces:
        logps = packed_reply_logps(model, piece)
        (-logsigmoid(.1 * (logps.chosen - logps.rejected)).sum()).backward()
        sums += [(r.id, c.item(), j.item()) for r, c, j in
                 zip(piece.rows, logps.chosen, logps.rejected)]
    model.zero_grad()
    return dict(seconds=time.perf_counter() - clock, cpu=time.process_time() - cpu,
                tokens=sum(p.input_ids.numel() for p in pieces), sums=sorted(sums))


def one_round(k, args):
    "Both layouts on the same pairs; who goes first changes from round to round."
    from dpo_literate.models import load_model
    some = [x for x in questions() if len(x[0]["answers"]) in ANSWERS]
    some = some[k * args.questions:(k + 1) * args.questions]
    model, rows = load_model("bundled"), rows_of(some)
    timed(model, rows[:2], "packed")                       # what is made at the first call
    found = {kind: timed(model, rows, kind)
             for kind in (("packed", "shared"), ("shared", "packed"))[k % 2]}
    sums = [torch.tensor([s[1:] for s in f.pop("sums")]) for f in found.values()]
    off = (sums[0] - sums[1]).abs().max().item()
    ratio = found["packed"]["cpu"] / found["shared"]["cpu"]
    print(f"round {k}: {len(rows)} pairs of {len(some)} questions, {ratio:.2f} x, "
          f"log-probs within {off:.1g} nat", flush=True)
    return dict(found, pairs=len(rows), questions=len(some), off=off)


def tokens_of_all():
    "Tokens of every training pair under each layout."
    from dpo_literate.step import Layout
    rows = rows_of(questions())
    padded = sum(2 * (len(r.prompt_ids) + max(len(r.chosen_ids), len(r.rejected_ids)))
                 for r in rows)
    read = {kind: sum(p.input_ids.numel() for p in Layout(kind, capacity=CAPACITY)(rows))
            for kind in ("packed", "shared")}
    return dict(read, padded=padded, pairs=len(rows), prompts=len(questions()))


def main():
    from dpo_literate.results import repo_dir, save_result
    from dpo_literate.runs import Stages
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=2, help="of a round")
    parser.add_argument("--record", action="store_true", help="write nbs/results/shared_cpu.json")
    args = parser.parse_args()
    config = dict(questions=args.questions, answers=ANSWERS, max_length=MAX_LENGTH,
                  capacity=CAPACITY, dtype="float32", threads=torch.get_num_threads(),
                  model="bundled", data="counsel_chat")
    stages = Stages(repo_dir() / "runs" / "shared")
    rounds = [stages.do("round", config, lambda: one_round(k, args), f"-{k}")
              for k in range(args.rounds)]
    tokens = stages.do("tokens", config, tokens_of_all)
    if not args.record: return
    seconds = sum(r[kind]["seconds"] for r in rounds for kind in ("packed", "shared"))
    save_result("shared_cpu", dict(rounds=rounds, tokens=tokens), seed=None, seconds=seconds,
                command="python benchmarks/shared.py --record", config=config,
                what="Forward and backward of DPO on counsel_chat: each reply once a question, "
                     "against each prompt once a pair")


if __name__ == "__main__": main()
