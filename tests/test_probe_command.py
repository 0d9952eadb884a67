"The command that holds a model against its start: any folder, one sentence, all or nothing."
import contextlib
import importlib
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dpo_literate import cli
from dpo_literate.models import tiny_model, weights_hash, write_folder
from dpo_literate.plots import finish, new_fig
from dpo_literate.probes import report
from dpo_literate.probes.base import Change, ProbeReport
from dpo_literate.results import Refusal
from dpo_literate.rows import tiny_tokenizer

NAMES = ("tdi", "refusal", "displacement", "honesty")


def folder(path, kind="llama", seed=0, vocab_size=320, tokenizer=None):
    model = tiny_model(kind, vocab_size, seed).float()
    return write_folder(path, model, tokenizer or tiny_tokenizer(vocab_size=vocab_size))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A model of each family, one after it, and an adapter on the first."
    desk = tmp_path_factory.mktemp("probe")
    for kind in ("llama", "qwen2", "gpt2"):
        for seed, name in enumerate(("before", "after")):
            folder(desk / f"{kind}-{name}", kind, seed)
    adapter(desk / "adapter", desk / "llama-before")
    return desk


def adapter(path, base, seed=3, tokenizer=None):
    torch.manual_seed(seed)
    model = tiny_model().float()
    model.name_or_path = model.config._name_or_path = str(base)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM",
                      init_lora_weights=False)
    tuned = get_peft_model(model, lora)
    tuned.save_pretrained(path)
    change(path / "adapter_config.json", base_model_name_or_path=str(base))
    if tokenizer: tokenizer.save_pretrained(path)
    return tuned


def change(file, **values):
    "Set fields of a JSON file."
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def here(*argv):
    "The command in this process: code, stdout, stderr."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()


def against(desk, out, *more, kind="llama"):
    "The models of a family, one against the other."
    return here("probe", "--model", desk / f"{kind}-after", "--reference", desk / f"{kind}-before",
                "--out", out, *more)


def fig():
    fig, ax = new_fig(width=2, height=2)
    ax.plot([0, 1])
    return finish(fig)


PLANTED = [Change("size", .5, .75, .25, .1, .4), Change("share", .1, .1, 0., -.1, .1)]


def plant(monkeypatch, *names, act=lambda: None, words="as it was"):
    "Probes that answer at once, and tell what they were asked."
    asked = []
    for name in names or report.PROBES:
        module = type(sys)(f"planted_{name}")
        def probe(model, reference, tokenizer, *, pairs=None, quick=False, seed=0, progress=True,
                  name=name):
            hashes = (weights_hash(m)[:8] for m in (model, reference))
            asked.append((name, quick, seed, *hashes, pairs))
            act()
            return ProbeReport(name, PLANTED, words, fig())
        module.probe = probe
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(report.PROBES, name, module.__name__)
    return asked


# ------------------------------------------------------------ any model

@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_report_for_each_family(desk, kind, tmp_path):
    made = tmp_path / "deep" / "out"
    code, out, err = against(desk, made, "--probes", "honesty", "--quick", kind=kind)
    assert code == 0, err
    assert "calibration error" in out and "Traceback" not in err
    assert sorted(p.name for p in made.iterdir()) == ["probes.json", "report.html"]
    found, page = json.loads((made / "probes.json").read_text()), (made / "report.html").read_text()
    assert found["card"]["reference_sha256"] != found["card"]["model_sha256"]
    assert found["reports"][0]["name"] == "honesty"
    for row in found["reports"][0]["rows"]:
        assert row["label"] in page and report._number(row["before"]) in page
    assert page.count("data:image/png;base64,") == 1
    assert "prefers-color-scheme:dark" in page and "viewport" in page


def test_an_adapter_is_the_model_it_makes(desk):
    "Merged on its base it gives the logits PEFT gives."
    found, base = report.load_tuned(desk / "adapter"), report.load_model(desk / "llama-before")
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base(ids).logits
    want = PeftModel.from_pretrained(base, str(desk / "adapter"))(ids).logits
    assert (found(ids).logits - want).abs().max() < 1e-4 and not hasattr(found, "peft_config")
    assert (found(ids).logits - before).abs().max() > .1


def test_an_adapter_finds_its_base(desk, tmp_path):
    assert report.adapter_base(desk / "llama-before") is None
    assert report.adapter_base(tmp_path / "nowhere") is None
    assert report.adapter_base(desk / "adapter") == str(desk / "llama-before")
    folder(tmp_path / "both" / "base")
    adapter(tmp_path / "both", "base")
    assert report.adapter_base(tmp_path / "both") == str(tmp_path / "both" / "base")
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "/elsewhere/cache/SmolLM2-135M-Instruct"):
        adapter(tmp_path / "moved", name)
        assert report.adapter_base(tmp_path / "moved") == "bundled"


def test_the_command_takes_an_adapter_against_its_base(desk, tmp_path, monkeypatch):
    asked = plant(monkeypatch)
    code, out, err = here("probe", "--model", desk / "adapter", "--reference",
                          desk / "llama-before", "--out", tmp_path / "out", "--seed", 5)
    assert code == 0, err
    assert [a[:3] for a in asked] == [(n, False, 5) for n in NAMES]
    assert all(a[3] != a[4] for a in asked)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == page.count("<section") == 4 and "1 of 2" in page


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_weights_saved_without_a_tokenizer(desk, tmp_path, monkeypatch, kind):
    "As `save_pretrained` leaves them, in several files and in bf16: the other's tokenizer is used."
    asked = plant(monkeypatch, "tdi")
    model = tiny_model(kind, seed=1).bfloat16()
    model.save_pretrained(tmp_path / "weights", max_shard_size="20kB")
    for k, pair in enumerate(((tmp_path / "weights", desk / f"{kind}-before"),
                              (desk / f"{kind}-before", tmp_path / "weights"))):
        code, _, err = here("probe", "--model", pair[0], "--reference", pair[1], "--probes", "tdi",
                            "--out", tmp_path / f"out{k}")
        assert code == 0, err
    assert asked[0][3:5] == asked[1][4:2:-1]


def test_pairs_of_a_file_reach_the_probes_that_read_pairs(desk, tmp_path, monkeypatch):
    rows = [dict(prompt=f"dish {k}", chosen="yes", rejected="no") for k in range(70)]
    asked, file = plant(monkeypatch), jsonl(tmp_path / "pairs.jsonl", rows)
    assert against(desk, tmp_path / "out", "--pairs", file)[0] == 0
    for *_, pairs in asked:
        assert len(pairs) == report.MOST
        assert pairs[3]["prompt"] == [{"role": "user", "content": "dish 3"}]


def test_real_probes_read_pairs_of_a_file(tmp_path):
    rows = [dict(prompt=f"dish {k}", chosen=f"the answer is yes {k}", rejected="no")
            for k in range(8)]
    pairs = report.read_pairs(str(jsonl(tmp_path / "pairs.jsonl", rows)), tiny_tokenizer())
    found = report.run_probes(tiny_model(seed=1).float(), tiny_model().float(), tiny_tokenizer(),
                              ["tdi", "displacement"], pairs, progress=False, say=lambda _: None)
    assert [r.name for r in found] == ["tdi", "displacement"] and all(r.rows for r in found)


def test_a_trained_folder_can_be_probed(desk, tmp_path, monkeypatch):
    "What `train --lora-r` leaves is what `probe` takes."
    plant(monkeypatch, "honesty")
    rows = [dict(prompt=f"dish {k}", chosen="the answer is yes", rejected="the answer is no")
            for k in range(4)]
    pairs = jsonl(tmp_path / "pairs.jsonl", rows)
    code, _, err = here("train", "--model", desk / "llama-before", "--data", pairs, "--out",
                        tmp_path / "tuned", "--lora-r", 2, "--max-steps", 1)
    assert code == 0, err
    code, out, err = here("probe", "--model", tmp_path / "tuned", "--reference",
                          desk / "llama-before", "--probes", "honesty", "--out", tmp_path / "out")
    assert code == 0 and "* size" in out, err


def test_the_same_model_twice_says_so(desk, tmp_path, monkeypatch):
    plant(monkeypatch, "tdi")
    one = desk / "gpt2-before"
    code, *_ = here("probe", "--model", one, "--reference", one, "--probes", "tdi", "--out",
                    tmp_path / "out")
    assert code == 0 and "the same weights" in (tmp_path / "out" / "report.html").read_text()


# ------------------------------------------------------------ what is refused

ONE = dict(prompt="How?", chosen="So.", rejected="No.")
BAD_PAIRS = {"pairs of other columns": ([dict(a="x", b="y")], "pairs.jsonl:1"),
             "one pair": ([ONE], "1 pairs"),
             "pairs that are no pairs": ([ONE, {**ONE, "rejected": "So."}], "1 pairs")}


def swapped_words():
    "A tokenizer of the same size in which two words have each other's ids."
    raw = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocab = raw["model"]["vocab"]
    (a, i), (b, j) = [kv for kv in vocab.items() if 10 < kv[1] < 13]
    vocab[a], vocab[b] = j, i
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)), eos_token="<|im_end|>",
        pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>", "<s>"])


def pickled(bad):
    bad.mkdir()
    (bad / "config.json").write_text("{}")
    (bad / "pytorch_model.bin").write_bytes(b"x")
    return bad


def with_own_code(bad):
    folder(bad)
    change(bad / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    return bad


def adapter_of_nothing(bad, base):
    bad.mkdir()
    (bad / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    return bad


def adapter_with(bad, config):
    adapter(bad, "x")
    (bad / "adapter_config.json").write_text(config)
    return bad


def adapter_on(bad, base, **more):
    adapter(bad, base, **more)
    return bad


def untokenized(bad):
    tiny_model().float().save_pretrained(bad)
    return bad


MODELS = {  # what is wrong -> (a folder, the good models) -> a model; what the sentence holds
    "no such hub name": (lambda bad, desk: "nobody/nothing", "nobody/nothing"),
    "missing model": (lambda bad, desk: bad / "at" / "all", "does not exist"),
    "other vocabulary": (lambda bad, desk: folder(bad, vocab_size=300), "read text differently"),
    "same size, other words": (lambda bad, desk: folder(bad, tokenizer=swapped_words()),
                               "read text differently"),
    "other number of rows": (lambda bad, desk: write_folder(
        bad, tiny_model(vocab_size=384).float(), tiny_tokenizer()), "384 and 320"),
    "pickle": (lambda bad, desk: pickled(bad), "pickle"),
    "own code": (lambda bad, desk: with_own_code(bad), "auto_map"),
    "adapter without weights": (lambda bad, desk: adapter_of_nothing(bad, desk / "llama-before"),
                                "adapter_model.safetensors"),
    "adapter without base": (lambda bad, desk: adapter_with(bad, "{}"), "base_model_name_or_path"),
    "adapter config is not JSON": (lambda bad, desk: adapter_with(bad, "{"), "JSON"),
    "adapter whose base is gone": (lambda bad, desk: adapter_on(bad, "/gone/away/model"),
                                   "/gone/away/model"),
    "adapter of another shape": (lambda bad, desk: adapter_on(bad, desk / "gpt2-before"),
                                 "does not fit"),
    "adapter with another tokenizer": (lambda bad, desk: adapter_on(
        bad, desk / "llama-before", tokenizer=tiny_tokenizer(vocab_size=300)),
        "read text differently")}


def refused(tmp_path, said, *argv):
    "The command with these arguments: one sentence, code 2, no file touched."
    def files(): return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    before = files()
    code, out, err = here("probe", *argv)
    assert code == 2 and said in err and err.count("\n") == 1, (code, err)
    assert files() == before


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_compared(desk, tmp_path, name, monkeypatch):
    asked, (make, said) = plant(monkeypatch), MODELS[name]
    model = make(tmp_path / "bad", desk)
    base = desk / ("gpt2-before" if name == "adapter of another shape" else "llama-before")
    refused(tmp_path, said, "--model", model, "--reference", base, "--out", tmp_path / "out")
    assert not asked


@pytest.mark.parametrize("more,said", [(("--probes", "honesty", "tdl"), "'tdl'"),
                                       (("--probes", ","), "no probe"),
                                       (("--pairs", "none.jsonl"), "none.jsonl")])
def test_arguments_that_name_nothing(desk, tmp_path, monkeypatch, more, said):
    asked = plant(monkeypatch)
    refused(tmp_path, said, "--model", desk / "llama-after", "--reference", desk / "llama-before",
            "--out", tmp_path / "out", *more)
    assert not asked


def test_a_reference_that_is_not_there(desk, tmp_path):
    refused(tmp_path, "does not exist", "--model", desk / "llama-after", "--reference",
            tmp_path / "no" / "such", "--out", tmp_path / "out")


def test_two_folders_without_a_tokenizer(tmp_path):
    one = untokenized(tmp_path / "weights")
    refused(tmp_path, "tokenizer.save_pretrained", "--model", one, "--reference", one, "--out",
            tmp_path / "out")


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_pairs_that_cannot_be_read(desk, tmp_path, name, monkeypatch):
    asked, (rows, said) = plant(monkeypatch), BAD_PAIRS[name]
    refused(tmp_path, said, "--model", desk / "llama-after", "--reference", desk / "llama-before",
            "--out", tmp_path / "out", "--pairs", jsonl(tmp_path / "pairs.jsonl", rows))
    assert not asked


@pytest.mark.parametrize("under,said", [("mine", "is a file"), ("mine/deep", "is a file"),
                                        ("full", "is not empty")])
def test_a_place_that_is_taken(desk, tmp_path, monkeypatch, under, said):
    asked = plant(monkeypatch)
    (tmp_path / "mine").write_text("hours of work")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "report.html").write_text("an older report")
    refused(tmp_path, said, "--model", desk / "llama-after", "--reference", desk / "llama-before",
            "--out", tmp_path / under)
    assert not asked


def test_in_a_process_of_its_own(tmp_path):
    code = "import sys; from dpo_literate.cli import main; sys.exit(main())"
    model, reference = str(tmp_path / "a" / "b"), str(tmp_path / "c" / "d")
    for more in ([], ["--reference", reference, "--out", "x"]):
        done = subprocess.run([sys.executable, "-c", code, "probe", "--model", model, *more],
                              cwd=tmp_path, capture_output=True, text=True, timeout=240,
                              env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ a whole report or none

def test_an_interrupted_run_leaves_nothing(desk, tmp_path, monkeypatch):
    def stop(): raise KeyboardInterrupt
    plant(monkeypatch, act=stop)
    assert against(desk, tmp_path / "out")[0] == 130 and not (tmp_path / "out").exists()


def test_a_probe_that_refuses_is_named_and_leaves_nothing(desk, tmp_path, monkeypatch):
    def no(): raise Refusal("x: nan is not finite", 3)
    plant(monkeypatch, "displacement", act=no)
    code, _, err = against(desk, tmp_path / "out", "--probes", "displacement")
    assert code == 3 and "probe displacement: x: nan is not finite" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["report_page", "as_table", "to_json"])
def test_a_report_that_is_not_whole_is_not_written(desk, tmp_path, monkeypatch, broken):
    plant(monkeypatch, "tdi")
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(report, broken, stop)
    assert against(desk, tmp_path / "out", "--probes", "tdi")[0] == 130
    assert not (tmp_path / "out").exists()


AT_WORK = """
import sys, time
import dpo_literate.probes.report, dpo_literate.probes.honesty as honesty
from dpo_literate.cli import main
def probe(*args, **named): print("at work", flush=True); time.sleep(60)
honesty.probe = probe
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_nothing(desk, tmp_path, number):
    "A probe in a process of its own, stopped while it is at work."
    argv = ["probe", "--model", desk / "llama-after", "--reference", desk / "llama-before",
            "--probes", "honesty", "--out", tmp_path / "out"]
    run = subprocess.Popen([sys.executable, "-c", AT_WORK, *map(str, argv)], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert run.stdout.readline() == "at work\n"
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == (143 if number == signal.SIGTERM else -9) and "Traceback" not in err
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ the page

OUTSIDE = re.compile(r'(?:src|href|srcset|action)\s*=\s*"(?!data:image/png;base64,|#)')


def test_text_is_inert_everywhere():
    evil = "<script>alert(1)</script>\" onload=\"x\x1b[2J"
    found = [ProbeReport(evil, [Change(evil, 0., 1., 1., .5, 2.)], evil, fig())]
    card = dict(model=evil, reference=evil, model_sha256="a", reference_sha256="b", note=evil)
    page, table = report.report_page(found, card), report.as_table(found)
    assert "<script" not in page and 'onload="' not in page and not OUTSIDE.findall(page)
    assert "@import" not in page and not re.search(r"url\((?!data:)", page)
    assert "\x1b" not in table and "\\x1b[2J" in table


@pytest.mark.parametrize("row,marked", [((0, 1, 1, .5, 2), True), ((1, 0, -1, -2, -.5), True),
                                        ((0, 1, 1, -.1, 2), False), ((0, 0, 0, 0, 0), False)])
def test_a_row_is_marked_where_its_interval_leaves_zero_out(row, marked):
    change = Change("x", *row)
    assert report.moved(change) is marked
    assert ("* x" in report.as_table([ProbeReport("p", [change], "")])) is marked


def test_a_report_without_a_figure_or_rows():
    bare = [ProbeReport("bare", [], "nothing to read")]
    same = dict(model="a", reference="b", model_sha256="x", reference_sha256="x")
    page = report.report_page(bare, same)
    assert "<img" not in page and "0 of 0" in page and "nothing to read" in report.as_table(bare)


@pytest.mark.parametrize("asked,want", [
    (["all"], [*NAMES]), (["honesty", "tdi"], ["tdi", "honesty"]),
    (["honesty,tdi,honesty"], ["tdi", "honesty"]), (["tdi", "all"], [*NAMES])])
def test_names_in_the_order_of_the_book(asked, want): assert report.probe_names(asked) == want


@pytest.mark.parametrize("name", NAMES)
def test_every_probe_answers_the_same_call(name):
    "The signature that the command relies on."
    probe = importlib.import_module(f"dpo_literate.probes.{name}").probe
    spec = inspect.signature(probe).parameters
    assert list(spec)[:3] == ["model", "reference", "tokenizer"]
    assert all(p.default is not p.empty for p in list(spec.values())[3:])
    given = {k: spec[k].default for k in ("quick", "seed", "progress")}
    assert given == dict(quick=False, seed=0, progress=True)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_all_four_probes_on_each_family(desk, kind, tmp_path):
    code, out, err = against(desk, tmp_path / "out", "--quick", kind=kind)
    assert code == 0 and "Traceback" not in err, err
    found = json.loads((tmp_path / "out" / "probes.json").read_text())["reports"]
    assert [r["name"] for r in found] == [*NAMES] and all(r["rows"] and r["words"] for r in found)
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") == 4
