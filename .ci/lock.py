"""Resolve environment.yml for several versions of Python: `python3.11 .ci/lock.py python3.11 python3.13`.

Packages of all versions stand in requirements.lock without a marker, others with the versions of Python that
need them. Packages for GPUs are left out, because torch pins them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def resolve(python: str, pins: list[str], constraints: set[str]) -> tuple[str, set[str]]:
    """Return the version of a Python, and the packages that pip would install in a new environment.

    Args:
        python: path of the interpreter.
        pins: direct dependencies.
        constraints: required versions of other packages, from the versions of Python before.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        file = Path(folder, "constraints.txt")
        file.write_text("\n".join(constraints))
        pip = [str(Path(folder, "bin", "python")), "-m", "pip", "install", "--disable-pip-version-check"]
        ask = ["--quiet", "--dry-run", "--ignore-installed", "--report", "-", "-c", str(file)]
        report = json.loads(subprocess.run([*pip, *ask, *pins], check=True, stdout=subprocess.PIPE).stdout)
    packages = (each["metadata"] for each in report["install"])
    lines = {f"{each['name']}=={each['version'].partition('+')[0]}" for each in packages}
    version: str = report["environment"]["python_version"]
    return version, {line for line in lines if not re.match("nvidia|cuda|triton", line)}


def main(pythons: list[str]) -> None:
    environment = (ROOT / "environment.yml").read_text(encoding="utf-8")
    pins = re.findall(r"^ *- ([\w-]+==.*)$", environment, flags=re.MULTILINE)
    resolved: dict[str, set[str]] = {}
    for python in pythons:
        version, lines = resolve(python, pins, set().union(*resolved.values()))
        resolved[version] = lines
    text = ["# The whole resolved set, made by `make lock` from environment.yml."]
    for line in sorted(set().union(*resolved.values()), key=str.lower):
        needed = [version for version, lines in resolved.items() if line in lines]
        marker = " or ".join(f'python_version == "{version}"' for version in needed)
        text.append(line if len(needed) == len(resolved) else f"{line} ; {marker}")
    (ROOT / "requirements.lock").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
