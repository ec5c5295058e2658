"""Run a function on several ranks of a Gloo group, or in other processes that wait for it."""

import atexit
import contextlib
import gc
import multiprocessing
import pickle
import tempfile
import traceback
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

# A server that has imported PyTorch once forks the ranks; they start at once, and without threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "ununennium"])


def answer(function, details):
    """Return what a function returns, as bytes, and the text of its error."""
    torch.manual_seed(0)
    try:
        # As bytes: a pipe would share the memory of tensors, which ends with this process.
        return pickle.dumps(function(*details)), None
    except BaseException:
        return None, traceback.format_exc()


def requests(connection):
    """Give what the parent asks for until it hangs up: starting a process takes a second."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            yield connection.recv()


def serve_rank(connection):
    """Call functions as a rank of a group, which is another one each time."""
    for rank, size, path, function, details in requests(connection):
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
        found = answer(function, details)
        dist.destroy_process_group()
        gc.collect()  # loaders end their workers
        connection.send(found)


class Pool:
    """Processes that wait for something to do; `serve` is what each of them runs."""

    def __init__(self, serve):
        self.serve, self.ranks = serve, []
        atexit.register(self.drop)

    def grow(self, size):
        """Return `size` processes with their connections."""
        while len(self.ranks) < size:
            own, other = CONTEXT.Pipe()
            process = CONTEXT.Process(target=self.serve, args=(other,))
            process.start()
            other.close()
            self.ranks.append((process, own))
        return self.ranks[:size]

    def drop(self):
        """End all processes."""
        for _, connection in self.ranks:
            connection.close()  # which ends those that wait for something to do
        for process, _ in self.ranks:
            process.join(5)
            process.kill()
        self.ranks = []


POOL = Pool(serve_rank)


def on_ranks(size, function, *details, timeout=60):
    """Call a function on all ranks; return what they return, in their order.

    It has to be a function of a module. An error on any rank is raised here, with its traceback.
    """
    results = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            connections = [connection for _, connection in POOL.grow(size)]
            for rank, connection in enumerate(connections):
                connection.send((rank, size, f"{folder}/group", function, details))
            while len(results) < size:
                waiting = [c for rank, c in enumerate(connections) if rank not in results]
                ready = wait(waiting, timeout)
                assert ready, f"only ranks {sorted(results)} of {size} returned"
                for connection in ready:
                    result, error = connection.recv()
                    rank = connections.index(connection)
                    assert error is None, f"rank {rank} failed:\n{error}"
                    results[rank] = pickle.loads(result)
    except BaseException:
        POOL.drop()  # the others may wait for the one that failed
        raise
    return [results[rank] for rank in range(size)]
