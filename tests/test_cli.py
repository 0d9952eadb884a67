"The command line in a process of its own: exit codes, one sentence, nothing written."
import json
import os
import subprocess
import sys

import pytest

GOOD = dict(prompt="How was lunch?", chosen="Lovely.", rejected="Bad.")
line = json.dumps


def call(*argv, cwd):
    code = "import sys; from dpo_literate.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1"})


BAD = {
    "wrong column": ("pairs.jsonl:1", line(dict(question="a", good="b", bad="c")) + "\n"),
    "empty file": ("pairs.jsonl", ""),
    "cut-off line": ("pairs.jsonl:2", line(GOOD) + "\n" + line(GOOD)[:30]),
    "identical pair": ("pairs.jsonl:2", line(GOOD) + "\n" + line({**GOOD, "chosen": "Bad."}) + "\n"),
    "null reply": ("pairs.jsonl:1", line({**GOOD, "rejected": None}) + "\n"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gets_one_sentence_with_its_place(name, tmp_path):
    place, text = BAD[name]
    file = tmp_path / "pairs.jsonl"
    file.write_text(text)
    done = call("check-data", file, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and place in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == [file]


def test_a_missing_file_and_an_unknown_command(tmp_path):
    assert call("check-data", tmp_path / "nowhere.jsonl", cwd=tmp_path).returncode == 2
    assert call("fly", cwd=tmp_path).returncode == 2
    assert not list(tmp_path.iterdir())


def test_a_good_file_passes(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(line(GOOD) + "\n")
    done = call("check-data", file, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "1 pairs" in done.stdout


def test_help_does_not_load_torch(tmp_path):
    code = "import sys\nfrom dpo_literate.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=60).returncode == 0


def test_terminal_control_stays_text(capsys):
    from dpo_literate.cli import complain
    complain("a\x1b[2Jb\nc")
    assert capsys.readouterr().err == "a\\x1b[2Jb\\nc\n"
