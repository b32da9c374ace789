"""What evaluation refuses."""


class EvaluationError(ValueError):
    """Something cannot be measured as asked. The message says why and what to do."""
