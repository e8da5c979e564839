"""Files that travel with a model from its import to its export: config.json, tokenizer, licence.

They lie in one folder beside the checkpoints. A run that starts from checkpoints of another folder takes them over.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

COMPANIONS = "hf"
"""Name of the folder."""


def take_over(source: Path, target: Path) -> bool:
    """Copy the companions of one folder of checkpoints to another that has none; returns whether there were any.

    They are copied under a temporary name, so that a run that is killed leaves all of them or none.
    """
    theirs, ours = source / COMPANIONS, target / COMPANIONS
    if ours.exists() or not theirs.is_dir():
        return False
    temporary = target / f"{COMPANIONS}.tmp-{uuid.uuid4().hex}"
    try:
        shutil.copytree(theirs, temporary)
        os.rename(temporary, ours)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True
