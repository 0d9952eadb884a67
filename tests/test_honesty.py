"Honesty beyond the page: shared rows against rows of their own, prompts by rule, real data."
import math
import random
import subprocess
import sys

import pytest
import torch

from dpo_literate.logps import pad_rows, reply_logps
from dpo_literate.models import tiny_model
from dpo_literate.probes.base import ProbeReport, interval_of
from dpo_literate.probes.calibration import auroc
from dpo_literate.probes.honesty import (CLAIMS, HOW_SURE, LADDER, LEAVE, SILENCE, AnswerSheet,
                                         Question, answer_sheet, change_in, change_rows,
                                         choice_logps, choice_mask, conversation_ids, deference,
                                         eager_pairs, echo, in_words, lay_choices, pressed, probe,
                                         shipped_questions, split_categories, truth_scores,
                                         truthful_pairs, truthfulqa)
from dpo_literate.results import Refusal, data_dir, repo_dir
from dpo_literate.rows import Row, control_ids, encode_pairs, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
QUESTIONS = shipped_questions()
KINDS = ("llama", "qwen2", "gpt2", "gemma2")


def f64(*x): return torch.tensor(x, dtype=torch.float64)
def turn(role, text): return [dict(role=role, content=text)]


# ------------------------------------------------------------ scoring

def some_asked(seed=0, n=5):
    g = random.Random(seed)
    def word(k): return [g.randrange(4, 320) for _ in range(k)]
    return [(word(g.randrange(1, 9)), [word(g.randrange(1, 7)) for _ in range(g.randrange(1, 6))])
            for _ in range(n)]


def alone(model, prompt, reply):
    return reply_logps(model, pad_rows([Row(prompt, reply, reply)])).chosen.item()


SETS = [(kind, how) for how in ("eager", "sdpa") for kind in KINDS
        if (kind, how) != ("gemma2", "sdpa")]


@pytest.mark.parametrize("kind,attention", SETS)
def test_a_shared_row_equals_rows_of_their_own(kind, attention):
    model, asked, tolerance = tiny_model(kind), some_asked(), 1e-9 if kind == "gpt2" else 1e-4
    model.set_attn_implementation(attention)
    want = [f64(*(alone(model, p, y) for y in ys)) for p, ys in asked]
    for size in (1, 2, 5):
        for got, w in zip(choice_logps(model, asked, size), want):
            assert got.shape == w.shape and (got - w).abs().max() < tolerance


def test_a_shared_row_is_exact_in_float64():
    "GPT-2 runs in float64 throughout; the others round their rotary positions."
    model, asked = tiny_model("gpt2"), some_asked(1, 8)
    for (p, ys), got in zip(asked, choice_logps(model, asked, 3)):
        assert (got - f64(*(alone(model, p, y) for y in ys))).abs().max() < 1e-10


def test_options_do_not_see_each_other():
    model = tiny_model("qwen2")
    base, = choice_logps(model, [([5, 6], [[7, 8], [9, 10]])])
    other, = choice_logps(model, [([5, 6], [[7, 8], [200, 201, 202]])])
    assert abs(base[0] - other[0]) < 1e-9 and abs(base[1] - other[1]) > .1


def test_the_mask_says_who_may_look():
    seg = lay_choices([([1, 2], [[3], [4, 5]]), ([1], [[2]])]).segment_ids
    assert seg.tolist() == [[1, 1, 2, 3, 3], [1, 2, 0, 0, 0]]
    sees = choice_mask(seg)[:, 0]
    want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    assert sees[0].int().tolist() == want and sees.any(-1).all()
    assert ((choice_mask(seg, "eager", torch.float64) == 0)[:, 0] == sees).all()
    with pytest.raises(Refusal, match="flash"): choice_mask(seg, "flash_attention_2")


@pytest.mark.parametrize("kind", ["chatml", "system", "bos", "plain"])
def test_what_the_model_reads_is_what_training_reads(kind):
    "The same ids as a pair of page 06 has, and none of the data's text steers."
    tokenizer = tiny_tokenizer(kind)
    q = Question("is it <|im_end|> here?", ("yes <|im_start|>",), ("no",))
    prompt, replies = conversation_ids(tokenizer, [q.text], q.options)
    if tokenizer.chat_template:
        pair = dict(prompt=turn("user", q.text), chosen=turn("assistant", q.right[0]),
                    rejected=turn("assistant", q.wrong[0]))
        row = encode_pairs([pair], tokenizer)[0][0]
        assert (prompt, replies) == (row.prompt_ids, [row.chosen_ids, row.rejected_ids])
    steers = set(replies[0][:-1] + replies[1][:-1]) & set(control_ids(tokenizer))
    assert not steers and replies[0][-1] == tokenizer.eos_token_id


def test_a_second_turn_follows_the_first():
    turns = ["who", "me", "sure?"]
    prompt, replies = conversation_ids(TOKENIZER, turns, LADDER)
    assert TOKENIZER.decode(prompt).count("<|im_start|>assistant") == 2 and len(replies) == 11
    plain, _ = conversation_ids(tiny_tokenizer("plain"), turns, LADDER)
    assert "Answer: me\nQuestion: sure?\nAnswer:" in TOKENIZER.decode(plain)


# ------------------------------------------------------------ questions

def test_shipped_questions_are_sound():
    known, unknown = ([q for q in QUESTIONS if bool(q.right) is side] for side in (True, False))
    assert (len(known), len(unknown), len({q.text for q in QUESTIONS})) == (42, 14, 56)
    for q in QUESTIONS:
        assert q.text.endswith("?") and len(set(q.options)) == 4 and len(q.right) <= 1
        assert all(o.endswith(".") and not o[0].islower() and "\n" not in o for o in q.options)
    assert not {q.category for q in known} & {q.category for q in unknown}


def test_truth_scores_by_hand_and_against_a_loop():
    q = [Question("?", ("a", "b"), ("c",)), Question("?", ("a",), ("b", "c", "d"))]
    logps = [f64(-1, -5, -2), f64(-1, -3, -.5, -9)]
    got = truth_scores(logps, q)
    assert got.mc1.tolist() == [1, 0] and got.binary.tolist() == [1, 1]
    assert got.mc3.tolist() == [.5, 0]
    for value, l, one in zip(got.mc2.tolist(), logps, q):
        p = [math.exp(x) for x in l.tolist()]
        assert abs(value - sum(p[:len(one.right)]) / sum(p)) < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_mc3_is_the_share_of_true_answers_above_every_false_one(seed):
    "As the benchmark's code counts it; with one true answer it is MC1."
    g = torch.Generator().manual_seed(seed)
    q = [Question("?", tuple("abcdef"[:k]), tuple("uvwxyz"[:7 - k])) for k in range(1, 7)]
    logps = [torch.randn(7, dtype=torch.float64, generator=g) for _ in q]
    got = truth_scores(logps, q)
    for value, l, one in zip(got.mc3.tolist(), logps, q):
        true, false = l.tolist()[:len(one.right)], l.tolist()[len(one.right):]
        assert value == sum(t > max(false) for t in true) / len(true)
    assert got.mc3[0] == got.mc1[0] and ((got.mc1 == 0) | (got.mc3 > 0)).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_split_by_category_shares_none(seed):
    a, b = split_categories(QUESTIONS, .5, seed)
    assert a and b and not {q.category for q in a} & {q.category for q in b}
    assert sorted(map(id, a + b)) == sorted(map(id, QUESTIONS))
    assert split_categories(QUESTIONS, .5, seed) == (a, b)


def test_truthfulqa_is_read_whole():
    if data_dir() is None: pytest.skip("no data")
    questions = truthfulqa()
    assert len(questions) == 790 and len({q.category for q in questions}) == 37
    for q in questions:
        assert q.right and q.wrong and not set(q.right) & set(q.wrong)
        assert len(set(q.options)) == len(q.options)
    assert questions[0].right[0] == "The watermelon seeds pass through your digestive system"
    assert questions[0].wrong[0] == "You grow watermelons in your stomach"
    a, b = split_categories(questions, .5, 1)
    assert abs(len(a) - 395) < 110 and len(a) + len(b) == 790
    chosen = [p["chosen"][0]["content"] for p in truthful_pairs(a[:5])]
    assert chosen == [q.right[0] for q in a[:5]]


def test_without_data_truthfulqa_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_LITERATE_DATA", str(tmp_path / "none"))
    with pytest.raises(Refusal, match="DPO_LITERATE_DATA"): truthfulqa()


def test_pairs_made_by_rule():
    pairs = eager_pairs(QUESTIONS, 3)
    assert len(pairs) == 56 and len(truthful_pairs(QUESTIONS)) == 42
    for p in pairs:
        assert p["rejected"][0]["content"] == SILENCE and LEAVE in p["prompt"][0]["content"]
    true = sum(p["chosen"][0]["content"] in q.right for p, q in zip(pairs, QUESTIONS))
    assert 10 < true < 32 and pairs == eager_pairs(QUESTIONS, 3) != eager_pairs(QUESTIONS, 4)
    assert encode_pairs(pairs, TOKENIZER)[1].rows_out == 56


# ------------------------------------------------------------ sycophancy

@pytest.mark.parametrize("seed", range(5))
def test_echo_and_deference_come_apart(seed):
    "Any mixture of repeating and yielding is taken apart into its parts."
    g = torch.Generator().manual_seed(seed)
    silent, repeats, yields = (torch.randn(8, dtype=torch.float64, generator=g) for _ in range(3))
    odds = torch.stack([silent, silent - repeats - yields, silent - repeats + yields], 1)
    assert (deference(odds) - yields).abs().max() < 1e-12
    assert (echo(odds) - repeats).abs().max() < 1e-12


def test_pressed_reads_the_three_openings():
    model, some = tiny_model("gpt2"), [q for q in QUESTIONS if q.right][:3]
    odds = pressed(model, TOKENIZER, some, batch_size=2)
    for q, row in zip(some, odds):
        for claim, got in zip(CLAIMS, row):
            asks = q.text + claim.format(q.wrong[0])
            prompt, (r, w) = conversation_ids(TOKENIZER, [asks], [q.right[0], q.wrong[0]])
            assert abs(got.item() - (alone(model, prompt, r) - alone(model, prompt, w))) < 1e-9
    assert "{}" not in CLAIMS[0] and CLAIMS[1].replace("I think", "I do not think") == CLAIMS[2]


# ------------------------------------------------------------ the probe

@pytest.mark.parametrize("kind", KINDS)
def test_a_sheet_equals_its_definitions(kind):
    model, some = tiny_model(kind, scale=1.5), QUESTIONS[:2] + QUESTIONS[-2:]
    s = answer_sheet(model, TOKENIZER, some, batch_size=3)
    assert s.known.tolist() == [True, True, False, False]
    assert s.odds.shape == (2, 3) and s.right[2:].sum() == 0
    def logps(turns, replies):
        prompt, ids = conversation_ids(TOKENIZER, turns, replies)
        return f64(*(alone(model, prompt, y) for y in ids))
    for k, q in enumerate(some):
        asks = f"{q.text} {LEAVE}"
        l = logps([asks], [*q.options, SILENCE])
        best = l[:-1].argmax().item()
        rungs = logps([asks, q.options[best], HOW_SURE], LADDER).softmax(0)
        assert s.right[k] == float(best < len(q.right))
        assert abs(s.confidence[k] - l[:-1].softmax(0).max()) < 1e-4
        assert abs(s.answering[k] - l[:-1].exp().sum() / l.exp().sum()) < 1e-4
        assert abs(s.stated[k] - rungs @ torch.arange(11.).double() / 10) < 1e-4


def sheet(n=20, seed=0, right=None):
    "A sheet made up; the last four questions have no answer."
    g = torch.Generator().manual_seed(seed)
    def uniform(*shape): return torch.rand(*shape, generator=g, dtype=torch.float64)
    known, c, came = torch.arange(n) < n - 4, uniform(n), (uniform(n) > .5).double()
    if right is not None: came = torch.full((n,), float(right), dtype=torch.float64)
    return AnswerSheet(c, came * known, uniform(n), uniform(n), known, uniform(n - 4, 3))


def test_the_change_of_a_model_to_itself_is_nothing():
    rows = change_rows(sheet(), sheet())
    assert len(rows) == 13 and all(r.difference == r.low == r.high == 0 for r in rows)
    assert "better" not in in_words(rows) and "10 of 10" in in_words(rows)


def test_a_row_that_does_not_exist_is_left_out():
    labels = [r.label for r in change_rows(sheet(), sheet(right=0))]
    assert "AUROC of confidence" not in labels and "selective honesty" not in labels
    assert "calibration error" in labels


def test_changes_equal_a_loop_over_resamples():
    b, a = sheet(seed=1), sheet(seed=2)
    row = change_in("x", auroc, (b.confidence, b.right), (a.confidence, a.right))
    want = auroc(a.confidence, a.right) - auroc(b.confidence, b.right)
    assert abs(row.difference - want) < 1e-12 and row.low < row.difference < row.high
    def gap(w):
        i = [k for k, times in enumerate(w.tolist()) for _ in range(int(times))]
        return auroc(a.confidence[i], a.right[i]) - auroc(b.confidence[i], b.right[i])
    assert interval_of(gap, 20) == (row.low, row.high)


def test_words_say_which_way():
    b = sheet()
    worse = b._replace(odds=b.odds + f64(0, -5, 5))
    said = in_words(change_rows(b, worse))
    assert "worse: deference (nat)" in said and "better" not in said
    assert "better: deference (nat)" in in_words(change_rows(worse, b))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_the_probe_on_three_families(kind, capsys):
    before, after = (tiny_model(kind, seed=seed, scale=1.5).float() for seed in (0, 1))
    found = probe(after, before, TOKENIZER, quick=True, progress=False)
    assert isinstance(found, ProbeReport) and found.name == "honesty" and found.figure is not None
    assert 10 <= len(found.rows) <= 13 and "28 questions" in found.words
    assert capsys.readouterr() == ("", "")


def test_the_probe_on_a_model_without_a_template():
    before, after = (tiny_model("gpt2", seed=seed).float() for seed in (0, 1))
    found = probe(after, before, tiny_tokenizer("plain"), quick=True, progress=False)
    assert found["right (share)"].before <= 1 and found["confidence"].before > .25


# ------------------------------------------------------------ the experiment's script

def test_the_script_refuses_to_record_what_was_not_run(tmp_path):
    command = [sys.executable, str(repo_dir() / "benchmarks" / "honesty.py"), "--record", "--seeds",
               "987654"]
    done = subprocess.run(command, cwd=repo_dir(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "3 cells are missing" in done.stderr
    assert "Traceback" not in done.stderr
