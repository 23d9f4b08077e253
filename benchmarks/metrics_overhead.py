"""What writing a step's row costs the run: with every sink that is installed, beside the seconds of the step.

    python benchmarks/metrics_overhead.py RUN [--short]

The rows are those of a run's `metrics.jsonl`, written again. Time is what the run waits for; the rest is the sinks'.
The last line is JSON: `share` is the median write over the median step, `share_max` the longest write over it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from polyturn.configs.schema.metrics import MetricsConfig
from polyturn.trainer.sinks.factory import PACKAGES, RunSinks
from polyturn.trainer.sinks.json_lines import JsonLinesSink, finite_rows
from polyturn.trainer.sinks.protocol import SinkStart

OPTIONS = {"wandb": {"mode": "offline"}, "prometheus": {"port": 0}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    rows = [row for _, row in finite_rows(arguments.run / "metrics.jsonl")]
    kinds = [kind for kind, package in PACKAGES.items() if find_spec(package)]
    config = MetricsConfig.model_validate(
        {"sinks": [{"kind": kind, **OPTIONS.get(kind, {})} for kind in kinds]}
    )
    num_rows = 50 if arguments.short else 500
    taken = []
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch)
        start = SinkStart(run_dir=run_dir, config={}, last_step=0, history=list, tell=print)
        sinks = RunSinks(config, start, JsonLinesSink(run_dir / "metrics.jsonl", last_step=0))
        time.sleep(3.0)  # until all are open
        for step in range(1, num_rows + 1):
            row = rows[step % len(rows)]
            began = time.perf_counter()
            sinks.write(step, row)
            taken.append(time.perf_counter() - began)
            time.sleep(0.02)
        sinks.close()
    seconds = statistics.median(row["seconds/step"] for row in rows)
    waited = statistics.median(taken)
    print(
        json.dumps(
            {
                "sinks": kinds,
                "figures": len(rows[-1]),
                "ms_per_row": round(1000 * waited, 3),
                "ms_per_row_max": round(1000 * max(taken), 3),
                "step_seconds": round(seconds, 2),
                "share": waited / seconds,
                "share_max": max(taken) / seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
