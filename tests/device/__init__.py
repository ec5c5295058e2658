"""Run a function in a process that has a pretend GPU; see `pretend`."""

import pickle

from processes import Pool, answer, requests


def serve(connection):
    """Call functions where the device "gpu" exists, which cannot be undone in a process."""
    from device import pretend

    for function, details in requests(connection):
        pretend.WATCH.stop()
        connection.send(answer(function, details))


POOL = Pool(serve)


def on_device(function, *details, timeout=120):
    """Return what a function of a module returns there; an error is raised with its traceback."""
    _, connection = POOL.grow(1)[0]
    connection.send((function, details))
    try:
        assert connection.poll(timeout), f"{function.__name__} did not return"
        result, error = connection.recv()
    except BaseException:
        POOL.drop()
        raise
    assert error is None, error
    return pickle.loads(result)
