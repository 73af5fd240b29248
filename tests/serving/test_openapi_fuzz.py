"""Schemathesis against the server's own OpenAPI document: whatever comes in, what goes out is as documented."""


import schemathesis

import iqareward
from iqareward.rewards.wire import Limits
from iqareward.serving.settings import Settings
from tests.serving.in_process import application, served

app = application(
    {"piqe": served(iqareward.load("piqe"))},
    Settings(limits=Limits(max_bytes=20_000), jpeg="always", token="fuzz"),
)
schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Authorization": "Bearer fuzz"})
