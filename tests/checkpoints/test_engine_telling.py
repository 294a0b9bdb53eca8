"""Progress in words: the numbers in a line are those of their definition, and a stream that is no terminal gets a line now and then."""

from __future__ import annotations

import io

from peft_ref.checkpoints.telling import Bar, line_of
from peft_ref.checkpoints.todo import Progress


def test_rate_and_time_left_follow_from_what_was_written() -> None:
    line = line_of(Progress(written=500_000_000, total=2_000_000_000, shards=1, of=4, seconds=0.25))
    assert line == " 25%  0.50 of 2.00 GB  2.00 GB/s  0:00:01 left  1/4 shards"  # 1.5 GB at 2 GB/s are 0.75 s
    slow = line_of(Progress(written=1_000_000, total=401_000_000, shards=0, of=1, seconds=10.0))
    assert slow == "  0%  1.00 of 401.00 MB  0.10 MB/s  1:06:40 left  0/1 shards"  # 400 MB at 0.1 MB/s are 4000 s


def test_before_the_first_byte_no_time_is_told() -> None:
    assert "starting" in line_of(Progress(0, 10, 0, 1, 0.0))
    assert "100%" in line_of(Progress(0, 0, 0, 0, 1.0))


def test_a_line_fits_on_a_terminal_of_eighty_columns() -> None:
    widest = line_of(Progress(written=9_990_000_000, total=9_990_000_000, shards=12, of=12, seconds=10.0))
    assert len(widest) + 16 + len("[] ") <= 80


def test_a_file_gets_a_line_at_most_every_few_seconds() -> None:
    stream = io.StringIO()
    bar = Bar(stream, every=1000.0)
    for n in range(5):
        bar.tell(Progress(n, 10, 0, 1, 1.0))
    bar.done()
    assert stream.getvalue() == ""
    often = Bar(stream, every=0.0)
    for n in range(3):
        often.tell(Progress(n, 10, 0, 1, 1.0))
    assert stream.getvalue().count("\n") == 3
    assert "\x1b" not in stream.getvalue()
