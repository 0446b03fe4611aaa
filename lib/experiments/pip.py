"""The user's pip configuration: it decides where packages come from, but not which ones or into what folder.

The set-up imports this before any package is there, so it needs the standard library alone.
"""

from __future__ import annotations

import os
import subprocess
from ast import literal_eval
from pathlib import Path

SOURCES = {"index-url", "extra-index-url", "no-index", "find-links", "cert", "client-cert", "proxy"}
SOURCES |= {"trusted-host", "timeout", "default-timeout", "retries", "cache-dir", "keyring-provider"}
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
