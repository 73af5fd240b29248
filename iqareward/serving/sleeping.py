"""Which rewards are asleep: kept by Ray itself, so that every front, every process and those that start later agree."""

from typing import Any

from iqareward.optional import require

_NAMESPACE, _PREFIX = "iqareward", "asleep:"


def is_asleep(deployment: str) -> bool:
    """Whether the processes of a deployment are to sleep; asks Ray, and waits."""
    return bool(_store()._internal_kv_get(_PREFIX + deployment, namespace=_NAMESPACE))


def set_asleep(deployment: str, asleep: bool) -> None:
    """Decide it, for the processes that run and for those that will."""
    if asleep:
        _store()._internal_kv_put(_PREFIX + deployment, "1", namespace=_NAMESPACE)
    else:
        _store()._internal_kv_del(_PREFIX + deployment, namespace=_NAMESPACE)


def wake_all() -> None:
    """Forget what an earlier server on this Ray decided."""
    _store()._internal_kv_del(_PREFIX, del_by_prefix=True, namespace=_NAMESPACE)


def _store() -> Any:
    return require("ray.experimental.internal_kv", extra="serve", purpose="the reward server")
