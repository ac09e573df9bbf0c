"""The model hub: whether a run may write there, found out before it trains, and its final/ uploaded at its end."""

import os
import tempfile
from pathlib import Path

import huggingface_hub

from common.errors import UsageError, first_line
from common.workflows import name_of


def check_hub(args):
    """Settle --hub_model_id and make the repository. Raises UsageError where the hub can't be written to."""
    if not args.push_to_hub:
        if args.hub_model_id:
            raise UsageError("--hub_model_id says where to --push_to_hub: add that flag, or leave this one out.")
        return
    if huggingface_hub.constants.is_offline_mode():
        raise UsageError("--push_to_hub: HF_HUB_OFFLINE is set, so nothing can be uploaded: leave one of them out.")
    if huggingface_hub.get_token() is None:
        raise UsageError("--push_to_hub: not logged in to the hub: run `hf auth login`, or set HF_TOKEN.")
    api = huggingface_hub.HfApi()
    try:
        if args.hub_model_id is None or "/" not in args.hub_model_id:
            name = args.hub_model_id or args.run_name or name_of(args.output_dir)
            args.hub_model_id = f"{api.whoami()['name']}/{name}"
        if int(os.environ.get("RANK", 0)) == 0 and not getattr(args, "dry_run", False):
            api.create_repo(args.hub_model_id, exist_ok=True)
    except Exception as error:  # the hub's answer, or whatever its client raises where there is none
        where = args.hub_model_id or ""
        raise UsageError(f"--push_to_hub {where}: the hub does not take it ({first_line(error)}).") from None


def upload(folder, hub_model_id):
    """Upload an output's folder, its card naming the repository where it named the folder. Raises UsageError."""
    folder = Path(folder).absolute()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            card = Path(temporary) / "README.md"
            card.write_text((folder / "README.md").read_text().replace(str(folder), hub_model_id))
            api = huggingface_hub.HfApi()
            api.upload_folder(repo_id=hub_model_id, folder_path=folder, ignore_patterns="README.md")
            api.upload_file(repo_id=hub_model_id, path_or_fileobj=card, path_in_repo="README.md")
    except Exception as error:  # the hub's answer, or whatever its client raises where there is none
        raise UsageError(
            f"--push_to_hub {hub_model_id}: the upload failed ({first_line(error)}); the output is whole, and "
            f"`hf upload {hub_model_id} {folder}` tries again."
        ) from None
    return f"https://huggingface.co/{hub_model_id}"
