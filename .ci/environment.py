"""Create the environment: `python3.11 .ci/environment.py .venv`."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"

SOURCES = {"index-url", "extra-index-url", "no-index", "find-links", "cert", "client-cert", "proxy"}
SOURCES |= {"trusted-host", "timeout", "default-timeout", "retries", "cache-dir", "keyring-provider"}
"""Options of pip for the sources of packages and the connection to them."""


def sources(python: Path) -> dict[str, str]:
    """Return the environment variables with the user's `SOURCES` as the only options of pip."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    # With `user = true` in a file, pip lists only the file in the home folder.
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
        sys.exit(f"{sys.executable} has no module venv; install {package}")
    place = Path(folder).resolve()
    made, contents = place / "installed", f"{ROOT}\n{LOCK.read_text()}"
    with (ROOT / f"{folder}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another make is setting up {folder}: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if made.exists() and made.read_text() == contents:
                return
        place.mkdir(parents=True, exist_ok=True)
        venv.create(place, clear=True, symlinks=True, with_pip=True)
        python = place / "bin" / "python"
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["-r", str(LOCK)]
        if subprocess.run(command, env=sources(python)).returncode:
            sys.exit("the packages could not be installed: check the network and run make again")
        (packages,) = place.glob("lib/python3.*/site-packages")
        # With a relative path, a copy of the whole folder imports its own code.
        linked = Path(folder).is_symlink()
        (packages / "repository.pth").write_text(str(ROOT) if linked else os.path.relpath(ROOT, packages))
        made.write_text(contents)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        sys.exit("the set-up was interrupted; run make again")
