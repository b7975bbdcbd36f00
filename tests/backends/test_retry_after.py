import pytest

from backends.reply import Reply
from backends.retry_after import MAX_PAUSE_S, retry_after_s

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], None),
        ([(b"retry-after", b"3")], 3.0),
        ([(b"retry-after", b" 1.5 ")], 1.5),
        ([(b"retry-after", b"3"), (b"retry-after-ms", b"250")], 0.25),
        ([(b"retry-after", b"Tue, 14 Nov 2023 22:13:50 GMT")], 30.0),
        ([(b"retry-after", b"Tue, 14 Nov 2023 22:13:00 GMT")], 0.0),
        ([(b"retry-after", b"86400")], MAX_PAUSE_S),
        ([(b"retry-after", b"1e999")], MAX_PAUSE_S),
        ([(b"retry-after", b"-1")], None),
        ([(b"retry-after", b"soon")], None),
        ([(b"retry-after", b"")], None),
        ([(b"retry-after-ms", b"nan")], None),
    ],
)
def test_every_way_to_ask_for_a_pause_is_understood_and_bounded(headers, expected):
    assert retry_after_s(Reply(None, 429, dict(headers)), NOW) == expected
