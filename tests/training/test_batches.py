"""Batches of every kind are unpacked, named, moved, and read in windows with their shares."""

import collections
import contextlib
import math
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ununennium.signals import signal_handled
from ununennium.training.batches import (
    AccumulationWindows,
    BatchReader,
    MicroBatch,
    has_prediction,
    num_batches,
    open_iterator,
    prediction,
    quote_names,
    sample_count,
    sample_names,
    set_shares,
    to_device,
    unpack,
    worker_deaths_told,
)

IMAGE, MASK = torch.zeros(3, 4, 2, 2), torch.zeros(3, 2, 2, dtype=torch.int64)
Pair = collections.namedtuple("Pair", ["first", "second"])


class Labelled:
    images, labels = IMAGE, MASK


# Unpack.


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGE, MASK),
        [IMAGE, MASK],
        Pair(IMAGE, MASK),
        Labelled(),
        {"image": IMAGE, "mask": MASK, "crs": "EPSG:32633"},
        {"image": IMAGE, "label": MASK},
        {"image": IMAGE, "label": None, "mask": MASK},  # the mask comes first
        collections.OrderedDict(image=IMAGE, mask=MASK),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_known_kinds_of_batches(batch):
    inputs, target = unpack(batch)
    assert inputs is IMAGE and target is MASK


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": IMAGE}, r"'mask' or 'label', but has \['image'\]. Rename the keys"),
        ({"mask": MASK, 7: 0}, r"has \['7', 'mask'\]"),
        ({}, r"has \[\]"),
        ((IMAGE,), "unknown kind: tuple of 1; expected"),
        ([IMAGE, MASK, MASK], "unknown kind: list of 3; expected"),
        (IMAGE, "unknown kind: Tensor; expected .*override Trainer.unpack"),
        (None, "unknown kind: NoneType"),
    ],
)
def test_other_batches_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        unpack(batch)


# Names.


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        ((IMAGE, MASK), None),
        ({"image": IMAGE}, None),
        ({"filename": ["a.tif", "b.tif"]}, ("filename", ["a.tif", "b.tif"])),
        ({"id": ("a", "b")}, ("id", ["a", "b"])),
        ({"index": torch.tensor([4, 7])}, ("index", ["4", "7"])),
        ({"index": torch.tensor(4)}, ("index", ["4"])),
        ({"index": torch.zeros(2, device="meta")}, ("index", [])),  # it would have to be read
        ({"path": "a.tif"}, ("path", ["a.tif"])),
        ({"idx": [1, 2], "filename": ["a", "b"]}, ("filename", ["a", "b"])),  # files first
    ],
)
def test_names_of_samples(batch, names):
    assert sample_names(batch) == names


@pytest.mark.parametrize(
    ("names", "rows", "text"),
    [
        (None, None, ""),
        (None, [2, 5], "sample 2, 5"),
        (("index", []), [2], "sample 2"),
        (("file", ["a", "b", "c"]), [0, 2], "file a, c"),
        (("file", ["a", "b"]), None, "file a, b"),
        (("file", ["a", "b"]), [], "file a, b"),
        (("file", ["a", "b"]), [1, 9], "file b"),  # fewer names than samples
        (("file", list("abcde")), None, "file a, b, c, d, e"),
        (("file", list("abcdefg")), None, "file a, b, c, d, e and 2 more"),
    ],
)
def test_names_as_text(names, rows, text):
    assert quote_names(names, rows) == text


# Move.


def test_tensors_are_moved_at_any_depth():
    value = {"a": [IMAGE, (MASK, "text")], "b": Pair(IMAGE, None), "c": 3.0}
    moved = to_device(value, torch.device("meta"))
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta and moved["a"][1][1] == "text"
    assert isinstance(moved["a"][1], tuple)
    assert isinstance(moved["b"], Pair) and moved["b"].first.is_meta and moved["b"].second is None
    assert moved["c"] == 3.0 and not IMAGE.is_meta


def test_a_tensor_on_its_device_is_not_copied():
    assert to_device(IMAGE, torch.device("cpu")) is IMAGE


# Predictions and samples.


@pytest.mark.parametrize(
    "output", [IMAGE, {"out": IMAGE, "aux": MASK}, (IMAGE, MASK), [IMAGE], Pair(IMAGE, MASK)]
)
def test_the_prediction_of_an_output(output):
    assert prediction(output) is IMAGE


def test_a_dictionary_without_out_or_logits_has_no_prediction():
    with pytest.raises(ValueError, match=r"with \['z'\], but without 'out' or 'logits'. Name the"):
        prediction({"z": IMAGE})
    assert not has_prediction({"z": IMAGE}) and has_prediction(IMAGE)


def test_the_prediction_of_a_hugging_face_output_is_its_logits():
    named = collections.namedtuple("Output", "loss logits")(None, IMAGE)
    for output in ({"logits": IMAGE}, SimpleNamespace(logits=IMAGE), named):
        assert prediction(output) is IMAGE and has_prediction(output)
    assert prediction({"out": IMAGE, "logits": MASK}) is IMAGE


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ([{"boxes": IMAGE}] * 5, 5.0),
        ([], 0.0),
        ({"mask": MASK, "area": torch.zeros(7)}, 3.0),
        ({"total": torch.tensor(1.0), "mask": MASK}, 3.0),  # a scalar has no samples
        ((MASK, "text"), 3.0),
        ({"name": "a"}, 1.0),
    ],
)
def test_samples_of_a_container(target, count):
    assert sample_count(target) == count


# Loaders.


class Interrupting:
    """A loader that is interrupted while it starts."""

    def __init__(self, error=None):
        self.error = error

    def __iter__(self):
        signal.raise_signal(signal.SIGINT)
        self.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        if self.error:
            raise self.error
        return iter([1])


@pytest.mark.parametrize("error", [None, OSError("no such folder")])
def test_an_interrupt_while_workers_start_is_not_lost(error):
    """It reaches none of them, as they inherit what is blocked."""
    before, loader, seen = signal.pthread_sigmask(signal.SIG_BLOCK, []), Interrupting(error), []
    with signal_handled(signal.SIGINT, lambda number, frame: seen.append(number)):
        with contextlib.suppress(OSError):
            assert list(open_iterator(loader)) == [1]
        assert seen == [signal.SIGINT]
    assert signal.SIGINT in loader.blocked
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


class Masked(torch.utils.data.Dataset):
    """Samples that say whether their process can be interrupted."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_workers_are_not_interrupted_whichever_thread_starts_them():
    seen = []
    read = lambda: seen.extend(open_iterator(DataLoader(Masked(), num_workers=1)))
    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    read()
    assert [batch.item() for batch in seen] == [True] * 4


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield IMAGE


def test_the_number_of_batches():
    assert num_batches([1, 2]) == 2 and num_batches([]) == 0
    assert num_batches(iter([1, 2])) is None
    assert num_batches(torch.utils.data.DataLoader(Stream())) is None


@pytest.mark.parametrize("lost", [EOFError, ConnectionResetError, ConnectionRefusedError])
def test_the_death_of_a_worker_is_told_although_its_socket_closed_first(lost):
    def tell(number, frame):
        raise RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed.")

    def read():
        with worker_deaths_told():
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            raise lost

    with signal_handled(signal.SIGALRM, tell), pytest.raises(RuntimeError, match="killed"):
        read()


def test_a_lost_connection_without_a_dead_worker_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ConnectionResetError, match="by the archive"), worker_deaths_told():
        raise ConnectionResetError("closed by the archive")


# Micro-batches.


def micro(weight, number=0):
    return MicroBatch(None, None, None, weight, number)


def test_only_a_known_weight_of_zero_is_empty():
    assert micro(0.0).is_empty and micro(0).is_empty
    assert not micro(3.0).is_empty and not micro(torch.tensor(0.0)).is_empty


def test_detached_losses_keep_their_values_and_no_graph():
    batch, parameter = micro(1.0), torch.tensor(2.0, requires_grad=True)
    batch.losses = {"loss": 3 * parameter, "dice": parameter.square()}
    logs = batch.detach_losses()
    assert logs == {"train_loss": 6.0, "train_dice": 4.0}
    assert batch.losses["loss"] is logs["train_loss"]
    assert batch.detach_losses("val_") == {"val_loss": 6.0, "val_dice": 4.0}
    assert not any(value.requires_grad for value in [*logs.values(), *batch.losses.values()])


def test_a_cleared_batch_keeps_what_the_loader_gave():
    batch = MicroBatch("raw", IMAGE, MASK, 12.0, 3, 0.5, {"loss": IMAGE.sum()}, {"loss": MASK})
    batch.clear()
    assert batch == MicroBatch("raw", IMAGE, MASK, 12.0, 3, 0.5)


# Shares.


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=9))
def test_shares_are_weights_over_the_total(weights):
    window = [micro(float(weight)) for weight in weights]
    set_shares(window)
    total = sum(weights)
    assert [batch.share for batch in window] == [w / total if w else 0.0 for w in weights]
    assert not total or math.fsum(batch.share for batch in window) == pytest.approx(1.0)


@given(st.lists(st.tuples(st.integers(1, 999), st.floats(0, 10)), min_size=1, max_size=6))
def test_shares_make_one_large_batch(batches):
    """Of a loss, and so of its gradient: the mean over all pixels, whatever the split."""
    window = [micro(float(count)) for count, _ in batches]
    set_shares(window)
    together = sum(count * mean for count, mean in batches) / sum(count for count, _ in batches)
    found = sum(batch.share * mean for batch, (_, mean) in zip(window, batches, strict=True))
    assert found == pytest.approx(together)


def test_shares_of_weights_on_a_device_stay_there():
    window = [micro(torch.tensor(3)), micro(0.0), micro(torch.tensor(1))]
    set_shares(window)
    assert window[0].share.item() == 0.75 and window[2].share.item() == 0.25
    assert window[1].share == 0.0 and not isinstance(window[1].share, torch.Tensor)


# Windows.


def prepare(raw, number):
    return MicroBatch(raw, raw, raw, float(raw), number)


def read_all(windows):
    found = []
    while window := windows.read():
        found.append([(batch.number, batch.raw) for batch in window])
    return found


@given(st.integers(0, 9), st.integers(1, 4), st.integers(0, 5))
def test_windows_hold_every_batch_once(count, size, number):
    windows = AccumulationWindows(range(count), size, prepare, number)
    found = read_all(windows)
    assert [len(window) for window in found[:-1]] == [size] * (len(found) - 1)
    assert [x for window in found for x in window] == [(number + n, n) for n in range(count)]
    assert windows.read() == [] and not windows.raised


def test_the_last_window_is_divided_by_what_it_holds():
    windows = AccumulationWindows([64, 16, 0, 48, 8], 2, prepare)
    shares = [[batch.share for batch in windows.read()] for _ in range(3)]
    assert shares == [[0.8, 0.2], [0.0, 1.0], [1.0]]


class Moody:
    """An iterator that raises at one position, once, and then continues."""

    def __init__(self, count, position, error):
        self.numbers, self.position, self.error = iter(range(count)), position, error

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == 0 and self.error:
            error, self.error = self.error, None
            raise error
        self.position -= 1
        return next(self.numbers)


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("position", range(5))
def test_an_error_of_the_loader_loses_no_batch(position, error):
    windows, found = AccumulationWindows(Moody(5, position, error), 3, prepare), []
    for _ in range(4):
        try:
            found += [batch.raw for batch in windows.read()]
        except type(error):
            assert windows.raised
    assert found == [0, 1, 2, 3, 4] and windows.raised


@pytest.mark.parametrize("position", range(5))
def test_an_error_while_preparing_loses_no_batch(position):
    errors = [RuntimeError("boom")]

    def moody(raw, number):
        if number == position and errors:
            raise errors.pop()
        return prepare(raw, number)

    windows, found = AccumulationWindows(range(5), 3, moody), []
    for _ in range(4):
        try:
            found += [(batch.number, batch.raw) for batch in windows.read()]
        except RuntimeError:
            assert not windows.raised  # the loader is fine
    assert found == [(n, n) for n in range(5)]


def test_a_loader_is_not_asked_again_after_its_end():
    class Once:
        ends = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.ends += 1
            raise StopIteration

    loader = Once()
    reader = BatchReader(loader)
    assert [reader.fetch() for _ in range(3)] == [False] * 3 and loader.ends == 1


def test_waiting_is_measured(monkeypatch):
    """Starting the loader takes 8 ticks of the clock, a batch one, and its end one."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    class Slow:
        def __iter__(self):
            clock[0] += 8.0
            return self.batches()

        def batches(self):
            for number in range(3):
                clock[0] += 1.0
                yield number
            clock[0] += 1.0

    def slowly(raw, number):
        clock[0] += 100.0  # which is not the loader's
        return prepare(raw, number)

    windows = AccumulationWindows(Slow(), 2, slowly)
    assert windows.waited == 8.0
    windows.read()
    assert windows.waited == 10.0
    windows.read()
    assert windows.waited == 12.0
