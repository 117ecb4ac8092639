"""The progress bars of this package."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

from montessori import processes

# Between two lines of progress where nobody looks on.
SECONDS_IN_A_LOG = 30


def progress_bar(desc: str, total: int, unit: str, shown: bool, delay: float = 0) -> tqdm[Any]:
    """A bar of tqdm if `shown`, of the first of several processes; on a terminal after `delay` seconds.

    In the log of a batch job it is a line now and then, and none of what is soon over.
    """
    pace = {"delay": delay} if sys.stderr.isatty() else {"delay": SECONDS_IN_A_LOG, "mininterval": SECONDS_IN_A_LOG}
    disable = not (shown and processes.is_main())
    return tqdm(total=total, unit=unit, unit_scale=True, desc=desc, disable=disable, **pace)
