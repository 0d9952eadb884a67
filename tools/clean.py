"""Clean notebooks: no counts, no machine's metadata, no warnings of one machine's packages
(stderr), stable ids.
What cannot be read is left as it is.

    python -m tools.clean nbs [--check]     clean in place, or only say what would change (exit 1)
"""
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from fastcore.nbio import dict2nb, nb2str

ADDRESS = re.compile(r"( at) 0x[0-9a-fA-F]+(?=>)")
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


def clean_output(output):
    "One stored output without counts, metadata and memory addresses."
    output = {k: v for k, v in output.items() if k != "execution_count"}
    if output["output_type"] == "execute_result": output["execution_count"] = None
    if "metadata" in output: output["metadata"] = {}
    def plain(v):
        return ([plain(x) for x in v] if isinstance(v, list) else ADDRESS.sub("", v)
                if isinstance(v, str) else v)
    if "text" in output: output["text"] = plain(output["text"])
    for mime in output.get("data", {}):
        if mime == "text/plain": output["data"][mime] = plain(output["data"][mime])
        elif mime.startswith("image/") and isinstance(output["data"][mime], str):
            output["data"][mime] = output["data"][mime].rstrip()
    return output


def clean_text(text):
    """The cleaned notebook as text; ValueError when it is no notebook. Cleaning twice changes
    nothing more."""
    try: nb = json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON (line {e.lineno}): {e.msg}") from None
    if not isinstance(nb, dict) or nb.get("nbformat") != 4 or not isinstance(nb.get("cells"), list):
        raise ValueError("not a version 4 notebook")
    nb["metadata"], nb["nbformat_minor"], seen = KERNEL, 5, set()
    for n, cell in enumerate(nb["cells"]):
        if cell.get("cell_type") not in ("code", "markdown", "raw") or "source" not in cell:
            raise ValueError(f"cell {n} is no cell")
        cell["metadata"] = {}
        if not cell.get("id") or cell["id"] in seen:
            cell["id"] = hashlib.sha256(f"{n}{cell['source']}".encode()).hexdigest()[:8]
        seen.add(cell["id"])
        if cell["cell_type"] == "code":
            cell["execution_count"] = None
            cell["outputs"] = [clean_output(o) for o in cell.get("outputs", [])
                               if o.get("name") != "stderr"]
    return nb2str(dict2nb(nb))


def write_atomic(path, text):
    "Write beside the file, then put it in its place: old bytes or new, never between."
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally: temporary.unlink(missing_ok=True)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    check = "--check" in argv
    named = [Path(a) for a in argv if a != "--check"]
    files = [f for p in named for f in (sorted(p.glob("*.ipynb")) if p.is_dir() else [p])]
    changed, bad = [], 0
    for path in files:
        try: old = path.read_bytes().decode("utf-8"); new = clean_text(old)
        except (ValueError, OSError) as e:
            print(f"{path}: left as it is: {e}", file=sys.stderr)
            bad += 1
            continue
        if new != old:
            changed.append(path)
            if not check: write_atomic(path, new)
    for path in changed:
        print(f"{path}: {'needs cleaning (make clean-nbs)' if check else 'cleaned'}")
    print(f"{len(files)} notebooks, {len(changed)} {'to clean' if check else 'cleaned'}, {bad} "
          f"unreadable")
    return 1 if bad or not files or (check and changed) else 0


if __name__ == "__main__": sys.exit(main())
