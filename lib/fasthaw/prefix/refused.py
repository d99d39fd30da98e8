"""The one error of what cannot be cached."""


class Refused(ValueError):
    """Why a network, its data or its callbacks cannot be cached, and the ways out."""
