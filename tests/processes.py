"""Run a function on several ranks of a Gloo group, each in a process of its own."""

import multiprocessing
import pickle
import tempfile
import traceback
from queue import Empty

import torch
import torch.distributed as dist

# A server that has imported PyTorch once forks the ranks; they start at once, and without threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "ununennium"])


def run_rank(rank, size, path, queue, function, details):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    try:
        # As bytes: a queue would share the memory of tensors, which ends with this process.
        queue.put((rank, pickle.dumps(function(*details)), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def on_ranks(size, function, *details, timeout=60):
    """Call a function on all ranks; return what they return, in their order.

    It has to be a function of a module. An error on any rank is raised here, with its traceback.
    """
    queue = CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        rest = (size, f"{folder}/group", queue, function, details)
        ranks = [CONTEXT.Process(target=run_rank, args=(rank, *rest)) for rank in range(size)]
        for process in ranks:
            process.start()
        results = {}
        try:
            while len(results) < size:
                rank, result, error = queue.get(timeout=timeout)
                if error is not None:
                    raise AssertionError(f"rank {rank} failed:\n{error}")
                results[rank] = pickle.loads(result)
        except Empty:
            raise AssertionError(f"only ranks {sorted(results)} of {size} returned") from None
        finally:
            for process in ranks:
                process.join(10 if len(results) == size else 0)
                process.kill()
                process.join()
    return [results[rank] for rank in range(size)]
