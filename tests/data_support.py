"""Rows, files that hold them, and errors of reading them."""

import pytest

from montessori.data import load_rows
from montessori.errors import DataError

ROWS = [{"instruction": "Say hi", "response": "hi"}, {"instruction": "Naïve?", "response": "oui"}]
LINES = b'{"instruction": "Say hi", "response": "hi"}\n{"instruction": "Na\xc3\xafve?", "response": "oui"}\n'


def fault(source, error=DataError, **options):
    """The message of the error, checked to be one line."""
    with pytest.raises(error) as caught:
        load_rows(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(path, content):
    path.write_bytes(content)
    return path
