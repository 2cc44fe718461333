"""The actor on each node: it describes its machine, and opens layers (node.py) or a conversion's source (encoding.py).

In: calls of control.py. Out: plain dicts. Exceptions of llamacli are returned unchanged.
"""

import os
import platform
import shutil
import socket
from pathlib import Path

import quantize
from llamacli import __version__
from llamacli.cpu.kernels import sources_digest


def version() -> str:
    """The version that must be equal on all nodes, with a digest of the program's modules."""
    rooms = (Path(__file__).parents[1], Path(quantize.__file__).parent)
    return f"{__version__} ({''.join(sources_digest(room)[:6] for room in rooms)})"


class Host:
    """One per machine and program; it ends with the program."""

    def __init__(self, secret: str):
        self._secret = secret.encode()
        self._node = None

    def describe(self, path: str | None, threads: int | None) -> dict:
        """Memory, speeds, version; with `path` also the machine's copies of that file, each with its layers [first, end], None
        if it cannot be read.
        """
        from llamacli.bench.limits import buffer_megabytes, read_gbps
        from llamacli.cluster.copies import own_copies
        from llamacli.cpu.kernels.cores import default_threads
        from llamacli.cpu.kernels.jit.loader import chosen_target
        from llamacli.environment import models_folder
        from llamacli.plan import machine

        self.close()  # the memory of what is open now will be free
        threads = threads or default_threads()
        copies = own_copies(path) if path else {}
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": version(),
            "python": platform.python_version(),
            "device": f"cpu, {threads} threads, {chosen_target().name}",
            "threads": threads,
            "memory": machine.budget(),
            "memory_total": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "bandwidth": 1e9 * read_gbps(threads, buffer_megabytes(threads, 64), rounds=1),
            "disk": next((machine.disk_read_speed(copy, 0.2) for copy in copies), None),
            "disk_free": _free(models_folder()),
            "copies": {copy: layers and [layers.start, layers.stop] for copy, layers in copies.items()},
            "models": str(models_folder()),
        }

    def open(
        self, copy: str, first: int, end: int, digest: str, kv: str, threads: int, slots: int, batch: int, host: str
    ) -> dict:
        """Open layers first to end - 1 and serve them. ModelFileError if this copy's layers are not those of `digest`."""
        from dataclasses import replace

        from llamacli.cluster import copies
        from llamacli.cluster.node import Node
        from llamacli.cpu import buffers
        from llamacli.cpu.stage import cpu_part
        from llamacli.errors import ModelFileError
        from llamacli.files.gguf import open_gguf
        from llamacli.llama4.config import Config

        self.close()
        try:
            gguf = open_gguf(copy)
        except ModelFileError as error:
            raise ModelFileError(f"{error}; copy it again") from None
        config = Config.from_gguf(gguf)
        layers = range(first, end)
        if copies.digest(gguf, config, layers) != digest:
            raise ModelFileError(
                f"{copy} on {socket.gethostname()}: expected the same file as here, found another in layers {first} to "
                f"{end - 1}; copy it again"
            )
        most = buffers.tokens(config, batch)
        stage = cpu_part(gguf, replace(config, kv_type=kv), layers, threads, slots, most)
        self._node = Node(stage, self._secret, host, end == config.n_layers, most)
        return {
            "address": self._node.address,
            "bytes_per_token": stage.bytes_per_token,
            "products_per_token": stage.products_per_token,
            "notices": stage.notices,
            "pid": os.getpid(),
            "batch": most,
            "alike": stage.alike,
        }

    def encode(self, path: str, made_by: str, digest: str, threads: int | None, host: str) -> dict:
        """Open this machine's copy of a conversion's source and encode pieces of it.

        DeviceError: another version than `made_by`, or no copy. ModelFileError: the copy has another digest.
        """
        from llamacli.cluster import copies
        from llamacli.cluster.encoding import EncodingNode
        from llamacli.cpu.kernels.cores import usable_cpus
        from llamacli.environment import models_folder
        from llamacli.errors import DeviceError, ModelFileError
        from quantize.opening import open_source

        self.close()
        if version() != made_by:
            raise DeviceError(f"expected llamacli {made_by}, found {version()}; install the same version")
        copy = copies.own_copy(path)
        if copy is None:
            where = f"{models_folder()} or at the same path as here"
            raise DeviceError(f"expected a copy of {Path(path).name} in {where}, found none; copy it there")
        source = open_source(copy)
        if copies.source_digest(source) != digest:
            raise ModelFileError(
                f"{copy} on {socket.gethostname()}: expected the same weights as here, found others; copy it again"
            )
        self._node = EncodingNode(source, self._secret, host, threads or usable_cpus())
        return {"address": self._node.address, "pid": os.getpid()}

    def close(self) -> None:
        """Release what is open."""
        if self._node:
            self._node.close()
        self._node = None


def _free(folder: Path) -> int:
    """Bytes free on the disk of a folder, or of the nearest one above it that exists."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
