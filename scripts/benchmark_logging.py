"""What MLflow costs a training: logs the rows of a finished one again, one at a time, and prints the ratio of the seconds.

The cost is all processor time of this process from the import of mlflow on, in every thread, and the time that the logging calls made the
training wait. (The sender works beside the training; on a machine with an idle core it costs less.)
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from PIL import Image

from ctrl import errors, tracking
from ctrl.io import read_rows
from scripts.common import add_config_argument, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument(
        "--adapter", type=Path, required=True, help="folder of a trained adapter: history.jsonl and the files that are logged"
    )
    parser.add_argument("--tracking-uri", help="a server (default: a new sqlite file)")
    args = parser.parse_args()
    config, rows = load_config(args), read_rows(args.adapter / "history.jsonl")
    picture = Image.effect_noise((768, 384), 80).convert("RGB")  # nothing compresses worse
    waited, started = 0.0, time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        uri = args.tracking_uri or f"sqlite:///{folder}/mlflow.db"
        before = time.perf_counter()
        with tracking.run(config, "benchmark", "finetune", {}, uri, folder, patience_seconds=600) as run:
            waited += time.perf_counter() - before
            for row in rows:
                before = time.perf_counter()
                run.log_metrics(row, row["update"])
                if "oracle_accuracy" in row:
                    run.log_image(picture, "probe", row["update"])
                waited += time.perf_counter() - before
                run.wait_until_sent()  # no two updates in one request, as in a training
            for file in sorted(args.adapter.glob("*.*")):
                run.log_artifact(file)
        processor = time.process_time() - started
    training = sum(row["seconds"] for row in rows)
    result = {
        "updates": len(rows),
        "training, s": round(training, 1),
        "logging, processor s": round(processor, 2),
        "of which the training waits, s": round(waited, 2),
        "logging / training": round(max(processor, waited) / training, 5),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    errors.main(main)
