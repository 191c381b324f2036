"""The one base class of errors that a user can mend."""


class InterlockingError(Exception):
    """An error whose message is one sentence for the user: what was seen, where, and the way out."""


class PeerLostError(InterlockingError):
    """A neighbouring stage ended or its connection broke."""
