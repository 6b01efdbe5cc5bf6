"""Every error Datalloy raises on purpose.

    DatalloyError                   exit code
      RecipeError(ValueError)       2   a key or a value of the recipe is wrong
      DataError(ValueError)         3   a record, a file or a set was refused: file, line, id
      LeakageError(DataError)       3   a target or evaluation item is also in the pool
      AgreementError(ValueError)    3   a cheap score does not agree with the exact one
      ModelError(RuntimeError)      3   a checkpoint or a model family cannot be used
      EnvironmentFault(OSError)     4   disk, memory or network
      RunError(RuntimeError)        3   a run folder belongs to another recipe or is damaged
      RunInUseError(RunError)      75   another process works on the run folder

A message says what failed, where (file:line, id, key), what was found, what is allowed, and what to do.
"""


class DatalloyError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class RecipeError(DatalloyError, ValueError):
    """A key or a value of the recipe is wrong."""

    exit_code = 2


class DataError(DatalloyError, ValueError):
    """A record, a file or a whole set was refused."""

    exit_code = 3


class LeakageError(DataError):
    """An item of a target or evaluation set is also in the pool."""


class AgreementError(DatalloyError, ValueError):
    """A cheap score disagrees with the exact one too much to be used."""

    exit_code = 3


class ModelError(DatalloyError, RuntimeError):
    """A checkpoint or a model family cannot be used."""

    exit_code = 3


class EnvironmentFault(DatalloyError, OSError):
    """Disk, memory or network failed us."""

    exit_code = 4


class RunError(DatalloyError, RuntimeError):
    """A run folder belongs to another recipe, or is damaged."""

    exit_code = 3


class RunInUseError(RunError):
    """Another process works on the run folder."""

    exit_code = 75
