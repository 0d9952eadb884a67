"The package's metadata, read from settings.ini: the only place where it is written down."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
meta = config["DEFAULT"]


def lines(key): return [line for line in meta[key].splitlines() if line.strip()]


readme = here / "README.md"
setup(
    version=meta["version"],
    description=meta["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else meta["description"],
    long_description_content_type="text/markdown",
    author=meta["author"],
    license=meta["license"],
    keywords=meta["keywords"].split(),
    python_requires=f">={meta['min_python']}",
    install_requires=lines("requirements"),
    extras_require={key.removeprefix("requirements_"): lines(key)
                    for key in meta if key.startswith("requirements_")},
    packages=[meta["lib_path"], f"{meta['lib_path']}.probes"]
    if (here / meta["lib_path"] / "probes").exists() else [meta["lib_path"]],
    package_data={meta["lib_path"]: ["texts/*.txt"]},
    entry_points={"console_scripts": lines("console_scripts"),
                  "nbdev": [f"{meta['lib_path']} = {meta['lib_path']}._modidx:d"]},
)
