import asyncio

from jouletrace.requests.inbox import Events, Inbox, Loss, Origin
from jouletrace.requests.records import RequestRecord


def some(count: int) -> list[RequestRecord]:
    return [RequestRecord(request_id=str(i)) for i in range(count)]


async def test_first_in_first_out_and_never_over_capacity() -> None:
    inbox = Inbox(1024)
    assert inbox.offer(Origin.HTTP, some(1000))
    assert not inbox.offer(Origin.STREAM, some(25))
    assert inbox.offer(Origin.STREAM, some(24))
    assert len(inbox) == 1024
    first, second = inbox.take(), inbox.take()
    assert first is not None
    assert second is not None
    assert (len(first.records), second.origin) == (1000, Origin.STREAM)
    assert inbox.take() is None
    # What was taken out and is not booked yet still holds its place.
    assert len(inbox) == 1024
    inbox.done(first)
    assert len(inbox) == 24


async def test_nothing_is_always_taken() -> None:
    inbox = Inbox(1024)
    inbox.offer(Origin.HTTP, some(1024))
    assert inbox.offer(Origin.HTTP, [])


async def test_counts_add_up() -> None:
    inbox = Inbox(1024)
    inbox.offer(Origin.HTTP, some(10))
    inbox.lost(Origin.HTTP, Loss.INVALID, 3)
    inbox.lost(Origin.DATAGRAM, Loss.QUEUE_FULL)
    inbox.lost(Origin.DATAGRAM, Loss.QUEUE_FULL, 0)
    inbox.refused(Origin.HTTP, "duplicate")
    assert inbox.events() == Events(
        {"http": 13, "datagram": 1}, {("http", "invalid"): 3, ("http", "duplicate"): 1, ("datagram", "queue_full"): 1}
    )


async def test_a_full_inbox_makes_its_senders_wait_until_half_of_it_is_free() -> None:
    inbox = Inbox(1024)
    inbox.offer(Origin.STREAM, some(600))
    inbox.offer(Origin.STREAM, some(424))
    await inbox.room()
    assert not inbox.offer(Origin.STREAM, some(1))
    waiting = asyncio.create_task(inbox.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    batch = inbox.take()
    assert batch is not None
    inbox.done(batch)
    await asyncio.wait_for(waiting, 1)


async def test_waiting_for_records_and_for_their_end() -> None:
    inbox = Inbox(1024)
    await inbox.drained()
    filled = asyncio.create_task(inbox.filled())
    await asyncio.sleep(0)
    assert not filled.done()
    inbox.offer(Origin.HTTP, some(1))
    await asyncio.wait_for(filled, 1)
    drained = asyncio.create_task(inbox.drained())
    batch = inbox.take()
    await asyncio.sleep(0)
    assert not drained.done()
    assert batch is not None
    inbox.done(batch)
    await asyncio.wait_for(drained, 1)


async def test_memory_is_bounded_as_well_as_records() -> None:
    inbox = Inbox(1024, 1 << 20)
    assert inbox.offer(Origin.STREAM, some(1), 600_000)
    assert not inbox.is_full
    assert not inbox.offer(Origin.STREAM, some(1), 600_000)
    assert inbox.is_full
    assert inbox.offer(Origin.HTTP, some(1), 400_000)
    assert (len(inbox), inbox.held_bytes) == (2, 1_000_000)
    # Room again when half of it is free.
    for left, is_full in ((400_000, False), (0, False)):
        batch = inbox.take()
        assert batch is not None
        inbox.done(batch)
        assert (inbox.held_bytes, inbox.is_full) == (left, is_full)


async def test_a_batch_larger_than_the_whole_is_taken_alone() -> None:
    inbox = Inbox(1024, 1 << 20)
    assert inbox.offer(Origin.HTTP, some(1), 1)
    assert not inbox.offer(Origin.HTTP, some(1), 1 << 30)
    batch = inbox.take()
    assert batch is not None
    inbox.done(batch)
    assert inbox.offer(Origin.HTTP, some(1), 1 << 30)
    assert not inbox.offer(Origin.HTTP, some(1), 1)
