"""Every code name of the notation page stands in the module of the page beside it, or in that
page's own code."""
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTATION = "\n".join("".join(c["source"])
                     for c in json.loads((ROOT / "nbs"
                                          / "00_notation.ipynb").read_text(encoding="utf-8"))[
                                              "cells"])
ROWS = [line for line in NOTATION.splitlines() if line.startswith("|")
        and not set(line) <= set("|-") and "| code |" not in line]
PAGE = re.compile(r"\]\((\d\w*\.ipynb)\)")


def cells(row): return [c.strip() for c in re.split(r"(?<!\\)\|", row)[1:-1]]


def code_of(page):
    "The code of a page (its exports are in it)."
    nb = json.loads((ROOT / "nbs" / page).read_text(encoding="utf-8"))
    return "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code")


@pytest.mark.parametrize("row", ROWS, ids=lambda r: cells(r)[0][:40])
def test_names_exist_where_the_page_says(row):
    head, *rest = cells(row)
    names = [n for c in rest[:-1] for n in re.findall(r"`([A-Za-z_]\w*)`", c)]
    page = PAGE.search(row)
    assert page or "coming" in rest, "a row names a page, or says that it is coming"
    if not page: return
    code = code_of(page[1])
    missing = [n for n in names if not re.search(rf"\b{re.escape(n)}\b", code)]
    assert not missing, f"{page[1]} has no {missing}"


def test_words_stand_in_order_and_once():
    words = [cells(r)[0].lower() for r in ROWS[next(i for i, r in enumerate(ROWS)
                                                    if r.startswith("| adapter")):]]
    assert words == sorted(words) and len(words) == len(set(words)) > 35
