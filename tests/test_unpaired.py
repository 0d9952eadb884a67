"Single replies with a label, from the file to the weights: KTO, BCO, APO-zero and AOT against a plain loop, under any cut of the step."
import json
import math

import pytest
import torch

from dpo_literate.run_folder import tokenizer_hash
from dpo_literate.models import weights_hash
from dpo_literate.audit import check_preferences, leakage
from dpo_literate.preferences import as_chat
from dpo_literate.reading import load_any, load_preferences, load_unpaired
from dpo_literate.results import Refusal
from dpo_literate.rows import encode_pair, encode_pairs, split_pairs, tiny_tokenizer
from dpo_literate.objective import mismatched
from dpo_literate.step import epoch_order, filler
from dpo_literate.port import identity
from dpo_literate.trainer import reference_context
from test_cli import here, model as model_folder  # noqa: F401
from test_trainer import PAIRS, TOKENIZER, apart, config, exact, lines, lora, losses, quiet, read_by, train, trainer  # noqa: F401

REPLIES = [dict(prompt=f"the cat {'sat ' * (i % 3)}{i % 5}", completion=f"on the mat {'and the dog ' * (i % 4)}{i}", label=i % 3 > 0, id=str(i)) for i in range(19)]   # 3 steps of 8, the last of 3
LOSSES_OF_ONE = ("kto", "bco", "apo_zero_unpaired", "aot_unpaired")
BETA = .3


# ------------------------------------------------------------ the plain loop

def logp(model, prompt, reply):
    "Full logits of one text, unpadded: the sum over the reply."
    ids = torch.tensor([prompt + reply])
    given = model(input_ids=ids).logits[0].log_softmax(-1)
    return given[range(len(prompt) - 1, ids.shape[1] - 1), reply].sum()


def elsewhere(rows):
    "Each prompt with the nearest earlier reply of the step that answers another prompt."
    out = []
    for i, r in enumerate(rows):
        for k in range(1, len(rows)):
            if rows[i - k].prompt_ids != r.prompt_ids: out.append((r.prompt_ids, rows[i - k].chosen_ids)); break
    return out


def integral(good, bad):
    "∫ -log σ(β (u_w(q) - u_l(q))) dq of two sorted heaps, each repeated to the same size."
    n = math.lcm(len(good), len(bad))
    w, l = (torch.cat([x.repeat(n // len(xs)) for x in sorted(xs, key=lambda x: x.item())]) for xs in (good, bad))
    return -torch.nn.functional.logsigmoid(BETA * (w - l)).mean()   # softplus would be off by e^-20


def plain_loss(name, model, ref, rows, mean, weights):
    "Loss of one step and its rewards, by the papers' formulas."
    u = torch.stack([logp(model, r.prompt_ids, r.chosen_ids) - ref[(*r.prompt_ids, 0, *r.chosen_ids)] for r in rows])
    label = torch.tensor([r.label for r in rows])
    if name == "aot_unpaired":
        good, bad = [x[None] for x in u[label]], [x[None] for x in u[~label]]
        zero = [torch.zeros(1, dtype=u.dtype)]
        return integral(good or zero, bad or zero), u
    if name == "kto":
        with torch.no_grad(): z = [logp(model, *e) - ref[(*e[0], 0, *e[1])] for e in elsewhere(rows)]
        z = torch.stack(z).mean().clamp(min=0) if z else 0.
        one = torch.where(label, weights[0] * (1 - torch.sigmoid(BETA * (u - z))), weights[1] * (1 - torch.sigmoid(BETA * (z - u))))
    elif name == "bco": one = -torch.nn.functional.logsigmoid(torch.where(label, 1., -1.) * (BETA * u - mean))
    else: one = torch.where(label, 1 - torch.sigmoid(BETA * u), torch.sigmoid(BETA * u))
    return (torch.tensor([r.weight for r in rows]) * one).mean(), BETA * u


class Ask(dict):
    "Log-probs of the model as it started, read when asked for."
    def __init__(self, model): self.model = model
    def __missing__(self, key):
        at = key.index(0)
        with torch.no_grad(): self[key] = logp(self.model, list(key[:at]), list(key[at + 1:]))
        return self[key]


def plain(name, kind, rows, epochs=2, size=8, weights=(1., 1.)):
    "Weights and losses of the loop."
    model, ref, told, mean = exact(kind), Ask(exact(kind)), [], None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.)
    for epoch in range(epochs):
        order = epoch_order(len(rows), 42, epoch)
        for k in range(0, len(rows), size):
            loss, rewards = plain_loss(name, model, ref, [rows[i] for i in order[k:k + size]], mean or 0., weights)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            told.append(loss.item())
            new = rewards.detach().mean().item()
            mean = new if mean is None else .9 * mean + .1 * new
    return model, told, mean


def run(path, name, kind, rows, batch=8, accumulation=1, **settings):
    given = dict(loss_type=name, beta=BETA, num_train_epochs=2, max_grad_norm=0., per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    return train(path, exact(kind), rows, **(given | settings))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", LOSSES_OF_ONE)
def test_any_cut_is_the_plain_loop(tmp_path, name, kind):
    data = [dict(r, **({} if name == "aot_unpaired" else dict(weight=1. + i % 2))) for i, r in enumerate(REPLIES)]
    rows, _ = encode_pairs(data, TOKENIZER)
    model, told, mean = plain(name, kind, rows)
    assert apart(model, exact(kind)) > 1e-3 and len(told) == 6
    cuts = [(1, 8, {}), (2, 4, {}), (4, 2, dict(layout="padded")), (8, 1, dict(precompute_ref_log_probs=False)), (3, 3, {})]
    for b, a, more in cuts[:4 if kind == "llama" else 2]:
        t = run(tmp_path / f"{b}", name, kind, rows, b, a, **more)
        assert apart(t.model, model) <= 1e-10, (b, a)
        assert losses(t) == pytest.approx(told, abs=1e-10)
        assert t.step.layout.kind == more.get("layout", "packed") and not t.notes
        if name == "bco": assert t.step.objective.numbers.running.seen["reward_mean"] == pytest.approx(mean, abs=1e-10)


def test_weights_of_the_two_labels(tmp_path):
    rows, _ = encode_pairs(REPLIES, TOKENIZER)
    model, told, _ = plain("kto", "llama", rows, epochs=1, weights=(2., .5))
    t = run(tmp_path, "kto", "llama", rows, 2, 4, num_train_epochs=1, desirable_weight=2., undesirable_weight=.5)
    assert apart(t.model, model) <= 1e-10 and losses(t) == pytest.approx(told, abs=1e-10)
    with pytest.raises(Refusal, match="desirable_weight"): config(tmp_path / "x", desirable_weight=2.)


@pytest.mark.parametrize("name", LOSSES_OF_ONE)
def test_every_start_is_its_constant(tmp_path, name):
    from dpo_literate.losses import get_loss
    from dpo_literate.models import tiny_model
    for mode in ("cached", "adapter", "frozen", "half"):
        torch.manual_seed(0)
        model = lora(tiny_model()) if mode == "adapter" else tiny_model().float() if mode == "half" else tiny_model()
        t = train(tmp_path / mode, model, REPLIES, loss_type=name, learning_rate=0., precompute_ref_log_probs=mode in ("cached", "half"), bf16=mode == "half", per_device_train_batch_size=4, gradient_accumulation_steps=2)
        first = lines(t)[0]
        assert first["loss"] == pytest.approx(get_loss(name).at_init(), abs=1e-6 if mode == "half" else 1e-12)
        assert first.get("kl", 0.) == 0 and first["rewards/chosen"] == 0 and t.mode == mode.replace("half", "cached")


# ------------------------------------------------------------ replies where they do not belong

def test_a_neighbour_with_the_same_prompt_is_passed_over():
    rows, _ = encode_pairs([dict(prompt=p, completion=y, label=True, id=y) for p, y in (("a", "1"), ("a", "2"), ("b", "3"), ("c", "4"))], TOKENIZER)
    found = mismatched(rows)
    said = [(TOKENIZER.decode(r.prompt_ids), TOKENIZER.decode(r.chosen_ids[:-1])) for r in found]
    assert said == [("a", "4"), ("a", "4"), ("b", "2"), ("c", "3")]
    assert mismatched(rows[:2]) == [None, None] and mismatched(rows[:1]) == [None]
    assert mismatched([rows[0], filler(rows[2])]) == [None, None]
    assert len(mismatched(rows, max_tokens=len(rows[0].prompt_ids) + 1)[0].chosen_ids) == 1


def test_the_reference_is_read_for_them_beforehand(tmp_path, monkeypatch):
    seen = read_by(monkeypatch)
    t = train(tmp_path / "a", data=REPLIES, loss_type="kto", num_train_epochs=3, per_device_train_batch_size=4)
    assert seen[:2] == [19, 19] and len(seen) == 4 and all(0 < n <= 19 for n in seen)   # every prompt of these steps has another beside it
    assert t.state.global_step == 15
    seen.clear(); train(tmp_path / "b", data=REPLIES, loss_type="bco")
    assert seen == [19]
    seen.clear(); train(tmp_path / "c", data=REPLIES, loss_type="kto", max_steps=2, per_device_train_batch_size=4)
    assert seen == [19, 19]


def test_a_step_of_one_has_nothing_to_measure_against(tmp_path):
    with pytest.raises(Refusal, match="step of one"): trainer(tmp_path, data=REPLIES, loss_type="kto", per_device_train_batch_size=1)
    train(tmp_path, data=REPLIES, loss_type="bco", per_device_train_batch_size=1, max_steps=2)


# ------------------------------------------------------------ pairs and replies

@pytest.mark.parametrize("name", ["kto", "bco", "apo_zero_unpaired"])
def test_pairs_are_split_and_it_is_said(tmp_path, name, capsys):
    t = train(tmp_path / "pairs", data=PAIRS, loss_type=name, per_device_train_batch_size=4)
    assert capsys.readouterr().out.count("each pair is read as two labelled replies") == 1
    assert len(t.rows) == 14 and "two labelled replies" in json.loads((tmp_path / "pairs" / "run_card.json").read_text())["notes"][0]
    alone = [dict(prompt=p["prompt"], completion=p[k], label=k == "chosen") for p in PAIRS for k in ("chosen", "rejected")]
    other = train(tmp_path / "replies", data=alone, loss_type=name, per_device_train_batch_size=4)
    assert weights_hash(t.model) == weights_hash(other.model) and losses(t) == losses(other)
    assert json.loads((tmp_path / "replies" / "run_card.json").read_text())["notes"] == []


def test_heaps_of_pairs_are_heaps_of_their_replies(tmp_path):
    "One step over all: AOT on pairs and on the same pairs split differ in what a row is, not in the loss."
    settings = dict(loss_type="aot_unpaired", beta=BETA, max_grad_norm=0., optim="sgd", learning_rate=1e-2)
    t = train(tmp_path / "pairs", exact("llama"), data=PAIRS, per_device_train_batch_size=7, **settings)
    rows, _ = encode_pairs(PAIRS, TOKENIZER)
    other = train(tmp_path / "replies", exact("llama"), data=split_pairs(rows), per_device_train_batch_size=14, **settings)
    assert not t.notes and losses(t) == pytest.approx(losses(other), abs=1e-12) and apart(t.model, other.model) <= 1e-10


@pytest.mark.parametrize("settings,word", [(dict(), "kto, bco"), (dict(loss_type="aot"), "aot compares"), (dict(loss_type=["sigmoid", "sft"]), "sigmoid, sft compares"),
    (dict(loss_type=["sigmoid", "kto"]), "one kind"), (dict(loss_type="kto", ld_alpha=.5), "ld_alpha"), (dict(loss_type="kto", use_weighting=True), "use_weighting"),
    (dict(loss_type="aot_unpaired", ld_alpha=.5), "ld_alpha")])
def test_replies_and_a_loss_of_pairs(tmp_path, settings, word):
    with pytest.raises(Refusal, match=word): trainer(tmp_path / "x", data=REPLIES, **settings)
    assert not any(tmp_path.iterdir())


def test_rows_that_cannot_be(tmp_path):
    with pytest.raises(Refusal, match="all 6 replies are labelled good"): trainer(tmp_path / "x", data=[r for r in REPLIES if r["label"]][:6], loss_type="kto")
    rows, _ = encode_pairs(REPLIES, TOKENIZER); pairs, _ = encode_pairs(PAIRS, TOKENIZER)
    with pytest.raises(Refusal, match="one kind at a time"): trainer(tmp_path / "x", data=rows + pairs, loss_type="kto")
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------ log, evaluation, resuming

def test_the_log_counts_each_label(tmp_path):
    t = run(tmp_path, "kto", "llama", REPLIES, 4, 2, logging_steps=2)
    first = lines(t)[0]
    order = [REPLIES[i] for i in epoch_order(19, 42, 0)[:16]]
    assert first["counts/chosen"] == sum(r["label"] for r in order) and first["counts/rejected"] == sum(not r["label"] for r in order)
    assert all({"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "kl"} <= set(h) for h in lines(t)) and "rewards/accuracies" not in first
    assert all(h["rewards/margins"] == pytest.approx(h["rewards/chosen"] - h["rewards/rejected"], abs=1e-12) for h in lines(t))
    assert any(h["kl"] > 0 for h in lines(t))
    one = train(tmp_path / "one", data=REPLIES, loss_type="bco", per_device_train_batch_size=1)
    for line in lines(one): assert ("rewards/chosen" in line) == bool(line["counts/chosen"]) and ("rewards/rejected" in line) == bool(line["counts/rejected"])


@pytest.mark.parametrize("name", LOSSES_OF_ONE)
def test_evaluation_does_not_depend_on_its_batches(tmp_path, name):
    found = {}
    for size in (1, 4, 32):
        t = run(tmp_path / str(size), name, "llama", REPLIES, 8, eval_dataset=dict(some=REPLIES[:9], pairs=PAIRS) if name != "aot_unpaired" else dict(some=REPLIES[:9]), per_device_eval_batch_size=size)
        found[size] = {k: v for k, v in t.evaluate().items() if "loss" in k or "/" in k or "kl" in k}
    assert all(found[1] == pytest.approx(f, abs=1e-10) for f in found.values())
    assert found[1]["eval_some_counts/chosen"] == 6 and ("eval_some_kl" in found[1]) == (name == "kto")


@pytest.mark.parametrize("name", ["kto", "bco", "beta_dpo"])
def test_a_run_goes_on_to_the_bit(tmp_path, name):
    data = PAIRS if name == "beta_dpo" else REPLIES
    settings = dict(loss_type=name, num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1, logging_steps=2)
    whole = train(tmp_path / "whole", data=data, **settings)
    stop = trainer(tmp_path / "cut", data=data, max_steps=3, **settings); stop.train()
    again = trainer(tmp_path / "cut", data=data, **settings)
    again.allow_change = ["max_steps"]; again.train(resume_from_checkpoint=True)
    assert weights_hash(again.model) == weights_hash(whole.model) and again.state.global_step == whole.state.global_step > 3
    if name != "kto": assert again.step.objective.numbers.running.seen == whole.step.objective.numbers.running.seen and len(again.step.objective.numbers.running.seen) == 1
    def said(t): return [{k: v for k, v in h.items() if "second" not in k and "runtime" not in k} for h in t.state.log_history if "train_loss" not in h]
    assert said(whole) == said(again)


@pytest.mark.parametrize("cut", [(1, 4), (2, 2)])
def test_running_means_are_told_once_a_step(tmp_path, cut):
    "β-DPO: the running mean of the gap, by hand, and the same weights under another cut."
    whole = train(tmp_path / "whole", exact("llama"), loss_type="beta_dpo", num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-2)
    other = train(tmp_path / "cut", exact("llama"), loss_type="beta_dpo", num_train_epochs=3, per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1], learning_rate=1e-2)
    assert apart(whole.model, other.model) <= 1e-10 and whole.step.objective.numbers.running.seen["gap_mean"] == pytest.approx(other.step.objective.numbers.running.seen["gap_mean"], abs=1e-10)
    assert abs(whole.step.objective.numbers.running.seen["gap_mean"]) > 1e-3


# ------------------------------------------------------------ against TRL

@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_trl_step_by_step(tmp_path, monkeypatch, name):
    "TRL's KTOTrainer as an oracle, in its fixed order, its micro-batch the whole step."
    trl = pytest.importorskip("trl")
    import datasets
    import dpo_literate.step as module
    from dpo_literate.models import tiny_model
    chat = [dict(prompt=[dict(role="user", content=r["prompt"])], completion=[dict(role="assistant", content=r["completion"])], label=r["label"]) for r in REPLIES[:16]]
    given = dict(use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, num_train_epochs=3, per_device_train_batch_size=8, learning_rate=1e-3, lr_scheduler_type="constant", loss_type=name, bf16=False, max_length=None)
    theirs = trl.KTOTrainer(tiny_model().float(), ref_model=tiny_model().float(), args=trl.KTOConfig(str(tmp_path / "trl"), gradient_checkpointing=False, train_sampling_strategy="sequential", **given), train_dataset=datasets.Dataset.from_list(chat), processing_class=TOKENIZER)
    theirs.train()
    monkeypatch.setattr(module, "epoch_order", lambda n, seed, epoch: list(range(n)))
    ours = train(tmp_path / "ours", tiny_model().float(), chat, score_tail=True, **given)
    for key in ("loss", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        if key == "kl" and name != "kto": continue
        a, b = ([h[key] for h in lines(t)] for t in (ours, theirs))
        assert len(a) == 6 and a == pytest.approx(b, rel=2e-4, abs=2e-4), key
    if name == "kto": assert max(h["kl"] for h in lines(ours)) > .01


# ------------------------------------------------------------ data

def jsonl(path, rows): path.write_text("".join(json.dumps(r) + "\n" for r in rows)); return path


@pytest.mark.parametrize("bad,words", [(dict(label="good"), "label must be true or false"), (dict(label=2), "label must be"), (dict(label=None), "label must be"), (dict(label=.5), "label must be"),
    (dict(completion=None), "completion must be text"), (dict(completion=3), "completion must be text"), (dict(prompt=None), "prompt must be text"), (dict(margin=.5), "margin is asked of a pair"),
    (dict(weight=-1), "weight must be"), (dict(completion=[dict(role="user", content="x")]), "end with an assistant turn"),
    (dict(completion=[dict(role="assistant", content="x"), dict(role="user", content="y"), dict(role="assistant", content="z")]), "one assistant turn; found 3")])
def test_a_bad_row_is_named(tmp_path, bad, words):
    path = jsonl(tmp_path / "r.jsonl", [REPLIES[0], dict(REPLIES[1], **bad)])
    with pytest.raises(Refusal, match=words) as why: load_any(path)
    assert f"{path}:2: " in str(why.value)


def test_missing_columns_and_mixed_files(tmp_path):
    for gone in ("label", "completion", "prompt"):
        path = jsonl(tmp_path / f"{gone}.jsonl", [{k: v for k, v in REPLIES[0].items() if k != gone}])
        with pytest.raises(Refusal, match=f"{gone}.jsonl:1: expected prompt, completion, label"): load_any(path)
    for rows in ([REPLIES[0], PAIRS[0]], [PAIRS[0], REPLIES[0]]):
        with pytest.raises(Refusal, match="m.jsonl:2: expected"): load_any(jsonl(tmp_path / "m.jsonl", rows))
    with pytest.raises(Refusal, match="expected prompt, chosen, rejected"): load_preferences(jsonl(tmp_path / "u.jsonl", REPLIES))
    with pytest.raises(Refusal, match="one shape per file"): load_any([REPLIES[0], dict(REPLIES[1], completion=[dict(role="assistant", content="x")])])


def test_labels_in_words_and_prompts_within(tmp_path):
    said = [load_unpaired([dict(REPLIES[0], label=v)])[0]["label"] for v in (True, False, 1, 0, "true", "False", "1", "0")]
    assert said == [True, False] * 4
    question, answer = dict(role="user", content="why?"), dict(role="assistant", content="because")
    whole = load_any([dict(completion=[question, answer], label=True)])[0]
    assert (whole["prompt"], whole["completion"]) == ([question], [answer])
    again = load_any([dict(prompt=[question], completion=[question, answer], label=True)])[0]
    assert (again["prompt"], again["completion"]) == ([question], [answer])
    with pytest.raises(Refusal, match="nothing stands before"): load_any([dict(completion=[answer], label=True)])
    assert encode_pair(whole, TOKENIZER).key == encode_pair(as_chat(load_any([dict(prompt="why?", completion="because", label=True)])[0]), TOKENIZER).key


def test_the_audit_of_replies(tmp_path):
    rows = [dict(prompt="q", completion="a", label=True), dict(prompt="q", completion="a", label=True), dict(prompt="q", completion="a", label=False),
            dict(prompt="q", completion="", label=False), dict(prompt="q", completion=" ", label=False), dict(prompt="", completion="b", label=False), dict(prompt="q", completion="<|im_end|>", label=False)]
    path = jsonl(tmp_path / "r.jsonl", rows)
    audit = check_preferences(path)
    at = {k: [p.removeprefix(f"{path}:") for p in v] for k, v in audit.found.items() if v}
    assert at == {"empty reply": ["4"], "blank reply": ["5"], "empty prompt": ["6"], "duplicate": [f"2 (= {path}:1)"], "contradiction": [f"3 (reverses {path}:1)"], "control text": ["7"]}
    assert "7 labelled replies (2 good, 5 bad)" in audit.table() and audit.exit_code == 2
    assert audit.lengths["chosen"] == 1 and audit.lengths["chosen_longer"] == pytest.approx(.5 * (1 + 2 * 1 + 1 * 1 + 0) / 5, abs=.2)
    one = check_preferences(jsonl(tmp_path / "one.jsonl", rows[:2]))
    with pytest.raises(Refusal, match="one class .*one.jsonl:1 to .*one.jsonl:2"): one.refuse()
    assert check_preferences(PAIRS).found["one class"] == []
    assert len(leakage(REPLIES[:5], [dict(REPLIES[0], completion="new")]).exact) == 1


def test_rows_of_replies():
    row = encode_pair(dict(prompt="the cat", completion="sat", label=False, weight=2., id="x"), TOKENIZER)
    assert (row.rejected_ids, row.label, row.weight, row.id) == ([], False, 2., "x") and row.chosen_ids[-1] == TOKENIZER.eos_token_id
    assert encode_pair(dict(prompt="the cat", completion="sat", label=True), TOKENIZER).key == row.key      # the reference does not ask who liked it
    good, bad = split_pairs([encode_pair(dict(PAIRS[0], weight=2.), TOKENIZER)])
    assert good.label and not bad.label and good.weight == bad.weight == 2. and good.key != bad.key
    with pytest.raises(Refusal, match="1 of 1 replies are longer than max_length=4"): encode_pairs([dict(prompt="the cat", completion="sat " * 9, label=True)], TOKENIZER, max_length=4)
    cut, counts = encode_pairs([dict(prompt="the cat", completion="sat " * 9, label=True)], TOKENIZER, max_length=6, truncation="keep_start")
    assert len(cut[0]) == 6 and counts.by["reply cut"] == 1
    assert encode_pairs([dict(prompt="q", completion=" ", label=True)], TOKENIZER, identical="drop")[1].by["dropped: empty reply"] == 1
    with pytest.raises(Refusal, match="without text"): encode_pair(dict(prompt="q", completion=" ", label=True), TOKENIZER)


def test_every_shape_of_data(tmp_path):
    import datasets
    plain_ = [{k: v for k, v in r.items() if k != "id"} for r in REPLIES]
    table = datasets.Dataset.from_list(plain_)
    shapes = dict(list=plain_, rows=encode_pairs(plain_, TOKENIZER)[0], file=jsonl(tmp_path / "r.jsonl", plain_), table=table)
    found = {k: losses(train(tmp_path / k, data=v, loss_type="kto")) for k, v in shapes.items()}
    whole = train(tmp_path / "stream", data=table.to_iterable_dataset(), loss_type="kto", max_steps=len(found["list"]))   # read to its end, so shuffled
    found["stream"] = losses(whole)
    assert all(v == found["list"] for v in found.values()), found
    with pytest.raises(Refusal, match="images"): trainer(tmp_path / "x", data=[dict(r, images=["x"]) for r in plain_], loss_type="kto")


def test_labels_are_part_of_the_data(tmp_path):
    from dpo_literate.trainer import data_hash
    rows, _ = encode_pairs(REPLIES, TOKENIZER)
    turned, _ = encode_pairs([dict(r, label=not r["label"]) for r in REPLIES], TOKENIZER)
    assert data_hash(rows) != data_hash(turned) and [r.key for r in rows] == [r.key for r in turned]


def test_identities_have_one_tokenizer_hash(tmp_path):
    t = trainer(tmp_path)
    t.begin_run()
    assert "tokenizer" not in t.run_identity() and identity(t)["tokenizer"] == tokenizer_hash(t.processing_class) == reference_context(t)["tokenizer"]
    assert identity(t)["order_seed"] == t.order.seed and tokenizer_hash(tiny_tokenizer("plain")) != tokenizer_hash(TOKENIZER)


# ------------------------------------------------------------ the command line

@pytest.mark.usefixtures("model_folder")
class TestCommandLine:
    def test_check_data(self, tmp_path):
        good = jsonl(tmp_path / "r.jsonl", REPLIES)
        done = here("check-data", good)
        assert done.returncode == 0 and "19 labelled replies (12 good, 7 bad)" in done.stdout
        bad = here("check-data", jsonl(tmp_path / "bad.jsonl", [REPLIES[0], dict(REPLIES[1], label="so-so")]))
        assert bad.returncode == 2 and "bad.jsonl:2: label must be true or false" in bad.stderr and bad.stderr.count("\n") == 1
        one = here("check-data", jsonl(tmp_path / "one.jsonl", [r for r in REPLIES if r["label"]]))
        assert one.returncode == 2 and "one class" in one.stderr and one.stderr.count("\n") == 1

    def test_train(self, tmp_path, request):
        folder, data = request.getfixturevalue("model_folder"), jsonl(tmp_path / "r.jsonl", REPLIES)
        same = ("--model", folder, "--data", data, "--max-steps", "2", "--per-device-train-batch-size", "4", "--save-strategy", "no")
        done = here("train", *same, "--out", tmp_path / "out", "--loss-type", "kto", "--desirable-weight", "1.5", "--holdout", "4")
        assert done.returncode == 0 and "2 steps on 15 replies: loss" in done.stdout and "on 4 held-out replies" in done.stdout, done.stderr
        result = json.loads((tmp_path / "out" / "result.json").read_text())
        assert result["pairs"] == 15 and {"counts/chosen", "kl"} <= set(result["log"][0])
        no = here("train", *same, "--out", tmp_path / "no")
        assert no.returncode == 2 and "use kto, bco" in no.stderr and no.stderr.count("\n") == 1 and not (tmp_path / "no").exists()
        pairs = here("train", *same[:2], "--data", jsonl(tmp_path / "p.jsonl", PAIRS), *same[4:], "--out", tmp_path / "pairs", "--loss-type", "bco")
        assert pairs.returncode == 0 and "two labelled replies" in pairs.stdout, pairs.stderr


# ------------------------------------------------------------ names

def names_in_trl():
    "Every loss name that a trainer of the installed TRL compares its `loss_type` with."
    import re
    from pathlib import Path
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent
    files = [folder / "trainer" / f"{n}_trainer.py" for n in ("dpo", "kto")] + [folder / "experimental" / "cpo" / "cpo_trainer.py"]
    text = "".join(f.read_text() for f in files)
    return sorted(set(re.findall(r"loss_type == \"(\w+)\"", text)))


def test_every_loss_name_of_trl_is_a_setting(tmp_path):
    found = names_in_trl()
    assert len(found) >= 18 and {"sigmoid", "ipo", "kto", "apo_zero_unpaired", "aot_unpaired", "simpo", "sft"} <= set(found), found
    from dpo_literate.losses import get_loss
    pairs = [n for n in found if get_loss(n).paired]
    for name in found: assert config(tmp_path, loss_type=name).loss_type == [name]
    both = config(tmp_path, loss_type=pairs, loss_weights=[1 + .1 * i for i in range(len(pairs))])
    t = trainer(tmp_path / "all", loss_type=both.loss_type, loss_weights=both.loss_weights, per_device_train_batch_size=4, learning_rate=1e-4)
    t.train()
    assert all(math.isfinite(x) for x in losses(t)) and t.state.global_step == 2
    alone = config(tmp_path, loss_type=["kto", "apo_zero_unpaired"], loss_weights=[1., .5])
    t = trainer(tmp_path / "alone", data=REPLIES, loss_type=alone.loss_type, loss_weights=alone.loss_weights, per_device_train_batch_size=8); t.train()
    assert losses(t)[0] == pytest.approx(.5 + .5 * .5, abs=1e-12)
