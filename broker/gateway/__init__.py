"""The process that owns sockets; it runs no user code, ever."""
