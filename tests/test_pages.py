"Every page runs top to bottom in a fresh process, and shows again what it has stored."
import ast
import json
import os
import shutil
from pathlib import Path

import nbformat
import pytest
import torch

from tools import pages

HERE = Path(__file__).parent
PAGES = pages.pages()
DATA = Path(os.environ.get("DPO_LITERATE_DATA", pages.ROOT.parent / "shared" / "data")).resolve()


@pytest.fixture
def desk(tmp_path):
    """An own copy of nbs/ without the notebooks: a page finds its pictures and results there
    and can leave nothing behind."""
    shutil.copytree(pages.NBS, tmp_path / "nbs",
                    ignore=shutil.ignore_patterns("*.ipynb", "runs", ".*"))
    # the mark by which `results.repo_dir` knows the place
    (tmp_path / "nbs" / "00b_results.ipynb").touch()
    return tmp_path / "nbs"


def listing(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()
            and "__pycache__" not in p.parts}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_page_runs_and_shows_what_it_stored(path, desk, record_property):
    before = listing(desk)
    done = pages.run_page(path, cwd=desk, env={"HF_HUB_OFFLINE": "1",
                                               "DPO_LITERATE_DATA": str(DATA),
                                               "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS",
                                                   "1")})
    for key in ("cells", "left_out", "checks"): record_property(key, getattr(done, key))
    record_property("pages", 1)
    record_property("seconds", done.seconds)
    record_property("page", path.name)
    assert not done.error, done.error
    nb = pages.read(path)
    code = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    assert done.cells + done.left_out == len(code), "a cell was neither run nor left out"
    off = pages.off_page(path, done)
    again = f"python -m tools.pages run nbs/{path.name} --save"
    assert not off, (f"{path.name}: stored outputs are not what a fresh run shows ({again}):\n"
                     + "\n".join(off))
    after = listing(desk)
    assert after == before, (f"{path.name} left files behind or changed some: "
                             f"{sorted(set(after.items()) ^ set(before.items()))}")


# Pages that train in float32, by the module they export; the rest by `tools.pages run --isa`.
@pytest.mark.timeout(900)
@pytest.mark.parametrize("module,isa,threads", [("reward_model", "default", "1"),
                                                ("frontier_cells", "avx2", "2")])
def test_a_page_shows_the_same_on_another_cpu(module, isa, threads, desk):
    path, = (p for p in PAGES for c in pages.read(p).cells if c.cell_type == "code"
             and pages.directives(c.source).get("default_exp") == module)
    env = {"HF_HUB_OFFLINE": "1", "DPO_LITERATE_DATA": str(DATA), "OMP_NUM_THREADS": threads}
    done = pages.run_page(path, cwd=desk, env=env | pages.ISA[isa])
    assert not done.error, done.error
    assert not (off := pages.off_page(path, done)), "\n".join(off)


def test_another_cpu_computes_otherwise(tmp_path):
    "The variables arrive in the kernel and change how it adds: else the test above says nothing."
    source = ("import torch\na = (torch.arange(300 * 300.) * .37).sin().view(300, 300)\n"
              "torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), "
              "(a @ a).tolist()[3]")
    nbformat.write(page_of(source), tmp_path / "p.ipynb")
    said = {}
    for isa in ("default", "avx2"):
        env = {"OMP_NUM_THREADS": "2", **pages.ISA[isa]}
        done = pages.run_page(tmp_path / "p.ipynb", cwd=tmp_path, env=env)
        (output,), = done.outputs.values()
        said[isa] = ast.literal_eval(output.data["text/plain"])
    assert said["default"][:2] == ("DEFAULT", 2)
    if torch.backends.mkl.is_available(): assert said["default"][2] != said["avx2"][2]


def test_enough_is_run():
    "The committed minimum: the book cannot shrink unnoticed."
    least = json.loads((HERE / "pages_minimum.json").read_text())
    code = [c for p in PAGES for c in pages.read(p).cells if c.cell_type == "code"
            and c.source.strip()]
    run = [c for c in code if not pages.skipped(c)]
    have = {"pages": len(PAGES), "cells": len(run),
            "assertions": sum(pages.assertions(c.source) for c in run)}
    enough = all(have[k] >= least[k] > 0 for k in have)
    assert enough, f"the book has {have}, tests/pages_minimum.json asks for {least}"
    assert len(run) >= 0.95 * len(code), f"only {len(run)} of {len(code)} code cells run"


def test_cells_that_do_not_run_are_on_the_ledger():
    ledger = json.loads((HERE / "ledger.json").read_text(encoding="utf-8"))
    def key(entry): return entry["page"], entry["cell"], entry["kind"]
    listed, found = {key(e) for e in ledger}, {key(e) for e in pages.unrun()}
    new, gone = sorted(found - listed), sorted(listed - found)
    assert not new, f"cells that do not run and are not in tests/ledger.json: {new}"
    assert not gone, f"tests/ledger.json lists cells that run or are gone: {gone}"
    told = all(len(e.get("reason", "")) > 10 for e in ledger)
    assert told, "each entry of tests/ledger.json says why the cell does not run"


def page_of(*sources, outputs=()):
    cells = [nbformat.v4.new_code_cell(s) for s in sources]
    if outputs: cells[-1].outputs = list(outputs)
    return nbformat.v4.new_notebook(cells=cells)


def test_a_failing_assertion_turns_a_page_red(tmp_path):
    """The runner looks: an assertion that fails inside a real page stops it, and cells after it
    do not count."""
    nb = pages.read(next(p for p in PAGES if p.stem != "index"))
    nb.cells = (nb.cells[:3] + [nbformat.v4.new_code_cell("assert 1 + 1 == 3, 'planted'")]
                + nb.cells[3:])
    nbformat.write(nb, tmp_path / "planted.ipynb")
    done = pages.run_page(tmp_path / "planted.ipynb", cwd=tmp_path)
    assert "planted" in done.error and done.cells < sum(c.cell_type == "code" for c in nb.cells)


def test_a_stored_output_that_is_not_true_is_seen(tmp_path):
    nb = page_of("1 + 1", outputs=[nbformat.v4.new_output("execute_result", {"text/plain": "3"})])
    nbformat.write(nb, tmp_path / "wrong.ipynb")
    done = pages.run_page(tmp_path / "wrong.ipynb", cwd=tmp_path)
    assert not done.error and pages.differences(nb.cells[0], done.outputs[nb.cells[0].id])


@pytest.mark.parametrize("stored,fresh,same", [
    ("loss 0.69315", "loss 0.69312", True), ("loss 0.693", "loss 0.703", False),
    ("12 rows", "13 rows", False), ("0.12", "0.13", False),
    ("took 3.1 s", "took 44 s", True), ("<f at 0x7f00aa11bb22>", "<f>", True),
    ("a  b", "a b", True), ("tensor(1.2345)", "tensor(1.2346)", True),
    ("yes", "no", False), ("-0.25", "0.25", False), ("1e-3", "2e-3", False),
    ("12.3451", "12.3449", True),
    ("{'loss': '0.5', 'train_runtime': '0.1'}", "{'loss': '0.5', 'train_runtime': '3.72'}", True),
    ("{'tokens_per_second': 41.5}", "{'tokens_per_second': '1.1e+04'}", True),
    ("{'loss': '0.5', 'train_runtime': '1'}", "{'loss': '0.6', 'train_runtime': '1'}", False)])
def test_what_counts_as_the_same_output(stored, fresh, same):
    assert pages.same_text(stored, fresh) is same
