"""Makes the environment: `python3.11 .ci/environment.py .venv`.

Where packages come from is the user's affair; which ones, and into what folder, is not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from configparser import RawConfigParser
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
"""Of pip's options those that say where it looks, and how it gets there."""


def configured() -> RawConfigParser:
    """What pip's own files say, the later ones over the earlier ones."""
    home, named = Path.home(), os.environ.get("PIP_CONFIG_FILE", "")
    shared = (os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")
    own = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    files = [
        *(Path(folder, "pip", "pip.conf") for folder in ("/Library/Application Support", *shared)),
        Path("/etc/pip.conf"),
        home / ".pip" / "pip.conf",
        home / "Library" / "Application Support" / "pip" / "pip.conf",
        own / "pip" / "pip.conf",
    ]
    configuration = RawConfigParser()
    configuration.optionxform = lambda name: name.lower().replace("_", "-")
    configuration.read([named] if named == os.devnull else [*files, named])
    return configuration


def sources() -> dict[str, str]:
    """The variables of this process, but of pip's configuration the sources alone."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    configuration = configured()
    for name in SOURCES:
        variable = f"PIP_{name.upper().replace('-', '_')}"
        for section in ("global", "install"):
            if value := configuration.get(section, name, fallback=None):
                variables[variable] = value.strip().replace("\n", " ")
        if variable in os.environ:
            variables[variable] = os.environ[variable]
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
    if subprocess.run([*lock, str(ROOT / "requirements.lock")], env=sources()).returncode:
        sys.exit("the packages could not be installed: check the network and run make again")
    (packages,) = (ROOT / folder).glob("lib/python3.*/site-packages")
    # Relative, so that even a copy of the whole folder imports its own code.
    (packages / "repository.pth").write_text(os.path.relpath(ROOT, packages))


if __name__ == "__main__":
    main(sys.argv[1])
