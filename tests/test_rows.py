"Rows: borders, end tokens, truncation, and 10,000 strings that try to become control tokens."
import copy, itertools, json, os, random, time, tracemalloc
from dataclasses import replace
from pathlib import Path
import pytest
import dpo_literate.many_rows as many_rows_
from dpo_literate import spool
from dpo_literate.many_rows import encode_rows
from dpo_literate.reading import load_preferences
from dpo_literate.results import Refusal, data_dir
from dpo_literate.rows import (
    TEMPLATES, VERDICTS, Row, Rows, column, control_ids, encode_pair, encode_pairs, encode_prompt,
    encode_text, fit, largest_id, length_weights, plain_bos, render, segments, split_pairs,
    tiny_tokenizer)

def U(c): return {"role": "user", "content": c}
def A(c): return {"role": "assistant", "content": c}
def S(c): return {"role": "system", "content": c}
def chat(q="the cat?", w="yes", l="no", before=()):
    return {"prompt": [*before, U(q)], "chosen": [A(w)], "rejected": [A(l)]}
def text(q="q", w="a", l="b", **more): return {"prompt": q, "chosen": w, "rejected": l, **more}

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
KINDS = [k for k in TEMPLATES if k != "plain"]
CHATML = [k for k in KINDS if k not in ("open tag", "human")]   # border behind a control token
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<s>"]

@pytest.mark.parametrize("kind", CHATML)
@pytest.mark.parametrize("before", [(), (U("a"), A("<think>x</think>b")),
                                    (S(" s "), U("a "), A("b"))])
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

def test_a_border_that_no_control_token_marks():
    row = encode_pair(chat(), tiny_tokenizer("open tag"))
    assert row == encode_pair(chat(), tiny_tokenizer())
    row, tok = encode_pair(chat(), tiny_tokenizer("human")), tiny_tokenizer("human")
    assert tok.decode(row.prompt_ids) == "\n\nHuman: the cat?\n\nAssistant:"
    assert tok.decode(row.chosen_ids) == " yes<|im_end|>"

def test_a_chat_without_a_template_is_refused():
    with pytest.raises(Refusal, match="no chat template"):
        encode_pair(chat(), tiny_tokenizer("plain"))
    with pytest.raises(Refusal, match="no chat template"):
        encode_prompt([U("a")], tiny_tokenizer("plain"))

def test_template_that_rewrites_text_is_refused():
    tok = tiny_tokenizer()
    tok.chat_template = TEMPLATES["chatml"].replace("m['content']", "m['content']|upper")
    with pytest.raises(Refusal, match="changes the text"): encode_pair(chat(), tok)
    tok.chat_template = "{% for i in range(10**9) %}{{ i }}{% endfor %}"
    with pytest.raises(Refusal, match="refused the messages"): encode_pair(chat(), tok)

@pytest.mark.parametrize("bos", [True, False])
def test_one_bos_where_the_tokenizer_puts_it(bos):
    tok = tiny_tokenizer("plain", bos=bos)
    row = encode_pair(text("the c", "at sat", "ow sat"), tok)
    assert plain_bos(tok) == ([tok.bos_token_id] if bos else [])
    assert tok.decode(row.prompt_ids) == ("<s>" if bos else "") + "the c"
    assert tok.decode(row.chosen_ids) == "at sat<|im_end|>"
    assert tok.decode(row.rejected_ids) == "ow sat<|im_end|>"
    assert row.prompt_ids == encode_prompt("the c", tok) and None not in row.prompt_ids

def test_pad_equal_to_eos_changes_nothing():
    a, b = tiny_tokenizer(), tiny_tokenizer(); b.pad_token = b.eos_token
    assert encode_pair(chat(), a).key == encode_pair(chat(), b).key
    package = Path(__file__).parents[1] / "dpo_literate"
    words = ("!= pad_token_id", "!= tokenizer.pad", "ne(pad", ".ne(tokenizer.pad")
    assert not [p for p in package.rglob("*.py") if any(w in p.read_text() for w in words)]

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
    sizes = itertools.product(range(13), range(1, 11), range(1, 11), range(1, 19, 2))
    for (p, c, r, limit), how in itertools.product(sizes, ("refuse", "keep_start", "keep_end")):
        n += 1
        want, (verdict, cut, most) = brute(p, c, r, limit, how), fit(p, c, r, limit, how)
        assert verdict == want[0], (p, c, r, limit, how)
        if not verdict.startswith("dropped"):
            assert (p - cut, min(c, most), min(r, most)) == want[1:]
            assert min(c, most) >= 1 and min(r, most) >= 1
    print(f"{n} combinations, 0 mismatches")
    assert n >= 10_000

def some_pairs(n):
    rng = random.Random(0)
    return [{**chat("the cat " * rng.randint(1, 30), "yes " * rng.randint(1, 30),
                    "no é😀" * rng.randint(1, 30)), "id": str(i)} for i in range(n)]

@pytest.mark.parametrize("how", ["keep_start", "keep_end"])
@pytest.mark.parametrize("limit", [10, 20, 40, 60])
def test_truncated_rows_are_counted_and_keep_one_prompt(how, limit):
    tok, pairs = tiny_tokenizer(), some_pairs(200)
    rows, counts = encode_pairs(pairs, tok, max_length=limit, truncation=how)
    assert counts.rows_in == sum(counts.by.values()) == 200 and counts.rows_out == len(rows)
    assert all(len(r) <= limit and r.chosen_ids and r.rejected_ids for r in rows)
    assert not any(tok.decode(ids).endswith("\ufffd") for r in rows
                   for ids in (r.chosen_ids, r.rejected_ids) if len(ids) > 3)
    whole = {r.id: r for r in encode_pairs(pairs, tok, max_length=None)[0]}
    ends_lost = 0
    for r in rows:
        full, lost = whole[r.id], 0
        for ids, all_ids in ((r.chosen_ids, full.chosen_ids), (r.rejected_ids, full.rejected_ids)):
            assert ids == all_ids[:len(ids)]
            assert (ids[-1] == tok.eos_token_id) == (len(ids) == len(all_ids))
            lost |= ids[-1] != tok.eos_token_id
        ends_lost += lost
        assert full.prompt_ids[len(full.prompt_ids) - len(r.prompt_ids):] == r.prompt_ids
    assert counts.ends_lost == ends_lost == counts.by["reply cut"]
    said = " ".join(counts.notes())
    for n, words in ((counts.by["reply cut"], "at the end of a reply"),
                     (counts.by["prompt cut"], "at the beginning of their prompt")):
        assert (f"{n} of 200 rows were cut {words}" in said) == (n > 0)

def test_rows_over_the_limit_are_refused_in_one_sentence():
    with pytest.raises(Refusal, match="of 200 pairs"):
        encode_pairs(some_pairs(200), tiny_tokenizer(), max_length=40)

def test_pairs_made_equal_by_the_cut_are_counted():
    rows, counts = encode_pairs([text("a", "x" * 20 + "y", "x" * 20 + "z")], tiny_tokenizer(),
                                max_length=8, truncation="keep_start")
    assert not rows and counts.by["dropped: equal after the cut"] == 1

def test_a_wrong_choice_is_refused_before_any_row():
    for wrong in ({"truncation": "middle"}, {"identical": "keep"}):
        with pytest.raises(Refusal, match=f"{next(iter(wrong))}=.*: use refuse"):
            encode_pairs([], tiny_tokenizer(), **wrong)

def test_prefix_weights_offset_and_key():
    tok = tiny_tokenizer()
    a = encode_pair(text("q", "two", "three", prefix="one ", weight=2., margin=.5), tok,
                    ld_alpha=.5)
    assert tok.decode(a.prompt_ids) == "qone " and (a.weight, a.offset) == (2., .5)
    assert a.chosen_weights is None or a.rejected_weights is None
    assert length_weights(4, 2, .25) == [1., 1., .25, .25]
    b = encode_pair(text("qone ", "two", "three"), tok)
    assert a.key != b.key or a.chosen_weights == a.rejected_weights
    with pytest.raises(Refusal): encode_pair(text("q", "a", "abc"), tok, ld_alpha=2.)

def test_a_filler_is_marked_by_type_and_not_by_its_name():
    row = Row([1], [2], [3], id="\0filler")
    assert not row.filler and Row([1], [2], [3], filler=True).filler
    assert Row([1], [2], [3], filler=True).key == row.key
    assert all(r.filler for r in split_pairs([Row([1], [2], [3], filler=True)]))

def many_rows(n=300):
    rng = random.Random(0)
    ids = lambda k: [rng.randrange(2**17) for _ in range(k)]
    for k in range(n):
        weights = [1., .5] if k % 3 == 0 else None
        label, second = (bool(k % 2), []) if k % 5 == 0 else (None, ids(rng.randrange(1, 90)))
        yield Row(ids(rng.randrange(1, 90)), ids(rng.randrange(1, 90)), second, f"é{k}", k / 7,
                  -k / 3, weights, None, label)

@pytest.mark.parametrize("memory", [0, 5_000, 2**26])
def test_rows_come_back_as_they_went_in(memory):
    "In memory or on the disk, alone, in parts, copied; their keys too, which are not made again."
    want = list(many_rows())
    rows = Rows(want, memory=memory)
    assert (rows.store.packed.file is None) == (memory > 10**6)
    for some, same in ((rows, want), (rows[10:200:7], want[10:200:7]), (rows[::-1], want[::-1]),
                       (rows.take([5, 5, 299])[1:], [want[5], want[299]]),
                       (copy.deepcopy(rows), want)):       # as it goes to another process
        assert some == same and [vars(r)["key"] for r in some] == [r.key for r in same]
        for name in ("weight", "offset", "label"):
            assert column(some, name) == [getattr(r, name) for r in same]
        assert largest_id(some) == largest_id(same)
    assert rows[-1] == want[-1] and rows[:] is not rows and rows != want[:-1]
    for k in (300, -301):
        with pytest.raises(IndexError): rows[k]

def test_rows_hold_ids_and_nothing_else():
    class Seen(Row): "a row with a picture"
    for row in (Seen([1], [2], [3]), replace(Row([1], [2], [3]), filler=True)):
        with pytest.raises(TypeError, match="more than ids"): Rows([row])

def held(make):
    tracemalloc.start()
    kept = make()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return size, kept

@pytest.mark.parametrize("tokens", [200, 1000])
def test_a_row_on_the_disk_costs_memory_for_its_place_and_key_only(tokens):
    "57 bytes, and the slack of lists that grow, however long the row; 4 a token before that."
    ids = list(range(10**5, 10**5 + tokens // 2))
    rows = [Row(ids, ids[:-k], ids[k:], f"r{k}") for k in range(1, 41)] * 50
    on_disk, kept = held(lambda: Rows(rows, memory=0))
    in_memory, kept = held(lambda: Rows(rows))
    assert on_disk / len(kept) < 57 * 1.3 and in_memory / len(kept) < 1.3 * (8 * tokens + 150)

def test_a_long_file_is_read_without_holding_its_pairs(tmp_path, monkeypatch):
    "The list of dicts was most of what a long file took."
    monkeypatch.setattr(spool.Records.__init__, "__defaults__", (100, 2**16))
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(chat(f"why {i}?", "yes " * 100, "no " * 100))
                              for i in range(2000)))
    size, prefs = held(lambda: load_preferences(path))
    assert len(prefs) == 2000 and size < path.stat().st_size / 4
    assert prefs[1999]["prompt"] == [U("why 1999?")] and prefs[-1]["_where"].endswith(":2000")
    few = load_preferences([chat("why 0?", "yes " * 100, "no " * 100)])
    assert {**prefs[0], "_where": ""} == {**few[0], "_where": ""}

@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_same_rows_counts_and_refusals(processes):
    tok = tiny_tokenizer()
    pairs = [chat(f"why {i}?", "yes " * (i % 9 + 1), "no") for i in range(1300)]
    pairs[3], pairs[1200] = chat("a", "b", "b"), chat("a", " ", "b")
    how = dict(max_length=40, truncation="keep_start", identical="drop", ld_alpha=.5)
    alone, counts = encode_pairs(pairs, tok, **how)
    rows, counted = encode_rows(pairs, tok, processes, **how)
    assert rows == alone and counted == counts and counted.rows_out < counted.rows_in == 1300
    assert [r.key for r in rows] == [r.key for r in alone]
    for how in (dict(), dict(max_length=20, identical="drop")):
        with pytest.raises(Refusal) as one: encode_pairs(pairs, tok, **how)
        with pytest.raises(Refusal) as several: encode_rows(pairs, tok, processes, **how)
        assert str(one.value) == str(several.value)

def test_a_worker_that_dies_is_a_sentence(monkeypatch):
    monkeypatch.setattr(many_rows_, "_judged", lambda *_: os._exit(1))
    with pytest.raises(Refusal, match="lower dataset_num_proc"):
        encode_rows([chat(f"why {i}?") for i in range(1300)], tiny_tokenizer(), 2)

def test_no_room_for_a_long_list_is_a_sentence(monkeypatch):
    def full(**_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", full)
    with pytest.raises(Refusal, match="set TMPDIR") as no: Rows(many_rows(), memory=0)
    assert no.value.code == 4

def controls(tok, ids): return {i: ids.count(i) for i in control_ids(tok)}

def same_controls(tok, a, b):
    return all(controls(tok, getattr(a, k)) == controls(tok, getattr(b, k)) for k in IDS)

PIECES = SPECIAL + ["<|", "|>", "im_end", "\n", " ", "```", "｜", "＜|im_end|＞", "é", "😀",
                    "\u202e", "\0", "a", "<think>", "\ue000", "\ue0000\ue000"]

def test_fuzz_10000_strings_make_no_control_token():
    tok, rng = tiny_tokenizer(), random.Random(0)
    control = control_ids(tok)
    for _ in range(10_000):
        said = "".join(rng.choices(PIECES, k=rng.randint(1, 8)))
        ids = encode_text(tok, said)
        assert not control.intersection(ids) and tok.decode(ids) == said

@pytest.mark.parametrize("rounds", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzz_of_whole_chats(rounds):
    """T52: in every field at once, a row has the control tokens its template wrote, and decodes to
    the template's text."""
    rng = random.Random(rounds)
    toks = {kind: tiny_tokenizer(kind) for kind in KINDS}
    def word(): return "".join(rng.choices(PIECES, k=rng.randint(1, 8))) + "."
    for _ in range(rounds):
        kind, system = rng.choice(KINDS), rng.random() < .5
        before = [S(word())] * system + [U(word()), A(word())] * rng.randint(0, 2)
        pair = chat(word(), word(), word() + "!", before)
        harmless = [{**m, "content": "x"} for m in pair["prompt"]]
        tok = toks[kind]
        row = encode_pair(pair, tok, max_length=None)
        plain = encode_pair({"prompt": harmless, "chosen": [A("y")], "rejected": [A("z")]}, tok,
                            max_length=None)
        assert same_controls(tok, row, plain)
        whole = render(tok, pair["prompt"] + pair["chosen"])
        assert whole.startswith(tok.decode(row.prompt_ids + row.chosen_ids))

@pytest.mark.parametrize("special", SPECIAL)
def test_controls_in_every_field(special):
    tok, s = tiny_tokenizer("chatml"), special
    plain = encode_pair(chat("q", "a", "b", (S("s"),)), tok)
    for q, w, l, system in ((s, "a", "b", "s"), ("q", s, "b", "s"), ("q", "a", s, "s"),
                            ("q", "a", "b", s), (s * 10_000, "a", "b", "s"),
                            (s[:2], s[2:], "b", "s"), (f"```{s}```", "a", "b", "s"),
                            ("q", f"{s}a", f"{s}b", s)):
        row = encode_pair(chat(q, w, l, (S(system),)), tok, max_length=None)
        assert same_controls(tok, row, plain)

def test_unicode_round_trip():
    tok = tiny_tokenizer()
    for said in ("👩‍👩‍👧", "e\u0301 é", "\u202eabc", "a\0b", "a\u2028b", "\ue000", "x" * 100_000):
        assert tok.decode(encode_text(tok, said)) == said
        row = encode_pair(chat(said, f"{said} yes", "no"), tok, max_length=None)
        assert tok.decode(row.chosen_ids) == f"{said} yes<|im_end|>"

def test_segments_are_the_rendering():
    tok = tiny_tokenizer("system")
    m = [U("\ue0000\ue000"), A("<|im_end|>"), U("x")]
    parts = segments(tok, m, reply_next=True)
    assert "".join(t for t, _ in parts) == render(tok, m, reply_next=True)
    assert [t for t, d in parts if d] == ["\ue0000\ue000", "<|im_end|>", "x"]

@pytest.mark.skipif(data_dir() is None, reason="no data")
def test_real_pairs():
    prefs = load_preferences(data_dir() / "hh_harmless")
    rows, counts = encode_pairs(prefs, tiny_tokenizer(), max_length=None)
    assert counts.by["kept"] == 902 == len({r.id for r in rows})

def test_identical_replies_are_refused_or_dropped_and_counted():
    tok, same = tiny_tokenizer("trims"), chat("q", "yes", "yes ")
    with pytest.raises(Refusal, match="same tokens"): encode_pairs([same], tok)
    rows, counts = encode_pairs([same, chat()], tok, identical="drop")
    assert len(rows) == 1 and counts.by["dropped: identical replies"] == 1
    assert sum(counts.by.values()) == 2

def test_controls_in_tools_names_and_roles_are_refused():
    tok = tiny_tokenizer()
    tok.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATES["chatml"]
    function = {"name": "f", "description": "<|im_end|>", "parameters": {}}
    tool = {"type": "function", "function": function}
    with pytest.raises(Refusal, match="control token"):
        encode_pair({**chat(), "tools": [tool]}, tok)
    tool["function"]["description"] = "fine"
    assert "fine" in tok.decode(encode_pair({**chat(), "tools": [tool]}, tok).prompt_ids)
    with pytest.raises(Refusal, match="control token"):
        encode_pair({**chat(), "prompt": [{**U("q"), "name": "<|im_start|>"}]}, tok)
    with pytest.raises(Refusal, match="need a chat"): encode_pair(text(system="s"), tok)

def test_replies_without_text_and_prompts_without_tokens_are_refused_or_counted():
    tok = tiny_tokenizer()
    for bad in (chat("q", "", "no"), chat("q", "yes", " \n"), text("q", "", "a")):
        with pytest.raises(Refusal, match="without text"): encode_pair(bad, tok)
        rows, counts = encode_pairs([bad, chat()], tok, identical="drop")
        assert len(rows) == 1 and counts.by["dropped: empty reply"] == 1
        assert sum(counts.by.values()) == 2
    with pytest.raises(Refusal, match="empty prompt"): encode_pair(text(""), tok)
    assert encode_pair(text(""), tiny_tokenizer("plain", bos=True)).prompt_ids

def test_a_refusal_names_its_place():
    tok = tiny_tokenizer()
    for bad, words in ((chat("q", "a", "a"), "same tokens"), (chat("q", "", "a"), "without text"),
                       (chat("q", "yes " * 50, "no"), "longer")):
        with pytest.raises(Refusal, match=rf"^f.jsonl:7: .*{words}"):
            encode_pair({**bad, "_where": "f.jsonl:7"}, tok, max_length=40)
    with pytest.raises(Refusal, match="^row 2: .*same tokens"):
        encode_pairs([chat(), chat("q", "a", "a")], tok)

def test_end_token_that_is_also_the_beginning():
    "T18: BOS = EOS. One in front, one behind, none inside."
    tok = tiny_tokenizer("plain", bos=True); tok.eos_token = "<s>"
    row = encode_pair(text("the cat", "<s>yes", "no"), tok)
    s = tok.convert_tokens_to_ids("<s>")
    assert row.prompt_ids.count(s) == 1 and row.prompt_ids[0] == s
    assert row.chosen_ids.count(s) == 1 and row.chosen_ids[-1] == s

def test_a_template_that_writes_bos_writes_one():
    tok = tiny_tokenizer("bos", bos=True)
    row = encode_pair(chat(), tok)
    s = tok.convert_tokens_to_ids("<s>")
    assert row.prompt_ids.count(s) == 1 and s not in row.chosen_ids + row.rejected_ids

class Other:
    "A tokenizer that answers otherwise."
    def __init__(self, tok): self.tok = tok
    def __getattr__(self, name): return getattr(self.tok, name)
    def __len__(self): return len(self.tok)

def test_a_tokenizer_that_answers_otherwise_is_refused():
    "T21: a default changed upstream once made `len(prompt)` the length of a dict."
    class Odd(Other):
        def __call__(self, *a, **k): return {"input_ids": [self.tok(*a, **k)["input_ids"]]}
    for pair in (chat(), text()):
        with pytest.raises(Refusal, match="flat list"): encode_pair(pair, Odd(tiny_tokenizer()))

def test_data_are_not_changed_and_encode_alike_each_time():
    "T34"
    tok, prefs = tiny_tokenizer(), load_preferences([chat(), chat("x", "y", "z")])
    before, first = json.dumps(prefs.rows), encode_pairs(prefs, tok)[0]
    assert all(encode_pairs(prefs, tok)[0] == first for _ in range(2))
    assert json.dumps(prefs.rows) == before

def blank_before():
    "SentencePiece's kind: it puts a blank before whatever starts a string."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    t.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = [chr(c) for c in range(32, 127)] + ["\n", "▁"]
    t.train_from_iterator(["the cat sat on the mat, yes or no"] * 3, trainers.BpeTrainer(
        vocab_size=200, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    tok = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", unk_token="<unk>",
                                  extra_special_tokens=["<|im_start|>"])
    tok.chat_template = TEMPLATES["chatml"]
    return tok

def test_pieces_encoded_apart_are_what_they_are_in_their_place():
    tok = blank_before()
    assert tok.tokenize("cat")[0].startswith("▁"), "the tokenizer must have the habit under test"
    row = encode_pair(chat("the cat", "yes", "no"), tok)
    assert "▁" not in tok.convert_ids_to_tokens(row.chosen_ids)[0]
    whole = tok(render(tok, [U("the cat"), A("yes")]), add_special_tokens=False)["input_ids"]
    ids = row.prompt_ids + row.chosen_ids
    assert ids == whole[:len(ids)]
    evil = encode_pair(chat("<|im_end|>", "<|im_start|>yes", "no"), tok)
    assert same_controls(tok, evil, row)

def test_a_text_prompt_has_the_ids_of_a_server_and_its_reply_no_blank():
    tok = blank_before()
    row = encode_pair(text("the cat", "sat", " on"), tok)
    assert row.prompt_ids == tok("the cat")["input_ids"]
    assert tok.convert_ids_to_tokens(row.prompt_ids)[0].startswith("▁")
    assert not tok.convert_ids_to_tokens(row.chosen_ids)[0].startswith("▁")
    assert tok.convert_ids_to_tokens(row.rejected_ids)[0].startswith("▁")

@pytest.mark.parametrize("size", [1_000_000, pytest.param(20_000_000, marks=pytest.mark.slow)])
def test_one_long_row_is_decided_in_time(size):
    "T40: two seconds a megabyte; the rows beside it as they were."
    tok, long = tiny_tokenizer(), chat("the cat sat on " * (size // 15))
    start = time.process_time()
    rows, counts = encode_pairs([chat(), long, chat()], tok, truncation="keep_start")
    assert time.process_time() - start < 2 * size / 1e6
    assert counts.by["dropped: prompt fills the limit"] == 1
    assert [len(r) for r in rows] == [len(rows[0])] * 2

def test_a_tokenizer_that_does_not_split_gets_its_words_broken():
    "One that ignores `split_special_tokens` cannot be trusted with data."
    class Deaf(Other):
        def __call__(self, said, **k):
            return self.tok(said, **{**k, "split_special_tokens": False})
    tok = tiny_tokenizer()
    ids = encode_text(Deaf(tok), "a<|im_end|>b")
    assert not control_ids(tok).intersection(ids) and tok.decode(ids) == "a<|im_end|>b"

def test_keys_are_content():
    tok, a, b = tiny_tokenizer(), chat("q", "a", "b"), chat("q", "a", "c")
    keys = [encode_pair({**pair, "id": name}, tok).key
            for name, pair in (("1", a), ("2", a), ("1", b))]
    assert keys[0] == keys[1] != keys[2]
