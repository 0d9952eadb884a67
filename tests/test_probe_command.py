"The command that holds a model against its start: any folder, any adapter, one sentence for what cannot be compared, and either a whole report or none."
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dpo_literate import cli
from dpo_literate.models import tiny_model, weights_hash, write_folder
from dpo_literate.plots import finish, new_fig
from dpo_literate.probes import report
from dpo_literate.probes.base import Change, ProbeReport
from dpo_literate.results import Refusal
from dpo_literate.rows import tiny_tokenizer


def folder(path, kind="llama", seed=0, vocab_size=320, tokenizer=None):
    return write_folder(path, tiny_model(kind, vocab_size, seed).float(), tokenizer or tiny_tokenizer(vocab_size=vocab_size))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A model of each family, one after it, and an adapter on the first."
    desk = tmp_path_factory.mktemp("probe")
    for kind in ("llama", "qwen2", "gpt2"):
        for seed, name in enumerate(("before", "after")): folder(desk / f"{kind}-{name}", kind, seed)
    adapter(desk / "adapter", desk / "llama-before")
    return desk


def adapter(path, base, seed=3, tokenizer=None):
    torch.manual_seed(seed)
    model = tiny_model().float()
    model.name_or_path = model.config._name_or_path = str(base)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    tuned.save_pretrained(path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    if tokenizer: tokenizer.save_pretrained(path)
    return tuned


def here(*argv):
    "The command in this process: code, stdout, stderr."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = cli.main([str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()


def fig():
    fig, ax = new_fig(width=2, height=2)
    ax.plot([0, 1])
    return finish(fig)


def plant(monkeypatch, *names, act=lambda: None, words="as it was"):
    "Probes that answer at once, and tell what they were asked."
    asked = []
    for k, name in enumerate(names or report.PROBES):
        module = type(sys)(f"planted_{name}")
        def probe(model, reference, tokenizer, *, pairs=None, quick=False, seed=0, progress=True, name=name):
            asked.append((name, quick, seed, weights_hash(model)[:8], weights_hash(reference)[:8], pairs))
            act()
            return ProbeReport(name, [Change("size", .5, .75, .25, .1, .4), Change("share", .1, .1, 0., -.1, .1)], words, fig())
        module.probe = probe
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(report.PROBES, name, module.__name__)
    return asked


# ------------------------------------------------------------ any model

@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_report_for_each_family(desk, kind, tmp_path):
    code, out, err = here("probe", "--model", desk / f"{kind}-after", "--reference", desk / f"{kind}-before", "--probes", "honesty", "--quick", "--out", tmp_path / "deep" / "out")
    assert code == 0, err
    assert "calibration error" in out and "Traceback" not in err
    made = tmp_path / "deep" / "out"
    assert sorted(p.name for p in made.iterdir()) == ["probes.json", "report.html"]
    found = json.loads((made / "probes.json").read_text())
    assert found["card"]["reference_sha256"] != found["card"]["model_sha256"] and found["reports"][0]["name"] == "honesty"
    page = (made / "report.html").read_text()
    for row in found["reports"][0]["rows"]: assert row["label"] in page and report.number(row["before"]) in page
    assert page.count("data:image/png;base64,") == 1 and "prefers-color-scheme:dark" in page and "viewport" in page


def test_an_adapter_is_the_model_it_makes(desk):
    "Merged on its base it gives the logits PEFT gives."
    found = report.load_tuned(desk / "adapter")
    from peft import PeftModel
    want = PeftModel.from_pretrained(report.load_model(desk / "llama-before"), str(desk / "adapter"))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert (found(ids).logits - want(ids).logits).abs().max() < 1e-4 and not hasattr(found, "peft_config")
    assert (found(ids).logits - report.load_model(desk / "llama-before")(ids).logits).abs().max() > .1


def test_an_adapter_finds_its_base(desk, tmp_path, monkeypatch):
    assert report.adapter_base(desk / "llama-before") is None and report.adapter_base(tmp_path / "nowhere") is None
    assert report.adapter_base(desk / "adapter") == str(desk / "llama-before")
    folder(tmp_path / "both" / "base")
    adapter(tmp_path / "both", "base")
    assert report.adapter_base(tmp_path / "both") == str(tmp_path / "both" / "base")
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "/elsewhere/cache/SmolLM2-135M-Instruct"):
        adapter(tmp_path / "moved", name)
        assert report.adapter_base(tmp_path / "moved") == "bundled"


def test_the_command_takes_an_adapter_against_its_base(desk, tmp_path, monkeypatch):
    asked = plant(monkeypatch)
    code, out, err = here("probe", "--model", desk / "adapter", "--reference", desk / "llama-before", "--out", tmp_path / "out", "--seed", 5)
    assert code == 0, err
    assert [a[:3] for a in asked] == [(n, False, 5) for n in ("tdi", "refusal", "displacement", "honesty")] and all(a[3] != a[4] for a in asked)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == 4 and page.count("<section") == 4 and "1 of 2" in page


def test_pairs_of_a_file_reach_the_probes_that_read_pairs(desk, tmp_path, monkeypatch):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(dict(prompt=f"dish {k}", chosen="yes", rejected="no")) + "\n" for k in range(70)))
    asked = plant(monkeypatch)
    assert here("probe", "--model", desk / "llama-after", "--reference", desk / "llama-before", "--out", tmp_path / "out", "--pairs", file)[0] == 0
    assert all(len(a[5]) == report.MOST and a[5][3]["prompt"] == [{"role": "user", "content": "dish 3"}] for a in asked)
    code, out, err = here("probe", "--model", desk / "llama-after", "--reference", desk / "llama-before", "--out", tmp_path / "out2", "--quick", "--probes", "honesty")
    assert code == 0, err


def test_real_probes_read_pairs_of_a_file(tmp_path):
    model, reference = tiny_model(seed=1).float(), tiny_model().float()
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(dict(prompt=f"dish {k}", chosen=f"the answer is yes {k}", rejected="no")) + "\n" for k in range(8)))
    pairs = report.read_pairs(str(file), tiny_tokenizer())
    found = report.run_probes(model, reference, tiny_tokenizer(), ["tdi", "displacement"], pairs, progress=False, say=lambda _: None)
    assert [r.name for r in found] == ["tdi", "displacement"] and all(r.rows for r in found)


def test_a_trained_folder_can_be_probed(desk, tmp_path, monkeypatch):
    "What `train --lora-r` leaves is what `probe` takes."
    plant(monkeypatch, "honesty")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(dict(prompt=f"dish {k}", chosen="the answer is yes", rejected="the answer is no")) + "\n" for k in range(4)))
    code, _, err = here("train", "--model", desk / "llama-before", "--data", pairs, "--out", tmp_path / "tuned", "--lora-r", 2, "--max-steps", 1)
    assert code == 0, err
    code, out, err = here("probe", "--model", tmp_path / "tuned", "--reference", desk / "llama-before", "--probes", "honesty", "--out", tmp_path / "out")
    assert code == 0 and "* size" in out, err


def test_the_same_model_twice_says_so(desk, tmp_path, monkeypatch):
    plant(monkeypatch, "tdi")
    assert here("probe", "--model", desk / "gpt2-before", "--reference", desk / "gpt2-before", "--probes", "tdi", "--out", tmp_path)[0] == 0
    assert "the same weights" in (tmp_path / "report.html").read_text()


# ------------------------------------------------------------ what is refused: one sentence, code 2, nothing written

def spoil(desk, tmp_path, name):
    "Arguments that must be refused, and what the sentence must hold."
    before, after, out = desk / "llama-before", desk / "llama-after", tmp_path / "out"
    def args(model=after, reference=before, *more): return ["--model", model, "--reference", reference, "--out", out, *more]
    bad = tmp_path / "bad"
    if name == "missing model": return args(tmp_path / "nowhere" / "at" / "all"), "does not exist"
    if name == "missing reference": return args(after, tmp_path / "nowhere" / "at" / "all"), "does not exist"
    if name == "no such hub name": return args("nobody/nothing"), "nobody/nothing"
    if name in PAIRS:
        bad.write_text("".join(json.dumps(p) + "\n" for p in PAIRS[name][0]))
        return args(after, before, "--pairs", bad.rename(tmp_path / "pairs.jsonl")), PAIRS[name][1]
    if name == "no pairs there": return args(after, before, "--pairs", tmp_path / "none.jsonl"), "none.jsonl"
    if name == "unknown probe": return args(after, before, "--probes", "honesty", "tdl"), "'tdl'"
    if name == "no probe": return args(after, before, "--probes", ","), "no probe"
    if name == "other vocabulary": return args(folder(bad, vocab_size=300)), "read text differently"
    if name == "same size, other words":
        tokenizer = tiny_tokenizer()
        raw = json.loads(tokenizer.backend_tokenizer.to_str())
        vocab = raw["model"]["vocab"]
        (a, i), (b, j) = [kv for kv in vocab.items() if 10 < kv[1] < 13]
        vocab[a], vocab[b] = j, i
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast
        other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)), eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>", "<s>"])
        return args(folder(bad, tokenizer=other)), "read text differently"
    if name == "other number of rows": return args(write_folder(bad, tiny_model(vocab_size=384).float(), tiny_tokenizer())), "384 and 320"
    if name == "pickle":
        bad.mkdir(); (bad / "config.json").write_text("{}"); (bad / "pytorch_model.bin").write_bytes(b"x")
        return args(bad), "pickle"
    if name == "own code":
        folder(bad)
        (bad / "config.json").write_text(json.dumps(json.loads((bad / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
        return args(bad), "auto_map"
    if name == "adapter without weights":
        bad.mkdir(); (bad / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(before)}))
        return args(bad), "adapter_model.safetensors"
    if name == "adapter without base":
        adapter(bad, "x"); (bad / "adapter_config.json").write_text("{}")
        return args(bad), "base_model_name_or_path"
    if name == "adapter config is not JSON":
        adapter(bad, "x"); (bad / "adapter_config.json").write_text("{")
        return args(bad), "JSON"
    if name == "adapter whose base is gone": adapter(bad, "/gone/away/model"); return args(bad), "/gone/away/model"
    if name == "adapter of another shape":
        adapter(bad, desk / "gpt2-before"); return args(bad, desk / "gpt2-before"), "does not fit"
    if name == "adapter with another tokenizer":
        adapter(bad, before, tokenizer=tiny_tokenizer(vocab_size=300)); return args(bad), "read text differently"
    out.write_text("mine")
    if name == "out is a file": return args(), "is a file"
    out.unlink(); out = tmp_path / "file" / "under"; (tmp_path / "file").write_text("mine")
    return args(), "is a file"


ONE = dict(prompt="How?", chosen="So.", rejected="No.")
PAIRS = {"pairs of other columns": ([dict(a="x", b="y")], "pairs.jsonl:1"), "one pair": ([ONE], "1 pairs"), "pairs that are no pairs": ([ONE, {**ONE, "rejected": "So."}], "1 pairs")}
BAD = [*PAIRS, "no pairs there", "missing model", "missing reference", "no such hub name", "unknown probe", "no probe", "other vocabulary", "same size, other words", "other number of rows", "pickle", "own code",
       "adapter without weights", "adapter without base", "adapter config is not JSON", "adapter whose base is gone", "adapter of another shape", "adapter with another tokenizer",
       "out is a file", "out under a file"]


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_compared_gets_one_sentence(desk, tmp_path, name, monkeypatch):
    asked = plant(monkeypatch)
    argv, said = spoil(desk, tmp_path, name)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, out, err = here("probe", *argv)
    assert code == 2 and said in err and err.count("\n") == 1 and not asked, (code, err)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_in_a_process_of_its_own(tmp_path):
    code = "import sys; from dpo_literate.cli import main; sys.exit(main())"
    for argv in (["probe", "--model", str(tmp_path / "a" / "b")], ["probe", "--model", str(tmp_path / "a" / "b"), "--reference", str(tmp_path / "c" / "d"), "--out", "x"]):
        done = subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 2 and "Traceback" not in done.stderr and not list(tmp_path.iterdir()), done.stderr


# ------------------------------------------------------------ a whole report or none

def test_an_interrupted_run_leaves_nothing(desk, tmp_path, monkeypatch):
    def stop(): raise KeyboardInterrupt
    plant(monkeypatch, act=stop)
    code, _, err = here("probe", "--model", desk / "llama-after", "--reference", desk / "llama-before", "--out", tmp_path / "out")
    assert code == 130 and not (tmp_path / "out").exists()


def test_a_probe_that_refuses_is_named_and_leaves_nothing(desk, tmp_path, monkeypatch):
    def no(): raise Refusal("x: nan is not finite", 3)
    plant(monkeypatch, "displacement", act=no)
    code, _, err = here("probe", "--model", desk / "llama-after", "--reference", desk / "llama-before", "--probes", "displacement", "--out", tmp_path / "out")
    assert code == 3 and "probe displacement: x: nan is not finite" in err and not (tmp_path / "out").exists()


def test_an_old_report_stays_until_the_new_one_is_whole(desk, tmp_path, monkeypatch):
    plant(monkeypatch, "tdi")
    run = ["probe", "--model", desk / "llama-after", "--reference", desk / "llama-before", "--probes", "tdi", "--out", tmp_path]
    assert here(*run)[0] == 0
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for broken in ("report_page", "as_table"):
        with monkeypatch.context() as m:
            m.setattr(report, broken, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert here(*run)[0] == 130
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_nothing(desk, tmp_path, number):
    "A real probe in a process of its own, stopped while it is at work."
    code = "import sys; from dpo_literate.cli import main; sys.exit(main())"
    waits = ("import time, dpo_literate.probes.report as r, dpo_literate.probes.honesty as h\n"
             "def probe(*a, **k): print('at work', flush=True); time.sleep(60)\nh.probe = probe\n" + code)
    run = subprocess.Popen([sys.executable, "-c", waits, "probe", "--model", str(desk / "llama-after"), "--reference", str(desk / "llama-before"), "--probes", "honesty", "--out", str(tmp_path / "out")],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert run.stdout.readline() == "at work\n"
    run.send_signal(number)
    out, err = run.communicate(timeout=30)
    assert run.returncode == (143 if number == signal.SIGTERM else -9) and "Traceback" not in err and not list(tmp_path.iterdir())


# ------------------------------------------------------------ the page

def test_text_is_inert_everywhere(tmp_path):
    evil = "<script>alert(1)</script>\" onload=\"x\x1b[2J"
    found = [ProbeReport(evil, [Change(evil, 0., 1., 1., .5, 2.)], evil, fig())]
    page = report.report_page(found, dict(model=evil, reference=evil, model_sha256="a", reference_sha256="b", note=evil))
    assert "<script" not in page and 'onload="' not in page
    assert not re.findall(r'(?:src|href|srcset|action)\s*=\s*"(?!data:image/png;base64,|#)', page) and "@import" not in page and not re.search(r"url\((?!data:)", page)
    table = report.as_table(found)
    assert "\x1b" not in table and "\\x1b[2J" in table


@pytest.mark.parametrize("row,marked", [(Change("x", 0, 1, 1, .5, 2), True), (Change("x", 1, 0, -1, -2, -.5), True), (Change("x", 0, 1, 1, -.1, 2), False), (Change("x", 0, 0, 0, 0, 0), False)])
def test_a_row_is_marked_where_its_interval_leaves_zero_out(row, marked):
    assert report.moved(row) is marked and ("* x" in report.as_table([ProbeReport("p", [row], "")])) is marked


def test_a_report_without_a_figure_or_rows():
    page = report.report_page([ProbeReport("bare", [], "nothing to read")], dict(model="a", reference="b", model_sha256="x", reference_sha256="x"))
    assert "<img" not in page and "0 of 0" in page and "nothing to read" in report.as_table([ProbeReport("bare", [], "nothing to read")])


@pytest.mark.parametrize("asked,want", [(["all"], ["tdi", "refusal", "displacement", "honesty"]), (["honesty", "tdi"], ["tdi", "honesty"]), (["honesty,tdi,honesty"], ["tdi", "honesty"]), (["tdi", "all"], ["tdi", "refusal", "displacement", "honesty"])])
def test_names_in_the_order_of_the_book(asked, want): assert report.probe_names(asked) == want


@pytest.mark.parametrize("name", ["tdi", "refusal", "displacement", "honesty"])
def test_every_probe_answers_the_same_call(name):
    "The signature that the command relies on."
    import importlib
    import inspect
    spec = inspect.signature(importlib.import_module(f"dpo_literate.probes.{name}").probe).parameters
    assert list(spec)[:3] == ["model", "reference", "tokenizer"] and all(p.default is not p.empty for p in list(spec.values())[3:])
    assert {k: spec[k].default for k in ("quick", "seed", "progress")} == dict(quick=False, seed=0, progress=True)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_all_four_probes_on_each_family(desk, kind, tmp_path):
    code, out, err = here("probe", "--model", desk / f"{kind}-after", "--reference", desk / f"{kind}-before", "--quick", "--out", tmp_path)
    assert code == 0 and "Traceback" not in err, err
    found = json.loads((tmp_path / "probes.json").read_text())["reports"]
    assert [r["name"] for r in found] == ["tdi", "refusal", "displacement", "honesty"] and all(r["rows"] and r["words"] for r in found)
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 4
