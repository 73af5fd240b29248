"""The reward server, its client, and clients of MLLM judges behind other servers. Needs the extra `serve`.

`wire.py` is the format of requests and answers, `client.py` sends them, `judges.py` asks OpenAI-compatible servers. On
the server `run.py` starts Ray Serve, `listener.py` speaks HTTP/1.1, `app.py` has the routes, `requests.py` reads what
comes in, `backend.py` sends calls to the processes that hold the rewards, and `replica.py` is such a process.
"""

from iqareward.optional import require

for _module in ("pydantic", "tenacity"):
    require(_module, extra="serve", purpose="iqareward.serving")
