"""What trackers are given, and what they kept of it: run in .venv-trackers, which has both of them."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

SAMPLES = [
    {
        "prompt": f"{i}",
        "completion": "\ud800 x",
        "answer": "4",
        "reward": float("nan"),
        "tokens": 3,
        "source": "s",
        "finish_reason": "stop",
    }
    for i in range(200)
]
STEP = 50


def main(folder: Path) -> dict:
    """Give both a table and a page, without a network; what is then in their files."""
    warnings.simplefilter("ignore")
    from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

    from nemo_aapo.report.trackers import Trackers

    loggers = [WandbLogger(save_dir=folder, offline=True), MLFlowLogger("e", tracking_uri=f"file:{folder}/mlruns")]
    notes: list[str] = []
    trackers, page = Trackers(loggers, notes.append), folder / "report.html"
    page.write_text("<p>a page</p>")
    trackers.completions(STEP, SAMPLES)
    trackers.page(page)
    loggers[0].experiment.finish()
    return {"notes": notes, "wandb": wandb_records(folder)}


def wandb_records(folder: Path) -> dict:
    """Tables and artifacts that an offline run of Weights & Biases has on the disk to be uploaded."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    store, artifacts, steps = DataStore(), [], []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "artifact":
            artifacts.append([record.artifact.type, [entry.path for entry in record.artifact.manifest.contents]])
        elif kind == "history":
            values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            steps.append(int(values["trainer/global_step"]))
    return {"artifacts": artifacts, "steps": steps}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
