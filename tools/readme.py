"""README.md from nbs/index.ipynb: `python -m tools.readme`. (`nbdev-readme` stops where Quarto
is not installed.)"""
import base64
import re
import sys

from tools.pages import NBS, ROOT, as_text, directives, read

README = ROOT / "README.md"


def convert():
    """The index page as Markdown: prose, code that is shown, outputs; links and pictures point
    into nbs/."""
    parts = []
    for cell in read(NBS / "index.ipynb").cells:
        if cell.cell_type == "markdown": parts.append(cell.source)
        elif cell.cell_type == "code":
            marks = directives(cell.source)
            if "hide" in marks or "default_exp" in marks: continue
            code = "\n".join(line for line in cell.source.splitlines()
                             if not line.startswith("#|")).strip()
            if code and marks.get("echo") != "false": parts.append(f"```python\n{code}\n```")
            for output in cell.outputs:
                data = output.get("data", {})
                if "image/png" in data:
                    alt = marks.get("fig-alt", "").strip('"')
                    parts.append(f"![{alt}](images/index_{cell.id}.png)")
                elif "text/markdown" in data: parts.append(as_text(data["text/markdown"]))
                elif output.output_type == "stream" or "text/plain" in data:
                    said = as_text(output.get("text") or data["text/plain"]).rstrip()
                    parts.append(f"```\n{said}\n```")
    text = "\n\n".join(p.strip() for p in parts if p.strip())
    text = re.sub(r"(\]\()(?!https?:|#|mailto:|\.\./)([^)\s]+)", r"\1nbs/\2", text)
    return re.sub(r"\]\(\.\./", "](", text) + "\n"


def pictures():
    "The index page's figures, as the files README shows: path and bytes."
    cells = [c for c in read(NBS / "index.ipynb").cells if c.cell_type == "code"]
    return {NBS / "images" / f"index_{c.id}.png": base64.b64decode(as_text(o.data["image/png"]))
            for c in cells for o in c.outputs if "image/png" in o.get("data", {})}


def stale():
    "What of README.md and its pictures is not as the index page has it."
    found = [] if README.exists() and README.read_text(encoding="utf-8") == convert() else [README]
    return (found + [path for path, data in pictures().items() if not path.exists()
                     or path.read_bytes() != data])


def main():
    README.write_text(convert(), encoding="utf-8")
    for path, data in pictures().items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    print(f"wrote {README.name} and {len(pictures())} pictures from nbs/index.ipynb")


if __name__ == "__main__": sys.exit(main())
