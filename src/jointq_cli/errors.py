"""Every error that a user or a machine can cause, as one tree.

    JointqError                 one line on stderr, exit code 1
    |-- ConfigError             a key of the recipe breaks a rule
    |-- ModelError              a checkpoint is missing, damaged, or of an unsupported architecture
    |-- TextError               a text is missing, empty, undecodable or too short
    |-- NumericsError           a layer cannot be solved
    |-- ResourceError           the machine lacks something: a GPU, disk space, the network
    |-- UntrustedResult         a run completed, but its result should not be used as it is
    |-- PeerProcessError        another process of the run has ended
    |-- AlreadyReported         an error whose message another process prints
    `-- Interrupted             Ctrl-C, SIGTERM, SIGHUP; everything finished is kept, exit code 75

A message is one line and names the key or file as the user typed it, the rule, and the value.
Any other exception that escapes is a bug of jointq and keeps its traceback.
"""


class JointqError(Exception):
    """Base of all errors that are reported to the user in one line."""

    exit_code = 1


class ConfigError(JointqError):
    """A key of the recipe breaks a rule."""


class ModelError(JointqError):
    """A checkpoint is missing, damaged, or of an unsupported architecture."""


class TextError(JointqError):
    """A calibration or evaluation text is missing, empty, undecodable or too short."""


class NumericsError(JointqError):
    """A layer cannot be solved."""


class ResourceError(JointqError):
    """The machine lacks something that the run needs."""


class UntrustedResult(JointqError):
    """A run completed and everything is written, but its result should not be used as it is."""


class PeerProcessError(JointqError):
    """Another process of the run has ended."""


class AlreadyReported(JointqError):
    """Wraps an error whose message another process of the run prints: this process prints nothing and exits with the
    error's exit code."""

    def __init__(self, error: JointqError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code


class Interrupted(JointqError):
    """The user or the system asked to stop; the same command continues. Exit code 75 is EX_TEMPFAIL of sysexits.h."""

    exit_code = 75

    def __init__(self, message: str = "interrupted; what is finished is kept, and the same command continues") -> None:
        super().__init__(message)
