"""The server process that ranks are forked from, the keeper that cleans up behind the parent, the private folder.

Knows how processes come to be and how none is left. Knows nothing of calls, replies and verdicts (`fuzz.ranks`), nor of
what it preloads, which it knows by name only.

The fork server (one per parent) has imported the heavy modules; the ranks are forked from it in milliseconds. The
keeper outlives the parent however that ends, SIGKILL included, kills the ranks that it left, and removes its files.
The fork server ends by itself when the parent and all that it forked have gone.
"""

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from multiprocessing import forkserver, util
from multiprocessing.process import BaseProcess
from pathlib import Path

from fuzz.case import HarnessFault

PRELOAD = (
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.qwen2_moe.modeling_qwen2_moe",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "transformers.models.glm4_moe.modeling_glm4_moe",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "toy_models.megatron",
    "toy_models.reference",
    "fuzz.drive",
    "fuzz.truth",
)
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TORCHDYNAMO_DISABLE"), "1"),
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # no CUDA here: processes forked from one that has it cannot use it
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}
IMPORTS = 120.0  # seconds for the fork server's imports: 6 on two idle cores
FAREWELL = 5.0  # seconds for killed processes to be gone, and for the keeper to remove what is left
ROOM = 256 * 2**20  # bytes that /dev/shm must have free to hold the private folder
CONTEXT = multiprocessing.get_context("forkserver")


def warm_up() -> None:
    """Begin the fork server's imports without waiting for them: some 6 s in which the caller can do other things."""
    CONTEXT.set_forkserver_preload(list(PRELOAD))
    with _surroundings():
        forkserver.ensure_running()


def fork(processes: list[BaseProcess]) -> None:
    """Start `processes`; HarnessFault where the fork server is not there in time to do it."""
    failed: list[Exception] = []
    # In a thread, because Process.start has no deadline and waits for the fork server's imports.
    thread = threading.Thread(target=_start, args=(processes, failed), daemon=True)
    thread.start()
    thread.join(IMPORTS)
    if thread.is_alive():
        _end_fork_server()
        raise HarnessFault(f"the fork server was not ready after {IMPORTS:g} s; it imports {', '.join(PRELOAD)}")
    if failed:
        raise HarnessFault(f"the fork server has ended ({failed[0]!r}): {_why_no_imports()}")


def _start(processes: list[BaseProcess], failed: list[Exception]) -> None:
    try:
        warm_up()
        with _surroundings():
            for process in processes:
                process.start()
    except Exception as error:
        failed.append(error)


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """What a new fork server inherits; and a bare __main__, else every rank would run the parent's (pytest's) again."""
    wanted = {
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        **_loopback(),
    }
    before, main = {name: os.environ.get(name) for name in wanted}, sys.modules["__main__"]
    os.environ.update(wanted)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _loopback() -> dict[str, str]:
    """Gloo looks up the host's own name, which fails on many laptops; ranks of one machine need the loopback only."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", names[0])} if names else {}


def _end_fork_server() -> None:
    with contextlib.suppress(OSError, TypeError):
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined,arg-type]


def _why_no_imports() -> str:
    """What the imports say when they are done again, where they can be watched."""
    command = [sys.executable, "-c", "import " + ", ".join(PRELOAD)]
    with _surroundings():
        try:
            tried = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                timeout=IMPORTS,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            return f"its imports take more than {IMPORTS:g} s"
    return tried.stderr[-3000:] if tried.returncode else "its imports work now; it was killed from outside"


def exists(process: BaseProcess) -> bool:
    """Whether the process is there: its exit code is the fork server's word, which may have been killed itself."""
    try:
        os.kill(process.pid, 0)  # type: ignore[arg-type]
    except (ProcessLookupError, PermissionError, TypeError):
        return False
    return True


def kill(process: BaseProcess) -> None:
    """SIGKILL for a rank and for the helpers that it has forked."""
    if exists(process):
        _kill_group(process.pid)  # type: ignore[arg-type]
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


@functools.cache
def home() -> Path:
    """This parent's private folder, which is removed however the parent ends."""
    try:
        root = Path(tempfile.mkdtemp(prefix="fuzz-ranks-", dir=_place()))
    except OSError as error:
        raise HarnessFault(f"no folder can be made in {_place() or tempfile.gettempdir()}: {error.strerror}") from error
    # multiprocessing's folder holds the fork server's socket, and outlives a parent that is killed.
    keeper = CONTEXT.Process(target=_keep, args=([root, Path(util.get_temp_dir())],), daemon=True)
    util.Finalize(None, _leave, (keeper, root), exitpriority=50)
    fork([keeper])
    return root


def _place() -> str | None:
    """In memory where there is room: a full disk must not end a run."""
    shm = "/dev/shm"
    return shm if os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > ROOM else None


def _leave(keeper: BaseProcess, root: Path) -> None:
    kill(keeper)
    shutil.rmtree(root, ignore_errors=True)


def _keep(folders: list[Path]) -> None:
    """Wait for the parent's end; it kills the keeper when it ends well."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    until = time.monotonic() + FAREWELL
    while any(folder.exists() for folder in folders) and time.monotonic() < until:
        for file in folders[0].glob("*/pid-*"):
            with contextlib.suppress(OSError, ValueError):
                _kill_group(int(file.read_text()))
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
