"""Make the environment: `python3.11 .ci/environment.py .venv`.

The user's pip configuration decides where packages come from, but not which ones or into what folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SOURCES = {
    "index-url",
    "extra-index-url",
    "no-index",
    "find-links",
    "cert",
    "client-cert",
    "proxy",
    "trusted-host",
    "timeout",
    "default-timeout",
    "retries",
    "cache-dir",
    "keyring-provider",
}
"""pip's options for where it finds packages and how it gets there."""


def sources(python: Path) -> dict[str, str]:
    """Return this process's variables, with no option of pip but the user's sources."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    # With `user = true` in a file, pip would list the user's own file alone.
    listed = subprocess.run(
        [str(python), "-m", "pip", "config", "list"],
        env=os.environ | {"PIP_USER": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    options = dict(line.split("=", 1) for line in listed.stdout.splitlines())
    for section in ("global", "install", ":env:"):
        for name in SOURCES:
            if value := options.get(f"{section}.{name}"):
                variable = f"PIP_{name.upper().replace('-', '_')}"
                variables[variable] = literal_eval(value).strip().replace("\n", " ")
    return variables | {"PIP_CONFIG_FILE": os.devnull}


def main(folder: str) -> None:
    try:
        import ensurepip  # noqa: F401
        import venv
    except ImportError:
        package = f"python3.{sys.version_info.minor}-venv"
        sys.exit(f"{sys.executable} cannot make virtual environments: install its venv module ({package})")
    venv.create(folder, clear=True, symlinks=True, with_pip=True)
    python = ROOT / folder / "bin" / "python"
    lock = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]
    if subprocess.run([*lock, str(ROOT / "requirements.lock")], env=sources(python)).returncode:
        sys.exit("the packages could not be installed: check the network and run make again")
    (packages,) = (ROOT / folder).glob("lib/python3.*/site-packages")
    # Relative, so that even a copy of the whole folder imports its own code.
    (packages / "repository.pth").write_text(os.path.relpath(ROOT, packages))


if __name__ == "__main__":
    main(sys.argv[1])
