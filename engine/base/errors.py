"""Errors a user can cause and cure.

Everything under `launch/` turns an `EngineError` into one plain message and a non-zero exit; any other
exception is a bug and keeps its traceback.
"""

from __future__ import annotations


class EngineError(Exception):
    """Says what is wrong, where (file, key or chip), and what to do about it."""


class ConfigError(EngineError):
    """A recipe that cannot be run; names the key."""


class DataError(EngineError):
    """Input data that is missing, damaged or of another shape; names the file or chip."""


class GoneError(DataError):
    """The folder that data lie in is gone as a whole; names the folder and the file that was wanted."""


class WeightsError(EngineError):
    """Weights that are missing or do not fit the model; names the file and the tensors."""


class DeviceError(EngineError):
    """A device that the machine does not have."""
