"""Run the pages top to bottom, and know what was run.

    python -m tools.pages run [PAGE ...] [--save] [--slow]    run pages; --save stores the fresh
    outputs
    python -m tools.pages run [PAGE ...] --isa default|avx2 [--threads N]
                                                              as another CPU would, and compare
    python -m tools.pages ledger                              cells that do not run, as
    tests/ledger.json should list them
"""
import argparse
import ast
import json
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
# the flags `nbdev-test` leaves out too (tst_flags in pyproject.toml)
SKIP = ("slow", "gpu", "notest")
DIRECTIVE = re.compile(r"^\s*#\|\s*(.+?)\s*$")
CHECK = re.compile(r"^(test_\w+|assert_\w+|expect_fail|ExceptionExpected)$")


def pages(folder=NBS):
    "The pages in reading order: 00, 00a, 00b, 01, …, then the index."
    return sorted(Path(folder).glob("*.ipynb"),
                  key=lambda p: (p.stem == "index", p.name.replace("_", " ")))


def read(path): return nbformat.reads(Path(path).read_text(encoding="utf-8"), as_version=4)


def directives(source):
    "The `#|` lines at the top of a cell: `{name: value}`."
    found = {}
    for line in source.splitlines():
        hit = DIRECTIVE.match(line)
        if hit: 
            name, _, value = hit.group(1).replace(":", " ", 1).partition(" ")
            found[name] = value.strip()
        elif line.strip(): break
    return found


def skipped(cell):
    "Why a code cell does not run with the others: 'slow', 'gpu', 'notest', 'eval: false', or None."
    marks = directives(cell.source)
    if marks.get("eval", "").lower() == "false": return "eval: false"
    return next((flag for flag in SKIP if flag in marks), None)


def assertions(source):
    "How many checks a cell makes: assert statements and calls of test_…, assert_…, expect_fail."
    try: tree = ast.parse(source)
    except SyntaxError: return 0
    names = [getattr(n.func, "id", getattr(n.func, "attr", ""))
             for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return (sum(isinstance(n, ast.Assert) for n in ast.walk(tree))
            + sum(bool(CHECK.match(n)) for n in names))


@dataclass
class Run:
    "What one page did when it was run from top to bottom in a fresh process."
    page: str                                    # file name
    cells: int = 0                               # code cells run
    left_out: int = 0                            # code cells not run (slow, gpu, eval: false)
    checks: int = 0                              # assertions in the cells that ran
    seconds: float = 0.
    error: str = ""                              # the first cell that failed, with its traceback
    outputs: dict = field(default_factory=dict)  # cell id -> fresh outputs


def run_page(path, cwd=None, slow=False, timeout=600, env=None) -> Run:
    "Run a page in a fresh kernel, stopping at the first error."
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    path, nb = Path(path), read(path)
    done, start = Run(path.name), time.time()
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    kernel_env = {**os.environ, "IN_TEST": "1",
                  "MPLBACKEND": "module://matplotlib_inline.backend_inline",
                  "TOKENIZERS_PARALLELISM": "false",
                  "PYTHONPATH": os.pathsep.join(filter(None,
                      [str(ROOT), os.environ.get("PYTHONPATH", "")])), **(env or {})}
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3",
                            extra_arguments=["--log-level=ERROR"],
                            resources={"metadata": {"path": str(cwd or path.parent)}})
    with client.setup_kernel(env=kernel_env):
        for index, cell in enumerate(nb.cells):
            if cell.cell_type != "code" or not cell.source.strip(): continue
            reason = skipped(cell)
            if reason and not (slow and reason == "slow"):
                done.left_out += 1
                continue
            try: client.execute_cell(cell, index)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
                said = ANSI.sub("", str(e))[-4000:]
                done.error = f"{path.name}, cell {cell.id}:\n{cell.source}\n{said}"
                break
            done.cells += 1
            done.checks += assertions(cell.source)
            done.outputs[cell.id] = list(cell.outputs)
    done.seconds = time.time() - start
    return done


def save_outputs(path, done):
    "Store the outputs of a run in the page; cells that were not run keep theirs."
    from tools.clean import clean_text, write_atomic
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    for cell in raw["cells"]:
        if cell.get("id") in done.outputs:
            cell["outputs"] = json.loads(json.dumps(done.outputs[cell["id"]]))
    write_atomic(path, clean_text(json.dumps(raw)))


# ------------------------------------------------------------ comparing outputs

ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")
CLOCK = re.compile(r"\b\d+(?:\.\d+)?(?:e[-+]?\d+)?\s?(?:s|ms|µs|us|ns|min|seconds?|minutes?)\b")
TIMED = re.compile(r"(\w+(?:_runtime|_per_second)': )'?[^',}]+'?")  # a trainer's log line
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
NUMBER = re.compile(r"(?<![\w.])[-−+]?\d+(?:,\d{3})*(?:\.\d*)?(?:[eE][-+]?\d+)?|[-−+]?\.\d+")


def as_text(value): return "".join(value) if isinstance(value, list) else str(value)


def same_text(stored, fresh):
    """Equal after the declared normalisation: memory addresses, wall-clock times and a log's
    speeds masked, runs of blanks alike, whole numbers equal, other numbers equal to 4 significant
    digits or within one unit of the last printed digit."""
    def plain(text):
        text = re.sub(r" at 0x[0-9a-f]+", "", ANSI.sub("", text))
        return TIMED.sub(r"\1<time>", CLOCK.sub("<time>", ADDRESS.sub("0x…", text)))
    def split(text):
        text = plain(text)
        return ([re.sub(r"[\s─━=-]+", " ", part).strip() for part in NUMBER.split(text)],
                NUMBER.findall(text))
    (words, numbers), (words2, numbers2) = split(stored), split(fresh)
    return (words == words2 and len(numbers) == len(numbers2)
            and all(map(same_number, numbers, numbers2)))


def same_number(a, b):
    if a == b: return True
    if not re.search(r"[.eE]", a + b): return False
    x, y = (float(t.replace("−", "-").replace(",", "")) for t in (a, b))
    def unit(t):  # one unit of the last printed digit
        mantissa, _, power = re.sub(r"[-−+]", "", t, count=1).replace(",",
            "").lower().partition("e")
        return 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
    digits = min(len(re.sub(r"[eE].*|[-−+.,]", "", t).lstrip("0")) for t in (a, b))
    return (abs(x - y) <= max(5e-4 * max(abs(x), abs(y)),
                              1.001 * max(unit(a), unit(b)) if digits > 2 else 0))


def image_size(data):
    "Width and height of a PNG stored as base64."
    import base64
    head = base64.b64decode(as_text(data))[:24]
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def merged(outputs):
    "Outputs with neighbouring pieces of one stream joined; stderr apart."
    out = []
    for o in outputs:
        if o.output_type == "stream" and out and out[-1].output_type == "stream" and out[
                -1].name == o.name:
            out[-1] = nbformat.from_dict({**out[-1],
                                          "text": as_text(out[-1].text) + as_text(o.text)})
        else: out.append(o)
    return [o for o in out if not (o.output_type == "stream" and o.name == "stderr")]


def differences(cell, fresh):
    "What a fresh run shows otherwise than the stored outputs, in words; empty when they agree."
    old, new, found = merged(cell.outputs), merged(fresh), []
    kinds = [[(o.output_type, *sorted(o.get("data", {}))) for o in side] for side in (old, new)]
    if kinds[0] != kinds[1]: return [f"stored {kinds[0]}, fresh {kinds[1]}"]
    if "varies" in directives(cell.source): return []
    for a, b in zip(old, new):
        if a.output_type == "stream" and not same_text(as_text(a.text), as_text(b.text)):
            found.append(f"stored {as_text(a.text)[:600]!r}\n fresh {as_text(b.text)[:600]!r}")
        for mime in a.get("data", {}):
            if mime.startswith("image/png"):
                if any(abs(m - n) > 4 for m, n in zip(image_size(a.data[mime]),
                        image_size(b.data[mime]))):
                    found.append("a picture of another size")
            elif mime.startswith("text/") and not same_text(as_text(a.data[mime]),
                    as_text(b.data[mime])):
                found.append(f"{mime}: stored {as_text(a.data[mime])[:600]!r}\n fresh "
                             f"{as_text(b.data[mime])[:600]!r}")
    return found


def off_page(path, done):
    "What a run of a page showed otherwise than the page has stored, a line a difference."
    cells = {c.id: c for c in read(path).cells}
    return [f"cell {name}: {line}" for name, fresh in done.outputs.items()
            for line in differences(cells[name], fresh)]


# Other CPUs, as far as one CPU can play them: PyTorch's own loops, bf16 products (oneDNN) and
# float32 products (MKL). A sum in another order moves a number's last digits, and training carries
# them forward: what a page prints must not show it. Another number of threads does the same.
ISA = {"default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2",
                   "MKL_CBWR": "COMPATIBLE"},
       "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}}


def unrun(folder=NBS):
    "Every code cell that `make test` does not run: page, cell id, kind."
    return [{"page": p.name, "cell": c.id, "kind": skipped(c)} for p in pages(folder)
            for c in read(p).cells if c.cell_type == "code" and skipped(c)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "ledger"])
    parser.add_argument("page", nargs="*", type=Path)
    parser.add_argument("--save", action="store_true", help="store the fresh outputs in the page")
    parser.add_argument("--slow", action="store_true",
                        help="run the slow cells as well; without names, only pages that have some")
    parser.add_argument("--isa", choices=sorted(ISA), help="compute with other instructions, "
                        "and compare with what is stored")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of the pages' processes")
    args = parser.parse_args(argv)
    if args.save and (args.isa or args.threads):
        parser.error("--save stores what this CPU shows: not together with --isa or --threads")
    if args.action == "ledger":
        print(json.dumps(unrun(), indent=1))
        return 0
    chosen = args.page or pages()
    if args.slow and not args.page:
        chosen = [p for p in chosen if any(c.cell_type == "code" and skipped(c) == "slow"
                                           for c in read(p).cells)]
    env = ISA.get(args.isa, {}) | ({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {})
    bad = 0
    for path in chosen:
        done = run_page(path, slow=args.slow, timeout=7200 if args.slow else 600, env=env)
        off = off_page(path, done) if env and not done.error else []
        bad += bool(done.error or off)
        said = "  FAILED" if done.error else f"  {len(off)} DIFFERENT" if off else ""
        print(f"{done.page}: {done.cells} cells run, {done.left_out} left out, "
              f"{done.checks} checks, {done.seconds:.0f} s{said}", flush=True)
        for line in [done.error] * bool(done.error) + off: print(line, file=sys.stderr)
        if args.save and not done.error: save_outputs(path, done)
    if not chosen: print("0 notebooks", file=sys.stderr)
    return 1 if bad or not chosen and not args.slow else 0


if __name__ == "__main__": sys.exit(main())
