"""`management-api backup`: a copy of the store that is whole, whether the service runs or not."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from management_api.commands.terminal import complain, say
from management_api.settings import SettingsError, load
from managers.errors import ManagerError
from managers.workflows.sqlite_house import backup
from managers.workflows.sqlite_schema import FILE_NAME


def run(given: argparse.Namespace) -> int:
    """Write the copy. Gives the exit status."""
    target: Path = given.file
    try:
        source = load(os.environ, Path(".env"), require_key=False).api.data_dir / FILE_NAME
        if not source.is_file():
            return complain(f"There is no store at {source}: is MANAGEMENT_API_DATA_DIR that of the service?")
        backup(source, target.absolute())
    except (SettingsError, ManagerError) as error:
        return complain(str(error))
    say(f"{target}  {target.stat().st_size} bytes")
    return 0
