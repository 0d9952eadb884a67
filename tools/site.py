"""The site: every page, as its notebook has it stored, into `_docs/`. No cell is run and nothing
is fetched.

    python -m tools.site [--out DIR] [--renderer quarto|smalldocs]

nbdev prepares the notebooks (`proc_nbs`, with `gather_reference` below as its last processor);
Quarto renders them where
it is installed, else smalldocs. Both read the one `_quarto.yml`.
"""
import argparse
import html
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import is_dataclass
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path

import bleach
import yaml
from markdown_it import MarkdownIt
from nbdev.process import Processor

from tools.pages import ANSI, NBS, ROOT, as_text, directives, pages, read

PACKAGE = "dpo_literate"
CODE_WIDTH = 84


# ------------------------------------------------------------ the reference of a module

@cache
def home_of_modules():
    "Module -> page that exports it, from each page's `default_exp`."
    found = {}
    for path in pages():
        for cell in read(path).cells:
            name = directives(cell.source).get("default_exp") if cell.cell_type == "code" else None
            if name: found[f"{PACKAGE}.{name}"] = path
    return found


@cache
def public_symbols(module):
    """The names of a module that a user calls (its `__all__`), `Class.method` after its class, in
    the order of the source."""
    index = import_module(f"{PACKAGE}._modidx").d["syms"].get(module, {})
    names = [key.removeprefix(f"{module}.") for key in index]
    offered = set(import_module(module).__all__)
    names = [n for n in names if n.split(".")[0] in offered]
    names = [n for n in names if not any(part.startswith("_") for part in n.split("."))
             and ("." not in n or told(symbol(module, n)))]
    return sorted(names, key=lambda n: (line_of(module, n.split(".")[0]), "." in n,
                                        line_of(module, n)))


def symbol(module, name):
    "The object a dotted name of a module stands for."
    found = import_module(module)
    for part in name.split("."):
        found = (inspect.getattr_static(found, part) if inspect.isclass(found)
                 else getattr(found, part))
    found = (getattr(found, "__func__", None) or getattr(found, "fget", None)
             or getattr(found, "func", None) or found)
    return inspect.unwrap(found) if callable(found) else found


def told(thing):
    """What a name's own docstring says, its first paragraph; what it inherits or what is made
    for it is not its own."""
    text = inspect.cleandoc(thing.__dict__.get("__doc__") or "" if inspect.isclass(thing)
                            else getattr(thing, "__doc__", None) or "")
    return ("" if is_dataclass(thing) and text.startswith(f"{thing.__name__}(")
            else text.split("\n\n")[0])


def line_of(module, name):
    try: return inspect.getsourcelines(symbol(module, name))[1]
    except (TypeError, OSError): return 10**6


def type_name(annotation):
    "An annotation as a reader writes it: `Tensor`, `list[int]`, `str|None`."
    if annotation is inspect.Parameter.empty or annotation is None: return ""
    if isinstance(annotation, type) and not hasattr(annotation, "__origin__"):
        return annotation.__name__
    homes = (r"\b(?:torch|typing|collections\.abc|pathlib|transformers(?:\.\w+)*"
             r"|dpo_literate\.\w+)\.")
    return re.sub(homes, "", str(annotation)).replace(" | ", "|")


def default_name(value):
    "A default as a reader writes it; a dataclass field's factory as its call."
    if value is inspect.Parameter.empty: return ""
    if type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS": return "…"
    return value.__name__ if inspect.isfunction(value) or inspect.isclass(value) else repr(value)


def prose(text):
    """A comment or docstring as Markdown that shows it letter by letter; only code in backticks
    keeps its meaning."""
    parts = re.split(r"(`[^`]*`)", re.sub(r"\s+", " ", str(text or "")).strip())
    return "".join(p if p.startswith("`") and len(p) > 1
                   else re.sub(r"([*_~^$\\\[\]])", r"\\\1", p).replace("<", "&lt;") for p in parts)


def in_table(text): return text.replace("|", "\\|")


def code_text(text): return f"`{text}`" if text else ""


def parameters(thing):
    """`(name, type, default, comment)` of each parameter, and `(type, comment)` of what is
    returned; docments reads the comments."""
    from fastcore.docments import docments
    try: known, sig = docments(thing, full=True), inspect.signature(thing)
    except (TypeError, ValueError, OSError): return [], ("", "")
    own = getattr(thing, "__annotations__", {}) if is_dataclass(thing) else known
    # docments would guess a type from the default
    rows = [(k, type_name(sig.parameters[k].annotation), default_name(v.default), v.docment or "")
            for k, v in known.items() if k in sig.parameters and k in own
            and k not in ("self", "cls")]
    back = known.get("return")
    return (rows, ("", "") if inspect.isclass(thing)
            or back is None else (type_name(back.anno), back.docment or ""))


def entry(module, name):
    "Signature, one-line description and table of parameters of one exported name, as Markdown."
    thing = symbol(module, name)
    rows, (kind, comment) = parameters(thing)
    call = (name if is_property(module, name)
            else f"{name}({', '.join(k + (f'={d}' if d else '') for k, _, d, _ in rows)})")
    call = textwrap.fill(call + (f" -> {kind}" if kind else ""), CODE_WIDTH,
                         subsequent_indent=" " * (len(name) + 1 if len(name) < 30 else 4),
                         break_long_words=False, break_on_hyphens=False)
    lines = [f"### {name} {{#{anchor(name)}}}", "", f"```python\n{call}\n```", "",
             prose(told(thing)), ""]
    if comment or any(t or c for _, t, _, c in rows):
        table = ([(f"`{k}`", code_text(t), code_text(d), prose(c)) for k, t, d, c in rows]
                 + [("*returns*", code_text(kind), "", prose(comment))] * bool(kind or comment))
        used = [n for n in range(4) if n == 0 or any(row[n] for row in table)]
        lines += ["| " + " | ".join(in_table(row[n]) for n in used) + " |"
                  for row in (("name", "type", "default", "meaning"), ("---",) * 4, *table)]
    return "\n".join(lines) + "\n"


def is_property(module, name):
    owner, _, attribute = name.rpartition(".")
    return (bool(owner) and isinstance(inspect.getattr_static(symbol(module, owner), attribute),
                                       (property, cached_property)))


def anchor(name): return f"ref-{name}"  # a heading of the page may be called the same


@cache
def link_of_names():
    "Exported name -> link to its entry; a name two modules export is left alone."
    found, twice = {}, set()
    for module, path in home_of_modules().items():
        for name in public_symbols(module):
            if name in found: twice.add(name)
            found[name] = f"{path.name}#{anchor(name)}"
    return {k: v for k, v in found.items() if k not in twice}


NAME = re.compile(r"(?<![`\[\w])`([A-Za-z]\w*(?:\.\w+)?)(\(\))?`(?![`\]\w])")


def link_names(text):
    """Names of the library in backticks become links to their entry; headings, raw HTML and
    code are left alone."""
    links, fenced, out = link_of_names(), False, []
    for line in text.split("\n"):
        if line.lstrip().startswith("```"): fenced = not fenced
        if not (fenced or line.startswith(("#", "<", "    "))):
            line = NAME.sub(lambda m: f"[{m[0]}]({links[m[1]]})" if m[1] in links else m[0], line)
        out.append(line)
    return "\n".join(out)


# ---------------------------------------------------- what a run printed is text, whatever it holds

TAGS = set("a b blockquote br caption code div em h1 h2 h3 h4 h5 h6 hr i li ol p pre s span strong "
           "sub sup table tbody td tfoot th thead tr ul".split())
ATTRIBUTES = {"a": ["href"], "td": ["colspan", "rowspan"], "th": ["colspan", "rowspan"]}
OUTPUT_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")


def clean_html(text):
    "HTML without a tag, attribute or address that could act; their text stays."
    text = re.sub(r"<(style|script)\b.*?</\1\s*>", "", text, flags=re.S | re.I)
    return bleach.clean(text, tags=TAGS, attributes=ATTRIBUTES,
                        protocols={"http", "https", "mailto"}, strip=True)


CONTROL = re.compile(r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f]")


def plain_text(text): return CONTROL.sub("", ANSI.sub("", as_text(text)))


def inert(output):
    """An output of which no part is read as markup: text stays text, Markdown and HTML keep
    their plain tags, scripts and SVG go."""
    if output["output_type"] == "error":
        output["traceback"] = [plain_text(line) for line in output["traceback"]]
    if "text" in output: output["text"] = plain_text(output["text"])
    if "data" not in output: return output
    data = output["data"]
    rich = (clean_html(as_text(data["text/html"])) if "text/html" in data
            else OUTPUT_MARKDOWN.render(as_text(data["text/markdown"])) if "text/markdown" in data
            else None)
    kept = {k: v for k, v in data.items() if k in ("image/png", "image/jpeg")}
    if "text/plain" in data: kept["text/plain"] = plain_text(data["text/plain"])
    if rich is not None: kept = {"text/html": clean_html(rich).replace("{{<", "{{&lt;")}
    output["data"] = kept
    return output


# ------------------------------------------------------------ the last of nbdev's processors

def alt_text(cells, n):
    "What a figure shows, for who cannot see it: the first sentence of the caption under it."
    following = next((c.source for c in cells[n + 1:] if c.cell_type == "markdown"
                      and not c.source.startswith("#")), "")
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"[*`$\\{}\"]", "", following))
    return " ".join(re.split(r"(?<=[.:])\s", plain.strip(), maxsplit=1)[0].split())[:200]


HIDDEN = {"export", "hide", "default_exp"}   # nbdev would hide `exporti` too: here it is to be read


class gather_reference(Processor):
    """Drop plumbing, number the title, label exported code with its module, link names, make
    outputs inert, and end the page with its module's reference."""
    def __init__(self, nb):
        super().__init__(nb)
        found = [c.directives_["default_exp"] for c in nb.cells if c.cell_type == "code"
                 and "default_exp" in c.directives_]
        self.module = f"{PACKAGE}.{found[0].strip()}" if found else None

    def begin(self):
        from fastcore.nbio import mk_cell
        number = Path(self.nb.path_).stem.partition("_")[0]
        cells = self.nb.cells
        cells[:] = [c for c in cells if c.cell_type != "code" or not HIDDEN & set(c.directives_)]
        for n, cell in enumerate(cells):
            if cell.cell_type == "raw" and cell.source.startswith("---"):
                cell.source = front_matter(cell.source, number)
            elif cell.cell_type == "markdown": cell.source = link_names(cell.source)
            elif cell.cell_type == "code":
                cell.outputs = [inert(o) for o in cell.get("outputs", [])]
                marks = []
                if {"exports", "exporti"} & set(cell.directives_) and self.module:
                    marks += ["#| code-fold: show", f"#| code-summary: {self.module}"]
                picture = any("image/png" in o.get("data", {}) for o in cell.outputs)
                if picture and "#| fig-alt" not in cell.source:
                    said = json.dumps(alt_text(cells, n), ensure_ascii=False)
                    marks.append(f"#| fig-alt: {said}")
                cell.source = "\n".join([*marks, cell.source])
        if self.module and public_symbols(self.module):
            entries = [entry(self.module, name) for name in public_symbols(self.module)]
            cells.append(mk_cell(f"## Module reference {{#module-reference}}\n\nWhat this page "
                                 f"exports: `{self.module}`.", "markdown"))
            cells += [mk_cell(text, "markdown") for text in entries]


def front_matter(text, number):
    """The page's front matter with its number in the title; the file keeps the notebook's name
    in both renderers."""
    meta = yaml.safe_load(text.strip().strip("-"))
    meta.pop("output-file", None)
    if number[:1].isdigit(): meta["title"] = f"{number} · {meta['title']}"
    if "description" in meta: meta["description"] = " ".join(meta["description"].split())
    return f"---\n{yaml.safe_dump(meta, allow_unicode=True, width=1000)}---\n"


# ------------------------------------------------------------ equations

MATH = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)


FUNCTION = r"<m[io]>(?:log|ln|exp|max|min|sup|inf|arg|lim|Pr|sin|cos|tanh)</m[io]>"
OPENS = r"<mo[^>]*>(?:&#x000(?:28|3D|2C|5B|7B|3E|3C);|\(|\[|&#x02264;|&#x02208;)</mo>"


def spaced(out):
    """MathML as latex2mathml writes it, with TeX's spaces: around a function's name, none after
    a sign; hats that do not stretch."""
    gap = r'\1<mspace width="0.167em"/>'
    out = out.replace("<mo>&#x0221E;</mo>", "<mi>&#x0221E;</mi>")
    out = out.replace("<mo>&#x0005E;</mo></mover>", '<mo stretchy="false">&#x0005E;</mo></mover>')
    out = re.sub(rf"({OPENS})<mo>&#x02212;</mo>", r'\1<mo form="prefix">&#x02212;</mo>', out)
    out = re.sub(rf"(</m(?:i|n|sub|sup|subsup|frac|style|over)>)(?={FUNCTION})", gap, out)
    thing = r"<m(?:i|n|sub|sup|subsup|frac|style|over|row)\b"
    return re.sub(rf"((?<!<msub>)(?<!<msup>){FUNCTION})(?={thing})", gap, out)


def mathml(tex, display, where=""):
    """TeX as MathML, its `\\tag` beside it; ValueError where the converter leaves something it
    does not know."""
    from latex2mathml.converter import convert
    tag = re.search(r"\\tag\{([^}]*)\}", tex)
    try:
        out = convert(re.sub(r"\\tag\{[^}]*\}", "", tex).strip(),
                      display="block" if display else "inline")
    except Exception as e:
        raise ValueError(f"{where}: equation {tex!r}: {type(e).__name__}: {e}") from None
    out = spaced(out)
    unknown = re.search(r"\\[A-Za-z]+", re.sub(r"&#x[0-9A-Fa-f]+;", "", out))
    if unknown:
        raise ValueError(f"{where}: equation {tex!r}: {unknown[0]} is not known to latex2mathml")
    if not display: return out
    number = f'<span class="eqno">({html.escape(tag[1])})</span>' if tag else ""
    return f'<span class="equation">{out}{number}</span>'


def with_mathml(page, where=""):
    "A page's HTML with every equation as MathML."
    return MATH.sub(lambda m: mathml(html.unescape(m[2]), m[1] == "display", where), page)


# ------------------------------------------------------------ rendering

def prepare():
    """nbdev's processing of the pages into `_proc/`; sections of the sidebar that have no page
    yet are left out."""
    from nbdev.serve import proc_nbs
    proc = Path(proc_nbs(force=True, n_workers=0))
    config = yaml.safe_load((proc / "_quarto.yml").read_text(encoding="utf-8"))
    bar = config["website"]["sidebar"]
    def has_pages(item):
        if not isinstance(item, dict) or "section" not in item: return True
        contents = [item["contents"]] if isinstance(item["contents"], str) else item["contents"]
        return any(any(proc.glob(pattern)) for pattern in contents)
    bar["contents"] = [item for item in bar["contents"] if has_pages(item)]
    (proc / "_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
                                      encoding="utf-8")
    return proc


FETCH = 'const r = await fetch(offset + "search.json");\n      index = await r.json();'
FROM_DISK = """index = await new Promise((ok, no) => {
        const s = document.createElement("script");
        s.src = offset + "search.js";
        s.onload = () => ok(window.searchIndex);
        s.onerror = no;
        document.head.append(s);
      });"""


PAGE_LINK = re.compile(r'href="(\w+)\.ipynb(?=["#])')
GREEK = dict(alpha="α", beta="β", gamma="γ", delta="δ", mu="μ", pi="π", sigma="σ", theta="θ",
             phi="φ")
GREEK["lambda"] = "λ"


def without_tex(entry):
    "What a search shows of a formula: its letters, no commands."
    if isinstance(entry, dict): return {k: without_tex(v) for k, v in entry.items()}
    if isinstance(entry, list): return [without_tex(v) for v in entry]
    if not isinstance(entry, str): return entry
    return re.sub(r"\\([A-Za-z]+) ?", lambda m: GREEK.get(m[1], " "), entry)


def render_smalldocs(proc):
    """Render with smalldocs, and take from its result what would ask the network: KaTeX, web
    fonts, a fetched index."""
    from smalldocs.config import load
    from smalldocs.site import Site

    class Offline(Site):
        def render_page(self, page):
            super().render_page(page)
            page.html, page.env["math"] = with_mathml(page.html, str(page.src)), False
            page.html = PAGE_LINK.sub(r'href="\1.html', page.html)   # written by a cell

        def copy_assets(self, nav):
            super().copy_assets(nav)
            for css in (self.out / "site_libs" / "themes").rglob("*.css"):
                css.write_text(re.sub(r"@import url\([^)]*\);?", "",
                                      css.read_text(encoding="utf-8")), encoding="utf-8")
            script = self.out / "site_libs" / "smalldocs.js"
            text = script.read_text(encoding="utf-8")
            # fewer letters forgiven: cDPO is not DPO
            for old, new in ((FETCH, FROM_DISK), ("threshold: 0.3", "threshold: 0.15")):
                if old not in text:
                    raise SystemExit("smalldocs searches otherwise than 0.5.4 did; see FETCH in "
                                     "tools/site.py")
                text = text.replace(old, new)
            script.write_text(text, encoding="utf-8")

        def write_search(self):
            super().write_search()
            index = self.out / "search.json"
            text = without_tex(json.loads(index.read_text(encoding="utf-8")))
            (self.out / "search.js").write_text(
                f"window.searchIndex = {json.dumps(text, ensure_ascii=False)};\n",
                encoding="utf-8")
            index.unlink()

    site = Offline(load(proc), quiet=True)
    site.build()
    return site.out, [w for w in site.warnings if "html-math-method" not in w]


def render_quarto(proc):
    subprocess.run(["quarto", "render", str(proc), "--no-execute", "--quiet"], check=True)
    return proc / "_docs", []


def build(out=ROOT / "_docs", renderer=None):
    "Render the whole site into `out`; how many pages, and what is wrong with them."
    proc = prepare()
    renderer = renderer or ("quarto" if shutil.which("quarto") else "smalldocs")
    made, warnings = (render_quarto if renderer == "quarto" else render_smalldocs)(proc)
    out = Path(out)
    if out.exists(): shutil.rmtree(out)
    shutil.move(made, out)
    return len(list(out.glob("*.html"))), warnings


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_docs")
    parser.add_argument("--renderer", choices=["quarto", "smalldocs"],
                        help="default: Quarto where it is installed")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    count, warnings = build(args.out, args.renderer)
    for line in warnings: print(line, file=sys.stderr)
    missing = sorted({p.stem for p in NBS.glob("*.ipynb")}
                     - {p.stem for p in args.out.glob("*.html")})
    if missing: print(f"not rendered: {', '.join(missing)}", file=sys.stderr)
    print(f"{count} pages: {os.path.relpath(args.out / 'index.html')}")
    return 1 if warnings or missing or not count else 0


if __name__ == "__main__": sys.exit(main())
