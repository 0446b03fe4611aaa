"""Copy figures to the committed results: `python .ci/keep.py --profile overnight fig02 fig03`.

For `overnight` the runs of all committed figures are copied too, and runs that no figure needs are removed.
Then the generated tables of the pages are updated.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_LZMA, ZipFile, ZipInfo

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.experiments.config import RunConfig, require_name
from lib.experiments.provenance import PROVENANCE
from lib.experiments.records import COMMITTED, packed, read_json, read_weights, record_config, sealed_json
from lib.experiments.store import RESULTS, sealed, write_atomic

LEVELS = 32
"""Steps per standard deviation to which dense weights of committed runs are rounded; this changes the PSNR
over the test images by less than 0.02 dB."""


def keep_run(path: Path, results: Path) -> None:
    """Write a stored run to a committed file, named by its key.

    Args:
        path: `<key>.zip`, with rounded dense weights, or `<key>.json`, without weights.
        results: folder of the results with the stored run.
    """
    stored = results / "runs" / path.stem
    if path.suffix == ".json":
        write_atomic(path, (stored / "run.json").read_bytes())
        return
    record, weights = read_json(stored / "run.json", "run"), read_weights(stored)
    if isinstance(record_config(record), RunConfig):
        weights = {name: _rounded(weight).half() for name, weight in weights.items()}
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as archive:
        # Omit the time, so that equal runs give identical files.
        archive.writestr(ZipInfo("run.json"), sealed_json("run", record), ZIP_DEFLATED)
        archive.writestr(ZipInfo("weights.pt"), packed(weights), ZIP_LZMA)
    write_atomic(path, sealed(buffer.getvalue()))


def _rounded(weight: Tensor) -> Tensor:
    """Round a matrix of weights to `LEVELS`: weights with few distinct values compress well."""
    step = weight.std() / LEVELS
    return (weight / step).round() * step if weight.ndim == 2 else weight


def keep(name: str, profile: str, results: Path = RESULTS) -> Path:
    """Copy the results of a notebook to the committed results, and return their folder.

    Args:
        name: name of the notebook, such as `fig02`.
        profile: name of the profile; for `quick` the runs are not committed.
        results: folder of the results.
    """
    require_name("profile", profile, COMMITTED)
    committed = results / COMMITTED[profile]
    for path in sorted((results / profile / name).iterdir()):
        if path.suffix in (".png", ".csv", ".json"):
            write_atomic(committed / name / path.name, path.read_bytes())
    if profile == "quick":
        return committed / name
    origins = [json.loads(path.read_bytes()) for path in committed.glob(f"*/{PROVENANCE}")]
    whole = {key for origin in origins for key in origin.get("runs", ())}
    alone = {key for origin in origins for key in origin.get("histories", ())} - whole
    runs, needed = committed / "runs", {f"{key}.zip" for key in whole} | {f"{key}.json" for key in alone}
    for file in sorted(needed):
        if not (runs / file).exists():
            keep_run(runs / file, results)
    for path in runs.glob("*"):
        if path.name not in needed:
            path.unlink()
    return committed / name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", metavar="figNN")
    parser.add_argument("--profile", default="quick")
    options = parser.parse_args()
    for name in options.names:
        if (RESULTS / options.profile / name).is_dir():
            print(keep(name, options.profile))
        else:
            print(f"{name} has no results; run `make {name} PROFILE={options.profile}`", file=sys.stderr)
    import evidence

    evidence.main()
