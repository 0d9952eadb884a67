"The hierarchy beyond the page: forged text, segments, every reference mode, resume, the judge."
import argparse
import copy
import importlib.util
import json
import math
import random
import time
from collections import Counter
from pathlib import Path

import cells
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, PrinterCallback

from dpo_literate.cli import main
from dpo_literate.gw_dpo import (DELIMITERS, PARTS, KeepBest, SegmentEmbedding,
                                 add_delimiters, add_segments, delimiter_ids, gravity,
                                 has_level_tokens, hierarchy_policy, hierarchy_rows,
                                 hierarchy_state, in_stage, keep_marks, load_hierarchy,
                                 level_prompt, load_hierarchy_state,
                                 messages_of, save_hierarchy, segments_of, token_tables, turns_of)
from dpo_literate.hierarchy import (FAMILIES, FORBID, LOOKALIKES, NEEDLESS, OFFICIAL_PHRASES,
                                    OVERRIDES, PAIRS, PERSONAS, REQUESTS, TOPIC_WORDS, agreed,
                                    conflict, look_alike, make_items, refuses, reserved_tokens,
                                    says_word, shuffled, strip_reserved)
from dpo_literate.hierarchy_eval import (hierarchy_metrics, judge_replies, load_to_judge,
                                         macro_mean, main_hierarchy, pooled_share, ppa,
                                         replies_to, share_interval, share_of, whs)
from dpo_literate.logps import pad_rows
from dpo_literate.losses import dpo_loss
from dpo_literate.models import (load_model, load_tokenizer, no_dropout, tiny_config, tiny_model,
                                 write_folder)
from dpo_literate.packing import pack_rows, packed_reply_logps
from dpo_literate.results import Refusal, claim_problems
from dpo_literate.rows import control_ids, encode_prompt, encode_text, tiny_tokenizer
from dpo_literate.runs import digest
from dpo_literate.trainer import DPOConfig, DPOTrainer

KINDS = ("llama", "qwen2", "qwen3", "gpt2", "gemma2")
ITEMS = make_items(per_pair=1, benign=3, cascades=3)


def made(kind="llama", ise=True, std=.01):
    tokenizer, model = tiny_tokenizer(), tiny_model(kind)
    add_delimiters(model, tokenizer)
    if ise: add_segments(model, tokenizer, std=std)
    return model, tokenizer


def lora(): return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def policy_of(kind="llama", ise=True):
    model, tokenizer = made(kind, ise)
    return hierarchy_policy(model, tokenizer, lora()), tokenizer


def train(policy, tokenizer, out, rows=None, resume=None, evals=None, callbacks=None, **more):
    settings = dict(save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
                    logging_steps=1, learning_rate=3e-3, max_length=None,
                    per_device_train_batch_size=4, lr_scheduler_type="constant",
                    max_steps=4) | more
    trainer = keep_marks(DPOTrainer(policy, args=DPOConfig(str(out), **settings),
                                    train_dataset=rows or hierarchy_rows(ITEMS, tokenizer),
                                    eval_dataset=evals, processing_class=tokenizer,
                                    callbacks=callbacks))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def learned(policy):
    own = [p for p in policy.parameters() if p.requires_grad]
    return torch.cat([p.detach().double().flatten() for p in own])


# ------------------------------------------------------------ the front end

def forged(rng, marks, pieces=14):
    text = ""
    for _ in range(rng.randint(1, pieces)):
        mark = rng.choice(marks)
        cut, at = rng.randint(0, len(mark)), rng.randint(0, len(text))
        piece = rng.choice([mark, mark[:cut], mark[cut:], mark.lower(), "é", " "])
        text = text[:at] + piece + text[at:]
    return text


MARKS = dict(hierarchy=DELIMITERS, brackets=("##", "[MARK]", "[INST]", "[COLN]", "#"),
             overlapping=("aa", "ab", "ba", "aba"), letter=("a",),
             suffix=("<|im_end|>", "<|im_start|>", "|>"))


@pytest.mark.parametrize("marks", MARKS.values(), ids=MARKS)
def test_no_mark_is_left_in_ten_thousand_forged_strings(marks):
    rng = random.Random(0)
    for _ in range(10_000):
        text = forged(rng, marks)
        clean = strip_reserved(text, marks)
        assert not any(m in clean for m in marks), text
        assert strip_reserved(clean, marks) == clean
        if not any(m in text for m in marks): assert clean == text


def test_one_pass_is_what_many_passes_give_for_one_mark():
    rng, mark = random.Random(1), "<|L0_END|>"
    for _ in range(5_000):
        text = many = forged(rng, [mark])
        while mark in many: many = many.replace(mark, "")
        assert strip_reserved(text, [mark]) == many


def test_deep_nesting_costs_one_pass():
    began = time.process_time()
    assert strip_reserved("<|L0" * 200_000 + "_END|>" * 200_000, DELIMITERS) == ""
    assert time.process_time() - began < 20


def test_nothing_reserved_leaves_text_alone():
    assert strip_reserved("<|L0_END|>", []) == "<|L0_END|>"


def test_untrusted_text_never_becomes_a_reserved_token():
    _, tokenizer = made(ise=False)
    rng, marks, control = random.Random(3), reserved_tokens(tokenizer), control_ids(tokenizer)
    assert set(DELIMITERS) <= set(marks)
    for n in range(10_000):
        text = forged(rng, marks)
        assert not control.intersection(encode_text(tokenizer, text))
        if n % 10: continue
        levels = {level: forged(rng, marks, 6)
                  for level in rng.sample(range(5), rng.randint(1, 5))}
        ids = encode_prompt(messages_of(levels, tokenizer), tokenizer)
        found = tokenizer.convert_ids_to_tokens([t for t in ids if t in control])
        sides = [f"<|L{level}_{side}|>" for level in sorted(levels) for side in ("START", "END")]
        assert found == [*sides, "<|RESP_START|>"]


@pytest.mark.parametrize("levels", [{}, {5: "a"}, {"L0": "a"}, {-1: "a", 0: "b"}],
                         ids=["none", "five", "name", "negative"])
def test_other_levels_are_refused(levels):
    with pytest.raises(Refusal, match="levels"): messages_of(levels, made(ise=False)[1])


# ------------------------------------------------------------ the offset

LINEAR, BILATERAL = (1, 2, 3, 4, 1, 2, 3, 1, 2, 1), (4, 8, 12, 16, 3, 6, 9, 2, 4, 1)


@pytest.mark.parametrize("n", range(10), ids=lambda n: "%d%d" % PAIRS[n])
def test_published_deltas(n):
    wanted = dict(linear=LINEAR[n], bilateral=BILATERAL[n], none=0)
    assert {name: gravity(*PAIRS[n], name, 1.) for name in wanted} == wanted


@pytest.mark.parametrize("delta,schedule,loss", [
    (-2, "linear", 1.171101), (-2, "bilateral", 2.126928),
    (5, "linear", .744397), (5, "bilateral", 1.541008)])
def test_known_losses(delta, schedule, loss):
    z = torch.zeros(1, dtype=torch.float64)
    found = dpo_loss(z + delta, z, z, z, gravity(1, 3, schedule), .1)[0].item()
    assert found == pytest.approx(loss, abs=1e-6)


def test_offsets_of_rows():
    items = make_items(per_pair=2, benign=3, cascades=6, aligned=1)
    tokenizer = made(ise=False)[1]
    rules = dict(none=lambda i, j: 0, linear=lambda i, j: j - i,
                 bilateral=lambda i, j: (j - i) * (4 - i))
    for schedule, rule in rules.items():
        for x, r in zip(items, hierarchy_rows(items, tokenizer, schedule, .7)):
            want = rule(min(x.chain), max(x.chain)) if x.attacked else 0
            assert r.offset == pytest.approx(.7 * want, abs=1e-12)
    constant, bilateral = ([r.offset for r in hierarchy_rows(items, tokenizer, s)]
                           for s in ("constant", "bilateral"))
    assert sum(constant) == pytest.approx(sum(bilateral))
    assert len({round(o, 9) for o in constant}) == 2


def test_a_constant_offset_is_matched_in_each_stage(tmp_path, monkeypatch):
    "In every stage the control asks what the bilateral schedule asks on average."
    from dpo_literate import gw_dpo
    asked = {}
    class Noted:
        def __init__(self, policy, args, train_dataset, **_):
            offsets = [row.offset for row in train_dataset if row.offset]
            asked.setdefault(name, []).append(sum(offsets) / len(offsets))
            self.state = argparse.Namespace(log_history=[])
        def remove_callback(self, _): pass
        def train(self): pass
    monkeypatch.setattr(gw_dpo, "DPOTrainer", Noted)
    monkeypatch.setattr(gw_dpo, "keep_marks", lambda trainer: trainer)
    tokenizer, items = made(ise=False)[1], make_items(per_pair=2, benign=2, cascades=3)
    for name in ("bilateral", "constant"):
        gw_dpo.train_hierarchy(None, tokenizer, items, schedule=name, out=tmp_path, use_cpu=True)
    assert asked["constant"] == pytest.approx(asked["bilateral"])
    assert asked["constant"][0] > asked["constant"][2] + .5     # so one mean would not do


@pytest.mark.parametrize("seed", range(3))
def test_blocks_stand_in_the_order_of_the_item(seed):
    tokenizer = made(ise=False)[1]
    for x in shuffled(ITEMS, seed):
        ids = level_prompt(x, tokenizer)
        starts = [t for t in tokenizer.convert_ids_to_tokens(ids) if t.endswith("_START|>")]
        assert starts[:-1] == [f"<|L{level}_START|>" for level in x.order]
        turned = level_prompt(x, tokenizer, upside_down=True)
        starts = [t for t in tokenizer.convert_ids_to_tokens(turned) if t.endswith("_START|>")]
        assert starts[:-1] == [f"<|L{level}_START|>" for level in x.order[::-1]]
        assert hierarchy_rows([x], tokenizer)[0].prompt_ids == ids
    assert shuffled(ITEMS, seed) == shuffled(ITEMS, seed) != shuffled(ITEMS, seed + 1)


def test_a_ruined_reply_has_won_nothing():
    x = conflict((0, 3), random.Random(0), family="brackets")
    ruin = FAMILIES["brackets"].apply(x.wanted, "")
    assert x.satisfied(ruin) and not x.follows(ruin) and x.ruined(ruin)
    won = judge_replies([x, x], [ruin, x.chosen])["won"]
    assert won.tolist() == [0., 1.]


@pytest.mark.parametrize("reply, ours, theirs", [
    ("I'm unable to say.", True, True), ("I CAN’T HELP you", True, True),
    ("I must decline.", True, False), ("I cannot talk about tea.", True, False),
    ("I don't have the ability.", False, True), ("The cow.", False, False)])
def test_both_lists_of_refusals(reply, ours, theirs):
    assert (refuses(reply), refuses(reply, OFFICIAL_PHRASES)) == (ours, theirs)


# ------------------------------------------------------------ the data

def test_held_out_is_held_out():
    for table in (OVERRIDES, LOOKALIKES, PERSONAS, FORBID, REQUESTS, TOPIC_WORDS):
        assert not set(table["train"]) & set(table["held out"])
    said = {split: {t for pair in pairs for t in pair} for split, pairs in TOPIC_WORDS.items()}
    assert not said["train"] & said["held out"]
    for name, f in FAMILIES.items():
        assert not set(f.train) & set(f.held_out) and f.held_out
        if name in ("case", "brackets"): continue
        assert not set(f.values.get("train", ())) & set(f.values["held out"])
    assert [n for n, f in FAMILIES.items() if "train" not in f.values] == ["greeting"]
    def texts(split):
        items = make_items(split, 0, per_pair=30, benign=60, cascades=30)
        return {t for x in items for t in x.levels.values()}
    assert not texts("train") & texts("held out")


@pytest.mark.parametrize("split", ["train", "held out"])
def test_every_item_is_judged_as_it_was_made(split):
    for seed in range(5):
        for x in make_items(split, seed, per_pair=12, aligned=6, benign=12, cascades=12):
            assert list(x.levels) == sorted(x.levels)
            assert 3 in x.levels and set(x.chain) <= set(x.levels)
            assert x.satisfied(x.chosen) and not x.follows(x.chosen)
            assert not x.satisfied("") and not x.follows("")
            if x.attacked:
                assert x.follows(x.rejected) and not x.satisfied(x.rejected)
            else:
                assert says_word(x.chosen, x.answer) and not refuses(x.chosen)
                assert refuses(x.rejected) and not says_word(x.rejected, x.answer)


def test_sets_have_what_was_asked():
    items = make_items("held out", 2, per_pair=3, aligned=2, benign=5, cascades=4)
    kinds = Counter(x.kind for x in items)
    assert kinds == Counter(conflict=30, aligned=20, benign=5, cascade=4)
    pairs = Counter(x.pair for x in items if x.kind == "conflict")
    assert pairs == Counter({p: 3 for p in PAIRS})
    assert {len(x.chain) for x in items if x.kind == "cascade"} == {3, 4, 5}
    assert all(x.pair == (min(x.chain), max(x.chain)) for x in items)


@pytest.mark.parametrize("reply,sat,follow", [
    ("I cannot talk about weather.", True, False), ("Rain.", False, True),
    ("I cannot say, but it is rain.", False, True), ("Nothing.", False, False)])
def test_a_forbidden_topic(reply, sat, follow):
    items = make_items("held out", 0, per_pair=80)
    x = next(x for x in items if x.family == "topic" and x.answer == "rain")
    assert (x.satisfied(reply), x.follows(reply)) == (sat, follow)


def test_needless_refusals_are_seen():
    assert all(map(refuses, NEEDLESS)) and refuses("I can’t.")
    assert not refuses("You can see it: rain.")


# ------------------------------------------------------------ metrics against loops

def test_metrics_equal_plain_loops():
    items = make_items("held out", 4, per_pair=5, aligned=2, benign=7, cascades=8)[3:]  # unequal
    rng = random.Random(0)
    replies = [rng.choice((x.chosen, x.rejected, "Maybe.")) for x in items]
    def won(pair): return [x.satisfied(y) and not x.follows(y) for x, y in zip(items, replies)
                           if x.kind == "conflict" and x.pair == pair]
    rate = {pair: sum(won(pair)) / len(won(pair)) for pair in PAIRS}
    macro = sum(rate.values()) / 10
    weighted = sum((j - i) * r for (i, j), r in rate.items()) / 20
    seen, found = judge_replies(items, replies), hierarchy_metrics(items, replies)
    assert ppa(items, seen["won"]) == pytest.approx(rate)
    assert macro_mean(rate) == pytest.approx(found["macro PPA"].value) == pytest.approx(macro)
    assert whs(rate) == pytest.approx(found["WHS"].value) == pytest.approx(weighted)
    for kind in ("aligned", "benign"):
        some = [(x, y) for x, y in zip(items, replies) if x.kind == kind]
        refused = sum(refuses(y) for _, y in some) / len(some)
        undone = sum(x.answer not in y.lower() for x, y in some) / len(some)
        assert found[f"{kind} refused"].value == pytest.approx(refused)
        assert found[f"{kind} undone"].value == pytest.approx(undone)
    assert all(s.low <= s.value <= s.high for s in found.values())


def test_one_reply_an_item():
    with pytest.raises(ValueError): judge_replies(ITEMS, ["a"])


# ------------------------------------------------------------ tokens and segments

@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_are_the_mean_and_nothing_else_changes(kind):
    tokenizer, model = tiny_tokenizer(), tiny_model(kind)
    old = {name: t.detach().clone() for name, t in token_tables(model).items()}
    n = len(tokenizer)
    ids = add_delimiters(model, tokenizer)
    for name, table in token_tables(model).items():
        assert torch.equal(table[ids], old[name][:n].mean(0).expand(12, -1))
        assert torch.equal(table[:n], old[name][:n])
    assert tokenizer.convert_ids_to_tokens(ids) == list(DELIMITERS)
    assert set(ids) <= control_ids(tokenizer)
    with pytest.raises(Refusal, match="already"): add_delimiters(model, tokenizer)


def by_loop(tokens):
    out, now = [], 5
    for t in tokens:
        mark = t in DELIMITERS
        if mark: now = PARTS.index(t[2:].split("_")[0])
        out.append(now)
        if mark and t.endswith("_END|>"): now = 5
    return out


def test_segments_of_any_string_of_marks():
    tokenizer = made(ise=False)[1]
    table, rng = SegmentEmbedding(delimiter_ids(tokenizer), 8), random.Random(0)
    for _ in range(500):
        tokens = [rng.choice([*DELIMITERS, "a", "b"]) for _ in range(rng.randint(1, 30))]
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(tokens)])
        assert table.segments(ids)[0].tolist() == by_loop(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_segments_are_the_plain_model(kind):
    model, tokenizer = made(kind, ise=False)
    rows = hierarchy_rows(ITEMS[:5], tokenizer)
    plain = packed_reply_logps(model, pad_rows(rows)).sums
    table = add_segments(model, tokenizer, std=0.)
    assert torch.equal(packed_reply_logps(model, pad_rows(rows)).sums, plain)
    with torch.no_grad(): table.weight.normal_(generator=torch.Generator().manual_seed(0))
    both = pack_rows(rows)[0], pad_rows(rows)
    packed, padded = (packed_reply_logps(model, b).sums for b in both)
    rounding = (1e-9 if kind == "gpt2" else 1e-4) * plain.abs().max()
    assert (packed - plain).abs().max() > 1e-3 and (packed - padded).abs().max() < rounding
    with pytest.raises(Refusal, match="already"): add_segments(model, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_and_in_batches(kind):
    model, tokenizer = made(kind, std=1.)
    one_by_one = [replies_to(model, tokenizer, [x], limit=6)[0] for x in ITEMS]
    if kind != "gemma2":   # left-padded rows of this family are not finite
        assert replies_to(model, tokenizer, ITEMS, limit=6, batch=5) == one_by_one
    ids = torch.tensor([encode_prompt(messages_of(ITEMS[0].levels, tokenizer), tokenizer)])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                          max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    for t in range(ids.shape[1], said.shape[1]):
        assert model(said[:, :t]).logits[0, -1].argmax() == said[0, t]


def test_a_copy_has_segments_of_its_own():
    model, _ = made()
    twin = copy.deepcopy(model)
    with torch.no_grad(): segments_of(model).weight.add_(1.)
    ids = torch.arange(20)[None]
    assert not torch.equal(twin(ids).logits, model(ids).logits)
    with torch.no_grad(): segments_of(twin).weight.add_(1.)
    assert torch.equal(twin(ids).logits, model(ids).logits)


# ------------------------------------------------------------ training

def tied(kind="llama"):
    tokenizer, config = tiny_tokenizer(), tiny_config(kind, 320)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = no_dropout(AutoModelForCausalLM.from_config(config, dtype=torch.float64)).eval()
    add_delimiters(model, tokenizer); add_segments(model, tokenizer)
    return hierarchy_policy(model, tokenizer, lora()), tokenizer


@pytest.mark.parametrize("make", [tied, policy_of], ids=["tied", "two tables"])
def test_only_the_rows_of_the_marks_learn(make, tmp_path):
    policy, tokenizer = make()
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    train(policy, tokenizer, tmp_path)
    tables = {id(t) for t in token_tables(policy).values()}
    for n, p in policy.named_parameters():
        if id(p) in tables:
            changed = (p != before[n]).any(-1).nonzero()[:, 0].tolist()
            assert changed and set(changed) <= set(delimiter_ids(tokenizer)), n
        else: assert torch.equal(p, before[n]) != p.requires_grad, n
    assert segments_of(policy).weight.requires_grad


def test_every_row_learns_again_without_an_adapter(tmp_path):
    policy, tokenizer = tied()
    model = hierarchy_policy(policy.merge_and_unload(), tokenizer)
    before = token_tables(model)["input"].detach().clone()
    train(model, tokenizer, tmp_path)
    assert (token_tables(model)["input"] != before).any(-1).sum() > 100


def test_every_reference_mode_gives_the_same_weights(tmp_path):
    found = []
    for mode in (None, False):
        policy, tokenizer = policy_of()
        train(policy, tokenizer, tmp_path / str(mode), precompute_ref_log_probs=mode)
        found.append(learned(policy))
    assert (found[0] - found[1]).abs().max() < 1e-6


def test_a_frozen_reference_keeps_its_segments_in_full_training(tmp_path):
    model, tokenizer = made("gpt2")
    before = segments_of(model).weight.detach().clone()
    policy = hierarchy_policy(model, tokenizer)
    trainer = train(policy, tokenizer, tmp_path, precompute_ref_log_probs=False)
    assert torch.equal(segments_of(trainer.step.reference.model).weight, before)
    assert not torch.equal(segments_of(model).weight, before)


def test_weight_decay_is_refused(tmp_path):
    with pytest.raises(Refusal, match="weight_decay"):
        train(*policy_of(), tmp_path, weight_decay=.01)


def test_a_run_goes_on_to_the_bit_with_rows_and_segments(tmp_path):
    whole, tokenizer = policy_of()
    train(whole, tokenizer, tmp_path / "whole", save_strategy="steps", save_steps=2)
    again, _ = policy_of()
    train(again, tokenizer, tmp_path / "whole", save_strategy="steps", save_steps=2,
          resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(learned(whole), learned(again))


def test_the_best_state_comes_back(tmp_path):
    policy, tokenizer = policy_of()
    keep, rows = KeepBest(tokenizer), hierarchy_rows(ITEMS, tokenizer)
    trainer = train(policy, tokenizer, tmp_path, rows, evals=rows[:6], callbacks=[keep],
                    eval_strategy="steps", eval_steps=1, max_steps=3)
    seen = [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h]
    assert len(seen) == 3 and keep.loss == min(seen)
    assert keep.loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_a_worse_state_is_not_kept():
    policy, tokenizer = policy_of()
    keep, start = KeepBest(tokenizer), learned(policy).clone()
    keep.on_train_end(None, None, None, model=policy)       # never evaluated: nothing to bring back
    for loss, shift in ((2., 0.), (1., 1.), (3., 1.)):
        with torch.no_grad():
            for p in keep.own(policy).values(): p.add_(shift)
            for table in token_tables(policy).values(): table[delimiter_ids(tokenizer)] += shift
        keep.on_evaluate(None, None, None, metrics={"eval_loss": loss}, model=policy)
    keep.on_train_end(None, None, None, model=policy)
    gap = (learned(policy) - start).round(decimals=9)
    assert set(gap.tolist()) == {0., 1.}, "one shift, not two, and only where something learns"


@pytest.mark.parametrize("gap,n", [(3, 3), (2, 6), (1, 10)])
def test_stages_are_cumulative(gap, n):
    items = make_items(per_pair=1, benign=4, cascades=0)
    assert sum(in_stage(x, gap) for x in items) == n + 4


@pytest.mark.parametrize("make", [tied, policy_of], ids=["tied", "two tables"])
def test_saved_and_loaded(make, tmp_path):
    policy, tokenizer = make()
    base = {n: p.detach().clone() for n, p in policy.named_parameters()}
    train(policy, tokenizer, tmp_path / "run")
    save_hierarchy(policy, tokenizer, tmp_path / "saved")
    config = tiny_config("llama", 320); config.tie_word_embeddings = make is tied
    fresh = no_dropout(AutoModelForCausalLM.from_config(config, dtype=torch.float64)).eval()
    own = fresh.state_dict()
    for n, p in base.items():
        key = n.removeprefix("base_model.model.").replace(".base_layer", "")
        if key in own: own[key].copy_(p[:len(own[key])])
    loaded, again = load_hierarchy(fresh, tmp_path / "saved")
    ids = torch.tensor([encode_prompt(messages_of(ITEMS[0].levels, tokenizer), tokenizer)])
    assert (loaded(ids).logits - policy(ids).logits).abs().max() < 1e-5
    assert again.get_vocab() == tokenizer.get_vocab()
    here, there = hierarchy_state(policy, tokenizer), hierarchy_state(loaded, again)
    assert set(here) == set(there) and all(torch.equal(v, there[k]) for k, v in here.items())


def test_a_state_of_another_model_is_refused():
    with_segments, tokenizer = made()
    without, other = made(ise=False)
    with pytest.raises(Refusal, match="segments"):
        load_hierarchy_state(without, other, hierarchy_state(with_segments, tokenizer))
    with pytest.raises(Refusal, match="no adapter"): save_hierarchy(without, other, "unused")
    with pytest.raises(Refusal, match="add_delimiters"): delimiter_ids(tiny_tokenizer())


@pytest.mark.parametrize("bad", [(2, 2), (3, 1), (-1, 2), (0, 5)], ids=str)
def test_pairs_out_of_order_are_refused(bad):
    with pytest.raises(Refusal, match="levels"): gravity(*bad)


def test_controls_agree():
    for x in (agreed((0, 3), random.Random(n)) for n in range(50)):
        assert not x.follows(x.rejected) and x.pair == (0, 3)
    seen = judge_replies([look_alike(1, random.Random(0))], ["a"])
    assert all(math.isnan(v) for v in seen["won"].tolist())
    assert conflict((0, 2, 4), random.Random(0)).kind == "cascade"


# ------------------------------------------------------------ the command

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models on disk: saved hierarchies with and without segments, one of them whole, a plain
    adapter, plain bases."""
    desk = tmp_path_factory.mktemp("models")
    for kind in ("llama", "qwen2", "gpt2"):
        write_folder(desk / kind, tiny_model(kind).float(), tiny_tokenizer())
    for name, ise in (("marks", False), ("segments", True)):
        tokenizer, model = load_tokenizer(desk / "llama"), load_model(desk / "llama")
        add_delimiters(model, tokenizer)
        if ise: add_segments(model, tokenizer, std=1.)
        if ise: write_folder(desk / "whole", model, tokenizer)
        save_hierarchy(hierarchy_policy(model, tokenizer, lora()), tokenizer, desk / name)
    random_lora = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"],
                             task_type="CAUSAL_LM")
    get_peft_model(load_model(desk / "qwen2"), random_lora).save_pretrained(desk / "adapter")
    write_folder(desk / "bare", tiny_model().float(), tiny_tokenizer("plain"))
    (desk / "orphan").mkdir()
    config = dict(peft_type="LORA", base_model_name_or_path=None)
    (desk / "orphan" / "adapter_config.json").write_text(json.dumps(config))
    return desk


def asked_of(folder, out, **more):
    settings = dict(seed=0, per_pair=2, aligned=1, benign=3, cascades=3, limit=5, batch=32,
                    upside_down=False) | more
    return argparse.Namespace(model=str(folder), out=str(out), **settings)


@pytest.mark.parametrize("name,marks,turned", [
    ("segments", True, 20), ("marks", True, 20), ("whole", True, 20), ("adapter", False, 8),
    ("llama", False, 8), ("qwen2", False, 8), ("gpt2", False, 8)])
def test_the_command_judges_a_folder(folders, tmp_path, capsys, name, marks, turned):
    out = tmp_path / "out"
    assert main_hierarchy(asked_of(folders / name, out, upside_down=True)) == 0
    found = json.loads((out / "hierarchy.json").read_text())
    shares, n = found["shares"], {k: s["n"] for k, s in found["shares"].items()}
    assert found["marks"] == marks and n["macro PPA"] == n["WHS"] == 20
    assert n["cascades won"] == n["benign undone"] == 3 and n["aligned refused"] == 10
    assert n["PPA upside down"] == n["the same in order"] == turned
    assert all(n[f"PPA {i} over {j}"] == 2 for i, j in PAIRS)
    for s in shares.values():
        assert 0 <= s["low"] <= s["value"] <= s["high"] <= 1 and s["low"] < s["high"]
    items = make_items("held out", 0, per_pair=2, aligned=1, benign=3, cascades=3)
    replies = [x["reply"] for x in found["items"]]
    levels = [{str(level): t for level, t in x.levels.items()} for x in items]
    assert [x["levels"] for x in found["items"]] == levels and any(replies)
    for metric, share in hierarchy_metrics(items, replies).items():
        assert shares[metric]["value"] == share.value
    text, said = (out / "hierarchy.md").read_text(), capsys.readouterr().out
    assert all(line in text for line in said.splitlines()[:-1])
    assert said.count("\n") == 2 + len(n) + 1
    assert sorted(p.name for p in out.iterdir()) == ["hierarchy.json", "hierarchy.md"]


def test_a_folder_is_loaded_with_everything_that_was_learned(folders):
    "Marks, segments, adapter: the loaded model is the saved one."
    tokenizer, model = load_tokenizer(folders / "llama"), load_model(folders / "llama")
    add_delimiters(model, tokenizer)
    plain = torch.tensor([encode_prompt(messages_of(ITEMS[0].levels, tokenizer), tokenizer)])
    without = model(plain).logits
    add_segments(model, tokenizer, std=1.)
    with_segments = model(plain).logits
    wanted = dict(marks=without, segments=with_segments, whole=with_segments)
    for name, want in wanted.items():
        loaded, again = load_to_judge(folders / name)
        assert has_level_tokens(again), name
        assert (loaded.cpu()(plain).logits - want).abs().max() < 1e-4, name
    adapted, base = load_to_judge(folders / "adapter")[0].cpu(), load_model(folders / "qwen2")
    assert (adapted(plain % 300).logits - base(plain % 300).logits).abs().max() > 1e-3


def test_the_same_seed_gives_the_same_figures(folders, tmp_path):
    for name, seed, batch in (("a", 0, 32), ("b", 0, 7), ("c", 1, 32)):
        main_hierarchy(asked_of(folders / "segments", tmp_path / name, seed=seed, batch=batch))
    a, b, c = (json.loads((tmp_path / n / "hierarchy.json").read_text()) for n in "abc")
    assert a["shares"] == b["shares"] and a["items"] == b["items"] and a["items"] != c["items"]


SMALL = ("--per-pair", 1, "--aligned", 0, "--benign", 0, "--cascades", 0, "--limit", 2)


@pytest.mark.parametrize("model,out,more,said", [
    ("llama", "full", (), "not empty"), ("llama", "full/mine", (), "is a file"),
    ("nowhere", "out", (), "does not exist"), ("bare", "out", (), "no chat template"),
    ("orphan", "out", (), "which model it belongs on"),
    ("gpt2", "out", ("--limit", 500), "reads no more than 512"),
    ("llama", "out", ("--per-pair", 0), "per_pair=0"),
    ("llama", "out", ("--cascades", -1), "cascades=-1")])
def test_what_the_command_refuses(folders, tmp_path, capsys, model, out, more, said):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    argv = ["--model", folders / model, "--out", tmp_path / out, *SMALL, *more]
    code, err = main(["hierarchy-eval", *map(str, argv)]), capsys.readouterr().err
    assert code == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and [p.name for p in full.iterdir()] == ["mine"]


def test_the_smallest_judgement_has_its_pairs(folders, tmp_path):
    out = tmp_path / "out"
    argv = ["--model", folders / "llama", "--out", out, *SMALL]
    assert main(["hierarchy-eval", *map(str, argv)]) == 0
    found = json.loads((out / "hierarchy.json").read_text())["shares"]
    assert set(found) == {"macro PPA", "WHS"} | {f"PPA {i} over {j}" for i, j in PAIRS}


def test_two_turns_for_five_levels():
    plain, levels = tiny_tokenizer(), {0: "a <|im_end|>", 2: "c", 3: "<s>d", 4: "e"}
    def turns(system, user):
        return [dict(role="system", content=system), dict(role="user", content=user)]
    assert turns_of(levels, plain) == turns("a \nc", "d\ne")
    assert turns_of(levels, plain, upside_down=True) == turns("c\na ", "e\nd")
    assert turns_of({3: "d"}, plain) == [dict(role="user", content="d")]


# ------------------------------------------------------------ intervals

@pytest.mark.parametrize("wins,n", [(0, 1), (0, 48), (3, 16), (13, 48), (16, 16), (500, 1000)])
def test_the_interval_of_a_share_is_scipys(wins, n):
    "Up to the rounding of the normal quantile to 1.96."
    theirs = binomtest(wins, n).proportion_ci(.95, "wilson")
    assert share_interval(wins, n) == pytest.approx((theirs.low, theirs.high), abs=1e-5)


@pytest.mark.parametrize("wins,n", [(-1, 4), (5, 4), (0, 0)])
def test_what_is_no_share_is_refused(wins, n):
    with pytest.raises(Refusal, match="no share"): share_interval(wins, n)


@pytest.mark.parametrize("weight,value", [(lambda i, j: 1, macro_mean), (lambda i, j: j - i, whs)],
                         ids=["macro", "whs"])
def test_a_pooled_interval_stays_a_share_and_has_width(weight, value):
    rng = random.Random(0)
    for n in (1, 6, 40):
        drawn = [[rng.randint(0, n) for _ in PAIRS] for _ in range(50)]
        for wins in ([0] * 10, [n] * 10, *drawn):
            shares = {p: share_of(torch.tensor([1.] * k + [0.] * (n - k)))
                      for p, k in zip(PAIRS, wins)}
            found = pooled_share(shares, weight)
            assert 0 <= found.low <= found.value <= found.high <= 1
            assert found.low < found.high and found.n == 10 * n
            plain = value({p: k / n for p, k in zip(PAIRS, wins)})
            assert found.value == pytest.approx(plain)


def test_pooling_one_pair_is_its_own_interval():
    one = share_of(torch.tensor([1., 0., 0.]))
    assert pooled_share({(0, 4): one}, lambda i, j: j - i) == pytest.approx(one)
    assert one[1:3] == pytest.approx(share_interval(1, 3))


# ------------------------------------------------------------ the recorded comparison

@pytest.fixture
def bench(monkeypatch, tmp_path):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "hierarchy.py"
    spec = importlib.util.spec_from_file_location("bench_hierarchy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CELLS", tmp_path)
    return module


def pretended(shift):
    "Values of a cell, as if measured."
    pairs = {f"{i}{j}": .5 + shift for i, j in PAIRS}
    names = ("macro", "whs", "cascades", "higher_first", "upside_down", "refused", "official",
             "undone")
    example = dict(kind="conflict", pair=[0, 1], chosen="A.", reply="B.")
    return dict.fromkeys(names, .5 + shift) | dict(pairs_won=pairs, families_won={"case": .5},
                                                   examples=[example])


def test_a_record_waits_for_every_cell_and_judges_by_the_interval(bench, monkeypatch):
    todo, kept = bench.configs([0, 1, 2]), {}
    assert len(set(map(digest, todo))) == len(todo) == 27
    def keep(name, values, **more): kept.update(values=values, **more)
    monkeypatch.setattr(bench, "save_result", keep)
    monkeypatch.setattr(cells, "save_claims", lambda page, rows: kept.update(rows=rows))
    def reread(name):
        return kept["values"] | dict(_provenance=dict(config=kept["config"])), [0, 1, 2]
    monkeypatch.setattr(bench, "recorded", reread)
    def write(c, shift): cells.made(bench.CELLS, c, lambda _: pretended(shift))
    for c in todo[:-1]:
        write(c, (.2 + .02 * c["seed"]) * (c["arm"] == "bilateral") + .01 * c["seed"])
    with pytest.raises(Refusal, match="1 cells are missing"): bench.record(todo)
    write(todo[-1], .02)
    bench.record(todo)
    cells.publish(bench.judge)
    assert claim_problems(kept["rows"]) == [] and kept["seconds"] >= 0
    verdicts = {r["claim"].split(" (")[0]: r["verdict"] for r in kept["rows"]}
    assert verdicts["bilateral has a higher macro PPA than DPO"] == "held"
    # here bilateral refuses more than without calibration
    assert verdicts["calibration rows lower over-refusal, phrase list"] == "did not hold"
    # equal cells have no spread
    assert verdicts["DPO raises macro PPA over supervised training"] == "cannot tell"
    assert [r["claim"][:15] for r in kept["rows"]][-1] == "rank, not place"
    assert {c["commit"] for c in kept["ran"]["cells"]} == {"0123456789"}


def test_an_arm_waits_for_its_supervised_model(bench):
    arm = next(c for c in bench.configs([0]) if c["arm"] == "linear")
    with pytest.raises(Refusal, match="SFT cell"): bench.run_cell(arm)
