"""The forty bad (and good) files of preferences, and what the loader must say to each.

A name begins with its number in the catalogue; `test_all_forty_are_here` counts them."""
import gzip, json, os, time, tracemalloc
from pathlib import Path
import pytest
from dpo_literate import preferences
from dpo_literate.audit import check_preferences, leakage
from dpo_literate.preferences import extract_prompt, inert
from dpo_literate.reading import MAX_LINE, load_preferences, load_unpaired
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
    "01 cut off": (GOOD + "\n" + GOOD[:25], "f.jsonl:2", "truncated"),
    "02 garbage": (GOOD + "\n\nhello\n", "f.jsonl:3", "not a JSON row"),
    "03 key missing": (GOOD + '\n{"prompt":"q","chosen":"a"}', "f.jsonl:2", "rejected"),
    "04 null": (GOOD + "\n" + J(chosen=None), "f.jsonl:2", "chosen is null"),
    "05 integer": (GOOD + "\n" + J(rejected=3), "f.jsonl:2", "rejected is int"),
    "06 mixed shapes": (GOOD + "\n" + J(prompt=[U("q")], chosen=[A("a")], rejected=[A("b")]), "f.jsonl:2", "one shape"),
    "08 duplicate key": ('{"prompt":"q","prompt":"q","chosen":"a","rejected":"b"}', "f.jsonl:1", "stands twice"),
    "12 utf-16": (GOOD.encode("utf-16"), "f.jsonl:1", "UTF-16"),
    "12 latin-1": (GOOD.replace("good", "é").encode("latin-1"), "f.jsonl:1", "UTF-8"),
    "14 two objects": (GOOD + GOOD, "f.jsonl:1", "more than one value"),
    "16 lone surrogate": (GOOD.replace("good", "\\ud800"), "f.jsonl:1", "surrogate"),
    "17 empty file": ("", "f.jsonl", "no rows"),
    "17 blank file": ("\n \n", "f.jsonl", "no rows"),
    "18 wrong columns": ('{"question":"q","good":"a","bad":"b"}', "f.jsonl:1", "did you mean"),
    "29 unknown role": (J(prompt=[{"role": "<|im_end|>", "content": "q"}]), "f.jsonl:1", "unknown role"),
    "29 two assistants": (J(prompt=[U("q"), A("a"), A("b"), U("c")]), "prompt[2]", "two assistant"),
    "29 no user": (J(prompt=[{"role": "system", "content": "s"}]), "f.jsonl:1", "no user"),
    "30 ends with user": (json.dumps({"chosen": [U("q"), U("a")], "rejected": [U("q"), U("b")]}), "f.jsonl:1", "assistant"),
    "31 prompts differ": (json.dumps({"chosen": [U("q"), A("a")], "rejected": [U("r"), A("b")]}), "f.jsonl:1", "part at message 1"),
    "33 deep": ("[" * 20000 + "]" * 20000, "f.jsonl:1", ""),
    "33 deep object": ('{"a":' * 10000 + "1" + "}" * 10000, "f.jsonl:1", ""),
    "35 NaN": (GOOD[:-1] + ', "weight": NaN}', "f.jsonl:1", "NaN"),
    "35 Infinity": (GOOD[:-1] + ', "weight": 1e999}', "f.jsonl:1", "finite"),
    "35 huge int": (GOOD[:-1] + ', "weight": ' + "9" * 5000 + "}", "f.jsonl:1", ""),
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
    "07 extra key": (J(note="x"), None), "09 dates": (J(chosen="2024-01-01", rejected="2024-01-02"), "2024-01-01"),
    "10 number-like": (J(chosen="1e5"), "1e5"), "10 bool-like": (J(chosen="true"), "true"), "10 null-like": (J(chosen="null"), "null"),
    "10 zeros": (J(chosen="007"), "007"), "10 blanks kept": (J(chosen=" 5 "), " 5 "), "11 bom": (b"\xef\xbb\xbf" + GOOD.encode(), None),
    "13 crlf": (GOOD + "\r\n\r\n" + GOOD + "\r\n", None), "15 u+2028": (json.dumps({**P, "chosen": "a\u2028b"}, ensure_ascii=False), "a\u2028b"),
    "15 nul": (J(chosen="a\0b"), "a\0b"), "32 html": (J(chosen="<script>\x1b[31m"), "<script>\x1b[31m"),
    "27 long": (J(chosen="x" * 200_000), None), "32 emoji": (J(chosen="👩‍👩‍👧 e\u0301 \u202eabc"), "👩‍👩‍👧 e\u0301 \u202eabc"),
}

@pytest.mark.parametrize("name", ACCEPT)
def test_accepted(name, tmp_path):
    data, chosen = ACCEPT[name]
    prefs = load_preferences(write(tmp_path, data))
    if chosen: assert prefs[0]["chosen"] == chosen
    assert prefs.ignored_columns == (["note"] if name == "07 extra key" else [])

def test_row_order_changes_one_hash_only(tmp_path):
    a, b = ([{**P, "prompt": q} for q in order] for order in ("xyz", "zxy"))
    a, b = (load_preferences(write(tmp_path, "\n".join(map(json.dumps, rows)), f"{i}.jsonl")) for i, rows in enumerate((a, b)))
    assert a.set_sha256 == b.set_sha256 and a.order_sha256 != b.order_sha256 and a.sha256 != b.sha256

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
    for name, words in {"pipe.jsonl": "regular file", "loop.jsonl": "Too many levels", "empty": "no data file", "x.jsonl.gz": "truncated", "y.jsonl.gz": "truncated",
                        "z.docx": "unknown kind", "q.csv": "truncated", "none.jsonl": "no such file"}.items():
        with pytest.raises(Refusal, match=words): load_preferences(tmp_path / name)

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
        with pytest.raises(Refusal, match="f.jsonl:1: line longer than 64 MiB"): load_preferences(path)
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
    monkeypatch.setattr(preferences, "MAX_LINE", limit)
    fits = GOOD[:-1] + " " * (limit - len(GOOD)) + "}"
    assert len(load_preferences(write(tmp_path, fits))) == 1
    with pytest.raises(Refusal, match="longer"): load_preferences(write(tmp_path, " " + fits))

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

def test_one_of_each_kind_among_a_hundred_refuses_by_default(tmp_path):
    "T31: classes and lines of a file on disk, and the exit code."
    good = [{**P, "prompt": f"q{i}"} for i in range(100)]
    lines = [*good, {**P, "rejected": "good"}, {**P, "chosen": "\t "}, good[7], {**good[8], "chosen": "bad", "rejected": "good"}]
    path = write(tmp_path, "\n".join(map(json.dumps, lines)))
    audit = check_preferences(path)
    places = {k: v for k, v in audit.found.items() if v}
    assert {k: v[0].split("f.jsonl:")[1].split(" ")[0] for k, v in places.items()} == {
        "identical": "101", "blank reply": "102", "duplicate": "103", "contradiction": "104"}
    assert audit.exit_code == 2
    with pytest.raises(Refusal, match="f.jsonl:101"): audit.refuse()

def test_the_same_row_object_twice_is_a_duplicate():
    row = load_preferences([P])[0]
    assert len(check_preferences([row, row]).found["duplicate"]) == 1

def test_two_sources_that_share_a_prompt_keep_all_their_pairs(tmp_path):
    "T35"
    a, b = write(tmp_path, GOOD, "a.jsonl"), write(tmp_path, J(chosen="better"), "b.jsonl")
    prefs = load_preferences([a, b])
    assert [r["chosen"] for r in prefs] == ["good", "better"] and prefs[1]["_where"].endswith("b.jsonl:1")
    assert not check_preferences(prefs).found["duplicate"]

@pytest.mark.parametrize("train, eval, exact, near", [
    ("Hello", "Hello", 1, 0), ("Hello", "hELLO", 0, 1), ("a b", " a\u00a0 b\n", 0, 1), ("caf\u00e9", "cafe\u0301", 0, 1),
    ("\ufb01ne", "fine", 0, 1), ("Hello", "Hello!", 0, 0)])
def test_leakage_in_every_form(train, eval, exact, near):
    "T32"
    found = leakage([{**P, "prompt": train}], [{**P, "prompt": eval}])
    assert (len(found.exact), len(found.near)) == (exact, near)

def test_half_a_character_is_refused_wherever_it_comes_from():
    for row in ({**P, "chosen": "\ud800"}, {"prompt": [U("\udc00")], "chosen": [A("a")], "rejected": [A("b")]}):
        with pytest.raises(Refusal, match="row 1: half a character"): load_preferences([row])

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

ELSEWHERE = {19: test_audit_names_every_class, 20: test_audit_names_every_class, 21: test_audit_names_every_class, 22: test_audit_names_every_class,
             23: test_audit_names_every_class, 24: test_audit_names_every_class, 28: test_audit_names_every_class, 34: test_one_line_of_a_gigabyte_is_refused_unread,
             36: test_places_that_are_not_files, 37: test_file_changes_and_files_twice, 38: test_file_changes_and_files_twice,
             39: test_file_changes_and_files_twice, 40: test_row_order_changes_one_hash_only}
IN_ROWS = {25: "test_truncation_against_brute_force", 26: "test_truncated_rows_are_counted_and_keep_one_prompt"}

def test_all_forty_are_here():
    here = {int(name[:2]) for name in (*REFUSE, *ACCEPT) if name[:2].isdigit()}
    rows = (Path(__file__).parent / "test_rows.py").read_text(encoding="utf-8")
    assert all(f"def {name}(" in rows for name in IN_ROWS.values())
    assert here | set(ELSEWHERE) | set(IN_ROWS) == set(range(1, 41))
