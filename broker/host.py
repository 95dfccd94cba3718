"""The entry of a host process: `python -m broker.host`, started by the supervisor and by nobody else.

Owns the steps before a host serves: its configuration is read from standard input, the app is loaded, the
supervisor is told how that went, and "go" is awaited, which comes when no other host has the shards. What can
be checked before is checked: that this code knows the schema of its shards. The rest is `hibernation.host`.
Its peer is `hibernation.children`.
"""

import os
import resource
import sys
import traceback
from typing import Never

import outcome
import trio

from hibernation.configuration import GO_LINE, HostConfig, report
from hibernation.errors import AppError, BrokerError
from hibernation.logs import configure, get_logger, protect_standard_streams
from hibernation.party import Party
from storage.database import database_version
from storage.errors import SchemaTooNew
from storage.migrations import SHARD
from storage.shards import shard_path

__all__ = ["main"]


def main() -> None:
    """Run one host, from its configuration on standard input to its end."""
    protect_standard_streams()
    config = HostConfig.from_json(sys.stdin.buffer.readline())
    configure(config.dev, process=f"host {config.index}")
    _keep_to_itself(config)
    parties, env = _load(config)
    report(config.status_fd, "loaded", parties=[party.describe() for party in parties])
    if sys.stdin.buffer.readline() != GO_LINE:
        return  # the supervisor has died, or chose other code
    _leave_standard_input()
    from hibernation.host import serve

    result = outcome.capture(trio.run, serve, config, parties, env)
    if isinstance(result, outcome.Error):
        error = result.error
        get_logger("host").error("the host failed", exc_info=error)
        report(config.status_fd, "error", text=f"the host failed: {type(error).__name__}: {error}")
        sys.exit(1)


def _load(config: HostConfig) -> tuple[list[Party], dict[str, str]]:
    """Give the app's parties, and what its rooms see as `env`; ends the process if that fails."""
    from broker.app import app_folder, load_app, read_env

    def load() -> tuple[list[Party], dict[str, str]]:
        _require_known_schemas(config)
        env = read_env(app_folder(config.app), config.variables, os.environ)
        return load_app(config.app), env

    # Whatever an app's module raises, `SystemExit` included: the supervisor must hear of it.
    result = outcome.capture(load)
    if isinstance(result, outcome.Error):
        _give_up(config, _explain(config.app, result.error))
    return result.value


def _require_known_schemas(config: HostConfig) -> None:
    """See that no newer broker has written our shards; a predecessor may have them open meanwhile."""
    for index in config.shards:
        path = shard_path(config.data, index)
        version = database_version(path)
        if version is not None and version > SHARD.version:
            raise SchemaTooNew(version, SHARD.version, path)


def _explain(app: str, error: BaseException) -> str:
    """Say in words for the developer's terminal why the app cannot be loaded."""
    if not isinstance(error, BrokerError):
        return f"{app} cannot be loaded:\n{''.join(traceback.format_exception(error)).rstrip()}"
    details = error.details.rstrip() if isinstance(error, AppError) else ""
    return f"{error}\n\n{details}" if details else str(error)


def _give_up(config: HostConfig, text: str) -> Never:
    report(config.status_fd, "error", text=text)
    sys.stdout.flush()
    os._exit(1)  # threads that the app's import has started keep nothing alive


def _keep_to_itself(config: HostConfig) -> None:
    """Hand nothing down to programs that room code may start, and leave no memory behind in a core file."""
    os.set_inheritable(config.status_fd, False)
    if not config.dev:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _leave_standard_input() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


if __name__ == "__main__":
    main()
