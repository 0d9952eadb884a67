"""Rules that find a model's own failures, and the command that makes pairs of votes, rankings,
rewards and failures."""
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_literate import cli
from dpo_literate.failures import (failure_pairs, json_fault, language_fault, loop_fault, repeats,
                                   schema_fault, tool_fault)
from dpo_literate.reading import read_preferences
from dpo_literate.results import Refusal


# ------------------------------------------------------------ loops

@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 6))
def test_repeats_counts_as_the_slow_way_does(words, n):
    best = 1 if words else 0
    for start in range(len(words)):
        piece, count = words[start:start + n], 0
        if len(piece) < n: break
        while words[start + count * n:start + (count + 1) * n] == piece: count += 1
        best = max(best, count)
    assert repeats(words, n) == best


@pytest.mark.parametrize("n, times", [(1, 4), (3, 3), (10, 5), (24, 3)])
def test_a_planted_loop_is_found_wherever_it_stands(n, times):
    rng = random.Random(n)
    piece = [f"p{k}" for k in range(n)]
    text = [f"a{k}" for k in range(rng.randrange(9))] + piece * times + ["end"]
    assert loop_fault(" ".join(text)) == f"{n} words {times} times in a row"


@pytest.mark.parametrize("text", ["", "one", "no no no", "a b a b a c", "1 a 2 a 3 a 4 a 5 a"])
def test_what_is_no_loop(text): assert loop_fault(text) is None


# ------------------------------------------------------------ JSON, tools, language

SCHEMA = dict(type="object", required=["n"], additionalProperties=False, properties=dict(
    n=dict(type="integer"), kind=dict(enum=["a", "b"]), tags=dict(type="array", items=dict(
        type="object", required=["t"], properties=dict(t=dict(type=["string", "null"]))))))
VALUES = {'{"n": 1}': None, '{"n": 2.0}': None, '{"n": 1, "tags": [{"t": null}]}': None,
          '{"n": true}': "n is no integer", '{"n": 1.5}': "no integer", '{}': "has no 'n'",
          '{"n": 1, "m": 2}': "nobody asked", '{"n": 1, "kind": "c"}': "no allowed value",
          '{"n": 1, "tags": [{"t": "x"}, {"t": 3}]}': r"tags\[1\].t is no string or null",
          '[1]': "is no object", '{"n": 1': "no JSON", '```{"n": 1}```': "no JSON",
          '{"n": Infinity}': "NaN or Infinity", "[" * 100_000: "no JSON"}


@pytest.mark.parametrize("text", VALUES, ids=lambda t: t[:30])
def test_json_is_held_against_its_schema(text):
    found, want = json_fault(text, SCHEMA), VALUES[text]
    if want is None: assert found is None
    else:
        with pytest.raises(ValueError, match=want): raise ValueError(found)


def test_a_schema_that_asks_for_more_is_refused_rather_than_passed():
    with pytest.raises(Refusal, match="keyword 'minimum'"): schema_fault(1, dict(minimum=3))
    with pytest.raises(Refusal, match="schema type 'int'"): schema_fault(1, dict(type="int"))


def test_jsonschema_agrees():
    jsonschema = pytest.importorskip("jsonschema")
    judge = jsonschema.Draft202012Validator(SCHEMA)
    for text in VALUES:
        try: value = json.loads(text, parse_constant=lambda _: 1 / 0)
        except (ValueError, ZeroDivisionError, RecursionError): continue
        assert judge.is_valid(value) == (schema_fault(value, SCHEMA) is None), text


TOOLS = [{"type": "function", "function": dict(name="add", parameters=dict(
    type="object", required=["a"], properties=dict(a=dict(type="number"))))}, dict(name="stop")]


@pytest.mark.parametrize("text, want", [
    ('{"name": "add", "arguments": {"a": 1}}', None), ('{"name": "stop"}', None),
    ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', None),
    ('{"name": "add", "arguments": {"a": "1"}}', "arguments.a is no number"),
    ('{"name": "add"}', "arguments has no 'a'"), ('{"name": "sub"}', "there is no tool 'sub'"),
    ('add(1)', "not JSON"), ('["add"]', "names no tool"), ('{"name": 3}', "names no tool")])
def test_calls_are_held_against_the_tools(text, want):
    found = tool_fault(text, TOOLS)
    assert found is None if want is None else want in found


def test_the_wrong_tool_is_a_fault_where_one_is_wanted():
    assert tool_fault('{"name": "stop"}', TOOLS, "add") == "called stop, not add"


@pytest.mark.parametrize("text, wanted, fault", [
    ("I have a dog and it is in the house.", "en", None),
    ("Ich habe einen Hund und das ist nicht der Ofen.", "en", "in de, not en"),
    ("Il y a un chat dans la maison et il est avec le chien.", "fr", None),
    ("Это собака и кошка.", "en", "in CYRILLIC, not en"), ("42", "en", None), ("", "en", None)])
def test_languages(text, wanted, fault): assert language_fault(text, wanted) == fault


def test_every_prompt_is_accounted_for():
    replies = [["x x x x", "fine"], ["x x x x", "y y y y"], ["fine"], [""], ["x x x x"]]
    found = failure_pairs(list("abcde"), replies, lambda k, y: loop_fault(y),
                          [None, None, None, None, "truth"])
    assert sum(found.counts.values()) == 5
    assert [(r["prompt"], r["chosen"]) for r in found.rows] == [("a", "fine"), ("e", "truth")]


# ------------------------------------------------------------ the command

def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def run(capsys, *words):
    code = cli.main(["pairs", *words])
    return code, capsys.readouterr()


def test_votes_become_a_file_that_train_takes(tmp_path, capsys):
    rows = [dict(q="How?", a="So.", ups=5), dict(q="How?", a="Like this.", ups=1),
            dict(q="Why?", a="Hm.", ups=2)]
    out = tmp_path / "pairs.jsonl"
    code, said = run(capsys, "--from-votes", write(tmp_path / "v.jsonl", rows), "--out", str(out),
                     "--columns", "thread=q", "reply=a", "score=ups")
    assert code == 0 and "3 replies: 2 in a pair, 1 alone in their thread" in said.out
    pair, = read_preferences(str(out))
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("How?", "So.", "Like this.")


def test_rankings_become_pairs(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", [dict(prompt="Q", ranked=["a b", "b c", "c d"])])
    out = tmp_path / "pairs.jsonl"
    code, said = run(capsys, "--from-ranks", path, "--out", str(out), "--which", "neighbours")
    assert code == 0 and len(read_preferences(str(out))) == 2 and "1 rankings of 3" in said.out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from dpo_literate.models import tiny_model, write_folder
    from dpo_literate.rows import tiny_tokenizer
    folder = tmp_path_factory.mktemp("m") / "tiny"
    write_folder(folder, tiny_model(), tiny_tokenizer())
    return str(folder)


def test_a_model_s_broken_json_against_the_truth(tiny, tmp_path, capsys):
    asked = [dict(prompt="JSON!", truth='{"n": 1}'), dict(prompt="?")]
    prompts = write(tmp_path / "p.jsonl", asked)
    schema = tmp_path / "s.json"
    schema.write_text(json.dumps(SCHEMA))
    out = tmp_path / "pairs.jsonl"
    code, said = run(capsys, "--from-failures", "json", "--schema", str(schema), "--model", tiny,
                     "--prompts", prompts, "--out", str(out), "--max-new-tokens", "5")
    assert code == 0 and "1 a pair with the truth, 1 no clean reply" in said.out
    pair, = read_preferences(str(out))
    assert pair["chosen"] == '{"n": 1}' and json_fault(pair["rejected"])


def test_a_reward_picks_the_best_and_the_worst(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "votes_reward.py").write_text(
        "def size(prompts, replies): return [float(len(y)) for y in replies]\n")
    monkeypatch.chdir(tmp_path)
    prompts, out = tmp_path / "p.txt", tmp_path / "pairs.jsonl"
    prompts.write_text("Name a pear.\nName a fig.\n")
    code, said = run(capsys, "--from-reward", "votes_reward:size", "--model", tiny, "--out",
                     str(out), "--prompts", str(prompts), "--max-new-tokens", "6")
    assert code == 0 and "2 prompts:" in said.out
    assert all(len(p["chosen"]) > len(p["rejected"]) for p in read_preferences(str(out)))


REFUSED = {"no source": ([], "say one of --from-votes"),
           "two": (["--from-votes", "v.jsonl", "--from-ranks", "v.jsonl"], "found 2"),
           "no prompts": (["--from-failures", "loop"], "--prompts is needed"),
           "no rule": (["--from-failures", "dull", "--prompts", "p.txt"], "use loop, json or tool"),
           "no tools": (["--from-failures", "tool", "--prompts", "p.txt"], "--tools is needed"),
           "no file": (["--from-votes", "none.csv"], "none.csv: no such file"),
           "wide gap": (["--from-votes", "v.jsonl", "--gap", "9"], "no pair can be made"),
           "bad truth": (["--from-failures", "loop", "--prompts", "t.jsonl"],
                         "t.jsonl:1: truth must be text")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "v.jsonl", [dict(thread="t", reply=y, score=s) for y, s in ("a1", "b2")])
    write(tmp_path / "t.jsonl", [dict(prompt="Q", truth=3)])
    (tmp_path / "p.txt").write_text("Q\n")
    words, why = REFUSED[name]
    code, said = run(capsys, *words, "--out", "new.jsonl")
    assert code == 2 and why in said.err and not (tmp_path / "new.jsonl").exists()


def test_a_file_that_is_there_stays(tmp_path, capsys):
    rows = [dict(thread="t", reply=y, score=s) for y, s in ("a1", "b2")]
    votes = write(tmp_path / "v.jsonl", rows)
    out = tmp_path / "old.jsonl"
    out.write_text("mine")
    code, said = run(capsys, "--from-votes", votes, "--out", str(out))
    assert code == 2 and "is there already" in said.err and out.read_text() == "mine"
