"""Package sources of the user's pip configuration, without its other options.

The set-up imports this before any package is installed: standard library only.
"""

from __future__ import annotations

import os
import subprocess
from ast import literal_eval
from pathlib import Path

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
