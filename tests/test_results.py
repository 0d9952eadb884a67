"Recorded results: schema, use, and what a reader of 00b_results would skip."
import importlib, json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from dpo_literate import results
from dpo_literate.results import (FIELDS, ClaimsTable, Refusal, bootstrap_interval, claims_table,
                                  data_dir, load_result, mean_interval,
                                  repo_dir, result_problems, save_claims, save_result, write_atomic)

ROOT = Path(__file__).resolve().parents[1]
RECORDED = sorted((ROOT / "nbs" / "results").glob("*.json"))
ROW = dict(claim="c", source="s", paper_figure=None, setup="x", ours=1., low=None, high=None,
           seeds=[0], verdict="held", command="make")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "A folder that looks like the repository, so that nothing is written into the real one."
    (tmp_path / "nbs").mkdir(); (tmp_path / "nbs" / "00b_results.ipynb").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(name="r", values=None, **kw):
    return save_result(name, values or {"a": 1},
                       **{**dict(command="c", config={}, seed=0, seconds=1, what="w"), **kw})


def test_recorded_results_are_in_order():
    assert {p.name: found for p in RECORDED if (found := result_problems(p))} == {}


JUDGES = {"hierarchy": ("hierarchy", "judge"), "secalign": ("secalign", "judge"),
          "honesty": ("honesty", "judge"), "displacement": ("probes", "judge_displacement"),
          "tdi": ("probes", "judge_tdi"), "refusal": ("probes", "judge_refusal")}


@pytest.mark.parametrize("page", JUDGES)
def test_verdicts_follow_from_their_record(page):
    "Every committed row of these pages is what the rule of page 00b makes of the committed values."
    script, judge = JUDGES[page]
    name, rows = getattr(importlib.import_module(script), judge)()
    committed = json.loads((ROOT / "nbs" / "results" / f"claims_{page}.json").read_text())
    assert name == page and len(rows) == len(committed)
    for row, kept in zip(rows, committed):
        for key in ("ours", "low", "high"): assert row[key] == pytest.approx(kept[key], abs=1e-9)
        assert (row["claim"], row["verdict"]) == (kept["claim"], kept["verdict"])


def test_few_values_are_judged_by_student():
    "Three values a unit apart: 4.303 standard errors to each side."
    low, high = mean_interval([0., .5, 1.])
    half = 4.30265 * .5 / 3**.5
    assert (low, high) == pytest.approx((.5 - half, .5 + half), 1e-5)
    many = [float(k % 7) for k in range(20)]
    assert mean_interval(many) == bootstrap_interval(many)
    with pytest.raises(Refusal, match="two values"): mean_interval([1.])


def test_recorded_results_are_used_by_a_page():
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "nbs").glob("*.ipynb"))
    names = [p.stem.removeprefix("claims_") for p in RECORDED]
    assert [n for n in names if not re.search(rf"""["'\\]{re.escape(n)}["'\\]""", pages)] == []


def test_nothing_but_json_is_recorded():
    folder = ROOT / "nbs" / "results"
    assert ([p.name for p in (folder.iterdir() if folder.exists() else []) if p.suffix != ".json"]
            == [])


def test_round_trip(elsewhere, capsys):
    path = save(values={"x": torch.tensor([1.5]), "where": Path("a/b")}, seed=[1, 2])
    assert path == elsewhere / "nbs/results/r.json" and result_problems(path) == []
    back = load_result("r")
    assert back["x"] == [1.5] and back["where"] == "a/b" and back["_provenance"]["seed"] == [1, 2]
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("name", ["../r", "a/b", "", "a b", ".hidden"])
def test_result_names_stay_inside_the_folder(elsewhere, name):
    with pytest.raises(Refusal): save(name)
    assert not (elsewhere / "nbs/results").exists()


@pytest.mark.parametrize("values, code",
                         [({"a": float("nan")}, 3), ({"a": float("inf")}, 3),
                          ({"a": "x" * 200_000}, 2)])
def test_bad_values_are_refused_and_nothing_is_written(elsewhere, values, code):
    with pytest.raises(Refusal) as no: save(values=values)
    assert no.value.code == code and not (elsewhere / "nbs/results").exists()


def test_missing_results_are_refused(elsewhere):
    with pytest.raises(Refusal, match="nothere"): load_result("nothere")
    with pytest.raises(Refusal, match="claims_nothere"): claims_table("nothere")


@pytest.mark.parametrize("field", FIELDS)
def test_each_missing_field_is_seen(elsewhere, field):
    path = save()
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items()
                                if k != field}))
    assert any(field in problem for problem in result_problems(path))


@pytest.mark.parametrize("text", ["", "[", '{"a": NaN}', "3", '"' + "x" * 100_001 + '"'])
def test_damaged_files_are_seen(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    assert result_problems(tmp_path / "r.json")


def test_claims(elsewhere):
    assert result_problems(save_claims("page", [ROW])) == []
    assert claims_table("page").rows == [ROW]
    for bad in ([], [{**ROW, "verdict": "maybe"}],
                [{k: v for k, v in ROW.items() if k != "source"}]):
        with pytest.raises(Refusal): save_claims("page", bad)


@pytest.mark.parametrize("evil", ["<script>x</script>", "a | b", "**b**", "[x](javascript:1)",
                                  "$x$", "a\nb", "`c`"])
def test_claims_text_is_inert(evil):
    table = ClaimsTable([{**ROW, "claim": evil}])
    lines = table._repr_markdown_().splitlines()
    assert "<script" not in table._repr_html_() and "<script" not in lines[-1].replace("\\<", "")
    assert len(lines) == 3 and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert not re.search(r"(?<!\\)[*`$\[<]", lines[2])


def test_a_killed_write_leaves_old_or_new(tmp_path):
    "Kill a process that rewrites one file without rest."
    target = write_atomic(tmp_path / "r.json", json.dumps([0] * 5000))
    code = ("import json, sys\nfrom dpo_literate.results import write_atomic\nprint('go', "
            "flush=True)\n"
            "n = 0\nwhile True:\n    n += 1\n    write_atomic(sys.argv[1], json.dumps([n] * "
            "5000))\n")
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", code, str(target)],
                                   stdout=subprocess.PIPE, cwd=ROOT,
                                   env={**os.environ, "PYTHONPATH": str(ROOT)})
        process.stdout.readline(); time.sleep(0.01 + 0.013 * attempt)
        process.send_signal(signal.SIGKILL); process.wait(); process.stdout.close()
        values = json.loads(target.read_text())
        assert len(values) == 5000 and len(set(values)) == 1


def test_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_LITERATE_DATA", str(tmp_path)); assert data_dir() == tmp_path
    monkeypatch.setenv("DPO_LITERATE_DATA", str(tmp_path / "no")); assert data_dir() is None


def test_repo_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if Path(results.__file__).is_relative_to(ROOT): assert repo_dir() == ROOT


def test_bootstrap():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert bootstrap_interval(values) == bootstrap_interval(values.tolist())
    narrow, wide = bootstrap_interval(values, level=.5), bootstrap_interval(values, level=.99)
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]
    low, high = bootstrap_interval(values)
    assert abs((high - low) / 2 - 1.96 * values.std().item() / 50 ** .5) < 0.05
    for bad in ([], [1.]):
        with pytest.raises(Refusal): bootstrap_interval(bad)
