"""Roles over Ray's object store compute what they compute inline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actors.bridge.mailbox import start_mailbox
from actors.bridge.rendezvous import Rendezvous
from services.runtime.calls import call, gather
from tests.support.joint_toy import Case, inline, ray_role

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("ray_cluster")
def test_over_the_object_store_as_inline() -> None:
    """Bit for bit, with a ragged tensor, one without gradient, and bytes that are not copied by pickle."""
    import ray

    case = Case(kinds="gqg", three=True, dropout=0.2, bridge={"transport": "objects"})
    with Rendezvous() as rendezvous:
        rendezvous.open(1)
        mailbox = start_mailbox("test-bridge", 1)
        task: Any = ray.remote(ray_role)
        refs = [task.options(num_cpus=0.1).remote(case, role, rendezvous.address, 1, mailbox) for role in case.roles]
        found = dict(zip(case.roles, gather(refs, [f"role {role}" for role in case.roles], 120), strict=True))
    reference = inline(Case(kinds="gqg", three=True, dropout=0.2))
    for role in case.roles:
        assert not isinstance(found[role], Exception), found[role]
        terms, weights = found[role]
        assert terms == reference[role].terms
        for name, value in weights.items():
            assert torch.equal(torch.from_numpy(value.copy()), reference[role].weights[name])


@pytest.mark.usefixtures("ray_cluster")
def test_a_mailbox_gives_back_what_was_put() -> None:
    import ray

    mailbox = start_mailbox("test-bridge-letters", 1)
    refs = [ray.put(torch.arange(5).numpy())]
    call(mailbox.put.remote(0, 1, 0, b"header", refs), "the mailbox", 30)
    header, parts = call(mailbox.take.remote(0, 1, 0, 1.0), "the mailbox", 30)
    assert header == b"header"
    assert call(parts[0], "the tensor", 30).tolist() == [0, 1, 2, 3, 4]
    assert call(mailbox.take.remote(0, 1, 1, 0.05), "the mailbox", 30) is None
