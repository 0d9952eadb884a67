"""What is read runs nothing, opens no socket and writes nowhere else: model folders made to harm,
and every command under an audit hook. Part of tools/soak.py.

Python tells an audit hook of each file it opens, module it executes, process it starts and socket
it connects. Compiled code tells nothing: the weights that safetensors writes are seen by the
renaming that follows."""
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

from test_checkpoints import bomb_bytes
from test_models import BAD_TOKENIZERS, HARMS

SOCKETS = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname")
STARTED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
MOVES = {"os.rename": 2, "os.link": 2, "os.symlink": 2, "os.mkdir": 1, "os.remove": 1,
         "os.rmdir": 1, "os.truncate": 1, "os.chmod": 1, "shutil.rmtree": 1}


# ------------------------------------------------------------ folders made to harm

def edit(folder, name="config.json", **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def template(text):
    def act(folder):
        (folder / "chat_template.jinja").write_text(text)
    return act


def instead(name, form):
    "A pickle that leaves a mark, in place of a file or beside it."
    def act(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bomb_bytes(folder / "ran", form))
        if name.startswith("pytorch"): (folder / "model.safetensors").unlink()
    return act


def coded(where, **auto_map):
    "A class of its own, in a file beside the weights."
    def act(folder):
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
        edit(folder, where, auto_map=auto_map)
    return act


def index(name):
    return lambda f: (f / "model.safetensors.index.json").write_text(
        json.dumps(dict(weight_map=dict(x=name))))


def linked(name, target):
    def act(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
    return act


def piped(name):
    def act(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    return act


def named_template(name):
    def act(folder):
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        edit(folder, "tokenizer_config.json", chat_template=[
            dict(name=n, template="{{ messages }}") for n in ("default", name)])
    return act


LOOP = "{% for i in range(100000) %}"
END = "{% endfor %}"
FOLDERS = {f"harm: {k}": act for k, (act, _) in HARMS.items()}
FOLDERS |= {f"tokenizer: {k}": act for k, (act, _) in BAD_TOKENIZERS.items()}
FOLDERS |= {f"pickle: {n} ({form})": instead(n, form) for n, form in (
    ("pytorch_model.bin", "torch"), ("pytorch_model.bin", "pickle"), ("pytorch_model.bin", "zip"),
    ("model.safetensors", "torch"), ("model.safetensors", "pickle"), ("config.json", "pickle"),
    ("tokenizer.json", "pickle"), ("generation_config.json", "pickle"), ("manifest.json", "numpy"),
    ("adapter_model.bin", "torch"), ("training_args.bin", "torch"), ("extra/state.pkl", "pickle"))}
FOLDERS |= {
    "code: model": coded("config.json", AutoModelForCausalLM="evil.Model"),
    "code: config": coded("config.json", AutoConfig="evil.Config"),
    "code: elsewhere": coded("config.json", AutoModelForCausalLM="someone/else--evil.Model"),
    "code: tokenizer": coded("tokenizer_config.json", AutoTokenizer=["evil.T", None]),
    "code: generation": lambda f: (coded("config.json", AutoModelForCausalLM="evil.M")(f),
                                   (f / "custom_generate").mkdir(),
                                   shutil.copy(f / "evil.py", f / "custom_generate/generate.py")),
    "template: three loops": template(LOOP * 3 + "x" + END * 3),
    "template: a long range": template("{{ range(10 ** 9) | list }}"),
    "template: a large power": template("{{ 'x' * (10 ** 10) }}"),
    "template: recursion": template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    "template: classes": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template: globals": template("{{ cycler.__init__.__globals__.os.system('touch ran') }}"),
    "template: format": template("{{ '{0.__class__}'.format(messages) }}"),
    "template: another file": template("{% include '/etc/passwd' %}"),
    "template: cut": template("{% for m in messages %}{{ m"),
    "path: shard above": index("../other.safetensors"), "path: shard at root": index("/etc/passwd"),
    "path: shard around": index("a/../../b"), "path: template above": named_template("../../out"),
    "path: template at root": named_template("/tmp/out"),
    "link: weights": linked("model.safetensors", "/etc/passwd"),
    "link: config": linked("config.json", "/etc/passwd"),
    "link: a circle": linked("config.json", "config.json"),
    "link: a device": linked("config.json", "/dev/zero"),
    "pipe: weights": piped("model.safetensors"), "pipe: config": piped("config.json"),
    "pipe: tokenizer": piped("tokenizer.json")}


# ------------------------------------------------------------ under watch

class Watch:
    "What an audit hook has seen that should not be."
    def __init__(self, root, hostile=None):
        self.root, self.hostile = os.path.realpath(root), hostile and os.path.realpath(hostile)
        self.sockets, self.outside, self.ran, self.busy = [], [], [], False

    def inside(self, path):
        if isinstance(path, int) or path is None: return True
        real = os.path.realpath(os.fsdecode(path))
        return real.startswith((self.root + os.sep, "/proc/", "/dev/null")) or real == self.root

    def __call__(self, event, args):
        if self.busy: return
        self.busy = True
        try: self.note(event, args)
        finally: self.busy = False

    def note(self, event, args):
        program = os.path.basename(str(args[0])) if args else ""
        if event in SOCKETS: self.sockets.append(f"{event} {args[1:]!r}"[:200])
        elif event in STARTED and program != "git": self.ran.append(f"{event} {args!r}"[:200])
        elif event == "exec" and self.hostile:
            name = os.path.realpath(getattr(args[0], "co_filename", ""))
            if name.startswith(self.hostile + os.sep): self.ran.append(name)
        elif event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if writes and not self.inside(path): self.outside.append(f"open {path} {mode}")
        elif event in MOVES:
            for path in args[:MOVES[event]]:
                if not self.inside(path): self.outside.append(f"{event} {path}")


def watched(act, root, hostile=None, seconds=60):
    "Do something in a fork under the hook: what it returned, what was seen, how long it took."
    read, write = os.pipe()
    start = time.monotonic()
    if not (pid := os.fork()):
        watch, said, out, err = Watch(root, hostile), "?", io.StringIO(), io.StringIO()
        sys.addaudithook(watch)
        signal.alarm(seconds)
        here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (here + (4 << 30),) * 2)   # a neighbour's memory
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): said = act()
        except BaseException as why: said = f"{type(why).__name__}: {why}"[:300]
        watch.busy = True
        found = dict(said=said, err=err.getvalue()[-2000:], sockets=watch.sockets[:9],
                     outside=watch.outside[:9], ran=watch.ran[:9])
        os.write(write, json.dumps(found, default=str).encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file: text = file.read()
    os.waitpid(pid, 0)
    nothing = dict(said="did not end", err="", sockets=[], outside=[], ran=[])
    return (json.loads(text) if text else nothing) | dict(seconds=time.monotonic() - start)


def hostile_folder(name, model, place):
    "Ask a harmed folder for a reply; what was wrong with the answer, empty where nothing was."
    from dpo_literate.cli import main
    folder = place / "model"
    shutil.copytree(model, folder)
    FOLDERS[name](folder)
    words = ["generate", "--model", str(folder), "--prompt", "Hello", "--max-new-tokens", "2"]
    found = watched(lambda: main(words), place, folder, 30)
    wrong = [f"{k}: {found[k]}" for k in ("sockets", "outside", "ran") if found[k]]
    if (folder / "ran").exists() and "ran" not in str(FOLDERS[name]): wrong.append("it ran")
    if found["said"] not in (0, 2, 3, 4, 5, 6): wrong.append(f"ended with {found['said']}")
    if found["said"] and "Traceback" in found["err"]: wrong.append(found["err"][-300:])
    refused = found["said"] != 0
    if refused and found["err"].strip().count("\n"): wrong.append(f"wordy: {found['err'][-300:]}")
    if found["seconds"] > 20: wrong.append(f"{found['seconds']:.0f} s")
    return dict(refused=refused, wrong=wrong, said=found["err"].strip()[-160:])


# ------------------------------------------------------------ every command

def commands(desk):
    "The words of each command on tiny models; a run of each kind of page 42 beside them."
    rows = [dict(instruction="Say the town.", input="Oslo is a town.", output="Oslo"),
            dict(instruction="Say the dish.", input="Soup is a dish.", output="Soup")] * 3
    (desk / "tasks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    votes = [dict(thread=k // 2, reply=f"reply {k}", score=k) for k in range(8)]
    (desk / "votes.jsonl").write_text("".join(json.dumps(v) + "\n" for v in votes))
    model = ["--model", "model"]
    return {
        "check-data": ["check-data", "pairs.jsonl", *model], "losses": ["losses"],
        "generate": ["generate", *model, "--prompt", "Hello", "--max-new-tokens", 4, "--out",
                     "seen/replies.jsonl"],
        "merge": ["merge", "--model", "straight/adapter", "--out", "seen/merged"],
        "attack": ["attack", *model, "--tasks", "tasks.jsonl", "--first", 2, "--out",
                   "seen/attack"],
        "hierarchy-eval": ["hierarchy-eval", *model, "--per-pair", 1, "--aligned", 1, "--benign", 1,
                           "--cascades", 1, "--max-new-tokens", 2, "--out", "seen/hierarchy"],
        "pairs": ["pairs", "--from-votes", "votes.jsonl", "--out", "seen/pairs.jsonl"]}
