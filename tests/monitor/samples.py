"""A snapshot of an invented shop, for tests of the page and for its picture in the docs."""

from __future__ import annotations

import math
import time

from wsgi_bg.status import (
    DurableTask,
    Failure,
    LostTask,
    Minute,
    NameCounts,
    ProcessStatus,
    RunningTask,
    Snapshot,
    Times,
)

RECEIPT = "shop.orders.send_receipt"
CHARGE = "shop.orders.charge_card"
THUMBNAILS = "shop.images.make_thumbnails"
REINDEX = "shop.search.reindex_product"
NEWSLETTER = "shop.mail.send_newsletter"

TRACEBACK = """\
Traceback (most recent call last):
  File "/srv/shop/orders.py", line 41, in charge_card
    gateway.charge(order.total)
  File "/srv/shop/gateway.py", line 17, in charge
    raise CardDeclined("card 4711 was declined")
shop.gateway.CardDeclined: card 4711 was declined
"""


def times(p50: float, count: int = 300) -> Times:
    return Times(count, p50, 2.5 * p50, 4 * p50, 6 * p50)


def _minute(now: float, age: int) -> Minute:
    is_busy = 35 < age < 43
    return Minute(
        now - now % 60 - 60 * age,
        succeeded=round(310 + 150 * math.sin(age / 9) + 40 * math.sin(age * 3.7)),
        failed={21: 9, 22: 31, 23: 16, 40: 5}.get(age, 0),
        sent=round(12 + 10 * math.sin(age * 1.3)),
        wait=times(0.011 if is_busy else 0.004 + 0.001 * math.sin(age)),
        run=times(0.21 + 0.12 * math.sin(age / 5) + 0.02 * math.sin(age * 2.9)),
    )


def _process(now: float, pid: int, busy: int, pending: int, age: float = 0.3) -> ProcessStatus:
    return ProcessStatus(
        pid=pid,
        started=now - 8040,
        updated=now - age,
        is_alive=age < 60,
        command="gunicorn: worker [shop:app]",
        threads_busy=busy,
        threads_idle=3,
        threads=40,
        pending=pending,
        max_pending=1000,
        run_here=17 if busy > 30 else 0,
        loop_lag=0.0004 * busy,
        outbox=0,
    )


def snapshot() -> Snapshot:
    now = time.time()
    return Snapshot(
        taken=now,
        processes=(
            _process(now, 4100, 7, 12),
            _process(now, 4101, 35, 41),
            _process(now, 4102, 1, 1, age=80),
        ),
        running=(
            RunningTask(THUMBNAILS, "4f0c", "POST /photos", now - 21, 1, 4101, "wsgi_bg-1"),
            RunningTask(CHARGE, "51aa", "POST /orders", now - 6.2, 2, 4100, "wsgi_bg-4"),
            RunningTask(RECEIPT, "51ab", "POST /orders", now - 0.08, 1, 4100, "wsgi_bg-2"),
        ),
        waiting={RECEIPT: 12, THUMBNAILS: 3},
        failures=tuple(
            Failure(name, task, request, now - age, attempt, pid, error, "4711", TRACEBACK)
            for name, task, request, age, attempt, pid, error in (
                (CHARGE, "50f1", "POST /orders", 76, 1, 4100, "CardDeclined"),
                (THUMBNAILS, "50e8", "POST /photos", 190, 3, 4101, "OSError"),
                (CHARGE, "4fd3", "POST /orders", 1290, 1, 4101, "CardDeclined"),
            )
        ),
        lost=(LostTask(REINDEX, "4f99", "PUT /products/7", now - 80, 4102),),
        names=(
            NameCounts(THUMBNAILS, 1, 3, 6078, 4, 11, wait=times(0.009), run=times(0.24)),
            NameCounts(NEWSLETTER, sent=612),
            NameCounts(CHARGE, 1, 0, 9117, 57, 4, wait=times(0.003), run=times(0.4)),
            NameCounts(RECEIPT, 1, 12, 18234, wait=times(0.004), run=times(0.08)),
            NameCounts(REINDEX, 0, 0, 2604, lost=1, wait=times(0.002), run=times(0.02)),
        ),
        minutes=tuple(_minute(now, age) for age in range(59, -1, -1)),
        durable=(
            DurableTask(CHARGE, "51aa", "running", now - 7, None, 2, "", 4100),
            DurableTask(RECEIPT, "51ac", "waiting", now - 8, None, 1, "", 4100),
            DurableTask(CHARGE, "50f9", "retrying", now - 49, now + 42, 2, "OSError", 4101),
            DurableTask(CHARGE, "50f1", "failed", now - 77, None, 1, "CardDeclined", 4100),
            DurableTask(REINDEX, "50a0", "aside", now - 290, None, 3, "", None),
        ),
        counts=NameCounts("", 3, 15, 36033, 61, 15, sent=612, lost=1),
    )
