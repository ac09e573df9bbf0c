"""compression.json, the manifest of a student that was made smaller: what came from where, and what it costs."""

import json
from pathlib import Path

from common.errors import ModelError, first_line

MANIFEST = "compression.json"


def read_manifest(folder):
    """compression.json of a student pipeline: a dict. Raises ModelError naming the file."""
    file = Path(folder) / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        pairs = manifest["feature_pairs"]
        if not all(len(pair) == 2 and all(isinstance(name, str) for name in pair) for pair in pairs):
            raise ValueError("its feature_pairs are no pairs of names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "there is no such file" if missing else f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{file} can't be read ({reason}); prepare_unet_small.py writes it.") from None
    return manifest


def write_manifest(folder, manifest):
    (Path(folder) / MANIFEST).write_text(json.dumps(manifest) + "\n")
