"""Files of preferences, good and bad, and what the reader must say to each.

A name begins with its number in the catalogue of forty; `test_all_forty_are_here` counts them."""
import gzip
import json
import os
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from dpo_literate import reading
from dpo_literate.audit import check_preferences, leakage, take_preferences
from dpo_literate.layouts import columns_of, lay_out, leftover
from dpo_literate.preferences import as_chat, canonical, extract_prompt, inert
from dpo_literate.reading import (MAX_LINE, choose_split, load_any, load_preferences,
                                  load_unpaired, read_asked, read_preferences, read_prompts)
from dpo_literate.results import Refusal, data_dir

P = {"prompt": "q", "chosen": "good", "rejected": "bad"}
LONG = "Why is the sky blue?"


def J(**kw): return json.dumps({**P, **kw})


def U(c): return {"role": "user", "content": c}


def A(c): return {"role": "assistant", "content": c}


def S(c): return {"role": "system", "content": c}


def H(c): return {"from": "human", "value": c}


def G(c): return {"from": "gpt", "value": c}


GOOD = J()
CHAT = {"prompt": [U("q")], "chosen": [A("good")], "rejected": [A("bad")]}


def write(tmp_path, data, name="f.jsonl"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def lines(tmp_path, rows, name="f.jsonl"):
    return write(tmp_path, "\n".join(map(json.dumps, rows)) + "\n", name)


def content(row): return {k: v for k, v in row.items() if k[0] != "_"}


def refused(call, *args, **kw):
    with pytest.raises(Refusal) as e: call(*args, **kw)
    assert e.value.code == 2
    return str(e.value)


# ------------------------------------------------------------ the forty

def turns(**kw): return json.dumps(kw)


REFUSE = {
    "01 cut off": (GOOD + "\n" + GOOD[:25], "f.jsonl:2", "truncated"),
    "01 first line cut off": (GOOD[:25] + "\n" + GOOD, "f.jsonl:1", "truncated"),
    "02 garbage": (GOOD + "\n\nhello\n", "f.jsonl:3", "not a JSON row"),
    "02 garbage first": ("hello\n" + GOOD, "f.jsonl:1", "not a JSON row"),
    "03 key missing": (GOOD + '\n{"prompt":"q","chosen":"a"}', "f.jsonl:2", "rejected"),
    "04 null": (GOOD + "\n" + J(chosen=None), "f.jsonl:2", "chosen is null"),
    "05 integer": (GOOD + "\n" + J(rejected=3), "f.jsonl:2", "rejected is a number"),
    "06 mixed shapes": (GOOD + "\n" + json.dumps(CHAT), "f.jsonl:2", "one shape"),
    "08 duplicate key": ('{"prompt":"q","prompt":"q","chosen":"a","rejected":"b"}',
                         "f.jsonl:1", "stands twice"),
    "12 utf-16": (GOOD.encode("utf-16"), "f.jsonl:1", "UTF-16"),
    "12 latin-1": (GOOD.replace("good", "é").encode("latin-1"), "f.jsonl:1", "Latin-1"),
    "12 gb18030": (GOOD.replace("good", "很好").encode("gb18030"), "f.jsonl:1", "GB18030"),
    "14 two objects": (GOOD + GOOD, "f.jsonl:1", "more than one value"),
    "16 lone surrogate": (GOOD.replace("good", "\\ud800"), "f.jsonl:1", "surrogate"),
    "17 empty file": ("", "f.jsonl", "no rows"),
    "17 blank file": ("\n \n", "f.jsonl", "no rows"),
    "18 wrong columns": ('{"question":"q","good":"a","bad":"b"}', "f.jsonl:1", "did you mean"),
    "29 unknown role": (J(prompt=[{"role": "<|im_end|>", "content": "q"}]), "f.jsonl:1",
                        "unknown role"),
    "29 two assistants": (J(prompt=[U("q"), A("a"), A("b"), U("c")]), "prompt[2]",
                          "two assistant"),
    "29 no user": (J(prompt=[S("s")]), "f.jsonl:1", "no user"),
    "30 ends with user": (turns(chosen=[U("q"), U("a")], rejected=[U("q"), U("b")]),
                          "f.jsonl:1", "assistant"),
    "31 prompts differ": (turns(chosen=[U("q"), A("a")], rejected=[U("r"), A("b")]),
                          "f.jsonl:1", "part at message 1"),
    "33 deep": ("[" * 20000 + "]" * 20000, "f.jsonl:1", "nested"),
    "33 deep object": ('{"a":' * 10000 + "1" + "}" * 10000, "f.jsonl:1", "nested"),
    "35 NaN": (GOOD[:-1] + ', "weight": NaN}', "f.jsonl:1", "NaN"),
    "35 Infinity": (GOOD[:-1] + ', "weight": 1e999}', "f.jsonl:1", "finite"),
    "35 huge int": (GOOD[:-1] + ', "weight": ' + "9" * 5000 + "}", "f.jsonl:1", ""),
    "negative weight": (J(weight=-1), "f.jsonl:1", "weight"),
    "no shared beginning": ('{"chosen":"Paris ","rejected":"London"}', "f.jsonl:1",
                            "no prompt column"),
    "a list row": ('["q","a","b"]', "f.jsonl:1", "row must be"),
    "an empty list": (J(prompt=[]), "f.jsonl:1", "empty list"),
}


@pytest.mark.parametrize("name", REFUSE)
def test_refused(name, tmp_path):
    data, place, words = REFUSE[name]
    said = refused(load_preferences, write(tmp_path, data))
    assert place in said and words in said and len(said) < 700


ACCEPT = {
    "07 extra key": (J(note="x"), None),
    "09 dates": (J(chosen="2024-01-01", rejected="2024-01-02"), "2024-01-01"),
    "10 number-like": (J(chosen="1e5"), "1e5"),
    "10 bool-like": (J(chosen="true"), "true"),
    "10 null-like": (J(chosen="null"), "null"),
    "10 zeros": (J(chosen="007"), "007"),
    "10 blanks kept": (J(chosen=" 5 "), " 5 "),
    "11 bom": (b"\xef\xbb\xbf" + GOOD.encode(), None),
    "13 crlf": (GOOD + "\r\n\r\n" + GOOD + "\r\n", None),
    "15 u+2028": (json.dumps({**P, "chosen": "a\u2028b"}, ensure_ascii=False), "a\u2028b"),
    "15 nul": (J(chosen="a\0b"), "a\0b"),
    "27 long": (J(chosen="x" * 200_000), None),
    "32 html": (J(chosen="<script>\x1b[31m"), "<script>\x1b[31m"),
    "32 emoji": (J(chosen="👩‍👩‍👧 e\u0301 \u202eabc"), "👩‍👩‍👧 e\u0301 \u202eabc"),
    "bracket text": (J(chosen="[{not messages}]"), "[{not messages}]"),
    "code": (J(chosen='{"role": "admin"}'), '{"role": "admin"}'),
}


@pytest.mark.parametrize("name", ACCEPT)
def test_accepted(name, tmp_path):
    data, chosen = ACCEPT[name]
    prefs = load_preferences(write(tmp_path, data))
    if chosen: assert prefs[0]["chosen"] == chosen
    assert prefs.ignored_columns == (["note"] if name == "07 extra key" else [])


# ------------------------------------------------------------ where the prompt ends (rows 1 to 3)

WHOLE = {"chosen": [U(LONG), A("good")], "rejected": [U(LONG), A("bad")]}
SYSTEM = {k: [S("Be brief."), *v] for k, v in WHOLE.items()}


@pytest.mark.parametrize("prompt,replies,first", [
    (LONG, WHOLE, "user"), (LONG + "\n", WHOLE, "user"), ("  " + LONG, WHOLE, "user"),
    (LONG, SYSTEM, "system"), ([U(LONG)], WHOLE, "user"), ([U(LONG)], SYSTEM, "system"),
    ([S("Be brief."), U(LONG)], WHOLE, "system"), ([U(LONG + " ")], WHOLE, "user"),
    (None, WHOLE, "user"), (None, SYSTEM, "system")])
def test_conversations_beside_their_prompt(prompt, replies, first):
    row = replies if prompt is None else {"prompt": prompt, **replies}
    prefs = load_preferences([row])
    assert prefs[0]["prompt"][0]["role"] == first and prefs[0]["prompt"][-1]["role"] == "user"
    assert (prefs[0]["chosen"], prefs[0]["rejected"]) == ([A("good")], [A("bad")])
    assert prompt is None or prefs.counts["prompt repeated"] == 1 and prefs.notices


def test_blanks_at_the_end_of_a_shared_turn_do_not_part_two_conversations():
    row = {"prompt": LONG, "chosen": [U(LONG + "\n"), A("good")],
           "rejected": [U(LONG), A("bad")]}
    assert load_preferences([row])[0]["rejected"] == [A("bad")]


def test_a_prompt_of_several_turns_is_found_in_its_conversation():
    talk = [U("Hello there."), A("Hi."), U(LONG)]
    row = {"chosen": talk + [A("good")], "rejected": talk + [A("bad")]}
    for prompt in (talk, LONG, "Hello there.", talk[-1:]):
        assert load_preferences([{**row, "prompt": prompt}])[0]["prompt"] == talk


@pytest.mark.parametrize("prompt", ["Another question?", [U("Another?")], "Why", [S("no"), U("x")]])
def test_a_prompt_that_is_not_theirs_is_refused_with_its_remedy(prompt):
    said = refused(load_preferences, [{"prompt": prompt, **WHOLE}])
    assert "row 1" in said and "take the column out (--columns prompt=)" in said
    taken = load_preferences([{"prompt": prompt, **WHOLE}], columns=columns_of("prompt="))
    assert taken[0]["prompt"] == [U(LONG)]


HH = "\n\nHuman: Name a fruit.\n\nAssistant:"


@pytest.mark.parametrize("chosen,rejected,words", [
    ([S("a"), U(LONG), A("good")], [S("b"), U(LONG), A("bad")], "begin with different turns"),
    ([U(LONG), A("good")], [A("bad")], "rejected is a reply alone"),
    ([A("good")], [U(LONG), A("bad")], "chosen is a reply alone"),
    ([U(LONG), A("x"), U("more"), A("good")], [U(LONG), A("y"), U("more"), A("bad")],
     "end both with the turn in which they part")])
def test_conversations_that_answer_no_common_prompt(chosen, rejected, words):
    said = refused(load_preferences, [{"prompt": LONG, "chosen": chosen, "rejected": rejected}])
    assert "row 1" in said and words in said


def test_roles_are_known_in_any_case():
    row = {"prompt": [{"role": "User", "content": "q"}], "chosen": [{"role": "Assistant", "content": "good"}],
           "rejected": [A("bad")]}
    assert content(load_preferences([row])[0]) == CHAT


def test_replies_that_repeat_their_prompt_lose_it_and_are_counted():
    rows = [{"prompt": HH, "chosen": HH + " Apple.", "rejected": HH + f" Stone {i}."}
            for i in range(3)]
    prefs = load_preferences(rows)
    assert prefs[0]["chosen"] == " Apple." and prefs.counts["prompt taken off"] == 3
    assert any("3 of 3 rows: both replies began with the prompt" in n for n in prefs.notices)
    kept = read_preferences(rows, repeats="keep")
    assert kept[0]["chosen"] == HH + " Apple." and not kept.counts.get("prompt taken off")
    one = [*rows, {**rows[0], "rejected": " Stone."}]
    assert "row 4: one reply begins with the prompt" in refused(load_preferences, one)
    assert len(read_preferences(one, repeats="keep")) == 4
    assert "repeats" in refused(read_preferences, rows, repeats="maybe")


@pytest.mark.parametrize("row", [
    {"prompt": "Hello", "chosen": "Hello!", "rejected": "Hello there."},
    {"prompt": LONG, "chosen": "Rayleigh.", "rejected": LONG},          # a copy is a bad answer
    {"prompt": "Hi", "chosen": "Hi!", "rejected": "No."}])
def test_what_only_looks_like_a_repeated_prompt_is_left(row):
    prefs = load_preferences([row, P])
    assert content(prefs[0]) == row and not prefs.counts.get("prompt taken off")


@pytest.mark.parametrize("prompt,reply,rest", [
    (LONG, LONG + " Yes.", " Yes."), (LONG + "\n", LONG + "\nYes.", "Yes."),
    (LONG + "\n", LONG + " Yes.", "Yes."), ("\n\n" + LONG, LONG + " Yes.", " Yes.")])
def test_blanks_around_a_repeated_prompt_do_not_hide_it(prompt, reply, rest):
    row = load_preferences([{"prompt": prompt, "chosen": reply, "rejected": LONG + " No."}])[0]
    assert row["chosen"] == rest and row["prompt"] == prompt


def test_labelled_replies_lose_their_prompt_only_where_all_repeat_it():
    rows = [{"prompt": LONG, "completion": LONG + f" {i}", "label": i % 2} for i in range(4)]
    assert load_unpaired(rows)[1]["completion"] == " 1"
    mixed = [*rows, {**rows[0], "completion": "No."}]
    assert load_unpaired(mixed)[1]["completion"] == LONG + " 1"


@pytest.mark.parametrize("a,b,prompt", [
    ("The sky is blue", "The sky is black", "The sky is"),
    ("The sky is blue", "The sky is blue and vast", "The sky is"),
    ("Q: 1+1?\nA: 2", "Q: 1+1?\nA: 3", "Q: 1+1?\nA:"), ("Q\nyes", "Q\nno", "Q\n"),
    ("你好世界", "你好朋友", "你好"), ("One two three", "One two thirty", "One two")])
def test_text_without_a_prompt_splits_where_words_begin(a, b, prompt):
    x, c, r = extract_prompt(a, b)
    assert (x, x + c, x + r) == (prompt, a, b) and c and r


@pytest.mark.parametrize("c,r", [("Paris ", "London"), ("x", "x"), ("", "x"), ("abc", "axy"),
                                 (" a", " b"), ("\n\nx", "\n\ny")])
def test_texts_that_share_no_word_have_no_prompt(c, r): refused(extract_prompt, c, r)


@given(st.text(max_size=12), st.text(max_size=6), st.text(max_size=6))
def test_a_split_loses_no_character(shared, a, b):
    try: x, c, r = extract_prompt(shared + a, shared + b)
    except Refusal: return
    assert x + c == shared + a and x + r == shared + b and x.strip()


def test_the_border_is_trls_where_it_cuts_no_word():
    trl = pytest.importorskip("trl.data_utils")
    for a, b in (("Beautiful is better than ugly.", "Beautiful is better than the moon."),
                 ("Flat is better", "Flat is worse"), ("Q: a?\nA: no", "Q: a?\nA: yes")):
        theirs = trl.extract_prompt({"chosen": a, "rejected": b})
        assert extract_prompt(a, b) == tuple(theirs[k] for k in ("prompt", "chosen", "rejected"))


def test_implicit_text_is_counted_and_shown():
    prefs = load_preferences([{"chosen": "The sky is blue", "rejected": "The sky is black"}])
    assert prefs.counts["shared beginning"] == 1
    assert any("'The sky is'" in n for n in prefs.notices)
    assert "did you mean" in refused(load_preferences, [{"promt": "q", "chosen": "the a",
                                                         "rejected": "the b"}])


def test_transcripts_split_behind_the_last_assistant():
    talk = "\n\nHuman: Hi.\n\nAssistant: Hm?\n\nHuman: Please.\n\nAssistant:"
    prefs = load_preferences([{"chosen": talk + " No stone.", "rejected": talk + " No bread."}])
    assert prefs[0]["prompt"] == talk and prefs[0]["chosen"] == " No stone."
    assert prefs.counts["transcript"] == 1
    early = {"chosen": HH + " a\n\nHuman: x\n\nAssistant: y",
             "rejected": HH + " b\n\nHuman: x\n\nAssistant: z"}
    assert "before their last turn" in refused(load_preferences, [early])
    assert as_chat(prefs[0])["prompt"] == [U("Hi."), A("Hm?"), U("Please.")]
    assert as_chat(prefs[0])["chosen"] == [A("No stone.")]
    plain = as_chat({**P, "prompt": "Human: no transcript"})
    assert plain["prompt"] == [U("Human: no transcript")]


# ------------------------------------------------------------ messages as text (row 4)

def test_messages_written_as_text_are_parsed():
    row = {"prompt": LONG, **{k: json.dumps(v) for k, v in WHOLE.items()}}
    want = [U(LONG)], [A("good")], [A("bad")]
    for r in (row, {k: v for k, v in row.items() if k != "prompt"},
              {**row, "prompt": json.dumps([U(LONG)])},
              {k: json.dumps({"messages": v, "tools": []}) for k, v in WHOLE.items()},
              {k: json.dumps([{"from": "human", "value": LONG}, G(v[-1]["content"])])
               for k, v in WHOLE.items()}):
        found = load_preferences([r])[0]
        assert tuple(found[k] for k in ("prompt", "chosen", "rejected")) == want
    prefs = load_preferences([row, row])
    assert prefs.counts["written"] == 2 and "parsed" in prefs.notices[0]


@pytest.mark.parametrize("text,words", [
    (str([U("q"), A("a")]), "single quotes"), (json.dumps([U("q"), A("a")])[:-9], "truncated"),
    ('[{"role": "user", "content": "a"} {"role"', "not JSON"), (json.dumps([U("q")]), "one reply is text"),
    ("[{'content': 'a', 'role': 'user'}\n {'content': 'b', 'role': 'assistant'}]", "single")])
def test_text_that_looks_like_messages_and_is_none_is_refused(text, words, tmp_path):
    said = refused(load_preferences, lines(tmp_path, [P, {**P, "chosen": text}]))
    assert "f.jsonl:2" in said and words in said


def test_tools_within_the_replies_become_the_rows():
    tool = [{"type": "function", "function": {"name": "weather"}}]
    row = {k: json.dumps({"messages": v, "tools": tool}) for k, v in WHOLE.items()}
    assert load_preferences([row])[0]["tools"] == tool
    row["chosen"] = json.dumps({"messages": WHOLE["chosen"], "tools": []})
    assert "different tools" in refused(load_preferences, [row])


# ------------------------------------------------------------ their neighbours

def test_a_system_text_stands_once():
    "Beside a system turn the column must say the same."
    turn = {"role": "system", "content": "Be brief. "}
    row = {"prompt": [turn, U(LONG)], "chosen": [A("good")], "rejected": [A("bad")]}
    same = load_preferences([{**row, "system": "Be brief."}])[0]
    assert "system" not in same and same["prompt"][0] == turn
    other = {**row, "prompt": [turn, U(LONG)], "system": "Be long."}
    said = refused(load_preferences, [other])
    assert "row 1" in said and "two different system texts" in said
    labelled = {"prompt": other["prompt"], "completion": [A("good")], "label": True}
    assert "two different" in refused(load_any, [{**labelled, "system": "Be long."}])
    alone = {**row, "prompt": [U(LONG)], "system": "Be long."}
    assert load_preferences([alone])[0]["system"] == "Be long."


def test_line_ends_of_two_systems_do_not_hide_the_same_prompt():
    both = {k: [U("a\r\nb"), *v[1:]] for k, v in WHOLE.items()}
    assert load_preferences([{"prompt": "a\nb", **both}])[0]["prompt"] == [U("a\r\nb")]


@pytest.mark.parametrize("mark", ["\n\nHuman: ", "### Instruction:\n", "User: ", "[INST] ", "Q: ", "**User:** ", "user\n",
                                  "<s>[INST] ", "<|im_start|>user\n", "<|user|>\n",
                                  "<|start_header_id|>user<|end_header_id|>\n\n"])
def test_a_prompt_behind_a_speakers_mark_is_not_learned_as_reply(mark):
    row = {"prompt": "Why?", **{k: f"{mark}Why?\n\nAssistant: {k}" for k in ("chosen", "rejected")}}
    said = refused(load_preferences, [P, row])
    assert "row 2" in said and "--repeats keep" in said and mark.strip().split()[0] in said
    assert read_preferences([row], repeats="keep")[0]["chosen"] == row["chosen"]
    one = {**row, "rejected": "No."}
    assert load_preferences([one])[0]["chosen"] == row["chosen"]     # one quotes, the other not


def test_chats_lose_a_repeated_prompt_only_where_every_row_repeats_it():
    row = {"prompt": [U(LONG)], "chosen": f"{LONG} good", "rejected": f"{LONG}\nbad"}
    prefs = load_preferences([row, row])
    assert [prefs[0][k] for k in ("chosen", "rejected")] == [[A("good")], [A("bad")]]
    assert prefs.counts["prompt taken off"] == 2 and "taken off" in prefs.notices[0]
    other = {**row, "chosen": "good"}
    assert load_preferences([row, other])[0]["chosen"] == [A(f"{LONG} good")]
    text = as_chat(load_preferences([{**row, "prompt": LONG, "rejected": f"{LONG} bad"}])[0])
    assert text["chosen"] == [A("good")] and text["rejected"] == [A("bad")]   # no blank goes along


@pytest.mark.parametrize("write", [
    lambda m: json.dumps(json.dumps(m)), lambda m: json.dumps([{"name": "x", **t} for t in m]),
    lambda m: json.dumps([{"weight": 1, **t} for t in m], indent=1)])
def test_messages_written_twice_or_with_other_keys_first_are_parsed(write):
    found = load_preferences([{"prompt": LONG, **{k: write(v) for k, v in WHOLE.items()}}])[0]
    assert [found[k][-1]["content"] for k in ("chosen", "rejected")] == ["good", "bad"]


@pytest.mark.parametrize("reply", ['"{\'role\': 1}" is Python', '{"role": "admin"}', '["a", "b"]',
                                   '"Yes", she said.', '{"a": "the role: user"}'])
def test_text_that_only_quotes_is_text(reply):
    assert load_preferences([{**P, "chosen": reply}])[0]["chosen"] == reply
    said = refused(load_preferences, [{**P, "chosen": "[{'id': 1, 'role': 'user', 'content': 'a'}]"}])
    assert "not JSON: Python's single quotes, not JSON's; write it with json.dumps" in said


def test_a_single_row_of_messages_is_no_table_by_columns(tmp_path):
    row = {"conversations": [{"from": "human", "value": "q"}], "chosen": G("a"), "rejected": G("b")}
    for name, text in (("a.jsonl", json.dumps(row)), ("b.json", json.dumps(row, indent=1))):
        (tmp_path / name).write_text(text)
        assert load_preferences(tmp_path / name)[0]["chosen"] == [A("a")]
    (tmp_path / "c.json").write_text(json.dumps({k: {"0": "a"} for k in ("prompt", "chosen", "rejected")}))
    assert "a table by columns" in refused(load_preferences, tmp_path / "c.json")


def test_a_rejected_reply_alone_beside_a_whole_conversation():
    row = {"messages": WHOLE["chosen"], "rejected_messages": WHOLE["rejected"][-1:]}
    assert load_preferences([row])[0]["prompt"] == WHOLE["chosen"][:-1]


def test_history_as_messages_stands_behind_the_system_turn():
    turn = {"role": "system", "content": "s"}
    row = {"history": [U("a"), A("b")], "prompt": [turn, U("c")], "chosen": "d", "rejected": "e"}
    prefs = load_preferences([row])
    assert prefs[0]["prompt"] == [turn, U("a"), A("b"), U("c")]
    assert "column history" in prefs.notices[0] and prefs.counts["history"] == 1


@pytest.mark.parametrize("text,words", [
    ('[{"prompt": "a",}]', "f.json:1: a comma before a closing bracket"),
    ('[\n{"prompt": "a"},\n]', "f.json:3: a comma before"), ("// x\n{}\n{}", "f.json:1: a comment")])
def test_the_commonest_slips_in_json_are_named(text, words, tmp_path):
    (tmp_path / "f.json").write_text(text)
    assert words in refused(load_preferences, tmp_path / "f.json")


@pytest.mark.parametrize("w,l", [("accepted", "rejected"), ("pos", "neg"), ("positive", "negative")])
def test_names_that_are_not_ours_are_asked_about(w, l):
    assert f"chosen={w}" in refused(load_preferences, [{"prompt": "q", w: "a", l: "b"}])


# ------------------------------------------------------------ columns (row 5)

def test_columns_that_nothing_reads_are_named_once_with_the_nearest_name():
    prefs = load_preferences([{**P, "sytem": "s", "source": i} for i in range(3)])
    assert prefs.ignored_columns == ["sytem", "source"] and len(prefs.notices) == 1
    assert "sytem (did you mean system?), source" in prefs.notices[0]
    assert leftover([]) is None and leftover(["prompt_id"], P) == \
        "columns that nothing reads: prompt_id"
    assert load_preferences([{**P, "label": 1}]).ignored_columns == ["label"]
    assert load_preferences([{**P, "messages": None}]).ignored_columns == []
    assert prefs.notices[0] in check_preferences(prefs).table()


@pytest.mark.parametrize("row", [
    {"question": "q"}, {"query": "q"}, {"instruction": "q", "input": ""}, {"input": "q"},
    {"Prompt": "q"}, {" prompt ": "q"}, {"instruction": "q"}])
def test_a_name_that_can_mean_one_thing_is_read_and_said(row):
    rest = {k: v for k, v in P.items() if k != "prompt"}
    prefs = load_preferences([{**row, **rest}])
    assert content(prefs[0]) == P and "read as prompt" in prefs.notices[0]


@pytest.mark.parametrize("names", [
    ("chosen_response", "rejected_response"), ("response_chosen", "response_rejected"),
    ("response_j", "response_k"), ("Chosen", "Rejected"), ("chosen ", " rejected")])
def test_pairs_of_names(names):
    prefs = load_preferences([{"prompt": "q", names[0]: "good", names[1]: "bad"}])
    assert content(prefs[0]) == P


def test_a_name_that_could_be_two_is_asked_about():
    row = {"question": "q", "query": "q", "chosen": "a b", "rejected": "a c"}
    assert "did you mean --columns prompt=question" in refused(load_preferences, [row])
    assert load_preferences([row], columns={"prompt": "query"})[0]["prompt"] == "q"


def test_system_prompt_is_the_system_and_said():
    prefs = load_preferences([{**P, "system_prompt": "Answer in French."}])
    assert prefs[0]["system"] == "Answer in French." and any("system" in n for n in prefs.notices)


def test_columns_by_hand():
    ranked = [{"q": "q", "answers": [{"text": "good"}, {"text": "bad"}], "source": "x"}]
    told = columns_of(["prompt=q", "chosen=answers.0.text", "rejected=answers.-1.text", "source="])
    prefs = load_preferences(ranked, columns=told)
    assert content(prefs[0]) == P and prefs.ignored_columns == []
    assert columns_of("prompt=a+b, images=") == {"prompt": ["a", "b"], "images": None}
    assert columns_of(None) is None and columns_of({"prompt": "a+b"}) == {"prompt": ["a", "b"]}
    joined = load_preferences([{"a": "x", "b": "y", **CHAT, "prompt": None}],
                              columns={"prompt": ["a", "b"]})
    assert joined[0]["prompt"] == [U("x\n\ny")]
    dropped = load_preferences([{**P, "images": ["a.png"]}], columns={"images": None})
    assert content(dropped[0]) == P


@pytest.mark.parametrize("columns,words", [
    ({"promt": "q"}, "did you mean prompt"), ({"prompt": "questoin"}, "did you mean question"),
    ({"system": "nothing"}, "no row has it"), ({"colour": None}, "no row has it"),
    ({"chosen": "answers.7"}, "no column 'answers.7'")])
def test_a_mistyped_mapping_is_refused(columns, words):
    row = {"question": "q", "chosen": "a", "rejected": "b", "answers": []}
    assert words in refused(load_preferences, [row], columns=columns)
    assert "ours=theirs" in refused(columns_of, "prompt")


@pytest.mark.parametrize("more", [
    {"images": ["a.png"]}, {"image": "a.png"}, {"videos": ["x.mp4"]}, {"image": {"bytes": "x"}}])
def test_pictures_are_refused_alike_with_a_remedy(more):
    name = next(iter(more))
    said = refused(load_any, [{**P, **more}])
    assert f"column {name!r} holds pictures" in said and f"columns {name}=" in said
    assert content(load_any([{**P, **more}], columns=columns_of(f"{name}="))[0]) == P
    for empty in (None, [], ""): assert content(load_any([{**P, name: empty}])[0]) == P


def test_pictures_in_messages_are_refused_and_kept_where_asked():
    seen = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    assert "row 1: a message holds pictures" in refused(load_any, [{**CHAT, "prompt": seen}])
    row = read_preferences([{**CHAT, "prompt": seen, "images": ["a.png"]}], images=True)[0]
    assert row["prompt"] == seen and row["images"] == ["a.png"]


# ------------------------------------------------------------ layouts (row 6)

TURNS = [H("q")]
LAYOUTS = {
    "sharegpt": {"conversations": TURNS, "chosen": G("good"), "rejected": G("bad")},
    "sharegpt lists": {"prompt": TURNS, "chosen": [G("good")], "rejected": [G("bad")]},
    "sharegpt text": {"conversations": TURNS, "chosen": "good", "rejected": "bad"},
    "openai": {"input": {"messages": [U("q")], "tools": []}, "preferred_output": [A("good")],
               "non_preferred_output": [A("bad")]},
    "message objects": {"prompt": [U("q")], "chosen": A("good"), "rejected": A("bad")},
    "ms-swift": {"messages": [U("q"), A("good")], "rejected_response": "bad"},
    "ms-swift messages": {"messages": [U("q"), A("good")],
                          "rejected_messages": [U("q"), A("bad")]},
    "axolotl": {"messages": [U("q")], "chosen": A("good"), "rejected": A("bad")},
    "openrlhf": {"context_messages": [U("q")], "chosen": "good", "rejected": "bad"},
    "torchtune": {"chosen_conversations": [H("q"), G("good")],
                  "rejected_conversations": [H("q"), G("bad")]},
    "medicalgpt": {"system": "", "history": [], "question": "q", "response_chosen": "good",
                   "response_rejected": "bad"},
    "ultrafeedback": {"prompt": "q", "chosen": [U("q"), A("good")], "rejected": [U("q"), A("bad")],
                      "messages": [U("q"), A("good")], "score_chosen": 8., "score_rejected": 3.},
    "whole in messages": {"messages": [U("q"), A("good")], "chosen": "good", "rejected": "bad"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_field(name, tmp_path):
    path = lines(tmp_path, [LAYOUTS[name], LAYOUTS[name]])
    assert content({k: v for k, v in load_preferences(path)[1].items() if k in CHAT}) == CHAT


THUMBS = {
    "trl": {"prompt": [U("q")], "completion": [A("good")], "label": True},
    "llama-factory": {"conversations": [H("q"), G("good")], "kto_tag": True},
    "alpaca": {"instruction": [U("q")], "output": "good", "kto_tag": "true"},
    "ms-swift": {"messages": [U("q"), A("good")], "label": 1.0},
    "response": {"prompt": [U("q")], "response": "good", "label": "1"}}


@pytest.mark.parametrize("name", THUMBS)
def test_layouts_of_labelled_replies(name):
    row = load_any([THUMBS[name]])[0]
    assert (row["prompt"], row["completion"], row["label"]) == ([U("q")], [A("good")], True)


def test_speakers_by_other_names():
    said = load_preferences([{"prompt": [{"role": "human", "content": "q"}],
                              "chosen": [{"role": "ai", "content": "good"}],
                              "rejected": [{"role": "model", "content": "bad"}]}])
    assert content(said[0]) == CHAT
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'}
    row = {"conversations": [H("q"), call, {"from": "observation", "value": "3"}],
           "chosen": G("good"), "rejected": G("bad")}
    prompt = load_preferences([row])[0]["prompt"]
    assert [m["role"] for m in prompt] == ["user", "assistant", "tool"]
    assert prompt[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    row["conversations"][1]["value"] = "f(a=1)"
    assert "not a JSON row" in refused(load_preferences, [row])


def test_history_comes_before_the_prompt():
    row = {"instruction": "q", "input": "", "history": [["a", "b"], ["c", "d"]], "system": "s",
           "chosen": "good", "rejected": "bad"}
    found = load_preferences([row, {**row, "history": None}])
    assert found[0]["prompt"] == [U("a"), A("b"), U("c"), A("d"), U("q")]
    assert found[1]["prompt"] == [U("q")] and found[0]["system"] == "s"
    assert "history[0] must be a pair" in refused(load_preferences, [{**row, "history": ["a"]}])


@pytest.mark.parametrize("row,words", [
    ({"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
     "columns chosen=answers.0.answer rejected=answers.-1.answer"),
    ({"instruction": "q", "output": ["a", "b"]}, "columns chosen=output.0 rejected=output.-1"),
    ({"messages": [U("q"), A("a")]}, "data to imitate"),
    ({"messages": [U("q")], "rejected_response": "b"}, "should end with the preferred"),
    ({"conversations": [{"from": "robot", "value": "q"}], "chosen": "a", "rejected": "b"},
     "unknown speaker 'robot'"),
    ({"prompt": "q", "chosen": {"text": "a", "score": 1}, "rejected": {"text": "b", "score": 0}},
     "did you mean --columns chosen=chosen.text"),
    ({"prompt": "q", "chosen": ["a", "b"], "rejected": "c"}, "columns chosen=chosen.0"),
    ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "model_a"},
     "columns chosen=response_a rejected=response_b"),
    ({"context": [U("q")], "response1": "a", "response2": "b", "overall_preference": 2},
     "response1 and response2 are two replies"),
    ({"model_a": "x", "model_b": "y", "winner": "model_a", "conversation_a": [U("q"), A("a")],
      "conversation_b": [U("q"), A("b")]}, "conversation_a and conversation_b are two")])
def test_what_is_not_certain_is_refused_with_its_remedy(row, words, tmp_path):
    said = refused(load_preferences, lines(tmp_path, [row]))
    assert "f.jsonl:1" in said and words in said


def test_a_layout_changes_no_row_of_ours():
    rows = [{**P, "weight": 2.}, {**CHAT, "tools": []}]
    for row in rows: assert lay_out(row, "x") is row


# ------------------------------------------------------------ tables (row 7)

TABLE = "prompt,chosen,rejected\nq,good,bad\n"
TABLES = {
    "bom crlf": b"\xef\xbb\xbf" + TABLE.replace("\n", "\r\n").encode(), "semicolon":
    TABLE.replace(",", ";"), "tab": TABLE.replace(",", "\t"), "bar": TABLE.replace(",", "|"),
    "lone cr": TABLE.replace("\n", "\r"), "spaced": TABLE.replace(",", ", "),
    "quoted": 'prompt,chosen,rejected\n"q","good","bad"\n', "case": TABLE.title().replace(
        "Q,Good,Bad", "q,good,bad"), "blank end": TABLE + "\n   \n",
    "spaced quotes": 'prompt,chosen,rejected\nq, "good", "bad"\n', "no end": TABLE[:-1],
    "blank start": "\n" + TABLE, "sep": "sep=;\n" + TABLE.replace(",", ";"),
    "empty columns": "prompt,chosen,rejected,,\nq,good,bad,,\n"}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_tables(name, suffix, tmp_path):
    prefs = load_preferences(write(tmp_path, TABLES[name], f"f.{suffix}"))
    assert [content(r) for r in prefs] == [P]
    assert any("blanks" in n for n in prefs.notices) == ("spaced" in name)


def test_what_a_cell_may_hold(tmp_path):
    def read(text): return load_preferences(write(tmp_path, text, "f.csv"))
    head = "prompt,chosen,rejected\n"
    assert read(head + 'q,"two\nlines, ""said""",bad\n')[0]["chosen"] == 'two\nlines, "said"'
    assert read(head + 'q,"a\rb",bad\n')[0]["chosen"] == "a\rb"
    assert read(head + 'q," good",bad\n')[0]["chosen"] == " good"
    assert read(head + 'q,"a; b; c; d",bad\n')[0]["chosen"] == "a; b; c; d"
    semi = read('prompt;chosen;rejected\nq;"a, b; c";bad\n')
    assert semi[0]["chosen"] == "a, b; c"
    index = read(",prompt,chosen,rejected\n0,q,good,bad\n")
    assert content(index[0]) == P and "without a name" in index.notices[0]
    assert read(head.replace("\n", ",weight\n") + "q,good,bad,\nq,a,b,2\n")[1]["weight"] == 2


@pytest.mark.parametrize("data,place,words", [
    ("prompt,chosen,rejected\nq,a,b\nq,a, b,c\n", "f.csv:3", "4 cells"),
    ('prompt,chosen,rejected\nq,"a\n', "f.csv:", "truncated"),
    ("prompt,chosen,rejected\nq,a\rb,c\n", "f.csv:", "new-line"),
    ('prompt,chosen,rejected\nq,"a"b,c\n', "f.csv:", "not CSV"),
    ("prompt,chosen,chosen\nq,a,b\n", "f.csv:1", "twice"), ("a,b\nq,a\n", "f.csv:2", "expected"),
    ("prompt,chosen,rejected\n", "f.csv", "no rows"),
    ("prompt,chosen,rejected\nCafé,a,b\n".encode("cp1252"), "f.csv:2", "Windows-1252"),
    ("prompt,chosen,rejected\nq,a,b\n".encode("utf-16"), "f.csv:1", "UTF-16")])
def test_tables_that_are_none(data, place, words, tmp_path):
    said = refused(load_preferences, write(tmp_path, data, "f.csv"))
    assert place in said and words in said


def test_an_empty_cell_is_an_empty_reply_with_its_line(tmp_path):
    path = write(tmp_path, "prompt,chosen,rejected\nq,good,\nq,a,b\n", "f.csv")
    assert "f.csv:2" in refused(take_preferences, path)


# ------------------------------------------------------------ JSON (row 8)

BOXES = {
    "wrapped": {"data": [P, P]}, "wrapped with notes": {"version": 1, "tags": [], "rows": [P, P]},
    "list": [P, P]}


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "json.gz"])
def test_json_in_boxes(name, indent, suffix, tmp_path):
    data = json.dumps(BOXES[name], indent=indent).encode()
    data = gzip.compress(data) if suffix == "json.gz" else b"\xef\xbb\xbf" + data
    prefs = load_preferences(write(tmp_path, data, f"f.{suffix}"))
    assert [content(r) for r in prefs] == [P, P]


@pytest.mark.parametrize("between", ["\n", "\n\n", " \n"])
def test_objects_over_many_lines(between, tmp_path):
    one = json.dumps(P, indent=2)
    path = write(tmp_path, "\n" + one + between + one + "\n")
    prefs = load_preferences(path)
    assert len(prefs) == 2 and prefs[0]["_where"] == f"{path}:2"
    assert content(prefs[1]) == P
    for row in (one, json.dumps(P)): assert len(load_preferences(write(tmp_path, row))) == 1


def test_a_box_of_splits_is_asked_about(tmp_path):
    path = write(tmp_path, json.dumps({"train": [P], "test": [P, P]}), "f.json")
    assert len(load_preferences(path)) == 1 and len(load_preferences(path, "test")) == 2
    path = write(tmp_path, json.dumps({"a": [P], "b": [P, P]}), "g.json")
    assert "which split? It has a, b" in refused(load_preferences, path)


@pytest.mark.parametrize("text,words", [
    (json.dumps({k: {"0": v} for k, v in P.items()}), "by columns"),
    (json.dumps({k: [v] for k, v in P.items()}), "by columns"),
    (json.dumps({"columns": list(P), "index": [0], "data": [list(P.values())]}), "by columns"),
    (",\n".join([GOOD] * 3), "a comma behind an object"),
    (str(P), "single quotes"), (str([P]), "single quotes"), ("3", "row must be"),
    (json.dumps([P, P], indent=1)[:-40], "truncated"),
    (json.dumps(P, indent=1) + json.dumps(P, indent=1), "more than one value"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
    ("<!DOCTYPE html><html></html>", "web page"), ("PK\x03\x04xx", "zip"),
    ('[{"prompt":"q","chosen":"a",\n"rejected":"b"},\n{"prompt": oops}]', "f.json:3")])
def test_json_that_is_none_is_told_what_it_is(text, words, tmp_path):
    said = refused(load_preferences, write(tmp_path, text, "f.json"))
    assert words in said and ("truncated" in said) == (words == "truncated")


def test_many_bad_rows_are_one_sentence(tmp_path):
    rows = [P, {**P, "chosen": 3}, P, {**P, "rejected": None}, {**P, "chosen": []}]
    said = refused(load_preferences, lines(tmp_path, rows))
    assert "f.jsonl:2: chosen is a number" in said and "2 more rows are refused, next 4, 5" in said
    said = refused(load_preferences, lines(tmp_path, [{"a": 1}] * 50))
    assert "at least 19 more" in said and len(said) < 400


# ------------------------------------------------------------ splits (row 9)

def table(folder, name, n):
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{**P, "prompt": name}] * n), folder / name)


def test_a_hub_snapshot_with_several_sets(tmp_path):
    for name, n in (("train_prefs", 3), ("train_sft", 2), ("test_prefs", 1), ("test_sft", 1)):
        table(tmp_path / "data", f"{name}-00000-of-00001.parquet", n)
    said = refused(load_preferences, tmp_path)
    assert all(f"{name}" in said for name in ("train_prefs", "train_sft")) and "--split" in said
    assert len(load_preferences(tmp_path, "train_prefs")) == 3
    assert "which split?" in refused(load_preferences, tmp_path, "test")
    assert "no split 'dev'" in refused(load_preferences, tmp_path, "dev")


def test_splits_in_folders_and_pieces(tmp_path):
    for i in range(2): table(tmp_path / "a", f"train-{i:05}-of-00002.parquet", i + 1)
    table(tmp_path / "a", "validation-00000-of-00001-0123456789abcdef.parquet", 4)
    write(tmp_path, json.dumps({"x": 1}), "a/dataset_infos.json")
    assert len(load_preferences(tmp_path / "a")) == 3
    assert len(load_preferences(tmp_path / "a", "val")) == 4
    for split in ("train", "test"): lines(tmp_path, [P], f"b/{split}/0000.jsonl")
    assert len(load_preferences(tmp_path / "b", "test")) == 1
    for name in ("helpful", "harmless"): lines(tmp_path, [P], f"c/{name}/train.jsonl")
    assert "which folder? It has harmless, helpful" in refused(load_preferences, tmp_path / "c")
    lines(tmp_path, [P, {**P, "chosen": "x"}], "d/train.jsonl")
    lines(tmp_path, [P], "d/train_sft.jsonl")
    assert len(load_preferences(tmp_path / "d")) == 2
    lines(tmp_path, [P], "e/mine.jsonl")
    assert len(load_preferences(tmp_path / "e")) == len(load_preferences(tmp_path / "e", "mine"))


def test_a_file_has_no_splits(tmp_path):
    path = lines(tmp_path, [P], "train.jsonl")
    assert len(load_preferences(path, "train")) == 1
    for name in ("test", "train_prefs"):
        assert "no split" in refused(load_preferences, path, name)


@pytest.mark.parametrize("names,split,found", [
    (["train", "test"], None, "train"), (["only"], None, "only"), (["train_x", "test"], None, "train_x"),
    (["a", "validation"], "dev", "validation"), (["train", "train_sft"], "train", "train"),
    (["train_prefs", "test"], "train", "train_prefs")])
def test_which_split(names, split, found): assert choose_split(names, split, "x") == found


def test_saved_datasets_and_their_splits(tmp_path):
    from datasets import Dataset, DatasetDict
    one, two = Dataset.from_list([P]), Dataset.from_list([P, {**P, "chosen": "x"}])
    data = DatasetDict(train_prefs=two, train_sft=one, test=one)
    data.save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "saved", data):
        assert "train_prefs, train_sft" in refused(load_preferences, source)
        assert len(load_preferences(source, "train_prefs")) == 2
    arrow = next((tmp_path / "saved" / "train_prefs").glob("*.arrow"))
    assert len(load_preferences(arrow)) == 2
    write(tmp_path, "{}", "broken/dataset_dict.json")
    assert "cannot load" in refused(load_preferences, tmp_path / "broken")


# ------------------------------------------------------------ tools (row 10)

def tool(**properties):
    return [{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": properties}}}]


def test_nulls_that_a_columnar_file_wrote_are_gone(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [{**CHAT, "tools": tool(town={"type": "string"})},
            {**CHAT, "tools": tool(zone={"type": "string"})}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    read = load_preferences(tmp_path / "f.parquet")
    assert "zone" in str(pq.read_table(tmp_path / "f.parquet").to_pylist()[0])
    assert [content(r) for r in read] == rows
    assert read.set_sha256 == load_preferences(lines(tmp_path, rows)).set_sha256
    written = load_preferences([{**CHAT, "tools": json.dumps(r["tools"])} for r in rows])
    assert written.set_sha256 == read.set_sha256
    assert any("column tools" in n for n in read.notices)


CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}]}
DONE = {"role": "tool", "content": "3"}


def test_tool_calls_are_kept_as_data():
    row = load_preferences([{**CHAT, "chosen": [CALL]}])[0]
    assert row["chosen"][0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert "content" not in row["chosen"][0]
    assert not check_preferences([{**CHAT, "chosen": [CALL]}]).found["empty reply"]


def test_a_reply_may_be_a_tool_exchange():
    chosen = [CALL, DONE, A("It is 3.")]
    assert len(load_preferences([{**CHAT, "chosen": chosen}])[0]["chosen"]) == 3
    whole = {"chosen": [U("q"), *chosen], "rejected": [U("q"), A("No.")]}
    assert len(load_preferences([whole])[0]["chosen"]) == 3
    same = {"chosen": [U("q"), *chosen], "rejected": [U("q"), CALL, DONE, A("It is 4.")]}
    assert load_preferences([same])[0]["prompt"][-1]["role"] == "tool"
    for bad in ([CALL, DONE], [A("a"), U("b"), A("c")], [DONE, A("a")]):
        refused(load_preferences, [{**CHAT, "chosen": bad}])


def test_text_parts_are_joined_and_half_parts_are_not():
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "so?", "image": None}]
    row = {**CHAT, "prompt": [{"role": "user", "content": parts}]}
    assert load_preferences([row])[0]["prompt"] == [U("How so?")]
    for content_ in ([], ["text"], 3, {}):
        bad = {**CHAT, "prompt": [{"role": "user", "content": content_}]}
        assert "prompt[0]: content must be text" in refused(load_preferences, [bad])


# ------------------------------------------------------------ the other columns (rows 13, 22)

@pytest.mark.parametrize("more,words", [
    ({"prefix": ["a"]}, "prefix must be text"), ({"system": 3}, "system must be text"),
    ({"tools": "weather"}, "tools must be a list"), ({"tools": ["weather"]}, "list of objects"),
    ({"tools": "[{"}, "tools"), ({"chat_template_kwargs": "x"}, "chat_template_kwargs must be an object"),
    ({"margin": "slightly better"}, "margin must be a finite number"),
    ({"weight": True}, "weight must be"), ({"weight": "heavy"}, "weight must be")])
def test_wrong_types_are_named(more, words, tmp_path):
    said = refused(load_preferences, lines(tmp_path, [P, {**P, **more}]))
    assert "f.jsonl:2" in said and words in said


def test_columns_that_steer_are_said_with_their_range():
    row = load_preferences([{**P, "id": 7, "chat_template_kwargs": '{"enable_thinking": false}'}])
    assert row[0]["id"] == "7" and row[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert any("chat_template_kwargs" in n for n in row.notices)
    prefs = load_preferences([{**P, "margin": m, "weight": "2"} for m in (1, 5)])
    said = " ".join(prefs.notices)
    assert "column margin (1 to 5)" in said and "column weight (2 to 2)" in said
    assert "every weight is 0" in refused(load_preferences, [{**P, "weight": 0}] * 2)
    assert len(load_preferences([{**P, "weight": 0}, {**P, "weight": 1}])) == 2
    quiet = load_preferences([{**P, "system": "", "tools": [], "margin": None}])
    assert content(quiet[0]) == P and not quiet.notices


@pytest.mark.parametrize("bad,name", [
    ({"score_chosen": 2, "score_rejected": 8}, "against its scores"),
    ({"chosen_score": 2., "rejected_score": 8.}, "against its scores"),
    ({"chosen-rating": 2, "rejected-rating": 8}, "against its scores"),
    ({"score_chosen": "5.0", "score_rejected": "5"}, "tie"), ({"winner": "tie"}, "tie"),
    ({"label": "Tie"}, "tie"), ({"status": "tie"}, "tie"),
    ({"rejected": "None"}, "word for nothing"), ({"chosen": " NaN "}, "word for nothing"),
    ({"rejected": " good\n"}, "blanks alone")])
def test_doubts_are_counted_in_one_row_and_refused_in_most(bad, name, tmp_path):
    good = [{**P, "prompt": f"q{i}"} for i in range(9)]
    one = check_preferences(lines(tmp_path, [*good, {**P, **bad}]))
    assert one.found[name] == [f"{tmp_path / 'f.jsonl'}:10"] and one.exit_code == 0
    many = lines(tmp_path, [{**P, **bad, "prompt": f"q{i}"} for i in range(4)])
    said = refused(take_preferences, many)
    assert f"4 × {name}" in said and f"--allow '{name}'" in said
    prefs, audit = take_preferences(many, allow=[name])
    assert len(prefs) == 4 and audit.exit_code == 2


def test_null_columns_of_another_layout_are_no_columns():
    row = {**LAYOUTS["axolotl"], "prompt": None, "question": None, "completion": None}
    assert content({k: v for k, v in load_preferences([row])[0].items() if k in CHAT}) == CHAT


def test_scores_are_no_content():
    assert load_preferences([{**P, "score_chosen": 2, "score_rejected": 1}]).set_sha256 == \
        load_preferences([P]).set_sha256
    assert load_preferences([{**P, "score_chosen": 2, "score_rejected": 1}]).notices == []


# ------------------------------------------------------------ sources

def test_row_order_changes_one_hash_only(tmp_path):
    a, b = ([{**P, "prompt": q} for q in order] for order in ("xyz", "zxy"))
    a, b = (load_preferences(lines(tmp_path, rows, f"{i}.jsonl")) for i, rows in enumerate((a, b)))
    assert a.set_sha256 == b.set_sha256 and a.order_sha256 != b.order_sha256
    assert a.sha256 != b.sha256


def test_kinds_of_file(tmp_path):
    import pandas
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset, DatasetDict
    rows = [P, {**P, "chosen": "2024-01-01"}]
    write(tmp_path, json.dumps(rows, indent=1), "a.json")
    write(tmp_path, 'prompt,chosen,rejected\nq,good,bad\nq,2024-01-01,bad\n', "a.csv")
    write(tmp_path, gzip.compress("\n".join(map(json.dumps, rows)).encode()), "a.jsonl.gz")
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet")
    data = Dataset.from_list(rows)
    DatasetDict(train=data).save_to_disk(tmp_path / "saved")
    names = ("a.json", "a.csv", "a.jsonl.gz", "a.parquet", "saved")
    sources = [*(tmp_path / f for f in names), data, DatasetDict(train=data), rows, tuple(rows),
               data.to_iterable_dataset(), iter(rows), table, pandas.DataFrame(rows),
               [tmp_path / "a.json"], {"train": rows, "test": rows[:1]}]
    want = load_preferences(rows).set_sha256
    for s in sources: assert load_preferences(s).set_sha256 == want, s
    import numpy
    assert content(load_preferences([{k: numpy.array(v) for k, v in CHAT.items()}])[0]) == CHAT
    chat = pandas.DataFrame([CHAT])
    assert content(load_preferences(chat)[0]) == CHAT
    assert len(read_preferences(rows, limit=1)) == 1
    same = load_preferences(rows)
    assert load_preferences(same) is same


@pytest.mark.parametrize("source", [3, None, object(), [], {}, {"chosen": "a"}, [3], ["x", 3]])
def test_what_holds_no_rows_is_refused(source): refused(load_preferences, source)


def test_places_that_are_not_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "empty").mkdir()
    write(tmp_path, b"not gzip", "x.jsonl.gz")
    write(tmp_path, gzip.compress(GOOD.encode())[:-6], "y.jsonl.gz")
    write(tmp_path, gzip.compress(GOOD.encode()), "z.jsonl")
    write(tmp_path, "x", "z.docx")
    write(tmp_path, "x", "z.parquet")
    write(tmp_path, "x", "z.arrow")
    said = {"pipe.jsonl": "regular file", "loop.jsonl": "Too many levels",
            "empty": "no data file", "x.jsonl.gz": "truncated", "y.jsonl.gz": "truncated",
            "z.jsonl": "call it .gz", "z.docx": "unknown kind", "none.jsonl": "no such file",
            "z.parquet": "not a parquet file", "z.arrow": "not an Arrow file",
            "no/such.jsonl": "no such file"}
    for name, words in said.items(): assert words in refused(load_preferences, tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = write(tmp_path, GOOD)
    path.chmod(0)
    with pytest.raises(Refusal, match="ermission"): load_preferences(path)


def peak(call):
    "Most memory a call held at once (bytes), and its seconds of processor time."
    tracemalloc.start()
    start = time.process_time()
    try: call()
    finally:
        seconds, most = time.process_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return most, seconds


def test_one_line_of_a_gigabyte_is_refused_unread(tmp_path):
    path = tmp_path / "f.jsonl"
    with open(path, "wb") as f: f.truncate(2**30)         # a hole: no disk is used
    def load():
        assert "f.jsonl:1: line longer than 64 MiB" in refused(load_preferences, path)
    assert peak(load)[0] < 3 * MAX_LINE


@pytest.mark.parametrize("size", [1_000_000, pytest.param(20_000_000, marks=pytest.mark.slow)])
def test_one_long_row_among_short_ones(size, tmp_path):
    "T40: at most two seconds a megabyte and ten times the row; its neighbours as they were."
    path = write(tmp_path, "\n".join([GOOD, J(chosen="the cat " * (size // 8)), GOOD]))
    found = []
    most, seconds = peak(lambda: found.append(check_preferences(load_preferences(path))))
    assert most < 10 * size and seconds < 2 * size / 1e6
    assert [p.split(" ")[0].rsplit(":")[-1] for p in found[0].found["long"]] == ["2"]


@pytest.mark.parametrize("limit", [1000])
def test_a_line_at_the_limit(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE", limit)
    fits = GOOD[:-1] + " " * (limit - len(GOOD)) + "}"
    assert len(load_preferences(write(tmp_path, fits))) == 1
    assert "longer" in refused(load_preferences, write(tmp_path, " " + fits))


def test_file_changes_and_files_twice(tmp_path):
    path = write(tmp_path, GOOD)
    prefs = load_preferences(path)
    prefs.check_unchanged()
    assert "twice" in refused(load_preferences, [path, write(tmp_path, GOOD, "copy.jsonl")])
    assert "same file" in refused(leakage(path, path).refuse)
    path.write_text(GOOD + "\n" + GOOD)
    assert "changed" in refused(prefs.check_unchanged)


def test_two_sources_that_share_a_prompt_keep_all_their_pairs(tmp_path):
    "T35"
    a, b = write(tmp_path, GOOD, "a.jsonl"), write(tmp_path, J(chosen="better"), "b.jsonl")
    prefs = load_preferences([a, b])
    assert [r["chosen"] for r in prefs] == ["good", "better"]
    assert prefs[1]["_where"].endswith("b.jsonl:1")
    assert not check_preferences(prefs).found["duplicate"]


def test_half_a_character_is_refused_wherever_it_comes_from():
    rows = ({**P, "chosen": "\ud800"}, {**CHAT, "prompt": [U("\udc00")]}, {**P, "system": "\ud800"})
    for row in rows:
        assert "row 1: half a character" in refused(load_preferences, [row])


def test_keys_do_not_collide_and_rows_stay_as_they_were():
    def row(*talk): return {**CHAT, "prompt": list(talk)}
    rows = [row(U("ab"), A("c"), U("d")), row(U("a"), A("bc"), U("d"))]
    before = json.dumps(rows)
    prefs = load_preferences(rows)
    assert not check_preferences(prefs).found["duplicate"] and json.dumps(rows) == before
    prefs[0]["prompt"][0]["content"] = "changed"
    assert json.dumps(rows) == before


def test_unpaired():
    row = {"prompt": "q", "completion": "a", "label": True}
    assert load_unpaired([row])[0]["label"] is True
    assert "label" in refused(load_unpaired, [{**row, "label": "good"}])


def test_hub_name(tmp_path):
    for name in ("nobody-here/no-such-set", "nobody-here/no-such-set:small"):
        assert "no such file or folder, and the hub" in refused(load_preferences, name)


@pytest.mark.skipif(data_dir() is None, reason="no data")
def test_real_files():
    assert len(load_preferences(data_dir() / "polite_pairs")) == 1100
    assert len(load_preferences(data_dir() / "hh_harmless")) == 902
    assert len(load_preferences(data_dir() / "hh_harmless", "test")) == 200
    assert len(load_preferences(data_dir() / "human_pairs")) == 1482


# ------------------------------------------------------------ prompts alone

ASKED = {
    "text": ("f.txt", "q\n\n q two \n", ["q", "q two"]),
    "a prompt a line": ("f.jsonl", '{"prompt": "q"}\n{"prompt": "q two"}\n', ["q", "q two"]),
    "texts of a list": ("f.json", '["q", "q two"]', ["q", "q two"]),
    "texts over lines": ("f.json", '[\n"q",\n"q two"\n]', ["q", "q two"]),
    "strings of lines": ("f.jsonl", '"q"\n"q two"\n', ["q", "q two"]),
    "table": ("f.csv", "question,note\nq,1\nq two,2\n", ["q", "q two"]),
    "alpaca": ("f.jsonl", turns(instruction="Add.", input="1 2", output="3"), ["Add.\n\n1 2"]),
    "questions and answers": ("f.jsonl", turns(question="q", answer="a"), ["q"]),
    "system": ("f.jsonl", turns(prompt="q", system_prompt="s"), [[S("s"), U("q")]]),
    "messages": ("f.jsonl", turns(messages=[S("s"), U("q"), A("a"), U("more")]), [[S("s"), U("q"), A("a"), U("more")]]),
    "answered messages": ("f.jsonl", turns(messages=[U("q"), A("a")]), [[U("q")]]),
    "sharegpt": ("f.jsonl", turns(conversations=[H("q"), G("a"), H("more"), G("b")]), [[U("q"), A("a"), U("more")]]),
    "json text": ("f.jsonl", turns(prompt=json.dumps([U("q")])), [[U("q")]]),
    "history": ("f.jsonl", turns(prompt="more", history=[["q", "a"]]), [[U("q"), A("a"), U("more")]]),
    "whole conversations": ("f.jsonl", turns(prompt="q", chosen=[U("q"), A("a")], rejected=[U("q"), A("b")]), [[U("q")]]),
    "labelled": ("f.jsonl", turns(prompt="q", completion="a", label=True), ["q"]),
}


@pytest.mark.parametrize("name", ASKED)
def test_prompts_are_read_from_whatever_pairs_are_read_from(name, tmp_path):
    file, data, want = ASKED[name]
    assert read_prompts(write(tmp_path, data, file)) == want


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_prompt_is_the_same_with_and_without_its_replies(name, tmp_path):
    path = lines(tmp_path, [LAYOUTS[name]])
    assert read_prompts(path) == [load_preferences(path)[0]["prompt"]]


def test_prompts_have_columns_splits_and_what_stands_beside_them(tmp_path):
    path = lines(tmp_path, [{"q": "why", "sys": "s", "truth": 3}, {"q": "who"}], "data/train_b.jsonl")
    lines(tmp_path, [{"prompt": "x"}], "data/train_a.jsonl")
    assert read_prompts(path, columns={"prompt": "q", "system": "sys"}) == [[S("s"), U("why")], "who"]
    asked = read_asked(tmp_path / "data", "train_b", columns_of("prompt=q"))
    assert asked[0]["row"]["truth"] == 3 and asked[1]["_where"] == f"{path}:2"
    pairs = lines(tmp_path, [{"q": "why", "good": "a", "bad": "b"}])
    named = columns_of("prompt=q chosen=good rejected=bad")
    assert read_prompts(pairs, columns=named) == ["why"] == [r["prompt"] for r in load_preferences(pairs, None, named)]


@pytest.mark.parametrize("data,words", [
    ("", "no prompts"), ('{"prompt": "q"}\n{"id": 3}\n', "f.jsonl:2: expected an object with a field"),
    ('{"prompt": ""}', "f.jsonl:1: expected"), ('{"prompt": " "}', "f.jsonl:1: the prompt is empty"), ("3\n", "f.jsonl:1"),
    ('{"prompt": "q", "tools": [{}]}', "--columns tools="), ('{"prompt": 3}', "f.jsonl:1: prompt is a number"),
    ('{"prompt": "q", "images": ["a.png"]}', "holds pictures"), ('{"prompt": [{"role": "user"}]}', "f.jsonl:1")])
def test_what_asks_nothing_is_refused_by_line(data, words, tmp_path):
    assert words in refused(read_prompts, write(tmp_path, data))
    assert "no such file" in refused(read_prompts, tmp_path / "none.jsonl")


# ------------------------------------------------------------ the audit

def test_audit_names_every_class():
    good = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(100)]
    bad = {"identical": {**P, "rejected": "good"}, "empty reply": {**P, "chosen": ""},
           "blank reply": {**P, "chosen": " \n"}, "empty prompt": {**P, "prompt": ""},
           "duplicate": good[3], "contradiction": {**good[4], "chosen": "bad", "rejected": "good"},
           "control text": {**P, "chosen": "<|im_end|>"}, "long": {**P, "chosen": "x" * 200_000}}
    audit = check_preferences(good + list(bad.values()))
    for i, k in enumerate(bad): assert audit.found[k][0].startswith(f"row {101 + i}"), k
    assert audit.exit_code == 2 and check_preferences(good).exit_code == 0
    with pytest.raises(Refusal, match="identical"): audit.refuse()
    audit.refuse(allow=tuple(audit.refusals))
    assert "\x1b" not in inert("\x1b[31m")


def test_one_of_each_kind_among_a_hundred_refuses_by_default(tmp_path):
    "T31: classes and lines of a file on disk, and the exit code."
    good = [{**P, "prompt": f"q{i}"} for i in range(100)]
    path = lines(tmp_path, [*good, {**P, "rejected": "good"}, {**P, "chosen": "\t "}, good[7],
                            {**good[8], "chosen": "bad", "rejected": "good"}])
    audit = check_preferences(path)
    places = {k: v for k, v in audit.found.items() if v}
    assert {k: v[0].split("f.jsonl:")[1].split(" ")[0] for k, v in places.items()} == {
        "identical": "101", "blank reply": "102", "duplicate": "103", "contradiction": "104"}
    assert audit.exit_code == 2
    with pytest.raises(Refusal, match="f.jsonl:101"): audit.refuse()


def test_what_is_refused_depends_on_the_settings():
    rows = [P, {**P, "rejected": "good"}, {**P, "chosen": ""}, {**P, "chosen": "a <|im_end|>"}]
    audit = check_preferences(rows)
    assert set(audit.objections()) == {"identical", "empty reply", "control text"}
    assert set(audit.objections(identical="drop")) == {"control text"}
    assert audit.objections("drop", "text") == {}
    assert set(audit.objections(allow=["identical"])) == {"empty reply", "control text"}
    take_preferences(rows, identical="drop", control_text="text")
    said = refused(take_preferences, rows)
    assert "--identical drop" in said and "--control-text text" in said
    for wrong in (dict(identical="maybe"), dict(control_text="no"), dict(allow=["identicle"])):
        refused(audit.objections, **wrong)


def test_one_call_reads_audits_and_refuses(tmp_path):
    path = lines(tmp_path, [{"q": "q", "chosen": "good", "rejected": "bad"}] * 2)
    prefs, audit = take_preferences(path, columns={"prompt": "q"}, kind="pairs")
    assert len(prefs) == 2 and len(audit.found["duplicate"]) == 1
    assert audit.notices == prefs.notices


def test_the_same_row_object_twice_is_a_duplicate():
    row = load_preferences([P])[0]
    assert len(check_preferences([row, row]).found["duplicate"]) == 1


# ------------------------------------------------------------ leakage (row 21)

@pytest.mark.parametrize("train, eval, exact, near", [
    ("Hello", "Hello", 1, 0), ("Hello", "hELLO", 0, 1), ("a b", " a\u00a0 b\n", 0, 1),
    ("caf\u00e9", "cafe\u0301", 0, 1), ("\ufb01ne", "fine", 0, 1), ("Hello", "Hello!", 0, 0)])
def test_leakage_in_every_form(train, eval, exact, near):
    "T32"
    found = leakage([{**P, "prompt": train}], [{**P, "prompt": eval}])
    assert (len(found.exact), len(found.near)) == (exact, near)
    assert (found.sentence is None) == (exact + near == 0)


def test_leakage_between_text_and_chat_and_thumbs():
    text, chat = [{**P, "prompt": "q"}], [{**CHAT, "chosen": [A("other")]}]
    thumb = [{"prompt": "q", "completion": "a", "label": True}]
    for other in (chat, thumb):
        assert len(leakage(text, other).exact) == 1
        said = refused(leakage(text, other).refuse)
        assert "1 of 1 eval prompts stand in train too" in said and "--allow overlap" in said
        leakage(text, other).refuse(allow=["overlap"])


def test_leakage_exact_and_folded():
    train = [{**P, "prompt": t} for t in ("Straße", "a b", "Hello", "only")]
    found = leakage(train, [{**P, "prompt": t} for t in ("STRASSE", "a  B", "Hello", "new")])
    assert len(found.exact) == 1 and len(found.near) == 2
    with pytest.raises(Refusal): found.refuse()


# ------------------------------------------------------------ nothing ends in a traceback

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=6)
    | st.sampled_from(["user", "assistant", "q", "[{", '[{"role": "user"', "tie", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "messages", "text", "type", "a"]),
        inner, max_size=3), max_leaves=8)
NAMES = ("prompt", "chosen", "rejected", "completion", "label", "weight", "margin", "tools", "id",
         "system", "prefix", "images", "chat_template_kwargs", "history", "messages", "input",
         "conversations", "instruction", "question", "kto_tag", "rejected_response", "output",
         "score_chosen", "score_rejected", "winner", "", "Prompt")
STARTS = [P, CHAT, WHOLE, {"prompt": LONG, **SYSTEM}, *LAYOUTS.values(), *THUMBS.values()]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(STARTS), st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3),
       st.sets(st.sampled_from(NAMES), max_size=2))
def test_a_changed_row_is_read_or_refused(start, more, less):
    row = {k: v for k, v in {**start, **more}.items() if k not in less}
    try: prefs = load_any([row])
    except Refusal as no:
        assert "\n" not in inert(str(no)) and len(str(no)) < 1200
        return
    assert as_chat(prefs[0]) and check_preferences(prefs).table()
    again = load_any([content(prefs[0])])                 # what was read reads as itself
    assert content(again[0]) == content(prefs[0]) and not again.ignored_columns


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(STARTS), st.integers(1, 3), st.data())
def test_a_changed_file_is_read_or_refused_with_its_name(start, n, data):
    import tempfile
    suffix = data.draw(st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"]))
    indent = data.draw(st.sampled_from([None, 1]))
    text = bytearray("\n".join([json.dumps(start, indent=indent)] * n).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text)))
        new = data.draw(st.binary(max_size=3) | st.sampled_from([b'"', b"{", b"\r", b"[", b"\n"]))
        text[at:at + data.draw(st.integers(0, 9))] = new
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), bytes(text), "f" + suffix)
        try: load_any(path)
        except Refusal as no: assert "f" + suffix in str(no)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.text(max_size=8), min_size=3, max_size=3), min_size=1, max_size=4),
       st.sampled_from([",", ";", "\t", "|"]), st.sampled_from(["\n", "\r\n"]))
def test_what_the_csv_writer_writes_is_read_back(rows, sign, end):
    import csv
    import io
    import tempfile
    rows = [[c.replace("\r", "") for c in cells] for cells in rows]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=sign, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["prompt", "chosen", "rejected"], *rows])
    with tempfile.TemporaryDirectory() as folder:
        try: data = out.getvalue().encode()
        except UnicodeEncodeError: return
        path = write(Path(folder), data, "f.csv")
        try: prefs = read_preferences(path, repeats="keep")
        except Refusal as no:
            assert any(not any(c.strip() for c in cells) for cells in rows) or "\0" in str(rows) \
                or any(c[:1] in "[{" for cells in rows for c in cells), no
            return
    kept = [r for r in rows if any(c.strip() for c in r)]
    assert [[r[k] for k in ("prompt", "chosen", "rejected")] for r in prefs] == kept


def test_reading_200_rows_of_each_kind_is_quick(tmp_path):
    rows = [{**P, "prompt": f"q{i}"} for i in range(200)]
    assert len(take_preferences(lines(tmp_path, rows))[0]) == 200
    did = Counter()
    for i, row in enumerate(rows): canonical(row, f"x:{i}", did)
    assert not +did


ELSEWHERE = {
    **dict.fromkeys((19, 20, 21, 22, 23, 24, 28), test_audit_names_every_class),
    34: test_one_line_of_a_gigabyte_is_refused_unread, 36: test_places_that_are_not_files,
    37: test_file_changes_and_files_twice, 38: test_file_changes_and_files_twice,
    39: test_file_changes_and_files_twice, 40: test_row_order_changes_one_hash_only}
IN_ROWS = {25: "test_truncation_against_brute_force",
           26: "test_truncated_rows_are_counted_and_keep_one_prompt"}


def test_all_forty_are_here():
    here = {int(name[:2]) for name in (*REFUSE, *ACCEPT) if name[:2].isdigit()}
    rows = (Path(__file__).parent / "test_rows.py").read_text(encoding="utf-8")
    assert all(f"def {name}(" in rows for name in IN_ROWS.values())
    assert here | set(ELSEWHERE) | set(IN_ROWS) == set(range(1, 41))
