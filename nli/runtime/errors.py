"""The errors that a person can mend; each says where, what and how to cure it.

    NLIError                what every job turns into one message and exit status 2
    ├── ConfigError         a field, flag or config file is wrong
    ├── DataError           an input file is missing, empty or holds a bad row
    ├── StorageError        a place to write to is missing, relative or full
    ├── ResumeError         finished work exists that was made another way
    ├── ClusterError        the Ray cluster cannot be joined, or is too small for what is asked
    ├── TeacherError        the teacher's API refuses, or cannot be reached
    ├── ModelError          a base, adapter or checkpoint cannot be used as asked
    └── EngineDead          an engine cannot answer any more; a new process can

All are picklable, because Ray carries them from worker to driver.
"""


class NLIError(Exception):
    """Base of all errors that name their own cure."""


class ConfigError(NLIError):
    """A config field is unknown, of the wrong type, out of range, or conflicts with another."""


class DataError(NLIError):
    """An input file cannot be used. The message names the file and, where there is one, the line."""


class StorageError(NLIError):
    """An output cannot be written where the config says."""


class ResumeError(NLIError):
    """The output holds work of another config or input; the message shows the difference."""


class ClusterError(NLIError):
    """The Ray cluster cannot be joined, or lacks the CPUs or GPUs that a stage asks for."""


class TeacherError(NLIError):
    """The teacher's API cannot answer: no key, a refused key, or no connection."""


class ModelError(NLIError):
    """A model folder, adapter or checkpoint does not fit what is asked of it."""


class EngineDead(NLIError):
    """An engine's GPU or process failed for good. The process that holds it must end, so that another takes its place."""
