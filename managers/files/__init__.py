"""Models and outputs below configured folders (CONTRACT 5): `Files` is the manager, the rest its parts.

Must never reach outside those folders on a client's word, and never take a file's workflow from its name.
"""

from managers.files.manager import Files, FilesConfig, OutputEntry, OutputOwner, OutputOwners, OutputsPage
from managers.files.models import MODEL_TYPES, Model, ModelType
from managers.files.outputs import Media, OutputFile, media_of, read

__all__ = [
    "MODEL_TYPES",
    "Files",
    "FilesConfig",
    "Media",
    "Model",
    "ModelType",
    "OutputEntry",
    "OutputFile",
    "OutputOwner",
    "OutputOwners",
    "OutputsPage",
    "media_of",
    "read",
]
