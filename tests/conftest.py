"""The counts at the end: which pages ran, how many cells and checks. A run of the pages that
ran nothing is a failure."""
import importlib
import sys

import pytest

KEYS = ("pages", "cells", "left_out", "checks")


def totals(reporter):
    """Sum of what the page tests reported (through `record_property`, so it works across worker
    processes)."""
    total, seconds = dict.fromkeys(KEYS, 0), {}
    for group in reporter.stats.values():
        for report in group:
            found = dict(getattr(report, "user_properties", []))
            if "page" in found and getattr(report, "when", "") == "call":
                for key in KEYS: total[key] += found.get(key, 0)
                seconds[found["page"]] = found["seconds"]
    return total, seconds


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    total, seconds = totals(terminalreporter)
    if not seconds: return
    for page, took in sorted(seconds.items(), key=lambda kv: -kv[1])[:5]:
        terminalreporter.write_line(f"  {took:5.1f} s  {page}")
    terminalreporter.write_line(f"pages: {total['pages']} run, {total['cells']} cells run, "
                                f"{total['left_out']} cells left out (tests/ledger.json), "
                                f"{total['checks']} assertions")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput") or exitstatus: return
    total, seconds = totals(reporter)
    if seconds and not (total["pages"] and total["cells"] and total["checks"]):
        session.exitstatus = 1


@pytest.fixture
def real_tree():
    "For tests about the tree's own state."


@pytest.fixture(autouse=True)
def a_committed_tree(request, monkeypatch):
    "Tests run while files are being edited, too: what they record stands on a commit."
    if "real_tree" in request.fixturenames or "dpo_literate.results" not in sys.modules: return
    found = [importlib.import_module(f"dpo_literate.{name}") for name in ("results", "runs")]
    for module in found:    # both are there before one is changed: `runs` takes its own from it
        monkeypatch.setattr(module, "commit", lambda: "0123456789")
