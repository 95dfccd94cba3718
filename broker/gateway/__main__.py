"""The entry of a gateway process: `python -m broker.gateway`, started by the supervisor and by nobody else.

Owns the steps before a gateway serves: its configuration is read from standard input and its descriptors are
kept from what it may start. One that is started to take another's place (`handover`) loads its modules, sees
that it knows the registry's schema, says "waiting", and touches nothing until it is told to go: the other one
serves meanwhile. The rest is `broker.gateway.core`. Its peer is `hibernation.children`.
"""

import os
import resource
import sys

import outcome
import trio

from hibernation.configuration import GO_FROM_REST_LINE, GO_LINE, GatewayConfig, report
from hibernation.logs import configure, get_logger, protect_standard_streams
from storage.database import database_version
from storage.errors import SchemaTooNew
from storage.migrations import REGISTRY
from storage.registry import registry_path

__all__ = ["main"]


def main() -> None:
    """Run one gateway, from its configuration on standard input to its end."""
    protect_standard_streams()
    config = GatewayConfig.from_json(sys.stdin.buffer.readline())
    configure(config.dev, process="gateway")
    for fd in (config.status_fd, config.listener_fd):
        os.set_inheritable(fd, False)
    if not config.dev:  # no token and no message in a core file
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    result = outcome.capture(_serve, config)
    if isinstance(result, outcome.Error):
        error = result.error
        get_logger("gateway").error("the gateway failed", exc_info=error)
        report(config.status_fd, "error", text=f"the gateway failed: {type(error).__name__}: {error}")
        sys.exit(1)


def _serve(config: GatewayConfig) -> None:
    from broker.gateway.core import serve

    line = _wait_for_go(config) if config.handover else GO_LINE
    if line in (GO_LINE, GO_FROM_REST_LINE):
        trio.run(serve, config, line == GO_FROM_REST_LINE)


def _wait_for_go(config: GatewayConfig) -> bytes:
    """Wait to be told to take over. Another line, or none: the supervisor has died, or has no need of us."""
    path = registry_path(config.data)
    # Only the first page's header is read, by a process that has no connection to the file.
    version = database_version(path)
    if version is not None and version > REGISTRY.version:
        raise SchemaTooNew(version, REGISTRY.version, path)
    report(config.status_fd, "waiting")
    return sys.stdin.buffer.readline()


if __name__ == "__main__":
    main()
