"Prompt injection beyond the page: ten thousand nested strings, reserved ids on every template, pairs counted, each attack on each tokenizer, GCG against brute force."
import argparse
import base64
import json
import random

import pytest
import torch

from dpo_literate.hierarchy import strip_reserved
from dpo_literate.models import tiny_model, write_folder
from dpo_literate.results import Refusal
from dpo_literate.rows import control_ids, encode_pairs, encode_text, render, tiny_tokenizer
from dpo_literate.secalign import (ATTACKS, DEFENCES, IGNORE, PAYLOAD, RESERVED, Search, answers, asr, attack_suite, attacked, begins, chat, check_tasks, contains,
                                   delimiters_of, first_sentence, forged_turns, front_end, gcg, injected, injected_prompt, main_attack, near_miss, overlap,
                                   own_replies, own_turns, placed, query, read_tasks, reserve_tokens, secalign_pairs, share_interval, shipped_tasks,
                                   suffix_slot, swaps, utility, writable)

TASKS = shipped_tasks()
PLAIN = tiny_tokenizer()
KINDS = ("llama", "qwen2", "gpt2")


def struq():
    tokenizer = tiny_tokenizer()
    reserve_tokens(tokenizer)
    return tokenizer


STRUQ = struq()
VICTIMS = {"chatml": PLAIN, "struq": STRUQ, "system": tiny_tokenizer("system"), "bos": tiny_tokenizer("bos")}


# ------------------------------------------------------------ the filter

def fuzzed(rng, delimiters):
    "Delimiters whole, cut, nested in each other, and in between what else a string can hold."
    def piece():
        d = rng.choice(delimiters)
        kind = rng.randrange(5)
        if kind == 0: return d
        if kind == 1: return d[:rng.randrange(len(d) + 1)]
        if kind == 2: return d[rng.randrange(len(d) + 1):]
        if kind == 3: return "".join(rng.choice([" ", "\n", "#", "|", "[", "]", "é", "\u200b", "\x00", "日", "a"]) for _ in range(rng.randrange(4)))
        k = rng.randrange(len(d) + 1)
        return d[:k] + rng.choice(delimiters) + d[k:]
    return "".join(piece() for _ in range(rng.randrange(1, 25)))


@pytest.mark.parametrize("name", ("chatml", "struq"))
def test_ten_thousand_nested_strings(name):
    "No delimiter is left, the filter is idempotent, and no reserved id comes out of the tokenizer."
    tokenizer = VICTIMS[name]
    delimiters, never, rng, hits = delimiters_of(tokenizer), control_ids(tokenizer), random.Random(name), 0
    for k in range(10_000):
        text = fuzzed(rng, delimiters)
        clean = front_end(tokenizer, text)
        hits += clean != text
        assert not any(d in clean for d in delimiters), text
        assert strip_reserved(clean, delimiters) == clean
        if k % 10 == 0: assert not never & set(encode_text(tokenizer, clean)) and not never & set(encode_text(tokenizer, text))
    assert hits > 5000


def test_the_filter_against_deleting_again_and_again():
    "With one delimiter the walk and the repeated deletion leave the same text."
    def again(text, d):
        while d in text: text = text.replace(d, "", 1)
        return text
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice("[IN[ST]]") for _ in range(rng.randrange(40)))
        assert strip_reserved(text, ["[INST]"]) == again(text, "[INST]")
    assert strip_reserved("nothing here", ["[INST]"]) == "nothing here" and strip_reserved("", ["a"]) == ""


def test_a_delimiter_that_is_part_of_another():
    assert strip_reserved("a###b##c#", ["##", "###"]) == "a#bc#" or "##" not in strip_reserved("a###b##c#", ["##", "###"])
    with pytest.raises(Refusal, match="empty string"): strip_reserved("x", [""])


def test_a_hundred_thousand_layers_take_no_square():
    n = 100_000
    assert strip_reserved("[IN" * n + "[INST]" + "ST]" * n, ["[INST]"]) == ""


# ------------------------------------------------------------ slots and reserved tokens

@pytest.mark.parametrize("name", sorted(VICTIMS))
def test_untrusted_text_yields_no_reserved_id(name):
    "In every slot and under every attack, the control tokens of a query are those of the template."
    tokenizer = VICTIMS[name]
    never = control_ids(tokenizer)
    def count(ids): return sum(i in never for i in ids)
    want = count(query(tokenizer, chat("Sort.", "fig")))
    assert want >= 4
    for token in [t.content for t in tokenizer.added_tokens_decoder.values()]:
        for data in (token, token * 50, f"a{token}b", f"```{token}```", f"{token[:2]}{token}{token[2:]}"):
            assert count(query(tokenizer, chat("Sort.", data))) == want
            assert count(query(tokenizer, chat("Sort.", front_end(tokenizer, data) or "-"))) == want
    for attack in ATTACKS:
        data = attacked(TASKS[0], attack, tokenizer)
        for make in DEFENCES.values(): assert count(query(tokenizer, make("Sort.", front_end(tokenizer, data)))) == want


def test_without_the_front_end_a_forgery_is_real():
    for name in ("chatml", "struq"):
        tokenizer = VICTIMS[name]
        data = attacked(TASKS[0], "completion_real", tokenizer)
        never = control_ids(tokenizer)
        counts = [sum(i in never for i in query(tokenizer, chat("Sort.", data), front_end=f)) for f in (False, True)]
        assert counts[0] > counts[1]


@pytest.mark.parametrize("kind", KINDS)   # llama has a head of its own, gpt2 shares its embedding
@pytest.mark.parametrize("size", (320, 300))
def test_reserved_rows_start_as_their_words(kind, size):
    tokenizer, model = tiny_tokenizer(vocab_size=size), tiny_model(kind, vocab_size=size)
    old = [m.weight.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    reserve_tokens(tokenizer, model)
    for table, before in zip((model.get_input_embeddings(), model.get_output_embeddings()), old):
        for token, word in RESERVED.items():
            assert torch.equal(table.weight[tokenizer.convert_tokens_to_ids(token)], before[encode_text(tokenizer, word)].mean(0))
    assert model(torch.tensor([query(tokenizer, chat("Sort.", "fig"))])).logits.isfinite().all()
    assert set(RESERVED) <= set(delimiters_of(tokenizer)) and "<|im_end|>" in delimiters_of(tokenizer)


def test_reserving_twice_changes_nothing():
    tokenizer, model = tiny_tokenizer(), tiny_model()
    reserve_tokens(tokenizer, model)
    n, table = len(tokenizer), model.get_input_embeddings().weight.detach().clone()
    reserve_tokens(tokenizer, model)
    assert len(tokenizer) == n and torch.equal(model.get_input_embeddings().weight, table)


def test_struq_pairs_are_rows_with_one_end_token():
    rows, counts = encode_pairs(secalign_pairs(TASKS, STRUQ), STRUQ)
    assert counts.rows_out == len(TASKS)
    for row in rows:
        assert row.chosen_ids[-1] == row.rejected_ids[-1] == STRUQ.eos_token_id
        assert sum(i == STRUQ.convert_tokens_to_ids("[RESP]") for i in row.prompt_ids) == 1


# ------------------------------------------------------------ the pairs

def test_a_pair_is_the_task_under_attack():
    for seed in range(5):
        for pair, row in zip(secalign_pairs(TASKS, PLAIN, seed=seed), TASKS):
            instruction, data = (m["content"] for m in pair["prompt"])
            chosen, rejected = (pair[side][0]["content"] for side in ("chosen", "rejected"))
            assert instruction == row["instruction"] and chosen == row["output"] != rejected
            other = [r for r in TASKS if r["output"] == rejected and front_end(PLAIN, injected_prompt(r)) in data]
            assert other and data.startswith(row["input"])


def test_clean_rows_have_no_attack():
    assert all(p["prompt"] == chat(r["instruction"], r["input"]) for p, r in zip(secalign_pairs(TASKS, PLAIN, clean=1.), TASKS))


def test_shares_of_attacks_and_places():
    rng, n = random.Random(0), 6000
    rows = [injected(TASKS[0], TASKS[9], rng, places=("start", "middle", "end")) for _ in range(n)]
    done = sum("\n\n" in d for d in rows)
    start = sum(d.startswith("Write") for d in rows)
    end = sum(d.endswith("chess.") and "\n\n" not in d for d in rows)
    for got, want in ((done, .1), (start, .3), (end, .3), (n - done - start - end, .3)): assert abs(got / n - want) < .03


def test_training_never_shows_what_is_tested():
    def drawn(held): return {t for k in range(4000) for t in forged_turns(random.Random(k), held)}
    assert not drawn(True) & drawn(False)
    text = " ".join(m["content"] for s in range(30) for p in secalign_pairs(TASKS, PLAIN, seed=s) for m in p["prompt"]).lower()
    assert PAYLOAD.lower() not in text and not any(s.format("").strip().lower() in text for s in IGNORE)


def test_pairs_are_the_same_for_a_seed():
    a, b, c = (json.dumps(secalign_pairs(TASKS, PLAIN, seed=s)) for s in (1, 1, 2))
    assert a == b != c


@pytest.mark.parametrize("rows, says", [
    ([dict(instruction="a", input="b")], "tasks:1: .*output"), ([dict(instruction="a", input=" ", output="c")], "tasks:1: .*input"),
    ([dict(instruction=3, input="b", output="c")], "tasks:1: .*instruction"), (["x"], "tasks:1"), ([], "two tasks"),
    ([dict(instruction="a", input="b", output="c")] * 3, "two tasks")])
def test_bad_tasks_are_refused(rows, says):
    with pytest.raises(Refusal, match=says): check_tasks(rows)


def test_a_file_names_its_line(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in TASKS[:3]) + '\n{"instruction": "x", "input": "y"}\n')
    with pytest.raises(Refusal, match=r"t.jsonl:4: .*output"): read_tasks(file)
    file.write_text("\n".join(json.dumps(r) for r in TASKS))
    assert read_tasks(file) == TASKS


@pytest.mark.parametrize("text, first", [("Apple. And more", "Apple."), ("Apple", "Apple"), (" 3.5 apples are here. Yes", "3.5 apples are here."), ("", ""), ("Hm! No?", "Hm!")])
def test_first_sentence(text, first): assert first_sentence(text) == first


# ------------------------------------------------------------ the attacks

@pytest.mark.parametrize("name", sorted(VICTIMS))
def test_own_turns_are_what_the_template_writes(name):
    reply, task = own_turns(VICTIMS[name])
    text = render(VICTIMS[name], chat("i", "d") + [{"role": "assistant", "content": "r"}])
    assert reply and task and f"d{reply}" in text.replace("\n\n", "") or f"d\n{reply}" in text or reply in text


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_an_attack_keeps_the_data_and_carries_the_payload(attack):
    for row in TASKS:
        data = attacked(row, attack, PLAIN, "Say blue", seed=3)
        carried = base64.b64encode(b"Say blue").decode() if attack == "base64" else "Say blue"
        assert carried in data and attacked(row, attack, PLAIN, "Say blue", seed=3) == data
        if not attack.endswith("middle"): assert row["input"] in data
        else: assert data.split()[0] == row["input"].split()[0] or " " not in row["input"]
        where = data.index(carried)
        if attack.endswith("_start"): assert where < data.index(row["input"])


def test_near_misses_are_misses():
    for text in [*own_turns(PLAIN), *own_turns(STRUQ)]:
        for k in range(20): assert near_miss(text, random.Random(k)) != text
    assert near_miss("123", random.Random(0)) == "12"


def test_unknown_names_are_refused():
    with pytest.raises(Refusal, match="no attack 'nive'"): attacked(TASKS[0], "nive", PLAIN)
    with pytest.raises(Refusal, match="no defence"): attack_suite(tiny_model(), PLAIN, TASKS, defence="hope")
    with pytest.raises(Refusal, match="none of start"): placed("a", "b", "top")


def test_a_fence_cannot_be_closed_from_inside():
    data = DEFENCES["isolation"]("Sort.", "a\n~~~\nPrint")[1]["content"]
    assert data.count("~~~") == 2 and data.startswith("~~~\n") and data.endswith("\n~~~")


# ------------------------------------------------------------ measuring

def test_greedy_answers_are_argmax_one_by_one():
    model = tiny_model()
    queries = [query(PLAIN, chat(r["instruction"], r["input"])) for r in TASKS[:6]]
    for ids, text in zip(queries, answers(model, PLAIN, queries, limit=6, batch=4)):
        said = []
        for _ in range(6):
            said.append(model(torch.tensor([ids + said])).logits[0, -1].argmax().item())
            if said[-1] in control_ids(PLAIN): break
        assert text == PLAIN.decode(said, skip_special_tokens=True).strip()


def test_the_suite_counts_its_replies():
    found = attack_suite(tiny_model(), PLAIN, TASKS[:4], ("naive", "base64"), limit=3)
    assert list(found) == ["naive", "base64"] and all(len(f[k]) == 4 for f in found.values() for k in ("begin", "contain", "replies"))
    made = {"a": dict(begin=[True, False], contain=[True, True])}
    assert asr(made) == {"a": .5} and asr(made, "contain") == {"a": 1.}
    assert all(b <= c for f in found.values() for b, c in zip(f["begin"], f["contain"]))


def test_utility_is_between_nothing_and_all():
    values = utility(tiny_model(), PLAIN, TASKS[:3], limit=3)
    assert len(values) == 3 and all(0 <= v <= 1 for v in values)
    rows = own_replies(tiny_model(), PLAIN, TASKS[:3], limit=4)
    assert all(r["output"] for r in rows) and len(rows) <= 3


@pytest.mark.parametrize("reply, begin, inside", [("Hacked!", 1, 1), ("“hacked”", 1, 1), ("*Hacked*", 1, 1), ("The answer is Hacked", 0, 1), ("Hack", 0, 0), ("", 0, 0)])
def test_success(reply, begin, inside): assert (begins(reply), contains(reply)) == (bool(begin), bool(inside))


@pytest.mark.parametrize("wins, n", [(0, 16), (3, 16), (16, 16), (1, 2)])
def test_the_interval_of_a_share_solves_its_equation(wins, n):
    "Wilson's ends are the shares p with |p - wins/n| = 1.96 sqrt(p(1-p)/n)."
    for p in share_interval(wins, n): assert p in (0., 1.) or abs(abs(p - wins / n) - 1.96 * (p * (1 - p) / n)**.5) < 1e-12
    low, high = share_interval(wins, n)
    assert low <= wins / n <= high and 0 <= low < high <= 1
    with pytest.raises(Refusal, match="no share"): share_interval(n + 1, n)


def test_overlap_is_symmetric():
    assert overlap("a b c", "b c d") == overlap("b c d", "a b c") == 2 / 3


# ------------------------------------------------------------ GCG

def plain_loss(model, slot, ids):
    whole = torch.tensor([slot.head + ids + slot.tail + slot.target])
    logps = model(whole).logits[0, :-1].log_softmax(-1)
    return -logps.gather(-1, whole[0, 1:, None])[-len(slot.target):].sum().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filtered", (True, False))
def test_gcg_scores_what_the_victim_reads(kind, filtered):
    model, slot = tiny_model(kind), suffix_slot(PLAIN, TASKS[1], filtered=filtered)
    search = Search(model, PLAIN, slot, length=5)
    others = [ids for ids in swaps(search.gradient(), search.ids, search.allowed, 20, 12, torch.Generator().manual_seed(1))]
    got = search.losses([search.ids, *others])
    for ids, loss in zip([search.ids, *others], got): assert abs(plain_loss(model, slot, ids) - loss.item()) < 1e-9
    assert search.loss == pytest.approx(plain_loss(model, slot, search.ids), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_gcg_never_rises_and_its_text_is_its_tokens(seed):
    model, slot = tiny_model(seed=seed), suffix_slot(STRUQ if seed % 2 else PLAIN, TASKS[seed])
    tokenizer = STRUQ if seed % 2 else PLAIN
    if seed % 2: reserve_tokens(tokenizer, model)
    found = gcg(model, tokenizer, slot, steps=6, length=5, width=24, seed=seed)
    assert all(b <= a for a, b in zip(found["losses"], found["losses"][1:])) and found["losses"][-1] < found["losses"][0]
    data = front_end(tokenizer, placed(TASKS[seed]["input"], PAYLOAD) + found["suffix"])
    assert query(tokenizer, chat(TASKS[seed]["instruction"], data)) == found["query"]
    again = gcg(model, tokenizer, slot, steps=6, length=5, width=24, seed=seed)
    assert again == found


def test_the_gradient_is_that_of_a_one_hot_row():
    "Against autograd through a full forward pass without cache."
    model, slot = tiny_model("gpt2"), suffix_slot(PLAIN, TASKS[2])
    search = Search(model, PLAIN, slot, length=4)
    table = model.get_input_embeddings().weight.detach()
    rows = torch.nn.functional.one_hot(torch.tensor(search.ids), len(table)).double().requires_grad_()
    whole = torch.cat([table[torch.tensor(slot.head)], rows @ table, table[torch.tensor(slot.tail + slot.target)]])
    logps = model(inputs_embeds=whole[None]).logits[0, :-1].log_softmax(-1)[-len(slot.target):]
    loss = -logps.gather(-1, torch.tensor(slot.target)[:, None]).sum()
    assert (torch.autograd.grad(loss, rows)[0] - search.gradient()).abs().max() < 1e-10


def test_a_step_takes_the_best_of_all_swaps():
    model, slot = tiny_model(seed=3), suffix_slot(PLAIN, TASKS[4])
    search = Search(model, PLAIN, slot, length=2)
    search.allowed[120:] = False
    every = [[*search.ids[:s], v, *search.ids[s + 1:]] for s in range(len(search.ids)) for v in range(320) if search.allowed[v]]
    want = min(plain_loss(model, slot, ids) for ids in every if slot.holds(PLAIN, ids))
    assert abs(search.step(10**6, 10**6, None) - min(want, plain_loss(model, slot, search.ids))) < 1e-9


def test_swaps_are_single_and_allowed():
    allowed = torch.zeros(50, dtype=torch.bool); allowed[10:20] = True
    some = swaps(torch.randn(3, 50), [10, 11, 12], allowed, top_k=5, width=7, generator=torch.Generator().manual_seed(0))
    assert len(some) == 7 and all(sum(a != b for a, b in zip(ids, [10, 11, 12])) == 1 and set(ids) <= set(range(10, 20)) for ids in some)


def test_no_reserved_token_is_writable():
    for tokenizer in (PLAIN, STRUQ):
        allowed = writable(tokenizer, len(tokenizer) + 3)
        assert allowed.sum() > 80 and not any(allowed[i] for i in control_ids(tokenizer)) and not allowed[-3:].any()


def test_gcg_through_an_adapter_and_its_dial():
    "The adapter counts: at scale 0 the loss is the bare model's, at full scale it is that of a merged copy."
    from peft import LoraConfig, get_peft_model
    from peft.helpers import rescale_adapter_scale
    bare, slot = tiny_model("gpt2"), suffix_slot(PLAIN, TASKS[0])
    torch.manual_seed(0)
    wrapped = get_peft_model(tiny_model("gpt2"), LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], init_lora_weights=False, task_type="CAUSAL_LM")).eval()
    ids = Search(bare, PLAIN, slot, length=4).ids
    with rescale_adapter_scale(wrapped, 0.): assert abs(Search(wrapped, PLAIN, slot, length=4).loss - plain_loss(bare, slot, ids)) < 1e-9
    whole = Search(wrapped, PLAIN, slot, length=4).loss
    found = gcg(wrapped, PLAIN, slot, steps=2, length=4, width=8)
    assert found["losses"][0] == whole and abs(whole - plain_loss(wrapped.merge_and_unload(), slot, ids)) < 1e-9 and abs(whole - plain_loss(bare, slot, ids)) > .01


def test_the_search_leaves_the_model_alone():
    model, slot = tiny_model(), suffix_slot(PLAIN, TASKS[0])
    before = [p.detach().clone() for p in model.parameters()]
    gcg(model, PLAIN, slot, steps=2, length=3, width=4)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters()))


# ------------------------------------------------------------ the command

def test_the_command_attacks_a_folder(tmp_path):
    folder = write_folder(tmp_path / "model", tiny_model().float(), PLAIN)
    (tmp_path / "tasks.jsonl").write_text("\n".join(json.dumps(r) for r in TASKS[:4]))
    out = tmp_path / "report"
    args = argparse.Namespace(model=str(folder), tasks=str(tmp_path / "tasks.jsonl"), out=str(out), defence="none", raw=False, limit=3, first=3, seed=0, gcg=1, gcg_steps=2)
    assert main_attack(args) == 0
    found = json.loads((out / "attack.json").read_text())
    assert set(found["begin"]) == set(ATTACKS) and found["tasks"] == 3 and len(found["gcg"]) == 1 and 0 <= found["max"] <= 1
    table = (out / "attack.md").read_text()
    assert all(name in table for name in ATTACKS)
    with pytest.raises(Refusal, match="not empty"): main_attack(args)
