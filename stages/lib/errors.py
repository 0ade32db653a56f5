"""The three kinds of error that a user meets, each with its exit code.

A text says what is wrong with the value that is, where (file, topic, record, µs), and what to do, ending in a command
or a knob. One to three lines.
"""

EXIT_TEMPORARY = 75  # EX_TEMPFAIL: a Batch job may retry it


class RoadmillError(Exception):
    """Base of the errors that are shown without a traceback."""

    exit_code = 1


class ConfigError(RoadmillError):
    """Your settings: a knob, a rig, a command line, an environment variable."""

    exit_code = 2


class DataError(RoadmillError):
    """The recording's own fault, the same on every machine."""

    exit_code = 3


class RemoteError(RoadmillError):
    """The store or the cloud; retrying won't help."""

    exit_code = 4


class TemporaryRemoteError(RemoteError):
    """The store or the cloud, in trouble that may pass."""

    exit_code = EXIT_TEMPORARY
