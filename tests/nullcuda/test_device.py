"""What the device does, what it leaves out, and that waits are counted."""

import pytest
import torch
from torch import nn

from nullcuda import counts, late_copies, logged, mark
from nullcuda.waits import waits_noted


def plain_loop(model, optimizer, *, scaler=None, read=lambda loss: None):
    """Train by hand; return how often the host waited in each of the later steps."""
    scaler = scaler or torch.amp.GradScaler("cuda", enabled=False)
    lines, waits, counted = [], [], []
    for _ in range(6):
        lines.clear()
        before = counts()["waits"]
        with waits_noted(lines.append):
            loss = model(torch.ones(2, 3, device="cuda")).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            read(loss)
        waits.append(len(lines))
        counted.append(counts()["waits"] - before)
    assert counted == waits
    return waits[2:]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("fused", [False, True], ids=["AdamW", "AdamW fused"])
@pytest.mark.parametrize(("read", "reads"), [(lambda loss: None, 0), (torch.Tensor.item, 1)])
def test_waits_of_a_loop_written_by_hand_are_counted(fused, half, read, reads):
    """GradScaler asks the device before it calls an optimizer that is not fused."""
    model = nn.Linear(3, 1).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused or None)
    scaler = torch.amp.GradScaler("cuda", enabled=half)
    waits = plain_loop(model, optimizer, scaler=scaler, read=read)
    assert waits == [reads + (half and not fused)] * 4


def test_copies_and_fills_are_made_and_nothing_else():
    numbers = torch.arange(5.0)
    there = numbers.cuda()
    assert torch.equal(there.clone().cpu(), numbers)
    assert not (there + 1).any() and not (there @ there).any()
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64):
        assert torch.full((300,), 7, dtype=dtype, device="cuda").tolist() == [7] * 300
    assert torch.ones(3, dtype=torch.bool, device="cuda").all().item() is False


def test_the_device_is_one_gpu():
    assert torch.cuda.device_count() == 1 and torch.cuda.get_device_name() == "Null device"
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.ones(3, device="cuda") + torch.ones(3)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(3, device="cuda:1")
    free, total = torch.cuda.mem_get_info()
    large = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    assert torch.cuda.mem_get_info() == (free - (2 << 30), total)
    del large
    assert torch.cuda.mem_get_info() == (free, total)
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(total + 1, dtype=torch.uint8, device="cuda")


def test_events_tell_the_time():
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for event in events:
        event.record()
    assert events[1].query() and events[0].elapsed_time(events[1]) >= 0


def test_the_log_tells_streams_and_memory():
    side, pinned = torch.cuda.Stream(), torch.ones(5).pin_memory()
    with logged() as log:
        mark("side")
        with torch.cuda.stream(side):
            there = pinned.to("cuda", non_blocking=True)
        torch.cuda.current_stream().wait_stream(side)
        mark("main")
        torch.ones(7).to("cuda", non_blocking=True)
        there.neg().cpu()
    assert log[0].what == "mark" and log[0].details == ("side",)
    copies = [entry for entry in log if entry.what == "copy"]
    assert [(c.way, *c.details[1:]) for c in copies] == [
        ("h2d", "20", "pinned", "async"),
        ("h2d", "28", "pageable", "async"),
        ("d2h", "20", "pageable", "async"),
    ]
    assert copies[0].stream > 0 and copies[1].stream == copies[2].stream == 0
    record, join = (next(e for e in log if e.what == what) for what in ("record", "join"))
    assert record.stream == copies[0].stream and join.stream == 0
    assert record.details == join.details
    kernel = next(entry for entry in log if entry.what == "launch")
    assert kernel.stream == 0 and "neg" in kernel.details[0]
    assert log[-1].what == "wait" and log[-1].details == ("stream",)
    with logged() as log:
        pass
    assert log == []


def test_late_copies_arrive_when_the_host_waits():
    there = torch.ones(3, device="cuda")
    here = torch.zeros(3).pin_memory()
    with late_copies():
        here.copy_(there, non_blocking=True)
        there.fill_(2.0)
        assert here.tolist() == [0, 0, 0]
        torch.cuda.current_stream().synchronize()
        assert here.tolist() == [1, 1, 1]
        here.copy_(there)  # which waits
        assert here.tolist() == [2, 2, 2]
