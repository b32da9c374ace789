"""What guard refuses."""


class QGuardError(RuntimeError):
    """A model could not be guarded. It was not loaded: guard fails closed. The message says why and what to do."""


class QGuardConfigError(ValueError):
    """A `QGuardConfig` that makes no sense or that cannot be guarded. The message says why and what to do."""
