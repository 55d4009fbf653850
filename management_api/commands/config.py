"""`management-api config`: what the service would start with, and where each value comes from. Secrets are masked."""

from __future__ import annotations

import os
from pathlib import Path

from management_api.commands.terminal import clean, complain, say, tell
from management_api.settings import SettingsError, describe, load


def run() -> int:
    """Print the table. Gives the exit status."""
    try:
        settings = load(os.environ, Path(".env"), require_key=False)
    except SettingsError as error:
        return complain(str(error))
    rows = describe(settings)
    names, values = max(len(row.name) for row in rows), max(len(row.value) for row in rows)
    for row in rows:
        say(clean(f"{row.name:{names}}  {row.value or '-':{min(values, 60)}}  {row.source}"))
    if not settings.api.key:
        tell("MANAGEMENT_API_KEY is not set: the service will not start without it")
    return 0
