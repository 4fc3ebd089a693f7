"""Send MLflow what it does not have: the runs of scripts that found no server, lost it, or were killed. Each arrives once."""

import argparse
import os
import sys
from pathlib import Path

from ctrl import errors, tracking


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="User and password: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, as for every script."
    )
    parser.add_argument("--folder", type=Path, default=Path("results"), help="holds mlflow-unsent/ (default: %(default)s)")
    parser.add_argument("--to", metavar="URI", help="send all of it to this server (default: each run to the one it was meant for)")
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise errors.UserError(f"--folder is {args.folder}; there is no such folder; name the one that the scripts write to")
    server, to = (uri and tracking.address(uri) for uri in (os.environ.get("MLFLOW_TRACKING_URI"), args.to))
    sent = tracking.send_left_behind(args.folder.resolve(), server, others=True, to=to)
    for header, problem in sent:
        print(f"{header['name']}: {'sent' if problem is None else 'still here: ' + problem}")
    if failed := sum(problem is not None for _, problem in sent):
        sys.exit(f"error: {failed} of {len(sent)} runs are still in {args.folder}/mlflow-unsent; start the server and try again")
    print(f"{len(sent)} runs sent; MLflow has all of them" if sent else "nothing to send")


if __name__ == "__main__":
    errors.main(main)
