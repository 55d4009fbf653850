"""The program: settings, wiring, security, command line."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("comfyui-management-api")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
