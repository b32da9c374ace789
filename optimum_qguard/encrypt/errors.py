"""What can be wrong with a model that is to be encrypted."""


class ArchitectureError(ValueError):
    """The model's architecture is not known, or its checkpoint does not look like that architecture."""
