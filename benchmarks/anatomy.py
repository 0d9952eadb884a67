"""Where a training step's seconds and bytes go, and what a longer prompt costs: recorded, page 40.

    python benchmarks/anatomy.py stages [--record]
        the parts of a step timed one by one, beside this machine's own rates
    python benchmarks/anatomy.py prompts [--record]
        replies fixed, prompts 1x to 16x: tokens counted, seconds measured

Both train the bundled model (every weight, bf16 autocast). Times are the median of `--repeats`
after one round that is not counted.
--tiny runs the same code on a model of two layers: for the tests, never recorded.
"""
import argparse
import statistics
import sys
import time

import torch

from dpo_literate.results import Refusal

BATCH, CAPACITY = 8, 2048


def clock(): return time.perf_counter()


def median(make, repeats):
    "Median seconds of a call, after one that is not counted."
    make()
    return statistics.median(timed(make) for _ in range(repeats))


def timed(make):
    start = clock(); make()
    return clock() - start


def subject(tiny):
    "The model that is measured, and its tokenizer."
    from dpo_literate.models import load_model, load_tokenizer, tiny_model
    from dpo_literate.rows import tiny_tokenizer
    if tiny: return tiny_model().float().train(), tiny_tokenizer()
    return load_model("bundled").train(), load_tokenizer("bundled")


# ------------------------------------------------------------ what the work is, as counts

def products(config, tokens, scored):
    "Every matrix product (m,k) @ (k,n) of a forward pass: those of the body, and that of the head."
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = d // config.num_attention_heads * config.num_key_value_heads
    attention = [(tokens, d, d), (tokens, d, kv), (tokens, d, kv), (tokens, d, d)]
    feed_forward = [(tokens, d, f), (tokens, d, f), (tokens, f, d)]
    return (attention + feed_forward) * layers, [(scored, d, config.vocab_size)]


def flops(shapes): return sum(2 * m * k * n for m, k, n in shapes)


def moved(shapes):
    "Bytes: operands and result once, in bf16."
    return sum(2 * (m * k + k * n + m * n) for m, k, n in shapes)


def attention_flops(config, lengths):
    "Scores and their sums over the keys that a token may see, a pair's prompt once."
    def pair(p, c, r): return p * p / 2 + sum(y * p + y * y / 2 for y in (c, r))
    seen = sum(pair(*x) for x in lengths)
    return 4 * config.num_hidden_layers * config.hidden_size * seen


# ------------------------------------------------------------ what the machine can do

def product_rate(shape, dtype, repeats):
    "FLOP/s of a matrix product of this shape."
    m, k, n = shape
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    return flops([shape]) / median(lambda: a @ b.t(), repeats)


def copy_rate(size, repeats):
    "Bytes per second read and written by a copy."
    a = torch.randn(size // 4); b = torch.empty_like(a)
    return 2 * size / median(lambda: b.copy_(a), repeats)


def rates(tiny, config, tokens, repeats):
    "What a large product, the model's own product and a copy reach here."
    side = 64 if tiny else 2048
    own = (tokens, config.hidden_size, config.intermediate_size)
    shapes = dict(square=(side, side, side), own=own)
    found = {f"{kind}_{name}": product_rate(shape, dtype, 3 * repeats)
             for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32))
             for kind, shape in shapes.items()}
    return found | dict(bytes=copy_rate(2**16 if tiny else 2**28, repeats))


# ------------------------------------------------------------ a step, part by part

def step(model, batch, optimizer):
    "Seconds of each part of one training step; head and body part where the gradient passes."
    import dpo_literate.logps as logps
    from dpo_literate.packing import packed_reply_logps
    marks, real = {}, logps.linear_logps
    def head(hidden, *a, **k):
        marks["body"] = clock()
        hidden.register_hook(lambda g: marks.update(head_backward=clock()))
        out = real(hidden, *a, **k); marks["head"] = clock()
        return out
    logps.linear_logps = head
    try:
        start = clock()
        with torch.autocast("cpu", torch.bfloat16): out = packed_reply_logps(model, batch)
        loss = -torch.nn.functional.logsigmoid(.1 * (out.chosen - out.rejected)).mean()
        forward = clock(); loss.backward(); backward = clock()
    finally: logps.linear_logps = real
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
    optimizer.step(); optimizer.zero_grad(); end = clock()
    return {"body forward": marks["body"] - start, "head forward": marks["head"] - marks["body"],
            "head backward": marks["head_backward"] - forward,
            "body backward": backward - marks["head_backward"], "optimizer": end - backward}


def kept(model, batch):
    "Bytes that a forward pass leaves for its backward, each storage once and without the weights."
    from dpo_literate.packing import packed_reply_logps
    weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    def note(x):
        s = x.untyped_storage()
        if s.data_ptr() not in weights: found[s.data_ptr()] = s.nbytes()
        return x
    saved = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    with saved, torch.autocast("cpu", torch.bfloat16): out = packed_reply_logps(model, batch)
    del out
    return sum(found.values())


def real_pairs(tiny, n):
    if tiny:
        return [dict(prompt=f"the cat {'sat ' * i}", chosen="on the mat", rejected="and the dog")
                for i in range(n)]
    from vs_trl import pairs
    return pairs(n)


def stages(args):
    "One batch of real dialogue, from text to the optimizer's step."
    from dpo_literate.models import read_reference
    from dpo_literate.packing import pack_rows
    from dpo_literate.rows import encode_pairs
    (model, tokenizer), data = subject(args.tiny), real_pairs(args.tiny, BATCH)
    def encode():
        return encode_pairs(data, tokenizer, max_length=512, truncation="keep_start",
                            score_tail=True)[0]
    rows = encode()
    batch, = pack_rows(rows, capacity=CAPACITY)
    def pack(): return pack_rows(rows, capacity=CAPACITY)
    def reference():
        with torch.autocast("cpu", torch.bfloat16): read_reference(model, [batch])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)   # as the trainer has it
    seconds = {make.__name__: median(make, args.repeats) for make in (encode, pack, reference)}
    seconds = dict(tokenise=seconds.pop("encode"), **seconds)
    step(model, batch, optimizer)
    parts = [step(model, batch, optimizer) for _ in range(args.repeats)]
    seconds |= {k: statistics.median(p[k] for p in parts) for k in parts[0]}
    lengths = [(len(r.prompt_ids), len(r.chosen_ids), len(r.rejected_ids)) for r in rows]
    tokens, scored = batch.input_ids.numel(), batch.targets.numel()
    weights = sum(p.numel() for p in model.parameters())
    body, head = products(model.config, tokens, scored)
    forward = {"body forward": flops(body) + attention_flops(model.config, lengths),
               "head forward": flops(head)}
    touched = {"body forward": moved(body), "head forward": moved(head)}
    memory = dict(weights=4 * weights, gradients=4 * weights, optimizer=8 * weights,
                  activations=kept(model, batch))
    return dict(seconds=seconds, flops=with_backward(forward) | dict(optimizer=12 * weights),
                bytes=with_backward(touched) | dict(optimizer=28 * weights), memory=memory,
                rates=rates(args.tiny, model.config, tokens, args.repeats), lengths=lengths,
                tokens=tokens, scored=scored, weights=weights)


def with_backward(forward):
    "A backward pass makes two products for each one of the forward pass."
    return forward | {k.replace("forward", "backward"): 2 * v for k, v in forward.items()}


# ------------------------------------------------------------ prompts that grow

def trl_tokens(rows):
    "Tokens that TRL's own collator lays out for these pairs."
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    collate = DataCollatorForPreference(pad_token_id=0)
    made = collate([{k: getattr(r, k) for k in names} for r in rows])
    return made["input_ids"].numel()


def seen_by(model, run):
    "Tokens that went through the embeddings while `run` ran."
    seen = []
    def look(module, given, out): seen.append(given[0].numel())
    handle = model.get_input_embeddings().register_forward_hook(look)
    try: run()
    finally: handle.remove()
    return sum(seen)


def prompts(args):
    "A step of four pairs, packed and padded: prompts of growing length, replies of one length."
    from dpo_literate.logps import pad_rows
    from dpo_literate.packing import pack_rows, packed_reply_logps
    from dpo_literate.rows import Row
    (model, _), found, reply = subject(args.tiny), [], 4 if args.tiny else 32
    for p in (reply * k for k in ((1, 2) if args.tiny else (1, 2, 4, 8, 16))):
        rows = [Row([5] * p, [6] * reply, [7] * reply, id=str(i)) for i in range(4)]
        laid = dict(packed=pack_rows(rows, capacity=4 * (p + 2 * reply))[0], padded=pad_rows(rows))
        def train(batch):
            with torch.autocast("cpu", torch.bfloat16): out = packed_reply_logps(model, batch)
            out.sums.sum().backward(); model.zero_grad(set_to_none=True)
        line = dict(prompt=p, reply=reply, pairs=4, trl_tokens=trl_tokens(rows))
        for name, batch in laid.items():
            line[f"{name}_tokens"] = seen_by(model, lambda: train(batch))
            line[f"{name}_seconds"] = median(lambda: train(batch), args.repeats)
        found.append(line)
        print({k: round(v, 3) for k, v in line.items()}, flush=True)
    return dict(sweep=found)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["stages", "prompts"])
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--record", action="store_true")
    p.add_argument("--tiny", action="store_true")
    args, start = p.parse_args(argv), clock()
    if args.tiny and args.record:
        sys.exit("--tiny is for the tests: its figures mean nothing and are not recorded")
    try: found = dict(stages=stages, prompts=prompts)[args.what](args)
    except Refusal as no: sys.exit(str(no))
    if args.what == "stages": show(found)
    if args.record: record(args, found, clock() - start)
    return found


def show(found):
    print({k: round(v, 4) for k, v in found["seconds"].items()},
          {k: f"{v:.3g}" for k, v in found["rates"].items()},
          {k: f"{v / 1e9:.2f} GB" for k, v in found["memory"].items()})


WHAT = dict(
    stages="seconds of each part of a training step on eight real pairs, FLOPs and bytes of each "
    "as counts, and the rates of this machine",
    prompts="computed tokens and seconds of a training step as prompts grow: packed, padded, and "
    "TRL's collator")


def record(args, found, seconds):
    from dpo_literate.results import save_result
    config = dict(model="bundled", dtype="bf16 autocast", repeats=args.repeats, batch=BATCH,
                  capacity=CAPACITY, threads=torch.get_num_threads())
    print(save_result(f"anatomy_{args.what}", found, seed=None, seconds=seconds, config=config,
                      command=f"python benchmarks/anatomy.py {args.what}", what=WHAT[args.what]))


if __name__ == "__main__": main()
