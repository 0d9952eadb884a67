"Recorded results: schema, use, and what a reader of 00b_results would skip."
import importlib.util, json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from dpo_literate import results
from dpo_literate.results import (FEW, FIELDS, Bar, ClaimsTable, Refusal, bootstrap_interval,
                                  claims_table, crossed_interval, data_dir, judge, load_result,
                                  mean_interval, power, repo_dir, result_problems, save_claims,
                                  save_result, share_interval, write_atomic)

ROOT = Path(__file__).resolve().parents[1]
RECORDED = sorted((ROOT / "nbs" / "results").glob("*.json"))
ROW = dict(claim="c", source="s", paper_figure=None, setup="x", ours=1., low=None, high=None,
           unit="seed", n=1, test="none: one value", detectable=None, seeds=[0], verdict="held",
           command="make")


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


# which script judges a page; a claims file without a line here fails the next test but one
JUDGES = {"hierarchy": ("hierarchy", "judge"), "secalign": ("secalign", "judge"),
          "honesty": ("honesty", "judge"), "displacement": ("probes", "judge_displacement"),
          "tdi": ("probes", "judge_tdi"), "refusal": ("probes", "judge_refusal"),
          "frontier": ("frontier", "judge_worlds"), "frontier_text": ("frontier", "judge_text"),
          "12a_ppo": ("fragile", "judge"), "14_online": ("online", "judge"),
          "23a_small_vlm": ("vlm", "judge_seeing"),
          "23b_hallucination": ("vlm", "judge_captions_of"),
          "15_groups": ("groups", "judge"), "15a_sparse": ("sparse", "judge"),
          "15b_misspecified": ("misspecified", "judge"),
          "16_choose": ("choose", "judge"), "20c_one_world": ("variants", "judge"),
          "24_drpo": ("drpo", "judge"), "25_recommend": ("recommend", "judge"),
          "26_community": ("community", "judge"), "27_own_failures": ("failures", "judge")}
CLAIMED = sorted(p.stem.removeprefix("claims_") for p in RECORDED if p.stem.startswith("claims_"))


def committed(page):
    return json.loads((ROOT / "nbs" / "results" / f"claims_{page}.json").read_text())


@pytest.mark.parametrize("page", JUDGES)
def test_verdicts_follow_from_their_record(page):
    "Every committed row is what the rule of page 00b makes of the committed values."
    script, judge = JUDGES[page]
    path = ROOT / "benchmarks" / f"{script}.py"     # by file: scipy takes a module `sparse` for
    spec = importlib.util.spec_from_file_location(f"bench_{script}", path)   # the package
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    name, rows = getattr(module, judge)()
    assert name == page and len(rows) == len(committed(page))
    for row, kept in zip(rows, committed(page)):
        for key in ("ours", "low", "high", "detectable"):
            if row[key] is None: assert kept[key] is None
            else: assert row[key] == pytest.approx(kept[key], abs=1e-9)
        for key in ("claim", "verdict", "unit", "n", "test"): assert row[key] == kept[key]


def test_every_claims_file_is_judged_anew():
    assert sorted(JUDGES) == CLAIMED


@pytest.mark.parametrize("page", CLAIMED)
def test_no_verdict_rests_on_a_bootstrap_of_few(page):
    for row in committed(page):
        if row["test"] == "bootstrap": assert row["n"] >= FEW, row["claim"]
        decided = row["verdict"] in ("held", "did not hold")
        assert not decided or row["low"] is not None, row["claim"]


def test_few_values_are_judged_by_student():
    "Three values a unit apart: 4.303 standard errors to each side."
    low, high = mean_interval([0., .5, 1.])
    half = 4.30265 * .5 / 3**.5
    assert (low, high) == pytest.approx((.5 - half, .5 + half), 1e-5)
    many = [float(k % 7) for k in range(FEW)]
    assert mean_interval(many) == bootstrap_interval(many)
    with pytest.raises(Refusal, match="two values"): mean_interval([1.])


@pytest.mark.parametrize("values, bar, items, verdict, test", [
    ([.4], Bar(), None, "too small to tell", "none: one value"),
    ([1., 1., 1.], Bar(), None, "cannot tell", "Student's t"),          # saturated
    ([True] * 3, Bar(.5), None, "cannot tell", "Wilson"),
    ([True] * 12, Bar(.5), None, "held", "Wilson"),
    ([0.] * 12, Bar(1e-10, -1), None, "held", "Student's t"),           # an identity
    ([.2, .3, .4], Bar(.9), None, "did not hold", "Student's t"),
    ([.2, .3, .4], Bar(.9, -1), None, "held", "Student's t"),
    ([.2, .3, .4], Bar(.29), None, "too small to tell", "Student's t"),
    ([.2, .3, .4], Bar(.9), [.1 * k for k in range(7)], "did not hold", "seeds × items")])
def test_the_rule(values, bar, items, verdict, test):
    row = judge(values, bar, items=items)
    assert (row["verdict"], row["test"]) == (verdict, test)
    assert row["n"] == (len(values) if items is None else [len(values), len(items)])
    if verdict in ("held", "did not hold") and any(values): # as far beyond on the other side
        turned = judge([not v if isinstance(v, bool) else 2 * bar.at - v for v in values], bar,
                       items=items and [2 * bar.at - v for v in items])
        assert {turned["verdict"], verdict} == {"held", "did not hold"}


def test_crossed_interval_is_never_narrower_than_its_parts():
    g = torch.Generator().manual_seed(0)
    for spread in (.0, .1, 3.):
        y = spread * torch.randn(4, 1, generator=g) + torch.randn(4, 25, generator=g)
        low, high = crossed_interval(y.mean(1).tolist(), y.mean(0).tolist())
        assert low < y.mean() < high
        items = y.mean(0).std() / 5 * 1.96
        assert (high - low) / 2 > items
    with pytest.raises(Refusal, match="two seeds"): crossed_interval([1.], [1., 2.])


def test_power_grows_and_detectable_is_its_inverse():
    assert power(1., 1., 3) < power(1., 1., 8) < power(2., 1., 8)
    assert power(1e-9, 1., 8) == pytest.approx(.025, abs=1e-3)
    values = torch.randn(12, generator=torch.Generator().manual_seed(1)).tolist()
    found, spread = judge(values)["detectable"], torch.tensor(values).std().item()
    assert power(found, spread, 12) == pytest.approx(.8, abs=.02)


def test_shares_have_a_width():
    low, high = share_interval(4, 4)
    assert high == 1 and .4 < low < .6 and share_interval(0, 4) == pytest.approx((0, 1 - low))


# ------------------------------------------------------------ the code a number was made with

# Records of before the rule that a tree must be clean; a line goes when its record is made anew.
DIRTY = {"anatomy_prompts", "anatomy_stages", "bench_cpu_float32", "community", "demo", "demo_far",
         "frontier_worlds",
         "failures", "first_model", "hierarchy", "honesty", "polite_pairs", "ppo_text", "refusal",
         "secalign", "soak", "tdi", "variants_scan"}


def test_records_name_a_commit_that_holds_their_code():
    records = {p.stem: json.loads(p.read_text()) for p in RECORDED
               if not p.stem.startswith("claims_")}
    assert {n for n, r in records.items() if r["commit"].endswith("+")} <= DIRTY
    for name, record in records.items():
        cells = record.get("ran", {}).get("cells", [])
        assert not any(c["commit"].endswith("+") for c in cells), name


def in_git(folder, *args):
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *args], cwd=folder,
                   check=True, capture_output=True)


def test_a_dirty_tree_is_refused(elsewhere, real_tree):
    (elsewhere / "code.py").write_text("a = 1\n")
    in_git(elsewhere, "init", "-q"); in_git(elsewhere, "add", "-A")
    in_git(elsewhere, "commit", "-qm", "first")
    path = save()
    in_git(elsewhere, "add", "-A"); in_git(elsewhere, "commit", "-qm", "second")
    save(values={"a": 2})                     # the record itself has changed: no reason to refuse
    assert not json.loads(path.read_text())["commit"].endswith("+")
    (elsewhere / "code.py").write_text("a = 2\n")
    with pytest.raises(Refusal, match="commit first"): save(values={"a": 3})
    assert load_result("r", quiet=True)["a"] == 2


def test_a_cell_keeps_the_commit_it_ran_with(elsewhere, real_tree):
    from cells import gathered, made, ran
    (elsewhere / "code.py").write_text("a = 1\n")
    in_git(elsewhere, "init", "-q"); in_git(elsewhere, "add", "-A")
    in_git(elsewhere, "commit", "-qm", "first")
    first, second = (dict(arm="a", seed=s, lr=.1) for s in (0, 1))
    out = elsewhere / "nbs" / "results" / "cells"    # left out of what makes a tree dirty
    made(out, first, lambda c: 1.)
    cells = gathered([first], out)
    assert ran(cells)["cells"][0]["commit"] == results.commit() and ran(cells)["shared"]["lr"] == .1
    (elsewhere / "code.py").write_text("a = 2\n")
    made(out, second, lambda c: 2.)
    with pytest.raises(Refusal, match="no commit holds"): gathered([first, second], out)


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
