"""Program of test_real_trackers: two starts of a run with one tracker, and what the tracker has.

track_a_run.py SITE_PACKAGES RUN NAME: prints {metric: [[step, value], ...]} as one line of JSON.
The first start logs steps 1 to 3; the second resumes from step 2 and logs steps 3 and 4.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATIENCE_S = 240
"""The end of a run waits less, but a busy machine's imports are not what is tested."""


def main(run: Path, name: str) -> None:
    from spmdrl.observe.metrics import MetricsWriter
    from spmdrl.observe.trackers.registry import outbox_of, send_metrics

    config = {"seed": 1, "train": {"lr": 1e-5}}
    with MetricsWriter(run, is_first=True) as metrics:
        box = outbox_of(run, name, config)
        metrics.track([box])
        for step in (1, 2, 3):
            metrics.write(step, {"reward": step / 10, "eval/held_out/pass@1": 0.5})
        metrics.write_samples(3, [{"prompt": "What?", "reward": 0.25}])
        assert box.close(PATIENCE_S)
    with MetricsWriter(run, is_first=True) as metrics:
        metrics.truncate_to(2)
        box = outbox_of(run, name, config, first_step=metrics.next_step)
        metrics.track([box])
        for step in (3, 4):
            metrics.write(step, {"reward": step / 10, "loss": float("nan")})
        assert box.close(PATIENCE_S)
    sent = {} if name == "tensorboard" else send_metrics(run, [name], config)
    assert not any(sent.values()), sent
    place = run / "trackers" / name
    print(json.dumps(READERS[name](run if name == "tensorboard" else place)))


def of_mlflow(place: Path) -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{place.resolve() / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("spmdrl").experiment_id])
    names = ("reward", "eval/held_out/pass_1")
    found = {
        n: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, n)] for n in names
    }
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["config.json", "samples"]
    return {name.replace("pass_1", "pass@1"): values for name, values in found.items()}


def of_trackio(place: Path) -> dict[str, Any]:
    import sqlite3

    with sqlite3.connect(place / "spmdrl.db") as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    return by_name([(step, json.loads(text)) for step, text in rows])


def of_wandb(place: Path) -> dict[str, Any]:
    from wandb.proto import wandb_internal_pb2

    records = []
    for file in sorted(place.glob("wandb/offline-run-*/run-*.wandb")):
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") != "history":
                continue
            items = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            records.append((items["train_step"], items))
    return by_name(records)


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a log as LevelDB writes it, whose file begins with a header of seven bytes."""
    at, block, whole = 7, 32768, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # too short for a record's head
            at += block - at % block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a full one, or the last part
            yield whole
            whole = b""


def of_tensorboard(run: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    names = ("reward", "eval/held_out/pass@1")
    return {n: [[e.step, round(e.value, 3)] for e in events.Scalars(n)] for n in names}


def of_jsonl(place: Path) -> dict[str, Any]:
    lines = map(json.loads, (place / "log.jsonl").read_text().splitlines())
    return by_name([(line["step"], line) for line in lines])


def by_name(records: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    names = ("reward", "eval/held_out/pass@1")
    return {n: [[step, own[n]] for step, own in records if n in own] for n in names}


READERS = {
    "mlflow": of_mlflow,
    "trackio": of_trackio,
    "wandb": of_wandb,
    "tensorboard": of_tensorboard,
    "jsonl": of_jsonl,
}


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    main(Path(sys.argv[2]), sys.argv[3])
