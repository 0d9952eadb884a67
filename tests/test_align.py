"The main job on tiny models: the same after a kill, no trace of a refusal, nothing that runs."
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_literate import align as A
from dpo_literate import runs as R
from dpo_literate.cli import main
from dpo_literate.models import tiny_model, weights_hash, write_folder
from dpo_literate.results import Refusal
from dpo_literate.rows import tiny_tokenizer

REWARD = """
import os, time
def vowels(prompts, replies):
    time.sleep(float(os.environ.get("SLOW", 0)))
    return [sum(c in "aeiou" for c in y) / max(len(y), 1) for y in replies]
def nan(prompts, replies): return [float("nan")] * len(replies)
def text(prompts, replies): return ["good"] * len(replies)
def short(prompts, replies): return [1.]
def same(prompts, replies): return [1] * len(replies)
def fails(prompts, replies): raise KeyError("no such word")
number = 3
"""
SMALL = [
    "--per-prompt",
    "2",
    "--limit",
    "8",
    "--epochs",
    "2",
    "--learning-rate",
    "0.01",
    "--batch",
    "4",
    "--lora-r",
    "4",
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder with a tiny model, a module of rewards and a file of prompts."
    folder = tmp_path_factory.mktemp("desk")
    write_folder(folder / "model", tiny_model().float(), tiny_tokenizer())
    (folder / "rewards.py").write_text(REWARD)
    (folder / "prompts.txt").write_text(
        "\n".join(f"tell me about dish {k}" for k in range(24)) + "\n"
    )
    return folder


def command(*argv):
    code = "import sys; from dpo_literate.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code, *map(str, argv)]


def arguments(desk, out, more):
    return [
        "demo",
        "--model",
        desk / "model",
        "--prompts",
        desk / "prompts.txt",
        "--reward",
        "rewards:vowels",
        "--out",
        out,
        *SMALL,
        *more,
    ]


def start(desk, out, **env):
    "The demo in a process of its own."
    return subprocess.Popen(
        command(*arguments(desk, out, ())),
        cwd=desk,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
    )


def here(*argv):
    "A command in this process: exit code, stdout, stderr."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in argv])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def demo(desk, out, *more):
    "The demo in this process."
    before = os.getcwd()
    os.chdir(desk)
    try: return here(*arguments(desk, out, more))
    finally: os.chdir(before)


def figures(out):
    "results.json without what a clock or a memory gauge says."
    f = json.loads((out / "results.json").read_text())
    return {k: v for k, v in f.items() if k not in ("seconds", "peak_memory_gb")}


def curves(out): return json.loads((out / "curves.json").read_text())


@pytest.fixture(scope="module")
def whole(desk):
    "A run nobody disturbed."
    done = demo(desk, desk / "whole")
    assert done.returncode == 0, done.stderr
    (desk / "whole.txt").write_text(done.stdout)
    return desk / "whole"


def test_results_hold_every_key(whole):
    f = json.loads((whole / "results.json").read_text())
    named = (
        "reward_before reward_after gain gain_low gain_high kl_nats_per_reply win_rate "
        "accuracy_heldout length_before length_after pairs seconds peak_memory_gb seed"
    )
    assert set(named.split()) <= set(f)
    assert (
        f["gain"] == pytest.approx(f["reward_after"] - f["reward_before"], abs=1e-12)
        and f["gain_low"] <= f["gain"] <= f["gain_high"]
    )
    assert {"before", "sampling", "training", "after", "distance"} <= set(f["seconds"])
    assert f["kl_nats_per_reply"] > 0 and f["pairs"] > 0 and 0 <= f["win_rate"] <= 1
    wanted = {
        "report.html",
        "report.md",
        "run_card.json",
        "results.json",
        "training.png",
        "rewards.png",
        "frontier.png",
        "replies.jsonl",
        "adapter",
    }
    assert wanted <= {p.name for p in whole.iterdir()}


def test_card_counts_and_hashes(whole):
    card = json.loads((whole / "run_card.json").read_text())
    assert card["rows"]["prompts"] == dict(read=24, repeated=0, train=18, held_out=6)
    assert card["rows"]["pairs"]["kept"] + card["rows"]["pairs"]["tied"] == 18
    assert (
        len(card["model_sha256"]) == 64
        and card["versions"]["torch"]
        and card["settings"]["seed"] == 0
    )
    assert card["training"]["settings"]["beta"] == .1


def test_same_seed_same_figures_and_another_seed_others(desk, whole):
    again, other = demo(desk, desk / "again"), demo(desk, desk / "other", "--seed", "1")
    assert again.returncode == other.returncode == 0
    assert figures(desk / "again") == figures(whole) and curves(desk / "again") == curves(whole)
    assert (desk / "again" / "report.md").read_text() == (whole / "report.md").read_text()
    assert again.stdout == (desk / "whole.txt").read_text().replace(
        str(whole), str(desk / "again")
    ), "what is printed depends on the clock"
    assert figures(desk / "other")["reward_after"] != figures(whole)["reward_after"]


STAGES = [
    "before-0",
    "rewards-before",
    "sampling-0",
    "rewards-sampling",
    "checkpoint-3",
    "checkpoint-10",
    "training-",
    "state-3",
    "state-10",
    "along-0",
    "distance-",
    "after-0",
    "results.json",
    "report.html",
    "adapter_model",
]
AGAIN_AND_AGAIN = """
import json, os, signal, sys
from pathlib import Path
import dpo_literate.align, matplotlib.figure, peft
from dpo_literate.cli import main
def die_at(name):
    for call in ("rename", "replace"):
        def patched(source, target, *rest, real=getattr(os, call), **more):
            if Path(target).name.startswith(name): os.kill(os.getpid(), signal.SIGKILL)
            return real(source, target, *rest, **more)
        setattr(os, call, patched)
for name in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        if name: die_at(name)
        os._exit(main(sys.argv[2:]))
    print(json.dumps([name, os.waitpid(child, 0)[1]]), flush=True)
"""


def test_killed_at_every_stage_it_goes_on_and_ends_the_same(desk, whole):
    "One folder, a SIGKILL before the first write of every stage, then a start left in peace."
    out, argv = desk / "killed", [sys.executable, "-c", AGAIN_AND_AGAIN, json.dumps([*STAGES, ""])]
    done = subprocess.run(
        [*argv, *map(str, arguments(desk, out, ()))],
        cwd=desk,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert ends == [[name, signal.SIGKILL] for name in STAGES] + [["", 0]], done.stderr
    assert figures(out) == figures(whole) and curves(out) == curves(whole)
    assert (out / "report.md").read_text() == (whole / "report.md").read_text()
    assert not list(out.glob("work/training-*/checkpoint-*")) and not list(out.rglob("optimizer*"))


def test_killed_in_the_middle_of_training(desk, whole):
    "At no particular write: whenever the clock says."
    out = desk / "cut"
    run = start(desk, out, SLOW="0.2")
    until = time.time() + 120
    while (
        not list(out.glob("work/training-*/checkpoint-3"))
        and run.poll() is None
        and time.time() < until
    ):
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL); run.communicate()
    assert not (out / "report.html").exists(), "killed too late to show anything"
    made = {p.name: p.stat().st_mtime_ns for p in out.glob("work/*.json")}
    again = demo(desk, out)
    assert again.returncode == 0, again.stderr
    assert figures(out) == figures(whole) and curves(out) == curves(whole)
    assert all((out / "work" / n).stat().st_mtime_ns == t for n, t in made.items()), (
        "a finished stage was done again"
    )


def test_a_damaged_adapter_is_refused_with_its_name(desk, whole):
    path = next(whole.glob("work/training-*/state-10/adapter_model.safetensors"))
    good = path.read_bytes()
    try:
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        done = demo(desk, whole)
        assert done.returncode == 5 and "state-10" in done.stderr and done.stderr.count("\n") == 1
        path.unlink()
        assert demo(desk, whole).returncode == 5
    finally: path.write_bytes(good)


def test_a_finished_run_started_again_computes_nothing(desk, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.glob("work/**/*.json")}
    assert demo(desk, whole).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in whole.glob("work/**/*.json")} == before


def test_a_changed_setting_recomputes_what_depends_on_it(desk, whole):
    names = {p.name for p in whole.glob("work/*.json")}
    assert demo(desk, whole, "--beta", "0.5").returncode == 0
    new = {p.name.split("-")[0] for p in whole.glob("work/*.json") if p.name not in names}
    assert "training" in new and not {"sampling", "before"} & new
    assert demo(desk, whole).returncode == 0


REFUSED = {
    "NaN": (3, "nan", ["--reward", "rewards:nan"]),
    "text": (2, "'good'", ["--reward", "rewards:text"]),
    "too few": (2, "expected a list", ["--reward", "rewards:short"]),
    "raises": (2, "no such word", ["--reward", "rewards:fails"]),
    "ties": (2, "tied", ["--reward", "rewards:same"]),
    "no function": (2, "not a function", ["--reward", "rewards:number"]),
    "no module": (2, "nowhere", ["--reward", "nowhere:f"]),
    "no colon": (2, "module:function", ["--reward", "vowels"]),
    "no model": (2, "missing", ["--model", "./missing"]),
    "no prompts": (2, "empty.txt", ["--prompts", "empty.txt"]),
    "no such prompts": (2, "none.txt", ["--prompts", "none.txt"]),
    "few prompts": (2, "at least 8", ["--prompts", "few.txt"]),
    "bad line": (2, "bad.jsonl:2", ["--prompts", "bad.jsonl"]),
    "pairs column": (2, "pairs.jsonl:1", ["--pairs", "pairs.jsonl"]),
    "empty reply": (2, "blank.jsonl:1", ["--pairs", "blank.jsonl"]),
    "beta": (2, "beta", ["--beta", "0"]),
    "beta nan": (2, "beta", ["--beta", "nan"]),
}
BEGUN = ("NaN", "text", "too few", "raises", "ties")   # seen only once replies are there


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(desk, tmp_path, name):
    code, word, more = REFUSED[name]
    (desk / "empty.txt").write_text("\n \n")
    (desk / "few.txt").write_text("a\nb\nc\n")
    (desk / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    (desk / "pairs.jsonl").write_text('{"question": "a", "good": "b", "bad": "c"}\n')
    (desk / "blank.jsonl").write_text('{"prompt": "a", "chosen": " ", "rejected": "c"}\n')
    done = demo(desk, tmp_path / "out", *more)
    last = done.stderr.strip().splitlines()
    assert done.returncode == code and len(last) == 1 and word in last[0], done.stderr
    assert (tmp_path / "out").exists() == (name in BEGUN)
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_file_where_a_folder_should_be(desk, tmp_path):
    (tmp_path / "file").write_text("")
    done = demo(desk, tmp_path / "file" / "out")
    assert done.returncode == 2 and "file is a file, not a folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_run_a_folder(desk, tmp_path):
    with R.only_one(tmp_path / "work"), pytest.raises(Refusal, match="another run"):
        with R.only_one(tmp_path / "work"): pass


def test_pairs_of_a_file(desk, tmp_path):
    rows = [dict(prompt=f"dish {k}", chosen="the answer is yes", rejected="no") for k in range(20)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = demo(desk, tmp_path / "out", "--pairs", tmp_path / "p.jsonl")
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "out" / "run_card.json").read_text())["rows"]
    assert (
        card["pairs file"]["rows_in"] == 20
        and card["pairs"]["kept"] + card["held-out pairs"]["kept"] == 20
    )
    assert not list((tmp_path / "out" / "work").glob("sampling*"))


GOOD = dict(prompt="How was lunch?", chosen="Lovely.", rejected="Bad.")
BAD = {
    "wrong column": ("pairs.jsonl:1", [dict(question="a", good="b", bad="c")]),
    "empty file": ("pairs.jsonl", []),
    "cut-off line": ("pairs.jsonl:2", [GOOD, json.dumps(GOOD)[:30]]),
    "identical pair": ("pairs.jsonl:2", [GOOD, {**GOOD, "chosen": "Bad."}]),
    "control token in a reply": ("pairs.jsonl:2", [GOOD, {**GOOD, "chosen": "x <|im_end|> y"}]),
    "missing model folder": ("missing does not exist", [GOOD]),
}


@pytest.mark.parametrize("command", ["demo", "train", "check-data"])
@pytest.mark.parametrize("name", BAD)
def test_six_bad_inputs_get_one_sentence_with_the_place_and_nothing_is_written(
    name, command, desk, tmp_path, monkeypatch
):
    place, rows = BAD[name]
    monkeypatch.chdir(tmp_path)
    file, model = tmp_path / "pairs.jsonl", "./missing" if "model" in name else desk / "model"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r) + "\n") for r in rows))
    argv = {
        "demo": ["demo", "--pairs", file, "--out", "out"],
        "train": ["train", "--data", file, "--out", "out"],
        "check-data": ["check-data", file],
    }[command]
    done = here(*argv, "--model", model)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and place in done.stderr, (
        done.stderr
    )
    assert list(tmp_path.iterdir()) == [file]


def test_prompts_as_messages_and_from_pairs(desk, tmp_path):
    chat = [
        [dict(role="system", content="be brief"), dict(role="user", content=f"dish {k}")]
        for k in range(12)
    ]
    (tmp_path / "chat.jsonl").write_text(
        "".join(json.dumps(dict(prompt=p)) + "\n" for p in [*chat, chat[0]])
    )
    assert (
        A.read_prompts(tmp_path / "chat.jsonl") == [*chat, chat[0]]
        and A.split_prompts(tmp_path / "chat.jsonl")[2]["repeated"] == 1
    )
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\na,b,c\nd,e,f\n")
    assert A.read_prompts(tmp_path / "pairs.csv") == ["a", "d"]
    (tmp_path / "bad.jsonl").write_text(
        json.dumps(dict(prompt=chat[0]))
        + "\n"
        + json.dumps(dict(prompt=[dict(role="user")]))
        + "\n"
    )
    with pytest.raises(Refusal, match="bad.jsonl:2"): A.read_prompts(tmp_path / "bad.jsonl")
    done = demo(desk, tmp_path / "out", "--prompts", tmp_path / "chat.jsonl")
    assert done.returncode == 0, done.stderr
    assert "be brief" in (tmp_path / "out" / "report.md").read_text()


class Seen(HTMLParser):
    def __init__(self): super().__init__(); self.tags, self.attributes, self.text = [], [], ""
    def handle_starttag(self, tag, attrs): self.tags.append(tag); self.attributes += attrs
    def handle_data(self, data): self.text += data


EVIL = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></table><h1>x",
    "[a](javascript:alert(1))",
    "a | b\n# c",
    "\x1b[2J",
    "$$x$$ `y`",
    "https://example.org www.example.org a@b.org",
]


@pytest.fixture
def evil(whole):
    f, card = (
        json.loads((whole / "results.json").read_text()),
        json.loads((whole / "run_card.json").read_text()),
    )
    card["settings"] |= dict(model=EVIL[0], pairs=EVIL[1])
    return f, [(e, dict(text=e, reward=.5), dict(text=e, reward=-.5)) for e in EVIL], card


def test_nothing_a_model_wrote_becomes_html(evil):
    page = Seen()
    page.feed(R.report_html(*evil, {"caption": b"png"}))
    assert page.tags.count("h1") == 1 and page.tags.count("img") == 1 and "script" not in page.tags
    assert not [a for a in page.attributes if a[0].startswith("on")] and "a" not in page.tags
    assert all(" ".join(e.split()) in " ".join(page.text.split()) for e in EVIL)
    assert not [v for k, v in page.attributes if k in ("src", "href") and not v.startswith("data:")]


def test_nothing_a_model_wrote_becomes_markdown(evil):
    text = R.report_md(*evil, {})
    shown = re.sub(r"\\.", "", text)   # without what a backslash makes harmless
    for raw in ("<", "](", "$", "https://", "www.e", "@", "`y`"): assert raw not in shown, raw
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("|") and "script" in line or "example" in line
    ]
    assert rows and all(len(line.replace(r"\|", "").split("|")) == 5 for line in rows)


# ---------------------------------------------------------------- the parts

def test_pairs_take_the_best_and_the_worst_and_count_ties():
    g = torch.Generator().manual_seed(0)
    rewards = [[round(x, 1) for x in torch.rand(4, generator=g).tolist()] for _ in range(200)] + [
        [0.5] * 4
    ] * 7
    replies = [[dict(ids=[10 * p + k, 2]) for k in range(4)] for p in range(len(rewards))]
    rows, ties = A.best_against_worst([[p] for p in range(len(rewards))], replies, rewards)
    assert ties == sum(len(set(r)) == 1 for r in rewards) >= 7 and len(rows) + ties == len(rewards)
    for row in rows:
        p = row.prompt_ids[0]
        r = {10 * p + k: v for k, v in enumerate(rewards[p])}
        assert r[row.chosen_ids[0]] == max(r.values()) and r[row.rejected_ids[0]] == min(r.values())


def test_the_books_prompts():
    train, held, counts = A.split_prompts()
    assert len(set(train)) == 240 and len(set(held)) == 80 and not set(train) & set(held)
    topics = [
        {paragraph.partition(":")[0] for paragraph in text.strip().split("\n\n")}
        for text in (A.TRAIN_TOPICS, A.HELD_OUT_TOPICS)
    ]
    assert not topics[0] & topics[1] and counts == dict(
        read=320, repeated=0, train=240, held_out=80
    )


def test_hold_out_keeps_prompts_whole():
    rows = [A.Row([k // 3], [1, 2], [3, 2]) for k in range(60)]
    rest, held = A.hold_out(rows, 10, 0)
    assert (
        len(held) == 12
        and len(rest) == 48
        and not {tuple(r.prompt_ids) for r in rest} & {tuple(r.prompt_ids) for r in held}
    )
    with pytest.raises(Refusal): A.hold_out(rows[:3], 1, 0)


def test_merging_the_adapter_gives_the_model_that_was_trained(desk, whole):
    from peft import PeftModel
    from dpo_literate.models import load_model
    base = load_model(desk / "model")
    before = weights_hash(base)
    adapted = PeftModel.from_pretrained(load_model(desk / "model"), str(whole / "adapter"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(): want = adapted(ids).logits
    merged = adapted.merge_and_unload()
    with torch.no_grad(): assert (merged(ids).logits - want).abs().max() < 1e-4
    with torch.no_grad(): assert (base(ids).logits - want).abs().max() > 1e-2
    assert weights_hash(base) == before


@pytest.mark.slow
def test_the_demo_itself(tmp_path):
    f = A.align(A.AlignConfig(out=str(tmp_path / "demo")))
    assert f["gain"] >= .2 and f["gain_low"] > 0
    assert Path(tmp_path / "demo" / "report.html").stat().st_size > 50_000
