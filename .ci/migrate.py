"""Rename runs that were stored before keys contained the version of the method: `python .ci/migrate.py`.

Old keys contain a digest of the code. Runs of the code with the digests below have the results of method 1
and get its keys; runs of other code are not changed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.experiments.config import FacesConfig, RunConfig
from lib.experiments.records import run_key
from lib.experiments.store import RESULTS, write_atomic

CODES = ("d15588d53c715eb9", "22cd644457e302f6")
"""Digests of the same code with torch 2.13 and, on a GPU, with torch 2.11."""


def migrated(content: bytes, name: str = "run") -> tuple[str, bytes]:
    """Return the new key and content of a run's record.

    Raises:
        ValueError: the run has another digest.
    """
    record: dict[str, Any] = json.loads(content)[name]
    kind = RunConfig if record["config"]["dataset"] == "mnist" else FacesConfig
    key, provenance = run_key(kind(**record["config"])), record["provenance"]
    if provenance.get("code") not in CODES:
        raise ValueError(f"its code has another digest, {provenance.get('code')}")
    record["provenance"] = {
        "method" if k == "code" else k: 1 if k == "code" else v for k, v in provenance.items()
    }
    if "run" in provenance:
        provenance["run"] = key
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return key, json.dumps({"sha256": digest, name: record}, indent=1).encode()


def main() -> None:
    store = RESULTS / "runs"
    for path in sorted(store.glob("*/run.json")):
        try:
            key, content = migrated(path.read_bytes())
        except ValueError as error:
            print(f"{path.parent} is not renamed: {error}")
            continue
        write_atomic(path, content)
        path.parent.rename(store / key)
        print(f"{path.parent.name} is renamed to {key}")


if __name__ == "__main__":
    main()
