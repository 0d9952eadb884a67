"""Fast checks: exports in sync, notebooks clean, README as the index. `python -m tools.check`;
exit 1 names what is off."""
import difflib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools import clean, readme
from tools.pages import NBS, ROOT


def fresh_export(root, target):
    "Export the notebooks of a tree into an empty copy; the folder of the modules made."
    for name in ("pyproject.toml", "settings.ini"): shutil.copy(root / name, target / name)
    shutil.copytree(root / "nbs", target / "nbs",
                    ignore=shutil.ignore_patterns("images", "results", "runs", "*.yml", ".*"))
    (target / "dpo_literate").mkdir()
    shutil.copy(root / "dpo_literate" / "__init__.py", target / "dpo_literate")
    done = subprocess.run([sys.executable, "-c",
                           "from nbdev.export import nb_export; from nbdev.doclinks import "
                           "nbdev_export; nbdev_export()"],
                          cwd=target, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"nbdev-export failed: {done.stderr[-2000:]}")
    return target / "dpo_literate"


def out_of_sync(root=ROOT):
    """File and first line at which `dpo_literate/` differs from what the notebooks export;
    empty when in sync."""
    with tempfile.TemporaryDirectory() as tmp:
        fresh, found = fresh_export(root, Path(tmp)), []
        names = {p.relative_to(d) for d in (fresh, root / "dpo_literate") for p in d.rglob("*.py")}
        for name in sorted(names):
            old, new = root / "dpo_literate" / name, fresh / name
            if not old.exists(): found.append(f"dpo_literate/{name}: missing; run nbdev-export")
            elif not new.exists(): found.append(f"dpo_literate/{name}: no notebook exports it")
            elif old.read_bytes() != new.read_bytes():
                a, b = (p.read_text(encoding="utf-8").splitlines() for p in (old, new))
                line = next((j1 + 1 for tag, j1, *_ in difflib.SequenceMatcher(None, a, b,
                    autojunk=False).get_opcodes() if tag != "equal"), len(a))
                found.append(f"dpo_literate/{name}:{line}: differs from its notebook; edit the "
                             f"notebook and run nbdev-export")
        return found


def main():
    found = out_of_sync()
    found += [f"{path.relative_to(ROOT)}: differs from nbs/index.ipynb; run make readme"
              for path in readme.stale()]
    for line in found: print(line)
    if not found: print("dpo_literate/ is what the notebooks export; README.md is the index")
    unclean = clean.main([str(NBS), "--check"])
    return 1 if found or unclean else 0


if __name__ == "__main__": sys.exit(main())
