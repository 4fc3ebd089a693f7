"""Upload a folder of scripts/export.py to the Hugging Face Hub. The token comes from the environment, HF_TOKEN, and from nowhere else."""

import argparse
import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from ctrl import errors
from ctrl.folders import check_links
from ctrl.hub import check_repository


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder to upload")
    parser.add_argument("--repository", required=True, help="owner/name; it is made where there is none")
    parser.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    parser.add_argument("--message", default="Upload", help="of the commit (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")
    args = parser.parse_args()
    check_repository(args.repository)
    if not (args.folder / "README.md").is_file():
        raise errors.UserError(f"{args.folder} has no README.md: make it by scripts/export.py")
    check_links(args.folder)
    files = sorted(file for file in args.folder.rglob("*") if file.is_file() and ".cache" not in file.parts)
    for file in files:
        print(f"{file.stat().st_size:>12,}  {file.relative_to(args.folder)}")
    print(f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB, to {args.repository}")
    if args.dry_run:
        return
    if not (token := os.environ.get("HF_TOKEN")):
        raise errors.UserError("there is no HF_TOKEN in the environment: make a token that may write at your hub's settings, and export it")
    api = HfApi(token=token)
    try:
        api.create_repo(args.repository, private=not args.public, exist_ok=True)
        done = api.upload_folder(repo_id=args.repository, folder_path=args.folder, commit_message=args.message)
    except (HTTPError, ValueError, OSError) as error:  # ValueError: it takes neither the name nor the card's metadata
        raise errors.UserError(f"the hub refused {args.repository}: {error}") from error
    print(done.commit_url)


if __name__ == "__main__":
    errors.main(main)
