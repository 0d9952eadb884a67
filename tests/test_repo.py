"""What is true of the repository: it is what its notebooks say, it installs, it holds nothing
that acts on who opens it. Each check is shown able to fail."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from configparser import ConfigParser
from pathlib import Path
from statistics import median

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import check, clean, pages, readme
from tools.pages import NBS, ROOT

PACKAGE = ROOT / "dpo_literate"
MODULES = sorted(PACKAGE.rglob("*.py"))
NOTEBOOKS = pages.pages()


def tracked():
    "The files of the repository: those git knows, or, in a copy without git, all but what is made."
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if done.returncode == 0 and done.stdout:
        found = [ROOT / os.fsdecode(n) for n in done.stdout.split(b"\0") if n]
    else:
        made = {".venv", "_docs", "_proc", "runs", "build", "dist", "__pycache__", ".git"}
        found = [p for p in ROOT.rglob("*") if not made & set(p.relative_to(ROOT).parts)]
    return [p for p in found if p.is_file()]


def code_cells(path):
    return [c for c in pages.read(path).cells if c.cell_type == "code" and c.source.strip()]


# ------------------------------------------------------------ notebooks and what is made of them

def test_the_package_is_what_the_notebooks_export(): assert not check.out_of_sync()


def test_an_edited_module_is_named_with_its_line(tmp_path):
    for name in ("nbs", "dpo_literate"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True,
                        ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "settings.ini"): shutil.copy(ROOT / name, tmp_path)
    edited = tmp_path / "dpo_literate" / "losses.py"
    lines = edited.read_text(encoding="utf-8").splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if line.startswith("def dpo_loss"))
    edited.write_text("".join(lines[:at] + ["# by hand\n"] + lines[at:]), encoding="utf-8")
    (tmp_path / "dpo_literate" / "extra.py").write_text("x = 1\n")
    found = check.out_of_sync(tmp_path)
    assert (found == ["dpo_literate/extra.py: no notebook exports it",
                      f"dpo_literate/losses.py:{at + 1}: differs from its notebook; edit the "
                      f"notebook and run nbdev-export"])


def test_the_readme_is_the_index(): assert not readme.stale(), "run make readme"


def test_a_stale_readme_is_seen(tmp_path, monkeypatch):
    "A changed sentence, and a figure of the index that README's picture does not show."
    index = pages.read(NBS / "index.ipynb")
    index.cells.append(nbformat.v4.new_code_cell("#| echo: false\n#| fig-alt: \"a gain\"\nfig",
                                                 id="f1f1f1f1", outputs=[
                                                     nbformat.v4.new_output("display_data",
                                                         {"image/png": "iVBORw0KGgo="})]))
    nbformat.write(index, tmp_path / "index.ipynb")
    monkeypatch.setattr(readme, "NBS", tmp_path)
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    own = [f"index_{c.id}.png" for c in index.cells if c.cell_type == "code"
           and any("image/png" in o.get("data", {}) for o in c.outputs)]
    assert ("index_f1f1f1f1.png" in own and readme.stale()
            == [tmp_path / "README.md", *(tmp_path / "images" / name for name in own)])
    readme.main()
    assert (not readme.stale()
            and "![a gain](nbs/images/index_f1f1f1f1.png)" in readme.README.read_text(
                encoding="utf-8"))
    (tmp_path / "images" / "index_f1f1f1f1.png").write_bytes(b"old")
    assert readme.stale() == [tmp_path / "images" / "index_f1f1f1f1.png"]


def test_notebooks_are_clean(capsys):
    assert clean.main([str(NBS), "--check"]) == 0, capsys.readouterr().out


def default_exp(path):
    return next((pages.directives(c.source)["default_exp"]
                 for c in code_cells(path) if "default_exp" in pages.directives(c.source)), None)


def missing_rows(text, exports):
    "Pages the index does not list, or lists with other exports."
    rows = {m[1]: m[2].strip(" `") for m in re.finditer(r"^\| \[[^\]]*\]\(([^)]+)\) \|([^|]*)\|",
        text, re.M)}
    return [f"{name}: {rows.get(name)!r}, expected {exp or ''!r}"
            for name, exp in exports.items() if rows.get(name) != (exp or "")]


def test_the_index_lists_every_page_with_what_it_exports():
    text = "\n".join(c.source for c in pages.read(NBS / "index.ipynb").cells)
    exports = {p.name: default_exp(p) for p in NOTEBOOKS if p.stem != "index"}
    assert not missing_rows(text, exports)
    assert (missing_rows(text, {"99_new.ipynb": "new"})
            and missing_rows(text, {"04_losses.ipynb": "other"}))


# ------------------------------------------------------------ what can be read without scrolling

# Pages that are still over a limit, and over which; a page that no longer is must leave the list.
# The files still over 100 columns stand in pyproject.toml, as [tool.ruff.lint.per-file-ignores].
OVER = {}
COLUMNS, CELLS, BYTES = 100, 90, 400_000
STEP_PAGES = re.compile(r"10[a-d]?_")   # the trainer: short cells, every fourth of them a check


def code_lines(source):
    "The lines of a cell that are code or a comment on it: no blank ones, no directives."
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def over(path):
    "The limits a page breaks."
    nb, cells, found = pages.read(path), code_cells(path), set()
    if len(nb.cells) > CELLS: found.add("cells")
    if path.stat().st_size > BYTES: found.add("size")
    if STEP_PAGES.match(path.name):
        if median(len(code_lines(c.source)) for c in cells) > 8: found.add("long cells")
        if sum(pages.assertions(c.source) > 0 for c in cells) < len(cells) / 4:
            found.add("unchecked")
    return found


def test_no_page_is_over_a_limit_but_those_that_wait():
    found = {p.name: broken for p in NOTEBOOKS if (broken := over(p))}
    new = {name: broken - OVER.get(name, set()) for name, broken in found.items()}
    assert not any(new.values()), f"over the limit: { {k: v for k, v in new.items() if v} }"
    done = {name: broken - found.get(name, set()) for name, broken in OVER.items()}
    assert not any(done.values()), f"take them off OVER: { {k: v for k, v in done.items() if v} }"


def test_each_limit_is_seen(tmp_path):
    v4 = nbformat.v4
    def page(name, cells):
        nbformat.write(v4.new_notebook(cells=cells), tmp_path / name)
        return over(tmp_path / name)
    long = v4.new_code_cell("\n".join(f"x = {n}" for n in range(9)))
    assert page("10_a.ipynb", [long]) == {"long cells", "unchecked"}
    assert not page("11_a.ipynb", [long])
    assert page("10a_b.ipynb", [v4.new_code_cell("#| hide\n\nassert 1"), long]) == set()
    assert page("01_c.ipynb", [v4.new_markdown_cell("x") for _ in range(91)]) == {"cells"}
    assert page("01_d.ipynb", [v4.new_markdown_cell("x" * BYTES)]) == {"size"}


def long_lines(*files):
    "Files with a line over 100 columns, as ruff counts them."
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache",
                           "--line-length", str(COLUMNS), "--select", "E501",
                           "--output-format", "json", *map(str, files)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("["), done.stderr
    return {Path(x["filename"]).resolve() for x in json.loads(done.stdout)}


def test_no_line_is_over_100_columns_but_in_files_that_wait():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    assert config["line-length"] == COLUMNS and "E501" in config["lint"]["select"]
    waits = {ROOT / name for name, rules in config["lint"]["per-file-ignores"].items()
             if "E501" in rules}
    assert waits <= set(tracked()), "a pattern hides more than one file"
    code = [p for p in tracked() if p.suffix in (".py", ".ipynb") and PACKAGE not in p.parents]
    found = long_lines(*code)
    assert not found - waits, f"lines over 100 columns: {sorted(p.name for p in found - waits)}"
    done = sorted(p.name for p in waits - found)
    assert not done, f"take them off per-file-ignores in pyproject.toml: {done}"


def test_modules_are_as_narrow_as_their_pages():
    """A module's lines are its page's. What nbdev writes may be longer: the first line, the list
    of names, and `_modidx`, which is for machines."""
    waits = {p for p in NOTEBOOKS if p in long_lines(*NOTEBOOKS)}
    for module in MODULES:
        text, home = module.read_text(encoding="utf-8"), re.compile(r"nbs/(\w+\.ipynb)")
        if module.name == "_modidx.py" or not (page := home.search(text)): continue
        made = {n for node in ast.parse(text).body if isinstance(node, ast.Assign)
                and ast.unparse(node.targets[0]) == "__all__"
                for n in range(node.lineno, node.end_lineno + 1)} | {1}
        wide = [n for n, line in enumerate(text.splitlines(), 1)
                if len(line) > COLUMNS and n not in made]
        assert not wide or NBS / page[1] in waits, f"{module.name}: lines {wide}"


# ---------------------------------------------------- order: an arrow only points to a lower number

def imported(source):
    """Modules of the package that a piece of code imports, wherever in it: `x` of
    `dpo_literate.x` or `.x`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("dpo_literate.")
                      for a in node.names if a.name.startswith("dpo_literate.")}
        if isinstance(node, ast.ImportFrom):
            if node.level: found |= {node.module} if node.module else {a.name for a in node.names}
            elif node.module == "dpo_literate": found |= {a.name for a in node.names}
            elif (node.module or "").startswith("dpo_literate."):
                found.add(node.module.removeprefix("dpo_literate."))
    return {name for name in found if name != "_modidx"}


def python_of(source):
    return "\n".join(line for line in source.splitlines()
                     if not line.lstrip().startswith(("%", "!")))


def later_imports(named_sources, place):
    """(page, module) for each import of a module that no earlier page exports; a page may
    import its own."""
    return [(name, module) for n, (name, source) in enumerate(named_sources)
            for module in imported(source) if place.get(module, 10**6) > n]


def test_a_page_imports_only_modules_of_earlier_pages():
    place = {default_exp(p): n for n, p in enumerate(NOTEBOOKS) if default_exp(p)}
    sources = [(p.name, "\n".join(python_of(c.source) for c in code_cells(p))) for p in NOTEBOOKS]
    assert sum(len(imported(s)) for _, s in sources) > 20 and not later_imports(sources, place)
    assert (later_imports([("01.ipynb", "def f():\n from dpo_literate.late import x"),
                           ("02.ipynb", "from .late import x")], {"late": 1})
                           == [("01.ipynb", "late")])


# ----------------------------------- no call that runs what it reads, nothing of the notebook tools

BANNED_MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "nbdev", "fastcore",
                  "execnb", "nbformat", "IPython"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load",
                "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load"}
BANNED_WORDS = {"allow_pickle": True, "shell": True, "trust_remote_code": True,
                "weights_only": False}


def forbidden(source):
    """Lines of a module with a call or import that could run what it reads, or a mask made by
    comparing ids with the padding id."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = ([a.name for a in node.names] if isinstance(node, ast.Import)
                 else [node.module or ""] if isinstance(node, ast.ImportFrom)
                 and not node.level else [])
        found += [(node.lineno, f"import {n}") for n in names if n.split(".")[0] in BANNED_MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in BANNED_CALLS: found.append((node.lineno, f"{name}()"))
            found += [(node.lineno, f"{k.arg}={k.value.value}")
                      for k in node.keywords if isinstance(k.value, ast.Constant)
                      and k.arg in BANNED_WORDS and k.value.value == BANNED_WORDS[k.arg]]
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.NotEq, ast.Eq)):
            sides = [ast.unparse(s) for s in (node.left, node.comparators[0])]
            if any(re.search(r"(^|[._])pad(_token)?(_id)?$", s)
                   for s in sides) and any(re.search(r"(^|[._])(ids|tokens|labels|targets)$", s)
                                           for s in sides):
                found.append((node.lineno, ast.unparse(node)))
    return found


def test_no_module_holds_a_forbidden_call():
    assert len(MODULES) > 10
    found = [(p.name, *f) for p in MODULES if p.name != "_modidx.py"
             for f in forbidden(p.read_text(encoding="utf-8"))]
    assert not found


@pytest.mark.parametrize("line", [
    "import pickle", "from dill import loads", "torch.load('x')", "eval('1')", "exec('x')",
    "yaml.load(f)", "np.load(f, allow_pickle=True)", "run(c, shell=True)",
    "os.system('ls')", "mask = ids != pad", "mask = input_ids != tokenizer.pad_token_id",
    "def f():\n    import nbdev", "from fastcore.basics import patch",
    "AutoModel.from_pretrained(m, trust_remote_code=True)", "load(f, weights_only=False)"])
def test_a_forbidden_call_is_seen(line):
    assert forbidden(line) and not forbidden("model.eval()\nyaml.safe_load(f)\nids == other")


# ------------------------------------------------------------ T81: no failure is swallowed

def swallowed(source):
    "Lines of a try whose handler would hide a failing assertion inside it."
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Try): continue
        asserts = any(isinstance(n, ast.Assert) or isinstance(n, ast.Call)
                      and pages.CHECK.match(getattr(n.func, "id", getattr(n.func, "attr", "")))
                      for b in node.body for n in ast.walk(b))
        broad = [h for h in node.handlers if h.type is None
                 or re.search(r"\b(Exception|BaseException|AssertionError)\b", ast.unparse(h.type))]
        if asserts and any(not any(isinstance(n, ast.Raise) for n in ast.walk(h)) for h in broad):
            found.append(node.lineno)
    return found


def test_no_check_is_swallowed():
    sources = [(p.name, "\n".join(python_of(c.source) for c in code_cells(p))) for p in NOTEBOOKS]
    sources += [(p.name, p.read_text(encoding="utf-8")) for p in (ROOT / "tests").glob("*.py")]
    assert not [(name, line) for name, source in sources for line in swallowed(source)]
    assert (swallowed("try: assert x\nexcept: pass")
            and swallowed("try:\n    test_eq(1, 2)\nexcept Exception: x = 1"))
    assert (not swallowed("try: assert x\nexcept ValueError: pass")
            and not swallowed("try: f()\nexcept Exception: pass"))


# ----------------------------------------------------- what a stranger's machine must not find here

TRACES = {
    "a machine's path": r"(?:/(?:home|Users|root|work|mnt|scratch|data/users)/"
                        r"|[A-Z]:\\\\?Users\\\\?)[\w.-]+",
    "a host's name": r"\b[\w-]+\.(?:internal|local|corp|lan)\b(?![\w(])",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an OpenAI-like key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", "a Slack token": r"\bxox[abprs]-[\w-]{10,}",
    "a Google key": r"\bAIza[\w-]{35}", "a GitLab token": r"\bglpat-[\w-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a JSON web token": r"\beyJ[\w-]{15,}\.eyJ[\w-]{15,}\.[\w-]{10,}",
    "a key in words": r"(?i)\b(?:api[_-]?key|secret|password|passwd|(?:auth|access)[_-]?token)\b"
                      r"['\"]?\s*[:=]\s*['\"][^'\"\s]{12,}['\"]",
    "a password in an address": r"\b[a-z]+://[^\s/:@'\"]+:[^\s/@'\"]+@"}


def traces(text):
    "Kinds of machine trace or secret in a text."
    return [f"{kind}: {m[0][:40]}" for kind, pattern in TRACES.items()
            if (m := re.search(pattern, text))]


def searchable(path):
    "A file's text; of a notebook all but its pictures."
    text = path.read_bytes().decode("utf-8", "ignore")
    return (re.sub(r'"image/\w+": "[A-Za-z0-9+/=\\n]+"', "", text) if path.suffix == ".ipynb"
            else text)


def test_no_tracked_file_names_a_machine_or_holds_a_secret():
    files = [p for p in tracked() if p.suffix not in (".png", ".woff2") and p != Path(__file__)]
    assert (len(files) > 40 and not [(p.relative_to(ROOT).as_posix(), found)
                                     for p in files if (found := traces(searchable(p)))])


A = "a1B2c3D4" * 5


@pytest.mark.parametrize("text", [
    "/home/" + "ann/x.py", "/ro" + "ot/.cache", "C:\\Us" + "ers\\ann",
    "gpu-7.clu" + "ster.internal", "hf_" + A[:34], "sk-" + A, "ghp_" + A[:36],
    "AKIA" + "ABCDEFGHIJKLMNOP", "xoxb-" + "1234567890-abc",
    "AIza" + A[:35], "glpat-" + A[:20], "-----BEGIN RSA PRIVATE" + " KEY-----",
    "eyJ" + A[:20] + ".eyJ" + A[:20] + "." + A[:12], "api_key = '" + A[:20] + "'",
    "https://ann:" + "pass@host/x"])
def test_each_trace_is_seen(text): assert traces(f"before {text} after")


GIT = re.compile(r"\bgit\s+config\b|core\.(?:hooksPath|fsmonitor|sshCommand|editor|pager)"
                 r"|\binclude\.path\b|nbdev[-_]install[-_]hooks|config-git|\bjupyter\s+trust\b"
                 r"|nbstripout\s+--install|sign\.NotebookNotary")


def configures_git(name, text):
    """Why a tracked file would change what git or Jupyter runs on its reader's machine; empty
    when it does not."""
    base = name.rsplit("/", 1)[-1]
    if base in (".gitconfig", ".gitmodules",
                ".lfsconfig") or "hooks" in name.split("/")[
                    :-1] or base == ".pre-commit-config.yaml":
        return "is read by git or by a hook"
    if base == ".gitattributes" and re.search(r"\b(filter|diff|merge)=", text):
        return "names a filter or driver"
    return f"says {m[0]}" if base != "test_repo.py" and (m := GIT.search(text)) else ""


def test_no_tracked_file_configures_git_or_trusts_notebooks():
    assert not [(p.name, why) for p in tracked()
                if (why := configures_git(p.relative_to(ROOT).as_posix(),
                                          p.read_bytes().decode("utf-8", "ignore")))]
    for name, text in ((".gitconfig", ""), ("tools/hooks/pre-commit", ""),
                       (".gitattributes", "*.ipynb filter=clean"),
                       ("Makefile", "\tgit config core.hooksPath x"),
                       ("a.sh", "nbdev_install_hooks"), ("b.md", "jupyter trust nbs/*")):
        assert configures_git(name, text), name


def test_a_notebook_from_elsewhere_is_not_trusted():
    from nbformat.sign import NotebookNotary
    assert not any(NotebookNotary().check_signature(pages.read(p)) for p in NOTEBOOKS)


# --------------------------------------------------------- links and commands that are written down

LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s]+)\)"
                  r"|(?:src|href)=\"(?!https?:|mailto:|#|data:)([^\"]+)\"")


def dead_files(text, folder):
    return [target for m in LINK.finditer(text)
            if not (folder / (target := (m[1] or m[2]).partition("#")[0])).exists()]


def test_relative_links_resolve(tmp_path):
    found = {p.name: dead for p in NOTEBOOKS
             for c in pages.read(p).cells if c.cell_type == "markdown"
             and (dead := dead_files(re.sub(r"```.*?```|`[^`]*`", "", c.source, flags=re.S), NBS))}
    found |= {p.name: dead for p in ROOT.glob("*.md")
              if (dead := dead_files(p.read_text(encoding="utf-8"), ROOT))}
    assert not found
    assert (dead_files("[a](gone.ipynb#x) ![b](gone.png) [c](https://x) [d](#e)", tmp_path)
            == ["gone.ipynb", "gone.png"])


def make_targets():
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"),
                          re.M))


def test_commands_written_down_exist():
    from dpo_literate.cli import parser
    known = next(a.choices for a in parser()._actions if a.choices)
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        shown = "\n".join(a or b for a, b in re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", text, re.S))
        said = {name for names in re.findall(r"\bmake ((?:[a-z][\w-]* ?)+)",
                                             re.sub(r"#.*", "", shown)) for name in names.split()}
        gone = said - make_targets()
        assert said and not gone, f"{name} names make targets that are not there: {gone}"
        used = set(re.findall(r"(?<!install )\bdpo-literate ([a-z][a-z-]*)", shown))
        assert used <= set(known), name


def test_help_lists_every_target():
    out = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True)
    assert (out.returncode == 0 and {line.split()[1] for line in out.stdout.splitlines()}
            == make_targets())
    assert max(map(len, out.stdout.splitlines())) <= 100


def test_the_readmes_code_runs_and_shows_what_it_says(tmp_path):
    text = readme.README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n((?:(?!```).)*)```\n+```\n(.*?)```", text, re.S)
    assert blocks
    for code, shown in blocks:
        tree = ast.parse(code)
        last = ast.unparse(tree.body.pop())
        done = subprocess.run([sys.executable, "-c", f"{ast.unparse(tree)}\nprint({last})"],
                              cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"})
        assert (done.returncode == 0 and done.stdout.strip()
                == shown.strip()), done.stdout + done.stderr


# ------------------------------------------------------------ packages

def requirement_lists():
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return {k: config["DEFAULT"][k].split("\n")[1:]
            for k in config["DEFAULT"] if k.startswith("requirements")}


def unpinned(requirements, pins):
    "Requirements without a pin, or whose pin they do not allow."
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    wanted = [Requirement(r) for r in requirements]
    return [str(r) for r in wanted if canonicalize_name(r.name) not in pins
            or not r.specifier.contains(pins[canonicalize_name(r.name)], prereleases=True)]


def test_every_requirement_is_pinned_within_its_bounds():
    from packaging.utils import canonicalize_name
    pins = {canonicalize_name(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)$",
        (ROOT / "constraints.txt").read_text(), re.M)}
    lists = requirement_lists()
    installed = [r for k, v in lists.items() if k in ("requirements", "requirements_demo",
        "requirements_vision", "requirements_dev") for r in v]
    assert len(installed) > 20 and not unpinned(installed, pins)
    assert unpinned(["nosuch>=1"], pins) and unpinned(["torch>=99"], pins)


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {banned!r}: raise ImportError(f'{{name}} was imported at run time')
sys.meta_path.insert(0, Blocked())
"""


POSIX = ("fcntl", "resource", "pwd", "grp", "termios", "pty", "syslog", "curses", "readline")
WATCH = """
import builtins, importlib
found, real = set(), builtins.__import__
def watched(name, globals=None, *rest, **more):
    home = (globals or {}).get("__name__", "")
    if home.startswith("dpo_literate") and name in BANNED: found.add((home, name))
    return real(name, globals, *rest, **more)
builtins.__import__ = watched
for name in NAMES: importlib.import_module(name)
print(sorted(found))
"""


def test_no_module_needs_posix_to_be_imported(tmp_path):
    "`fcntl` and its like are not there on Windows: a function may ask for them, an import may not."
    (tmp_path / "dpo_literate_planted.py").write_text("import fcntl\ndef f(): import resource\n")
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts)
             for p in MODULES if p.name not in ("__init__.py", "_modidx.py")]
    code = f"BANNED, NAMES = {POSIX!r}, {[*names, 'dpo_literate_planted']!r}\n{WATCH}"
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert found == {("dpo_literate_planted", "fcntl")}


def test_the_package_builds_installs_runs_and_leaves(tmp_path):
    """A wheel into an empty environment, with no network: it holds the package, imports without
    the notebook tools, and its command answers from anywhere."""
    src = tmp_path / "src"
    shutil.copytree(PACKAGE, src / "dpo_literate", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, src)
    def run(*argv, **more):
        return subprocess.run(list(map(str, argv)), capture_output=True, text=True,
                              cwd=more.pop("cwd", tmp_path),
                              env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
                              | {"PIP_NO_INDEX": "1"} | more)
    built = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
                "--no-index", "-w", tmp_path / "dist", ".", cwd=src)
    assert built.returncode == 0, built.stderr[-2000:]
    wheel, = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    before = {p for p in (tmp_path / "env").rglob("*")}
    installed = run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps",
                    "--no-index", wheel)
    assert installed.returncode == 0, installed.stderr[-2000:]
    home, = (tmp_path / "env").glob("lib/python*/site-packages")
    held = {p.relative_to(home).as_posix() for p in home.rglob("dpo_literate/**/*.py")}
    assert (held == {p.relative_to(ROOT).as_posix()
                     for p in MODULES}), "the wheel holds another set of modules"
    meta = next(home.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
    needs = [line for line in meta.splitlines() if line.startswith("Requires-Dist:")
             and "extra ==" not in line]
    assert (any("torch>=" in n for n in needs)
            and not any(re.search("nbdev|fastcore|jupyter|pytest", n) for n in needs))
    others = os.pathsep.join(p for p in sys.path if p.endswith("site-packages"))
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts)
             for p in MODULES if p.name not in ("__init__.py", "_modidx.py")]
    (tmp_path / "elsewhere").mkdir()
    code = (BLOCK.format(banned=("nbdev", "fastcore", "execnb"))
            + "import importlib, dpo_literate\n"
            + f"for n in {names!r}: importlib.import_module(n)\nprint(dpo_literate.__file__)")
    done = run(python, "-c", code, cwd=tmp_path / "elsewhere", PYTHONPATH=others,
               HF_HUB_OFFLINE="1")
    assert (done.returncode == 0 and done.stdout.strip().startswith(
        str(home))), done.stdout + done.stderr[-3000:]
    spoiled = run(python, "-c", BLOCK.format(banned=("torch",)) + "import dpo_literate.losses",
                  cwd=tmp_path / "elsewhere", PYTHONPATH=others)
    assert "torch was imported at run time" in spoiled.stderr, "the block does not block"
    said = run(tmp_path / "env" / "bin" / "dpo-literate", "--help", cwd=tmp_path / "elsewhere",
               PYTHONPATH=others)
    assert said.returncode == 0 and "check-data" in said.stdout and not said.stderr, said.stderr
    gone = run(sys.executable, "-m", "pip", "--python", python, "uninstall", "-q", "-y",
               "dpo-literate")
    left = {p for p in (tmp_path / "env").rglob("*") if "__pycache__" not in p.parts} - before
    assert gone.returncode == 0 and not [p for p in left if "dpo" in p.name], left


# ------------------------------------------------------------ cleaning keeps what it cannot read

@pytest.mark.parametrize("text", ["", "{", '{"cells": 1, "nbformat": 4}',
                                  "<<<<<<< ours\n{}\n=======\n{}\n>>>>>>> theirs\n",
                                  '{"cells": [{"cell_type": "code"}], "nbformat": 4}',
                                  "\udcff".encode("utf-8", "surrogatepass").decode("latin-1")])
def test_an_unreadable_notebook_is_left_as_it_is(tmp_path, text, capsys):
    (tmp_path / "bad.ipynb").write_text(text)
    assert clean.main([str(tmp_path)]) == 1 and (tmp_path / "bad.ipynb").read_text() == text
    assert "left as it is" in capsys.readouterr().err


def test_nothing_to_clean_is_an_error(tmp_path): assert clean.main([str(tmp_path)]) == 1


line = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["code", "markdown"]), line, st.lists(line, max_size=2)),
                max_size=4))
def test_cleaning_keeps_content_and_is_idempotent(cells):
    made = []
    for kind, source, texts in cells:
        if kind == "markdown": made.append(nbformat.v4.new_markdown_cell(source))
        else:
            made.append(nbformat.v4.new_code_cell(source, execution_count=7,
                                                  metadata={"tags": ["x"]},
                                                  outputs=[nbformat.v4.new_output("stream", text=t)
                                                      for t in texts]))
    raw = json.dumps(nbformat.v4.new_notebook(cells=made,
                                              metadata={"kernelspec": {"display_name": "mine",
                                                  "name": "k", "language": "python"}}))
    once = clean.clean_text(raw)
    assert clean.clean_text(once) == once
    got = nbformat.reads(once, as_version=4).cells
    assert [pages.as_text(c.source) for c in got] == [c.source for c in made]
    assert ([[re.sub(clean.ADDRESS, "", o.text) for o in c.get("outputs", [])] for c in got]
            == [[re.sub(clean.ADDRESS, "", o.text) for o in c.get("outputs", [])] for c in made])
    assert (all(c.get("execution_count") is None and not c.metadata for c in got)
            and "mine" not in once)


def test_cleaning_drops_what_a_machine_warned():
    outputs = [nbformat.v4.new_output("stream", name="stderr", text="/env/x.py:1: FutureWarning"),
               nbformat.v4.new_output("stream", text="kept")]
    got = nbformat.reads(clean.clean_text(json.dumps(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=outputs)]))),
        as_version=4)
    assert [o.text for o in got.cells[0].outputs] == ["kept"]


def test_an_interrupted_write_leaves_the_old_notebook(tmp_path, monkeypatch):
    path = tmp_path / "a.ipynb"
    path.write_text("old")
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt): clean.write_atomic(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.ipynb"] and path.read_text() == "old"


# ------------------------------------------------------------ running nothing is a failure

def test_a_run_of_no_pages_fails(monkeypatch, capsys):
    monkeypatch.setattr(pages, "pages", lambda folder=None: [])
    assert pages.main(["run"]) == 1 and "0 notebooks" in capsys.readouterr().err


@pytest.mark.parametrize("said,code,ends", [
    ("", 0, 1), ("3 passed in 1s", 0, 1), ("pages: 3 run, 40 cells run, 0 cells left out, 9 "
                                           "assertions", 0, 1),
                                           ("pages: 0 run, 0 cells run\n3 passed", 0, 1),
    ("pages: 3 run, 40 cells run, 0 cells left out, 9 assertions\n3 passed in 1s", 0, 0),
    ("pages: 3 run, 40 cells run, 0 cells left out, 9 assertions\n1 failed, 3 passed in 1s", 2, 2)])
def test_ci_is_green_only_when_pages_and_tests_ran(tmp_path, said, code, ends):
    (tmp_path / "said").write_text(said + "\n")
    for name, body in (("make", f"cat {tmp_path}/said; exit {code}"), ("apt-get", "exit 0"),
                       ("chromium", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["bash", str(ROOT / ".ci" / "run")], capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"})
    assert done.returncode == ends, done.stdout + done.stderr


def test_make_demo_calls_the_command():
    "`make demo` once called a module without a main: exit 0, nothing done."
    said = (subprocess.run(["make", "-n", "demo", "ARGS=--seed 7"], cwd=ROOT, capture_output=True,
                           text=True).stdout)
    assert "bin/dpo-literate demo --seed 7" in said
