"""The Prefect flow: one task per DVC stage.

Prefect decides when and where; DVC alone decides what is up to date. So no task caches or
persists a result, and a stage is tried again only where its ``meta`` in ``dvc.yaml`` says so.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from uuid import UUID

import httpx
from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture
from prefect.states import Crashed
from prefect.task_runners import ThreadPoolTaskRunner

from pipelines.execution import Executor, Outcome, StageFailed
from pipelines.finish import Conclusion, conclude, raise_if_red
from pipelines.graph import Node
from pipelines.scheduler import Finished, Submit
from pipelines.session import Request, Session, check_targets, exclusive, identity
from springhead import output
from springhead.errors import BadInput
from springhead.home import home as state_folder
from springhead.home import repository

_MOST_WORKERS = 64  # threads only wait for processes; the number of worktrees is the real limit
_RETRY_DELAY = 10  # seconds: enough for a full disk or a busy GPU to have a chance to change
ON_TERMINAL = "SPRINGHEAD_TERMINAL"
"""Environment variable: ``1`` where a person watches and plain lines go to standard output."""


def default_workers() -> int:
    """Returns how many stages run at once unless told otherwise: two, on one core one."""
    return min(2, os.cpu_count() or 1)


@flow(
    name="springhead",
    task_runner=ThreadPoolTaskRunner(max_workers=_MOST_WORKERS),  # type: ignore[arg-type]
    persist_result=False,
    flow_run_name="springhead",
)
def pipeline(
    workers: int | None = None,
    profile: str | None = None,
    target: list[str] | None = None,
    settings: list[str] | None = None,
    promote: bool = True,
    wait: bool = False,
) -> Conclusion:
    """Brings every stage of ``dvc.yaml`` up to date, then promotes and reports.

    Args:
        workers: how many stages run at once, each in a git worktree of its own.
        profile: ``smoke``, ``quick`` or ``paper``: an overlay on ``params.yaml``.
        target: only these stages and what they need; nothing is promoted then.
        settings: ``key=value`` overlays on ``params.yaml``.
        promote: whether to promote what passes its gate.
        wait: whether to wait for another run of this checkout instead of refusing.

    Raises:
        StageFailed, Finding: if a stage fails or a gate is closed.
        BadInput: on wrong arguments or an unusable checkout.
    """
    logger = get_run_logger()
    root = repository()
    home = state_folder(root)
    count = default_workers() if workers is None else workers
    if not 1 <= count <= _MOST_WORKERS:
        raise BadInput(f"--workers {count}: expected a number from 1 to {_MOST_WORKERS}")
    request = Request(count, profile, tuple(target or ()), tuple(settings or ()))
    check_targets(root, home, request)
    flow_run = str(runtime.flow_run.id or "")
    say = partial(_say, logger)
    with exclusive(root, home, wait, say), _server_ends_with_us():
        _mark_crashed_runs(home, root)
        session = Session(root, home, request, flow_run, say, terminal)
        alive = home / "runs" / f"{identity(root)}-{session.run}.flow"
        alive.parent.mkdir(parents=True, exist_ok=True)
        alive.write_text(flow_run, encoding="utf-8")
        try:
            result = session.perform(_submitter)
            conclusion = conclude(result, root, home, request, promote, say)
            _publish_artifact(conclusion)
        finally:
            session.stop()
            alive.unlink(missing_ok=True)
    for line in conclusion.table():
        say(line)
    raise_if_red(conclusion)
    return conclusion


def terminal(line: str) -> None:
    """Prints a line where a person watches; elsewhere Prefect's log has it already."""
    if os.environ.get(ON_TERMINAL) == "1":
        output.say(line)


def _say(logger: "logging.Logger | logging.LoggerAdapter[logging.Logger]", line: str) -> None:
    terminal(line)
    logger.info(line)


def _submitter(executor: Executor) -> Submit:
    """Returns the function that starts a stage as a Prefect task."""

    def submit(node: Node, place: Path, gpu: str | None, finished: Finished) -> None:
        # The arguments are bound, not passed: Prefect would walk through them looking for futures.
        def body() -> Outcome:
            return executor.execute(node, place, get_run_logger().info, gpu)

        stage = task(
            name=node.group,
            task_run_name=node.name,
            description=node.description or None,
            tags=["gpu"] if node.gpu else None,
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=node.retry,
            retry_delay_seconds=_RETRY_DELAY,
        )
        stage(body).submit().add_done_callback(lambda future: finished(_outcome(node.name, future)))

    return submit


def _outcome(name: str, future: PrefectFuture[Outcome]) -> Outcome:
    """Returns how a task ended, also where it did not end the way it should."""
    result: object
    try:
        result = future.result(raise_on_failure=False)
    except BaseException as error:  # the scheduler must hear of every end, else it waits for ever
        result = error
    if isinstance(result, Outcome):
        return result
    if isinstance(result, StageFailed):
        return result.outcome
    return Outcome(name, "failed", error=f"{type(result).__name__}: {result}")


@contextmanager
def _server_ends_with_us() -> Iterator[None]:
    """Ends Prefect's temporary server also after ``kill -9``, when Prefect itself cannot.

    A shell waits on a pipe that only this process holds open.
    """
    servers = getattr(sys.modules.get("prefect.server.api.server"), "SubprocessASGIServer", None)
    processes = [server.server_process for server in getattr(servers, "_instances", {}).values()]
    script = 'read _; for p; do grep -q prefect.server "/proc/$p/cmdline" && kill "$p"; done'
    pids = [str(process.pid) for process in processes if process is not None]
    guard = subprocess.Popen(["/bin/sh", "-c", script, "guard", *pids], stdin=subprocess.PIPE, process_group=0)
    try:
        yield
    finally:
        guard.kill()
        guard.communicate()


def _mark_crashed_runs(home: Path, root: Path) -> None:
    """Tells Prefect of flow runs that were killed: it would show them as running for ever.

    The caller holds the lock of this checkout, so a mark left behind belongs to a dead process.
    """
    for mark in sorted((home / "runs").glob(f"{identity(root)}-*.flow")):
        flow_run = mark.read_text(encoding="utf-8").strip()
        with suppress(ObjectNotFound, ValueError, httpx.HTTPError), get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run)).state
            if state is not None and not state.is_final():
                client.set_flow_run_state(UUID(flow_run), Crashed(message="its process was killed"), force=True)
        mark.unlink(missing_ok=True)


def _publish_artifact(conclusion: Conclusion) -> None:
    # An artefact is a convenience of the UI; the run must not fail for want of it.
    with suppress(httpx.HTTPError):
        create_markdown_artifact(conclusion.markdown(), key="springhead-run", description="What the run did")
