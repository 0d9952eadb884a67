"Rows: borders, end tokens, truncation, and 10,000 strings that try to become control tokens."
import random
from pathlib import Path
import pytest
from dpo_literate.preferences import load_preferences
from dpo_literate.results import Refusal, data_dir
from dpo_literate.rows import (TEMPLATES, VERDICTS, control_ids, encode_pair, encode_pairs, encode_prompt, encode_text, fit, length_weights,
                               plain_bos, render, segments, tiny_tokenizer)

def U(c): return {"role": "user", "content": c}
def A(c): return {"role": "assistant", "content": c}
def chat(q="the cat?", w="yes", l="no", before=()): return {"prompt": [*before, U(q)], "chosen": [A(w)], "rejected": [A(l)]}
GOOD_KINDS = [k for k in TEMPLATES if k not in ("plain", "open tag")]
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<s>"]

@pytest.mark.parametrize("kind", GOOD_KINDS)
@pytest.mark.parametrize("before", [(), (U("a"), A("<think>x</think>b")), ({"role": "system", "content": " s "}, U("a "), A("b"))])
def test_rows_are_the_templates_own_text(kind, before):
    tok, pair = tiny_tokenizer(kind), chat(" the cat? \n", "yes, it sat", "no", before)
    row = encode_pair(pair, tok)
    assert tok.decode(row.prompt_ids) == render(tok, pair["prompt"], reply_next=True)
    for ids, k in ((row.chosen_ids, "chosen"), (row.rejected_ids, "rejected")):
        whole = render(tok, pair["prompt"] + pair[k])
        assert tok.decode(row.prompt_ids + ids) == whole.removesuffix("\n")
        assert ids[-1] == tok.eos_token_id and ids.count(tok.eos_token_id) == 1
    tail = encode_pair(pair, tok, score_tail=True)
    assert tail.chosen_ids[:-1] == row.chosen_ids and tok.decode(tail.chosen_ids[-1:]) == "\n"

def test_no_border_is_refused():
    with pytest.raises(Refusal, match="not the beginning"): encode_pair(chat(), tiny_tokenizer("open tag"))
    with pytest.raises(Refusal, match="no chat template"): encode_pair(chat(), tiny_tokenizer("plain"))

def test_template_that_rewrites_text_is_refused():
    tok = tiny_tokenizer(); tok.chat_template = TEMPLATES["chatml"].replace("m['content']", "m['content']|upper")
    with pytest.raises(Refusal, match="changes the text"): encode_pair(chat(), tok)
    tok.chat_template = "{% for i in range(10**9) %}{{ i }}{% endfor %}"
    with pytest.raises(Refusal, match="refused the messages"): encode_pair(chat(), tok)

@pytest.mark.parametrize("bos", [True, False])
def test_one_bos_where_the_tokenizer_puts_it(bos):
    tok = tiny_tokenizer("plain", bos=bos)
    row = encode_pair({"prompt": "the c", "chosen": "at sat", "rejected": "ow sat"}, tok)
    assert plain_bos(tok) == ([tok.bos_token_id] if bos else [])
    assert tok.decode(row.prompt_ids).removeprefix("<s>" if bos else "") == "the c"
    assert tok.decode(row.chosen_ids) == "at sat<|im_end|>" and tok.decode(row.rejected_ids) == "ow sat<|im_end|>"
    assert row.prompt_ids == encode_prompt("the c", tok) and None not in row.prompt_ids

def test_pad_equal_to_eos_changes_nothing():
    a, b = tiny_tokenizer(), tiny_tokenizer(); b.pad_token = b.eos_token
    assert encode_pair(chat(), a).key == encode_pair(chat(), b).key
    package = Path(__file__).parents[1] / "dpo_literate"
    assert not [p for p in package.rglob("*.py") if any(w in p.read_text() for w in ("!= pad_token_id", "!= tokenizer.pad", "ne(pad", ".ne(tokenizer.pad"))]

def brute(p, c, r, limit, how):
    "The rule again, one token at a time."
    if p + max(c, r) <= limit: return "kept", p, c, r
    if how == "refuse": return "refused", p, c, r
    if how == "keep_start":
        while p + max(c, r) > limit and max(c, r) > 0:
            if c >= r: c, r = c - 1, min(r, c - 1)
            else: r -= 1
        return ("reply cut", p, c, r) if max(c, r) > 0 else (VERDICTS[3], 0, 0, 0)
    while p + max(c, r) > limit and p > 1: p -= 1
    return ("prompt cut", p, c, r) if p + max(c, r) <= limit else (VERDICTS[4], 0, 0, 0)

def test_truncation_against_brute_force():
    n = 0
    for p in range(0, 13):
        for c in range(1, 11):
            for r in range(1, 11):
                for limit in range(1, 19, 2):
                    for how in ("refuse", "keep_start", "keep_end"):
                        n += 1
                        want, (verdict, cut, most) = brute(p, c, r, limit, how), fit(p, c, r, limit, how)
                        assert verdict == want[0], (p, c, r, limit, how)
                        if not verdict.startswith("dropped"):
                            assert (p - cut, min(c, most), min(r, most)) == want[1:]
                            assert min(c, most) >= 1 and min(r, most) >= 1
    print(f"{n} combinations, 0 mismatches")
    assert n >= 10_000

def test_truncated_rows_are_counted_and_keep_one_prompt():
    tok, rng = tiny_tokenizer(), random.Random(0)
    pairs = [chat("the cat " * rng.randint(1, 30), "yes " * rng.randint(1, 30), "no é😀" * rng.randint(1, 30)) for _ in range(200)]
    for how in ("keep_start", "keep_end"):
        for limit in (10, 20, 40, 60):
            rows, counts = encode_pairs(pairs, tok, max_length=limit, truncation=how)
            assert counts.rows_in == sum(counts.by.values()) == 200 and counts.rows_out == len(rows)
            assert all(len(r) <= limit and r.chosen_ids and r.rejected_ids for r in rows)
            assert not any(tok.decode(ids).endswith("\ufffd") for r in rows for ids in (r.chosen_ids, r.rejected_ids) if len(ids) > 3)
    with pytest.raises(Refusal, match="of 200 pairs"): encode_pairs(pairs, tok, max_length=40)

def test_pairs_made_equal_by_the_cut_are_counted():
    rows, counts = encode_pairs([{"prompt": "a", "chosen": "x" * 20 + "y", "rejected": "x" * 20 + "z"}], tiny_tokenizer(), max_length=8, truncation="keep_start")
    assert not rows and counts.by["dropped: equal after the cut"] == 1

def test_prefix_weights_offset_and_key():
    tok = tiny_tokenizer()
    a = encode_pair({"prompt": "q", "chosen": "two", "rejected": "three", "prefix": "one ", "weight": 2., "margin": .5}, tok, ld_alpha=.5)
    assert tok.decode(a.prompt_ids) == "qone " and (a.weight, a.offset) == (2., .5)
    assert a.chosen_weights is None or a.rejected_weights is None
    assert length_weights(4, 2, .25) == [1., 1., .25, .25]
    assert a.key != encode_pair({"prompt": "qone ", "chosen": "two", "rejected": "three"}, tok).key or a.chosen_weights == a.rejected_weights
    with pytest.raises(Refusal): encode_pair({"prompt": "q", "chosen": "a", "rejected": "abc"}, tok, ld_alpha=2.)

def controls(tok, ids): return {i: ids.count(i) for i in control_ids(tok)}

def test_fuzz_10000_strings_make_no_control_token():
    tok, rng = tiny_tokenizer(), random.Random(0)
    control, pieces = control_ids(tok), SPECIAL + ["<|", "|>", "im_end", "\n", " ", "```", "｜", "＜|im_end|＞", "é", "😀", "\u202e", "\0", "a", "<think>", "\ue000", "\ue0000\ue000"]
    for _ in range(10_000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 8)))
        ids = encode_text(tok, text)
        assert not control.intersection(ids) and tok.decode(ids) == text

@pytest.mark.parametrize("special", SPECIAL)
def test_controls_in_every_field(special):
    tok = tiny_tokenizer("chatml")
    plain = encode_pair(chat("q", "a", "b", ({"role": "system", "content": "s"},)), tok)
    for q, w, l, s in ((special, "a", "b", "s"), ("q", special, "b", "s"), ("q", "a", special, "s"), ("q", "a", "b", special), (special * 10_000, "a", "b", "s"),
                       (special[:2], special[2:], "b", "s"), (f"```{special}```", "a", "b", "s"), ("q", f"{special}a", f"{special}b", special)):
        row = encode_pair(chat(q, w, l, ({"role": "system", "content": s},)), tok, max_length=None)
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"): assert controls(tok, getattr(row, name)) == controls(tok, getattr(plain, name))

def test_unicode_round_trip():
    tok = tiny_tokenizer()
    for text in ("👩‍👩‍👧", "e\u0301 é", "\u202eabc", "a\0b", "a\u2028b", "\ue000", "x" * 100_000):
        assert tok.decode(encode_text(tok, text)) == text

def test_segments_are_the_rendering():
    tok = tiny_tokenizer("system")
    m = [U("\ue0000\ue000"), A("<|im_end|>"), U("x")]
    parts = segments(tok, m, reply_next=True)
    assert "".join(t for t, _ in parts) == render(tok, m, reply_next=True) and [t for t, d in parts if d] == ["\ue0000\ue000", "<|im_end|>", "x"]

@pytest.mark.skipif(data_dir() is None, reason="no data")
def test_real_pairs():
    prefs = load_preferences(data_dir() / "hh_harmless")
    rows, counts = encode_pairs(prefs, tiny_tokenizer(), max_length=None)
    assert counts.by["kept"] == 902 == len({r.id for r in rows})

def test_identical_replies_are_refused_or_dropped_and_counted():
    tok, same = tiny_tokenizer("trims"), chat("q", "yes", "yes ")
    with pytest.raises(Refusal, match="same tokens"): encode_pairs([same], tok)
    rows, counts = encode_pairs([same, chat()], tok, identical="drop")
    assert len(rows) == 1 and counts.by["dropped: identical replies"] == 1 and sum(counts.by.values()) == 2

def test_controls_in_tools_names_and_roles_are_refused():
    tok = tiny_tokenizer(); tok.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATES["chatml"]
    tool = {"type": "function", "function": {"name": "f", "description": "<|im_end|>", "parameters": {}}}
    with pytest.raises(Refusal, match="control token"): encode_pair({**chat(), "tools": [tool]}, tok)
    tool["function"]["description"] = "fine"
    assert "fine" in tok.decode(encode_pair({**chat(), "tools": [tool]}, tok).prompt_ids)
    with pytest.raises(Refusal, match="control token"): encode_pair({**chat(), "prompt": [{**U("q"), "name": "<|im_start|>"}]}, tok)
    with pytest.raises(Refusal, match="need a chat"): encode_pair({"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}, tok)
