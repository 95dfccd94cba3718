"""What a test is told when something is not as it should be.

Owns the exceptions of the kit. All of them but `Refused` are AssertionErrors, so that a test that meets one
has failed, and says so as for any assertion.
"""

from collections.abc import Sequence

from broker.testing._response import Response

__all__ = ["ConnectionOver", "Expectation", "HookFailed", "NothingCame", "Refused"]


class Expectation(AssertionError):
    """Something else than the test expects has happened. The text ends with what happened until then."""


class NothingCame(Expectation):
    """What was waited for has not come, though everything has been done that there was to do."""


class ConnectionOver(Expectation):
    """A message was waited for, and the connection has been closed.

    Attributes:
        code: Of the Close frame; 1006 without one.
        reason: Its text.
    """

    def __init__(self, text: str, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(text)


class HookFailed(AssertionError):
    """Room code has raised an exception that the test does not expect; it is the `__cause__`, with its
    traceback. `kit.expect_error` expects one.

    Attributes:
        errors: All of them, in order.
    """

    def __init__(self, text: str, errors: Sequence[BaseException]) -> None:
        self.errors = tuple(errors)
        super().__init__(text)


class Refused(Exception):
    """An upgrade was answered with another status than 101.

    Attributes:
        response: The answer; `status` is its status.
    """

    def __init__(self, response: Response) -> None:
        self.response = response
        self.status = response.status
        super().__init__(f"the upgrade was refused with {response.status}: {response.text[:500]!r}")
