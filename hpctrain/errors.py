"""Errors a user can act on. Each message carries the numbers and the remedy; the class carries the exit status."""


class HpctrainError(Exception):
    """Base of every error raised on purpose; `exit_status` is what the process returns."""

    exit_status = 2


class ConfigError(HpctrainError):
    """A config file, key or command-line override is wrong; the message names file and key."""


class PlanError(HpctrainError):
    """A network cannot be cut as asked; the message names layer, dim, extents and what would work."""


class DataError(HpctrainError):
    """A shard, index or sample cannot be used; the message names the file or the sample ids."""


class CheckpointError(HpctrainError):
    """A checkpoint is missing, damaged or of another network; the message names file and tensor."""


class BackendUnavailable(HpctrainError):
    """A backend cannot run here; the message gives the command that would make it run."""


class LaunchError(HpctrainError):
    """The processes were not started as the config needs; the message gives the command to use."""


class SharedMemoryError(HpctrainError):
    """A host has too little memory that ranks can share; the message names what it was for, and the sizes."""


class NumericsError(HpctrainError):
    """A loss or sample is not finite; the message names step and sample ids."""


class DivergedError(HpctrainError):
    """Ranks are about to do different things together; the message names which rank does what."""

    exit_status = 70
