"README.md from nbs/index.ipynb: `python -m tools.readme`. (`nbdev-readme` stops where Quarto is not installed.)"
import re
import sys

from tools.pages import NBS, ROOT, as_text, directives, read

README = ROOT / "README.md"


def convert():
    "The index page as Markdown: prose, code that is shown, text outputs; links and pictures point into nbs/."
    parts = []
    for cell in read(NBS / "index.ipynb").cells:
        if cell.cell_type == "markdown": parts.append(cell.source)
        elif cell.cell_type == "code":
            marks = directives(cell.source)
            if "hide" in marks or "default_exp" in marks: continue
            code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
            if code and marks.get("echo") != "false": parts.append(f"```python\n{code}\n```")
            for output in cell.outputs:
                data = output.get("data", {})
                if "text/markdown" in data: parts.append(as_text(data["text/markdown"]))
                elif output.output_type == "stream" or "text/plain" in data:
                    parts.append(f"```\n{as_text(output.get('text') or data['text/plain']).rstrip()}\n```")
    text = "\n\n".join(p.strip() for p in parts if p.strip())
    text = re.sub(r"(\]\()(?!https?:|#|mailto:|\.\./)([^)\s]+)", r"\1nbs/\2", text)
    return re.sub(r"\]\(\.\./", "](", text) + "\n"


def main():
    README.write_text(convert(), encoding="utf-8")
    print(f"wrote {README.name} from nbs/index.ipynb")


if __name__ == "__main__": sys.exit(main())
