"The model card: metadata the hub can read, tables that stay tables, whatever the names."
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_literate.card import CardFacts, Reading, hub_name, inert_markdown, model_card

WORDS = st.text(min_size=0, max_size=40)


def parts(card):
    "Metadata, and the Markdown below it."
    empty, head, body = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(head), body


def facts(**more): return CardFacts(**dict(name="n", base="a/b", adapter=False, rows=3) | more)


def test_a_card_says_base_data_settings_and_results():
    read = [Reading("accuracy", .75, .5, .9, "12 held-out pairs"), Reading("loss", .5)]
    head, body = parts(model_card(facts(
        base="bundled", adapter=True, data="data/mine.jsonl", sha256="ab" * 32, results=read,
        settings=dict(beta=.1, loss_type=["sigmoid", "sft"], learning_rate=2e-4), tags=["mine"])))
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert head["library_name"] == "peft"
    assert "dpo" in head["tags"] and "mine" in head["tags"]
    metrics = [m for r in head["model-index"][0]["results"] for m in r["metrics"]]
    assert {m["type"]: m["value"] for m in metrics} == dict(accuracy=.75, loss=.5)
    assert "| accuracy | 0.75 | 0.5 to 0.9 | 12 held-out pairs |" in body
    assert "| loss | 0.5 |  |  |" in body and "| learning\\_rate | 0.0002 |" in body
    assert "| loss\\_type | sigmoid, sft |" in body
    assert "mine.jsonl" in body and "/home" not in body and "abababababababab" in body


def test_a_card_without_results_says_so():
    head, body = parts(model_card(facts()))
    assert "model-index" not in head and "Nothing was measured." in body


@pytest.mark.parametrize("base, name", [
    ("bundled", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("owner/name", "owner/name"),
    *((name, None) for name in ("name", "./a/b", "/a/b", "a/b/c", "a b/c", "..", "x/y--z"))])
def test_only_a_name_of_the_hub_becomes_a_link(base, name): assert hub_name(base) == name


def test_a_folder_here_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub_name("owner/name") is None


@settings(deadline=None)   # the first card looks up the versions of all packages
@given(name=WORDS, base=WORDS, data=WORDS, on=WORDS, key=WORDS, value=WORDS, tag=WORDS)
def test_no_text_becomes_markup_or_metadata(name, base, data, on, key, value, tag):
    "Keys of the metadata, headings and the cells of the tables are what they are for plain names."
    read = [Reading("accuracy", .5, .4, .6, on)]
    head, body = parts(model_card(facts(name=name, base=base, data=data, results=read, tags=[tag],
                                        settings={key: value})))
    assert set(head) <= {"base_model", "library_name", "pipeline_tag", "tags", "model-index"}
    assert tag in head["tags"] and len(head["tags"]) == 3
    assert len(re.findall(r"(?m)^#", body)) == 4 and not re.search(r"(?<!\\)[<>]", body)
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in tables] == [5, 5, 5, 3, 3, 3]


@pytest.mark.parametrize("sign", ["\x85", "a\x85b", "\u2028", "a\u2029b", "\n", "\r", "\t", "\x0b",
                                  "\ufeff", " "])
def test_whatever_ends_a_line_comes_back_from_the_metadata(sign):
    head, _ = parts(model_card(facts(tags=[sign], results=[Reading("accuracy", .5, on=sign)])))
    assert head["tags"] == ["dpo", "dpo-literate", sign]
    assert head["model-index"][0]["results"][0]["dataset"]["name"] == sign


@given(WORDS)
def test_inert_text_is_one_line_without_markup(text):
    made = inert_markdown(text)
    assert "\n" not in made and not re.search(r"(?<!\\)[`*_{}\[\]<>|$#~&!@]", made)
    assert all(c.isprintable() for c in made)
