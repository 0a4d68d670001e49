"""The command ``serve``: starts workers and the HTTP server, follows snapshots, drains when it is stopped."""

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator

import torch
from aiohttp import web

from tightrec.serving.loops import new_event_loop
from tightrec.serving.paths import PathSet, read_paths
from tightrec.serving.scheduling.config import scheduler_config
from tightrec.serving.scheduling.scheduler import Scheduler
from tightrec.serving.server import follow
from tightrec.serving.server.app import Service, make_app
from tightrec.serving.server.config import ServeConfig
from tightrec.serving.server.dispatch import Dispatcher
from tightrec.serving.server.http_connections import limited
from tightrec.serving.server.http_infer import InferEndpoint
from tightrec.serving.server.metrics import Metrics
from tightrec.serving.server.protocol import Protocol
from tightrec.serving.workers.paths import fingerprint_of
from tightrec.serving.workers.pool import WorkerPool
from tightrec.snapshot.inputs import Inputs

DONE, FAILED = 0, 1

Say = Callable[[str], None]

_POLL_S = 0.01
_LINGER_S = 1.0
_OTHER_FILES = 512


def serve(config: ServeConfig, say: Say) -> int:
    """Carry out the command until SIGTERM or SIGINT; returns the exit status: 0 if everything in flight was
    answered, 1 if not, or if it was stopped before it was ready.

    Raises:
        ValueError: a mistake in the settings, the file of paths or a snapshot.
        OSError: the port cannot be listened on.
    """
    _allow_files(config.max_connections)
    paths = usable(read_paths(config.paths), config.cores, say)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_run(config, paths, say))


def usable(paths: PathSet, cores: int | None, say: Say) -> PathSet:
    """``paths`` on the cores that there are.

    Raises:
        ValueError: no path fits.
    """
    here = cores if cores is not None else len(os.sched_getaffinity(0))
    devices = []
    for device in paths.devices:
        if device.name == "cpu" and not device.recorded:
            slots = here if cores is not None else min(here, device.slots)
            if slots < device.slots:
                say(f"paths were measured on {device.slots} cores; {slots} are used here")
            device = dataclasses.replace(device, slots=slots)
        devices.append(device)
    slots_of = {device.name: device.slots for device in devices}
    kept = tuple(path for path in paths.paths if path.threads <= slots_of[path.device])
    for path in paths.paths:
        if path not in kept:
            say(f"path {path.name} is left out: it takes {path.threads} threads")
    if not kept:
        raise ValueError(f"every path takes more than {here} threads. Explore on this machine.")
    return dataclasses.replace(paths, devices=tuple(devices), paths=kept)


def say_unmeasured(paths: PathSet, say: Say) -> None:
    """A line for each snapshot that is not the one that was measured."""
    prints = {folder: fingerprint_of(folder) for folder in {path.snapshot for path in paths.paths}}
    other = [path.snapshot for path in paths.paths if path.fingerprint != prints[path.snapshot]]
    for folder in dict.fromkeys(other):
        say(f"snapshot {folder} is not the one that was measured: latencies and accuracies may be others")


async def _run(config: ServeConfig, paths: PathSet, say: Say) -> int:
    stops: asyncio.Queue[None] = asyncio.Queue()
    with _listening(config) as connection, _stopped_by_signals(stops):
        starting = asyncio.create_task(_start(config, paths, say))
        stopping = asyncio.create_task(stops.get())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            say("stopped before it was ready")
            return FAILED
        try:
            service, follower = starting.result()
        except BaseException:
            stopping.cancel()
            raise
        return await _serve(config, service, follower, connection, stopping, stops, say)


async def _start(config: ServeConfig, paths: PathSet, say: Say) -> tuple[Service, follow.Follower]:
    scheduler = Scheduler(paths, scheduler_config(config))
    seen = follow.identities(paths)
    features = follow.features_of(paths)

    def new_pool(background: bool) -> WorkerPool:
        return WorkerPool(
            cache_folder=config.paths.absolute().parent,
            background=background,
            start_timeout_s=config.start_timeout_s,
            batch_timeout_s=config.batch_timeout_s,
        )

    settled = follow.settled(paths)
    say_unmeasured(settled, say)
    pool = new_pool(False)
    await pool.start(settled)
    metrics = Metrics([path.name for path in paths.paths])
    inputs = Inputs(*features, config.out_of_range, torch.device("cpu"))
    dispatcher = Dispatcher(scheduler, pool, metrics)
    protocol = Protocol(config.model, dispatcher.current.version, *features, config.max_rows)
    names = frozenset(path.name for path in paths.paths)
    infer = InferEndpoint(config, protocol, inputs, dispatcher, names)
    service = Service(paths, protocol, infer, dispatcher, metrics)
    follower = follow.Follower(
        paths, seen, features, service, lambda: new_pool(True), config.follow_every_s, say
    )
    return service, follower


async def _serve(
    config: ServeConfig,
    service: Service,
    follower: follow.Follower,
    connection: socket.socket,
    stopping: "asyncio.Task[None]",
    stops: "asyncio.Queue[None]",
    say: Say,
) -> int:
    runner = web.AppRunner(
        make_app(service),
        access_log=None,
        logger=_quiet_logger(),
        handler_cancellation=True,
        keepalive_timeout=config.head_timeout_s,
        lingering_time=_LINGER_S,
        shutdown_timeout=_LINGER_S,
    )
    await runner.setup()
    assert runner.server is not None
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(
        limited(runner.server, config.max_connections), sock=connection, backlog=config.max_connections
    )
    # What was loaded stays: the collector need not look through it at every later run.
    gc.collect()
    gc.freeze()
    following = asyncio.create_task(follower.run()) if config.follow else None
    pool = service.dispatcher.current.pool
    say(
        f"serving model {config.model}, version {service.protocol.version}, {len(service.paths.paths)} "
        f"paths, {len(pool.pids())} workers at {_url(connection)}"
    )
    try:
        await stopping
        say("draining: requests in flight are answered, new ones refused")
        status = await _drain(config, service, stops)
        say("drained" if status == DONE else "stopped before everything was answered")
        return status
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        listener.close()
        await service.dispatcher.close()
        await runner.cleanup()


async def _drain(config: ServeConfig, service: Service, stops: "asyncio.Queue[None]") -> int:
    """Answer what is in flight; ends early at a second signal."""
    service.infer.draining = True
    again = asyncio.create_task(stops.get())
    try:
        async with asyncio.timeout(config.drain_s):
            while service.infer.active or service.dispatcher.busy:
                if again.done():
                    return FAILED
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        return FAILED
    finally:
        again.cancel()
    return DONE


def _allow_files(connections: int) -> None:
    """Let this process open a file for every connection."""
    needed = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"max_connections={connections} needs {needed} open files, but this system allows {hard}. Lower "
            "it, or raise the limit (ulimit -n)."
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextlib.contextmanager
def _listening(config: ServeConfig) -> Iterator[socket.socket]:
    """A socket that has the port, before anything slow is begun."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        connection = socket.socket(family, kind, number)
    except socket.gaierror as error:
        raise ValueError(f"host={config.host} is no address of this machine ({error}).") from None
    with connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections take this over: the system ends one whose reader takes nothing for so long.
        patience_ms = int(config.write_timeout_s * 1e3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience_ms)
        try:
            connection.bind(address)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}", f"{config.host}:{config.port}") from None
        yield connection


@contextlib.contextmanager
def _stopped_by_signals(stops: "asyncio.Queue[None]") -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stops.put_nowait, None)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _url(connection: socket.socket) -> str:
    host, port = connection.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _quiet_logger() -> logging.Logger:
    """For what aiohttp says of every malformed request; mistakes of the server are logged elsewhere."""
    logger = logging.getLogger("tightrec.serving.http")
    logger.setLevel(logging.CRITICAL)
    return logger
