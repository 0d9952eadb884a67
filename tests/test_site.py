"""The site, as a reader meets it: rendered once, every page opened in a headless Chromium from
the disk, nothing asked of the network."""
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup
from filelock import FileLock

from tools import pages, site

PAGES = [p.stem for p in pages.pages()]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
TREE = ("pyproject.toml", "settings.ini", "_quarto.yml", "tools", "dpo_literate")


def render(tree, notebooks):
    "Render notebooks in a copy of the tree; the folder of the site and what the command said."
    for name in TREE:
        source = pages.ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else: shutil.copy(source, tree / name)
    (tree / "nbs").mkdir()
    (tree / "nbs" / "_quarto.yml").symlink_to("../_quarto.yml")
    shutil.copy(pages.NBS / "styles.css", tree / "nbs")
    for path in notebooks:
        (shutil.copytree(path, tree / "nbs" / path.name) if path.is_dir()
         else shutil.copy(path, tree / "nbs"))
    done = subprocess.run([sys.executable, "-m", "tools.site", "--renderer", "smalldocs", "--out",
                           str(tree / "_docs")], cwd=tree, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"})
    return tree / "_docs", done


@pytest.fixture(scope="session")
def docs(tmp_path_factory, worker_id):
    "The rendered site: once for all worker processes."
    shared = (tmp_path_factory.getbasetemp() if worker_id == "master"
              else tmp_path_factory.getbasetemp().parent)
    with FileLock(shared / "site.lock"):
        log = shared / "site.json"
        if not log.exists():
            (shared / "site").mkdir()
            folder, done = render(shared / "site",
                                  [p for p in pages.NBS.iterdir() if p.suffix == ".ipynb"
                                   or p.is_dir() and p.name in ("images", "results")])
            log.write_text(json.dumps([str(folder), done.returncode, done.stdout, done.stderr]))
    folder, code, out, err = json.loads(log.read_text())
    assert Path(folder, "index.html").exists(), f"the site was not rendered:\n{out}\n{err}"
    return Path(folder)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("DPO_LITERATE_REQUIRE_BROWSER") == "1":
            pytest.fail("no chromium on the PATH, and DPO_LITERATE_REQUIRE_BROWSER=1 asks for one")
        pytest.skip("no chromium on the PATH (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM,
                                       args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield running
        running.close()


# ------------------------------------------------------------ what is wrong with a page, in words

LOOK = r"""() => {
  const found = [], de = document.documentElement;
  if (de.scrollWidth > de.clientWidth) {
    const wide = [...document.querySelectorAll('body *')]
      .find(e => e.getBoundingClientRect().right > de.clientWidth + 1);
    const first = wide ? wide.tagName + '.' + wide.className : '?';
    found.push(`scrolls sideways: ${de.scrollWidth} > ${de.clientWidth}, first ${first}`);
  }
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), pairs = new Map();
  const rgb = c => {
    const v = (c.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
    const unit = c.startsWith('color(srgb') ? 255 : 1;
    return [v[0] * unit, v[1] * unit, v[2] * unit, v[3] ?? 1];
  };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const linear = x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const light = c => {
    const [r, g, b] = c.map(linear);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  for (let node; node = walk.nextNode();) {
    const text = node.data.trim(), e = node.parentElement;
    if (!text || e.closest('script,style,noscript')) continue;
    if (!e.closest('pre,code') && /\$\$|\\\(|\\\[|\\[a-z]{3,}\{/.test(text))
      found.push(`raw TeX: ${text.slice(0, 60)}`);
    if (!e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
    const style = getComputedStyle(e), layers = [];
    let opacity = 1;
    for (let p = e; p; p = p.parentElement) {
      const b = rgb(getComputedStyle(p).backgroundColor);
      if (b[3]) layers.push(b);
      opacity *= getComputedStyle(p).opacity;
      if (b[3] === 1) break;
    }
    const back = layers.reverse().reduce((below, l) => over(l, below), [255, 255, 255, 1]);
    const ink = rgb(style.color); ink[3] *= opacity;
    const a = light(over(ink, back)), b = light(back);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || size >= 18.6 && +style.fontWeight >= 700;
    const colours = `${style.color} on ${back.map(Math.round)}`;
    const what = `${e.tagName}.${e.className} "${text.slice(0, 30)}" ${colours}`;
    if (ratio < (large ? 3 : 4.5)) pairs.set(colours, `contrast ${ratio.toFixed(2)}: ${what}`);
  }
  found.push(...pairs.values());
  for (const img of [...document.images].filter(img => !img.complete || !img.naturalWidth))
    found.push(`picture not shown: ${img.src.slice(0, 60)}`);
  for (const e of document.querySelectorAll('merror, .katex-error, nav a a, main a a'))
    found.push(`broken element ${e.tagName}`);
  const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
  found.push(...new Set(ids.filter((id, n) => ids.indexOf(id) !== n).map(id => `id twice: ${id}`)));
  return found;
}"""


def faults(browser, url, folder, width=1280, scheme="light"):
    "Open one page and look; everything that is wrong, in words."
    found = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    inside = Path(folder).as_uri()
    tab.on("console", lambda m: m.type in ("error", "warning")
           and found.append(f"console: {m.text}"))
    tab.on("pageerror", lambda e: found.append(f"script: {e}"))
    tab.on("requestfailed", lambda r: found.append(f"request failed: {r.url}"))
    tab.on("request", lambda r: r.url.startswith((inside, "data:", "about:"))
           or found.append(f"asked outside its folder: {r.url}"))
    tab.goto(url, wait_until="load")
    found += tab.evaluate(LOOK)
    context.close()
    return found


@pytest.mark.parametrize("stem", PAGES)
def test_every_page_opens_without_a_fault(docs, browser, stem):
    url = (docs / f"{stem}.html").as_uri()
    found = {(width, scheme): faults(browser, url, docs, width, scheme)
             for width, scheme in ((1280, "light"), (390, "light"), (1280, "dark"))}
    assert not any(found.values()), "\n".join(f"{stem} at {w} px, {s}: {line}"
                                              for (w, s), lines in found.items() for line in lines)


WIDE = """() => [...document.querySelectorAll('main .sourceCode')].filter(box =>
    [box, ...box.querySelectorAll('pre, code')].some(e => e.scrollWidth > e.clientWidth + 1
        && getComputedStyle(e).display !== 'inline')).map(box => box.innerText.slice(0, 60))"""


def cut_code(browser, urls):
    "Pages with code that is cut off or scrolls sideways at 1280 px, and how such code begins."
    tab, found = browser.new_page(viewport={"width": 1280, "height": 900}), {}
    for url in urls:
        tab.goto(url)
        assert tab.evaluate("!!document.querySelector('main')"), url
        found[url.rpartition("/")[2]] = tab.evaluate(WIDE)
    tab.close()
    return {page: code for page, code in found.items() if code}


def test_no_line_of_code_is_cut_off(docs, browser):
    "All pages but those whose lines are known to be too long still (pyproject.toml)."
    config = tomllib.loads((pages.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ignored = config["tool"]["ruff"]["lint"]["per-file-ignores"]
    waits = {Path(name).stem for name, rules in ignored.items() if "E501" in rules}
    shown = [stem for stem in PAGES if stem not in waits]
    assert shown and not cut_code(browser, [(docs / f"{stem}.html").as_uri() for stem in shown])


def test_a_line_of_101_columns_would_be_cut_off(docs, browser, tmp_path):
    "On the site's own style: 100 columns fit, and a few more do not."
    text = (docs / "04_losses.html").read_text(encoding="utf-8")
    first = re.search(r'<div class="sourceCode.*?<code[^>]*>(.*?)</code>', text, re.S)
    shutil.copytree(docs / "site_libs", tmp_path / "site_libs")
    shutil.copy(docs / "styles.css", tmp_path)
    for columns in (100, 110):
        code = text[:first.start(1)] + "x" * columns + text[first.end(1):]
        (tmp_path / f"planted{columns}.html").write_text(code, encoding="utf-8")
    found = cut_code(browser, [(tmp_path / f"planted{n}.html").as_uri() for n in (100, 110)])
    assert [page for page, code in found.items() if "x" * 60 in code] == ["planted110.html"]


FAULTY = """<!doctype html><html><head><title>x</title></head>
<body style="background:#fff;color:#000">{}</body></html>"""


@pytest.mark.parametrize("body,seen", [
    ("<p>fine <code>$$</code></p>", ""), ("<p>Let $$x$$ be</p>", "raw TeX"),
    (r"<p>Let \(x\) be</p>", "raw TeX"), ("<div style='width:3000px'>wide</div>", "sideways"),
    ("<p style='color:#ccc'>pale</p>", "contrast"), ("<img src='gone.png'>", "request failed"),
    ("<img src='http://192.0.2.1/x.png'>", "outside its folder"),
    ("<script>console.error('no')</script>", "console: no"),
    ("<script>nothing()</script>", "script:"), ("<p id=a>1</p><p id=a>2</p>", "id twice"),
    ("<iframe src='https://192.0.2.1/'></iframe>", "outside its folder")])
def test_each_fault_is_seen(tmp_path, browser, body, seen):
    "The look at a page can fail: one planted fault at a time."
    (tmp_path / "planted.html").write_text(FAULTY.format(body))
    found = faults(browser, (tmp_path / "planted.html").as_uri(), tmp_path)
    assert any(seen in line for line in found) if seen else not found, found


# ------------------------------------------------------------ links, order, search

def dead_links(folder):
    """Links and sources of all pages that lead nowhere: to a file that is not there or an
    anchor its page lacks."""
    soups = {p.name: BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser")
             for p in Path(folder).glob("*.html")}
    ids = {name: {e["id"] for e in soup.find_all(id=True)} for name, soup in soups.items()}
    found = []
    for name, soup in soups.items():
        for e in soup.find_all(href=True) + soup.find_all(src=True):
            parts = urlsplit(e.get("href") or e.get("src") or "")
            if parts.scheme: continue
            target = (unquote(parts.path).removeprefix("./")
                      or ("index.html" if parts.path else name))
            if not (Path(folder) / target).is_file(): found.append(f"{name}: {target} is not there")
            elif parts.fragment and unquote(parts.fragment) not in ids.get(target, set()):
                found.append(f"{name}: {target} has no #{unquote(parts.fragment)}")
    return sorted(set(found))


def test_no_link_leads_nowhere(docs): assert not dead_links(docs)


def test_a_dead_link_is_seen(tmp_path):
    (tmp_path
     / "a.html").write_text('<p id="here"></p><a href="#here"></a><a href="#gone"></a><a '
                            'href="b.html"></a><a href="c.html#x"></a><img src="d.png">')
    (tmp_path / "c.html").write_text("")
    assert (dead_links(tmp_path) == ["a.html: a.html has no #gone", "a.html: b.html is not there",
                                     "a.html: c.html has no #x", "a.html: d.png is not there"])


def test_the_site_names_no_machine_and_no_folder_it_was_made_in(docs):
    from test_repo import traces
    for path in [*docs.glob("*.html"), *docs.glob("*.js"), *docs.glob("*.css")]:
        text = re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "",
                      path.read_text(encoding="utf-8"))
        assert not traces(text) and str(docs.parent) not in text, path.name


def test_next_and_previous_visit_every_page_once(docs):
    def neighbour(name, side):
        link = BeautifulSoup((docs / name).read_text(encoding="utf-8"),
                             "html.parser").select_one(f".nav-page-{side} a")
        return link and unquote(link["href"])
    order = ["index.html"]
    while len(order) <= len(PAGES) and (following := neighbour(order[-1], "next")):
        order.append(following)
    assert sorted(order) == sorted(f"{p}.html" for p in PAGES)
    assert [neighbour(name, "previous") for name in order] == [None, *order[:-1]]
    numbered = [n for n in order if re.match(r"(0[1-9]|10|11_|11b|12|13_|1[4-9]|[234])", n)]
    assert numbered == sorted(numbered, key=lambda n: n.replace("_", " "))


def test_every_section_of_the_sidebar_has_pages(docs):
    soup = BeautifulSoup((docs / "index.html").read_text(encoding="utf-8"), "html.parser")
    sections = soup.select("#quarto-sidebar .sidebar-item-section")
    assert sections and all(s.select(".sidebar-section a") for s in sections)


@pytest.mark.parametrize("width", [1280, 390])
def test_search_finds_a_term_and_opens_its_page(docs, browser, width):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme="dark")
    tab = context.new_page()
    tab.goto((docs / "index.html").as_uri())
    if width < 600: tab.click(".quarto-btn-toggle")
    tab.fill("input[type=search]", "Bradley")
    hit = tab.wait_for_selector(".smalldocs-search-results a")
    assert "Bradley" in tab.inner_text(".smalldocs-search-results") and tab.evaluate(LOOK) == []
    box = tab.locator(".smalldocs-search-results").bounding_box()
    x, y = box["x"] + box["width"] - 20, box["y"] + 20
    shown = f"!!document.elementFromPoint({x}, {y}).closest('.smalldocs-search-results')"
    assert box["width"] > 300 and tab.evaluate(shown), "the results are cut off"
    hit.click()
    tab.wait_for_load_state()
    assert "Bradley" in tab.inner_text("main") and "index.html" not in tab.url
    context.close()


# ------------------------------------------------------------ equations and reference

CODE = re.compile(r"```.*?```|`[^`\n]*`", re.S)
TEX = re.compile(r"\$\$.+?\$\$|(?<![\\$])\$(?!\s)[^$]+?(?<![\s\\])\$(?!\d)", re.S)


@pytest.mark.parametrize("stem", PAGES)
def test_every_equation_is_mathml(docs, stem):
    cells = [c for c in pages.read(pages.NBS / f"{stem}.ipynb").cells if c.cell_type == "markdown"]
    wanted = [m for c in cells for m in TEX.findall(CODE.sub("", c.source))]
    text = (docs / f"{stem}.html").read_text(encoding="utf-8")
    plain = re.sub(r'"data:[^"]*"', "", text).lower()   # the letters of a picture spell anything
    assert text.count("<math ") == len(wanted) and "katex" not in plain and "mathjax" not in plain
    assert text.count('class="eqno"') == sum("\\tag" in m for m in wanted)


def test_an_equation_the_converter_does_not_know_stops_the_build():
    assert ("<mfrac>" in site.mathml(r"\frac12 \tag{1.1}", True)
            and "(1.1)" in site.mathml(r"x \tag{1.1}", True))
    with pytest.raises(ValueError, match=r"07.*\\nosuch"): site.mathml(r"\nosuch{x}", False, "07")


def test_the_reference_lists_every_public_name_once(docs, real_tree):
    for module, path in site.home_of_modules().items():
        soup = BeautifulSoup((docs / f"{path.stem}.html").read_text(encoding="utf-8"),
                             "html.parser")
        names = [h.get_text() for h in soup.select("section#module-reference h3")]
        assert names == site.public_symbols(module), path.name
    losses = BeautifulSoup((docs / "04_losses.html").read_text(encoding="utf-8"),
                           "html.parser").find(id="ref-dpo_loss").get_text()
    assert ("policy_chosen_logps" in losses and "beta" in losses and "0.1" in losses
            and "returns" in losses)


# ------------------------------------------------------------ T57: what a run printed is text

HOSTILE = ["<script>window.hit=1</script>", "<img src=x onerror='window.hit=2'>",
           '{"a": "</script><script>window.hit=3</script>"}', "[x](javascript:window.hit=4)",
           "<svg onload='window.hit=5'><circle r='9'/></svg>",
           "$\\href{javascript:window.hit=6}{x}$",
           "\x1b]8;;http://192.0.2.1\x07link\x1b]8;;\x07 \x1b[31mred\x1b[0m",
           "<a href='data:text/html,<script>window.hit=7</script>'>d</a>",
           "```{=html}\n<script>window.hit=8</script>\n```",
           "`<script>window.hit=9</script>`{=html}",
           "::: {.column-screen onclick='window.hit=10'}\nx\n:::",
           "{{< include ../pyproject.toml >}}", "![i](http://192.0.2.1/i.png)",
           "<iframe src='http://192.0.2.1'></iframe>",
           "<style>body{display:none}</style>",
           "<p style='position:fixed;inset:0' onmouseover='window.hit=11'>over</p>",
           "`````\n<script>window.hit=12</script>\n`````",
           "x{onclick='window.hit=13'}", "</code></pre></div><script>window.hit=14</script>",
           "<math><mtext><script>window.hit=15</script></mtext></math>"]


@pytest.fixture(scope="module")
def hostile_site(tmp_path_factory):
    out, v4 = [], nbformat.v4
    for text in HOSTILE:
        out += [v4.new_output("stream", text=text + "\n"),
                v4.new_output("stream", name="stderr", text=text),
                v4.new_output("display_data", {"text/plain": text}),
                v4.new_output("display_data", {"text/html": text, "text/plain": "p"}),
                v4.new_output("display_data", {"text/markdown": text, "text/plain": "p"}),
                v4.new_output("display_data", {"image/svg+xml": text, "text/plain": "p"}),
                v4.new_output("display_data", {"text/latex": text, "text/plain": "p"}),
                v4.new_output("display_data", {"application/javascript": text, "text/plain": "p"}),
                v4.new_output("error", ename=text, evalue=text, traceback=[text])]
    cells = [v4.new_markdown_cell("# Hostile\n\n> What a run printed is text."),
             v4.new_markdown_cell("## Outputs"),
             *(v4.new_code_cell("x", outputs=out[n:n + 9]) for n in range(0, len(out), 9))]
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "src").mkdir()
    for name, page in (("index", [v4.new_markdown_cell("# Index\n\n> Start.")]),
                       ("01_hostile", cells)):
        nbformat.write(v4.new_notebook(cells=page), folder / "src" / f"{name}.ipynb")
    (folder / "tree").mkdir()
    made, done = render(folder / "tree", sorted((folder / "src").iterdir()))
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def test_outputs_never_become_markup(hostile_site, browser):
    tab, asked = browser.new_page(), []
    tab.on("request", lambda r: asked.append(r.url))
    tab.goto((hostile_site / "01_hostile.html").as_uri())
    tab.wait_for_timeout(300)
    assert tab.evaluate("window.hit") is None
    assert all(url.startswith(hostile_site.as_uri()) for url in asked), asked
    bad = tab.evaluate("""() => [...document.querySelectorAll('main *')].filter(e =>
        /^(script|iframe|style|svg|object|embed|img)$/i.test(e.tagName)
        || [...e.attributes].some(a => a.name.startsWith('on') || a.name === 'style'
            || /^\\s*(javascript|data):/i.test(a.value))).map(e => e.outerHTML.slice(0, 90))""")
    assert bad == []
    text = tab.inner_text("main")
    assert ("window.hit=1<" in text and "{{< include ../pyproject.toml >}}" in text
            and "build-backend" not in text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]",
                         (hostile_site / "01_hostile.html").read_text(encoding="utf-8"))
    tab.close()


def test_without_the_cleaning_a_hostile_output_would_run():
    "The payloads are real: smalldocs alone passes HTML outputs through."
    from smalldocs.notebook import output_html
    raw = nbformat.v4.new_output("display_data", {"text/html": HOSTILE[0]})
    assert HOSTILE[0] in output_html(raw) and "<script" not in str(site.inert(raw))
