"The forty bad (and good) files of preferences, and what the loader must say to each."
import gzip, json, os
import pytest
from dpo_literate.preferences import check_preferences, extract_prompt, leakage, load_preferences, load_unpaired, inert
from dpo_literate.results import Refusal, data_dir

P = {"prompt": "q", "chosen": "good", "rejected": "bad"}
def J(**kw): return json.dumps({**P, **kw})
def U(c): return {"role": "user", "content": c}
def A(c): return {"role": "assistant", "content": c}
GOOD = J()

def write(tmp_path, data, name="f.jsonl"):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path

REFUSE = {
    "cut off": (GOOD + "\n" + GOOD[:25], "f.jsonl:2", "truncated"),
    "garbage": (GOOD + "\n\nhello\n", "f.jsonl:3", "not a JSON row"),
    "key missing": (GOOD + '\n{"prompt":"q","chosen":"a"}', "f.jsonl:2", "rejected"),
    "null": (GOOD + "\n" + J(chosen=None), "f.jsonl:2", "chosen is null"),
    "integer": (GOOD + "\n" + J(rejected=3), "f.jsonl:2", "rejected is int"),
    "mixed shapes": (GOOD + "\n" + J(prompt=[U("q")], chosen=[A("a")], rejected=[A("b")]), "f.jsonl:2", "one shape"),
    "duplicate key": ('{"prompt":"q","prompt":"q","chosen":"a","rejected":"b"}', "f.jsonl:1", "stands twice"),
    "utf-16": (GOOD.encode("utf-16"), "f.jsonl:1", "UTF-16"),
    "latin-1": (GOOD.replace("good", "é").encode("latin-1"), "f.jsonl:1", "UTF-8"),
    "two objects": (GOOD + GOOD, "f.jsonl:1", "more than one value"),
    "lone surrogate": (GOOD.replace("good", "\\ud800"), "f.jsonl:1", "surrogate"),
    "empty file": ("", "f.jsonl", "no rows"),
    "blank file": ("\n \n", "f.jsonl", "no rows"),
    "wrong columns": ('{"question":"q","good":"a","bad":"b"}', "f.jsonl:1", "did you mean"),
    "unknown role": (J(prompt=[{"role": "<|im_end|>", "content": "q"}]), "f.jsonl:1", "unknown role"),
    "two assistants": (J(prompt=[U("q"), A("a"), A("b"), U("c")]), "prompt[2]", "two assistant"),
    "no user": (J(prompt=[{"role": "system", "content": "s"}]), "f.jsonl:1", "no user"),
    "ends with user": (json.dumps({"chosen": [U("q"), U("a")], "rejected": [U("q"), U("b")]}), "f.jsonl:1", "assistant"),
    "prompts differ": (json.dumps({"chosen": [U("q"), A("a")], "rejected": [U("r"), A("b")]}), "f.jsonl:1", "part at message 1"),
    "deep": ("[" * 20000 + "]" * 20000, "f.jsonl:1", ""),
    "deep object": ('{"a":' * 10000 + "1" + "}" * 10000, "f.jsonl:1", ""),
    "NaN": (GOOD[:-1] + ', "weight": NaN}', "f.jsonl:1", "NaN"),
    "Infinity": (GOOD[:-1] + ', "weight": 1e999}', "f.jsonl:1", "finite"),
    "huge int": (GOOD[:-1] + ', "weight": ' + "9" * 5000 + "}", "f.jsonl:1", ""),
    "negative weight": (J(weight=-1), "f.jsonl:1", "weight"),
    "implicit text": ('{"chosen":"Paris ","rejected":"London"}', "f.jsonl:1", "prompt"),
    "a list row": ('["q","a","b"]', "f.jsonl:1", "row must be"),
}

@pytest.mark.parametrize("name", REFUSE)
def test_refused(name, tmp_path):
    data, place, words = REFUSE[name]
    with pytest.raises(Refusal) as e: load_preferences(write(tmp_path, data))
    assert place in str(e.value) and words in str(e.value) and e.value.code == 2
    assert len(str(e.value)) < 700

ACCEPT = {
    "extra key": (J(note="x"), None), "dates": (J(chosen="2024-01-01", rejected="2024-01-02"), "2024-01-01"),
    "number-like": (J(chosen="1e5"), "1e5"), "bool-like": (J(chosen="true"), "true"), "null-like": (J(chosen="null"), "null"),
    "zeros": (J(chosen="007"), "007"), "blanks kept": (J(chosen=" 5 "), " 5 "), "bom": (b"\xef\xbb\xbf" + GOOD.encode(), None),
    "crlf": (GOOD + "\r\n\r\n" + GOOD + "\r\n", None), "u+2028": (json.dumps({**P, "chosen": "a\u2028b"}, ensure_ascii=False), "a\u2028b"),
    "nul": (J(chosen="a\0b"), "a\0b"), "html": (J(chosen="<script>\x1b[31m"), "<script>\x1b[31m"),
    "long": (J(chosen="x" * 200_000), None), "emoji": (J(chosen="👩‍👩‍👧 e\u0301 \u202eabc"), "👩‍👩‍👧 e\u0301 \u202eabc"),
    "20 MB": (J(chosen="y" * 20_000_000), None),
}

@pytest.mark.parametrize("name", ACCEPT)
def test_accepted(name, tmp_path):
    data, chosen = ACCEPT[name]
    prefs = load_preferences(write(tmp_path, data))
    if chosen: assert prefs[0]["chosen"] == chosen
    assert prefs.ignored_columns == (["note"] if name == "extra key" else [])

def test_kinds_of_file(tmp_path):
    rows = [P, {**P, "chosen": "2024-01-01"}]
    write(tmp_path, json.dumps(rows, indent=1), "a.json")
    write(tmp_path, 'prompt,chosen,rejected\nq,good,bad\nq,2024-01-01,bad\n', "a.csv")
    write(tmp_path, gzip.compress("\n".join(map(json.dumps, rows)).encode()), "a.jsonl.gz")
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    from datasets import Dataset, DatasetDict
    data = Dataset.from_list(rows)
    DatasetDict(train=data).save_to_disk(tmp_path / "saved")
    sources = [tmp_path / f for f in ("a.json", "a.csv", "a.jsonl.gz", "a.parquet", "saved")] + [data, DatasetDict(train=data), data.to_iterable_dataset(), rows]
    for s in sources: assert load_preferences(s).set_sha256 == load_preferences(rows).set_sha256, s

def test_places_that_are_not_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl"); (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "empty").mkdir()
    write(tmp_path, b"not gzip", "x.jsonl.gz"); write(tmp_path, gzip.compress(GOOD.encode())[:-6], "y.jsonl.gz")
    write(tmp_path, "x", "z.docx"); write(tmp_path, 'prompt,chosen,rejected\nq,"a\n', "q.csv")
    for name, words in {"pipe.jsonl": "regular file", "loop.jsonl": "", "empty": "no data file", "x.jsonl.gz": "truncated", "y.jsonl.gz": "truncated",
                        "z.docx": "unknown kind", "q.csv": "truncated", "none.jsonl": "no such file"}.items():
        with pytest.raises(Refusal, match=words): load_preferences(tmp_path / name)

def test_long_line_is_refused_within_a_memory_bound(tmp_path, monkeypatch):
    from dpo_literate import preferences
    monkeypatch.setattr(preferences, "MAX_LINE", 1000)
    with pytest.raises(Refusal, match="longer"): load_preferences(write(tmp_path, J(chosen="x" * 5000)))

def test_file_changes_and_files_twice(tmp_path):
    path = write(tmp_path, GOOD); prefs = load_preferences(path); prefs.check_unchanged()
    with pytest.raises(Refusal, match="twice"): load_preferences([path, write(tmp_path, GOOD, "copy.jsonl")])
    with pytest.raises(Refusal, match="same file"): leakage(path, path).refuse()
    path.write_text(GOOD + "\n" + GOOD)
    with pytest.raises(Refusal, match="changed"): prefs.check_unchanged()

def test_audit_names_every_class():
    good = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(100)]
    bad = {"identical": {**P, "rejected": "good"}, "empty reply": {**P, "chosen": ""}, "blank reply": {**P, "chosen": " \n"}, "empty prompt": {**P, "prompt": ""},
           "duplicate": good[3], "contradiction": {**good[4], "chosen": "bad", "rejected": "good"}, "control text": {**P, "chosen": "<|im_end|>"}, "long": {**P, "chosen": "x" * 200_000}}
    audit = check_preferences(good + list(bad.values()))
    for i, k in enumerate(bad): assert audit.found[k][0].startswith(f"row {101 + i}"), k
    assert audit.exit_code == 2 and check_preferences(good).exit_code == 0
    with pytest.raises(Refusal, match="identical"): audit.refuse()
    audit.refuse(allow=tuple(audit.refusals))
    assert "\x1b" not in inert("\x1b[31m")

def test_leakage_exact_and_folded():
    train = [{**P, "prompt": t} for t in ("Straße", "a b", "Hello", "only")]
    found = leakage(train, [{**P, "prompt": t} for t in ("STRASSE", "a  B", "Hello", "new")])
    assert len(found.exact) == 1 and len(found.near) == 2
    with pytest.raises(Refusal): found.refuse()

def test_keys_do_not_collide_and_rows_stay_as_they_were():
    rows = [{"prompt": [U("ab"), A("c"), U("d")], "chosen": [A("x")], "rejected": [A("y")]}, {"prompt": [U("a"), A("bc"), U("d")], "chosen": [A("x")], "rejected": [A("y")]}]
    before = json.dumps(rows); prefs = load_preferences(rows)
    assert not check_preferences(prefs).found["duplicate"] and json.dumps(rows) == before
    prefs[0]["prompt"][0]["content"] = "changed"
    assert json.dumps(rows) == before

@pytest.mark.parametrize("c,r", [("Paris ", "London"), ("The sky is blue", "The sky is blue and vast"), ("x", "x"), ("", "x"), ("abc", "axy")])
def test_text_prompts_are_never_guessed(c, r):
    with pytest.raises(Refusal): extract_prompt(c, r)

def test_unpaired():
    assert load_unpaired([{"prompt": "q", "completion": "a", "label": True}])[0]["label"] is True
    with pytest.raises(Refusal, match="label"): load_unpaired([{"prompt": "q", "completion": "a", "label": "good"}])

@pytest.mark.skipif(data_dir() is None, reason="no data")
def test_real_files():
    assert len(load_preferences(data_dir() / "polite_pairs")) == 1100
    assert len(load_preferences(data_dir() / "hh_harmless")) == 902 and len(load_preferences(data_dir() / "hh_harmless", "test")) == 200
    assert len(load_preferences(data_dir() / "human_pairs")) == 1482

def test_hub_name_and_json_line(tmp_path):
    with pytest.raises(Refusal, match="no such file or folder, and the hub"): load_preferences("nobody-here/no-such-set")
    with pytest.raises(Refusal, match="a.json:3"): load_preferences(write(tmp_path, '[{"prompt":"q","chosen":"a",\n"rejected":"b"},\n{"prompt": oops}]', "a.json"))
