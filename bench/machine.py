"""The machine and the software that every result file records beside its numbers."""

import platform
from datetime import datetime, timezone

import torch
import triton


def machine() -> dict:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
