"""Who may write to a checkpoints folder; what is kept and deleted is tested through `Checkpoints`."""

import errno
import fcntl
import os

import pytest

from vlm.checkpoint import Checkpoints, steps
from vlm.errors import UserError


def test_a_file_system_without_locks_is_not_called_busy(tmp_path, monkeypatch):
    answers = [errno.EACCES, errno.EAGAIN, errno.ENOLCK, errno.ENOSYS]

    def lockf(descriptor, operation):
        number = answers.pop(0)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert [steps.WriterLock(tmp_path).acquire() for _ in range(2)] == [False, False]
    for reason in ("No locks available", "Function not implemented"):
        with pytest.raises(UserError, match=rf"cannot lock .*\.lock: {reason}"):
            Checkpoints(tmp_path)
