"""Values of options as people write them."""

import pytest

from quasar_cli.options import parse_bytes
from quasar_core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("8e9", 8 * 10**9)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes("--max-memory", text) == size


@pytest.mark.parametrize("text", ["", "GB", "much", "-1GB", "0", "inf", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--max-memory must be a size such as 8GB or 500MB, not"):
        parse_bytes("--max-memory", text)
